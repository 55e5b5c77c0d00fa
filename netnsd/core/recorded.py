"""What the state file tells is looked at before it is believed: names become paths, numbers become users and ports.

A file that was damaged, or changed by hand, must not be acted upon. Only what makes a value dangerous, or nonsense to
the rest of core, is refused: a rule for requests that has grown stricter since does not keep a daemon from starting.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, get_args

from netnsd import wire
from netnsd.core import specification
from netnsd.core.environment import Command, Environment, PublishedPort, Quota, Service, StoredState, Template, Token
from netnsd.core.policy import Policy
from netnsd.core.policy_documents import policy_of
from netnsd.core.quotas import LIMITS, MOST
from netnsd.errors import NetnsdError, StoreError

HINT = ("Nothing was changed. Put a copy of it back, or move it away: environments end then at the next start."
        ' See README, "A damaged state file".')

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}\Z")
_NETNS = re.compile(r"[a-z0-9][A-Za-z0-9_.@-]{0,126}\Z")  # a name, or name and user: see Registry
_MARK = re.compile(r"([0-9a-f]{32}:[0-9a-f]{32})?\Z")  # see once.Mark
_MOST_PID = 4194304  # PID_MAX_LIMIT, linux/threads.h
_HASH_BYTES = 32  # SHA-256
_MOST_ID = 2**32 - 2  # (uid_t)-1 means "unchanged" to setresuid(2)


def environments(found: list[Environment]) -> list[Environment]:
    """Return them when each can be, and none has what is another's. Raises StoreError."""
    for environment in found:
        try:
            _environment(environment)
        except NetnsdError as error:
            raise refuse(f"environment {environment.id!r}", error.message) from error
    for what, values in (
            ("id", [e.id for e in found]), ("slot", [e.slot.index for e in found]), ("netns", [e.netns for e in found]),
            ("owner and name", [(e.uid, e.name) for e in found]),
            ("published port", [(p.protocol, p.published) for e in found for p in e.ports])):
        _require_unique(what, values)
    return found


def templates(found: list[Template]) -> list[Template]:
    """Return them when each can be. Raises StoreError."""
    for template in found:
        try:
            _require(_ID.match(template.id) is not None, "id")
            specification.check_name(template.name)
            for number in (template.uid, template.gid, *template.groups):
                _id(number)
            _text("user", template.user)
            _text("created_at", template.created_at)
            _number("warm", template.warm, 0, specification.MAX_COUNT)
        except NetnsdError as error:
            raise refuse(f"template {template.id!r}", error.message) from error
    _require_unique("id", [t.id for t in found])
    _require_unique("owner and name", [(t.uid, t.name) for t in found])
    return found


def tokens(found: list[Token]) -> list[Token]:
    """Return them when each can be: a scope that is none, or a time, must not let anybody in. Raises StoreError."""
    for token in found:
        try:
            for what in (token.id, token.name, token.user, token.created_at):
                _text("a text", what)
            _require(_ID.match(token.id) is not None, "id")
            specification.check_name(token.name)
            _id(token.uid)
            _require(isinstance(token.hash, bytes) and len(token.hash) == _HASH_BYTES, "hash")
            _require(token.scope in get_args(wire.Scope), "scope")
            _require(token.parent is None or token.parent in {other.id for other in found}, "parent")
            if token.expires_at is not None:
                _time(token.expires_at)
        except NetnsdError as error:
            raise refuse(f"token {token.id!r}", error.message) from error
    _require_unique("id", [t.id for t in found])
    return found


def quotas(found: list[Quota]) -> list[Quota]:
    """Return them when each can be: what is no number would hold nothing. Raises StoreError."""
    for quota in found:
        try:
            _id(quota.uid)
            _text("user", quota.user)
            _require(isinstance(quota.said, dict), "limits")
            for name, limit in quota.said.items():
                is_one = limit is None or (type(limit) in (int, float) and 0 <= limit <= MOST)
                _require(name in LIMITS and is_one, name)
        except NetnsdError as error:
            raise refuse(f"quota of {quota.user!r}", error.message) from error
    return found


