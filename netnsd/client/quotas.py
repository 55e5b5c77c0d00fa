"""``quota``: what each user may have in all, and what it has."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb, VerbGroup
from netnsd.client.arguments import processors, size
from netnsd.client.session import session_of
from netnsd.client.transport import Client, quota_path

_UNLIMITED = "unlimited"
_COUNTS = ("environments", "ports", "memory", "cpu")


@click.group("quota", cls=VerbGroup, short_help="Show or set what each user may have.", epilog="""\b
Examples:
  netnsctl quota show
  netnsctl quota set alice --environments 20 --memory 8G""")
def quota_verb() -> None:
    """What each user may have in all: environments, published ports, memory, processors, creations a minute."""


@quota_verb.command("show", cls=Verb, epilog="""\b
Examples:
  netnsctl quota show
  netnsctl quota show alice -o json""")
@click.argument("user", required=False)
@click.pass_context
def show_verb(ctx: click.Context, user: str | None) -> None:
    """Show your quota and what you have of it; of USER (admins only). Admins who name nobody see everyone's."""
    session = session_of(ctx)
    if user is not None:
        found = [_checked(session.client, session.client.request("GET", quota_path(user)))]
    else:
        answer = session.client.request("GET", "/v1/quotas")
        listed = answer.get("quotas") if isinstance(answer, dict) else None
        if not isinstance(listed, list):
            raise session.client.bad_answer("not a list of quotas")
        found = [_checked(session.client, each) for each in listed]
    value = found if user is None else found[0]
    render.emit(session, value, lambda: _listing(found), [each["owner"]["user"] for each in found])


def _or_unlimited(convert: Any) -> Any:
    def read(value: str) -> Any:
        return None if value == _UNLIMITED else convert(value)

    read.__name__ = convert.__name__
    return read


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise click.BadParameter(f"{value!r} is neither a whole number nor {_UNLIMITED}.")
    return int(value)


@quota_verb.command("set", cls=Verb, epilog="""\b
Examples:
  netnsctl quota set alice --environments 20 --ports 40
  netnsctl quota set alice --memory 8G --cpus 4 --creations-per-minute unlimited""")
@click.argument("user")
@click.option("--environments", type=_or_unlimited(_count), metavar="N", help="So many, those kept warm included.")
@click.option("--ports", type=_or_unlimited(_count), metavar="N", help="So many published ports.")
@click.option("--memory", type=_or_unlimited(size), metavar="SIZE",
              help="What --memory of all comes to; each needs it.")
@click.option("--cpus", "cpu", type=_or_unlimited(processors), metavar="N",
              help="What --cpus of all comes to; each needs it.")
@click.option("--creations-per-minute", type=_or_unlimited(_count), metavar="N", help="So many.")
@click.pass_context
def set_verb(ctx: click.Context, /, user: str, **limits: Any) -> None:
    """Give USER a quota (admins only): a number, or `unlimited`. What you leave out is as for all users.

    What USER has beyond it stays.
    """
    given = {name: value for name, value in limits.items()
             if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    if not given:
        raise click.UsageError("nothing is set: `netnsctl quota reset` undoes a quota.", ctx)
    session = session_of(ctx)
    _print(ctx, session.client.request("PUT", quota_path(user), given))


@quota_verb.command("reset", cls=Verb, epilog="""\b
Examples:
  netnsctl quota reset alice""")
@click.argument("user")
@click.pass_context
def reset_verb(ctx: click.Context, user: str) -> None:
    """Let USER have what all users have (admins only)."""
    _print(ctx, session_of(ctx).client.request("DELETE", quota_path(user)))


def _print(ctx: click.Context, answer: Any) -> None:
    session = session_of(ctx)
    quota = _checked(session.client, answer)
    render.emit(session, quota, lambda: _listing([quota]), [quota["owner"]["user"]])


def _checked(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be a quota. Raises BadAnswer where it is none."""
    if not (isinstance(value, dict) and all(isinstance(value.get(key), dict) for key in ("owner", "limits", "used"))
            and isinstance(value["owner"].get("user"), str)
            and all(isinstance(value["used"].get(name), int | float) for name in _COUNTS)):
        raise client.bad_answer("not a quota")
    return value


def _listing(quotas: list[dict[str, Any]]) -> str:
    """What each has, and of how much."""
    rows = [["USER", *(name.upper() for name in _COUNTS), "PER MINUTE"]]
    for quota in quotas:
        pace = quota["limits"].get("creations_per_minute")
        rows.append([quota["owner"]["user"], *(_part(quota, name) for name in _COUNTS),
                     "-" if pace is None else str(pace)])
    return render.table(rows)


def _part(quota: dict[str, Any], name: str) -> str:
    shown = render.size if name == "memory" else "{:g}".format
    most = quota["limits"].get(name)
    return shown(quota["used"][name]) + (f" of {shown(most)}" if isinstance(most, int | float) else "")
