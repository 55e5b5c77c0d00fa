"""From errors to answers: one body, everywhere."""

from __future__ import annotations

import http

import msgspec

from netnsd import __version__, wire
from netnsd.errors import NetnsdError

VERSION_HEADER = "Netnsd-Version"
_encode = msgspec.json.Encoder().encode


def body_of(error: NetnsdError) -> bytes:
    """The JSON body of an error."""
    return _encode(wire.ErrorAnswer(error=wire.ErrorBody(
        code=error.code, message=error.message, hint=error.hint, details=error.details)))


def response_of(error: NetnsdError) -> bytes:
    """A whole HTTP/1.1 response of an error, after which the connection is closed."""
    body = body_of(error)
    phrase = http.HTTPStatus(error.status).phrase
    return (f"HTTP/1.1 {error.status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{VERSION_HEADER}: {__version__}\r\nConnection: close\r\n\r\n").encode() + body
