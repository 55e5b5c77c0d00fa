"""HTTP/1.1 over a Unix socket, one connection per request, with plain sockets: http.client would double our start.

Raises the errors of ``netnsd.errors``: those the daemon answered, and the client's own (DaemonUnreachable,
SocketForbidden, BadAnswer).
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time

import netnsd
from netnsd.errors import (
    BadAnswer,
    DaemonUnreachable,
    NetnsdError,
    NotFound,
    Overloaded,
    ShuttingDown,
    SocketForbidden,
    TooManyCreations,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

CONNECT_SECONDS = 30
ANSWER_SECONDS = 120.0
# How long a daemon that has too much to do is asked again, and not more often than that.
PATIENCE_SECONDS = 30.0
_LEAST_PAUSE_SECONDS = 0.1
_AGAIN_SECONDS = 0.2
_HEAD_BYTES_MAX = 65536
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def quote(text: str) -> str:
    """Percent-encode all but RFC 3986's unreserved characters."""
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in text.encode("utf-8", "surrogateescape"))


def check_ref(ref: str, what: str = "environment") -> str:
    """What can be a name, NAME.USER or id. Raises NotFound for anything else.

    A slash or a dot segment would lead to another route.
    """
    if not ref or ref in (".", "..") or "/" in ref or not ref.isprintable():
        verb = "ls" if what == "environment" else f"{what} ls"
        many = f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"
        raise NotFound(f"no {what} {ref!r}", hint=f"`netnsctl {verb}` lists your {many}.", ref=ref)
    return ref


def environment_path(ref: str, *rest: str, **query: object) -> str:
    """The path of an environment's route. Raises NotFound for what can be no name, NAME.USER or id."""
    return with_query("/".join(("/v1/environments", quote(check_ref(ref)), *rest)), **query)


def with_query(path: str, **query: object) -> str:
    """A path with the parameters that are not None."""
    pairs = [f"{key}={quote(str(value))}" for key, value in query.items() if value is not None]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def template_path(ref: str) -> str:
    """The path of a template's route. Raises NotFound for what can be no name or id."""
    return f"/v1/templates/{quote(check_ref(ref, 'template'))}"


def token_path(ref: str) -> str:
    """The path of a token's route. Raises NotFound for what can be no name or id."""
    return f"/v1/tokens/{quote(check_ref(ref, 'token'))}"


def policy_path(ref: str) -> str:
    """The path of a policy's route. Raises NotFound for what can be no name or NAME.USER."""
    return f"/v1/policies/{quote(check_ref(ref, 'policy'))}"


def quota_path(user: str) -> str:
    """The path of a user's quota's route. Raises NotFound for what can be no name or number."""
    return f"/v1/quotas/{quote(check_ref(user, 'user'))}"


def connect(path: str) -> socket.socket:
    """A blocking connection to a Unix socket. Raises DaemonUnreachable or SocketForbidden; the caller closes it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A Python timeout makes the socket non-blocking, and then a full backlog is EAGAIN at once; SO_SNDTIMEO waits.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", CONNECT_SECONDS, 0))
    try:
        connection.connect(path)
    except (OSError, ValueError) as error:
        connection.close()
        _refused(path, error)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))
    return connection


def _refused(path: str, error: OSError | ValueError) -> NoReturn:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM):
        raise SocketForbidden(f"you may not open {path}", hint=_group_hint(path), socket=path) from error
    if number in (errno.ENOENT, errno.ENOTDIR):
        message = f"no netnsd at {path}"
        hint = "start it (systemctl start netnsd), or name its socket in NETNSD_SOCKET."
    elif number == errno.ECONNREFUSED:
        message, hint = f"nothing listens at {path}", "netnsd has ended; start it (systemctl start netnsd)."
    elif number in (errno.EAGAIN, errno.ETIMEDOUT):
        message, hint = f"netnsd takes no connection at {path}", "it is overloaded or stuck; its log may tell."
    else:
        reason = os.strerror(number) if number else str(error)
        message, hint = f"cannot reach netnsd at {path}: {reason}", "name its socket in NETNSD_SOCKET or --socket."
    raise DaemonUnreachable(message, hint=hint, socket=path) from error


def _group_hint(path: str) -> str:
    """Who may open the socket, as far as we may see it."""
    import grp

    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        return "join the socket's group, and log in again."
    if group == "root":
        return "only root may; an admin can set [daemon] socket_group."
    return f"join the group {group} (as root: usermod -aG {group} YOU), and log in again."


def error_from(body: object) -> NetnsdError | None:
    """The error of the class that its code names, from an error body; None where it is none."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        return None
    code = error["code"]
    kinds = {kind.code: kind for kind in NetnsdError.__subclasses__()}
    # A newer daemon may know conditions that we do not: their code still reaches the caller.
    kind: type[NetnsdError] = kinds.get(code) or type("UnknownError", (NetnsdError,), {"code": code})
    made = kind(str(error.get("message") or code), hint=str(error.get("hint") or ""))
    details = error.get("details")
    made.details = details if isinstance(details, dict) else {}
    return made


