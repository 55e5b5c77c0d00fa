"""``ls`` and ``show``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs, parse_labels
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import environment_path, quote


def list_environments(session: Session, everyones: bool, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """The environments that match all of ``labels`` (``k=v``): the caller's own, or everyone's (admins)."""
    query = ["all=1"] if everyones else []
    query += [f"label={quote(f'{key}={value}')}" for key, value in parse_labels(labels).items()]
    answer = session.client.request("GET", "/v1/environments" + ("?" + "&".join(query) if query else ""))
    return render.checked_environments(session.client, answer)


@click.command("ls", cls=Verb, epilog="""\b
Examples:
  netnsctl ls
  netnsctl ls -l team=shop
  netnsctl ls -o json
  netnsctl ls -q | xargs netnsctl rm""")
@click.option("-a", "--all", "everyones", is_flag=True, help="Everyone's, with their owners (admins only).")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Only those with this label; repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="Only the names; short for -o name.")
@click.pass_context
def ls_verb(ctx: click.Context, everyones: bool, labels: tuple[str, ...], quiet: bool) -> None:
    """List your environments."""
    session = session_of(ctx)
    if quiet:
        session.output = "name"
    found = list_environments(session, everyones, labels)
    uid = os.getuid()
    render.emit(session, found, lambda: _listing(found, everyones),
                [render.ref_name(e, uid) if everyones else e["name"] for e in found])
    if not found and session.output in (None, "table") and sys.stdout is not None and sys.stdout.isatty():
        click.echo("  nothing yet: netnsctl create NAME --port 3000 -- COMMAND", err=True)


def _listing(environments: list[dict[str, Any]], with_owner: bool) -> str:
    rows = [["NAME", "STATE", "ADDRESS", "PORTS", "SERVICES", "AGE"] + (["OWNER"] if with_owner else [])]
    for e in environments:
        row = [e["name"], e["state"], e["address"], render.ports(e) or "-", render.services(e) or "-",
               render.age(e["created_at"])]
        rows.append(row + ([render.user_name(e)] if with_owner else []))

    def colour(row: int, column: int) -> str:
        environment = environments[row - 1]
        if column == 1:
            return render.state_colour(environment["state"])
        failed = any(s["state"] == "exited" and s.get("exit_code") != 0 for s in environment["services"])
        return "red" if column == 4 and failed else ""

    return render.table(rows, colour)


@click.command("show", cls=Verb, epilog="""\b
Examples:
  netnsctl show web
  netnsctl show web -o json
  netnsctl show web.alice""")
@click.argument("ref", shell_complete=complete_refs)
@click.pass_context
def show_verb(ctx: click.Context, ref: str) -> None:
    """Show one environment: REF is a name, NAME.USER, or an id."""
    session = session_of(ctx)
    answer = session.client.request("GET", environment_path(ref))
    environment = render.checked_environment(session.client, answer)
    render.emit(session, environment, lambda: _details(environment), [environment["name"]])


def _details(environment: dict[str, Any]) -> str:
    import shlex

    owner = environment["owner"]
    lines = []
    for s in environment["services"]:
        pid = f" (pid {s['pid']})" if s.get("pid") else ""
        command = printable(shlex.join(str(c) for c in s["command"]))
        state = render.paint_state(printable(render.service_state(s)), s["state"])
        lines.append(f"{printable(s['name'])}: {state}{pid}: {command}")
    created = environment["created_at"]
    return render.fields([
        ("Name", render.paint(printable(environment["name"]), "bold")),
        ("State", render.paint_state(printable(environment["state"]), environment["state"])),
        ("Address", printable(environment["address"])),
        ("Ports", "\n".join(printable(a) for a in render.addresses(environment)) or "-"),
        ("Services", "\n".join(lines) or "-"),
        ("Labels", "\n".join(printable(f"{k}={v}") for k, v in environment["labels"].items()) or "-"),
        ("Owner", printable(f"{render.user_name(environment)} ({owner.get('uid', '?')})")),
        ("Share", printable(str(environment.get("share", "-")))),
        ("Netns", printable(str(environment.get("netns", "-")))),
        ("Created", printable(f"{created} ({render.age(created)} ago)")),
        ("Id", printable(environment["id"])),
    ])
