"""``rm``."""

from __future__ import annotations

import sys
from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs
from netnsd.client.overview import list_environments
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import ANSWER_SECONDS, Exchange, check_ref, error_from, quote
from netnsd.errors import NetnsdError, NotFound

# What one request names, percent-encoded: the daemon reads a path with its query of 8 KiB at most.
_QUERY_BYTES = 8000
# Requests under way at once: the daemon caps a user's connections.
_AT_ONCE = 16
# What an answer may take longer for each environment that it is about.
_EACH_SECONDS = 0.5


@click.command("rm", cls=Verb, epilog="""\b
Examples:
  netnsctl rm web
  netnsctl rm web db --no-wait
  netnsctl rm --all --yes
  netnsctl rm --all -l team=shop""")
@click.argument("refs", nargs=-1, metavar="[REF]...", shell_complete=complete_refs)
@click.option("--all", "everything", is_flag=True, help="All of your own.")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="With --all: only those with this label.")
@click.option("-y", "--yes", is_flag=True, help="With --all: do not ask.")
@click.option("--no-wait", is_flag=True, help="Return at once; they are removed behind.")
@click.pass_context
def rm_verb(ctx: click.Context, /, *, refs: tuple[str, ...], everything: bool, labels: tuple[str, ...], yes: bool,
            no_wait: bool) -> int:
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
    removed, code = _remove(session, chosen, not no_wait, gone_is_fine=everything)
    text = "\n".join(f"{'removing' if no_wait else 'removed'} {printable(name)}" for name in removed)
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


def _remove(session: Session, chosen: list[tuple[str, str]], waits: bool, *, gone_is_fine: bool,
            ) -> tuple[list[str], int]:
    """Remove (name, ref) pairs; goes on after errors. Returns the removed names and the first failure's code."""
    failures: dict[str, NetnsdError] = {}
    portions = _portions([ref for _, ref in chosen], failures)
    for at in range(0, len(portions), _AT_ONCE):
        under_way: list[tuple[list[str], Exchange]] = []
        for refs in portions[at:at + _AT_ONCE]:
            try:
                under_way.append((refs, _begin(session, refs, waits)))
            except NetnsdError as error:
                failures |= dict.fromkeys(refs, error)
        for refs, exchange in under_way:
            try:
                failures |= _failures(session, exchange.value())
            except NetnsdError as error:
                failures |= dict.fromkeys(refs, error)
    if gone_is_fine:
        failures = {ref: error for ref, error in failures.items() if not isinstance(error, NotFound)}
    # What befell a whole request is one error of many refs, and said once.
    failed = list({id(failures[ref]): failures[ref] for _, ref in chosen if ref in failures}.values())
    for failure in failed:
        session.fail(failure)
    return [name for name, ref in chosen if ref not in failures], failed[0].exit_code if failed else 0


def _portions(refs: list[str], failures: dict[str, NetnsdError]) -> list[list[str]]:
    """Refs that fit in one request each; keeps why some are in none."""
    portions: list[list[str]] = []
    left = 0
    for ref in refs:
        try:
            size = len("&ref=") + len(quote(check_ref(ref)))
        except NotFound as error:
            failures[ref] = error
            continue
        if size > left:
            portions.append([])
            left = _QUERY_BYTES
        portions[-1].append(ref)
        left -= size
    return portions


def _begin(session: Session, refs: list[str], waits: bool) -> Exchange:
    query = "&".join([f"ref={quote(ref)}" for ref in refs] + ([] if waits else ["wait=0"]))
    return session.client.begin("DELETE", f"/v1/environments?{query}", None,
                                ANSWER_SECONDS + _EACH_SECONDS * len(refs))


def _failures(session: Session, answer: Any) -> dict[str, NetnsdError]:
    """What could not be removed, and why, by ref."""
    failed = answer.get("failed") if isinstance(answer, dict) else None
    if not isinstance(failed, list):
        raise session.client.bad_answer("not what was removed")
    failures = {}
    for failure in failed:
        error = error_from(failure)
        if error is None or not isinstance(failure.get("ref"), str):
            raise session.client.bad_answer("not what could not be removed")
        failures[failure["ref"]] = error
    return failures
