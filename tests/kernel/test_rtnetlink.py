"""Every message that is packed by hand means, to pyroute2, what it should."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from netnsd.core.addressing import Plan
from netnsd.kernel import rtnetlink

# From linux/netlink.h: REQUEST and ACK are in every message of ours.
REQUEST, ACK, REPLACE, EXCL, CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
KINDS = {16: ("newlink", ifinfmsg), 17: ("dellink", ifinfmsg), 20: ("newaddr", ifaddrmsg), 24: ("newroute", rtmsg),
         28: ("newneigh", ndmsg), 29: ("delneigh", ndmsg)}
NO_LINK_LOCAL = {"IFLA_AF_SPEC": {"AF_INET6": {"IFLA_INET6_ADDR_GEN_MODE": 1}}}
SLOTS = [Plan("10.203.0.0/16", 250).slot(index) for index in (0, 251, 65_000 * 250 // 256)]


def decoded(message: bytes) -> tuple[str, int, dict[str, Any]]:
    """Kind, flags, and all fields and attributes, nested ones too."""
    length, kind, flags, sequence, pid = struct.unpack_from("=IHHII", message)
    assert (length, sequence, pid) == (len(message), 0, 0)
    assert length % 4 == 0
    name, structure = KINDS[kind]
    parsed = structure(message)
    parsed.decode()
    assert flags & (REQUEST | ACK) == REQUEST | ACK
    return name, flags & ~(REQUEST | ACK), plain(parsed)


def plain(parsed: Any) -> Any:
    """The fields and attributes of a message as a dict; zero fields and the header are left out."""
    if isinstance(parsed, dict) and "attrs" in parsed:
        # pyroute2 adds a text "state" of its own to links.
        fields = {key: value for key, value in parsed.items()
                  if key not in ("attrs", "header") and value and not (key == "state" and isinstance(value, str))}
        return fields | {name: plain(value) for name, value in parsed["attrs"]}
    return parsed


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.port_name)
@pytest.mark.parametrize("has_ipv6", [True, False])
def test_host_batch(slot: Any, has_ipv6: bool) -> None:
    batch = rtnetlink.host_batch(slot, 77, has_ipv6=has_ipv6)
    assert batch.stages == ["veth", "isolate", "neighbour"]
    veth, isolate, neighbour = map(decoded, batch.messages)
    assert veth == ("newlink", CREATE | EXCL, {
        "index": slot.port_ifindex, "flags": 1, "change": 1, "IFLA_IFNAME": slot.port_name,
        "IFLA_NUM_TX_QUEUES": 1, "IFLA_NUM_RX_QUEUES": 1,
        "IFLA_ADDRESS": slot.port_mac.hex(":"), "IFLA_MASTER": slot.bridge.ifindex, "IFLA_GROUP": rtnetlink.LINK_GROUP,
        "IFLA_LINKINFO": {"IFLA_INFO_KIND": "veth", "IFLA_INFO_DATA": {"VETH_INFO_PEER": {
            "index": 2, "IFLA_IFNAME": "eth0", "IFLA_NUM_TX_QUEUES": 1, "IFLA_NUM_RX_QUEUES": 1,
            "IFLA_NET_NS_FD": 77, "IFLA_ADDRESS": slot.mac.hex(":")}}}})
    assert isolate == ("newlink", 0, {
        "index": slot.port_ifindex, "IFLA_IFALIAS": rtnetlink.LINK_ALIAS, **(NO_LINK_LOCAL if has_ipv6 else {}),
        "IFLA_LINKINFO": {"IFLA_INFO_SLAVE_KIND": "bridge", "IFLA_INFO_SLAVE_DATA": {"IFLA_BRPORT_ISOLATED": 1}}})
    assert neighbour == ("newneigh", CREATE | REPLACE, {
        "family": socket.AF_INET, "ifindex": slot.bridge.ifindex, "state": 0x80, "ndm_type": 1,
        "NDA_DST": slot.address, "NDA_LLADDR": slot.mac.hex(":")})


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.port_name)
@pytest.mark.parametrize("has_ipv6", [True, False])
def test_inside_batch(slot: Any, has_ipv6: bool) -> None:
    batch = rtnetlink.inside_batch(slot, has_ipv6=has_ipv6)
    assert batch.stages == ["link-local"] * has_ipv6 + ["loopback", "eth0", "address", "route"]
    *link_local, loopback, eth0, address, route = map(decoded, batch.messages)
    assert link_local == [("newlink", 0, {"index": 2, **NO_LINK_LOCAL})] * has_ipv6
    assert loopback == ("newlink", 0, {"index": 1, "flags": 1, "change": 1})
    assert eth0 == ("newlink", 0, {"index": 2, "flags": 1, "change": 1})
    assert address == ("newaddr", CREATE, {"family": socket.AF_INET, "prefixlen": 32, "index": 2,
                                           "IFA_LOCAL": slot.address, "IFA_ADDRESS": slot.address})
    assert route == ("newroute", CREATE, {"family": socket.AF_INET, "table": 254, "proto": 4, "type": 1, "flags": 4,
                                          "RTA_GATEWAY": slot.bridge.address, "RTA_OIF": 2})


def test_doom_batch() -> None:
    batch = rtnetlink.doom_batch(SLOTS)
    assert batch.stages == ["doom", "neighbour"] * len(SLOTS)
    for slot, doom, neighbour in zip(SLOTS, batch.messages[::2], batch.messages[1::2], strict=True):
        assert decoded(doom) == ("newlink", 0, {"index": slot.port_ifindex, "IFLA_GROUP": rtnetlink.DOOMED_GROUP})
        assert decoded(neighbour) == ("delneigh", 0, {
            "family": socket.AF_INET, "ifindex": slot.bridge.ifindex, "ndm_type": 1,
            "NDA_DST": slot.address, "NDA_LLADDR": slot.mac.hex(":")})


def test_doom_batch_of_nothing_is_nothing() -> None:
    assert rtnetlink.doom_batch([]).messages == []


def test_delete_doomed_batch_names_its_group_alone() -> None:
    """Without a group, or with 0, the kernel would take index or name, or delete every link that was never grouped."""
    batch = rtnetlink.delete_doomed_batch()
    assert batch.stages == ["delete"]
    assert decoded(batch.messages[0]) == ("dellink", 0, {"IFLA_GROUP": rtnetlink.DOOMED_GROUP})
    assert 0 not in (rtnetlink.DOOMED_GROUP, rtnetlink.LINK_GROUP)
    assert rtnetlink.DOOMED_GROUP != rtnetlink.LINK_GROUP
