"""Notice when another tool takes our rules away: a firewall's reload, ``nft flush ruleset``."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator

import trio

# linux/netfilter/nfnetlink.h, nf_tables.h
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_DELETIONS = frozenset((_NFNL_SUBSYS_NFTABLES << 8) | kind for kind in (2, 5, 8))  # NFT_MSG_DEL{TABLE,CHAIN,RULE}
_HEADER = struct.Struct("=IHHII")
_SETTLE_SECONDS = 0.02


async def deletions() -> AsyncGenerator[None, None]:
    """Yield soon after a table, chain or rule was deleted in this network namespace, ours or not; for ever."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                       _NETLINK_NETFILTER) as watcher:
        watcher.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        while True:
            await trio.lowlevel.wait_readable(watcher)
            if _drain(watcher):
                await trio.sleep(_SETTLE_SECONDS)  # what replaces the rules comes in the same breath
                _drain(watcher)
                yield


def _drain(watcher: socket.socket) -> bool:
    """Read all that is there; whether a deletion was among it, or news were lost."""
    found = False
    while True:
        try:
            data = watcher.recv(1 << 16)
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            found = True
            continue
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _flags, _sequence, sender = _HEADER.unpack_from(data, offset)
            found |= kind in _DELETIONS and sender != os.getpid()
            offset += max((length + 3) & ~3, _HEADER.size)
