"""``pool``: what the daemon keeps ready before anybody asks."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb, VerbGroup
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import Client

_NUMBERS = ("size", "target", "ready", "claimed", "missed")


@click.group("pool", cls=VerbGroup, short_help="Show or resize what is kept ready.", epilog="""\b
Examples:
  netnsctl pool ls
  netnsctl pool resize 32""")
def pool_verb() -> None:
    """What the daemon keeps ready before anybody asks: slots, and warm environments of your templates."""


@pool_verb.command("ls", cls=Verb, epilog="""\b
Examples:
  netnsctl pool ls
  netnsctl pool ls -o json""")
@click.pass_context
def ls_verb(ctx: click.Context) -> None:
    """List pools: `slots`, and template/NAME for each template of yours that is kept warm."""
    session = session_of(ctx)
    answer = session.client.request("GET", "/v1/pools")
    found = answer.get("pools") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise session.client.bad_answer("not a list of pools")
    pools = [_checked(session.client, each) for each in found]
    render.emit(session, pools, lambda: _listing(pools), [each["name"] for each in pools])


@pool_verb.command("resize", cls=Verb, epilog="""\b
Examples:
  netnsctl pool resize 32""")
@click.argument("size", type=click.IntRange(min=0), metavar="N")
@click.pass_context
def resize_verb(ctx: click.Context, size: int) -> None:
    """Keep N slots ready (admins only), until the daemon starts again: [pool] size is what it starts with."""
    _resize(session_of(ctx), size)


@pool_verb.command("drain", cls=Verb, epilog="""\b
Examples:
  netnsctl pool drain""")
@click.pass_context
def drain_verb(ctx: click.Context) -> None:
    """Keep no slots, and remove those that nobody has (admins only). `netnsctl pool resize` undoes it."""
    _resize(session_of(ctx), 0)


def _resize(session: Session, size: int) -> None:
    pool = _checked(session.client, session.client.request("PATCH", "/v1/pools/slots", {"size": size}))
    render.emit(session, pool, lambda: _listing([pool]), [pool["name"]])


def _checked(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be a pool. Raises BadAnswer where it is none."""
    if (not isinstance(value, dict) or not isinstance(value.get("name"), str)
            or not all(isinstance(value.get(key), int) for key in _NUMBERS)):
        raise client.bad_answer("not a pool")
    return value


def _listing(pools: list[dict[str, Any]]) -> str:
    """A table, and below it why a pool is not full."""
    rows = [["NAME", *(key.upper() for key in _NUMBERS)]]
    rows += [[pool["name"], *(str(pool[key]) for key in _NUMBERS)] for pool in pools]

    def colour(row: int, column: int) -> str:
        return "yellow" if column == 3 and pools[row - 1]["ready"] < pools[row - 1]["target"] else ""

    reasons = [render.paint(f"{printable(pool['name'])}: {printable(str(pool['reason']))}", "yellow")
               for pool in pools if pool.get("reason")]
    return "\n".join([render.table(rows, colour), *reasons])
