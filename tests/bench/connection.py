"""A keep-alive connection to the daemon's socket, with nothing in the way: what is timed is the daemon."""

from __future__ import annotations

import json
import re
import socket
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

_WORK = re.compile(rb"(?im)^server-timing:.*\bwork;dur=([0-9.]+)")
_LENGTH = re.compile(rb"(?im)^content-length: *(\d+)")
_CLOSES = re.compile(rb"(?im)^connection: *close")
# Far more than anything here takes: a daemon that hangs ends the run with an error, not never.
_PATIENCE_SECONDS = 300.0


class Answer(NamedTuple):
    """``took``: microseconds from sending the request to having all of the answer; ``work``: the daemon's own part."""

    took: float
    work: float
    body: Any


class RefusedError(AssertionError):
    """The daemon answered with an error."""

    def __init__(self, request: str, status: int, body: str) -> None:
        super().__init__(f"{request}: {status} {body}")
        self.status = status
        self.body = body


class LostError(AssertionError):
    """The daemon went away within an answer."""


class Connection:
    """One connection, connected again when the daemon ends it after an answer. Close it, or use it as a context."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_PATIENCE_SECONDS)
        self._socket.connect(self._path)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def request(self, method: str, path: str, body: object = None) -> Answer:
        """Ask, and wait for the whole answer. Raises RefusedError where it is an error."""
        request = encode(method, path, body)
        start = time.perf_counter()
        self._socket.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        assert length is not None, head
        missing = int(length[1]) - len(rest)
        chunks = [rest]
        while missing > 0:
            chunks.append(self._receive())
            missing -= len(chunks[-1])
        took = (time.perf_counter() - start) * 1e6
        if _CLOSES.search(head):  # a server may bound the requests of one connection
            self.close()
            self._connect()
        content = b"".join(chunks)
        status = int(head.split(b" ", 2)[1])
        if not 200 <= status < 300:
            raise RefusedError(f"{method} {path}", status, content.decode(errors="replace"))
        work = _WORK.search(head)
        return Answer(took, float(work[1]) * 1000 if work else 0.0, json.loads(content))

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise LostError("the daemon closed the connection")
        return data


def encode(method: str, path: str, body: object = None) -> bytes:
    """A request, ready to be sent."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload
