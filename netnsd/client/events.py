"""``events``: what happens, and for admins who asked for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import click

from netnsd.client.app import Verb
from netnsd.client.session import Session, printable, session_of, write
from netnsd.client.transport import with_query
from netnsd.errors import DaemonUnreachable

_FIELDS = {"seq": int, "time": str, "kind": str, "environment": str, "name": str, "details": dict}


@click.command("events", cls=Verb, short_help="Print what has happened.", epilog="""\b
Examples:
  netnsctl events
  netnsctl events -f
  netnsctl events -f --after 120 -o json
  netnsctl events --audit""")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until ^C.")
@click.option("--after", type=click.IntRange(min=0), metavar="N", help="Only those with a greater number.")
@click.option("--audit", is_flag=True, help="Who asked for which change, and what came of it (admins).")
@click.pass_context
def events_verb(ctx: click.Context, follow: bool, after: int | None, audit: bool) -> None:
    """Print what has happened to your environments; admins see everybody's.

    The daemon remembers the latest since its start; its log has all. With -o json, each line is one object.
    """
    session = session_of(ctx)
    path = with_query("/v1/audit" if audit else "/v1/events", after=after, follow=None if follow else 0)
    last = after or 0
    for event in _events(session, session.client.stream(path)):
        write(_text(session, event, _of_audit if audit else _of_event))
        last = event["seq"]
    if follow:  # it has no end of its own: who does not read fast enough misses something
        raise DaemonUnreachable("netnsd ended the stream", hint=f"`--after {last}` goes on from there.")


def _events(session: Session, pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of NDJSON. Raises BadAnswer for a line that is none."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise session.client.bad_answer("not JSON") from error
            if not isinstance(event, dict) or not all(isinstance(event.get(k), t) for k, t in _FIELDS.items()):
                raise session.client.bad_answer("not an event")
            yield event


def _text(session: Session, event: dict[str, Any], line: Any) -> str:
    if session.output == "json":
        return json.dumps(event)
    if session.output == "yaml":
        import yaml

        return "---\n" + str(yaml.safe_dump(event, sort_keys=False)).rstrip("\n")
    return printable(event["name"] if session.output == "name" else line(event))


def _of_event(event: dict[str, Any]) -> str:
    details = " ".join(f"{name}={value}" for name, value in event["details"].items() if value is not None)
    return f"{event['seq']:>6}  {event['time']}  {event['kind']:<14}  {event['name']}  {details}".rstrip()


def _of_audit(event: dict[str, Any]) -> str:
    who = event["details"]
    what = f"{who.get('method')} {who.get('route')}"
    about = event["name"] or who.get("ref") or ""
    return (f"{event['seq']:>6}  {event['time']}  {who.get('user')} ({who.get('uid')}, {who.get('how')})  {what}"
            f"  {about}: {who.get('code')}")
