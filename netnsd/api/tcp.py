"""The API's TCP listener: who may connect at all, and TLS. Who asks is said by each request (``bearer``).

Nobody is known by connecting. Connections of which no request has come with a good token yet are bounded by address and
in all, and have so many seconds; then they count as their user's. Where there are too many, an older one makes room:
on loopback, and behind a translator of addresses, everybody has one address, and who says nothing keeps nobody out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import trio

from netnsd.api.accepting import accept_all
from netnsd.api.closing import Closer
from netnsd.api.transport import SocketTransport, TlsTransport, Transport
from netnsd.core.pace import Pace
from netnsd.errors import ConfigError, KernelError, TooManyConnections

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

HANDSHAKE_SECONDS = 10.0
UNKNOWN_SECONDS = 20.0
UNKNOWN_OF_ONE_ADDRESS = 64
UNKNOWN_IN_ALL = 512
# A handshake takes the loop a millisecond or two.
HANDSHAKES_PER_SECOND = 100.0
HANDSHAKES_AT_ONCE = 200
_BACKLOG = 1024
_SITE_PREFIX = 64  # one site has so many addresses of IPv6, RFC 4291, 2.5.4
# A peer that is gone, or does not read, is noticed: tcp(7).
_KEEP_ALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
               (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
               (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000))


class Visitor:
    """One connection's peer. ``origin``: its address, of IPv6 its site's, for bounds. ``uid``: None until it is known.

    Ended by ``leave``.
    """

    def __init__(self, counts: Counter[object], unknown: dict[Visitor, None], origin: str, per_user: int) -> None:
        self.origin = origin
        self.uid: int | None = None
        self.scope = trio.CancelScope(deadline=trio.current_time() + UNKNOWN_SECONDS)
        self._counts = counts
        self._per_user = per_user
        self._unknown = unknown
        self._held: tuple[object, ...] = (origin, None)
        unknown[self] = None
        counts.update(self._held)

    def become(self, uid: int) -> None:
        """Count as a user's from now on. Raises TooManyConnections."""
        if uid == self.uid:
            return
        if self._counts[uid] >= self._per_user:
            raise TooManyConnections("you have too many connections open", hint="Close some.")
        self.leave()
        self.uid, self._held = uid, (uid,)
        self._counts.update(self._held)
        self.scope.deadline = math.inf

    def make_room(self) -> None:
        """End the connection, for another; it counts no more."""
        self.leave()
        self.scope.cancel()

    def leave(self) -> None:
        """Count no more."""
        self._unknown.pop(self, None)
        self._counts.subtract(self._held)
        for key in self._held:
            if not self._counts[key]:
                del self._counts[key]
        self._held = ()


class TcpGate:
    """Accepts connections of a TCP listener, and hands them on with a Visitor.

    Args:
        serve: owns each connection.
        supernet: environments' addresses, from which nobody is let in: rules keep them out, and this does too.
        tls: wraps each connection, where there is one.
        connections_per_user: more than that are refused.
    """

    def __init__(self, serve: Callable[[Transport, Visitor], Awaitable[None]], *, supernet: ipaddress.IPv4Network,
                 tls: ssl.SSLContext | None, connections_per_user: int) -> None:
        self._serve = serve
        self._supernet = supernet
        self._tls = tls
        self._per_user = connections_per_user
        self._closer = Closer(filters_descriptors=True)  # TCP carries none
        self._handshakes = Pace(HANDSHAKES_PER_SECOND, HANDSHAKES_AT_ONCE)
        # Of each user and each origin of the unknown; None: of all unknown.
        self.counts: Counter[object] = Counter()
        self._unknown: dict[Visitor, None] = {}  # oldest first

    async def run(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        """Accept for ever; connections live in ``nursery``."""
        await accept_all(listener, self._admit, nursery)

    async def _admit(self, connection: trio.socket.SocketType) -> None:
        with connection:
            try:
                address = _address_of(connection)
                for level, option, value in _KEEP_ALIVE:
                    connection.setsockopt(level, option, value)
            except OSError:  # gone already
                return
            if address in self._supernet:
                return
            origin = _origin(address)
            if self._tls is not None and self._handshakes.take(origin, trio.current_time()):
                return
            self._make_room(origin)
            visitor = Visitor(self.counts, self._unknown, origin, self._per_user)
            try:
                with visitor.scope:
                    transport = await self._transport(connection)
                    if transport is not None:
                        await self._serve(transport, visitor)
            finally:
                visitor.leave()

    def _make_room(self, origin: str) -> None:
        """For one more that is unknown. Where all are too many, of the address that has most: it crowds out itself."""
        if self.counts[origin] < UNKNOWN_OF_ONE_ADDRESS:
            if self.counts[None] < UNKNOWN_IN_ALL:
                return
            origin = max((visitor.origin for visitor in self._unknown), key=self.counts.__getitem__)
        next(visitor for visitor in self._unknown if visitor.origin == origin).make_room()

    async def _transport(self, connection: trio.socket.SocketType) -> Transport | None:
        """None where it does not speak TLS."""
        if self._tls is None:
            return SocketTransport(connection, self._closer)
        stream = trio.SSLStream(trio.SocketStream(connection), self._tls, server_side=True, https_compatible=True)
        with trio.move_on_after(HANDSHAKE_SECONDS):
            try:
                await stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            return TlsTransport(stream)
        return None


def _address_of(connection: trio.socket.SocketType) -> Address:
    address = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _origin(address: Address) -> str:
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, _SITE_PREFIX), strict=False))


@contextlib.contextmanager
def opened(where: tuple[Address, int] | None, certificate: str | None,
           key: str | None) -> Iterator[tuple[socket.socket, ssl.SSLContext | None] | None]:
    """A listening socket, and TLS where files are named; None without an address. Raises ConfigError, KernelError."""
    if where is None:
        yield None
        return
    tls = None if certificate is None or key is None else tls_context(certificate, key)
    with listen(*where) as listener:
        yield listener, tls


def listen(address: Address, port: int) -> socket.socket:
    """A listening socket. Raises KernelError, where the address is somebody else's or not there (yet)."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        # SO_REUSEADDR is set, and IPV6_V6ONLY: an address of IPv4 is never seen as one of IPv6.
        return socket.create_server((str(address), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise KernelError(f"[api] listen: {address} port {port}: {error.strerror}",
                          hint="Is another program there, or the address of an interface that is down?") from error


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """TLS 1.2 or later, with the certificate (and its chain) and the key of two PEM files. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"[api] {name}: {path}: {error.strerror}", hint="Name a PEM file that root can read.",
                              key=f"[api] {name}") from error
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"[api] tls_certificate, tls_key: {certificate}, {key}: {_reason(error)}",
                          hint="They are a certificate and its key, in PEM, without a password.",
                          key="[api] tls_certificate") from error
    return context


def _no_password() -> str:
    """Nobody is at a terminal to be asked."""
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
