"""``token``: bearer tokens, with which programs call the API over TCP."""

from __future__ import annotations

import re
from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb, VerbGroup
from netnsd.client.arguments import check_name, complete_tokens
from netnsd.client.session import printable, session_of
from netnsd.client.transport import Client, token_path

SCOPES = ("read", "write", "admin")
_FIELDS = {"id": str, "name": str, "owner": dict, "scope": str, "created_at": str, "expired": bool}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group("token", cls=VerbGroup, short_help="Create, list and revoke tokens for the API over TCP.", epilog="""\b
Examples:
  netnsctl token create ci --scope write --expires 30d
  netnsctl token revoke ci""")
def token_verb() -> None:
    """Bearer tokens: who has one may call the API over TCP as you, as far as its scope goes."""


@token_verb.command("create", cls=Verb, short_help="Create a token; it is shown this once.", epilog="""\b
Examples:
  netnsctl token create ci --scope write --expires 30d
  TOKEN=$(netnsctl token create ci --scope write -o json | jq -r .token)
  sudo netnsctl token create ci --user alice --scope write""")
@click.argument("name")
@click.option("--scope", type=click.Choice(SCOPES), default="read",
              help="What it is good for: read (default), write (and read), or admin (everything, for admins).")
@click.option("--expires", metavar="DURATION", help="How long it is good: 30d, 12h, 45m or 90s (default: for ever).")
@click.option("--user", metavar="NAME", help="Whose it is to be (admins only; default: yours).")
@click.pass_context
def create_verb(ctx: click.Context, name: str, scope: str, expires: str | None, user: str | None) -> None:
    """Create a token. Only its hash is kept: it is shown this once."""
    session = session_of(ctx)
    request: dict[str, Any] = {"name": check_name(name), "scope": scope}
    if expires is not None:
        request["expires_seconds"] = parse_duration(expires)
    if user is not None:
        request["user"] = check_name(user)
    token = _checked(session.client, session.client.request("POST", "/v1/tokens", request))
    text = token.get("token")
    if not isinstance(text, str):
        raise session.client.bad_answer("a token without the token")
    render.emit(session, token, lambda: f"{_details(token)}\n\n{printable(text)}", [token["name"]])


@token_verb.command("ls", cls=Verb, epilog="""\b
Examples:
  netnsctl token ls
  sudo netnsctl token ls --all""")
@click.option("-a", "--all", "everyones", is_flag=True, help="Everyone's, with their owners (admins).")
@click.pass_context
def ls_verb(ctx: click.Context, everyones: bool) -> None:
    """List tokens, without the tokens themselves."""
    session = session_of(ctx)
    answer = session.client.request("GET", f"/v1/tokens?all={everyones:d}")
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise session.client.bad_answer("not a list of tokens")
    tokens = [_checked(session.client, each) for each in found]
    render.emit(session, tokens, lambda: _listing(tokens), [each["name"] for each in tokens])


@token_verb.command("revoke", cls=Verb, epilog="""\b
Examples:
  netnsctl token revoke ci
  sudo netnsctl token revoke 3f0a51c2d9e4""")
@click.argument("refs", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_tokens)
@click.pass_context
def revoke_verb(ctx: click.Context, refs: tuple[str, ...]) -> int:
    """Revoke tokens, by name or id, and those that were made with them. The next request with one is refused."""
    return render.delete_each(session_of(ctx), refs, token_path, "revoked")


def parse_duration(text: str) -> int:
    """``30d``, ``12h``, ``45m`` or ``90s`` as seconds. Raises click's usage error."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text, re.ASCII)
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text!r} is not a duration, such as 30d, 12h, 45m or 90s.", param_hint="--expires")
    return int(match[1]) * _UNITS[match[2]]


def _checked(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be a token. Raises BadAnswer where it is none."""
    ok = isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in _FIELDS.items())
    if not ok or not isinstance(value.get("expires_at"), str | None):
        raise client.bad_answer("not a token")
    assert isinstance(value, dict)
    return value


def _listing(tokens: list[dict[str, Any]]) -> str:
    rows = [["NAME", "SCOPE", "OWNER", "EXPIRES", "AGE", "ID"]]
    rows += [[t["name"], t["scope"], render.user_name(t), _expiry(t), render.age(t["created_at"]), t["id"]]
             for t in tokens]

    def colour(row: int, column: int) -> str:
        return "red" if column == 3 and tokens[row - 1]["expired"] else ""

    return render.table(rows, colour)


def _details(token: dict[str, Any]) -> str:
    pairs = [("Name", token["name"]), ("Scope", token["scope"]), ("Owner", render.user_name(token)),
             ("Expires", _expiry(token)), ("Id", token["id"])]
    return render.fields([(name, printable(value)) for name, value in pairs])


def _expiry(token: dict[str, Any]) -> str:
    return "expired" if token["expired"] else token["expires_at"] or "never"
