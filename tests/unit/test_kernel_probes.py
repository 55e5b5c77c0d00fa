"""What answers is asked as a browser would, and not believed: not its length, not its pace, not its words."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from netnsd.errors import KernelError
from netnsd.kernel.probes import HostProbes

ADDRESS = "127.0.0.1"
Answer = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[int]:
    """A listener on loopback; yields its port."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=ADDRESS)

        async def handle(stream: trio.SocketStream) -> None:
            try:
                async with stream:
                    await answer(stream)
            except trio.BrokenResourceError:
                pass  # it has heard enough

        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def saying(data: bytes) -> Answer:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(data)

    return answer


async def silence(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind((ADDRESS, 0))
        port: int = sock.getsockname()[1]
        return port


async def test_a_port_accepts_or_it_does_not() -> None:
    async with server(silence) as port:
        assert await HostProbes().tcp(ADDRESS, port) == ""
    port = closed_port()
    assert await HostProbes().tcp(ADDRESS, port) == f"port {port}: Connection refused"
    assert await HostProbes().http(ADDRESS, port, "/") == f"port {port}: Connection refused"


@pytest.mark.parametrize(("status", "good"), [(199, False), (200, True), (204, True), (301, True), (399, True),
                                              (400, False), (404, False), (503, False), (599, False)])
async def test_2xx_and_3xx_are_good_and_no_redirect_is_followed(status: int, good: bool) -> None:
    answer = f"HTTP/1.1 {status} whatever\r\nLocation: http://192.0.2.1/\r\nContent-Length: 9\r\n\r\n"
    async with server(saying(answer.encode())) as port:
        with trio.fail_after(5):
            found = await HostProbes().http(ADDRESS, port, "/")
        # 199 is informational: the answer proper never comes.
        assert found == ("" if good else f"HTTP status {status}" if status >= 200 else
                         f"port {port}: no answer in HTTP")


async def test_the_request_is_one_that_dev_servers_take() -> None:
    heard = []

    async def answer(stream: trio.SocketStream) -> None:
        heard.append(await stream.receive_some(65536))
        await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\n")

    async with server(answer) as port:
        assert await HostProbes().http(ADDRESS, port, "/healthz?a=b") == ""
        lines = heard[0].decode().split("\r\n")
        assert lines[0] == "GET /healthz?a=b HTTP/1.1"
        assert {f"Host: localhost:{port}", "Connection: close"} <= set(lines)
        assert heard[0].endswith(b"\r\n\r\n")


async def test_a_continue_before_the_answer_is_not_the_answer() -> None:
    async with server(saying(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")) as port:
        assert await HostProbes().http(ADDRESS, port, "/") == ""


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200\r\nbad header\r\n\r\n", b"HTTP/1.1 9 x\r\n\r\n",
                                  b"\0" * 100, b"HTTP/1.1 200 OK\r\nX: y"])
async def test_what_is_not_http_is_not_good(data: bytes) -> None:
    async with server(saying(data)) as port:
        with trio.fail_after(5):
            assert await HostProbes().http(ADDRESS, port, "/") == f"port {port}: no answer in HTTP"


@pytest.mark.parametrize("piece", [b"x" * 4096, b"X: y\r\n" * 600, b"HTTP/1.1 100 Continue\r\n\r\n" * 100])
async def test_an_answer_without_end_is_given_up_soon(piece: bytes) -> None:
    sent = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal sent
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n" if not piece.startswith(b"HTTP") else b"")
        while True:
            await stream.send_all(piece)
            sent += len(piece)

    async with server(answer) as port:
        with trio.fail_after(10):
            assert await HostProbes().http(ADDRESS, port, "/") != ""


async def test_a_reset_is_told() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    async with server(answer) as port:
        assert await HostProbes().http(ADDRESS, port, "/") == f"port {port}: Connection reset by peer"


async def test_what_the_host_lacks_is_not_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.socket, "socket", lambda: (_ for _ in ()).throw(OSError(24, "")))
    with pytest.raises(KernelError):
        await HostProbes().tcp(ADDRESS, 1)
    with pytest.raises(KernelError):
        await HostProbes().http(ADDRESS, 1, "/")
