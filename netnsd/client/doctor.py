"""``doctor`` and ``prune``: what the host lacks, in what state file and kernel do not agree, and the remedy."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.session import Session, printable, session_of
from netnsd.errors import EXIT_FAILURE

_FIELDS = {"kind", "what", "subject", "message"}
_COLOURS = {"missing": "red", "orphan": "red", "stray": "yellow"}


@click.command("doctor", cls=Verb, epilog="""\b
Examples:
  netnsctl doctor
  netnsctl doctor -o json""")
@click.pass_context
def doctor_verb(ctx: click.Context) -> int:
    """Check what the host has and lacks, and whether the state file and the kernel agree about your environments.

    The exit code is 1 where something that is needed is not there, or something is there that is nobody's.
    """
    session = session_of(ctx)
    answer = session.client.request("GET", "/v1/doctor")
    checks = _listed(session, answer, "checks", {"name", "ok"})
    differences = _listed(session, answer, "differences", _FIELDS)
    render.emit(session, answer, lambda: "\n".join([*map(_check, checks), *map(_difference, differences)]),
                [str(c["name"]) for c in checks if not c["ok"]] + [_name(d) for d in differences])
    is_bad = any(not c["ok"] and c.get("severity") == "error" for c in checks)
    return EXIT_FAILURE if is_bad or any(d["kind"] != "stray" for d in differences) else 0


@click.command("prune", cls=Verb, short_help="Remove what is nobody's (admins).", epilog="""\b
Examples:
  netnsctl doctor
  netnsctl prune""")
@click.pass_context
def prune_verb(ctx: click.Context) -> int:
    """Mend what environments have lost, and remove what is nobody's (admins only).

    Only what carries netnsd's mark is touched. `netnsctl doctor` shows it before. The exit code is 1 where something is
    left.
    """
    session = session_of(ctx)
    answer = session.client.request("POST", "/v1/prune", {})
    removed, left = (_listed(session, answer, key, _FIELDS) for key in ("removed", "left"))
    render.emit(session, answer, lambda: "\n".join([*map(_done, removed), *map(_difference, left)]),
                [_name(d) for d in removed])
    return EXIT_FAILURE if any(d["kind"] != "stray" for d in left) else 0


def _listed(session: Session, answer: Any, key: str, needed: set[str]) -> list[dict[str, Any]]:
    """A list of objects in an answer. Raises BadAnswer where it is none."""
    found = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in found):
        raise session.client.bad_answer(f"no list of {key}")
    return found


def _name(difference: dict[str, Any]) -> str:
    return f"{difference['what']}/{difference['subject']}"


def _told(difference: dict[str, Any]) -> str:
    return f"{printable(str(difference['what']))}: {printable(str(difference['message']))}"


def _done(difference: dict[str, Any]) -> str:
    return f"{render.paint('mended ' if difference['kind'] == 'missing' else 'removed', 'green')}  {_told(difference)}"


def _difference(difference: dict[str, Any]) -> str:
    kind = str(difference["kind"])
    return f"{render.paint(printable(kind).ljust(7), _COLOURS.get(kind, ''))}  {_told(difference)}"


def _check(check: dict[str, Any]) -> str:
    severity = str(check.get("severity", "error"))
    bad = {"error": "red", "warning": "yellow"}.get(severity, "")
    mark, colour = ("ok", "green") if check["ok"] else (severity, bad)
    line = f"{render.paint(printable(mark).ljust(7), colour)}  {printable(str(check['name']))}"
    if check.get("message"):
        line += f": {printable(str(check['message']))}"
    if check.get("hint") and not check["ok"]:
        line += f"\n         hint: {printable(str(check['hint']))}"
    return line
