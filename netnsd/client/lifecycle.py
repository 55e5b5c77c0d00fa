"""``start``, ``stop``, ``restart`` and ``wait``."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb
from netnsd.client.arguments import complete_refs, seconds
from netnsd.client.session import Session, printable, session_of
from netnsd.client.transport import ANSWER_SECONDS, environment_path
from netnsd.client.waiting import wait_for
from netnsd.errors import EXIT_FAILURE, NotFound

GRACE_SECONDS = 10.0


def _change(session: Session, ref: str, action: str, body: dict[str, Any]) -> None:
    grace = float(body.get("grace_seconds", 0))
    answer = session.client.request("POST", environment_path(ref, action), body, ANSWER_SECONDS + grace)
    environment = render.checked_environment(session.client, answer)
    render.emit(session, environment, lambda: render.summary(environment), [environment["name"]])


_grace_option = click.option("--grace", type=seconds, default=GRACE_SECONDS, metavar="SECONDS",
                             help=f"How long a server has to end by itself (default: {GRACE_SECONDS:g}).")


@click.command("start", cls=Verb, epilog="""\b
Examples:
  netnsctl start web""")
@click.argument("ref", shell_complete=complete_refs)
@click.pass_context
def start_verb(ctx: click.Context, ref: str) -> None:
    """Start the servers of an environment that do not run."""
    _change(session_of(ctx), ref, "start", {})


@click.command("stop", cls=Verb, epilog="""\b
Examples:
  netnsctl stop web
  netnsctl stop web --grace 0""")
@click.argument("ref", shell_complete=complete_refs)
@_grace_option
@click.pass_context
def stop_verb(ctx: click.Context, ref: str, grace: float) -> None:
    """Stop an environment's servers: SIGTERM, then SIGKILL. Address and ports stay its own."""
    _change(session_of(ctx), ref, "stop", {"grace_seconds": grace})


@click.command("restart", cls=Verb, epilog="""\b
Examples:
  netnsctl restart web
  netnsctl restart web --grace 2""")
@click.argument("ref", shell_complete=complete_refs)
@_grace_option
@click.pass_context
def restart_verb(ctx: click.Context, ref: str, grace: float) -> None:
    """Stop an environment's servers and start them again."""
    _change(session_of(ctx), ref, "restart", {"grace_seconds": grace})


@click.command("wait", cls=Verb, short_help="Wait until ready, ended, or gone.", epilog="""\b
Examples:
  netnsctl wait web
  netnsctl wait tests --for exit
  netnsctl wait web --for gone --timeout 30""")
@click.argument("ref", shell_complete=complete_refs)
@click.option("--for", "condition", type=click.Choice(["ready", "exit", "gone"]), default="ready", show_default=True,
              help="Every port has a listener; the server has ended; the environment is no more.")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Give up then, with exit code 6 (default: never).")
@click.pass_context
def wait_verb(ctx: click.Context, ref: str, condition: str, timeout: float | None) -> int:
    """Wait until an environment is ready, its server has ended, or it is gone.

    With --for exit the exit code is the server's own (of `main`, or the first one). With --for gone, an environment
    that does not exist is gone.
    """
    session = session_of(ctx)
    try:
        answer = wait_for(session, ref, condition, timeout)
    except NotFound:
        if condition != "gone":
            raise
        answer = {}
    if condition == "gone":
        render.emit(session, answer, lambda: f"{printable(ref)} is gone", [ref])
        return 0
    environment = render.checked_environment(session.client, answer)
    render.emit(session, environment, lambda: render.summary(environment), [environment["name"]])
    return _service_code(session, environment) if condition == "exit" else 0


def _service_code(session: Session, environment: dict[str, Any]) -> int:
    services = environment["services"]
    service = next((s for s in services if s["name"] == "main"), services[0] if services else None)
    code = service.get("exit_code") if service else None
    if isinstance(code, int):
        return code
    session.warn(f"nobody knows how {printable(environment['name'])} ended" if service
                 else f"{printable(environment['name'])} has no server")
    return EXIT_FAILURE
