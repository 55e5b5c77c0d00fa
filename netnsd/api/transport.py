"""What bytes come by: a socket, or TLS over one. The guard in front of the HTTP library does not know which.

A Unix socket's client may smuggle in descriptors beside the bytes (see ``peer.refuse_descriptors``): they are closed.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from typing import Protocol

import trio

from netnsd.api.closing import Closer
from netnsd.errors import BadRequest

_MOST_DESCRIPTORS = 253  # SCM_MAX_FD, net/core/scm.c


class Transport(Protocol):
    """Raises trio.BrokenResourceError and trio.ClosedResourceError as trio's streams do."""

    socket: trio.socket.SocketType

    async def receive(self, max_bytes: int) -> bytes:
        """Bytes; b"" at the end. Raises BadRequest where descriptors come with them."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def send_eof(self) -> None:
        """Send no more."""
        ...

    async def aclose(self) -> None:
        """Close it, once."""
        ...

    def shut(self) -> None:
        """End the connection now, whoever is blocked on it."""
        ...


class SocketTransport:
    """A connected stream socket, Unix or TCP.

    Args:
        connection: owned.
        closer: closes it.
    """

    def __init__(self, connection: trio.socket.SocketType, closer: Closer) -> None:
        self.socket = connection
        self._closer = closer
        self._stream = trio.SocketStream(connection)

    async def receive(self, max_bytes: int) -> bytes:
        """See ``Transport``."""
        try:
            return await receive(self.socket, max_bytes, self._closer)
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def send_all(self, data: bytes) -> None:
        """What the socket takes at once goes without a turn of the loop, which costs more than it."""
        sent = self._send_now(data)
        if sent < len(data):
            await self._stream.send_all(data[sent:])

    def _send_now(self, data: bytes) -> int:
        try:
            return os.write(self.socket.fileno(), data) if data else 0
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """See ``Transport``."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See ``Transport``."""
        await self._closer.close(self.socket)

    def shut(self) -> None:
        """See ``Transport``."""
        shut(self.socket)


class TlsTransport:
    """TLS over a TCP socket, after its handshake.

    Args:
        stream: owned. Its end is the socket's: no HTTP client waits for TLS to say goodbye.
    """

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.socket = stream.transport_stream.socket
        self._stream = stream

    async def receive(self, max_bytes: int) -> bytes:
        """See ``Transport``."""
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes) -> None:
        """See ``Transport``."""
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        """See ``Transport``."""
        await self._stream.transport_stream.send_eof()

    async def aclose(self) -> None:
        """See ``Transport``."""
        await self._stream.aclose()

    def shut(self) -> None:
        """See ``Transport``."""
        shut(self.socket)


def shut(connection: trio.socket.SocketType) -> None:
    """End a connection now, whoever is blocked on it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EBADF):
            raise


async def receive(connection: trio.socket.SocketType, max_bytes: int, closer: Closer) -> bytes:
    """Read bytes. Raises OSError, and BadRequest where descriptors come with them, which are closed."""
    if closer.filters_descriptors:
        return await connection.recv(max_bytes)
    data, ancillary, _flags, _address = await connection.recvmsg(
        max_bytes, socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[:len(payload) - len(payload) % descriptors.itemsize])
    if descriptors:
        await closer.close_all(list(descriptors))
        raise BadRequest("descriptors came with the request", hint="Send bytes alone.")
    return data
