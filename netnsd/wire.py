"""What travels between client and daemon, as JSON: requests (unknown fields refused) and answers.

The OpenAPI document is generated from these types. Validation beyond types is in ``netnsd.core.specification``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Protocol = Literal["tcp", "udp"]
EnvironmentState = Literal["creating", "running", "stopped", "removing"]
ServiceState = Literal["starting", "running", "restarting", "exited", "stopped"]
RestartPolicy = Literal["no", "on-failure", "always"]
HealthState = Literal["starting", "healthy", "unhealthy"]
Scope = Literal["read", "write", "admin"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what clients send."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what the daemon sends. Fields are only ever added."""


class PortRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port inside the environment that gets a published host port; ``publish`` asks for a number."""

    port: int
    protocol: Protocol = "tcp"
    publish: int | None = None


class HealthCheck(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to find out whether a service is healthy: one of ``tcp``, ``http`` with ``port``, and ``command``.

    ``tcp``: a port that accepts. ``http``: a path that is answered 2xx or 3xx at ``port``. ``command``: one that ends
    with 0 inside the environment. Every ``interval_seconds`` it is tried, ``retries`` failures in a row make it
    unhealthy, and those of the first ``start_period_seconds`` do not count until it was healthy once.
    """

    tcp: int | None = None
    http: str | None = None
    port: int | None = None
    command: list[str] | None = None
    interval_seconds: float = 10.0
    timeout_seconds: float = 5.0
    retries: int = 3
    start_period_seconds: float = 30.0