class Client:
    """Talks to the daemon at ``path``. ``warn`` is told, once, that the versions differ."""

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        self.path = path
        self.daemon_version: str | None = None
        self._warn = warn

    def request(self, method: str, path: str, body: object = None, seconds: float | None = ANSWER_SECONDS) -> Any:
        """Send a request and return the answer's JSON value; ``seconds`` as for ``begin``."""
        return self.begin(method, path, body, seconds).value()

    def request_patiently(self, method: str, path: str, body: object, patience: float = PATIENCE_SECONDS) -> Any:
        """As ``request``; where the daemon says when to ask again, do so, for ``patience`` seconds in all.

        So it is where the connection is lost, or the daemon is stopping: all are sent under one key, by which it knows
        what it has done already. Where there is no daemon from the first, that is said at once.
        """
        give_up = time.monotonic() + patience
        key = os.urandom(16).hex()
        exchange: Exchange | None = self.begin(method, path, body, key=key)
        while True:
            try:
                exchange = exchange or self.begin(method, path, body, key=key)
                return exchange.value()
            except (Overloaded, TooManyCreations, DaemonUnreachable, ShuttingDown) as error:
                is_told = isinstance(error, Overloaded | TooManyCreations)
                pause = exchange.retry_after if exchange and is_told else _AGAIN_SECONDS
                if pause is None or time.monotonic() + pause > give_up:
                    raise
            exchange = None
            time.sleep(max(pause, _LEAST_PAUSE_SECONDS))  # noqa: TID251  # no loop here, and the daemon said when

    def stream(self, path: str) -> Iterator[bytes]:
        """GET a body of bytes, piece by piece as they come."""
        return self.begin("GET", path, None, None).pieces()

    def begin(self, method: str, path: str, body: object = None, seconds: float | None = ANSWER_SECONDS,
              key: str | None = None) -> Exchange:
        """Send a request on a connection of its own; the caller takes the answer's ``value()`` or ``pieces()``.

        Each piece of the answer may take ``seconds``, None for ever. ``key``: an Idempotency-Key. Raises
        DaemonUnreachable or SocketForbidden.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        head = (f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: netnsctl/{netnsd.__version__}\r\n"
                "Accept: */*\r\nConnection: close\r\n")
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        if key is not None:
            head += f'Idempotency-Key: "{key}"\r\n'
        if body is None and method != "GET":
            head += "Content-Length: 0\r\n"
        connection = connect(self.path)
        connection.settimeout(seconds)
        try:
            connection.sendall(head.encode() + b"\r\n" + payload)
        except (BrokenPipeError, ConnectionResetError):
            # A daemon that refuses a body early answers, and then reads no more: the answer may be there.
            pass
        except TimeoutError as error:
            connection.close()
            raise DaemonUnreachable("netnsd does not read the request", hint="it is overloaded or stuck.") from error
        return Exchange(self, connection)

    def check_version(self, version: str | None) -> None:
        """Take note of the answering daemon's version. Raises BadAnswer where it is not a netnsd."""
        if version is None:
            self.not_a_netnsd()
        if self.daemon_version is None and version.split(".")[:2] != netnsd.__version__.split(".")[:2]:
            self._warn(f"netnsctl {netnsd.__version__} talks to netnsd {version}: not all may work; install the same "
                       "version of both")
        self.daemon_version = version

    def not_a_netnsd(self) -> NoReturn:
        """Raises BadAnswer: something else has the socket."""
        raise BadAnswer(f"what answers at {self.path} is not a netnsd", hint="name its socket in NETNSD_SOCKET.")

    def bad_answer(self, what: str) -> BadAnswer:
        """The error for an answer that we cannot read; it names both versions."""
        ours, its = netnsd.__version__, self.daemon_version
        return BadAnswer(f"netnsctl {ours} cannot read the answer of netnsd {its}: {what}", client=ours, daemon=its,
                         hint="install the same version of both.")


