"""The real application, gate and server on a real Unix socket, over a service on fakes; and a raw client of it."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from netnsd import __version__, wire
from netnsd.api import peer
from netnsd.api.app import application
from netnsd.api.attach import AttachServer
from netnsd.api.bearer import Bearer
from netnsd.api.closing import Closer
from netnsd.api.routes import Context
from netnsd.api.server import Gate, HttpServer
from netnsd.api.tcp import TcpGate
from netnsd.api.trail import Trail
from netnsd.core.actor import Actor
from netnsd.core.pace import Pace
from netnsd.observability.events import EventLog
from tests.fakes.world import ALICE, World


class Client:
    """One connection. Everything that waits gives up after five seconds of the clock in use."""

    def __init__(self, stream: trio.abc.HalfCloseableStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        with trio.fail_after(5):
            await self.stream.send_all(data)

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):  # it did not read all that was sent
            while data := await self.stream.receive_some(65536):
                self._buffer += data
        data, self._buffer = self._buffer, b""
        return data

    async def answer(self, *, has_body: bool = True) -> Answer:
        """The next response."""
        with trio.fail_after(5):
            while b"\r\n\r\n" not in self._buffer:
                await self._more()
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = b""
            if headers.get("transfer-encoding") == "chunked":
                body = await self._chunks() if has_body else b""
            elif has_body:
                body = await self._body(int(headers["content-length"]))
            return Answer(int(first.split()[1]), headers, body)

    async def body_of(self, answer: Answer) -> Answer:
        """An answer of which only the head was read, with its body."""
        with trio.fail_after(5):
            return Answer(answer.status, answer.headers, await self._body(int(answer.headers["content-length"])))

    async def _body(self, length: int) -> bytes:
        while len(self._buffer) < length:
            await self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return body

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A request, and its answer. A body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}",
                 *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        return await self.answer(has_body=method != "HEAD")

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self._buffer:
                await self._more()
            size, _, self._buffer = self._buffer.partition(b"\r\n")
            while len(self._buffer) < int(size, 16) + 2:
                await self._more()
            body += self._buffer[:int(size, 16)]
            self._buffer = self._buffer[int(size, 16) + 2:]
            if int(size, 16) == 0:
                return body

    async def _more(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise EOFError(self._buffer)
        self._buffer += data


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. ``body`` is as sent, without chunking."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code; the one shape of errors is checked on the way."""
        return error_of(self)["code"]  # type: ignore[no-any-return]


def error_of(answer: Answer) -> dict[str, Any]:
    """The error that an answer has, in the one shape that all errors have."""
    assert answer.headers["content-type"] == "application/json", answer
    assert answer.headers["netnsd-version"] == __version__, answer
    assert set(answer.json) == {"error"}, answer
    error: dict[str, Any] = answer.json["error"]
    assert set(error) == {"code", "message", "hint", "details"}, answer
    assert error["code"]
    assert error["message"]
    return error


@dataclass(slots=True)
class Served:
    """What ``serving`` yields. ``actor`` is who every connection is from; None: whoever it is."""

    world: World
    path: str
    attach_path: str
    http: HttpServer
    events: EventLog
    gate: Gate
    tcp_gate: TcpGate
    port: int
    audit: EventLog
    actor: Actor | None = ALICE
    handled: list[Actor] = field(default_factory=list)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A connection."""
        async with await trio.open_unix_socket(self.path) as stream:
            yield Client(stream)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A request on a connection of its own."""
        async with self.client() as client:
            return await client.ask(method, path, body, **headers)

    @asynccontextmanager
    async def visit(self) -> AsyncIterator[Client]:
        """A connection by TCP."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            yield Client(stream)

    async def ask_with(self, token: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A request by TCP with a token, or with none for ""."""
        async with self.visit() as client:
            return await client.ask(method, path, body, **({"Authorization": f"Bearer {token}"} if token else {}),
                                    **headers)

    async def raw(self, data: bytes) -> Answer:
        """Send bytes and read one answer, after which the server must close."""
        async with self.client() as client:
            await client.send(data)
            answer = await client.answer()
            assert await client.rest() == b"", "the server went on"
            return answer


@asynccontextmanager
async def serving(directory: Path, *, filters: bool | None = None, connections_per_user: int = 64,
                  actor: Actor | None = ALICE, world: World | None = None,
                  doctor: Callable[[], Any] | None = None, pace: Pace | None = None,
                  tls: ssl.SSLContext | None = None) -> AsyncIterator[Served]:
    """Serve in ``directory``, and by TCP. ``filters``: whether the kernel refuses descriptors; None where it can."""
    world = world or World(directory / "state")
    events, audit = EventLog(world.clock.now), EventLog(world.clock.now)
    trail = Trail(audit.emit)

    async def no_doctor() -> list[wire.Check]:
        return []

    async def read_log(_path: str, tail: int | None, goes_on: Callable[[], bool] | None) -> AsyncIterator[bytes]:
        yield f"tail {tail}\n".encode()
        while goes_on is not None and goes_on():
            await trio.sleep(0.01)

    async def named(user: str) -> Actor | None:
        return next((a for a in world.accounts.values() if user in (a.user, str(a.uid))), None)

    def info() -> wire.Info:
        return wire.Info(version=__version__, pid=1, started_at="", kernel="", supernet="", port_range="",
                         environments=0, published_ports=0, addresses_free=0,
                         pool_size=0, pool_ready=0, features={})

    async with world.running() as environments:
        context = Context(environments, world.templates, lambda: b"netnsd_test 1\n", info, doctor or no_doctor,
                          world.files.log_path, read_log, events.follow, tokens=world.tokens, projects=world.projects,
                          policies=world.policies, named=named, follow_audit=audit.follow, trail=trail)
        api, attach = _listener(directory / "api.sock"), _listener(directory / "attach.sock")
        with api, attach, socket.create_server(("127.0.0.1", 0)) as listener:
            filtered = peer.refuse_descriptors(api) if filters in (True, None) else False
            if filters in (True, None):
                peer.refuse_descriptors(attach)
            closer = Closer(filters_descriptors=filtered)
            gate = Gate("no-such-group", connections_per_user, closer)
            http = HttpServer(Bearer(application(context), world.tokens, pace or Pace(1000, 1000)), closer)
            tcp_gate = TcpGate(http.handle_visitor, supernet=world.plan.supernet, tls=tls,
                               connections_per_user=connections_per_user)
            served = Served(world, str(directory / "api.sock"), str(directory / "attach.sock"), http, events, gate,
                            tcp_gate, listener.getsockname()[1], audit, actor)
            attach_server = AttachServer(environments, closer, trail)

            async def handle(connection: trio.socket.SocketType, real: Actor) -> None:
                served.handled.append(real)
                await http.handle(connection, served.actor or real)

            async def handle_attach(connection: trio.socket.SocketType, real: Actor) -> None:
                await attach_server.handle(connection, served.actor or real)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(gate.serve, api, handle, nursery, http.refusal)
                nursery.start_soon(gate.serve, attach, handle_attach, nursery, attach_server.refusal)
                nursery.start_soon(tcp_gate.run, listener, nursery)
                yield served
                nursery.cancel_scope.cancel()


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(str(path))
    listener.listen(1024)
    return listener
