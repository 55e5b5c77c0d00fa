"""The process that watches over one attached command, on behalf of a client's connection.

Part of the launcher: standard library only. It relays signals, ends the command when the client is gone, and says how
the command ended. A client that misbehaves holds up its own monitor only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator

from netnsd.kernel import libc
from netnsd.kernel._child import Handles, Settings, close_all_but, exit_code, frame
from netnsd.kernel._forking import fork_child
from netnsd.kernel._order import Order, StageError

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import NoReturn

HANGUP_SECONDS = 2.0
KILL_SECONDS = 10.0


def run(order: Order, handles: Handles, settings: Settings) -> NoReturn:
    """Become the monitor of a new child of this process. Never returns."""
    try:
        close_all_but(handles.cgroup, handles.netns, handles.connection, settings.null_fd)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        libc.set_process_name("netnsd-monitor")
        # What the command leaves behind becomes ours, so that a client's death reaches all of it.
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
        _Monitor(order, handles, settings).run()
    finally:
        os._exit(0)


class _Monitor:
    def __init__(self, order: Order, handles: Handles, settings: Settings) -> None:
        self._order = order
        self._handles = handles
        self._settings = settings
        self._connection = socket.socket(fileno=handles.connection)

    def run(self) -> None:
        try:
            pid, report = fork_child(self._order, self._handles, self._settings)
        except StageError as failure:
            self._fail(failure)
            return
        for fd in (self._handles.cgroup, self._handles.netns):
            os.close(fd)
        error = self._await_exec(report)
        if error is not None:
            os.waitpid(pid, 0)
            self._fail(error)
        elif self._relay_until_end(pid):
            self._say({"exit": exit_code(os.waitpid(pid, 0)[1])})
        else:
            _end_descendants()

    def _await_exec(self, report: int) -> StageError | None:
        # Until then the child reads the connection, and sees for itself when the client is gone.
        data = os.read(report, select.PIPE_BUF)
        os.close(report)
        return StageError.decode(data) if data else None

    def _relay_until_end(self, pid: int) -> bool:
        """Whether the command ended, rather than the client."""
        child = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.register(self._connection, select.POLLIN | select.POLLRDHUP)
        while True:
            ready = dict(poll.poll())
            if child in ready:
                return True
            if not self._relay(pid):
                return False

    def _relay(self, pid: int) -> bool:
        """Pass signals on to the command's process group; False when the client is gone."""
        try:
            numbers = self._connection.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for number in numbers:
            # The leader is not yet waited for, so that the group cannot be another's.
            with contextlib.suppress(OSError):
                os.killpg(pid, number)
        return bool(numbers)

    def _fail(self, error: StageError) -> None:
        self._say({"error": {"code": "launch_failed", "message": error.message, "hint": error.hint,
                             "details": {"stage": error.stage, "errno": error.errno_name}}})

    def _say(self, message: dict[str, object]) -> None:
        """A last word, to a client that may be gone, or that does not read."""
        with contextlib.suppress(OSError):
            self._connection.send(frame(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _end_descendants() -> None:
    """SIGHUP to all, SIGKILL to what is left after a while."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _signal_descendants(signal.SIGHUP)
    _signal_descendants(signal.SIGCONT)
    if _await_descendants(HANGUP_SECONDS):
        return
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        # Again, since a process may fork while it is looked for.
        _signal_descendants(signal.SIGKILL)
        if _await_descendants(0.05):
            return


def _await_descendants(seconds: float) -> bool:
    """Whether all ended in time: orphans become our children, so that the last end leaves us without one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, remaining)


def _signal_descendants(number: int) -> None:
    for pid, parent in _descendants():
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                if _parent(pid) == parent:  # and not a new process with that number
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)


def _descendants() -> Iterator[tuple[int, int]]:
    """Pairs of pid and its parent, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(_parent(int(entry)), []).append(int(entry))
    waiting = [os.getpid()]
    while waiting:
        parent = waiting.pop()
        for pid in children.get(parent, ()):
            yield pid, parent
            waiting.append(pid)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])
