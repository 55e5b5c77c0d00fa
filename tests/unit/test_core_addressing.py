"""Every slot has names, numbers and addresses of its own."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core.addressing import Plan


@given(st.integers(18, 28), st.integers(1, 1000))
def test_everything_of_every_slot_is_unique_and_inside(prefix: int, bridge_ports: int) -> None:
    supernet = ipaddress.IPv4Network(f"10.203.0.0/{prefix}")
    try:
        plan = Plan(str(supernet), bridge_ports)
    except ValueError:
        assert bridge_ports + 3 > supernet.num_addresses
        return
    step = max(1, plan.slots // 300)
    slots = [plan.slot(index) for index in {*range(0, plan.slots, step), plan.slots - 1}]
    bridges = [plan.bridge(index) for index in range(plan.bridges)]
    networks = [ipaddress.IPv4Network(bridge.network) for bridge in bridges]
    assert all(network.subnet_of(supernet) for network in networks)
    assert all(not a.overlaps(b) for a, b in itertools.pairwise(networks))
    addresses = [s.address for s in slots] + [b.address for b in bridges]
    macs = [s.mac for s in slots] + [s.port_mac for s in slots] + [b.mac for b in bridges]
    indexes = [s.port_ifindex for s in slots] + [b.ifindex for b in bridges]
    for values in (addresses, macs, indexes, [s.port_name for s in slots] + [b.name for b in bridges]):
        assert len(set(values)) == len(values)
    for slot in slots:
        network = ipaddress.ip_network(slot.bridge.network)
        address = ipaddress.ip_address(slot.address)
        assert address in network
        assert address not in (network.network_address, network.broadcast_address)
        assert slot.index // bridge_ports == slot.bridge.index
        assert len(slot.port_name) < 16
        assert slot.port_ifindex < 1 << 31
    for mac in macs:
        assert mac[0] & 0b11 == 0b10, "unicast, locally administered"
        assert len(mac) == 6


@pytest.mark.parametrize(("bridge_ports", "prefix"), [(1, 30), (2, 29), (5, 29), (6, 28), (250, 24), (253, 24),
                                                      (254, 23),
                                                      (1000, 22)])
def test_a_bridge_has_room_for_its_ports_itself_and_the_ends(bridge_ports: int, prefix: int) -> None:
    plan = Plan("10.203.0.0/16", bridge_ports)
    assert plan.prefix_length == prefix
    assert plan.slots == plan.bridges * bridge_ports


def test_a_supernet_that_is_too_small_is_refused() -> None:
    assert Plan("10.0.0.0/24", 253).slots == 253
    with pytest.raises(ValueError, match="no room"):
        Plan("10.0.0.0/24", 254)


@pytest.mark.parametrize("index", [-1, 253])
def test_indexes_outside_are_refused(index: int) -> None:
    with pytest.raises(IndexError):
        Plan("10.0.0.0/24", 253).slot(index)
    with pytest.raises(IndexError):
        Plan("10.0.0.0/24", 253).bridge(index)


def test_the_shape_of_a_slot() -> None:
    slot = Plan("10.203.0.0/16", 250).slot(251)
    assert (slot.address, slot.bridge.address, slot.bridge.network) == ("10.203.1.3", "10.203.1.1", "10.203.1.0/24")
    assert (slot.port_name, slot.bridge.name, slot.cgroup) == ("nd251", "ndbr1", "nd251")
    assert (slot.mac.hex(":"), slot.port_mac.hex(":")) == ("02:4e:0a:cb:01:03", "02:4f:0a:cb:01:03")
