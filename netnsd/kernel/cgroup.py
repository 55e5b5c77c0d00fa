"""The subtree of cgroup v2 that holds environments: the truth about what lives in them.

A server that daemonises itself has another pid and parent, but is in its cgroup still. ``cgroup.events`` says when a
group and all below it is empty; the kernel sends such news at most every 10 ms per group (kernel/cgroup/cgroup.c).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal as signals
import struct
from collections.abc import Awaitable, Callable, Iterator

import trio

from netnsd import wire
from netnsd.errors import HostUnfit, KernelError
from netnsd.kernel import exit_info, libc, limits, shortage
from netnsd.kernel.limits import Limits

REMOVE_SECONDS = 10.0
_BUSY_SECONDS = 0.002
_EVENT = struct.Struct("iIII")  # inotify(7): watch, mask, cookie, length of the name that follows
# A group that is gone, or goes while it is read.
_GONE = (errno.ENOENT, errno.ENODEV)


def find_cgroup2() -> str:
    """Where cgroup v2 is mounted. Raises HostUnfit where it is not."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] == "cgroup2":
                return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split(" ")[4])
    raise HostUnfit("cgroup v2 is not mounted", hint="mount -t cgroup2 none /sys/fs/cgroup/unified")


class CgroupTree:
    """Implements ``core.interfaces.Cgroups`` for one group below a cgroup2 mount, and all below that.

    ``run`` must run for ``empty`` and ``remove`` to return. ``close`` gives the inotify descriptor back.

    Args:
        name: the group that is ours, relative to the mount; may have several parts.
        mount: the mount; found by itself where it is None.
    """

    def __init__(self, name: str, mount: str | None = None) -> None:
        mount = mount or find_cgroup2()
        self.root = os.path.join(mount, name)
        self._limits = Limits(self.root, mount)
        self._inotify = libc.inotify_init1(libc.IN_NONBLOCK | libc.IN_CLOEXEC)
        self._waiting: dict[int, set[trio.Event]] = {}
        self._watched: dict[int, str] = {}

    def close(self) -> None:
        """Nothing waits any more."""
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def remove_root(self) -> None:
        """Remove the root itself; it stays where anything is in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self.root)
        self._limits.remove_root()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read the kernel's news until cancelled."""
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self._inotify)
            with contextlib.suppress(OSError):  # what could not be read now is read the next time
                self._wake(os.read(self._inotify, 65536))

    def _wake(self, news: bytes) -> None:
        offset = 0
        while offset < len(news):
            watch, mask, _cookie, length = _EVENT.unpack_from(news, offset)
            offset += _EVENT.size + length
            overflow = mask & libc.IN_Q_OVERFLOW  # news was lost: everyone looks again
            for waiting in list(self._waiting.values()) if overflow else [self._waiting.get(watch, set())]:
                for event in waiting:
                    event.set()

    def _wake_removed(self, directory: str) -> None:
        """The kernel's news of a last end is lost with the file, if that goes before the news is out."""
        for watch, watched in self._watched.items():
            if watched == directory or watched.startswith(directory + "/"):
                for event in self._waiting[watch]:
                    event.set()

    def path(self, path: str) -> str:
        """The directory of a group. Raises ValueError for one that is not below the root."""
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"not below the root: {path!r}")
        return os.path.join(self.root, path) if path else self.root

    async def create(self, path: str) -> None:
        """Make the group and its parents. An existing one is fine. Raises KernelError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        directory = self.path(path)
        try:
            try:
                os.mkdir(directory)  # the kernel's, and in memory
            except FileExistsError:
                pass
            except FileNotFoundError:
                os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise KernelError.at("cgroup", error) from error

    def require(self, resources: wire.Resources) -> None:
        """See ``core.interfaces.Cgroups``."""
        if wanted := limits.asked(resources):
            self._limits.require(wanted)

    def limit(self, path: str, resources: wire.Resources) -> tuple[str, ...]:
        """See ``core.interfaces.Cgroups``."""
        wanted = limits.asked(resources)
        return self._limits.apply(path, wanted) if wanted else ()

    def has_limits(self) -> dict[str, bool]:
        """Which limits this host can hold, by their names in Resources. Changes nothing."""
        return self._limits.has()

    def oom_kills(self, path: str) -> int:
        """See ``core.interfaces.Cgroups``."""
        directory, is_old = self._limits.memory_group(path)
        try:
            return shortage.count(directory, is_old=is_old)
        except OSError as error:
            raise KernelError.at("cgroup", error) from error

    async def more_oom_kills(self, path: str, seen: int) -> int:
        """See ``core.interfaces.Cgroups``."""
        await trio.lowlevel.checkpoint()
        directory, is_old = self._limits.memory_group(path)
        try:
            if is_old:
                return await shortage.more_in_v1(directory, seen)
            with self._news(directory, shortage.NEW_FILE) as news:
                while (found := shortage.count(directory, is_old=False)) <= seen:
                    await news()
                return found
        except OSError as error:
            raise KernelError.at("cgroup", error) from error

    def pids(self, path: str) -> list[int]:
        """The processes in the group and below it, lowest first; empty where there is no such group."""
        found: set[int] = set()
        try:
            for directory in _groups(self.path(path)):
                found.update(_members(directory))
        except OSError as error:
            raise KernelError.at("cgroup", error) from error
        return sorted(found)

    def populated(self, path: str) -> bool:
        """Whether any process lives in the group or below it."""
        try:
            return _populated(self.path(path))
        except OSError as error:
            raise KernelError.at("cgroup", error) from error

    def signal(self, path: str, signal: int) -> None:
        """Send ``signal`` to each process in the group and below it. Raises KernelError."""
        try:
            for directory in _groups(self.path(path)):
                _signal(directory, signal)
        except OSError as error:
            raise KernelError.at("signal", error) from error

    async def empty(self, path: str) -> None:
        """Return when no process lives in the group or below it; at once where there is no such group."""
        await trio.lowlevel.checkpoint()
        try:
            with self._news(self.path(path), "cgroup.events") as news:
                while self.populated(path):
                    await news()
        except OSError as error:
            if error.errno not in _GONE:
                raise KernelError.at("cgroup", error) from error

    @contextlib.contextmanager
    def _news(self, directory: str, file: str) -> Iterator[Callable[[], Awaitable[None]]]:
        """What can be awaited returns when a file of a group has changed since the last time. Raises OSError."""
        watch = libc.inotify_add_watch(self._inotify, os.path.join(directory, file), libc.IN_MODIFY)
        waiting = self._waiting.setdefault(watch, set())
        event = trio.Event()
        waiting.add(event)
        self._watched[watch] = directory

        async def news() -> None:
            nonlocal event
            await event.wait()
            waiting.discard(event)
            event = trio.Event()
            waiting.add(event)

        try:
            yield news
        finally:
            waiting.discard(event)
            # Another waiter of the same group has the same watch.
            if not waiting and self._waiting.get(watch) is waiting:
                del self._waiting[watch], self._watched[watch]
                with contextlib.suppress(OSError):  # the group is gone, and the watch with it
                    libc.inotify_rm_watch(self._inotify, watch)

    async def exit_code(self, path: str, pid: int) -> int | None:
        """See ``core.interfaces.Cgroups``."""
        await trio.lowlevel.checkpoint()
        return await exit_info.of(pid, lambda: pid in self.pids(path))

    async def remove(self, path: str) -> None:
        """Kill what lives in the group, wait for its end, and remove it and what is below it.

        Raises KernelError when that takes longer than ``REMOVE_SECONDS`` (a process in uninterruptible sleep).
        """
        await self._remove(path)
        if "/" not in path and path:
            await self._limits.remove(path)

    async def _remove(self, path: str) -> None:
        directory = self.path(path)
        if not os.path.isdir(directory):  # noqa: ASYNC240  # the kernel's, and in memory
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        last: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), directory)
        with trio.move_on_after(REMOVE_SECONDS):
            try:
                _write(os.path.join(directory, "cgroup.kill"), b"1")
                await self.empty(path)
                while (busy := _remove_tree(directory)) is not None:
                    last = busy
                    await trio.sleep(_BUSY_SECONDS)
                self._wake_removed(directory)
            except OSError as error:
                raise KernelError.at("cgroup", error) from error
            return
        raise KernelError.at("cgroup", last)

    def observe(self) -> list[str]:
        """The names of the groups directly below the root. Raises KernelError."""
        try:
            found = self._limits.observe()
            with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
                found += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise KernelError.at("cgroup", error) from error
        return sorted(set(found))


def _signal(directory: str, signal: int) -> None:
    handles: dict[int, int] = {}
    try:
        for pid in _members(directory):
            with contextlib.suppress(OSError):
                handles[pid] = os.pidfd_open(pid)
        # A pid that is still listed is, by its handle, a process of this group, and not one that got the number of a
        # process that ended in between.
        for pid in _members(directory):
            if pid in handles:
                with contextlib.suppress(ProcessLookupError):
                    signals.pidfd_send_signal(handles[pid], signal)
    finally:
        for handle in handles.values():
            os.close(handle)


def _groups(directory: str) -> Iterator[str]:
    """The group and all below it, leaves last."""
    yield directory
    try:
        with os.scandir(directory) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for path in below:
        yield from _groups(path)


def _members(directory: str) -> list[int]:
    return [int(pid) for pid in _read(os.path.join(directory, "cgroup.procs")).split()]


def _populated(directory: str) -> bool:
    return b"populated 1" in _read(os.path.join(directory, "cgroup.events"))


def _remove_tree(directory: str) -> OSError | None:
    """Remove leaves first; the error where a group is busy: it got a process, or a dead one is not yet forgotten."""
    for path in reversed(list(_groups(directory))):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            with contextlib.suppress(OSError):
                _write(os.path.join(path, "cgroup.kill"), b"1")
            return error
    return None


def _read(path: str) -> bytes:
    """A file of a cgroup; empty where the group is gone, or is a threaded one and lists no processes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    parts = []
    try:
        while part := os.read(fd, 65536):
            parts.append(part)
    except OSError as error:
        if error.errno not in (*_GONE, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
    return b"".join(parts)


def _write(path: str, value: bytes) -> None:
    """Write to a file of a cgroup; nothing where the group is gone. Buffered files report errors at close only."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.write(fd, value)
    except OSError as error:
        if error.errno not in _GONE:
            raise
    finally:
        os.close(fd)
