"""Notice when another tool changes our rules: a firewall's reload, ``nft flush ruleset``, an element by hand.

What we change ourselves does not even wake the daemon: the kernel drops it by its sender.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import AsyncGenerator, Iterable

import trio

from netnsd.kernel.ruleset import TABLES

# linux/netfilter/nfnetlink.h, nf_tables.h
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWGEN = 15
_NAME = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE and NFTA_SET_ELEM_LIST_TABLE alike
_HEADER = struct.Struct("=IHHII")
_GENERIC_BYTES = 4
_ATTRIBUTE = struct.Struct("=HH")
_SENDER_OFFSET = 12
_FAMILIES = {"ip": socket.AF_INET, "bridge": socket.AF_BRIDGE}
_TABLES = frozenset((_FAMILIES[family], name.encode() + b"\0") for family, name in TABLES)
# linux/filter.h: classic BPF
_SO_ATTACH_FILTER = 26
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_ALL = 0xFFFFFFFF
# Who changes rules in a loop is answered so often, at most; the first change is answered at once.
_BREATH_SECONDS = 0.01


class RulesetWatch:
    """Listens from when it is made, in the network namespace of its thread. Close it.

    Args:
        own: the port ids of the sockets by which we change it ourselves.
    """

    def __init__(self, own: Iterable[int]) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
        try:
            _drop(self._socket, set(own))
            self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    async def changes(self) -> AsyncGenerator[None, None]:
        """Yield as soon as anything of the table was changed by others, or news of it were lost; for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if self._drain():
                yield
                await trio.sleep(_BREATH_SECONDS)

    def _drain(self) -> bool:
        """Read all that is there; whether it concerns the table, or news were lost."""
        found = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS: news was lost; out of memory, it may have been
                return True
            offset = 0
            while not found and offset + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, offset)
                found = self._concerns(kind, data[offset + _HEADER.size:offset + length])
                offset += max((length + 3) & ~3, _HEADER.size)

    def _concerns(self, kind: int, body: bytes) -> bool:
        """Whether a message is about the table: it is the first attribute of all of them but the generation's."""
        if kind == _NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_NEWGEN or len(body) < _GENERIC_BYTES + _ATTRIBUTE.size:
            return False
        length, attribute = _ATTRIBUTE.unpack_from(body, _GENERIC_BYTES)
        value = body[_GENERIC_BYTES + _ATTRIBUTE.size:_GENERIC_BYTES + length]
        return attribute == _NAME and (body[0], value) in _TABLES


def _drop(watcher: socket.socket, senders: set[int]) -> None:
    """Have the kernel drop what ``senders`` (port ids) brought about: all of one datagram is of one transaction.

    A filter loads words in network order, whatever order netlink has them in.
    """
    compare = [_INSTRUCTION.pack(_JUMP_EQUAL, len(senders) - number, 0, socket.htonl(sender))
               for number, sender in enumerate(sorted(senders))]
    program = b"".join([_INSTRUCTION.pack(_LOAD_WORD, 0, 0, _SENDER_OFFSET), *compare,
                        _INSTRUCTION.pack(_RETURN, 0, 0, _ALL), _INSTRUCTION.pack(_RETURN, 0, 0, 0)])
    buffer = ctypes.create_string_buffer(program, len(program))
    watcher.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                       struct.pack("HL", len(program) // _INSTRUCTION.size, ctypes.addressof(buffer)))