def policies(found: Iterable[tuple[int, str, str, Any, str]]) -> list[Policy]:
    """What these mean, where they can be: user's id and name, the policy's name, its document, when it was applied.

    One that means nothing would let what it forbade. Raises StoreError.
    """
    policies: list[Policy] = []
    for uid, user, name, document, created_at in found:
        try:
            _id(uid)
            _text("user", user)
            _text("created_at", created_at)
            policies.append(policy_of(document, uid, user, created_at))
            _require(policies[-1].name == name, "name")
        except NetnsdError as error:
            raise refuse(f"policy {name!r} of {user!r}", error.message) from error
    _require_unique("owner and name", [(p.uid, p.name) for p in policies])
    return policies


def refuse(what: str, why: object) -> StoreError:
    """The error for something in the state file that cannot be."""
    return StoreError(f"the state file is damaged: {what[:200]}: {str(why)[:300]}", hint=HINT)


def _environment(e: Environment) -> None:
    _require(isinstance(e.id, str) and _ID.match(e.id) is not None, "id")
    _require(isinstance(e.netns, str) and _NETNS.match(e.netns) is not None, "netns")
    for name in ("name", "user", "share", "egress", "created_at", "boot_id", "stock"):
        _text(name, getattr(e, name))
    _require(isinstance(e.request, str) and _MARK.match(e.request) is not None, "request")
    specification.check_name(e.name)
    _id(e.uid)
    _require(e.state in get_args(StoredState), "state")
    specification.check_share(e.share)
    specification.check_egress(e.egress)
    specification.check_resources(e.resources, wire.Resources())
    for port in e.ports:
        _port(port)
    for name, service in e.services.items():
        _text("service", name)
        specification.check_name(name, what="service")
        _service(service, e.uid)


def _port(port: PublishedPort) -> None:
    for number in (port.port, port.published):
        _number("port", number, 1, 65535)
    _require(port.protocol in get_args(wire.Protocol), "protocol")
    _text("listen", port.listen)
    try:
        ipaddress.IPv4Address(port.listen)
    except ValueError as error:
        raise refuse("listen", error) from error


def _service(service: Service, uid: int) -> None:
    _require(service.state in get_args(wire.ServiceState), "state of a service")
    _require(service.restart in get_args(wire.RestartPolicy), "restart")
    _require(service.health in (None, *get_args(wire.HealthState)), "health")
    if service.pid is not None:
        _number("pid", service.pid, 1, _MOST_PID)
    if service.exit_code is not None:
        _number("exit_code", service.exit_code, 0, 255)
    if service.launch_id is not None:
        _text("launch_id", service.launch_id)
    _number("restarts", service.restarts, 0, 2**63)
    _number("tries", service.tries, 0, 2**63)
    specification.check_health(service.check)
    _command(service.command, uid)


def _command(command: Command, uid: int) -> None:
    _require(command.uid == uid, "a command is not its environment's owner's")
    for number in (command.uid, command.gid, *command.groups):
        _id(number)
    _require(bool(command.argv) and "\0" not in "".join(command.argv), "argv")
    specification.check_variables(command.env)
    specification.check_circumstances(command.cwd, command.umask, command.limits)


def _require(holds: bool, what: str) -> None:  # what holds is said by its name
    if not holds:
        raise refuse(what, "it cannot be that")


def _text(what: str, value: object) -> None:
    _require(isinstance(value, str) and "\0" not in value, what)


def _number(what: str, value: object, least: int, most: int) -> None:
    _require(type(value) is int and least <= value <= most, what)


def _time(value: object) -> None:
    _text("a time", value)
    try:
        _require(datetime.datetime.fromisoformat(str(value)).tzinfo is not None, "a time")
    except ValueError as error:
        raise refuse("a time", error) from error


def _id(value: object) -> None:
    _number("a user or group id", value, 0, _MOST_ID)


def _require_unique(what: str, values: Iterable[Hashable]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise refuse(what, f"{value!r} is there {count} times")
