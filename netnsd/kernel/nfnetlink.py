"""The few nf_tables messages of the create path, packed by hand: adding and deleting elements of sets and maps.

libnftables parses text and asks the kernel for its tables before it adds an element, several times the cost of the
message itself. It does all that is not hot; a test decodes every message of this module with pyroute2.

Layouts: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. Integers of the netlink header are in host order,
those of nf_tables in network order.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE = 0x1, 0x4, 0x400
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWSETELEM, _NFT_MSG_DELSETELEM = 12, 14
_TABLE, _SET, _ELEMENTS = 1, 2, 3  # NFTA_SET_ELEM_LIST_*
_LIST_ELEM, _VALUE = 1, 1  # NFTA_LIST_ELEM, NFTA_DATA_VALUE
_KEY, _DATA, _KEY_END = 1, 2, 10  # NFTA_SET_ELEM_*
_NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct(">BBH")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_U16 = struct.Struct(">H")
# A list of elements is one attribute, whose length has 16 bits; an element of ours takes 60 bytes at most.
_ELEMENTS_EACH = 1000
_RECEIVE_BYTES = 65536
# A transaction is sent whole: all passages that there may be, deleted, and as many others added.
_SO_SNDBUFFORCE, _SEND_BYTES = 32, 8 << 20  # asm-generic/socket.h; the kernel doubles it

_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")

PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


class Element(NamedTuple):
    """One of a set or a map: ``data`` is empty for a set, ``end`` except where the key is the first of a range."""

    key: bytes
    data: bytes = b""
    end: bytes = b""


class ElementSocket:
    """A NETLINK_NETFILTER socket of the network namespace in which its thread was when it was opened.

    Args:
        table: its name.
        family: the table's, an address family.
    """

    def __init__(self, table: str, family: int = socket.AF_INET) -> None:
        self._table = _text(_TABLE, table)
        self._family = family
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BYTES)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._sequence = 1

    @property
    def port_id(self) -> int:
        """Names the socket: notifications of what it changed carry this."""
        port_id: int = self._socket.getsockname()[0]
        return port_id

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def add(self, elements: dict[str, list[Element]]) -> None:
        """Add elements to maps and sets by name, all or nothing.

        What is there already is fine. Raises OSError: EEXIST for a key with other data, ENOENT without the table.
        """
        self._transact(batch(_NFT_MSG_NEWSETELEM, self._table, elements, self._family))

    def delete(self, elements: dict[str, list[Element]]) -> None:
        """Delete elements, all or nothing. Raises OSError: ENOENT where one is missing."""
        self._transact(batch(_NFT_MSG_DELSETELEM, self._table, elements, self._family))

    def change(self, deleted: dict[str, list[Element]], added: dict[str, list[Element]]) -> None:
        """Delete some and add others, in one step, all or nothing. Raises OSError, as ``delete`` and ``add``."""
        self._transact(batch(_NFT_MSG_DELSETELEM, self._table, deleted, self._family)[:-1]
                       + batch(_NFT_MSG_NEWSETELEM, self._table, added, self._family)[1:])

    def _transact(self, messages: list[bytes]) -> None:
        """Send one batch, of which the messages between the first and the last are acknowledged."""
        waiting = len(messages) - 2
        if waiting <= 0:
            return
        start = self._sequence
        self._sequence = (start + len(messages)) & 0x7FFFFFFF
        self._socket.send(b"".join(message[:8] + _U32.pack(start + number) + message[12:]
                                   for number, message in enumerate(messages)))
        failure = 0
        while waiting > 0:
            data = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset < len(data):
                length, kind, _flags, sequence, _pid = _HEADER.unpack_from(data, offset)
                # What an earlier transaction left unread has another number.
                if kind == _NLMSG_ERROR and 0 <= sequence - start < len(messages):
                    number = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                    failure = failure or number
                    # A batch that is refused as a whole answers for its first message.
                    waiting = 0 if sequence == start else waiting - 1
                offset += (length + 3) & ~3
        if failure:
            raise OSError(failure, os.strerror(failure))


def batch(kind: int, table: bytes, elements: dict[str, list[Element]], family: int = socket.AF_INET) -> list[bytes]:
    """The messages of one transaction: its begin, one per set and thousand elements, and its end."""
    messages = [_control(_BATCH_BEGIN)]
    flags = _NLM_F_REQUEST | _NLM_F_ACK | (_NLM_F_CREATE if kind == _NFT_MSG_NEWSETELEM else 0)
    for name, pairs in elements.items():
        for first in range(0, len(pairs), _ELEMENTS_EACH):
            body = _GENERIC.pack(family, 0, 0) + table + _text(_SET, name) + _attribute(
                _ELEMENTS | _NESTED, b"".join(_element(*pair) for pair in pairs[first:first + _ELEMENTS_EACH]))
            messages.append(_HEADER.pack(_HEADER.size + len(body), _NFNL_SUBSYS_NFTABLES << 8 | kind, flags, 0, 0)
                            + body)
    messages.append(_control(_BATCH_END))
    return messages


def concatenation(*parts: bytes) -> bytes:
    """A key or data: of several parts each begins at a multiple of 4 bytes, a register of nf_tables."""
    if len(parts) == 1:
        return parts[0]
    return b"".join([part + _PADDING[len(part) & 3] for part in parts])


def port(number: int) -> bytes:
    """A port as data or as a part of a key (inet_service)."""
    return _U16.pack(number)


def publication(protocol: str, published: int, *target: bytes) -> Element:
    """An element of a map from protocol and published port (inet_proto . inet_service) to ``target``."""
    return Element(concatenation(bytes([PROTOCOLS[protocol]]), port(published)), concatenation(*target))


def _control(kind: int) -> bytes:
    body = _GENERIC.pack(socket.AF_UNSPEC, 0, _NFNL_SUBSYS_NFTABLES)
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST, 0, 0) + body


def _element(key: bytes, data: bytes, end: bytes) -> bytes:
    inner = _attribute(_KEY | _NESTED, _attribute(_VALUE, key))
    if end:
        inner += _attribute(_KEY_END | _NESTED, _attribute(_VALUE, end))
    if data:
        inner += _attribute(_DATA | _NESTED, _attribute(_VALUE, data))
    return _attribute(_LIST_ELEM | _NESTED, inner)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")
