"""``ls`` and ``show``."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import overview, render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs
from netnsd.client.session import printable, session_of
from netnsd.client.transport import environment_path


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
def ls_verb(ctx: click.Context, /, **options: Any) -> None:
    """List your environments."""
    overview.ls(session_of(ctx), **options)


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
        notes = [f"pid {s['pid']}"] if s.get("pid") else []
        notes += [f"restart {s['restart']}"] if s.get("restart", "no") != "no" else []
        notes += [f"restarted {s['restarts']} times"] if s.get("restarts") else []
        noted = f" ({', '.join(notes)})" if notes else ""
        command = printable(shlex.join(str(c) for c in s["command"]))
        state = render.paint_state(printable(render.service_state(s)), s["state"])
        lines.append(f"{printable(s['name'])}: {state}{printable(noted)}: {command}")
    created, resources = environment["created_at"], environment.get("resources") or {}
    return render.fields([
        ("Name", render.paint(printable(environment["name"]), "bold")),
        ("State", render.paint_state(printable(environment["state"]), environment["state"])),
        ("Address", printable(environment["address"])),
        ("Ports", "\n".join(printable(a) for a in render.addresses(environment)) or "-"),
        ("Services", "\n".join(lines) or "-"),
        *([("Limits", printable(limits))] if (limits := render.limits(resources)) else []),
        *([("Killed", printable(f"{killed} for lack of memory"))] if (killed := environment.get("oom_kills"))
          else []),
        ("Labels", "\n".join(printable(f"{k}={v}") for k, v in environment["labels"].items()) or "-"),
        ("Owner", printable(f"{render.user_name(environment)} ({owner.get('uid', '?')})")),
        ("Share", printable(str(environment.get("share", "-")))),
        *([("Egress", printable(str(environment["egress"])))] if environment.get("egress", "allow") != "allow" else []),
        ("Netns", printable(str(environment.get("netns", "-")))),
        ("Created", printable(f"{created} ({render.age(created)} ago)")),
        ("Id", printable(environment["id"])),
    ])
