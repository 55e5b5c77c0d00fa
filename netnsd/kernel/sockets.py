"""Which sockets listen in the calling thread's network namespace, and whether a host port is free."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from pathlib import Path

from netnsd.core.interfaces import Listener

# net/ipv4/tcp_ipv4.c and udp.c: the files' fourth column is the state.
_TABLES = (("tcp", "tcp", "0A"), ("tcp", "tcp6", "0A"), ("udp", "udp", "07"), ("udp", "udp6", "07"))


def listeners() -> frozenset[Listener]:
    """The listening TCP and unconnected UDP sockets of the calling thread's namespace."""
    found = set()
    for protocol, table, state in _TABLES:
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == state:
                address, _, port = columns[1].partition(":")
                found.add(Listener(protocol, _address(address), int(port, 16)))
    return frozenset(found)


def is_listening(protocol: str, port: int) -> bool:
    """Whether a socket of the calling thread's namespace has ``port``, on any address: asked by binding it."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, kind | socket.SOCK_CLOEXEC) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return False


def _address(text: str) -> str:
    """An address as the tables print it: 32-bit words in host order."""
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[i:i + 4][::-1] for i in range(0, len(raw), 4))
    return str(ipaddress.ip_address(raw))
