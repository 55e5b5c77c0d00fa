"""What ``create`` does, once its command line is read. Without click."""

from __future__ import annotations

import time

from netnsd.client import render
from netnsd.client.arguments import (
    check_command,
    check_egress,
    check_name,
    circumstances,
    directory,
    is_text,
    parse_health,
    parse_labels,
    parse_ports,
    parse_variables,
)
from netnsd.client.session import Session
from netnsd.errors import NetnsdError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WAIT_SECONDS = 60.0
# Options, and what the API calls them.
LIMITS = (("--memory", "memory"), ("--cpus", "cpu"), ("--pids", "pids"), ("--bandwidth", "bandwidth"))
_OF_SERVERS = (("--restart", "restart"), ("--health", "health"), ("--health-interval", "health_interval"),
               ("--health-timeout", "health_timeout"), ("--health-retries", "health_retries"),
               ("--health-start-period", "health_start_period"))


def misuse(command: list[str], options: dict[str, Any]) -> str:
    """Why these options of ``create`` cannot be together; empty where they can."""
    if options["timeout"] is not None and not options["waits"]:
        return "--timeout says how long --wait waits: pass both."
    if options["template"] is not None:
        given = [name for name, key in (("--port", "ports"), ("--env", "env"), ("--clean-env", "clean_env"),
                                        ("--setuid", "setuid")) if options[key]]
        given += [name for name, key in (("--cwd", "cwd"), *LIMITS, ("--share", "share"), ("--egress", "egress"),
                                         *_OF_SERVERS)
                  if options[key] is not None]
        given += ["a command"] if command else []
        if given:
            return f"the template says it all: leave out {', '.join(given)}."
    return misuse_of_servers(command, options)


def misuse_of_servers(command: list[str], options: dict[str, Any]) -> str:
    """Why these options are about no server, or no check of it; empty where they are."""
    given = [name for name, key in _OF_SERVERS if options[key] is not None]
    if given and not command:
        return f"{given[0]} is about a server: give a command."
    if options["health"] is None and given and given[-1] != "--restart":
        return f"{given[-1]} says how --health is done: pass both."
    return ""


def create(session: Session, command: list[str], *, name: str, waits: bool, timeout: float | None, count: int | None,
           template: str | None, replace: bool, **options: Any) -> None:
    """Make an environment, or ``count`` of them, and print what was made."""
    request = {"name": check_name(name), "replace": replace}
    if template is None:
        request |= specification(session, command, **options)
    else:
        request |= {"template": _known_template(template), "labels": parse_labels(options["labels"])}
    if count is not None:
        request["count"] = count
    answer = session.client.request_patiently("POST", "/v1/environments", request)
    made = ([render.checked_environment(session.client, answer)] if count is None
            else render.checked_environments(session.client, answer))
    if waits:
        made = _all_ready(session, made, WAIT_SECONDS if timeout is None else timeout)
    names = [environment["name"] for environment in made]
    if count is None:
        render.emit(session, made[0], lambda: render.summary(made[0]), names)
    else:
        render.emit(session, made, lambda: render.overview(made, False), names)


def specification(session: Session, command: list[str], *, ports: tuple[str, ...], env: tuple[str, ...],
                  clean_env: bool, cwd: str | None, labels: tuple[str, ...], setuid: bool, egress: str | None,
                  memory: int | None, cpu: float | None, pids: int | None, bandwidth: int | None,
                  restart: str | None, health: str | None,
                  health_interval: float | None, health_timeout: float | None, health_retries: int | None,
                  health_start_period: float | None, share: str | None) -> dict[str, Any]:
    """What an environment is to be, as the API takes it. A command finds its caller's circumstances."""
    wanted: dict[str, Any] = {"ports": parse_ports(ports), "labels": parse_labels(labels), "setuid": setuid}
    resources = {"memory": memory, "cpu": cpu, "pids": pids, "bandwidth": bandwidth}
    if limits := {name: limit for name, limit in resources.items() if limit is not None}:
        wanted["resources"] = limits
    if egress is not None:
        wanted["egress"] = check_egress(egress)
    if share is not None:
        wanted["share"] = share
    if restart is not None:
        wanted["restart"] = restart
    if health is not None:
        wanted["health"] = parse_health(health, interval_seconds=health_interval, timeout_seconds=health_timeout,
                                        retries=health_retries, start_period_seconds=health_start_period)
    if command:
        return wanted | {"command": check_command(command)} | circumstances(session, env, clean_env, cwd)
    if cwd is not None:
        wanted["cwd"] = directory(cwd)
    return wanted | {"env": parse_variables(env)}


def _known_template(ref: str) -> str:
    if not is_text(ref):
        raise NotFound(f"no template {ref!r}", hint="`netnsctl template ls` lists your templates.", ref=ref)
    return ref


def _all_ready(session: Session, environments: list[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """The environments, once every port of each has a listener, which may take ``limit`` seconds for all."""
    from netnsd.client.waiting import wait_for

    give_up = time.monotonic() + limit
    ready: list[dict[str, Any]] = []
    for environment in environments:
        left = limit if not ready else max(0.0, give_up - time.monotonic())
        try:
            ready.append(render.checked_environment(session.client,
                                                    wait_for(session, environment["id"], "ready", left)))
        except NetnsdError as error:
            error.hint = error.hint or f"`netnsctl logs {environment['name']}` shows what it said."
            raise
    return ready
