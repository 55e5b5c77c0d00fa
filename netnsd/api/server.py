"""One hypercorn server per connection, and who the peer of a Unix socket is.

Of a Unix socket the caller's identity is taken before any byte is parsed, and connections are counted per uid; of TCP
see ``tcp``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

from netnsd.api import peer, problems
from netnsd.api.accepting import accept_all
from netnsd.api.closing import Closer
from netnsd.api.stream import HEAD_BYTES, REFUSED_METHOD, GuardedStream
from netnsd.api.tcp import Visitor
from netnsd.api.transport import SocketTransport, TlsTransport, Transport
from netnsd.core.actor import Actor
from netnsd.core.tokens import VOUCHED_FOR
from netnsd.errors import TooManyConnections

_KEEP_ALIVE_SECONDS = 75.0

Handler = Callable[[trio.socket.SocketType, Actor], Awaitable[None]]


class Gate:
    """Accepts connections of a Unix listener, knows who they are, and hands them on.

    Args:
        admin_group: its members see everybody's environments.
        connections_per_user: more than that are closed at once; root is not counted.
        closer: closes what is not handed on.
    """

    def __init__(self, admin_group: str, connections_per_user: int, closer: Closer) -> None:
        self._admin_group = admin_group
        self._closer = closer
        self._most = connections_per_user
        self._open: Counter[int] = Counter()

    async def serve(self, listener: socket.socket, handler: Handler, nursery: trio.Nursery,
                    refused: bytes = b"") -> None:
        """Accept for ever; ``handler`` owns each connection, in ``nursery``. ``refused`` is sent to one too many."""
        await accept_all(listener, partial(self._admit, handler=handler, refused=refused), nursery)

    async def _admit(self, connection: trio.socket.SocketType, handler: Handler, refused: bytes) -> None:
        try:
            actor = await peer.actor_of(connection, self._admin_group)
        except BaseException as error:
            await self._closer.close(connection)
            if isinstance(error, OSError):  # gone before it was known
                return
            raise
        if self._open[actor.uid] >= self._most and actor.uid != 0:
            try:
                with trio.move_on_after(1.0), contextlib.suppress(OSError):  # it may be gone already
                    await connection.send(refused)
            finally:
                await self._closer.close(connection)
            return
        self._open[actor.uid] += 1
        try:
            await handler(connection, actor)
        finally:
            self._open[actor.uid] -= 1
            if not self._open[actor.uid]:
                del self._open[actor.uid]


class HttpServer:
    """Serves the application on connections that a Gate admitted."""

    def __init__(self, app: Any, closer: Closer) -> None:
        self._config = Config()
        self._config.keep_alive_timeout = _KEEP_ALIVE_SECONDS
        self._config.keep_alive_max_requests = sys.maxsize
        self._config.h11_max_incomplete_size = 2 * HEAD_BYTES
        self._config.include_server_header = False
        self._config.include_date_header = False
        self._config.errorlog = None
        self._config.accesslog = None
        self._wrapper = ASGIWrapper(_refusing(app))
        self._context = WorkerContext(None)
        self._closer = closer
        self._streams: set[GuardedStream] = set()
        self._stopping = False

    @property
    def refusal(self) -> bytes:
        """What one connection too many is told."""
        return problems.response_of(TooManyConnections("you have too many connections open", hint="Close some."))

    async def handle(self, connection: trio.socket.SocketType, actor: Actor) -> None:
        """Serve one connection to its end, whose peer the kernel vouches for."""
        await self._serve(SocketTransport(connection, self._closer), actor=actor, grant=VOUCHED_FOR,
                          is_certified=False)

    async def handle_visitor(self, transport: Transport, visitor: Visitor) -> None:
        """Serve one connection to its end, each of whose requests has to say by what right it asks."""
        await self._serve(transport, visitor=visitor, is_certified=isinstance(transport, TlsTransport))

    async def _serve(self, transport: Transport, **known: Any) -> None:
        stream = GuardedStream(transport)
        state = ConnectionState(LifespanState({**known, "stopping": lambda: self._stopping,
                                               "refusal": lambda: stream.refusal}))
        self._streams.add(stream)
        try:
            await _Connection(self._wrapper, self._config, self._context, state, stream)  # type: ignore[arg-type]
        finally:
            self._streams.discard(stream)
            await transport.aclose()  # hypercorn does not when it is cancelled

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones end for ``grace_seconds``, then shut what is left.

        hypercorn's sends are shielded from cancellation: a client that does not read would hold us up otherwise.
        """
        self._stopping = True
        await self._context.terminated.set()
        with trio.move_on_after(grace_seconds):
            while self._streams:
                await trio.sleep(0.02)
        for stream in list(self._streams):
            stream.shut()
        self._closer.abandon()


class _Connection(TCPServer):
    """hypercorn's, which would go on after its client has left.

    It waits for the end of the keep-alive time, and for ever where a request waits for its turn behind an answer that
    could not be sent.
    """

    _left = False

    async def run(self) -> None:
        with trio.CancelScope() as self.scope:
            await super().run()

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not (self._left and isinstance(event, Updated)):
            await super().protocol_send(event)
        if self.stream.broken:
            self.scope.cancel()


def _refusing(app: Any) -> Any:
    """The application, and the answers to requests that the guard refused."""
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("method") != REFUSED_METHOD:
            await app(scope, receive, send)
            return
        await problems.send(scope["state"]["refusal"](), send)

    return refusing
