"""The few rtnetlink messages of the create path, packed by hand.

pyroute2's encoder costs about 2 ms for what one environment needs, twice the kernel's own work; so these are packed
here, and a test decodes every one of them with pyroute2. All that is not hot uses pyroute2.

Layouts: linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h. All integers in host order, addresses
in network order.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from netnsd.core.addressing import INSIDE_IFINDEX, Slot

LINK_GROUP = 0x6E64  # "nd": marks our links, and lets the kernel delete them all at once (IFLA_GROUP)
DOOMED_GROUP = 0x6E65
LINK_ALIAS = "netnsd"

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x100, 0x400
_NLM_F_DUMP = 0x300
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10

_RTM_NEWLINK, RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_NEWNEIGH, _RTM_DELNEIGH = (
    16, 17, 18, 20, 24, 28, 29)
_IFF_UP = 0x1
(_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_GROUP,
 _IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES) = (
    1, 3, 4, 10, 18, 20, 27, 28, 29, 31, 32)
_RTEXT_FILTER_SKIP_STATS = 8
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND, _IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
_IFLA_AF_SPEC, _IFLA_INET6_ADDR_GEN_MODE, _IN6_ADDR_GEN_MODE_NONE = 26, 8, 1
_VETH_INFO_PEER = 1
_PORT_ATTRIBUTES = frozenset({_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_GROUP, _IFLA_IFALIAS})
_IFLA_BRPORT_ISOLATED = 33
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTNH_F_ONLINK = 254, 4, 4
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BxxxiHBB")
_U32 = struct.Struct("=I")

_RECEIVE_BYTES = 65536
# Acknowledgements wait in the socket's buffer, which takes about 250 of them (ENOBUFS otherwise).
_TOGETHER = 64


class Batch:
    """Messages that are sent together, each acknowledged by the kernel. ``stages`` names them for errors."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.stages: list[str] = []

    def add(self, stage: str, message: bytes) -> None:
        """Append a message; ``stage`` says in errors what it does."""
        self.messages.append(message)
        self.stages.append(stage)


class StageError(OSError):
    """The kernel refused one message of a batch; ``stage`` is its name."""

    def __init__(self, number: int, stage: str) -> None:
        super().__init__(number, os.strerror(number))
        self.stage = stage


@dataclass(frozen=True, slots=True)
class Port:
    """A veth of this namespace. ``master`` is an interface index, 0 for none. ``alias`` and ``mac`` may be empty."""

    index: int
    name: str
    is_up: bool
    master: int
    group: int
    alias: str
    mac: bytes


