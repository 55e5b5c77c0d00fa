"""From a slot's index to everything the kernel sees of it: names, numbers, addresses. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

# Interface indexes are chosen by us, so that no answer of the kernel has to be awaited between two messages. Ours lie
# far above what the kernel hands out by itself (it counts up from 1 in each namespace).
FIRST_BRIDGE_IFINDEX = 1_000_000
FIRST_PORT_IFINDEX = 1_100_000
INSIDE_IFINDEX = 2

BRIDGE_PREFIX = "ndbr"
PORT_PREFIX = "nd"


@dataclass(frozen=True, slots=True)
class Bridge:
    """One of netnsd's bridges. ``network`` is in CIDR form; the bridge has its first address."""

    index: int
    name: str
    ifindex: int
    address: str
    prefix_length: int
    mac: bytes

    @property
    def network(self) -> str:
        """The bridge's network, such as 10.203.4.0/24."""
        return str(ipaddress.ip_interface(f"{self.address}/{self.prefix_length}").network)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one environment: its index, its link's names and numbers, its address."""

    index: int
    bridge: Bridge
    address: str
    mac: bytes
    port_name: str
    port_ifindex: int
    port_mac: bytes

    @property
    def cgroup(self) -> str:
        """The name of the slot's cgroup, below netnsd's root."""
        return self.port_name


class Plan:
    """How a supernet is cut: bridges of at most ``bridge_ports`` slots, each with its own network.

    Args:
        supernet: an IPv4 network in CIDR form.
        bridge_ports: slots per bridge, 1 to 1000 (a bridge takes 1023 ports, linux/net/bridge/br_private.h).

    Raises ValueError where the supernet has no room for one bridge.
    """

    def __init__(self, supernet: str, bridge_ports: int) -> None:
        self.supernet = ipaddress.IPv4Network(supernet)
        self.bridge_ports = bridge_ports
        # Network, bridge and broadcast address are not for environments.
        host_bits = (bridge_ports + 3 - 1).bit_length()
        self.prefix_length = 32 - host_bits
        if self.prefix_length < self.supernet.prefixlen:
            raise ValueError(f"{supernet} has no room for a bridge of {bridge_ports} ports")
        self._stride = 1 << host_bits
        self.bridges = 1 << (self.prefix_length - self.supernet.prefixlen)
        self.slots = self.bridges * bridge_ports
        if self.bridges > FIRST_PORT_IFINDEX - FIRST_BRIDGE_IFINDEX:
            raise ValueError(f"{supernet} with {bridge_ports} ports a bridge makes {self.bridges} bridges")

    def bridge(self, index: int) -> Bridge:
        """The bridge with that index, 0 to ``bridges - 1``."""
        if not 0 <= index < self.bridges:
            raise IndexError(index)
        address = self.supernet.network_address + index * self._stride + 1
        return Bridge(index=index, name=f"{BRIDGE_PREFIX}{index}", ifindex=FIRST_BRIDGE_IFINDEX + index,
                      address=str(address), prefix_length=self.prefix_length, mac=_mac(0, address))

    @staticmethod
    def port_name(index: int) -> str:
        """What the host's end of a slot's link is called, and its cgroup; also of a slot that this plan has not."""
        return f"{PORT_PREFIX}{index}"

    def slot(self, index: int) -> Slot:
        """The slot with that index, 0 to ``slots - 1``."""
        if not 0 <= index < self.slots:
            raise IndexError(index)
        bridge = self.bridge(index // self.bridge_ports)
        address = ipaddress.IPv4Address(bridge.address) + 1 + index % self.bridge_ports
        return Slot(index=index, bridge=bridge, address=str(address), mac=_mac(0, address),
                    port_name=self.port_name(index), port_ifindex=FIRST_PORT_IFINDEX + index,
                    port_mac=_mac(1, address))


def _mac(side: int, address: ipaddress.IPv4Address) -> bytes:
    """A locally administered MAC from an address, so that a reused address meets no stale neighbour."""
    return bytes([0x02, 0x4E | side]) + address.packed
