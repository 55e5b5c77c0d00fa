"""The nouns that netnsd keeps: environments with their services and ports. Plain values, no behaviour that awaits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from netnsd import wire
from netnsd.core.addressing import Slot

StoredState = Literal["creating", "ready", "removing"]
ServiceState = wire.ServiceState
# States of a service that runs, or will without anybody's asking.
ALIVE: frozenset[ServiceState] = frozenset({"starting", "running", "restarting"})


@dataclass(frozen=True, slots=True)
class Command:
    """What a service runs, and as what: everything that a later start needs again.

    ``groups`` are the supplementary groups that the creator had. ``limits`` are soft limits by lower-case name.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    limits: dict[str, int]
    setuid: bool


@dataclass(frozen=True, slots=True)
class Service:
    """One supervised command. ``launch_id`` names its latest start; exit reports carry it.

    ``restarts``: how often it was started again since the last start by hand, and ``tries``: how many of the latest of
    these did not last. ``health`` is what ``check`` found of it while it runs.
    """

    name: str
    command: Command
    state: ServiceState = "stopped"
    pid: int | None = None
    launch_id: str | None = None
    exit_code: int | None = None
    restart: wire.RestartPolicy = "no"
    check: wire.HealthCheck | None = None
    restarts: int = 0
    tries: int = 0
    health: wire.HealthState | None = None

    def changed(self, **changes: object) -> Service:
        """A copy with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """``published`` on the host leads to ``port`` inside."""

    port: int
    protocol: str
    published: int
    listen: str = "127.0.0.1"


@dataclass(slots=True)
class Environment:
    """One environment. Mutable where its life changes it: ``state`` and ``services``.

    ``stock``: the id of the template that it is kept for, started before anybody asked; "" when it has been asked for.
    ``request``: the mark of the request that it was made by (``once.Mark``), "" where that had no key.
    ``share`` and ``egress`` are as in ``wire.Specification``; ``guests`` are the ids of whom ``share`` names, and not
    stored. ``oom_kills`` as far as they were noticed; the kernel keeps that.
    """

    id: str
    name: str
    uid: int
    user: str
    slot: Slot
    netns: str
    labels: dict[str, str]
    share: str
    created_at: str
    boot_id: str
    stock: str = ""
    request: str = ""
    egress: str = "allow"
    resources: wire.Resources = field(default_factory=wire.Resources)
    ports: tuple[PublishedPort, ...] = ()
    guests: tuple[int, ...] = ()
    state: StoredState = "creating"
    services: dict[str, Service] = field(default_factory=dict)
    oom_kills: int = 0

    @property
    def netns_path(self) -> str:
        """Where the namespace is pinned under its name, for ip-netns(8) and for people."""
        return f"/run/netns/{self.netns}"

    @property
    def shown_state(self) -> Literal["creating", "running", "stopped", "removing"]:
        """What users see: an environment runs when a service of it does, or will, or when it has none to run."""
        if self.state != "ready":
            return self.state
        running = not self.services or any(s.state in ALIVE for s in self.services.values())
        return "running" if running else "stopped"


@dataclass(frozen=True, slots=True)
class Quota:
    """What an admin has said that a user may have.

    ``said``: by the names of ``wire.QuotaLimits``, None for unlimited; what is absent is as it is for all users.
    """

    uid: int
    user: str
    said: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Template:
    """A specification under a name. ``warm``: environments of it to keep in stock.

    ``gid`` and ``groups`` are those that its creator had: what is in stock runs with no others.
    """

    id: str
    name: str
    uid: int
    user: str
    gid: int
    groups: tuple[int, ...]
    warm: int
    specification: wire.Specification
    created_at: str


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token of a user's. ``hash`` is SHA-256 of it.

    ``parent``: the id of the token that it was made with, and with which it ends; None: made over a Unix socket.
    """

    id: str
    name: str
    uid: int
    user: str
    hash: bytes
    scope: wire.Scope
    parent: str | None
    created_at: str
    expires_at: str | None
