"""``ls`` and ``create`` without click, whose import takes longer than all the rest of them.

Reads command lines of the plain sort only. What it does not know, and all that is wrong, is left to click, which knows
every option, says what is wrong, and has the help. A test compares what both read.
"""

from __future__ import annotations

import os

from netnsd.client.session import OUTPUTS, Session, guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Options by what they are called: the parameter, and what is done with a value. None: a flag.
_GLOBAL: dict[str, tuple[str, str | None]] = {
    "-o": ("output", "once"), "--output": ("output", "once"), "--socket": ("socket", "once"),
}
_LS: dict[str, tuple[str, str | None]] = {
    "-a": ("everyones", None), "--all": ("everyones", None), "-q": ("quiet", None), "--quiet": ("quiet", None),
    "-l": ("labels", "many"), "--label": ("labels", "many"),
}
_CREATE: dict[str, tuple[str, str | None]] = {
    "-p": ("ports", "many"), "--port": ("ports", "many"), "-e": ("env", "many"), "--env": ("env", "many"),
    "-l": ("labels", "many"), "--label": ("labels", "many"), "--cwd": ("cwd", "once"), "--count": ("count", "once"),
    "--template": ("template", "once"), "--timeout": ("timeout", "once"), "--clean-env": ("clean_env", None),
    "--wait": ("waits", None), "--replace": ("replace", None), "--setuid": ("setuid", None),
    "--restart": ("restart", "once"), "--health": ("health", "once"), "--pids": ("pids", "once"),
    "--share": ("share", "once"), "--egress": ("egress", "once"),
    "--memory": ("memory", "once"), "--cpus": ("cpu", "once"), "--bandwidth": ("bandwidth", "once"),
    "--health-interval": ("health_interval", "once"), "--health-timeout": ("health_timeout", "once"),
    "--health-retries": ("health_retries", "once"), "--health-start-period": ("health_start_period", "once"),
}
_COUNTS = ("count", "pids", "health_retries")
_SECONDS = ("timeout", "health_interval", "health_timeout", "health_start_period")
OPTIONS = {"ls": _LS, "create": _CREATE}
_NOTHING = {"once": None, "many": (), None: False}


def run(args: list[str]) -> int | None:
    """Run ``netnsctl`` with these arguments and return its exit code; None where that is for click."""
    if "_NETNSCTL_COMPLETE" in os.environ:
        return None
    session = Session()
    read = parse(args, session)
    if read is None:
        return None
    verb, options, command = read
    return guarded(session, _creation(session, options, command) if verb == "create" else _listing(session, options))


def _listing(session: Session, options: dict[str, Any]) -> Callable[[], int]:
    def act() -> int:
        from netnsd.client.overview import ls

        ls(session, **options)
        return 0

    return act


def _creation(session: Session, options: dict[str, Any], command: list[str]) -> Callable[[], int]:
    def act() -> int:
        from netnsd.client.creation import create

        create(session, command, **options)
        return 0

    return act


def parse(args: list[str], session: Session) -> tuple[str, dict[str, Any], list[str]] | None:
    """The verb, its options by their parameters, and the command; None where click has to read the arguments.

    Keeps global options in ``session``.
    """
    found: dict[str, Any] = {}
    rest = _options(args, _GLOBAL, found)
    if not rest or rest[0] not in OPTIONS:
        return None
    verb, known = rest[0], OPTIONS[rest[0]] | _GLOBAL
    options: dict[str, Any] = {name: _NOTHING[kind] for name, kind in OPTIONS[verb].values()}
    rest = _options(rest[1:], known, found)
    if verb == "create":
        if not rest or rest[0].startswith("-"):
            return None
        options["name"] = rest[0]
        rest = _options(rest[1:], known, found)
    if rest is None or (rest and (verb == "ls" or (rest[0] != "--" and rest[0].startswith("-")))):
        return None
    command = rest[1:] if rest[:1] == ["--"] else rest
    session.output, session.socket = found.pop("output", None), found.pop("socket", None)
    options.update(found)
    return (verb, options, command) if session.output in (None, *OUTPUTS) and _converted(options, command) else None


def _options(args: list[str], known: dict[str, tuple[str, str | None]], found: dict[str, Any]) -> list[str] | None:
    """Collect the options at the beginning; returns what follows them, None where one has no value or a strange one."""
    at = 0
    while at < len(args):
        name, equals, value = args[at].partition("=") if args[at].startswith("--") else (args[at], "", "")
        if name not in known:
            break
        parameter, kind = known[name]
        if kind is None and equals:
            return None
        if kind is not None and not equals:
            at += 1
            if at == len(args) or args[at].startswith("-"):
                return None
            value = args[at]
        found[parameter] = True if kind is None else (*found.get(parameter, ()), value) if kind == "many" else value
        at += 1
    return args[at:]


def _converted(options: dict[str, Any], command: list[str]) -> bool:
    """Make numbers of what is to be numbers. False where click would call something wrong."""
    if "count" not in options:
        return True
    from netnsd.client.arguments import RESTART_POLICIES, parse_processors, parse_rate, parse_seconds, parse_size
    from netnsd.client.creation import misuse

    for name in _COUNTS:
        count = options[name]
        if count is not None:
            if not (count.isascii() and count.isdigit() and len(count) < 10 and int(count)):
                return False
            options[name] = int(count)
    for names, parse_one in ((_SECONDS, parse_seconds), (("memory",), parse_size), (("cpu",), parse_processors),
                             (("bandwidth",), parse_rate)):
        for name in names:
            if options[name] is not None:
                options[name] = parse_one(options[name])
                if options[name] is None:
                    return False
    return options["restart"] in (None, *RESTART_POLICIES) and not misuse(command, options)
