"""From a request to what will be made: every check that needs neither the kernel nor the state. Pure.

Names become host names, file names and namespace names, so they are DNS labels and nothing else.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping

from netnsd import wire
from netnsd.core.actor import Actor
from netnsd.core.egress import reach
from netnsd.core.environment import Command
from netnsd.errors import (
    Forbidden,
    InvalidCommand,
    InvalidLabel,
    InvalidName,
    InvalidPort,
    InvalidRequest,
    InvalidVariable,
)

NAME_CHARACTERS = 63
MAX_PORTS = 64
MAX_SERVICES = 32
MAX_LABELS = 64
MAX_COUNT = 500
MAX_SHARES = 64
MAX_GUESTS = 4096
# The least, the most, and what is counted. A process that is started needs some memory itself. The kernel divides time
# by the millisecond in 100 (Documentation/scheduler/sched-bwc.rst), and its filters count bytes in 32 bits. There are
# PID_MAX_LIMIT processes at most (linux/threads.h).
RESOURCES = {"memory": (4 << 20, 1 << 50, "bytes"), "cpu": (0.01, 8192, "processors"),
             "pids": (1, 4194304, "processes and their threads"),
             "bandwidth": (64_000, 32_000_000_000, "bits per second")}

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?\Z")
LABEL_VALUE_CHARACTERS = 256
# Controls, and what changes how a terminal shows what is beside it: separators, directions, characters without width.
UNPRINTABLE = r"\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\uffff"
LABEL_VALUE = re.compile(f"[^{UNPRINTABLE}]{{0,{LABEL_VALUE_CHARACTERS}}}\\Z")
GUEST = r"(user|group):[^\s\u0000-\u0020:,/]{1,64}"
_SHARE = re.compile(rf"{GUEST}\Z")
_PATH_CHARACTERS = 1024
_PATH = re.compile(rf"/[!-~]{{0,{_PATH_CHARACTERS - 1}}}\Z")
HEALTH_RANGES = {"interval_seconds": (1, 86400), "timeout_seconds": (0.1, 3600), "retries": (1, 1000),
                 "start_period_seconds": (0, 86400)}
LIMITS = frozenset({"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc",
                     "rss", "rtprio", "rttime", "sigpending", "stack"})
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_name(name: str, *, what: str = "name") -> str:
    """Return ``name`` when it is a DNS label. Raises InvalidName."""
    if not _NAME.match(name):
        raise InvalidName(
            f"{what} {_shown(name)} is not a DNS label",
            hint=f"Use 1 to {NAME_CHARACTERS} of a-z, 0-9 and '-', with a letter or digit at both ends"
                 f"{_suggestion(name)}.", name=name[:NAME_CHARACTERS + 1])
    return name


def name_of(request: wire.CreateRequest) -> str:
    """The name that is asked for, or one made up. Raises InvalidName."""
    return f"e{uuid.uuid4().hex[:8]}" if request.name is None else check_name(request.name)


def check_port(port: int, *, what: str = "port") -> int:
    """Return ``port`` when it is 1 to 65535. Raises InvalidPort."""
    if not 1 <= port <= 65535:
        raise InvalidPort(f"{what} {port} is not from 1 to 65535", hint="Use a number from 1 to 65535.", port=port)
    return port


def check_ports(ports: Iterable[wire.PortRequest], published_range: tuple[int, int]) -> list[wire.PortRequest]:
    """Return the ports when each is asked for once and numbers are in range (inclusive). Raises InvalidPort."""
    seen: set[tuple[str, int]] = set()
    published: set[tuple[str, int]] = set()
    checked = list(ports)
    if len(checked) > MAX_PORTS:
        raise InvalidPort(f"{len(checked)} ports are more than {MAX_PORTS}", hint="Publish fewer.")
    for request in checked:
        check_port(request.port)
        if (request.protocol, request.port) in seen:
            raise InvalidPort(f"port {request.port}/{request.protocol} is asked for twice", hint="Name it once.")
        seen.add((request.protocol, request.port))
        if request.publish is not None:
            low, high = published_range
            if not low <= request.publish <= high:
                raise InvalidPort(f"published port {request.publish} is outside the range {low}-{high}",
                                  hint="Ask for one in the range, or for none and get a free one.",
                                  port=request.publish, range=f"{low}-{high}")
            if (request.protocol, request.publish) in published:
                raise InvalidPort(f"published port {request.publish}/{request.protocol} is asked for twice",
                                  hint="Ask for two numbers.")
            published.add((request.protocol, request.publish))
    return checked


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels when keys and values are well formed. Raises InvalidLabel."""
    if len(labels) > MAX_LABELS:
        raise InvalidLabel(f"{len(labels)} labels are more than {MAX_LABELS}", hint="Use fewer.")
    for key, value in labels.items():
        if not LABEL_KEY.match(key):
            raise InvalidLabel(f"label {_shown(key)} is malformed",
                               hint="A key has letters, digits, '.', '_', '-' and '/'.", label=key[:128])
        if not LABEL_VALUE.match(value):
            raise InvalidLabel(f"the value of label {key!r} is malformed",
                               hint=f"A value has at most {LABEL_VALUE_CHARACTERS} printable characters.", label=key)
    return dict(labels)


