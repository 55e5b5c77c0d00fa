"""What users type, made into what the API takes: ports, labels, variables, and the caller's own circumstances.

The same codes as the daemon's: InvalidPort, InvalidLabel, InvalidVariable, InvalidCommand, InvalidName.
"""

from __future__ import annotations

import os

from netnsd.client.session import Session, session_of
from netnsd.errors import (
    InvalidCommand,
    InvalidLabel,
    InvalidName,
    InvalidPort,
    InvalidRequest,
    InvalidVariable,
    NetnsdError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    import click

    _N = TypeVar("_N", int, float)

_LABEL_KEY = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-/")


def parse_seconds(value: str | float) -> float | None:
    """A finite number of seconds, 0 or more; None where it is none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def seconds(value: str | float) -> float:
    """As ``parse_seconds``, for click. Raises its usage error."""
    number = parse_seconds(value)
    if number is None:
        import click

        raise click.BadParameter(f"{value!r} is not a number of seconds.")
    return number


# Bytes by 1024, as memory is; bits per second by 1000, as links are.
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RATES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(value: str | int) -> int | None:
    """Bytes: 1048576, 512M, 1.5G; None where it is none."""
    return value if isinstance(value, int) else _number(value, _SIZES)


def parse_rate(value: str | int) -> int | None:
    """Bits per second: 100M; None where it is none."""
    return value if isinstance(value, int) else _number(value, _RATES)


def parse_processors(value: str | float) -> float | None:
    """How many, more than none: 0.5; None where it is none."""
    return number if (number := parse_seconds(value)) else None


def _number(value: str, units: dict[str, int]) -> int | None:
    unit = value[-1:].upper() if value[-1:].isalpha() else ""
    number = parse_seconds(value.removesuffix(value[-1:])) if unit else parse_seconds(value)
    return None if not number or unit not in units else round(number * units[unit])


def size(value: str | int) -> int:
    """As ``parse_size``, for click. Raises its usage error."""
    return _checked(parse_size(value), value, "a number of bytes, such as 512M")


def rate(value: str | int) -> int:
    """As ``parse_rate``, for click. Raises its usage error."""
    return _checked(parse_rate(value), value, "a number of bits per second, such as 100M")


def processors(value: str | float) -> float:
    """As ``parse_processors``, for click. Raises its usage error."""
    return _checked(parse_processors(value), value, "a number of processors, such as 1.5")


def _checked(number: _N | None, value: object, what: str) -> _N:
    if number is None:
        import click

        raise click.BadParameter(f"{value!r} is not {what}.")
    return number


def is_text(value: str) -> bool:
    """Whether the bytes that the caller gave were valid UTF-8: only such can travel in JSON."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_ports(texts: Iterable[str]) -> list[dict[str, Any]]:
    """``[PUBLISH:]PORT[/tcp|/udp]`` as the API's port requests. Raises InvalidPort."""
    ports: list[dict[str, Any]] = []
    seen: set[tuple[str, str, int]] = set()
    for text in texts:
        numbers, _, protocol = text.partition("/")
        publish, colon, inner = numbers.rpartition(":")
        if protocol not in ("", "tcp", "udp") or text.endswith("/"):
            raise _invalid_port(text, f"{protocol!r} is not a protocol")
        port: dict[str, Any] = {"port": _port_number(inner, text), "protocol": protocol or "tcp"}
        if colon:
            port["publish"] = _port_number(publish, text)
        for side in ("port", "publish"):
            if side in port:
                key = (side, port["protocol"], port[side])
                if key in seen:
                    raise _invalid_port(text, f"{port[side]}/{port['protocol']} is asked for twice")
                seen.add(key)
        ports.append(port)
    return ports


def _port_number(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise _invalid_port(whole, f"{text!r} is not a number from 1 to 65535")
    return int(text)


def _invalid_port(text: str, reason: str) -> InvalidPort:
    return InvalidPort(f"port {text!r}: {reason}", hint="write --port 3000, --port 53/udp, or --port 20007:3000.",
                       port=text)


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """``k=v`` each. Raises InvalidLabel."""
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not _LABEL_KEY.issuperset(key) or not value.isprintable():
            raise InvalidLabel(f"label {text!r} is malformed", label=text,
                               hint="write k=v, with letters, digits, '.', '_', '-' and '/' in the key.")
        labels[key] = value
    return labels


def parse_variables(texts: Iterable[str]) -> dict[str, str]:
    """``K=V`` each. Raises InvalidVariable."""
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or "\0" in text or not is_text(text):
            raise InvalidVariable(f"variable {text!r} is malformed", variable=text,
                                  hint="write K=V, in UTF-8, with a name that is not empty.")
        variables[name] = value
    return variables


RESTART_POLICIES = ("no", "on-failure", "always")
_HEALTH_HINT = "write tcp:PORT, http:PORT/PATH or cmd:COMMAND, such as http:3000/healthz."


def parse_health(text: str, **numbers: float | None) -> dict[str, Any]:
    """``tcp:PORT``, ``http:PORT[/PATH]`` or ``cmd:COMMAND`` (for a shell) as the API's health check.

    ``numbers`` are its other fields, None for the default. Raises InvalidRequest, InvalidPort.
    """
    kind, colon, what = text.partition(":")
    if not colon or not what or kind not in ("tcp", "http", "cmd") or not is_text(text):
        raise InvalidRequest(f"health check {text!r} is malformed", hint=_HEALTH_HINT)
    if kind == "tcp":
        check: dict[str, Any] = {"tcp": _port_number(what, text)}
    elif kind == "http":
        port, slash, path = what.partition("/")
        check = {"http": slash + path or "/", "port": _port_number(port, text)}
    else:
        check = {"command": ["sh", "-c", what]}
    return check | {name: number for name, number in numbers.items() if number is not None}


# A server is told these of its own environment: the caller's, perhaps from inside another one, would mislead it.
_GIVEN_BY_NETNSD = frozenset({"PORT", "HOST", "NETNSD_NAME", "NETNSD_ID", "NETNSD_IP", "NETNSD_URL"})


def inherited_variables(environ: Iterable[tuple[str, str]], warn: Callable[[str], None]) -> dict[str, str]:
    """The caller's own variables, without those that cannot travel; ``warn`` is told which."""
    kept, left_out = {}, []
    for name, value in environ:
        if name in _GIVEN_BY_NETNSD:
            continue
        if name and is_text(name) and is_text(value):
            kept[name] = value
        else:
            left_out.append(ascii(name)[1:-1])
    if left_out:
        warn(f"left out of the environment, since not UTF-8: {', '.join(left_out)}")
    return kept


def circumstances(session: Session, env: tuple[str, ...], clean_env: bool, cwd: str | None) -> dict[str, Any]:
    """What a command is to find as if its caller had run it: env, cwd, umask and soft limits."""
    given = parse_variables(env)
    variables = {} if clean_env else inherited_variables(os.environ.items(), session.warn)
    where = directory(cwd)
    if cwd is not None and "PWD" in variables:
        variables["PWD"] = where
    umask = os.umask(0)
    os.umask(umask)
    return {"env": variables | given, "cwd": where, "umask": umask, "limits": soft_limits()}


def directory(cwd: str | None) -> str:
    """An absolute directory: ``cwd``, or the current one. Raises InvalidCommand."""
    try:
        absolute = os.getcwd() if cwd is None else os.path.abspath(cwd)
    except OSError as error:
        raise InvalidCommand(f"the current directory: {error.strerror}", hint="change to another, or pass --cwd.",
                             ) from error
    if "\0" in absolute or not is_text(absolute):
        raise InvalidCommand(f"the directory {absolute!r} is not UTF-8", hint="pass another with --cwd.")
    return absolute


def soft_limits() -> dict[str, int]:
    """The caller's soft resource limits by lower-case name, -1 for unlimited."""
    import resource

    limits = {}
    for constant in dir(resource):
        # OFILE is BSD's name for NOFILE.
        if constant.startswith("RLIMIT_") and constant != "RLIMIT_OFILE":
            soft, _hard = resource.getrlimit(getattr(resource, constant))
            limits[constant.removeprefix("RLIMIT_").lower()] = -1 if soft == resource.RLIM_INFINITY else soft
    return limits


def check_name(name: str) -> str:
    """A name that can travel; what a name may be is the daemon's to say. Raises InvalidName."""
    if not is_text(name):
        raise InvalidName(f"the name {name!r} is not a DNS label",
                          hint="use lower-case letters, digits and '-', 63 at most.")
    return name


def check_egress(egress: str) -> str:
    """What an environment reaches outside, if it can travel; what it may be is the daemon's to say."""
    if not is_text(egress):
        raise InvalidRequest(f"egress {egress!r} is not allow, deny, or a list", hint="write 10.1.0.0/16:443/tcp.")
    return egress


def check_command(command: list[str]) -> list[str]:
    """A command line that can travel. Raises InvalidCommand."""
    for argument in command:
        if not is_text(argument):
            raise InvalidCommand(f"the argument {argument!r} is not UTF-8",
                                 hint="put it into a file or a variable of a script.")
    return command


def complete_refs(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The caller's environments, for the shell's completion; none where the daemon does not answer."""
    return _names(ctx, "environments", incomplete)


def complete_templates(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The caller's templates, for the shell's completion; none where the daemon does not answer."""
    return _names(ctx, "templates", incomplete)


def complete_tokens(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The caller's tokens, for the shell's completion; none where the daemon does not answer."""
    return _names(ctx, "tokens", incomplete)


def complete_policies(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The caller's policies, for the shell's completion; none where the daemon does not answer."""
    return _names(ctx, "policies", incomplete)


def _names(ctx: click.Context, what: str, incomplete: str) -> list[str]:
    from netnsd.client.transport import Client

    def keep_quiet(_message: str) -> None:
        """A completion has no place for warnings."""

    try:
        found = Client(session_of(ctx).socket_path, keep_quiet).request("GET", f"/v1/{what}", None, 2.0)
        return [each["name"] for each in found[what] if each["name"].startswith(incomplete)]
    except (NetnsdError, KeyError, TypeError, AttributeError):
        return []
