"""A client's byte stream, guarded before any HTTP library sees it.

h11 accepts, and hypercorn acts on, things that no client of ours needs and that mean two things to two readers:
Content-Length beside Transfer-Encoding, folded headers, bare line feeds, upgrades, the HTTP/2 preface. The guard
reads each request's head itself, refuses those, and passes the rest on, whatever the bytes come by (``transport``).
"""

from __future__ import annotations

import re

import trio

from netnsd.api.transport import Transport
from netnsd.errors import BadRequest, NetnsdError, RequestTimeout

HEAD_BYTES = 32 * 1024
HEAD_SECONDS = 10.0
_REQUEST_LINE = re.compile(rb"[A-Z]{1,16} [\x21-\x7e]{1,8192} HTTP/1\.[01]\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\x20-\x7e\x80-\xff\t]*)\Z")
# No client can send this method. The HTTP library answers a refused request when its turn has come.
REFUSED_METHOD = "REFUSED-"
_REFUSED_REQUEST = f"{REFUSED_METHOD} / HTTP/1.1\r\nHost: netnsd\r\nConnection: close\r\n\r\n".encode()
_REFUSED_FIELDS = {b"transfer-encoding": "Send Content-Length instead.", b"upgrade": "Speak plain HTTP/1.1."}


class GuardedStream:
    """What hypercorn takes for a ``trio.SocketStream``.

    Args:
        transport: where the bytes come from and go to, owned.
    """

    def __init__(self, transport: Transport) -> None:
        self.socket = transport.socket
        self.refusal: NetnsdError | None = None
        self.broken = False
        self._transport = transport
        self._buffer = b""
        self._body_left = 0
        self._closed = trio.Event()

    async def receive_some(self, max_bytes: int) -> bytes:
        """Bytes of checked requests; b"" at the end. ``_REFUSED_REQUEST`` stands for one that is refused, and is last.

        ``refusal`` is its error then.
        """
        if self.refusal is not None:
            await self._closed.wait()
            return b""
        if self._body_left:
            try:
                data = self._buffer or await self._transport.receive(max_bytes)
            except BadRequest as error:  # in the middle of a request, which can have no answer of its own
                raise trio.BrokenResourceError from error
            passed, self._buffer = data[:self._body_left], data[self._body_left:]
            self._body_left -= len(passed)
            return passed
        try:
            return await self._head(max_bytes)
        except NetnsdError as error:
            self.refusal = error
            return _REFUSED_REQUEST

    async def send_all(self, data: bytes) -> None:
        """Send bytes. hypercorn sends an answer in several parts, some of them empty."""
        try:
            await self._transport.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.broken = True
            raise

    async def send_eof(self) -> None:
        """Send no more."""
        await self._transport.send_eof()

    async def aclose(self) -> None:
        """Close it."""
        self._closed.set()
        await self._transport.aclose()
        await trio.lowlevel.checkpoint()

    def shut(self) -> None:
        """End the connection now, whoever is blocked on it."""
        self._transport.shut()

    async def _head(self, max_bytes: int) -> bytes:
        data = self._buffer or await self._transport.receive(max_bytes)
        with trio.move_on_after(HEAD_SECONDS) as deadline:
            while (end := data.find(b"\r\n\r\n")) < 0:
                _check_partial(data)
                more = await self._transport.receive(max_bytes)
                if not more:
                    return b""
                data += more
        if deadline.cancelled_caught:
            raise RequestTimeout(f"the request's head took more than {HEAD_SECONDS:g} s", hint="Send it at once.")
        if end > HEAD_BYTES:
            raise BadRequest("the request's head is too large", hint=f"At most {HEAD_BYTES} bytes.")
        self._body_left = _body_length(data[:end])
        length = end + 4 + min(self._body_left, len(data) - end - 4)
        self._body_left -= length - end - 4
        self._buffer = data[length:]
        return data[:length]


def _check_partial(data: bytes) -> None:
    if len(data) > HEAD_BYTES:
        raise BadRequest("the request's head is too large", hint=f"At most {HEAD_BYTES} bytes.")
    if b"\n\n" in data or (b"\n" in data and b"\r\n" not in data):
        raise BadRequest("the request has a bare line feed", hint="Lines end with CR LF.")


def _body_length(head: bytes) -> int:
    """The length of a request's body, from its checked head. Raises BadRequest."""
    lines = head.split(b"\r\n")
    if not _REQUEST_LINE.match(lines[0]):
        raise BadRequest("the first line is not METHOD PATH HTTP/1.1", hint="Use an HTTP/1.1 client.")
    lengths: list[bytes] = []
    hosts = 0
    for line in lines[1:]:
        field = _FIELD.match(line)
        if field is None:
            raise BadRequest("a header line is malformed", hint="One line per header, no folding, no control bytes.")
        name = field[1].lower()
        if name in _REFUSED_FIELDS:
            raise BadRequest(f"the header {name.decode()} is not accepted", hint=_REFUSED_FIELDS[name])
        hosts += name == b"host"
        if name == b"content-length":
            lengths.append(field[2].strip(b" \t"))
    if len(lengths) > 1 or not all(re.fullmatch(rb"[0-9]{1,12}", length) for length in lengths):
        raise BadRequest("Content-Length is malformed or given twice", hint="Send it once, in decimal.")
    if hosts > 1 or (not hosts and lines[0].endswith(b"1.1")):
        raise BadRequest("the header host is missing or given twice", hint="Send it once.")
    return int(lengths[0]) if lengths else 0

