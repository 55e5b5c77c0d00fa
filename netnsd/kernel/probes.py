"""Looking at servers from the host, as root may: bounded in time by the caller, in bytes here, and never believed."""

from __future__ import annotations

import errno
import os

import h11
import trio

from netnsd.errors import KernelError

_MOST_HEAD_BYTES = 65536
_PART_BYTES = 8192
# Of the host's own, and not of what is looked at.
_OUR_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EPERM})


class HostProbes:
    """Implements ``core.interfaces.Probes``."""

    async def tcp(self, address: str, port: int) -> str:
        """See ``core.interfaces.Probes``."""
        with _socket() as sock:
            return await _connect(sock, address, port)

    async def http(self, address: str, port: int, path: str) -> str:
        """See ``core.interfaces.Probes``. Redirects are answers; no body is read."""
        with _socket() as sock:
            return await _connect(sock, address, port) or await _status(trio.SocketStream(sock), port, path)


def _socket() -> trio.socket.SocketType:
    try:
        return trio.socket.socket()
    except OSError as error:
        raise KernelError.at("probe", error) from error


async def _connect(sock: trio.socket.SocketType, address: str, port: int) -> str:
    try:
        await sock.connect((address, port))
    except OSError as error:
        if error.errno in _OUR_ERRORS:
            raise KernelError.at("probe", error) from error
        return f"port {port}: {os.strerror(error.errno or 0)}"
    return ""


async def _status(stream: trio.SocketStream, port: int, path: str) -> str:
    connection = h11.Connection(h11.CLIENT)
    # Many servers refuse other names; see README.
    request = h11.Request(method="GET", target=path, headers=[
        ("Host", f"localhost:{port}"), ("User-Agent", "netnsd"), ("Accept", "*/*"), ("Connection", "close")])
    try:
        await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        received = 0
        while received <= _MOST_HEAD_BYTES:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                return "" if 200 <= event.status_code < 400 else f"HTTP status {event.status_code}"
            if event is h11.NEED_DATA:
                data = await stream.receive_some(_PART_BYTES)
                received += len(data)
                connection.receive_data(data)
            elif not isinstance(event, h11.InformationalResponse):
                break
    except h11.RemoteProtocolError:
        return f"port {port}: no answer in HTTP"
    except trio.BrokenResourceError:
        return f"port {port}: {os.strerror(errno.ECONNRESET)}"
    return f"port {port}: an answer without end"
