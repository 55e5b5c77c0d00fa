"""Waiting for links to be up in fact: the kernel tells a bridge of its port's carrier a moment after the port has it.

A packet that is sent in between is dropped, and a client's first connection would hang for a second.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import time

_SIOCGIFFLAGS = 0x8913  # linux/sockios.h
_IFF_RUNNING = 0x40
_REQUEST = struct.Struct("16sH22x")  # struct ifreq, linux/if.h
_MOST_SECONDS = 0.1
_PAUSE_SECONDS = 0.0002


def await_running(*names: str) -> None:
    """Return when all these links of the calling thread's namespace are running, or after a tenth of a second.

    Stops its thread, so it is for NamespaceThread alone. Raises OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        deadline = time.monotonic() + _MOST_SECONDS
        for name in names:
            while not _runs(asker, name) and time.monotonic() < deadline:
                select.select((), (), (), _PAUSE_SECONDS)  # no loop runs in this thread


def _runs(asker: socket.socket, name: str) -> bool:
    answer = fcntl.ioctl(asker, _SIOCGIFFLAGS, _REQUEST.pack(name.encode(), 0))
    return bool(_REQUEST.unpack(answer)[1] & _IFF_RUNNING)
