"""The daemon's end of the launcher: starts it when none answers, and speaks with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from netnsd.core.interfaces import Exited, Launch, Running
from netnsd.errors import LauncherUnavailable, LaunchFailed
from netnsd.kernel import _messages, launcher
from netnsd.kernel._answers import Ended, Failure, Known, Pid, not_understood, understood
from netnsd.kernel._messages import HEADER, Kind, decode, encode, read_sealed, receive, sealed_memfd, send
from netnsd.kernel._order import StageError

START_SECONDS = 5.0
LAUNCH_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.02
LAST_PAUSE_SECONDS = 2.0
NETNS_DIRECTORY = "/run/netns"


@dataclass(slots=True)
class _Request:
    """A question on its way. ``fds`` are its own, closed when it was sent or dropped."""

    id: int
    data: bytes
    fds: list[int]
    done: trio.Event = field(default_factory=trio.Event)
    body: dict[str, Any] = field(default_factory=dict)
    answer_fd: int | None = None
    failure: str | None = None
    abandoned: bool = False

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class LauncherProcesses:
    """Implements ``core.interfaces.Processes``.

    ``run`` owns the connection; ``launcher_pid`` is of the launcher that it leads to. An end may be told twice on
    ``exits``: each new connection brings again what was not acknowledged.

    Args:
        socket_path: where the launcher listens, or will.
        cgroup_root: the directory that ``Launch.cgroup`` is relative to.
        hide: mounted directories that must not be copied into servers' mount namespaces.
        starts: whether the launcher is ours to start and to end. Otherwise it is systemd's, as is its socket.
    """

    def __init__(self, socket_path: str, cgroup_root: str, hide: list[str], *, starts: bool = True) -> None:
        self._socket_path = socket_path
        self._cgroup_root = cgroup_root
        self._hide = hide
        self._starts = starts
        self._ids = itertools.count(1)
        self._asked: dict[int, _Request] = {}
        self._unsent: deque[_Request] = deque()
        self._has_unsent = trio.Event()
        self._socket: socket.socket | None = None
        self._launcher_pid: int | None = None
        self._joins = False
        self._connected = trio.Event()
        self.launcher_pid: int | None = None
        self._tell_exit, self._exits = trio.open_memory_channel[Exited | None](math.inf)

    @property
    def exits(self) -> trio.MemoryReceiveChannel[Exited | None]:
        """Ends as they happen; None when the connection was lost: the next launcher may know nothing of what runs."""
        return self._exits

    # -- what core calls ------------------------------------------------------------------------------------------

    async def launch(self, launch: Launch) -> int:
        """Start it and return its pid once it has been exec'd. Raises LaunchFailed, LauncherUnavailable.

        Cancelled after the launcher was asked, the command is killed as soon as the launcher says that it started;
        should the launcher's connection break before that, what is left is in the launch's cgroup.
        """
        if launch.log_fd is None:
            raise ValueError("a launch needs a log")
        try:
            with trio.fail_after(LAUNCH_SECONDS):
                request = await self._ask(Kind.SPAWN, *self._order(launch, launch.log_fd))
        except trio.TooSlowError as error:
            raise _launch_failed(f"{launch.argv[0]} was not started within {LAUNCH_SECONDS:g} s",
                                 "Does its directory or its program lie on a file server that hangs?", "exec",
                                 "ETIMEDOUT") from error
        if request.answer_fd is not None:
            os.close(request.answer_fd)
        return understood(request.body.get("pid"), Pid)

    def prepare(self, cgroup: str) -> None:
        """Have a child born in this group, that becomes the next command to be launched there in half of the time.

        It waits in the group (which is populated, then) until a launch, a signal, the group's removal or the launcher's
        end. Nothing is promised: where there is none, a launch forks. Returns before it is there; a second is not made.

        Args:
            cgroup: relative to the root, as ``Launch.cgroup``, and there already.
        """
        if self._socket is not None:
            with contextlib.suppress(OSError):
                group = os.open(os.path.join(self._cgroup_root, cgroup), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._post(_Request(0, encode(Kind.PREPARE, 0), [group]))
                # What the launcher writes to after a fork is copied first. It does that now, not when it counts.
                self.acknowledge("")

    async def attach(self, launch: Launch, connection: int) -> int:
        """Hand ``connection`` (borrowed) over to a monitor, which alone speaks with its peer from then on.

        Returns the monitor's pidfd. Raises LaunchFailed where not even that works, and LauncherUnavailable.
        """
        request = await self._ask(Kind.ATTACH, *self._order(launch, connection))
        if request.answer_fd is None:
            raise LauncherUnavailable("the launcher did not tell its monitor", hint="Try again.")
        return request.answer_fd

    async def known(self) -> tuple[Sequence[Running], Sequence[Exited]]:
        """What runs, and the ends that were not yet acknowledged. Raises LauncherUnavailable."""
        request = await self._ask(Kind.KNOWN, [])
        if request.answer_fd is None:
            raise not_understood("it does not say what runs")
        try:
            known = understood(json.loads(read_sealed(request.answer_fd)), Known)
        except (ValueError, RecursionError) as error:
            raise not_understood(error) from error
        finally:
            os.close(request.answer_fd)
        return [Running(*one) for one in known.running], [Exited(*one) for one in known.exits]

    def acknowledge(self, launch_id: str) -> None:
        """Its end is stored: the launcher may forget this launch. Lost with a connection, as it is told again then."""
        if self._socket is not None:
            self._post(_Request(0, encode(Kind.ACKNOWLEDGE, 0, {"launch_id": launch_id}), []))

    def look(self) -> None:
        """Have the launcher make its socket's file anew where somebody has removed it: the next daemon needs it."""
        # One of an earlier version would end by the signal.
        if self._starts and self._joins and self.launcher_pid is not None and not os.path.lexists(self._socket_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.launcher_pid, signal.SIGHUP)

    def retire(self) -> None:
        """End the launcher, which nothing needs any more; servers would go on without their exit codes."""
        if not self._starts:
            return
        if self._launcher_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._launcher_pid, signal.SIGTERM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket_path)

    def _order(self, launch: Launch, borrowed: int) -> tuple[list[int], dict[str, Any], bytes]:
        """Of one start: the cgroup, the namespace, and the log or connection; the message; and what goes with it."""
        if launch.joins and not self._joins:
            raise LauncherUnavailable("the launcher that runs is of an earlier version, and does not know limits",
                                      hint="Restart it (systemctl restart netnsd-launcher): servers go on.")
        order = json.dumps({
            "argv": launch.argv, "env": launch.env, "cwd": launch.cwd, "uid": launch.uid, "gid": launch.gid,
            "groups": launch.groups, "umask": launch.umask, "limits": launch.limits, "hard_limits": launch.hard_limits,
            "setuid": launch.setuid, "hosts_file": launch.hosts_file, "resolv_file": launch.resolv_file,
            "hostname": launch.hostname, "tty": launch.tty, "joins": launch.joins,
        }).encode()
        with contextlib.ExitStack() as undo:
            fds: list[int] = []
            for stage, path, flags in (
                ("cgroup", os.path.join(self._cgroup_root, launch.cgroup), os.O_RDONLY | os.O_DIRECTORY),
                ("setns", os.path.join(NETNS_DIRECTORY, launch.netns), os.O_RDONLY),
            ):
                try:
                    fds.append(os.open(path, flags | os.O_CLOEXEC))
                except OSError as error:
                    failure = StageError(stage, error.errno or 0, path)
                    raise _launch_failed(failure.message, failure.hint, stage, failure.errno_name) from error
                undo.callback(os.close, fds[-1])
            try:
                fds.append(os.dup(borrowed))
                undo.callback(os.close, fds[-1])
                if len(order) > _messages.MAX_ENCLOSED_BYTES:
                    fds.append(sealed_memfd(order))
                    order = b""
            except OSError as error:
                failure = StageError("stdio", error.errno or 0)
                raise _launch_failed(failure.message, failure.hint, "stdio", failure.errno_name) from error
            undo.pop_all()
        return fds, {"launch_id": launch.launch_id}, order

    # -- questions and answers ------------------------------------------------------------------------------------

    async def _ask(self, kind: Kind, fds: list[int], body: dict[str, Any] | None = None,
                   enclosed: bytes = b"") -> _Request:
        """Send a request, which owns ``fds``, and return it with its answer."""
        number = next(self._ids)
        request = _Request(number, encode(kind, number, body, enclosed), fds)
        try:
            if not self._connected.is_set():
                with trio.move_on_after(START_SECONDS):
                    await self._connected.wait()
            self._check_connected()
            self._asked[number] = request
            self._post(request)
            await request.done.wait()
        except BaseException:
            self._abandon(request)
            raise
        if request.failure is not None:
            raise LauncherUnavailable(request.failure, hint="Look at the daemon's log, or try again.")
        if "failure" in request.body:
            raise _launch_failed(**msgspec.structs.asdict(understood(request.body["failure"], Failure)))
        return request

    def _check_connected(self) -> None:
        if self._socket is None:
            raise LauncherUnavailable("the launcher does not answer", hint="It is being started again. Try again.")

    def _abandon(self, request: _Request) -> None:
        """Nobody waits for it any more: it is not sent, or else its answer undoes what it did."""
        request.abandoned = True
        if request in self._unsent:
            self._unsent.remove(request)
            self._asked.pop(request.id, None)
        if request.id not in self._asked:
            request.close()
            _discard(request)

    def _post(self, request: _Request) -> None:
        self._unsent.append(request)
        self._flush()
        if self._unsent:
            self._has_unsent.set()

    def _flush(self) -> None:
        """Send what fits now. The reader finds, and clears up after, a broken connection."""
        while self._unsent and self._socket is not None:
            request = self._unsent[0]
            try:
                send(self._socket, request.data, request.fds)
            except BlockingIOError:
                return
            except OSError:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                return
            self._unsent.popleft()
            request.close()

    def _handle(self, data: bytes, fds: list[int]) -> None:
        kind, body = decode(data)
        if kind is Kind.EXIT:
            ended = understood(body, Ended)
            self._tell_exit.send_nowait(Exited(ended.launch_id, ended.code))
            return
        request = self._asked.pop(HEADER.unpack_from(data)[2], None)
        if request is None:
            return
        request.body = body
        request.answer_fd = fds.pop() if fds else None
        if kind is Kind.ERROR:
            request.failure = f"the launcher refused: {body.get('message')}"
        if request.abandoned:
            _discard(request)
        request.done.set()

    # -- the connection -------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a launcher at hand until cancelled. Raises LauncherUnavailable when the first does not come up."""
        patience = START_SECONDS
        while True:
            sock = await self._connect_again(patience)
            patience = math.inf
            try:
                self._socket = sock
                self._connected.set()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await self._speak(sock)
            finally:
                self._lose(sock)
            self._launcher_pid = None  # the number may be somebody else's soon, and is not signalled
            self._tell_exit.send_nowait(None)

    async def _connect_again(self, patience: float) -> socket.socket:
        """Try until it works, more and more slowly. Raises LauncherUnavailable after ``patience`` seconds."""
        deadline = trio.current_time() + patience
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._connect()
            except LauncherUnavailable:
                if trio.current_time() + pause > deadline:
                    raise
            await trio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    async def _speak(self, sock: socket.socket) -> None:
        """Read until the connection ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest, sock)
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    while True:
                        data, fds = receive(sock)
                        if not data:
                            nursery.cancel_scope.cancel()
                            return
                        try:
                            self._handle(data, fds)
                        finally:
                            for fd in fds:
                                os.close(fd)
                except BlockingIOError:
                    continue
                # One whose words cannot be taken (ENOMEM), or understood, is lost too. It may say the same again.
                except (OSError, ValueError, LauncherUnavailable):
                    await trio.sleep(FIRST_PAUSE_SECONDS)
                    nursery.cancel_scope.cancel()
                    return

    async def _send_rest(self, sock: socket.socket) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent = trio.Event()
            while self._unsent:
                await trio.lowlevel.wait_writable(sock)
                self._flush()

    def _lose(self, sock: socket.socket) -> None:
        self._socket = None
        self.launcher_pid = None
        self._connected = trio.Event()
        sock.close()
        for request in (*self._asked.values(), *self._unsent):
            request.failure = "the launcher ended while it was asked"
            request.close()
            request.done.set()
        self._asked.clear()
        self._unsent.clear()

    async def _connect(self) -> socket.socket:
        """A connection to a launcher that speaks our protocol; one is started where none listens and it is ours."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            try:
                sock.connect(self._socket_path)
            except (FileNotFoundError, ConnectionRefusedError):
                if not self._starts:
                    raise
                await self._start()
                sock.connect(self._socket_path)
            send(sock, encode(Kind.HELLO, next(self._ids)))
            with trio.fail_after(START_SECONDS):
                await trio.lowlevel.wait_readable(sock)
            data, _fds = receive(sock)
            kind, body = decode(data)
            pid = None if kind is not Kind.HELLO else understood(body.get("pid"), Pid)
        except (OSError, ValueError, LauncherUnavailable, trio.TooSlowError) as error:
            sock.close()
            raise LauncherUnavailable(f"the launcher at {self._socket_path} does not answer: {error}") from error
        except BaseException:
            sock.close()
            raise
        self._launcher_pid = self.launcher_pid = pid
        if pid is None:
            sock.close()
            raise LauncherUnavailable(f"the launcher at {self._socket_path} refused: {body.get('message')}",
                                      hint="It may be of another version: it ends on SIGTERM, and servers go on.")
        self._joins = bool(body.get("joins"))
        return sock

    async def _start(self) -> None:
        """Start a launcher that is not our child. posix_spawn, as a fork would copy the daemon's memory tables."""
        arguments = [sys.executable, "-I", "-S", "-X", "utf8", launcher.__file__, "--detach"]
        arguments += ["--socket", self._socket_path]
        for directory in self._hide:
            arguments += ["--hide", directory]
        stdin = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
        environment = {"PATH": os.defpath}
        pid = os.posix_spawn(sys.executable, arguments, environment, file_actions=[stdin])  # noqa: ASYNC221  # 1 ms
        handle = os.pidfd_open(pid)
        try:
            with trio.move_on_after(START_SECONDS):
                await trio.lowlevel.wait_readable(handle)
        finally:
            # It listens before it ends; one that did not end in time is killed, and reaped in any case.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222  # it has ended
        if code not in (0, launcher.EXIT_ALREADY_RUNNING):
            raise LauncherUnavailable(f"the launcher could not be started (exit code {code})")


def _discard(request: _Request) -> None:
    """Undo what an answer brought that nobody waits for: a started command is killed through its pidfd."""
    if request.answer_fd is not None:
        if "pid" in request.body:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(request.answer_fd, signal.SIGKILL)
        os.close(request.answer_fd)
        request.answer_fd = None


def _launch_failed(message: str, hint: str, stage: str, errno: str) -> LaunchFailed:
    return LaunchFailed(message, hint=hint, stage=stage, errno=errno)
