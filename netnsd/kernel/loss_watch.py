"""Notice when somebody takes links or names away: what of it was ours, others decide."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import closing

import trio

from netnsd.kernel import libc
from netnsd.kernel.rtnetlink import RTM_DELLINK

_RTMGRP_LINK = 1  # linux/rtnetlink.h
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_EVENT = struct.Struct("iIII")  # inotify(7): watch, mask, cookie, length of the name that follows
# linux/filter.h: load the half word at offset 4, nlmsg_type, as if it were in network order; take what is RTM_DELLINK.
_TYPE = int.from_bytes(struct.pack("=H", RTM_DELLINK), "big")
_FILTER = struct.pack("=HBBIHBBIHBBIHBBI", 0x28, 0, 0, 4, 0x15, 0, 1, _TYPE, 0x06, 0, 0, 0xFFFFFFFF, 0x06, 0, 0, 0)


async def links() -> AsyncGenerator[frozenset[int], None]:
    """Yield the indexes of links that were deleted in this network namespace, soon after; for ever.

    An empty set: the kernel had more to tell than the socket holds. The kernel filters, so that making links costs
    nothing here.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                       socket.NETLINK_ROUTE) as watcher:
        program = ctypes.create_string_buffer(_FILTER)
        watcher.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                           struct.pack("HP", 4, ctypes.addressof(program)))
        watcher.bind((0, _RTMGRP_LINK))
        while True:
            await trio.lowlevel.wait_readable(watcher)
            found, was_lost = _drain(watcher)
            if found or was_lost:
                yield frozenset() if was_lost else frozenset(found)


def _drain(watcher: socket.socket) -> tuple[set[int], bool]:
    """All that there is to read, and whether news was lost: many links that go together are told one by one."""
    found: set[int] = set()
    while True:
        try:
            found.update(_deleted(watcher.recv(1 << 16)))
        except BlockingIOError:
            return found, False
        except OSError:  # ENOBUFS
            return found, True


def _deleted(data: bytes) -> list[int]:
    found, offset = [], 0
    while offset + _HEADER.size + _IFINFO.size <= len(data):
        length, kind, _flags, _sequence, _sender = _HEADER.unpack_from(data, offset)
        # A bridge tells with the same type that a port left it: such a message has the bridge's family.
        family, _type, index, _ifflags, _change = _IFINFO.unpack_from(data, offset + _HEADER.size)
        if kind == RTM_DELLINK and family == socket.AF_UNSPEC:
            found.append(index)
        offset += max((length + 3) & ~3, _HEADER.size)
    return found


async def names(directory: str) -> AsyncGenerator[frozenset[str], None]:
    """Yield the names of files that were removed from ``directory``, or moved, soon after; for ever.

    An empty set: news was lost.
    """
    watcher = libc.inotify_init1(libc.IN_NONBLOCK | libc.IN_CLOEXEC)
    with closing(os.fdopen(watcher, "rb", buffering=0)):
        libc.inotify_add_watch(watcher, directory, libc.IN_DELETE | libc.IN_MOVED_FROM)
        while True:
            await trio.lowlevel.wait_readable(watcher)
            try:
                data = os.read(watcher, 1 << 16)
            except OSError:  # out of memory, say: the next check sees it all
                yield frozenset()
                continue
            found, offset, was_lost = set(), 0, False
            while offset < len(data):
                _watch, mask, _cookie, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                was_lost |= bool(mask & libc.IN_Q_OVERFLOW)
                found.add(os.fsdecode(data[offset:offset + length].rstrip(b"\0")))
                offset += length
            yield frozenset() if was_lost else frozenset(found - {""})
