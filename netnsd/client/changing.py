"""``share`` and ``label``: what changes while an environment runs."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs, parse_labels
from netnsd.client.session import session_of
from netnsd.client.transport import environment_path


def _change(ctx: click.Context, ref: str, changes: dict[str, Any]) -> None:
    session = session_of(ctx)
    answer = session.client.request("PATCH", environment_path(ref), changes)
    environment = render.checked_environment(session.client, answer)
    render.emit(session, environment, lambda: render.summary(environment), [environment["name"]])


@click.command("share", cls=Verb, short_help="Say who else reaches an environment's ports.", epilog="""\b
Examples:
  netnsctl share web user:bob,group:shop
  netnsctl share web host
  netnsctl share web lan
  netnsctl share web owner""")
@click.argument("ref", shell_complete=complete_refs)
@click.argument("who")
@click.pass_context
def share_verb(ctx: click.Context, ref: str, who: str) -> None:
    """Let others reach the declared ports of an environment, or nobody again.

    WHO is users and groups (user:NAME,group:NAME), `host` (every user of this host), `lan` (also who comes by the
    host's other addresses), or `owner`. It acts on the next connection, and cuts those of who is let no more.
    """
    _change(ctx, ref, {"share": who})


@click.command("label", cls=Verb, short_help="Attach labels to an environment, or take some away.", epilog="""\b
Examples:
  netnsctl label web team=shop tier=front
  netnsctl label web tier-""")
@click.argument("ref", shell_complete=complete_refs)
@click.argument("labels", nargs=-1, required=True, metavar="K=V|K-...")
@click.pass_context
def label_verb(ctx: click.Context, ref: str, labels: tuple[str, ...]) -> None:
    """Attach labels, and take away those that are written K-. Policies follow at once."""
    gone = {label[:-1]: None for label in labels if label.endswith("-") and "=" not in label}
    kept = parse_labels(tuple(label for label in labels if "=" in label or not label.endswith("-")))
    _change(ctx, ref, {"labels": {**kept, **gone}})
