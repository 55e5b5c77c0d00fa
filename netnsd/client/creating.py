"""``create``."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import CommandVerb
from netnsd.client.arguments import (
    check_command,
    check_name,
    circumstances,
    directory,
    parse_labels,
    parse_ports,
    parse_variables,
    seconds,
)
from netnsd.client.lifecycle import wait_for
from netnsd.client.session import Session, session_of
from netnsd.errors import NetnsdError

WAIT_SECONDS = 60.0


@click.command("create", cls=CommandVerb, short_help="Make an environment and start its server.", epilog="""\b
Examples:
  netnsctl create web --port 3000 -- npm run dev
  netnsctl create web --port 20007:3000 --port 53/udp --wait -- ./server
  netnsctl create db --env PGDATA=/srv/db --cwd /srv --label team=shop -- postgres
  netnsctl create lab
  netnsctl create web --replace -o name -- python3 -m http.server""")
@click.argument("name")
@click.option("-p", "--port", "ports", multiple=True, metavar="[PUBLISH:]PORT[/udp]",
              help="Publish a port on the host, at a free number or at PUBLISH; repeatable.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; repeatable.")
@click.option("--clean-env", is_flag=True, help="Only --env, not your own variables.")
@click.option("--cwd", metavar="DIR", help="Run the command there (default: here).")
@click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Attach a label; repeatable.")
@click.option("--wait", "waits", is_flag=True, help="Return when every port has a listener.")
@click.option("--timeout", type=seconds, metavar="SECONDS", help=f"How long --wait waits (default: {WAIT_SECONDS:g}).")
@click.option("--replace", is_flag=True, help="Remove your environment of that name first.")
@click.option("--setuid", is_flag=True, help="Let set-uid programs such as sudo work in it.")
@click.pass_context
def create_verb(ctx: click.Context, /, name: str, waits: bool, timeout: float | None, **options: Any) -> None:
    """Make an environment, and run COMMAND in it as you, from here, with your variables, umask and limits.

    Without a command the environment has no server; `netnsctl exec` runs things in it. An environment stays when
    --wait fails: `netnsctl logs NAME` tells why.
    """
    session = session_of(ctx)
    if timeout is not None and not waits:
        raise click.UsageError("--timeout says how long --wait waits: pass both.", ctx)
    request = _request(session, name, ctx.meta["netnsctl.command"], **options)
    answer = session.client.request("POST", "/v1/environments", request)
    environment = render.checked_environment(session.client, answer)
    if waits:
        environment = _ready(session, environment, WAIT_SECONDS if timeout is None else timeout)
    render.emit(session, environment, lambda: render.summary(environment), [environment["name"]])


def _request(session: Session, name: str, command: list[str], *, ports: tuple[str, ...], env: tuple[str, ...],
             clean_env: bool, cwd: str | None, labels: tuple[str, ...], replace: bool, setuid: bool) -> dict[str, Any]:
    request: dict[str, Any] = {"name": check_name(name), "ports": parse_ports(ports), "labels": parse_labels(labels),
                               "replace": replace, "setuid": setuid}
    if command:
        return request | {"command": check_command(command)} | circumstances(session, env, clean_env, cwd)
    if cwd is not None:
        request["cwd"] = directory(cwd)
    return request | {"env": parse_variables(env)}


def _ready(session: Session, environment: dict[str, Any], limit: float) -> dict[str, Any]:
    try:
        return render.checked_environment(session.client, wait_for(session, environment["id"], "ready", limit))
    except NetnsdError as error:
        error.hint = error.hint or f"`netnsctl logs {environment['name']}` shows what it said."
        raise


