"""``template``: specifications under a name, which may be kept warm."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import CommandVerb, Verb, VerbGroup
from netnsd.client.arguments import check_name, complete_templates
from netnsd.client.creating import specification_options
from netnsd.client.creation import misuse_of_servers, specification
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import Client, template_path

_FIELDS = {"id": str, "name": str, "warm": int, "ready": int, "services": list, "ports": list, "labels": dict,
           "created_at": str}


@click.group("template", cls=VerbGroup, short_help="Keep specifications, and environments of them warm.", epilog="""\b
Examples:
  netnsctl template add shop --port 3000 --warm 2 -- npm run dev
  netnsctl create web --template shop""")
def template_verb() -> None:
    """Keep what `create` takes under a name, and environments of it started before you ask."""


@template_verb.command("add", cls=CommandVerb, short_help="Keep a specification under a name.", epilog="""\b
Examples:
  netnsctl template add shop --port 3000 --warm 2 -- npm run dev
  netnsctl template add db --env PGDATA=/srv/db --cwd /srv --label team=shop -- postgres
  netnsctl template add shop --replace --port 3000 -- npm start""")
@click.argument("name")
@specification_options
@click.option("--warm", type=click.IntRange(min=0), default=0, metavar="N",
              help="Keep so many environments of it started and ready (default: 0).")
@click.option("--replace", is_flag=True, help="In place of your template of that name.")
@click.pass_context
def add_verb(ctx: click.Context, /, name: str, warm: int, replace: bool, **options: Any) -> None:
    """Keep a specification: what `create` would make of these options and COMMAND, as you, from here, as it is now.

    `netnsctl create NAME --template T` makes one. With --warm, environments of it wait with their servers started and
    every port with a listener, and the next one is yours at once.
    """
    session = session_of(ctx)
    if reason := misuse_of_servers(ctx.meta["netnsctl.command"], options):
        raise click.UsageError(reason, ctx)
    request = {"name": check_name(name), "warm": warm, "replace": replace,
               "specification": specification(session, ctx.meta["netnsctl.command"], **options)}
    _print(session, session.client.request("POST", "/v1/templates", request))


@template_verb.command("ls", cls=Verb, epilog="""\b
Examples:
  netnsctl template ls
  netnsctl template ls -o json""")
@click.pass_context
def ls_verb(ctx: click.Context) -> None:
    """List your templates."""
    session = session_of(ctx)
    answer = session.client.request("GET", "/v1/templates")
    found = answer.get("templates") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise session.client.bad_answer("not a list of templates")
    templates = [_checked(session.client, each) for each in found]
    render.emit(session, templates, lambda: _listing(templates), [each["name"] for each in templates])


@template_verb.command("show", cls=Verb, epilog="""\b
Examples:
  netnsctl template show shop
  netnsctl template show shop -o json""")
@click.argument("ref", metavar="NAME", shell_complete=complete_templates)
@click.pass_context
def show_verb(ctx: click.Context, ref: str) -> None:
    """Show one template, by its name or id. Its variables are not shown: they hold secrets."""
    session = session_of(ctx)
    _print(session, session.client.request("GET", template_path(ref)))


@template_verb.command("rm", cls=Verb, epilog="""\b
Examples:
  netnsctl template rm shop
  netnsctl template rm shop db""")
@click.argument("refs", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_templates)
@click.pass_context
def rm_verb(ctx: click.Context, refs: tuple[str, ...]) -> int:
    """Remove templates, and the warm environments of theirs that nobody has. What was created of them stays."""
    return render.delete_each(session_of(ctx), refs, template_path, "removed")


def _checked(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be a template. Raises BadAnswer where it is none."""
    ok = isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in _FIELDS.items())
    ok = ok and all(isinstance(p, dict) and {"port", "protocol"} <= p.keys() for p in value["ports"])
    ok = ok and all(isinstance(s, dict) and isinstance(s.get("command"), list) and "name" in s
                    for s in value["services"])
    if not ok:
        raise client.bad_answer("not a template")
    assert isinstance(value, dict)
    return value


def _print(session: Session, answer: Any) -> None:
    template = _checked(session.client, answer)
    render.emit(session, template, lambda: _details(template), [template["name"]])


def _listing(templates: list[dict[str, Any]]) -> str:
    rows = [["NAME", "WARM", "PORTS", "SERVICES", "AGE"]]
    rows += [[t["name"], _warm(t), ", ".join(map(_port, t["ports"])) or "-", "; ".join(_services(t)) or "-",
              render.age(t["created_at"])] for t in templates]

    def colour(row: int, column: int) -> str:
        return "yellow" if column == 1 and templates[row - 1]["ready"] < templates[row - 1]["warm"] else ""

    return render.table(rows, colour)


def _details(template: dict[str, Any]) -> str:
    owner = template.get("owner")
    user = owner.get("user", "?") if isinstance(owner, dict) else "?"
    warm = _warm(template) + (f" ({template['reason']})" if template.get("reason") else "")
    pairs = [("Name", template["name"]), ("Warm", warm), ("Ports", "\n".join(map(_port, template["ports"])) or "-"),
             ("Services", "\n".join(_services(template)) or "-"),
             ("Labels", "\n".join(f"{k}={v}" for k, v in template["labels"].items()) or "-"), ("Owner", str(user)),
             ("Created", f"{template['created_at']} ({render.age(template['created_at'])} ago)"),
             ("Id", template["id"])]
    return render.fields([(name, "\n".join(map(printable, value.split("\n")))) for name, value in pairs])


def _warm(template: dict[str, Any]) -> str:
    return f"{template['ready']} of {template['warm']}" if template["warm"] else "-"


def _port(port: dict[str, Any]) -> str:
    publish = f"{port['publish']}:" if port.get("publish") else ""
    return f"{publish}{port['port']}" + ("" if port["protocol"] == "tcp" else f"/{port['protocol']}")


def _services(template: dict[str, Any]) -> list[str]:
    import shlex

    return [f"{s['name']}: {shlex.join(str(word) for word in s['command'])}" for s in template["services"]]