class RouteSocket:
    """A NETLINK_ROUTE socket. It acts in the network namespace in which its thread was when it was opened."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._sequence = 1

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def transact(self, batch: Batch, *, ignore: frozenset[int] = frozenset()) -> None:
        """Send a batch and read every acknowledgement.

        Later messages of a batch are done even when an earlier one fails, so a caller undoes the whole of it.

        Raises:
            StageError: for the first message that failed with an errno that is not in ``ignore``.
        """
        failure: StageError | None = None
        for first in range(0, len(batch.messages), _TOGETHER):
            chunk = slice(first, first + _TOGETHER)
            found = self._exchange(batch.messages[chunk], batch.stages[chunk], ignore)
            failure = failure or found
        if failure is not None:
            raise failure

    def ports(self) -> list[Port]:
        """All veths of the namespace. pyroute2 would take 40 times as long, in which no other thread runs.

        Raises OSError.
        """
        self._sequence += 1
        body = _IFINFO.pack(0, 0, 0, 0, 0) + _number(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS) + _attribute(
            _IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "veth"))
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, _NLM_F_REQUEST | _NLM_F_DUMP,
                                       self._sequence, 0) + body)
        found: list[Port] = []
        while True:
            data = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset < len(data):
                length, kind, _flags, sequence, _pid = _HEADER.unpack_from(data, offset)
                if sequence == self._sequence:
                    if kind == _NLMSG_DONE:
                        return found
                    if kind == _NLMSG_ERROR:
                        number = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                        raise OSError(number, os.strerror(number))
                    found.append(_port(data, offset + _HEADER.size, offset + length))
                offset += (length + 3) & ~3

    def _exchange(self, messages: list[bytes], stages: list[str], ignore: frozenset[int]) -> StageError | None:
        start = self._sequence
        self._sequence = (start + len(messages)) & 0x7FFFFFFF
        self._socket.send(b"".join([
            message[:8] + _U32.pack(start + index) + message[12:] for index, message in enumerate(messages)
        ]))
        waiting, failure = len(messages), None
        while waiting:
            data = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset < len(data):
                length, kind, _flags, sequence, _pid = _HEADER.unpack_from(data, offset)
                if kind == _NLMSG_ERROR and 0 <= sequence - start < len(messages):
                    waiting -= 1
                    number = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                    if number and number not in ignore and failure is None:
                        failure = StageError(number, stages[sequence - start])
                offset += (length + 3) & ~3
        return failure


def host_batch(slot: Slot, netns_fd: int, *, has_ipv6: bool) -> Batch:
    """The host's side of a slot: veth with its peer born in the namespace, an isolated and up bridge port, a neighbour.

    The peer cannot be born up (ENOTCONN), so ``inside_batch`` does that. ``has_ipv6``: whether the kernel knows IPv6;
    a port of a bridge needs no address of it.
    """
    batch = Batch()
    # A veth has a queue per CPU by default, and each queue its directories in sysfs; the queues are without locks, and
    # one carries as much.
    one_queue = _number(_IFLA_NUM_TX_QUEUES, 1) + _number(_IFLA_NUM_RX_QUEUES, 1)
    peer = _IFINFO.pack(0, 0, INSIDE_IFINDEX, 0, 0) + b"".join([
        _text(_IFLA_IFNAME, "eth0"),
        one_queue,
        _number(_IFLA_NET_NS_FD, netns_fd),
        _attribute(_IFLA_ADDRESS, slot.mac),
    ])
    batch.add("veth", _message(
        _RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL,
        _IFINFO.pack(0, 0, slot.port_ifindex, _IFF_UP, _IFF_UP),
        _text(_IFLA_IFNAME, slot.port_name),
        one_queue,
        _attribute(_IFLA_ADDRESS, slot.port_mac),
        _number(_IFLA_MASTER, slot.bridge.ifindex),
        _number(_IFLA_GROUP, LINK_GROUP),
        _attribute(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "veth")
                   + _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, peer))),
    ))
    batch.add("isolate", _isolation(slot, has_ipv6=has_ipv6))
    batch.add("neighbour", _message(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, *_neighbour(slot, _NUD_PERMANENT)))
    return batch


def rejoin_batch(slot: Slot, *, has_ipv6: bool) -> Batch:
    """Make the host's end of a slot, which exists, what ``host_batch`` makes it."""
    batch = Batch()
    batch.add("master", _message(
        _RTM_NEWLINK, 0, _IFINFO.pack(0, 0, slot.port_ifindex, _IFF_UP, _IFF_UP),
        _attribute(_IFLA_ADDRESS, slot.port_mac), _number(_IFLA_MASTER, slot.bridge.ifindex),
        _number(_IFLA_GROUP, LINK_GROUP)))
    batch.add("isolate", _isolation(slot, has_ipv6=has_ipv6))
    batch.add("neighbour", _message(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, *_neighbour(slot, _NUD_PERMANENT)))
    return batch


