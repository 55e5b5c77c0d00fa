"""``rm``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs
from netnsd.client.listing import list_environments
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import Exchange, environment_path
from netnsd.errors import NetnsdError, NotFound

# Removals under way at once: the daemon removes in bulk, and caps a user's connections.
_AT_ONCE = 16


@click.command("rm", cls=Verb, epilog="""\b
Examples:
  netnsctl rm web
  netnsctl rm web db
  netnsctl rm --all --yes
  netnsctl rm --all -l team=shop""")
@click.argument("refs", nargs=-1, metavar="[REF]...", shell_complete=complete_refs)
@click.option("--all", "everything", is_flag=True, help="All of your own.")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="With --all: only those with this label.")
@click.option("-y", "--yes", is_flag=True, help="With --all: do not ask.")
@click.pass_context
def rm_verb(ctx: click.Context, refs: tuple[str, ...], everything: bool, labels: tuple[str, ...], yes: bool) -> int:
    """Remove environments: their processes, namespace, ports and logs. Returns when they are gone."""
    session = session_of(ctx)
    if everything == bool(refs):
        raise click.UsageError("name environments, or pass --all, not both." if refs
                               else "name the environments to remove, or pass --all.", ctx)
    if labels and not everything:
        raise click.UsageError("--label chooses among --all.", ctx)
    if not everything:
        # Each once, in the order given.
        chosen = [(ref, ref) for ref in dict.fromkeys(refs)]
    else:
        found = list_environments(session, False, labels)
        if not found or not (yes or _confirmed([e["name"] for e in found])):
            render.emit(session, {"removed": []}, lambda: "nothing removed", [])
            return 0
        # By id: a name may be somebody's next environment by then.
        chosen = [(e["name"], e["id"]) for e in found]
    removed, code = _remove(session, chosen, everything)
    text = "\n".join(f"removed {printable(name)}" for name in removed)
    render.emit(session, {"removed": removed}, lambda: text, removed)
    return code


def _is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _confirmed(names: list[str]) -> bool:
    """Ask, where somebody is there to answer."""
    if not _is_interactive():
        return True
    shown = ", ".join(printable(n) for n in names[:10]) + (" ..." if len(names) > 10 else "")
    what = "1 environment" if len(names) == 1 else f"{len(names)} environments"
    return click.confirm(f"Remove {what} ({shown})?", err=True)


def _remove(session: Session, chosen: list[tuple[str, str]], gone_is_fine: bool) -> tuple[list[str], int]:
    """Remove (name, ref) pairs; goes on after errors. Returns the removed names and the first failure's code."""
    removed: list[str] = []
    code = 0

    def step(action: Callable[[], Any]) -> Any:
        nonlocal code
        try:
            return action()
        except NetnsdError as error:
            if gone_is_fine and isinstance(error, NotFound):
                return {}
            session.fail(error)
            code = code or error.exit_code
            return None

    for at in range(0, len(chosen), _AT_ONCE):
        under_way: list[tuple[str, Exchange]] = []
        for name, ref in chosen[at:at + _AT_ONCE]:
            exchange = step(partial(_begin, session, ref))
            if exchange is not None:
                under_way.append((name, exchange))
        for name, exchange in under_way:
            if step(exchange.value) is not None:
                removed.append(name)
    return removed, code


def _begin(session: Session, ref: str) -> Exchange:
    return session.client.begin("DELETE", environment_path(ref))
