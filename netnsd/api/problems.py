"""From errors to answers: one body, everywhere."""

from __future__ import annotations

import http
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from netnsd import __version__, wire
from netnsd.errors import InternalError, NetnsdError, Unauthorized

VERSION_HEADER = "Netnsd-Version"
_log = structlog.get_logger()
_encode = msgspec.json.Encoder().encode


def body_of(error: NetnsdError) -> bytes:
    """The JSON body of an error."""
    return _encode(wire.ErrorAnswer(error=wire.ErrorBody(
        code=error.code, message=error.message, hint=error.hint, details=error.details)))


def headers_of(error: NetnsdError) -> dict[str, str]:
    """The headers of an error's answer, beside those of its body."""
    headers = {VERSION_HEADER: __version__}
    if (after := error.details.get("retry_after_seconds")) is not None:
        headers["Retry-After"] = str(after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"  # RFC 6750, 3
    return headers


def fault(method: str, path: str) -> InternalError:
    """The answer to a fault of ours, which is being handled: the log has it, under the id that the answer names."""
    request_id = uuid.uuid4().hex
    _log.exception("request_failed", request_id=request_id, method=method, path=path)
    return InternalError("a fault in netnsd", request_id=request_id,
                         hint="The daemon's log has the details under this request_id.")


async def send(error: NetnsdError, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Answer an ASGI request with an error, after which the connection is closed."""
    body = body_of(error)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
               **headers_of(error)}
    await send({"type": "http.response.start", "status": error.status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})


def response_of(error: NetnsdError) -> bytes:
    """A whole HTTP/1.1 response of an error, after which the connection is closed."""
    body = body_of(error)
    phrase = http.HTTPStatus(error.status).phrase
    return (f"HTTP/1.1 {error.status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{VERSION_HEADER}: {__version__}\r\nConnection: close\r\n\r\n").encode() + body
