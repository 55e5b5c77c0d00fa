"""Whatever daemon and launcher say to each other, it is an error at most: neither ends by the other's words."""

# ruff: noqa: ASYNC230

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from netnsd.core.interfaces import Exited, Launch
from netnsd.errors import LauncherUnavailable, LaunchFailed
from netnsd.kernel import launcher
from netnsd.kernel._hiding import Hiding
from netnsd.kernel._messages import (
    HEADER,
    PROTOCOL,
    SEALS,
    Connection,
    Kind,
    decode,
    encode,
    receive,
    sealed_memfd,
    send,
)
from netnsd.kernel._order import Order, StageError
from netnsd.kernel.processes import LauncherProcesses
from tests.kernel.launching import UID, World, launching, needs_root

ORDER: dict[str, Any] = {
    "argv": ["true"], "env": {"PATH": "/bin"}, "cwd": "/", "uid": 1001, "gid": 1001, "groups": [1001], "umask": 18,
    "limits": {"nofile": 10}, "hard_limits": {}, "setuid": False, "hosts_file": "/h", "resolv_file": None,
    "hostname": "web", "tty": False, "joins": []}
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(
    ["\0", "\ud800", "\udcff", "nofile", 2**31, 2**32 - 1, 2**64, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
ORDERS = st.builds(lambda name, value, drop: {
    k: v for k, v in {**ORDER, name: value}.items() if k not in drop}, st.sampled_from(sorted(ORDER)), JSON,
    st.sets(st.sampled_from(sorted(ORDER)), max_size=1))


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


@given(st.binary(max_size=60) | ORDERS.map(text) | ORDERS.map(lambda order: text(order)[:-7]) | JSON.map(text))
@example(text({**ORDER, "umask": float("inf")}))
@example(text({**ORDER, "umask": 1.5}))
@example(text({**ORDER, "uid": 2**32 - 1}))
@example(b"[" * 100_000)
@settings(max_examples=400)
def test_an_order_is_good_or_malformed(data: bytes) -> None:
    with contextlib.suppress(ValueError, StageError):  # which the launcher answers with an error
        order = Order(data)
        assert all(0 <= number < 2**32 - 1 for number in (order.uid, order.gid, *order.groups))


# -- to the launcher ----------------------------------------------------------------------------------------------


def anything(bodies: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages: some are one, most are nearly one."""
    headers = st.builds(HEADER.pack, st.sampled_from([PROTOCOL] * 6 + [0, 1, 3, 65535]),
                        st.sampled_from([*Kind] * 2 + [0, 9, 65535]), st.sampled_from([0, 1, 2**64 - 1]))
    return (st.binary(max_size=40) | st.builds(bytes.__add__, headers, bodies)).map(lambda data: data[:32768])


BODIES = st.builds(lambda body, order: body + order, st.sampled_from(
    [b"{}\0", b'{"launch_id": "x"}\0', b'{"launch_id": 1}\0', b"[]\0", b"{", b"", b"[" * 30000, b"9" * 5000]),
    ORDERS.map(text) | st.binary(max_size=20))
FILES: list[Callable[[], int]] = [
    lambda: os.open("/dev/null", os.O_RDWR), lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    lambda: sealed_memfd(text(ORDER)), lambda: sealed_memfd(b"{"), lambda: os.memfd_create("unsealed"),
    lambda: os.open("/proc/self/ns/net", os.O_RDONLY), lambda: socket.socket().detach()]


@given(st.lists(st.tuples(anything(BODIES), st.lists(st.sampled_from(FILES), max_size=5)), min_size=1, max_size=5))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_it_is_told_the_launcher_answers_or_does_nothing(
        monkeypatch: pytest.MonkeyPatch, messages: list[tuple[bytes, list[Callable[[], int]]]]) -> None:
    """In this process, which must not fork: that it would is as good as that it did."""
    def no_fork(*_: object) -> None:
        raise StageError("fork", 11)

    def no_monitor() -> int:
        raise OSError(11, "no fork")

    monkeypatch.setattr(launcher, "Settings", lambda: None)  # which changes this process, for its children
    monkeypatch.setattr(launcher, "fork_into_group", no_fork)
    monkeypatch.setattr(os, "fork", no_monitor)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as undo:
        hiding = Hiding([])
        undo.callback(os.close, hiding._mounts)
        tested = launcher.Launcher(listener, hiding)
        undo.callback(tested._selector.close)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        undo.callback(theirs.close)
        theirs.setblocking(False)
        ours.settimeout(5)
        connection = tested._daemon = Connection(theirs)
        tested._selector.register(theirs, selectors.EVENT_READ, None)
        before = len(os.listdir("/proc/self/fd"))
        for data, kinds in messages:
            fds = [kind() for kind in kinds]
            send(ours, data or b"\0", fds[:4])
            for fd in fds:
                os.close(fd)
            tested._serve(connection)
        send(ours, encode(Kind.HELLO, 77))
        tested._serve(connection)
        answers: list[bytes] = []
        while not answers or struct.unpack_from("=Q", answers[-1], 4)[0] != 77:
            data, fds = receive(ours)
            for fd in fds:
                os.close(fd)
            decode(data)
            answers.append(data)
        assert decode(answers[-1])[0] is Kind.HELLO
        assert len(os.listdir("/proc/self/fd")) == before, "descriptors are left"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with launching() as world:
        yield world


def _sparse() -> int:
    fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 42)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


@pytest.mark.root
@needs_root[1]
async def test_a_launcher_lives_on_with_its_children_whatever_comes(world: World) -> None:
    lasting = world.shell("echo up; exec sleep 600")
    child = await world.processes.launch(lasting)
    pid = world.processes.launcher_pid
    assert pid is not None
    null = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
    reading, writing = os.pipe()
    fds = {"unsealed": os.memfd_create("x"), "huge": _sparse(), "cut": sealed_memfd(text(ORDER)[:-9]),
           "infinite": sealed_memfd(text({**ORDER, "umask": float("inf")})),
           "many": sealed_memfd(text({**ORDER, "argv": ["x" * 1000] * 10_000})), "a pipe": reading}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(world.path("l.sock"))
        for name, fd in fds.items():
            for kind in (Kind.SPAWN, Kind.ATTACH):
                send(sock, encode(kind, 5, {"launch_id": "x"}), [*null, fd])
                answer, got = receive(sock)
                told, body = decode(answer)
                for one in got:
                    os.close(one)
                # Only what is attached forks before it looks at its namespace.
                assert told is Kind.ERROR or "failure" in body or (name, kind) == ("many", Kind.ATTACH), (name, body)
        sock.send(b"")
    for fd in (*null, writing, *fds.values()):
        os.close(fd)
    with trio.fail_after(10):
        await world.disconnect()
        await world.connect()
        assert world.processes.launcher_pid == pid
        assert await world.run("echo well") == "well\n"
    os.kill(child, 0)
    running, _ = await world.processes.known()
    assert [one.pid for one in running] == [child]
    os.kill(child, signal.SIGKILL)
    assert await world.ended(lasting.launch_id) == 137


# -- to the daemon ------------------------------------------------------------------------------------------------


class Liar:
    """Takes a launcher's place: answers HELLO as one does, and what comes then with ``words``."""

    def __init__(self, path: str, hello: bytes, words: list[tuple[bytes, list[Callable[[], int]]]]) -> None:
        self.hello, self.words = hello, words
        self.is_good = False
        self.connections = 0
        self._listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._path = path

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._listener.bind(self._path)
        self._listener.listen()
        with self._listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    connection, _ = await self._listener.accept()
                    self.connections += 1
                    nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with connection, contextlib.suppress(OSError):
            while data := await connection.recv(65536):
                kind, number = Kind(HEADER.unpack_from(data)[1]), HEADER.unpack_from(data)[2]
                if kind is Kind.HELLO:
                    self._send(connection, encode(kind, number, {"pid": os.getpid()}) if self.is_good else self.hello)
                elif self.is_good:
                    self._send(connection, encode(kind, number, {"pid": 4242}))
                else:
                    for word, files in self.words:
                        self._send(connection, word.replace(b"NUMBER##", struct.pack("=Q", number)), files)

    @staticmethod
    def _send(connection: trio.socket.SocketType, data: bytes, files: list[Callable[[], int]] | None = None) -> None:
        fds = [make() for make in files or []]
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            send(sock, data, fds)
        for fd in fds:
            os.close(fd)


def said(kind: int, body: bytes, protocol: int = PROTOCOL) -> bytes:
    return struct.pack("=HH", protocol, kind) + b"NUMBER##" + body + b"\0"


HELLO = HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b'{"pid": %d, "joins": true}\0' % os.getpid()
WORDS: dict[str, list[tuple[bytes, list[Callable[[], int]]]]] = {
    "no header": [(b"x", [])],
    "another protocol": [(said(Kind.SPAWN, b"{}", 99), [])],
    "another kind": [(said(77, b"{}"), [])],
    "no JSON": [(said(Kind.SPAWN, b"{"), [])],
    "no object": [(said(Kind.SPAWN, b"[1]"), [])],
    "deep": [(said(Kind.SPAWN, b"[" * 30000), [])],
    "no pid": [(said(Kind.SPAWN, b"{}"), [])],
    "everybody's pid": [(said(Kind.SPAWN, b'{"pid": -1}'), [])],
    "a pid that is a text": [(said(Kind.SPAWN, b'{"pid": "1"}'), [])],
    "a failure that is none": [(said(Kind.SPAWN, b'{"failure": {"stage": 1}}'), [])],
    "a failure that is a list": [(said(Kind.SPAWN, b'{"failure": []}'), [])],
    "an error without words": [(said(Kind.ERROR, b"{}"), [])],
    "an end without a name": [(said(Kind.EXIT, b"{}"), []), (said(Kind.SPAWN, b"{"), [])],
    "an end of a list": [(said(Kind.EXIT, b'{"launch_id": [], "code": 0}'), [])],
    "an end with a code beyond": [(said(Kind.EXIT, b'{"launch_id": "x", "code": 256}'), [])],
    "another's answer": [(HEADER.pack(PROTOCOL, Kind.SPAWN, 2**63) + b'{"pid": 1}\0', FILES[:1]),
                         (said(Kind.SPAWN, b"{"), [])],
    "descriptors that nobody asked for": [(said(Kind.SPAWN, b"{}"), FILES[:4])],
    "half of what is known": [(said(Kind.KNOWN, b"{}"), [lambda: sealed_memfd(b'{"running": [')])],
    "what is known, of another kind": [(said(Kind.KNOWN, b"{}"), [lambda: sealed_memfd(
        b'{"running": [["x", "y"]], "exits": []}')])],
    "what is known, unsealed": [(said(Kind.KNOWN, b"{}"), [lambda: os.memfd_create("x")])],
    "what is known in no file": [(said(Kind.KNOWN, b"{}"), [lambda: os.open("/", os.O_RDONLY)])],
}


@contextlib.asynccontextmanager
async def lied_to(directory: Path, hello: bytes, words: Any) -> AsyncIterator[tuple[Liar, LauncherProcesses, Launch]]:
    (directory / "group").mkdir()
    liar = Liar(str(directory / "l.sock"), hello, words)
    processes = LauncherProcesses(str(directory / "l.sock"), str(directory), [], starts=False)
    with open(directory / "log", "w") as log:
        launch = Launch(
            launch_id="id", netns="/proc/self/ns/net", cgroup="group", hostname="web", argv=("true",), env={}, cwd="/",
            uid=UID, gid=UID, groups=(), umask=0, limits={}, setuid=False, hosts_file="/h", resolv_file=None,
            log_fd=log.fileno())
        async with trio.open_nursery() as nursery:
            await nursery.start(liar.run)
            with trio.fail_after(20):
                yield liar, processes, launch
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
async def test_a_launcher_that_lies_costs_an_error(tmp_path: Path, words: Any) -> None:
    async with lied_to(tmp_path, HELLO, words) as (liar, processes, launch), trio.open_nursery() as nursery:
        await nursery.start(processes.run)
        before = len(os.listdir("/proc/self/fd"))
        for ask in (lambda: processes.launch(launch), processes.known):
            with pytest.raises((LauncherUnavailable, LaunchFailed)) as failed:
                await ask()
            assert failed.value.hint
        liar.is_good = True
        while True:  # it may be away for a moment
            with contextlib.suppress(LauncherUnavailable):
                assert await processes.launch(launch) == 4242
                break
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # one more connection
        assert liar.connections < 20, "it is asked again and again, without a pause"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("hello", [
    b"x", b"\0" * 12, HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b"{", HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b"{}\0",
    HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b'{"pid": -1}\0', HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b'{"pid": 1}\0',
    HEADER.pack(PROTOCOL, Kind.ERROR, 1) + b'{"message": []}\0', HEADER.pack(PROTOCOL, Kind.HELLO, 1) + b"[" * 30000])
async def test_who_does_not_greet_as_a_launcher_is_none(tmp_path: Path, hello: bytes,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    async with lied_to(tmp_path, hello, []) as (liar, processes, _launch):
        with pytest.raises(LauncherUnavailable):
            await processes._connect()
        processes._starts = True
        processes.retire()
        assert killed == []
        assert liar.connections == 1


async def test_the_number_of_a_launcher_that_has_ended_is_not_signalled(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    path = str(tmp_path / "l.sock")
    processes = LauncherProcesses(path, str(tmp_path), [], starts=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nursery.start, processes.run)
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(listener)
                launcher, _ = listener.accept()
                with launcher:
                    await trio.lowlevel.wait_readable(launcher)
                    launcher.recv(100)
                    launcher.send(HELLO)
                    while processes.launcher_pid is None:
                        await trio.sleep(0.002)
                os.unlink(path)
                assert await processes.exits.receive() is None
            nursery.cancel_scope.cancel()
    processes._starts = True
    processes.retire()
    assert killed == []


async def test_an_end_that_is_told_twice_is_told_twice(tmp_path: Path) -> None:
    told = said(Kind.EXIT, b'{"launch_id": "x", "code": 3}')
    async with lied_to(tmp_path, HELLO, [(told, []), (told, []), (said(Kind.SPAWN, b'{"pid": 7}'), [])]) as (
            _liar, processes, launch), trio.open_nursery() as nursery:
        await nursery.start(processes.run)
        assert await processes.launch(launch) == 7
        assert [await processes.exits.receive() for _ in range(2)] == [Exited("x", 3)] * 2
        nursery.cancel_scope.cancel()
