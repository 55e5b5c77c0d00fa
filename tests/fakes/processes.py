"""Cgroups and processes that are numbers in sets."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import trio
import trio.testing

from netnsd import wire
from netnsd.core.interfaces import Cgroups, Exited, Launch, Processes, Running
from netnsd.errors import LaunchFailed, LimitUnavailable

SIGKILL = 9


class FakeCgroups:
    """Implements ``core.interfaces.Cgroups``. ``killed`` is told of each pid that was killed, ``signalled`` keeps.

    ``codes``: what the kernel tells of processes, by pid; nothing of others. ``lacking``: limits that it cannot hold.
    """

    def __init__(self) -> None:
        self.groups: dict[str, set[int]] = {}
        self.signalled: list[tuple[int, int]] = []
        self.killed: Callable[[int], None] = lambda _pid: None
        self.on_signal: Callable[[int, int], None] = lambda _pid, _signal: None
        self._changed = trio.Event()
        self.codes: dict[int, int] = {}
        self.lacking: set[str] = set()
        self.limited: dict[str, wire.Resources] = {}
        self.short: dict[str, int] = {}

    async def create(self, path: str) -> None:
        await trio.lowlevel.checkpoint()
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            self.groups.setdefault("/".join(parts[:end]), set())

    def require(self, resources: wire.Resources) -> None:
        for name in ("memory", "cpu", "pids"):
            if getattr(resources, name) is not None and name in self.lacking:
                raise LimitUnavailable(f"this host cannot limit {name}", limit=name)

    def limit(self, path: str, resources: wire.Resources) -> tuple[str, ...]:
        self.require(resources)
        if resources == wire.Resources(bandwidth=resources.bandwidth):
            return ()
        self.limited[path] = resources
        return (f"/fake/limits/{path}",)

    def oom_kills(self, path: str) -> int:
        return self.short.get(path, 0)

    async def more_oom_kills(self, path: str, seen: int) -> int:
        await trio.lowlevel.checkpoint()
        while self.oom_kills(path) <= seen:
            await self._changed.wait()
        return self.oom_kills(path)

    def oom_kill(self, path: str, count: int = 1) -> None:
        """Be a kernel that ends so many processes of a group for lack of memory."""
        self.short[path] = self.oom_kills(path) + count
        self._pulse()

    def pids(self, path: str) -> list[int]:
        return sorted(pid for group in self._below(path) for pid in self.groups[group])

    def populated(self, path: str) -> bool:
        return bool(self.pids(path))

    def signal(self, path: str, signal: int) -> None:
        for pid in self.pids(path):
            self.signalled.append((pid, signal))
            self.on_signal(pid, signal)

    async def empty(self, path: str) -> None:
        await trio.lowlevel.checkpoint()
        while self.populated(path):
            await self._changed.wait()

    async def exit_code(self, path: str, pid: int) -> int | None:
        await trio.lowlevel.checkpoint()
        if pid not in self.pids(path):
            return None
        while pid in self.pids(path):
            await self._changed.wait()
        return self.codes.get(pid)

    async def remove(self, path: str) -> None:
        await trio.lowlevel.checkpoint()
        pids = self.pids(path)
        for group in list(self._below(path)):
            del self.groups[group]
        self.limited.pop(path, None)
        self.short.pop(path, None)
        self._pulse()
        for pid in pids:
            self.killed(pid)

    def observe(self) -> list[str]:
        return sorted(path for path in self.groups if "/" not in path)

    def join(self, path: str, pid: int) -> None:
        """Be a process that starts there."""
        self.groups[path].add(pid)

    def leave(self, pid: int) -> None:
        """Be a process that ended."""
        for members in self.groups.values():
            members.discard(pid)
        self._pulse()

    def _below(self, path: str) -> Iterator[str]:
        return (group for group in self.groups if group == path or group.startswith(f"{path}/") or not path)

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class FakeProcesses:
    """Implements ``core.interfaces.Processes``.

    A command ``missing`` cannot be started; ``brief`` has ended with 7 before its start is answered; all others run
    until ``end``, or a kill of their cgroup.
    """

    def __init__(self, cgroups: FakeCgroups) -> None:
        self.prepared: list[str] = []
        self._cgroups = cgroups
        cgroups.killed = self._on_kill
        self._pids = itertools.count(1000)
        self.launches: list[Launch] = []
        self.attached: list[tuple[Launch, int]] = []
        self.running: dict[str, int] = {}
        self.ended: dict[str, int | None] = {}
        self.acknowledged: list[str] = []
        self._tell, self._exits = trio.open_memory_channel[Exited | None](math.inf)

    async def launch(self, launch: Launch) -> int:
        await trio.lowlevel.checkpoint()
        assert launch.log_fd is not None
        os.fstat(launch.log_fd)
        if launch.cgroup not in self._cgroups.groups:
            raise LaunchFailed("no such cgroup", stage="cgroup", errno="ENOENT")
        if launch.argv[0] == "missing":
            raise LaunchFailed("missing: No such file or directory", stage="exec", errno="ENOENT")
        self.launches.append(launch)
        pid = next(self._pids)
        self.running[launch.launch_id] = pid
        self._cgroups.join(launch.cgroup, pid)
        if launch.argv[0] == "brief":
            self.end(launch.launch_id, 7)
            await trio.testing.wait_all_tasks_blocked()
        return pid

    def prepare(self, cgroup: str) -> None:
        self.prepared.append(cgroup)

    async def attach(self, launch: Launch, connection: int) -> int:
        await trio.lowlevel.checkpoint()
        self.attached.append((launch, connection))
        reading, writing = os.pipe()
        os.close(writing)
        return reading  # of a session that has ended

    async def known(self) -> tuple[Sequence[Running], Sequence[Exited]]:
        await trio.lowlevel.checkpoint()
        return ([Running(*item) for item in self.running.items()], [Exited(*item) for item in self.ended.items()])

    def acknowledge(self, launch_id: str) -> None:
        self.acknowledged.append(launch_id)
        self.ended.pop(launch_id, None)

    @property
    def exits(self) -> trio.MemoryReceiveChannel[Exited | None]:
        return self._exits

    def end(self, launch_id: str, code: int | None, *, leaving: Sequence[int] = ()) -> None:
        """The first process of a launch ends; ``leaving`` are pids that it left in its cgroup."""
        pid = self.running.pop(launch_id)
        for child in leaving:
            self._cgroups.join(next(g for g, members in self._cgroups.groups.items() if pid in members), child)
        self._cgroups.leave(pid)
        self.ended[launch_id] = code
        self._tell.send_nowait(Exited(launch_id, code))

    def tell(self, exited: Exited | None) -> None:
        """Report something, whether it is so or not."""
        self._tell.send_nowait(exited)

    def lose_launcher(self) -> None:
        """The launcher dies; what it started goes on."""
        self.running.clear()
        self.ended.clear()
        self._tell.send_nowait(None)

    def restart_daemon(self) -> None:
        """Another run of the daemon listens from here on."""
        self._tell, self._exits = trio.open_memory_channel[Exited | None](math.inf)

    def _on_kill(self, pid: int) -> None:
        for launch_id, running in list(self.running.items()):
            if running == pid:
                self.end(launch_id, 128 + SIGKILL)


_: type[Cgroups] = FakeCgroups
__: type[Processes] = FakeProcesses
