"""Namespaces, links and addresses: implements ``core.interfaces.Network``.

A namespace is pinned twice. The pin under the runtime directory, named after the slot, says that it is ours; the pin
in /run/netns makes it an ordinary named namespace. A name whose inode is not that of the slot's pin is somebody
else's, whatever our records say, and is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from netnsd.core.addressing import INSIDE_IFINDEX, Bridge, Slot
from netnsd.core.interfaces import Inspection, Listener, Publication, Wiring
from netnsd.errors import KernelError, NetnsLost, NetnsTaken
from netnsd.kernel import bandwidth as bandwidths
from netnsd.kernel import bridges, carrier, inhabitants, inner, libc, namespace_thread, rtnetlink, sockets, survey
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.seats import Seats

NETNS_DIRECTORY = Path("/run/netns")
REMOVALS_AT_ONCE = 2
_GONE = frozenset({errno.ENODEV, errno.ENOENT, errno.ESRCH})

T = TypeVar("T")


class KernelNetwork:
    """The kernel's side of slots.

    Args:
        thread: does everything; shared with the firewall.
        runtime: the daemon's runtime directory; pins of slots are kept below it.
        mtu_bytes: of bridges and links.
        seats: shared with the firewall.
    """

    def __init__(self, thread: NamespaceThread, runtime: Path, mtu_bytes: int, seats: Seats) -> None:
        self._thread = thread
        self._pins = runtime / "slots"
        self._bridges = bridges.Bridges(mtu_bytes, seats)
        self._route: rtnetlink.RouteSocket | None = None
        self._has_ipv6 = os.path.exists("/proc/sys/net/ipv6")
        # A deletion waits 10 ms and more at its end for grace periods of RCU, in which the next can begin.
        self._removals = trio.CapacityLimiter(REMOVALS_AT_ONCE)

    @property
    def pins(self) -> Path:
        """The directory of the slots' pins. Mount namespaces of servers must not hold copies of them."""
        return self._pins

    async def open(self) -> None:
        """Make the directories into mounts of their own, as ip-netns(8) does, and read what there is."""
        await self._thread.run(self._open, Priority.CREATE)

    async def close(self, *, remove: bool) -> None:
        """Close sockets; with ``remove`` take bridges and mounts away (no environment is left)."""
        await self._thread.run(lambda: self._close(remove=remove), Priority.CREATE)

    def wire(self, slot: Slot, netns: str) -> Awaitable[None]:
        """See ``core.interfaces.Network``."""
        return self._thread.start(lambda: self._wire(slot, netns), Priority.CREATE)

    async def prepare(self, slot: Slot) -> None:
        """See ``core.interfaces.Network``."""
        await self._thread.run(lambda: self._wire(slot, None), Priority.FURNISH)
        await self.furnish(slot, ())

    async def claim(self, slot: Slot, netns: str) -> None:
        """See ``core.interfaces.Network``. In the caller's thread: no namespace is entered, and a hop costs more."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._claim(slot, netns)

    async def unname(self, slot: Slot, netns: str) -> None:
        """See ``core.interfaces.Network``."""
        await self._thread.run(lambda: self._unname_all([(slot.index, netns)]), Priority.FURNISH)

    async def tidy(self, slots: Sequence[tuple[Slot, str]]) -> None:
        """See ``core.interfaces.Network``."""
        await self._thread.run(lambda: self._tidy({slot.index: netns for slot, netns in slots}), Priority.CHECK)

    async def furnish(self, slot: Slot, publications: Sequence[Publication], bandwidth: int | None = None) -> None:
        """See ``core.interfaces.Network``."""
        def furnish() -> None:
            inner.furnish(slot.bridge.address, publications)
            if bandwidth is not None:
                bandwidths.bound(INSIDE_IFINDEX, bandwidth)
                namespace_thread.leave(self._thread.host_fd)
                bandwidths.bound(slot.port_ifindex, bandwidth)

        await self._in_slot("furnish", slot, furnish, Priority.FURNISH)

    async def listeners(self, slot: Slot) -> frozenset[Listener]:
        """See ``core.interfaces.Network``."""
        return await self._in_slot("listeners", slot, sockets.listeners, Priority.CHECK)

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        """See ``core.interfaces.Network``. Beside the thread: no namespace is entered, and creations go on."""
        await trio.to_thread.run_sync(self._unwire, slots, limiter=self._removals)

    async def survey(self) -> Mapping[int, Wiring]:
        """See ``core.interfaces.Network``. Beside the thread: no namespace is entered."""
        return await trio.to_thread.run_sync(_translated("survey", lambda: survey.take(self._pins, NETNS_DIRECTORY)))

    async def inspect(self) -> Inspection:
        """See ``core.interfaces.Network``. Beside the thread, too."""
        return await trio.to_thread.run_sync(
            _translated("inspect", lambda: survey.inspect(self._pins, NETNS_DIRECTORY)))

    async def mend(self, slot: Slot, netns: str) -> Sequence[str]:
        """See ``core.interfaces.Network``."""
        return await self._thread.run(_translated("mend", lambda: self._mend(slot, netns)), Priority.FURNISH)

    async def mend_bridges(self, needed: Sequence[Bridge], *, look: bool = False) -> Sequence[str]:
        """See ``core.interfaces.Network``."""
        def mend() -> list[str]:
            if not look and not (self._pins.exists() and NETNS_DIRECTORY.exists()):
                self._make_directories()
            return self._bridges.mend(needed, look=look)

        return await self._thread.run(_translated("bridge", mend), Priority.CHECK)

    def is_taken(self, netns: str) -> bool:
        """See ``core.interfaces.Network``."""
        return os.path.lexists(NETNS_DIRECTORY / netns)

    async def _in_slot(self, stage: str, slot: Slot, job: Callable[[], T], priority: Priority) -> T:
        def call() -> T:
            namespace_thread.enter(self._pin(slot.index))
            return job()

        return await self._thread.run(_translated(stage, call), priority)

    def _pin(self, index: int) -> str:
        return f"{self._pins}/{index}"

    def _open(self) -> None:
        try:
            self._make_directories()
            # No row tells of a name that somebody was about to give to what has another.
            for name in os.listdir(NETNS_DIRECTORY):
                status = survey.inode(f"{NETNS_DIRECTORY}/{name}")
                if status is not None and namespace_thread.is_half_made(status):
                    namespace_thread.unpin(f"{NETNS_DIRECTORY}/{name}")
            self._route = rtnetlink.RouteSocket()
        except OSError as error:
            raise KernelError.at("open", error) from error
        self._bridges.load()

    def _make_directories(self) -> None:
        for directory in (NETNS_DIRECTORY, self._pins):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _make_mount(NETNS_DIRECTORY, libc.MS_SHARED)
        _make_mount(self._pins, libc.MS_PRIVATE)

    def _close(self, *, remove: bool) -> None:
        if self._route is not None:
            self._route.close()
            self._route = None
        if remove:
            self._bridges.remove()
            libc.umount2(str(self._pins), libc.MNT_DETACH)
            self._pins.rmdir()

    def _wire(self, slot: Slot, netns: str | None) -> None:
        """Make everything of a slot; its name comes last, so that what has its name is whole."""
        stage = "bridge"
        try:
            with ExitStack() as undo:
                self._bridges.ensure(slot.bridge)
                stage = "namespace"
                namespace_thread.enter_new()
                own = namespace_thread.open_own()
                undo.callback(os.close, own)
                stage = "pin"
                namespace_thread.unpin(self._pin(slot.index))  # one that is there is ours, of a slot that is free
                namespace_thread.pin(self._pin(slot.index))
                undo.callback(namespace_thread.unpin, self._pin(slot.index))
                stage = "link"
                undo.callback(self._unlink_from_host, slot)
                self._link(slot, own)
                if netns is not None:
                    stage = "name"
                    self._name(slot.index, netns)
                undo.pop_all()
                os.close(own)
        except OSError as error:
            raise KernelError.at(getattr(error, "stage", stage), error) from error

    def _claim(self, slot: Slot, netns: str) -> None:
        try:
            socket.if_nametoindex(slot.port_name)
            self._name(slot.index, netns)
        except OSError as error:
            raise KernelError.at("claim", error) from error

    def _name(self, index: int, netns: str) -> None:
        try:
            namespace_thread.bind(self._pin(index), f"{NETNS_DIRECTORY}/{netns}")
        except FileExistsError as error:
            raise NetnsTaken(f"the namespace {netns!r} was made by somebody else meanwhile",
                             hint="Choose another name.", netns=netns) from error

    def _unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        errors: list[Exception] = []

        def attempt(stage: str, action: Callable[[], None]) -> None:
            try:
                action()
            except OSError as error:
                errors.append(KernelError.at(getattr(error, "stage", stage), error))

        # The host's ends first, explicitly: a namespace that sockets with unsent data pin keeps its own for seconds.
        attempt("link", lambda: self._unlink([slot for slot, _ in slots]))
        # Processes that left their cgroup, or that root put there, would keep the namespace alive.
        attempt("inhabitants", lambda: inhabitants.kill({
            namespace for slot, _ in slots if (namespace := survey.namespace_at(self._pin(slot.index))) is not None}))
        for slot, netns in slots:
            attempt("unpin", partial(self._unpin, slot.index, netns))
        if errors:
            raise ExceptionGroup("unwire", errors)

    def _unpin(self, index: int, netns: str | None) -> None:
        """Remove a slot's name, and then its pin: without that nobody would know any more that the name is ours."""
        name = netns if netns != "" else self._name_of(index)
        if name is not None:
            self._unname(index, f"{NETNS_DIRECTORY}/{name}")
        namespace_thread.unpin(self._pin(index))

    def _unlink_from_host(self, slot: Slot) -> None:
        namespace_thread.leave(self._thread.host_fd)
        self._unlink([slot])

    def _name_of(self, index: int) -> str | None:
        """The name in /run/netns of a slot that no record tells of."""
        ours = survey.namespace_at(self._pin(index))
        if ours is None:
            return None
        return next((name for name in os.listdir(NETNS_DIRECTORY)
                     if survey.namespace_at(f"{NETNS_DIRECTORY}/{name}") == ours), None)

    @staticmethod
    def _unlink(slots: list[Slot]) -> None:
        if slots:
            with contextlib.closing(rtnetlink.RouteSocket()) as route:
                route.transact(rtnetlink.doom_batch(slots), ignore=_GONE)
                # Whoever else has doomed links at the same time finds them gone when his turn comes.
                route.transact(rtnetlink.delete_doomed_batch(), ignore=_GONE)

    def _unname_all(self, names: Iterable[tuple[int, str]]) -> None:
        try:
            for index, name in names:
                self._unname(index, f"{NETNS_DIRECTORY}/{name}")
        except OSError as error:
            raise KernelError.at("unpin", error) from error

    def _tidy(self, kept: dict[int, str]) -> None:
        owners = {namespace: index for index in kept
                  if (namespace := survey.namespace_at(self._pin(index))) is not None}
        found = [(name, survey.namespace_at(f"{NETNS_DIRECTORY}/{name}"))
                 for name in os.listdir(NETNS_DIRECTORY)] if owners else []
        self._unname_all((owners[namespace], name) for name, namespace in found
                         if namespace in owners and kept[owners[namespace]] != name)

    def _unname(self, index: int, name: str) -> None:
        """Remove the name in /run/netns where it is ours: same namespace as the slot's pin, or left half-made.

        Others may have mounted on it: ours goes from below theirs, and from above. Theirs has the name afterwards.
        """
        inode = survey.namespace_at(self._pin(index))
        named = survey.inode(name)
        if named is not None and survey.is_namespace(named) and named.st_ino != inode and not _is_below(inode, name):
            return
        with ExitStack() as kept:
            theirs: int | None = None
            while (named := survey.inode(name)) is not None and survey.is_namespace(named):
                if named.st_ino != inode and theirs is None:
                    # Held while it has no name.
                    theirs = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                    kept.callback(os.close, theirs)
                libc.umount2(name, libc.MNT_DETACH)
            if named is None or named.st_size:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            if theirs is not None:
                namespace_thread.bind(f"/proc/self/fd/{theirs}", name)

    def _mend(self, slot: Slot, netns: str) -> list[str]:
        assert self._route is not None
        mended = []
        pin, name = self._pin(slot.index), f"{NETNS_DIRECTORY}/{netns}"
        if survey.namespace_at(pin) is None:
            # A name may be anybody's: what tells our namespace is the slot's own link in it.
            if survey.namespace_at(name) is None or not self._has_end_of(slot, name):
                raise NetnsLost(f"nothing leads to the namespace {netns!r} any more", hint="Create it again.")
            namespace_thread.unpin(pin)
            namespace_thread.bind(name, pin)
            mended.append("pin")
        if (named := survey.namespace_at(name)) != survey.namespace_at(pin):
            if named is None:
                self._unname(slot.index, name)  # half of one, of ours
            self._name(slot.index, netns)
            mended.append("name")
        link = next((port for port in self._route.ports() if port.index == slot.port_ifindex), None)
        if link is None:
            self._link_again(slot)
            mended.append("link")
        elif not (link.is_up and link.master == slot.bridge.ifindex and link.alias == rtnetlink.LINK_ALIAS
                  and (link.group, link.mac) == (rtnetlink.LINK_GROUP, slot.port_mac)):
            self._bridges.ensure(slot.bridge)
            self._route.transact(rtnetlink.rejoin_batch(slot, has_ipv6=self._has_ipv6))
            mended.append("link")
        return mended

    def _link_again(self, slot: Slot) -> None:
        """Wire a namespace again that has lost its link, and with it address and route."""
        self._bridges.ensure(slot.bridge)
        namespace_thread.enter(self._pin(slot.index))
        with ExitStack() as undo:
            own = namespace_thread.open_own()
            try:
                undo.callback(self._unlink_from_host, slot)
                self._link(slot, own)
                undo.pop_all()
            finally:
                os.close(own)

    def _link(self, slot: Slot, own: int) -> None:
        """From inside a namespace, of which ``own`` is a descriptor: wire it, and be back in the host's."""
        assert self._route is not None
        self._route.transact(rtnetlink.host_batch(slot, own, has_ipv6=self._has_ipv6))
        inside = rtnetlink.RouteSocket()
        try:
            inside.transact(rtnetlink.inside_batch(slot, has_ipv6=self._has_ipv6))
        finally:
            inside.close()
        namespace_thread.leave(self._thread.host_fd)
        carrier.await_running(slot.bridge.name, slot.port_name)

    def _has_end_of(self, slot: Slot, path: str) -> bool:
        """Whether the namespace at ``path`` has the inner end of the slot's link."""
        namespace_thread.enter(path)
        try:
            with contextlib.closing(rtnetlink.RouteSocket()) as route:
                return any(port.index == INSIDE_IFINDEX and port.mac == slot.mac for port in route.ports())
        finally:
            namespace_thread.leave(self._thread.host_fd)


def _translated(stage: str, job: Callable[[], T]) -> Callable[[], T]:
    """``job``, whose OSError is a KernelError of that stage."""
    def call() -> T:
        try:
            return job()
        except OSError as error:
            raise KernelError.at(getattr(error, "stage", stage), error) from error

    return call


def _is_below(inode: int | None, path: str) -> bool:
    """Whether that namespace is among all that is mounted on ``path``, of which one sees the uppermost alone."""
    if inode is None:
        return False
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _id, _parent, _device, root, point, *_ = line.split()
        if root == f"net:[{inode}]" and point == path:
            return True
    return False


def _make_mount(directory: Path, propagation: int) -> None:
    """Make ``directory`` a mount of its own with that propagation, unless it is one already."""
    try:
        libc.mount(None, str(directory), None, propagation | libc.MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        libc.mount(str(directory), str(directory), None, libc.MS_BIND | libc.MS_REC)
        # Private first: a directory bound on itself stays in its parent's peer group, and every pin would appear
        # twice, once underneath.
        libc.mount(None, str(directory), None, libc.MS_PRIVATE | libc.MS_REC)
        libc.mount(None, str(directory), None, propagation | libc.MS_REC)


