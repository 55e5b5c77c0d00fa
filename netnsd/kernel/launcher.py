"""The launcher: a small process that forks servers, outlives the daemon, and keeps their exit codes for it.

Started as ``python -I -S -X utf8 launcher.py --socket PATH``: standard library only, one thread, little memory, since
a fork costs what the forking process holds. The daemon talks to it in SOCK_SEQPACKET messages: a fixed header, a
small JSON object, and descriptors. An order (argv, env and the rest) comes in a sealed memfd, as packets are limited.

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
from netnsd.kernel._child import Handles, Order, Settings, StageError, exit_code, fork_child
from netnsd.kernel._hiding import Hiding
from netnsd.kernel._messages import (
    HEADER,
    MAX_DESCRIPTORS,
    PROTOCOL,
    Connection,
    Kind,
    decode,
    encode,
    read_sealed,
    receive,
    sealed_memfd,
)

if not __package__:
    sys.path.pop()

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any

EXIT_ALREADY_RUNNING = 75
_LISTEN_FDS_START = 3


class Pending:
    """A child that was forked and has not yet said whether its exec worked."""

    __slots__ = ("code", "connection", "data", "launch_id", "pid", "pidfd", "report", "request")

    def __init__(self, pid: int, report: int, launch_id: str, connection: Connection, request: int) -> None:
        # The launcher is the parent: until it waits for the child, the number cannot be another's.
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.report = report
        self.launch_id = launch_id
        self.connection = connection
        self.request = request
        self.code: int | None = None
        self.data = b""


class Launcher:
    """The loop. Everything in it returns at once."""

    def __init__(self, listener: socket.socket, hiding: Hiding) -> None:
        self._listener = listener
        self._hiding = hiding
        self._settings = Settings()
        self._selector = selectors.DefaultSelector()
        self._daemon: Connection | None = None
        self._pending: dict[int, Pending] = {}
        self._running: dict[int, str] = {}
        self._exits: dict[str, int] = {}
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM. What was started goes on."""
        wakeup, signalled = socket.socketpair()
        for sock in (wakeup, signalled, self._listener):
            sock.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
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

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _woken(self, wakeup: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while wakeup.recv(4096):
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._pending:
                self._pending[pid].code = exit_code(status)
                self._settle(self._pending[pid])
            elif pid in self._running:
                self._ended(self._running.pop(pid), exit_code(status))
            # Others are monitors, and orphans of servers: a server that daemonised itself is in its cgroup still.

    def _ended(self, launch_id: str, code: int) -> None:
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
        request = HEADER.unpack_from(data)[2] if len(data) >= HEADER.size else 0
        try:
            kind, body = decode(data)
            if kind not in self._HANDLERS:
                raise ValueError("not a request")
            self._HANDLERS[kind](self, connection, request, body, fds)
        except (ValueError, RecursionError, OSError) as error:  # OSError: out of descriptors or of memory
            self._post(connection, encode(Kind.ERROR, request, {"message": str(error)}))

    def _hello(self, connection: Connection, request: int, _body: dict[str, Any], _fds: list[int]) -> None:
        self._post(connection, encode(Kind.HELLO, request, {"protocol": PROTOCOL, "pid": os.getpid()}))
        for launch_id, code in self._exits.items():
            self._tell_exit(launch_id, code)

    def _known(self, connection: Connection, request: int, _body: dict[str, Any], _fds: list[int]) -> None:
        running = [(launch_id, pid) for pid, launch_id in self._running.items()]
        running += [(pending.launch_id, pending.pid) for pending in self._pending.values()]
        known = {"running": running, "exits": list(self._exits.items())}
        self._post(connection, encode(Kind.KNOWN, request), sealed_memfd(json.dumps(known).encode()))

    def _acknowledge(self, _connection: Connection, _request: int, body: dict[str, Any], _fds: list[int]) -> None:
        launch_id = body.get("launch_id")
        if not isinstance(launch_id, str):
            raise ValueError("an acknowledgement names its launch_id")  # noqa: TRY004  # malformed, as a value
        self._exits.pop(launch_id, None)

    # -- starting -------------------------------------------------------------------------------------------------

    def _spawn(self, connection: Connection, request: int, _body: dict[str, Any], fds: list[int]) -> None:
        try:
            order = self._decode(fds)
            self._hiding.refresh()
            pid, report = fork_child(order, Handles(cgroup=fds[0], netns=fds[1], log=fds[2]), self._settings)
        except StageError as error:
            self._refuse(connection, request, error)
            return
        os.set_blocking(report, False)
        pending = Pending(pid, report, order.launch_id, connection, request)
        self._pending[pid] = pending
        self._selector.register(report, selectors.EVENT_READ, lambda: self._reported(pending))

    def _attach(self, connection: Connection, request: int, _body: dict[str, Any], fds: list[int]) -> None:
        try:
            order = self._decode(fds)
            self._hiding.refresh()
            pid = os.fork()
            if pid == 0:
                _monitor.run(order, Handles(cgroup=fds[0], netns=fds[1], connection=fds[2]), self._settings)
            monitor = os.pidfd_open(pid)
        except StageError as error:
            self._refuse(connection, request, error, Kind.ATTACH)
        except OSError as error:
            self._refuse(connection, request, StageError("fork", error.errno or errno.EAGAIN), Kind.ATTACH)
        else:
            self._post(connection, encode(Kind.ATTACH, request), monitor)

    @staticmethod
    def _decode(fds: list[int]) -> Order:
        if len(fds) != MAX_DESCRIPTORS:
            raise ValueError(f"an order has {MAX_DESCRIPTORS} descriptors, not {len(fds)}")
        return Order(read_sealed(fds[3]))

    def _refuse(self, connection: Connection, request: int, error: StageError, kind: Kind = Kind.SPAWN) -> None:
        failure = {"stage": error.stage, "errno": error.errno_name, "message": error.message, "hint": error.hint}
        self._post(connection, encode(kind, request, {"failure": failure}))

    def _reported(self, pending: Pending) -> None:
        """The pipe of a child has its failure, or its end: it was exec'd (or killed before)."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(pending.report, 4096):
                pending.data += part
            self._selector.unregister(pending.report)
            os.close(pending.report)
            pending.report = -1
            self._settle(pending)

    def _settle(self, pending: Pending) -> None:
        """Answer, once all is known: a child that failed must have left its cgroup, so that nothing of it is met."""
        if pending.report >= 0 or (pending.data and pending.code is None):
            return
        del self._pending[pending.pid]
        if pending.data:
            os.close(pending.pidfd)
            failure = StageError.decode(pending.data)
            self._refuse(pending.connection, pending.request, failure)
            if pending.connection.closed:  # whoever asked is gone: the next daemon finds an end, as a shell gives it
                self._ended(pending.launch_id, 127 if failure.number == errno.ENOENT else 126)
            return
        body = {"pid": pending.pid}
        self._post(pending.connection, encode(Kind.SPAWN, pending.request, body), pending.pidfd)
        if pending.code is None:
            self._running[pending.pid] = pending.launch_id
        else:
            self._ended(pending.launch_id, pending.code)

    _HANDLERS: dict[Kind, Callable[[Launcher, Connection, int, dict[str, Any], list[int]], None]] = {  # noqa: RUF012
        Kind.HELLO: _hello, Kind.SPAWN: _spawn, Kind.ATTACH: _attach, Kind.KNOWN: _known,
        Kind.ACKNOWLEDGE: _acknowledge,
    }


# -- starting up --------------------------------------------------------------------------------------------------


def listen(path: str) -> socket.socket:
    """A root-only socket at ``path``, in place of one that nobody listens on. Raises FileExistsError, OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise FileExistsError(errno.EEXIST, "another launcher listens", path)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen(16)
    return sock


def detach() -> None:
    """Go on in a process that is nobody's child, in a session of its own; the caller's process ends well."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def parse(arguments: list[str]) -> tuple[str, list[str], bool]:
    """Where to listen, what to hide, whether to detach. By hand: argparse would stay in memory. Raises ValueError."""
    path, hidden, detached = "", [], False
    words = iter(arguments)
    for word in words:
        if word == "--socket":
            path = next(words, "")
        elif word == "--hide":
            hidden.append(next(words, ""))
        elif word == "--detach":
            detached = True
        else:
            raise ValueError(f"unknown argument: {word}")
    if not path:
        raise ValueError("--socket is missing")
    return path, hidden, detached


def main() -> int:
    """Run as a program."""
    try:
        path, hidden, detached = parse(sys.argv[1:])
    except ValueError as error:
        os.write(2, f"netnsd-launcher: {error}\nusage: --socket PATH [--hide DIR]... [--detach]\n".encode())
        return 2
    given = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    while os.open("/dev/null", os.O_RDWR) < _LISTEN_FDS_START:  # so that no other descriptor becomes 0, 1 or 2
        pass
    libc.close_range(_LISTEN_FDS_START + given, 2**32 - 1)
    try:
        listener = socket.socket(fileno=_LISTEN_FDS_START) if given else listen(path)
    except OSError as error:
        os.write(2, f"netnsd-launcher: {path}: {error}\n".encode())
        return EXIT_ALREADY_RUNNING if isinstance(error, FileExistsError) else 1
    listener.set_inheritable(False)
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
    inode = None if given else os.stat(path).st_ino
    Launcher(listener, hiding).run()
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