def inside_batch(slot: Slot, *, has_ipv6: bool) -> Batch:
    """The namespace's side: loopback and eth0 up, a /32 address, and an onlink default route by the bridge."""
    batch = Batch()
    if has_ipv6:
        batch.add("link-local", _message(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, INSIDE_IFINDEX, 0, 0), _NO_LINK_LOCAL))
    batch.add("loopback", _message(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, 1, _IFF_UP, _IFF_UP)))
    batch.add("eth0", _message(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, INSIDE_IFINDEX, _IFF_UP, _IFF_UP)))
    address = IPv4Address(slot.address).packed
    batch.add("address", _message(
        _RTM_NEWADDR, _NLM_F_CREATE, _IFADDR.pack(socket.AF_INET, 32, 0, 0, INSIDE_IFINDEX),
        _attribute(_IFA_LOCAL, address), _attribute(_IFA_ADDRESS, address),
    ))
    batch.add("route", _message(
        _RTM_NEWROUTE, _NLM_F_CREATE,
        _RTMSG.pack(socket.AF_INET, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, 1, _RTNH_F_ONLINK),
        _attribute(_RTA_GATEWAY, IPv4Address(slot.bridge.address).packed),
        _number(_RTA_OIF, INSIDE_IFINDEX),
    ))
    return batch


def doom_batch(slots: list[Slot]) -> Batch:
    """Move the host's ends of slots into the doomed group, so that one message deletes them all."""
    batch = Batch()
    for slot in slots:
        batch.add("doom", _message(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, slot.port_ifindex, 0, 0),
                                   _number(_IFLA_GROUP, DOOMED_GROUP)))
        batch.add("neighbour", _message(_RTM_DELNEIGH, 0, *_neighbour(slot, 0)))
    return batch


def delete_doomed_batch() -> Batch:
    """Delete every link of the doomed group. Fails with ENODEV where there is none."""
    batch = Batch()
    batch.add("delete", _message(RTM_DELLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0), _number(_IFLA_GROUP, DOOMED_GROUP)))
    return batch


def _isolation(slot: Slot, *, has_ipv6: bool) -> bytes:
    # The kernel takes an alias only for a link that exists (rtnl_create_link in net/core/rtnetlink.c ignores it).
    return _message(
        _RTM_NEWLINK, 0, _IFINFO.pack(0, 0, slot.port_ifindex, 0, 0),
        _text(_IFLA_IFALIAS, LINK_ALIAS),
        _NO_LINK_LOCAL if has_ipv6 else b"",
        _attribute(_IFLA_LINKINFO, _text(_IFLA_INFO_SLAVE_KIND, "bridge")
                   + _attribute(_IFLA_INFO_SLAVE_DATA, _attribute(_IFLA_BRPORT_ISOLATED, b"\x01"))),
    )


def _port(data: bytes, offset: int, end: int) -> Port:
    _family, _type, index, flags, _change = _IFINFO.unpack_from(data, offset)
    offset += _IFINFO.size
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if kind in _PORT_ATTRIBUTES:
            found[kind] = data[offset + _ATTRIBUTE.size:offset + length]
        offset += max((length + 3) & ~3, _ATTRIBUTE.size)

    def number(kind: int) -> int:
        return int(_U32.unpack(found[kind])[0]) if kind in found else 0

    def text(kind: int) -> str:
        return found.get(kind, b"").rstrip(b"\0").decode(errors="replace")

    return Port(index, text(_IFLA_IFNAME), bool(flags & _IFF_UP), number(_IFLA_MASTER), number(_IFLA_GROUP),
                text(_IFLA_IFALIAS), found.get(_IFLA_ADDRESS, b""))


def _neighbour(slot: Slot, state: int) -> tuple[bytes, ...]:
    return (_NDMSG.pack(socket.AF_INET, slot.bridge.ifindex, state, 0, 1),
            _attribute(_NDA_DST, IPv4Address(slot.address).packed), _attribute(_NDA_LLADDR, slot.mac))


def _message(kind: int, flags: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, _U32.pack(value))


# A link gets an address of IPv6 as soon as it has a carrier, and routes, all of which the kernel walks through when the
# next link comes up: at 2000 links that takes longer than all else, with the lock held that creating needs.
_NO_LINK_LOCAL = _attribute(_IFLA_AF_SPEC, _attribute(socket.AF_INET6, _attribute(
    _IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))))

