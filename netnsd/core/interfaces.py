"""What core needs of the kernel, the store and the clock. ``kernel`` and ``store`` implement it; fakes do in tests."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import trio

from netnsd import wire
from netnsd.core.addressing import Bridge, Slot
from netnsd.core.environment import Environment, Quota, Service, Template, Token
from netnsd.core.judgement import Judgement
from netnsd.core.policy import Policy


@dataclass(frozen=True, slots=True)
class Launch:
    """All that the launcher needs to start one command.

    ``launch_id`` names this start for ever: exit reports carry it. ``limits`` are soft limits by lower-case name
    (``nofile``), -1 for unlimited; ``hard_limits`` bound them. ``cgroup`` is relative to netnsd's cgroup root.
    ``joins`` are groups of other hierarchies that it is to be in too, as absolute paths.
    ``log_fd`` is open for append, or None where the command gets its descriptors from a client (attach).
    """

    launch_id: str
    netns: str
    cgroup: str
    hostname: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    limits: dict[str, int]
    setuid: bool
    hosts_file: str
    resolv_file: str | None
    log_fd: int | None = None
    tty: bool = False
    hard_limits: dict[str, int] = field(default_factory=dict)
    joins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A command that the launcher started and that has not ended."""

    launch_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A command's end. ``code`` is None where nobody could tell, 128 + n for signal n."""

    launch_id: str
    code: int | None


class Processes(Protocol):
    """Starts commands in environments, in a process that outlives the daemon."""

    async def launch(self, launch: Launch) -> int:
        """Start it and return its pid once it has been exec'd. Raises LaunchFailed, LauncherUnavailable."""
        ...

    def prepare(self, cgroup: str) -> None:
        """Have a process wait in that group, which is there, to become the next command launched there, sooner.

        Nothing is promised, and nothing is awaited. It goes with the group.
        """
        ...

    async def attach(self, launch: Launch, connection: int) -> int:
        """Hand ``connection`` (a socket of attach.sock, borrowed) over: its peer sends the command's descriptors.

        Returns a descriptor that can be read from when the session has ended. The caller closes it.
        """
        ...

    async def known(self) -> tuple[Sequence[Running], Sequence[Exited]]:
        """What runs, and the ends that were not yet acknowledged. Raises LauncherUnavailable."""
        ...

    def acknowledge(self, launch_id: str) -> None:
        """The end of this launch is stored: the launcher may forget it."""
        ...

    @property
    def exits(self) -> trio.MemoryReceiveChannel[Exited | None]:
        """Ends as they happen; None when the launcher died and a new one knows nothing of what runs."""
        ...


class Cgroups(Protocol):
    """One subtree of cgroup v2; ``path`` is relative to its root, such as ``nd7/main``."""

    async def create(self, path: str) -> None:
        """Make the group and its parents. An existing one is fine."""
        ...

    def require(self, resources: wire.Resources) -> None:
        """Raise LimitUnavailable where this host cannot limit what is to be limited."""
        ...

    def limit(self, path: str, resources: wire.Resources) -> tuple[str, ...]:
        """Limit what lives in a group directly below the root; returns what else its commands must join.

        May be done again. Raises LimitUnavailable, KernelError.
        """
        ...

    def oom_kills(self, path: str) -> int:
        """How many processes of a group directly below the root, whose memory is limited, were ended for lack of it.

        0 where there is no such group. Raises KernelError.
        """
        ...

    async def more_oom_kills(self, path: str, seen: int) -> int:
        """Return once it is more than ``seen``, with how many. Raises KernelError where that cannot be noticed."""
        ...

    def pids(self, path: str) -> list[int]:
        """The processes in the group and below it, lowest first; none where it is not there. Raises KernelError."""
        ...

    def populated(self, path: str) -> bool:
        """Whether any process lives in the group or below it. Raises KernelError."""
        ...

    def signal(self, path: str, signal: int) -> None:
        """Send ``signal`` to each process in the group and below it."""
        ...

    async def empty(self, path: str) -> None:
        """Return when no process lives in the group or below it."""
        ...

    async def exit_code(self, path: str, pid: int) -> int | None:
        """Return when a process of the group has ended, with its code as ``Exited`` has it.

        At once, and None, where it is no process of the group; None where the kernel does not tell codes of processes
        that nobody here started. Raises KernelError.
        """
        ...

    async def remove(self, path: str) -> None:
        """Kill what lives in the group (cgroup.kill), wait for its end, and remove it and what is below it."""
        ...

    def observe(self) -> list[str]:
        """The names of the groups directly below the root."""
        ...


class Probes(Protocol):
    """Looks at servers from the host. The caller bounds the time. Both raise KernelError where the host cannot."""

    async def tcp(self, address: str, port: int) -> str:
        """Connect, and go away again: why it does not accept, empty where it does."""
        ...

    async def http(self, address: str, port: int, path: str) -> str:
        """Ask for ``path``: why it is not answered 2xx or 3xx, empty where it is."""
        ...


