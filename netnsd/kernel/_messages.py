"""How daemon and launcher speak: SOCK_SEQPACKET messages of a fixed header, a small JSON object, and descriptors.

Part of the launcher: standard library only.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any

PROTOCOL = 2
HEADER = struct.Struct("=HHQ")  # protocol, Kind, the request's id (0: not an answer)
MAX_MESSAGE_BYTES = 32768
MAX_ENCLOSED_BYTES = 16384
MAX_SEALED_BYTES = 16 << 20  # far more than a request may have, or exec takes
MAX_DESCRIPTORS = 4
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_MAX_BACKLOG = 4096


class Kind(enum.IntEnum):
    """What a message is. Answers have their request's kind and id, or are an ERROR."""

    HELLO = 1
    SPAWN = 2
    ATTACH = 3
    KNOWN = 4
    ACKNOWLEDGE = 5
    EXIT = 6
    ERROR = 7
    PREPARE = 8


def encode(kind: Kind, request: int, body: dict[str, Any] | None = None, enclosed: bytes = b"") -> bytes:
    """One message. What is ``enclosed``, an order, is for whom it is passed on to."""
    return HEADER.pack(PROTOCOL, kind, request) + json.dumps(body or {}).encode() + b"\0" + enclosed


def enclosed_in(data: bytes) -> bytes:
    """What ``encode`` enclosed."""
    return data[HEADER.size :].partition(b"\0")[2]


def decode(data: bytes) -> tuple[Kind, dict[str, Any]]:
    """The inverse of ``encode``, but for the request's id and what is enclosed. Raises ValueError."""
    if len(data) < HEADER.size:
        raise ValueError("a message without a header")
    protocol, kind, _request = HEADER.unpack_from(data)
    if protocol != PROTOCOL:
        raise ValueError(f"protocol {protocol} is not spoken here, {PROTOCOL} is")
    try:
        body = json.loads(data[HEADER.size :].partition(b"\0")[0])
    except RecursionError as error:
        raise ValueError("a message that is nested too deep") from error
    if not isinstance(body, dict):
        raise ValueError("a message without an object")  # noqa: TRY004  # malformed, as a value
    return Kind(kind), body


def sealed_memfd(data: bytes) -> int:
    """A memfd with ``data`` that nobody can change any more. The caller closes it."""
    fd = os.memfd_create("netnsd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, len(data))
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], written)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int) -> bytes:
    """All of a memfd. Raises ValueError where it is not sealed, as its writer could change it meanwhile, or huge."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("the order is not sealed")
        if os.fstat(fd).st_size > MAX_SEALED_BYTES:
            raise ValueError("the order is too long")
        parts, offset = [], 0
        while part := os.pread(fd, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
    except OSError as error:
        raise ValueError(f"the order cannot be read: {error}") from error
    return b"".join(parts)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which the caller closes. Raises BlockingIOError; no bytes: the end."""
    room = socket.CMSG_SPACE(MAX_DESCRIPTORS * struct.calcsize("i"))
    data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for level, kind, rights in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
           for fd in struct.unpack(f"{len(rights) // 4}i", rights)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        data = data[: HEADER.size]  # too long to be one of ours: its answer is an error
    return data, fds


def send(connection: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One message, whole or not at all. Raises BlockingIOError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    connection.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Request:
    """A message from the daemon. Its descriptors are open while it is handled."""

    __slots__ = ("body", "connection", "enclosed", "fds", "number")

    def __init__(self, connection: Connection, number: int, body: dict[str, Any], enclosed: bytes,
                 fds: list[int]) -> None:
        self.connection = connection
        self.number = number
        self.body = body
        self.enclosed = enclosed
        self.fds = fds

    @property
    def launch_id(self) -> str:
        """Raises ValueError."""
        launch_id = self.body.get("launch_id")
        if not isinstance(launch_id, str):
            raise ValueError("no launch_id")  # noqa: TRY004  # malformed, as a value
        return launch_id

    def descriptors(self, *counts: int) -> list[int]:
        """Raises ValueError where they are not as many as one of ``counts``."""
        if len(self.fds) not in counts:
            raise ValueError(f"{len(self.fds)} descriptors are not what belongs to it")
        return self.fds

    def order(self) -> tuple[list[int], bytes]:
        """Group, namespace and log or connection; and the order, which is in a memfd where it is long."""
        fds = self.descriptors(3, 4)
        return fds[:3], self.enclosed if len(fds) == 3 else read_sealed(fds[3])


class Connection:
    """A daemon's connection. Messages that do not fit yet wait; one that reads nothing for too long is dropped."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.closed = False
        self._backlog: deque[tuple[bytes, int | None]] = deque()

    def post(self, data: bytes, fd: int | None = None) -> None:
        """Send now or later; closes ``fd`` then. A connection that cannot be written to closes itself."""
        self._backlog.append((data, fd))
        if len(self._backlog) > _MAX_BACKLOG:
            self.close()
        elif len(self._backlog) == 1:
            self.flush()

    def flush(self) -> None:
        """Send what fits."""
        while self._backlog:
            data, fd = self._backlog[0]
            try:
                send(self.socket, data, () if fd is None else (fd,))
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._backlog.popleft()
            if fd is not None:
                os.close(fd)

    @property
    def is_behind(self) -> bool:
        """Whether messages wait."""
        return bool(self._backlog)

    def close(self) -> None:
        """The socket is shut and read to its end by its owner's loop; what waits is dropped."""
        if not self.closed:
            self.closed = True
            while self._backlog:
                _data, fd = self._backlog.popleft()
                if fd is not None:
                    os.close(fd)
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