class Exchange:
    """A request that was sent, and its answer as it comes. Owns the connection and closes it at the answer's end.

    ``retry_after``: in how many seconds the daemon wants to be asked again, where its answer says so.
    """

    def __init__(self, client: Client, connection: socket.socket) -> None:
        self.retry_after: float | None = None
        self._client = client
        self._connection = connection
        self._buffer = b""

    def value(self) -> Any:
        """The answer's JSON value. Raises what the daemon answered, DaemonUnreachable or BadAnswer."""
        with self._connection:
            status, headers = self._head()
            return self._value(status, b"".join(self._body(headers)))

    def pieces(self) -> Iterator[bytes]:
        """The answer's body as it comes. Raises like ``value``."""
        with self._connection:
            status, headers = self._head()
            if status != 200:
                self._value(status, b"".join(self._body(headers)))
            yield from self._body(headers)

    def _value(self, status: int, body: bytes) -> Any:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._client.bad_answer(f"status {status}, not JSON") from error
        if 200 <= status < 300:
            return value
        raise error_from(value) or self._client.bad_answer(f"status {status} without an error")

    def _head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (names in lower case)."""
        while b"\r\n\r\n" not in self._buffer:
            data = self._receive()
            if not data and not self._buffer:
                raise DaemonUnreachable("netnsd closed the connection without an answer",
                                        hint="it may be restarting; try again.")
            self._buffer += data
            if not data or len(self._buffer) > _HEAD_BYTES_MAX:
                self._client.not_a_netnsd()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        protocol, _, rest = status_line.partition(" ")
        if not protocol.startswith("HTTP/1.") or not rest[:3].isdecimal():
            self._client.not_a_netnsd()
        self._client.check_version(headers.get("netnsd-version"))
        after = headers.get("retry-after", "")
        self.retry_after = float(after) if after.isascii() and after.isdigit() else None
        return int(rest[:3]), headers

    def _body(self, headers: dict[str, str]) -> Iterator[bytes]:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunks()
            return
        length = headers.get("content-length")
        if length is None:
            while data := self._take() or self._receive():
                yield data
            return
        if not length.isdecimal():
            raise self._client.bad_answer("its length is not a number")
        left = int(length)
        while left:
            data = self._take() or self._arriving()
            yield data[:left]
            left -= min(left, len(data))

    def _chunks(self) -> Iterator[bytes]:
        while size := self._chunk_size():
            left = size + 2
            while left:
                data = self._take(left) or self._arriving()
                if len(data) > left:
                    data, self._buffer = data[:left], data[left:]
                # A chunk ends with CRLF, which is not the body's and may come apart.
                if content := data[:max(0, left - 2)]:
                    yield content
                left -= len(data)

    def _chunk_size(self) -> int:
        while b"\r\n" not in self._buffer:
            self._buffer += self._arriving()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        try:
            return int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise self._client.bad_answer("a chunk's size is not a number") from error

    def _take(self, most: int | None = None) -> bytes:
        data, self._buffer = self._buffer[:most], b"" if most is None else self._buffer[most:]
        return data

    def _arriving(self) -> bytes:
        """The next bytes of an answer that is not whole yet."""
        data = self._receive()
        if not data:
            raise DaemonUnreachable("netnsd went away in the middle of its answer",
                                    hint="it may be restarting; try again.")
        return data

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(65536)
        except TimeoutError as error:
            raise DaemonUnreachable("netnsd does not answer", hint="it is overloaded or stuck; its log may tell.",
                                    ) from error
        except ConnectionError:
            return b""