@dataclass(frozen=True, slots=True)
class Publication:
    """A published port of one environment."""

    protocol: str
    published: int
    port: int


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket inside an environment."""

    protocol: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the kernel holds of one slot.

    ``pinned``: its namespace is. ``names`` in /run/netns lead to that namespace. ``master``: the interface index of
    what the host's end of its link is a port of (0: of nothing), None where there is no such link. ``is_sound``: that
    link is up, and carries our mark. ``mac``: that end's, which tells an address; empty where nobody knows it.
    """

    pinned: bool = False
    names: frozenset[str] = frozenset()
    master: int | None = None
    is_sound: bool = False
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class Inhabitant:
    """A process in a slot's network namespace. ``name`` is what ps(1) calls it."""

    pid: int
    uid: int
    name: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a thorough look finds. ``stacked``: paths of ours on which more than one mount lies."""

    inhabitants: Mapping[int, Sequence[Inhabitant]]
    stacked: frozenset[str]


class Network(Protocol):
    """Namespaces, links and addresses."""

    def wire(self, slot: Slot, netns: str) -> Awaitable[None]:
        """Make the namespace, pin it as the slot's and under the name ``netns``, and wire it to its bridge.

        It begins at once, and what is returned must be awaited. Raises KernelError or NetnsTaken, with nothing of this
        slot left.
        """
        ...

    async def prepare(self, slot: Slot) -> None:
        """Make and wire the namespace before anybody needs it, pinned as the slot's alone, and furnish it.

        Raises KernelError; something of the slot may be left.
        """
        ...

    async def claim(self, slot: Slot, netns: str) -> None:
        """Give a prepared slot its name: it is as a wired and furnished one then.

        Raises NetnsTaken, and KernelError where something of the slot is missing.
        """
        ...

    async def unname(self, slot: Slot, netns: str) -> None:
        """Take a name back from a slot's namespace; one that is not its name stays. Raises KernelError."""
        ...

    async def tidy(self, slots: Sequence[tuple[Slot, str]]) -> None:
        """Take every name back from these slots' namespaces but the one beside each. Raises KernelError."""
        ...

    async def furnish(self, slot: Slot, publications: Sequence[Publication], bandwidth: int | None = None) -> None:
        """What servers need and creating does not: sysctls, and reaching what listens on loopback only.

        ``bandwidth``: of its link, bits per second each way; None: no limit. May be done again, also with more
        publications, and with a bandwidth. Raises KernelError, and LimitUnavailable where the kernel cannot limit that.
        """
        ...

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        """Remove links, names and pins of (slot, netns) pairs, in bulk; what is gone already is fine.

        ``netns`` is "" where nobody knows the name, and None where there is none.

        A name that is not our namespace's stays. Raises an ExceptionGroup after having tried everything.
        """
        ...

    async def survey(self) -> Mapping[int, Wiring]:
        """What there is of which slot: those of which the kernel holds a pin or a link, by their index."""
        ...

    async def mend(self, slot: Slot, netns: str) -> Sequence[str]:
        """Make a slot whole that lost its pin, its name or its link; returns what was mended.

        What runs in it goes on. It must be furnished again where its link was.

        Raises NetnsLost where nothing leads to its namespace any more, NetnsTaken where its name is somebody else's,
        KernelError.
        """
        ...

    async def mend_bridges(self, bridges: Sequence[Bridge], *, look: bool = False) -> Sequence[str]:
        """Make these bridges and the host's settings for them as they should be; returns what was not.

        ``look``: change nothing. Raises KernelError.
        """
        ...

    async def inspect(self) -> Inspection:
        """Look at what is in all slots, and on what is mounted there. Takes a look at every process of the host."""
        ...

    async def listeners(self, slot: Slot) -> frozenset[Listener]:
        """What listens inside."""
        ...

    def is_taken(self, netns: str) -> bool:
        """Whether a namespace, or anything else, has that name on the host."""
        ...


Reach = Literal["owner", "host", "lan"]


@dataclass(frozen=True, slots=True)
class Opening:
    """What the firewall holds for one environment.

    ``guests``: uids that reach its declared ports. ``reach``: who else does, as in ``wire.Specification.share``.
    """

    address: str
    uid: int
    publications: tuple[Publication, ...]
    guests: tuple[int, ...] = ()
    reach: Reach = "owner"