def merged(labels: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Labels with changes: a value takes the place of one of before, None takes it away."""
    both = {**labels, **changes}
    return {key: value for key, value in both.items() if value is not None}


def check_count(count: int | None) -> range:
    """The numbers of so many environments, from 1. Raises InvalidRequest."""
    if count is None or not 1 <= count <= MAX_COUNT:
        raise InvalidRequest(f"count {count} is not from 1 to {MAX_COUNT}", hint="Ask again for more.")
    return range(1, count + 1)


def check_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables when the kernel can take them. Raises InvalidVariable."""
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise InvalidVariable(f"variable {_shown(name)} is malformed",
                                  hint="A name is not empty and has no '='; neither part has a NUL.", name=name[:128])
    return dict(variables)


def check_services(request: wire.Specification) -> list[wire.ServiceRequest]:
    """The services that a request asks for, in order. Raises InvalidCommand, InvalidName, InvalidRequest."""
    if request.command is not None and request.services is not None:
        raise InvalidCommand("command and services are both given", hint="Give one of the two.")
    if request.health is not None and request.command is None:
        raise InvalidRequest("health is given, and no command", hint="Give it to the service that it is of.")
    if request.command is not None:
        services = [wire.ServiceRequest(command=request.command, health=request.health)]
    else:
        services = list(request.services or [])
    if len(services) > MAX_SERVICES:
        raise InvalidCommand(f"{len(services)} services are more than {MAX_SERVICES}", hint="Use fewer.")
    names: set[str] = set()
    for service in services:
        check_name(service.name, what="service name")
        if service.name in names:
            raise InvalidCommand(f"service {service.name!r} is given twice", hint="Give each its own name.")
        names.add(service.name)
    return services


def check_health(check: wire.HealthCheck | None) -> wire.HealthCheck | None:
    """Return the check when it is one, and its numbers are in range. Raises InvalidRequest, InvalidPort."""
    if check is None:
        return None
    if (check.tcp is not None, check.http is not None, check.command is not None).count(True) != 1:
        raise InvalidRequest("health is not one of tcp, http and command", hint="Give one of the three.")
    if (check.http is None) != (check.port is None):
        raise InvalidRequest("http and port of health belong together", hint='Write {"http": "/", "port": 3000}.')
    for port in (check.tcp, check.port):
        if port is not None:
            check_port(port, what="health's port")
    if check.http is not None and not _PATH.match(check.http):
        raise InvalidRequest(f"health's path {_shown(check.http)} is malformed",
                             hint=f"It begins with / and has at most {_PATH_CHARACTERS} printable ASCII characters.")
    if check.command is not None and not (check.command and check.command[0] and "\0" not in "".join(check.command)):
        raise InvalidRequest("health's command is empty or has a NUL", hint="Give a program and its arguments.")
    for name, (least, most) in HEALTH_RANGES.items():
        if not least <= getattr(check, name) <= most:
            raise InvalidRequest(f"health's {name} {getattr(check, name):g} is not from {least:g} to {most:g}",
                                 hint="Leave it out for the default.")
    return check


def check_share(share: str) -> str:
    """Return who else reaches an environment when it says so. Raises InvalidRequest."""
    if share in ("owner", "host", "lan"):
        return share
    parts = share.split(",")
    if len(parts) > MAX_SHARES or not all(_SHARE.match(part) for part in parts):
        raise InvalidRequest(f"share {_shown(share)} is none of owner, host, lan and user:NAME,group:NAME",
                             hint=f"Write user:NAME or group:NAME; at most {MAX_SHARES}, with commas between.")
    return ",".join(dict.fromkeys(parts))


def named_guests(share: str) -> list[tuple[str, str]]:
    """The (kind, name) pairs, such as ("user", "alice"), of a share that was checked; none for owner, host and lan."""
    return [(kind, name) for kind, colon, name in (part.partition(":") for part in share.split(",")) if colon]


def check_egress(egress: str) -> str:
    """Return what an environment reaches outside when it says so: see ``egress.reach``. Raises InvalidRequest."""
    reach(egress)
    return egress


def check_resources(resources: wire.Resources | None, defaults: wire.Resources) -> wire.Resources:
    """Return the limits when the kernel can take them; what is not said is the default. Raises InvalidRequest."""
    if resources is None:
        return defaults
    for name, (least, most, unit) in RESOURCES.items():
        value = getattr(resources, name)
        if value is not None and not least <= value <= most:
            raise InvalidRequest(f"resources.{name} {value:g} is not from {least:g} to {most:g}",
                                 hint=f"It is a number of {unit}.")
    return wire.Resources(**{name: getattr(defaults, name) if (value := getattr(resources, name)) is None else value
                             for name in RESOURCES})


def check_circumstances(cwd: str, umask: int, limits: Mapping[str, int]) -> str:
    """Return the directory when it is one, and the others are what the kernel takes. Raises InvalidCommand."""
    if not cwd.startswith("/") or "\0" in cwd:
        raise InvalidCommand(f"directory {_shown(cwd)} is not absolute", hint="Give a path from /.")
    if not 0 <= umask <= 0o777:
        raise InvalidCommand(f"umask {umask} is not from 0 to 511 (octal 777)", hint="Give permission bits.")
    for name, value in limits.items():
        if name not in LIMITS or value < -1 or value >= 1 << 63:
            raise InvalidCommand(f"limit {_shown(name)} = {value} is not one of the kernel's",
                                 hint=f"Known: {', '.join(sorted(LIMITS))}; -1 is unlimited.")
    return cwd


def command(*, argv: list[str], env: Mapping[str, str], cwd: str | None, umask: int, limits: Mapping[str, int],
            setuid: bool, actor: Actor, allow_setuid: bool) -> Command:
    """A command as ``actor``, with the variables that every login has where the client gave none.

    Raises InvalidCommand, InvalidVariable, Forbidden.
    """
    if not argv or not argv[0]:
        raise InvalidCommand("the command is empty", hint="Give a program and its arguments.")
    if any("\0" in argument for argument in argv):
        raise InvalidCommand("an argument has a NUL character", hint="The kernel cannot pass it.")
    directory = check_circumstances(cwd if cwd is not None else actor.home, umask, limits)
    if setuid and not allow_setuid:
        raise Forbidden("this host does not allow setuid programs in environments",
                        hint="Leave --setuid out, or ask an admin ([services] allow_setuid).")
    login = {"HOME": actor.home, "USER": actor.user, "LOGNAME": actor.user, "SHELL": actor.shell,
             "PATH": _DEFAULT_PATH}
    return Command(argv=tuple(argv), env={**login, **check_variables(env)}, cwd=directory, uid=actor.uid,
                   gid=actor.gid, groups=actor.groups, umask=umask, limits=dict(limits), setuid=setuid)


def _shown(text: str) -> str:
    return repr(text if len(text) <= NAME_CHARACTERS else text[:NAME_CHARACTERS] + "...")


def _suggestion(name: str) -> str:
    proposal = re.sub(r"[^a-z0-9-]+", "-", name.lower())[:NAME_CHARACTERS].strip("-")
    return f": {proposal!r} would do" if _NAME.match(proposal) else ""
