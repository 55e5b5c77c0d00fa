"""The one thread that enters network namespaces.

trio's pooled threads must never change namespace: a thread that has moved and is reused is a silent wrong-namespace
bug. So one thread of our own does all of it, one job after another, and is back in the host's namespace after each:
while it stood in a namespace, that namespace could not be deleted. One that cannot go back, for lack of memory, is
replaced by another.
"""

from __future__ import annotations

import enum
import errno
import heapq
import itertools
import os
import queue
import stat
import threading
from collections.abc import Awaitable, Callable
from typing import Self, TypeVar

import trio

from netnsd.errors import ShuttingDown
from netnsd.kernel import libc

T = TypeVar("T")
_Job = Callable[[], None]

_SELF_NETNS = "/proc/thread-self/ns/net"
_MOST_STACKED = 1000
# Of a file that waits for its namespace: ip-netns(8) and others give no such mode. The mount hides it.
_HALF_MADE = stat.S_IFREG | stat.S_ISVTX | 0o444


class Priority(enum.IntEnum):
    """What goes first: rules that were taken away keep users apart; somebody waits for a create, nobody for a check."""

    RULES = -1
    CREATE = 0
    FURNISH = 1
    CHECK = 2
    STOP = 3


class NamespaceThread:
    """Runs jobs in its thread. Use it as a context manager: leaving it ends the thread after what is queued."""

    def __init__(self) -> None:
        # queue.PriorityQueue is Python and takes two locks per job; a push onto a heap is one step of the interpreter.
        self._jobs: list[tuple[int, int, _Job | None]] = []
        self._more: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._order = itertools.count()
        self._host_fd = os.open(_SELF_NETNS, os.O_RDONLY | os.O_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._is_lost = False
        self._closed = False

    @property
    def host_fd(self) -> int:
        """A descriptor of the host's network namespace; the thread's own."""
        return self._host_fd

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._put(Priority.STOP, None)
        if self._thread is not None:
            self._thread.join()
        os.close(self._host_fd)

    async def run(self, job: Callable[[], T], priority: Priority) -> T:
        """``start`` it and wait for it."""
        return await self.start(job, priority)

    def start(self, job: Callable[[], T], priority: Priority) -> Awaitable[T]:
        """Have ``job`` run in the thread, from now on; what is awaited gives what it returns, or raises what it raises.

        It must be awaited, once. A job that was queued is always run to its end, also when who awaits it is cancelled
        (which then takes effect at the next checkpoint), so that a caller always learns what was made and can undo it.

        Raises ShuttingDown after the thread was ended.
        """
        if self._closed:
            raise ShuttingDown("the daemon is stopping")
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        result: list[T] = []
        failure: list[BaseException] = []

        def call() -> None:
            try:
                result.append(job())
            except BaseException as error:  # handed to the caller, whole  # noqa: BLE001
                failure.append(error)
            finally:
                try:
                    libc.setns(self._host_fd, libc.CLONE_NEWNET)
                except OSError:  # ENOMEM
                    self._is_lost = True
                    token.run_sync_soon(self._begin)
                token.run_sync_soon(done.set)

        async def outcome() -> T:
            with trio.CancelScope(shield=True):
                await done.wait()
            if failure:
                raise failure[0]
            return result[0]

        self._put(priority, call)
        return outcome()

    def _begin(self) -> None:
        """Begin a thread, which is born in the host's namespace: its creator's. One that is lost is ending."""
        if self._thread is not None:
            self._thread.join()
        self._is_lost = False
        self._thread = threading.Thread(target=self._work, name="namespaces", daemon=True)
        self._thread.start()

    def _put(self, priority: Priority, job: _Job | None) -> None:
        heapq.heappush(self._jobs, (priority, next(self._order), job))
        self._more.put(None)

    def _work(self) -> None:
        while True:
            self._more.get()
            _priority, _order, job = heapq.heappop(self._jobs)
            if job is None:
                return
            job()
            if self._is_lost:  # where it stands it must do no other job
                return


def enter_new() -> None:
    """Put the calling thread (of NamespaceThread) in a new network namespace."""
    libc.unshare(libc.CLONE_NEWNET)


def enter(path: str) -> None:
    """Put the calling thread (of NamespaceThread) in the network namespace pinned at ``path``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.setns(fd, libc.CLONE_NEWNET)
    finally:
        os.close(fd)


def leave(host_fd: int) -> None:
    """Put the calling thread (of NamespaceThread) back in the host's network namespace before its job ends."""
    libc.setns(host_fd, libc.CLONE_NEWNET)


def open_own() -> int:
    """A descriptor of the calling thread's network namespace. The caller closes it."""
    return os.open(_SELF_NETNS, os.O_RDONLY | os.O_CLOEXEC)


def pin(path: str) -> None:
    """Bind the calling thread's network namespace on the new file ``path``. Raises FileExistsError."""
    bind(_SELF_NETNS, path)


def bind(source: str, path: str) -> None:
    """Bind the namespace at ``source`` on the new file ``path``. Raises FileExistsError."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IMODE(_HALF_MADE)))
    try:
        libc.mount(source, path, None, libc.MS_BIND)
    except OSError:
        os.unlink(path)
        raise


def is_half_made(status: os.stat_result) -> bool:
    """Whether this is a file that ``bind`` made and mounted nothing on: who was about to is dead."""
    return status.st_mode == _HALF_MADE and status.st_uid == 0 and status.st_size == 0


def unpin(path: str) -> None:
    """Undo ``pin``. What is gone already is fine; a half-made one, and mounts stacked on the name, are too."""
    for rounds_left in reversed(range(_MOST_STACKED)):
        try:
            libc.umount2(path, libc.MNT_DETACH)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # nothing is mounted there any more
                raise
        # Rather than another umount2 that finds nothing.
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not rounds_left:  # something else is mounted there
                raise
        else:
            return