class Firewall(Protocol):
    """The host's rules: constant, with elements per environment."""

    async def open(self, opening: Opening) -> None:
        """Let the owner reach the environment, and forward its published ports. All or nothing."""
        ...

    async def alter(self, opening: Opening) -> None:
        """Make this what there is for its address, in one step; nothing where that was closed meanwhile.

        Raises KernelError, and it is as before.
        """
        ...

    async def close(self, openings: Sequence[Opening]) -> None:
        """Take the elements back; what is gone already is fine."""
        ...

    async def forget(self, addresses: Sequence[str]) -> None:
        """End what these addresses, from which nothing can come any more, have begun: somebody else may have them next.

        Raises KernelError.
        """
        ...

    async def restore(self, openings: Sequence[Opening]) -> bool:
        """Make table and elements exactly these; returns whether anything had to be changed."""
        ...

    async def check(self) -> bool:
        """Make them what was opened and not closed, at the moment of looking; returns whether they were not."""
        ...

    async def differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        """Compare with what is loaded: elements that are missing of ``openings``, and elements that nobody opened.

        Those of ``moving`` may be there, or not. A missing table counts as one element. Raises KernelError.
        """
        ...

    async def judge(self, judgement: Judgement) -> None:
        """Make this the whole of what environments may and may not, in one step, beside the constant rules.

        Nothing is open in between that is closed before and after. Raises KernelError, with nothing changed.
        """
        ...

    def is_listening(self, protocol: str, port: int) -> bool:
        """Whether a socket of the host has that port already. Raises KernelError."""
        ...


class Store(Protocol):
    """The state file. Synchronous: a commit takes tens of microseconds. All raise StoreError."""

    def transaction(self) -> AbstractContextManager[None]:
        """Everything inside is written, or nothing."""
        ...

    def environments(self) -> list[Environment]:
        """All of them, oldest first."""
        ...

    def add(self, environment: Environment) -> None:
        """Write a new environment with its ports and services."""
        ...

    def rename(self, environment: Environment) -> None:
        """Write an environment's name, netns, labels, stock and time."""
        ...

    def change(self, environment: Environment) -> None:
        """Write an environment's labels, share and egress."""
        ...

    def templates(self) -> list[Template]:
        """All of them, oldest first."""
        ...

    def add_template(self, template: Template) -> None:
        """Write a new template."""
        ...

    def delete_template(self, template_id: str) -> None:
        """Forget a template."""
        ...

    def tokens(self) -> list[Token]:
        """All of them, oldest first."""
        ...

    def add_token(self, token: Token) -> None:
        """Write a new one."""
        ...

    def delete_token(self, token_id: str) -> None:
        """Forget it, and those that were made with it."""
        ...

    def policies(self) -> list[Policy]:
        """All of them, as they can be: see ``core.recorded``."""
        ...

    def set_policy(self, policy: Policy) -> None:
        """Write a policy, in place of its user's of the same name."""
        ...

    def delete_policy(self, uid: int, name: str) -> None:
        """Forget a policy."""
        ...

    def quotas(self) -> list[Quota]:
        """All of them."""
        ...

    def set_quota(self, quota: Quota) -> None:
        """Write a user's quota, in place of the one before."""
        ...

    def delete_quota(self, uid: int) -> None:
        """Forget a user's quota; none is fine."""
        ...

    def ids(self) -> frozenset[str]:
        """Of all environments."""
        ...

    def set_state(self, environment_id: str, state: str) -> None:
        """Write an environment's stored state."""
        ...

    def set_command(self, environment_id: str, service: Service) -> None:
        """Write what a service runs, and as what."""
        ...

    def set_boot(self, environment_id: str, boot_id: str) -> None:
        """Write in which run of the kernel an environment was made."""
        ...

    def set_service(self, environment_id: str, service: Service) -> None:
        """Write what changes of a service: state, pid, launch, exit code, restarts, health."""
        ...

    def delete(self, environment_id: str) -> None:
        """Forget an environment, its ports and its services."""
        ...


class Files(Protocol):
    """The files that belong to an environment: hosts, resolv.conf, logs."""

    def furnish(self, environment: Environment) -> tuple[str, str | None]:
        """Write hosts and resolv.conf; returns their paths (None: the host has no resolv.conf)."""
        ...

    def open_log(self, environment: Environment, service: str) -> int:
        """Open a service's log for append; the environment's user may open it too. The caller closes it."""
        ...

    def log_path(self, environment_id: str, service: str) -> str:
        """Where that log is."""
        ...

    def remove(self, environment_id: str) -> None:
        """Remove all of them; what is gone already is fine."""
        ...

    def observe(self) -> set[str]:
        """The ids of environments that have any."""
        ...


class Clock(Protocol):
    """Time, so that tests can say what it is."""

    def now(self) -> str:
        """The time in UTC, RFC 3339 with microseconds."""
        ...


@dataclass(frozen=True, slots=True)
class Adapters:
    """What core works with."""

    network: Network
    firewall: Firewall
    processes: Processes
    cgroups: Cgroups
    store: Store
    files: Files
    clock: Clock
    probes: Probes


class Emit(Protocol):
    """Tells what happened; ``uid`` is the environment's owner's."""

    def __call__(self, kind: str, uid: int, environment: str, name: str, **details: Any) -> None: ...
