"""Children of the launcher, from the fork: born in their group, given their order, and heard until their exec.

Part of the launcher: standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from netnsd.kernel import libc
from netnsd.kernel._child import HOLDER, Child, Handles, Settings
from netnsd.kernel._messages import MAX_ENCLOSED_BYTES, receive, send
from netnsd.kernel._order import Order, StageError

# A group that was removed, that has controllers and so no processes of its own, or that is of another kind.
_REFUSALS_OF_GROUPS = (errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.EOPNOTSUPP, errno.EBADF)


class Forked:
    """A child that was born in its cgroup, with the order of what to become or waiting for it."""

    __slots__ = ("channel", "pid", "pidfd")

    def __init__(self, pid: int, channel: socket.socket) -> None:
        # The launcher is the parent: until it waits for the child, the number cannot be another's.
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.channel = channel

    def order(self, handles: Handles, order: bytes) -> None:
        """What to become. Raises OSError where the child has ended meanwhile, or EMSGSIZE."""
        if len(order) > MAX_ENCLOSED_BYTES:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        send(self.channel, order, (handles.netns, handles.log))

    def report(self) -> int:
        """A pipe that ends when it is exec'd or ends itself; the caller closes it. Raises OSError."""
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with contextlib.suppress(ConnectionError):  # it has failed already
                send(self.channel, b"report", (writing,))
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return reading

    def heard(self) -> tuple[StageError | None, int]:
        """When that pipe has ended: what failed, if anything did, and the pidfd of who holds its memory, or -1."""
        failure, holder = None, -1
        while True:
            try:
                data, fds = receive(self.channel)
            except ConnectionError:  # said once, first, where it did not read all of ours before it ended
                continue
            except BlockingIOError:  # its holder has the channel still
                return failure, holder
            if data == HOLDER:
                holder = fds[0] if fds else -1
            elif data:
                failure = StageError.decode(data)
            else:
                return failure, holder

    def close(self) -> None:
        """Forget it: without its order it ends."""
        self.channel.close()
        os.close(self.pidfd)


def fork_into_group(handles: Handles, settings: Settings, order: Order | None = None) -> Forked:
    """Fork a child that is to become ``order``, or what it will be told. The caller closes it.

    Raises StageError ``fork`` or ``cgroup``.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid, is_placed = _fork(handles.cgroup)
            if pid == 0:
                Child(handles, settings, theirs.fileno(), order, is_placed=is_placed, channel=theirs).become()
            ours.setblocking(False)
            return Forked(pid, ours)
        except OSError as error:
            ours.close()
            raise _not_forked(error) from error


def fork_child(order: Order, handles: Handles, settings: Settings) -> tuple[int, int]:
    """Start it: its pid, and a pipe that ends when it was exec'd, or else gives a StageError. The caller closes it.

    Raises StageError ``fork`` or ``cgroup``.
    """
    reading, writing = os.pipe()
    try:
        pid, is_placed = _fork(handles.cgroup)
        if pid == 0:
            Child(handles, settings, writing, order, is_placed=is_placed).become()
    except OSError as error:
        os.close(reading)
        raise _not_forked(error) from error
    finally:
        os.close(writing)
    return pid, reading


def _not_forked(error: OSError) -> StageError:
    stage = "cgroup" if error.errno in _REFUSALS_OF_GROUPS else "fork"
    return StageError(stage, error.errno or errno.EAGAIN)


def _fork(cgroup: int) -> tuple[int, bool]:
    """A fork that is born in the group, or where the kernel has no such thing an ordinary one; and which.

    Moving a process to another group waits for a grace period of RCU, 10 ms and more, unless one was moved just
    before (cgroup_threadgroup_rwsem, kernel/cgroup/cgroup.c). Being born there does not.
    """
    try:
        return libc.fork_into_cgroup(cgroup), True
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG):
            raise
    return os.fork(), False
