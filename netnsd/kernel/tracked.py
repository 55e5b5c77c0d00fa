"""Connections that the host tracks, of addresses that are to be somebody else's: they end here.

An entry outlives its environment by two minutes, and by UDP as long as somebody outside likes to send: what he sends
would reach whoever has the address by then. Layouts: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator

_NETLINK_NETFILTER = 12
_CTNETLINK, _GET, _DELETE = 1, 1, 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_IP, _SOURCE = 1, 1, 1  # CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_IP_V4_SRC
_KIND = 0x3FFF  # without NLA_F_NESTED
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.pack("BBH", socket.AF_INET, 0, 0)
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 16


def forget(addresses: Collection[str]) -> int:
    """End what these addresses have begun; returns how many connections that were.

    In the network namespace of the calling thread. Nothing is ended where the kernel does not list connections. Raises
    OSError.
    """
    wanted = {socket.inet_aton(address) for address in addresses}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as asker:
        asker.bind((0, 0))
        try:
            found = [tuple_ for tuple_, source in _connections(asker) if source in wanted]
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a kernel without ctnetlink
                return 0
            raise
        for tuple_ in found:
            with contextlib.suppress(FileNotFoundError):  # it has ended by itself
                _exchange(asker, _DELETE, _ACK, tuple_)
    return len(found)


def _connections(asker: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    """The attribute that names each connection, and the address that has begun it."""
    for message in _exchange(asker, _GET, _DUMP, b""):
        for kind, attribute in _attributes(message[len(_GENERIC):]):
            if kind == _TUPLE_ORIG:
                source = next((address[4:] for outer, ip in _attributes(attribute[4:]) if outer == _TUPLE_IP
                               for inner, address in _attributes(ip[4:]) if inner == _SOURCE), b"")
                yield attribute, source


def _exchange(asker: socket.socket, verb: int, flags: int, body: bytes) -> list[bytes]:
    """Ask, and return the bodies of what is answered. Raises OSError."""
    message = _GENERIC + body
    asker.send(_HEADER.pack(_HEADER.size + len(message), _CTNETLINK << 8 | verb, _REQUEST | flags, 0, 0) + message)
    found: list[bytes] = []
    while True:
        data = asker.recv(_RECEIVE_BYTES)
        offset = 0
        while offset < len(data):
            length, kind, *_ = _HEADER.unpack_from(data, offset)
            if kind == _DONE:
                return found
            if kind == _ERROR:
                number = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return found
            found.append(data[offset + _HEADER.size:offset + length])
            offset += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and whole of each attribute, padded."""
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        padded = max((length + 3) & ~3, _ATTRIBUTE.size)
        yield kind & _KIND, data[offset:offset + padded]
        offset += padded
