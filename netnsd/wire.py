"""What travels between client and daemon, as JSON: requests (unknown fields refused) and answers.

The OpenAPI document is generated from these types. Validation beyond types is in ``netnsd.core.specification``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Protocol = Literal["tcp", "udp"]
EnvironmentState = Literal["creating", "running", "stopped", "removing"]
ServiceState = Literal["starting", "running", "exited", "stopped"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what clients send."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what the daemon sends. Fields are only ever added."""


class PortRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port inside the environment that gets a published host port; ``publish`` asks for a number."""

    port: int
    protocol: Protocol = "tcp"
    publish: int | None = None


class ServiceRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One supervised command. What is absent is taken from the environment's request.

    ``limits`` are soft resource limits by lower-case name (``nofile``), -1 for unlimited.
    """

    name: str = "main"
    command: list[str]
    env: dict[str, str] = {}
    cwd: str | None = None
    setuid: bool | None = None


class CreateRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/environments``. ``command`` is short for one service named ``main``."""

    name: str | None = None
    command: list[str] | None = None
    services: list[ServiceRequest] | None = None
    ports: list[PortRequest] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    labels: dict[str, str] = {}
    share: Literal["owner"] = "owner"
    setuid: bool = False
    umask: int = 0o022
    limits: dict[str, int] = {}
    replace: bool = False


class StopRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/environments/{ref}/stop`` and ``/restart``: how long a server has to end by itself."""

    grace_seconds: float = 10.0


class ExecRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first frame on attach.sock: run one command in an environment, on the client's own descriptors."""

    ref: str
    command: list[str]
    env: dict[str, str] = {}
    cwd: str | None = None
    setuid: bool = False
    umask: int = 0o022
    limits: dict[str, int] = {}
    tty: bool = False


class Owner(Answer, frozen=True, kw_only=True):
    """Who an environment belongs to."""

    uid: int
    user: str


class Port(Answer, frozen=True, kw_only=True):
    """``listen``:``published`` on the host leads to ``port`` inside."""

    port: int
    protocol: Protocol
    published: int
    listen: str


class Service(Answer, frozen=True, kw_only=True):
    """``exit_code`` is None while it runs and where the kernel did not tell; 128 + n for a death by signal n."""

    name: str
    command: list[str]
    pid: int | None
    state: ServiceState
    exit_code: int | None


class Environment(Answer, frozen=True, kw_only=True):
    """An environment as ``show -o json`` prints it."""

    id: str
    name: str
    owner: Owner
    state: EnvironmentState
    address: str
    netns: str
    ports: list[Port]
    services: list[Service]
    labels: dict[str, str]
    share: str
    created_at: str


class EnvironmentList(Answer, frozen=True, kw_only=True):
    """``GET /v1/environments``."""

    environments: list[Environment]


class Health(Answer, frozen=True, kw_only=True):
    """``GET /v1/health``."""

    status: Literal["ok"]


class Info(Answer, frozen=True, kw_only=True):
    """``GET /v1/info``: what this daemon is and what it holds."""

    version: str
    pid: int
    started_at: str
    kernel: str
    supernet: str
    port_range: str
    environments: int
    published_ports: int
    addresses_free: int
    features: dict[str, bool]


class Check(Answer, frozen=True, kw_only=True):
    """One line of ``doctor``: ``hint`` says what to install or change."""

    name: str
    ok: bool
    severity: Literal["error", "warning", "info"]
    message: str
    hint: str = ""


class Doctor(Answer, frozen=True, kw_only=True):
    """``GET /v1/doctor``."""

    checks: list[Check]


class Event(Answer, frozen=True, kw_only=True):
    """One change, as a line of ``GET /v1/events``; ``seq`` grows by one per event of a daemon's run."""

    seq: int
    time: str
    kind: str
    environment: str
    name: str
    details: dict[str, Any] = {}


class ErrorBody(Answer, frozen=True, kw_only=True):
    """What every failed request answers, under ``error``."""

    code: str
    message: str
    hint: str
    details: dict[str, Any] = {}


class ErrorAnswer(Answer, frozen=True, kw_only=True):
    """``{"error": {...}}``."""

    error: ErrorBody