class Resources(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all of an environment's processes may take together; None: no limit of its own.

    ``memory`` in bytes, with no swap beyond it; ``cpu`` in processors; ``pids``: processes and threads at once;
    ``bandwidth`` of its link, in bits per second each way.
    """

    memory: int | None = None
    cpu: float | None = None
    pids: int | None = None
    bandwidth: int | None = None


class ServiceRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One supervised command. What is absent is taken from the environment's request.

    ``limits`` are soft resource limits by lower-case name (``nofile``), -1 for unlimited.
    """

    name: str = "main"
    command: list[str]
    env: dict[str, str] = {}
    cwd: str | None = None
    setuid: bool | None = None
    restart: RestartPolicy | None = None
    health: HealthCheck | None = None


class Specification(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an environment is to be. ``command`` is short for one service named ``main``; ``health`` is that one's.

    ``share``: who else reaches its declared ports: ``owner`` (nobody), ``host`` (any user of the host), ``lan`` (also
    who comes by the host's other addresses), or users and groups: ``user:NAME,group:NAME``.
    ``egress``: what it reaches outside of the host: ``allow`` (all), ``deny`` (nothing), or
    CIDR[:PORT[-PORT]][/PROTOCOL] with commas between.
    """

    command: list[str] | None = None
    services: list[ServiceRequest] | None = None
    ports: list[PortRequest] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    labels: dict[str, str] = {}
    share: str = "owner"
    egress: str = "allow"
    setuid: bool = False
    umask: int = 0o022
    limits: dict[str, int] = {}
    restart: RestartPolicy = "no"
    health: HealthCheck | None = None
    resources: Resources | None = None


class CreateRequest(Specification, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/environments``.

    ``count``: so many at once, named NAME-1, NAME-2 ...; all are made, or none. ``template``: make what that template
    of the caller's holds; of the specification only ``labels`` may be given beside it, and are added to the template's.
    """

    name: str | None = None
    replace: bool = False
    count: int | None = None
    template: str | None = None


class ChangeRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``PATCH /v1/environments/{ref}``: what is absent stays. ``labels`` that are null are taken away."""

    share: str | None = None
    egress: str | None = None
    labels: dict[str, str | None] = {}


class TemplateRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/templates``. ``warm``: so many environments of it are kept started and ready.

    ``replace``: in place of the caller's template of that name, whose warm environments are removed.
    """

    name: str
    warm: int = 0
    replace: bool = False
    specification: Specification


class PolicyRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/policies``: NetworkPolicy documents of networking.k8s.io/v1, and lists of them. All apply, or none."""

    policies: list[dict[str, Any]]


class QuotaRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``PUT /v1/quotas/{user}``: as in QuotaLimits; what is absent is as it is for all users."""

    environments: int | msgspec.UnsetType | None = msgspec.UNSET
    ports: int | msgspec.UnsetType | None = msgspec.UNSET
    memory: int | msgspec.UnsetType | None = msgspec.UNSET
    cpu: float | msgspec.UnsetType | None = msgspec.UNSET
    creations_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET


class PoolRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``PATCH /v1/pools/slots``: keep ``size`` slots ready, none at 0, until the daemon starts again."""

    size: int


class TokenRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/tokens``: a bearer token, by default the caller's own.

    ``scope``: what it is good for; each holds the one before. ``expires_seconds``: from now; None: never. ``user``:
    whose it is to be, for admins.
    """

    name: str
    scope: Scope = "read"
    expires_seconds: float | None = None
    user: str | None = None


class ProjectRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/environments/start``: the environment of a developer's project."""

    dev_id: str
    project: str


class ProjectReference(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/environments/terminate``: ``dev_id`` and ``project``, or ``id`` of an environment."""

    dev_id: str | None = None
    project: str | None = None
    id: str | None = None


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


class ErrorBody(Answer, frozen=True, kw_only=True):
    """What every failed request answers, under ``error``."""

    code: str
    message: str
    hint: str
    details: dict[str, Any] = {}


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
    """``exit_code`` is None while it runs and where the kernel did not tell; 128 + n for a death by signal n.

    ``restarts`` by the daemon, since the last start by hand. ``health`` is None where it is not checked, or nothing
    runs. ``state`` ``restarting``: it has ended, and is started again in a while.
    """

    name: str
    command: list[str]
    pid: int | None
    state: ServiceState
    exit_code: int | None
    restart: RestartPolicy
    restarts: int
    health: HealthState | None


class Environment(Answer, frozen=True, kw_only=True):
    """An environment as ``show -o json`` prints it.

    ``oom_kills``: how many of its processes the kernel ended, as ``resources.memory`` was all that they could have.
    """

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
    egress: str
    resources: Resources
    oom_kills: int
    created_at: str


class EnvironmentList(Answer, frozen=True, kw_only=True):
    """``GET /v1/environments``."""

    environments: list[Environment]


class Failure(Answer, frozen=True, kw_only=True):
    """What could not be done of many; ``ref`` is what the request named."""

    ref: str
    error: ErrorBody


class Removal(Answer, frozen=True, kw_only=True):
    """``DELETE /v1/environments``: names that are gone (with ``wait=0``: are going), and what failed."""

    removed: list[str]
    failed: list[Failure]


class TemplateService(Answer, frozen=True, kw_only=True):
    """What a template's service runs. ``cwd`` None: the owner's home."""

    name: str
    command: list[str]
    cwd: str | None


class Template(Answer, frozen=True, kw_only=True):
    """A template. ``ready`` of ``warm`` environments can be handed over at once; ``reason`` says why not all.

    Variables are not shown: they hold secrets.
    """

    id: str
    name: str
    owner: Owner
    warm: int
    ready: int
    reason: str
    services: list[TemplateService]
    ports: list[PortRequest]
    labels: dict[str, str]
    created_at: str


class TemplateList(Answer, frozen=True, kw_only=True):
    """``GET /v1/templates``."""

    templates: list[Template]


class Policy(Answer, frozen=True, kw_only=True):
    """A policy. ``types``: what it limits. ``selects``: environments that it is about. ``document``: as given."""

    name: str
    owner: Owner
    types: list[Literal["Ingress", "Egress"]]
    selects: list[str]
    document: dict[str, Any]
    created_at: str


class PolicyList(Answer, frozen=True, kw_only=True):
    """``GET /v1/policies``."""

    policies: list[Policy]


class Pool(Answer, frozen=True, kw_only=True):
    """What is kept ready: ``slots``, or of a template (``template/NAME``) environments.

    ``size``: how many by configuration or request. ``target``: how many now, as demand has grown. ``claimed`` and
    ``missed``: creations since the daemon's start that got one, and that did not. ``reason``: why it is not full.
    """

    name: str
    size: int
    target: int
    ready: int
    claimed: int
    missed: int
    reason: str


class PoolList(Answer, frozen=True, kw_only=True):
    """``GET /v1/pools``."""

    pools: list[Pool]


class Token(Answer, frozen=True, kw_only=True):
    """A bearer token, without the token itself, which nobody has but who was shown it.

    ``parent``: the id of the token that it was made with, and ends with; None: made over a Unix socket. ``expired``: by
    now.
    """

    id: str
    name: str
    owner: Owner
    scope: Scope
    parent: str | None
    created_at: str
    expires_at: str | None
    expired: bool


class IssuedToken(Token, frozen=True, kw_only=True):
    """A new token. ``token`` is shown this once."""

    token: str


class TokenList(Answer, frozen=True, kw_only=True):
    """``GET /v1/tokens``."""

    tokens: list[Token]


class QuotaLimits(Answer, frozen=True, kw_only=True):
    """What one user may have in all, None for unlimited.

    ``environments``, those included that are kept warm, and their published ``ports``. ``memory`` (bytes) and ``cpu``
    (processors): what the limits of all of them come to; each must have one then.
    """

    environments: int | None = None
    ports: int | None = None
    memory: int | None = None
    cpu: float | None = None
    creations_per_minute: int | None = None


class QuotaUsage(Answer, frozen=True, kw_only=True):
    """What one user has, as in QuotaLimits."""

    environments: int
    ports: int
    memory: int
    cpu: float


class Quota(Answer, frozen=True, kw_only=True):
    """A user's quota. ``own``: the limits that an admin has set for that user; the others are as for all users."""

    owner: Owner
    limits: QuotaLimits
    used: QuotaUsage
    own: list[str]


class QuotaList(Answer, frozen=True, kw_only=True):
    """``GET /v1/quotas``."""

    quotas: list[Quota]


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
    pool_size: int
    pool_ready: int
    features: dict[str, bool]


class Check(Answer, frozen=True, kw_only=True):
    """One line of ``doctor``: ``hint`` says what to install or change."""

    name: str
    ok: bool
    severity: Literal["error", "warning", "info"]
    message: str
    hint: str = ""


class Difference(Answer, frozen=True, kw_only=True):
    """One thing in which state file and kernel do not agree.

    ``missing``: it should be there; the daemon's checks put it there. ``orphan``: it is nobody's; ``prune`` removes it.
    ``stray``: a process in an environment that left its control group; it ends with the environment.
    ``what`` is a kind of thing (``link``, ``cgroup``, ``port`` ...), ``subject`` which one, ``environment`` an id, or
    "" where it is nobody's.
    """

    kind: Literal["missing", "orphan", "stray"]
    what: str
    subject: str
    message: str
    environment: str


class Doctor(Answer, frozen=True, kw_only=True):
    """``GET /v1/doctor``. ``differences``: of the caller's own environments, for an admin of everything."""

    checks: list[Check]
    differences: list[Difference]


class Pruned(Answer, frozen=True, kw_only=True):
    """``POST /v1/prune``: what differed and does no more, and what still does."""

    removed: list[Difference]
    left: list[Difference]


class Event(Answer, frozen=True, kw_only=True):
    """One change, as a line of ``GET /v1/events``; ``seq`` grows by one per event of a daemon's run."""

    seq: int
    time: str
    kind: str
    environment: str
    name: str
    details: dict[str, Any] = {}


class ErrorAnswer(Answer, frozen=True, kw_only=True):
    """``{"error": {...}}``."""

    error: ErrorBody
