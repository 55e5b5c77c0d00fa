"""The accept loop of every listening socket: it outlives whatever accept(2) answers."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Awaitable, Callable

import structlog
import trio

_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# What befell one connection before it was accepted: accept(2) passes it on, and the next may be well.
_OF_ONE_CONNECTION = frozenset({
    errno.ECONNABORTED, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.EPERM})
_BREATH_SECONDS = 0.1
_SILENCE_SECONDS = 60.0  # it may last
_log = structlog.get_logger()


async def accept_all(listener: socket.socket, admit: Callable[[trio.socket.SocketType], Awaitable[None]],
                     nursery: trio.Nursery) -> None:
    """Accept for ever; ``admit`` owns each connection, in ``nursery``."""
    accepting = trio.socket.from_stdlib_socket(listener)
    silent_until = -math.inf
    while True:
        try:
            connection, _ = await accepting.accept()
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:
                if trio.current_time() >= silent_until:
                    _log.warning("accept_failed", reason=error.strerror)
                    silent_until = trio.current_time() + _SILENCE_SECONDS
                await trio.sleep(_BREATH_SECONDS)
            elif error.errno not in _OF_ONE_CONNECTION:
                raise
            continue
        nursery.start_soon(admit, connection)
