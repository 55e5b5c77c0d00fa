"""Descriptors that clients smuggle in beside their bytes are refused by the kernel, or closed without harm."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from netnsd.api import peer, transport
from netnsd.api.closing import Closer
from netnsd.errors import BadRequest
from tests.fakes.serving import Served, serving
from tests.fakes.world import ALICE, request

HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LINGER_SECONDS = 3


def kernel_filters() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return peer.refuse_descriptors(probe)


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.skipif(
    not kernel_filters(), reason="this kernel has no SO_PASSRIGHTS")), False], ids=["filtered", "fallback"])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, filters=request.param) as made:
        yield made


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    client.connect(path)
    return client


def lingering() -> socket.socket:
    """A TCP socket whose last close blocks: it has unsent data, and its peer does not read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
    ours.setblocking(False)
    try:
        while True:
            ours.send(b"x" * 65536)
    except BlockingIOError:
        pass
    KEPT.append(theirs)
    return ours


KEPT: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _let_go() -> object:
    yield
    while KEPT:
        KEPT.pop().close()


def smuggle(client: socket.socket, data: bytes, *descriptors: int) -> bool:
    """Whether the kernel took them."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    try:
        client.sendmsg([data], rights)
    except PermissionError:
        return False
    return True


async def until_closed(before: int) -> None:
    with trio.fail_after(5):
        while len(os.listdir("/proc/self/fd")) > before:
            await trio.sleep(0.01)


async def longest_stall(seconds: float) -> float:
    """The longest time for which the loop did not come round."""
    longest, end = 0.0, time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        await trio.sleep(0.005)
        longest = max(longest, time.monotonic() - now)
    return longest


@pytest.mark.parametrize("count", [1, 253])
async def test_descriptors_beside_a_request_do_not_stay(served: Served, count: int) -> None:
    await served.ask("GET", "/v1/health")
    before = len(os.listdir("/proc/self/fd"))
    with connect(served.path) as client, open("/dev/null", "rb") as null:  # noqa: ASYNC230
        if not smuggle(client, HEALTH, *[null.fileno()] * count):
            client.sendall(HEALTH)
        client.shutdown(socket.SHUT_WR)
        received = await trio.to_thread.run_sync(_all, client)
    # Where the kernel does not refuse them, whoever sends descriptors is refused.
    refused = not served.http._closer.filters_descriptors
    assert (b"descriptors came with the request" in received, b'{"status":"ok"}' in received) == (refused, not refused)
    await until_closed(before)


@pytest.mark.parametrize("data", [HEALTH, HEALTH[:20], b"POST /v1/environments HTTP/1.1\r\nHost: localhost\r\n"  # noqa: ISC004
                                  b"Content-Length: 100\r\n\r\n{", b"nonsense\r\n\r\n"],
                         ids=["request", "part of a head", "part of a body", "nonsense"])
async def test_a_lingering_socket_does_not_stall_the_loop(served: Served, data: bytes) -> None:
    with connect(served.path) as client:
        smuggled = lingering()
        smuggle(client, data, smuggled.fileno())
        smuggled.close() if not served.http._closer.filters_descriptors else None
        stall = await longest_stall(0.3)
        client.close()
        stall = max(stall, await longest_stall(0.3))
        KEPT[0].close()
        smuggled.close()
    assert stall < 0.2
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_lingering_sockets_that_were_not_read_do_not_stall_the_loop(served: Served) -> None:
    """They lie in the socket's queue when the server closes it."""
    with connect(served.path) as client:
        client.sendall(b"POST /v1/environments HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\n\r\n")
        smuggled = lingering()
        smuggle(client, b"x", smuggled.fileno())
        if not served.http._closer.filters_descriptors:
            smuggled.close()
        assert await longest_stall(0.4) < 0.2
        KEPT[0].close()
        smuggled.close()
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_lingering_sockets_over_attach_do_not_stall_the_loop(served: Served) -> None:
    await served.world.environments.create(request("web"), ALICE)
    body = b'{"ref": "none", "command": ["x"]}'
    with connect(served.attach_path) as client:
        smuggled = lingering()
        smuggle(client, struct.pack(">I", len(body)) + body, smuggled.fileno())
        if not served.http._closer.filters_descriptors:
            smuggled.close()
        assert await longest_stall(0.4) < 0.2
        KEPT[0].close()
        smuggled.close()
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_many_lingering_sockets_leave_threads_for_others(served: Served) -> None:
    clients = [connect(served.path) for _ in range(50)]
    kept = []
    for client in clients:
        smuggled = lingering()
        smuggle(client, HEALTH[:10], smuggled.fileno())
        if served.http._closer.filters_descriptors:
            kept.append(smuggled)
        else:
            smuggled.close()
    with trio.fail_after(1):
        assert (await served.ask("GET", "/v1/health")).status == 200
    for peer_end in KEPT:
        peer_end.close()
    for held in (*clients, *kept):
        held.close()


async def test_received_descriptors_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    closer = Closer(filters_descriptors=False)

    async def look(fds: list[int]) -> None:
        await trio.lowlevel.checkpoint()
        for fd in fds:
            seen.append(os.get_inheritable(fd))
            os.close(fd)

    monkeypatch.setattr(closer, "close_all", look)
    left, theirs = socket.socketpair()
    with trio.socket.from_stdlib_socket(left) as ours, theirs:
        smuggle(theirs, b"x", theirs.fileno())
        with pytest.raises(BadRequest, match="descriptors"):
            await transport.receive(ours, 10, closer)
    assert seen == [False]


async def test_closing_waits_for_its_thread_and_survives_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    closer = Closer(filters_descriptors=False)
    first, second = os.pipe()

    async def no_thread(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", no_thread)
        await closer.close_all([first])
    os.fstat(first)
    await closer.close_all([second])
    for fd in (first, second):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


async def test_lingering_sockets_count_as_connections_until_they_are_closed(served: Served) -> None:
    if served.http._closer.filters_descriptors:
        pytest.skip("nothing lingers where the kernel refuses descriptors")
    with connect(served.path) as client:
        smuggled = lingering()
        smuggle(client, HEALTH[:10], smuggled.fileno())
        smuggled.close()
        client.close()
        with trio.fail_after(5):
            while not served.http._closer._waits:
                await trio.sleep(0.005)
        assert sum(served.gate._open.values()) == 1
        KEPT[0].close()
        with trio.fail_after(5):
            while served.gate._open:
                await trio.sleep(0.01)


def _all(client: socket.socket) -> bytes:
    client.settimeout(5)
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received
