"""The launcher: a small process that forks servers, outlives the daemon, and keeps their exit codes for it.

Started as ``python -I -S -X utf8 launcher.py --socket PATH``: standard library only, one thread, little memory, since
a fork costs what the forking process holds. The daemon talks to it in SOCK_SEQPACKET messages: a fixed header, a
small JSON object, and descriptors. An order (argv, env and the rest) is enclosed; a long one is in a sealed memfd.

It never waits for a child: what a child meets before its exec (a directory on a file server that hangs) is told
through a pipe. Ends are kept until the daemon acknowledges them, and told again to each daemon that connects.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable

if not __package__:  # run as a file, where the rest of netnsd is not to be found: its directory, for these lines only
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from netnsd.kernel import _monitor, libc
from netnsd.kernel._child import Handles, Settings, exit_code
from netnsd.kernel._forking import Forked, fork_into_group
from netnsd.kernel._hiding import Hiding
from netnsd.kernel._messages import (
    HEADER,
    PROTOCOL,
    Connection,
    Kind,
    Request,
    decode,
    enclosed_in,
    encode,
    receive,
    sealed_memfd,
)
from netnsd.kernel._order import Order, StageError
from netnsd.kernel._startup import detach, listen, parse

if not __package__:
    sys.path.pop()

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any

EXIT_ALREADY_RUNNING = 75
_LISTEN_FDS_START = 3


class Start:
    """A child that got its order and has not yet said whether its exec worked. ``report`` ends when it does."""

    __slots__ = ("child", "code", "failure", "launch_id", "report", "request")

    def __init__(self, child: Forked, report: int, launch_id: str, request: Request) -> None:
        self.child = child
        self.report = report
        self.launch_id = launch_id
        self.request = request
        self.code: int | None = None
        self.failure: StageError | None = None


class Launcher:
    """The loop. Everything in it returns at once."""

    def __init__(self, listener: socket.socket, hiding: Hiding, path: str | None = None) -> None:
        self._listener = listener
        self._path = path  # None where the socket is systemd's
        self._inode = os.stat(path).st_ino if path is not None else 0
        self._is_missed = False
        self._hiding = hiding
        self._settings = Settings()
        self._selector = selectors.DefaultSelector()
        self._daemon: Connection | None = None
        self._ready: dict[int, Forked] = {}  # by their cgroup's inode number, which is never used again
        self._starting: dict[int, Start] = {}
        self._running: dict[int, str] = {}
        self._held: dict[str, int | None] = {}  # groups in which a memory holder is still, and how their command ended
        self._exits: dict[str, int] = {}
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM. What was started goes on."""
        wakeup, signalled = socket.socketpair()
        for sock in (wakeup, signalled, self._listener):
            sock.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, self._miss)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._woken(wakeup))
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        gc.collect()
        gc.freeze()
        while not self._stopping:
            for key, _events in self._selector.select():
                handle: Callable[[], None] = key.data
                handle()

    def close(self) -> None:
        """Remove the socket's file, unless it is another's by now, or systemd's."""
        with contextlib.suppress(OSError):
            if self._path is not None and os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _miss(self, *_: object) -> None:
        self._is_missed = True

    def _listen_again(self) -> None:
        """Somebody has removed the socket's file, by which the next daemon finds us: make it anew."""
        self._is_missed = False
        if self._path is None or os.path.lexists(self._path):
            return
        try:
            listener = listen(self._path)
        except OSError:
            return
        self._inode = os.stat(self._path).st_ino
        listener.setblocking(False)
        listener.set_inheritable(False)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = listener
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _woken(self, wakeup: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while wakeup.recv(4096):
                pass
        if self._is_missed:
            self._listen_again()
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._starting:
                start = self._starting[pid]
                start.code = exit_code(status)
                if start.failure is not None:
                    self._failed(start)
            elif pid in self._running:
                self._ended(self._running.pop(pid), exit_code(status))
            else:
                self._forget(pid)
            # Others are monitors, holders, and orphans of servers: a server that daemonised itself is in its cgroup.

    def _forget(self, pid: int) -> None:
        """Of those that wait for an order, one has ended: with its group, or by somebody's signal."""
        for group, child in self._ready.items():
            if child.pid == pid:
                child.close()
                del self._ready[group]
                return

    def _ended(self, launch_id: str, code: int) -> None:
        if launch_id in self._held:  # told when nothing of ours is in its group
            self._held[launch_id] = code
            return
        self._exits[launch_id] = code
        self._tell_exit(launch_id, code)

    def _tell_exit(self, launch_id: str, code: int) -> None:
        if self._daemon is not None:
            self._post(self._daemon, encode(Kind.EXIT, 0, {"launch_id": launch_id, "code": code}))

    # -- the daemon's connection ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if self._daemon is not None:
            self._disconnect(self._daemon)
        connection = self._daemon = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(connection))

    def _disconnect(self, connection: Connection) -> None:
        if connection.socket.fileno() >= 0:
            connection.close()
            self._selector.unregister(connection.socket)
            connection.socket.close()
        if self._daemon is connection:
            self._daemon = None

    def _post(self, connection: Connection, data: bytes, fd: int | None = None) -> None:
        if connection.closed:
            if fd is not None:
                os.close(fd)
            return
        connection.post(data, fd)
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        if connection.socket.fileno() >= 0:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.is_behind else 0)
            key = self._selector.get_key(connection.socket)
            if key.events != events:
                self._selector.modify(connection.socket, events, key.data)

    def _serve(self, connection: Connection) -> None:
        if connection.is_behind:
            connection.flush()
            self._watch(connection)
        try:
            data, fds = receive(connection.socket)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        try:
            if data:
                self._handle(connection, data, fds)
            else:
                self._disconnect(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(self, connection: Connection, data: bytes, fds: list[int]) -> None:
        number = HEADER.unpack_from(data)[2] if len(data) >= HEADER.size else 0
        try:
            kind, body = decode(data)
            if kind not in self._HANDLERS:
                raise ValueError("not a request")
            self._HANDLERS[kind](self, Request(connection, number, body, enclosed_in(data), fds))
        except (ValueError, RecursionError, OSError) as error:  # OSError: out of descriptors or of memory
            self._post(connection, encode(Kind.ERROR, number, {"message": str(error)}))

    def _answer(self, kind: Kind, request: Request, body: dict[str, Any] | None = None, fd: int | None = None) -> None:
        self._post(request.connection, encode(kind, request.number, body), fd)

    def _hello(self, request: Request) -> None:
        self._answer(Kind.HELLO, request, {"protocol": PROTOCOL, "pid": os.getpid(), "joins": True})
        for launch_id, code in self._exits.items():
            self._tell_exit(launch_id, code)

    def _known(self, request: Request) -> None:
        running = [*((launch_id, pid) for pid, launch_id in self._running.items()),
                   *((start.launch_id, pid) for pid, start in self._starting.items())]
        held = [(launch_id, code) for launch_id, code in self._held.items() if code is not None]
        known = {"running": running, "exits": [*self._exits.items(), *held]}
        self._answer(Kind.KNOWN, request, fd=sealed_memfd(json.dumps(known).encode()))

    def _acknowledge(self, request: Request) -> None:
        self._exits.pop(request.launch_id, None)

    # -- starting -------------------------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> None:
        cgroup, = request.descriptors(1)
        group = os.fstat(cgroup).st_ino
        if group not in self._ready:
            with contextlib.suppress(StageError):  # it is told when something is to run there
                self._ready[group] = fork_into_group(Handles(cgroup), self._settings)
        self._answer(Kind.PREPARE, request)

    def _spawn(self, request: Request) -> None:
        launch_id = request.launch_id
        fds, order = request.order()
        try:
            self._hiding.refresh()
            child, report = self._start(Handles(*fds), order)
        except StageError as error:
            self._refuse(Kind.SPAWN, request, error)
            return
        start = self._starting[child.pid] = Start(child, report, launch_id, request)
        self._selector.register(report, selectors.EVENT_READ, lambda: self._reported(start))

    def _start(self, handles: Handles, order: bytes) -> tuple[Forked, int]:
        """Have a child of that group start: it, and the pipe that ends when it has. Raises StageError, ValueError."""
        child = self._ready.pop(os.fstat(handles.cgroup).st_ino, None)
        if child is not None:
            with contextlib.suppress(OSError):  # it was killed, or the order is too long for a message
                child.order(handles, order)
                return child, child.report()
            child.close()
        child = fork_into_group(handles, self._settings, Order(order))
        try:
            return child, child.report()
        except OSError as error:
            child.close()
            raise StageError("fork", error.errno or errno.EAGAIN) from error

    def _attach(self, request: Request) -> None:
        (cgroup, netns, connection), data = request.order()
        try:
            order = Order(data)
            self._hiding.refresh()
            pid = os.fork()
            if pid == 0:
                _monitor.run(order, Handles(cgroup, netns, connection=connection), self._settings)
            monitor = os.pidfd_open(pid)
        except StageError as error:
            self._refuse(Kind.ATTACH, request, error)
        except OSError as error:
            self._refuse(Kind.ATTACH, request, StageError("fork", error.errno or errno.EAGAIN))
        else:
            self._answer(Kind.ATTACH, request, fd=monitor)

    def _refuse(self, kind: Kind, request: Request, error: StageError) -> None:
        failure = {"stage": error.stage, "errno": error.errno_name, "message": error.message, "hint": error.hint}
        self._answer(kind, request, {"failure": failure})

    def _reported(self, start: Start) -> None:
        """Its end of the pipe is closed: it was exec'd, or has failed and ends, or was killed."""
        self._selector.unregister(start.report)
        os.close(start.report)
        start.failure, holder = start.child.heard()
        start.child.channel.close()
        if start.failure is None:
            self._started(start)
            if holder >= 0:
                self._release(start.launch_id, holder)
            if start.code is not None:
                self._ended(self._running.pop(start.child.pid), start.code)
            return
        if holder >= 0:
            os.close(holder)
        if start.code is not None:
            self._failed(start)

    def _started(self, start: Start) -> None:
        pid = start.child.pid
        del self._starting[pid]
        self._running[pid] = start.launch_id
        self._answer(Kind.SPAWN, start.request, {"pid": pid}, start.child.pidfd)

    def _failed(self, start: Start) -> None:
        """It has left its cgroup too, so that nothing of it is met."""
        assert start.failure is not None
        del self._starting[start.child.pid]
        os.close(start.child.pidfd)
        self._refuse(Kind.SPAWN, start.request, start.failure)
        if start.request.connection.closed:  # who asked is gone: the next daemon finds an end, as a shell gives it
            self._ended(start.launch_id, 127 if start.failure.number == errno.ENOENT else 126)

    def _release(self, launch_id: str, holder: int) -> None:
        """End the holder of a started child's former memory; until it has ended it is in the command's group."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(holder, signal.SIGKILL)
        self._held[launch_id] = None
        self._selector.register(holder, selectors.EVENT_READ, lambda: self._released(launch_id, holder))

    def _released(self, launch_id: str, holder: int) -> None:
        self._selector.unregister(holder)
        os.close(holder)
        code = self._held.pop(launch_id)
        if code is not None:
            self._ended(launch_id, code)

    _HANDLERS: dict[Kind, Callable[[Launcher, Request], None]] = {  # noqa: RUF012
        Kind.HELLO: _hello, Kind.SPAWN: _spawn, Kind.PREPARE: _prepare, Kind.ATTACH: _attach, Kind.KNOWN: _known,
        Kind.ACKNOWLEDGE: _acknowledge,
    }


def main() -> int:
    """Run as a program."""
    try:
        path, hidden, detached = parse(sys.argv[1:])
    except ValueError as error:
        os.write(2, f"netnsd-launcher: {error}\nusage: --socket PATH [--hide DIR]... [--detach]\n".encode())
        return 2
    given = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    try:
        while os.open("/dev/null", os.O_RDWR) < _LISTEN_FDS_START:  # so that no other descriptor becomes 0, 1 or 2
            pass
        libc.close_range(_LISTEN_FDS_START + given, 2**32 - 1)
        listener = socket.socket(fileno=_LISTEN_FDS_START) if given else listen(path)
    except OSError as error:
        os.write(2, f"netnsd-launcher: {path}: {error}\n".encode())
        return EXIT_ALREADY_RUNNING if isinstance(error, FileExistsError) else 1
    listener.set_inheritable(False)
    try:
        launcher = _prepared(listener, hidden, None if given else path, detached=detached)
    except (OSError, StageError) as error:
        os.write(2, f"netnsd-launcher: {getattr(error, 'message', error)}\n".encode())
        return 1
    launcher.run()
    launcher.close()
    return 0


def _prepared(listener: socket.socket, hidden: list[str], path: str | None, *, detached: bool) -> Launcher:
    """Make this process what children are forked from. Raises OSError, StageError."""
    os.chdir("/")
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount(None, "/", None, libc.MS_REC | libc.MS_SLAVE)
    hiding = Hiding(hidden)
    if detached:
        detach()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    libc.set_process_name("netnsd-launcher")
    # Servers of all users would share, and read, the session keyring of whoever started the daemon.
    with contextlib.suppress(OSError):  # a kernel without keyrings, or a filter
        libc.join_session_keyring()
        libc.revoke_session_keyring()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    return Launcher(listener, hiding, path)


if __name__ == "__main__":
    sys.exit(main())
