"""The host's rules as text, and what their sets and maps hold, as nft writes it and as the kernel has it. Pure.

Three tables, whose rules never change with the number of environments; elements of their sets do. ``ip netnsd`` says
who reaches whom, ``bridge netnsd`` that nobody takes another's address, and ``ip netnsd_bounds`` how much of the host's
own tables an environment fills. What the last has counted outlives a reload of the others.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from netnsd.core.addressing import BRIDGE_PREFIX, FIRST_PORT_IFINDEX, PORT_PREFIX
from netnsd.core.interfaces import Opening
from netnsd.core.judgement import Judgement, Span
from netnsd.kernel import nfnetlink

TABLE, BOUNDS = "netnsd", "netnsd_bounds"
_REACH_TABLES, _BOUNDS_TABLES = (("ip", TABLE), ("bridge", TABLE)), (("ip", BOUNDS),)
TABLES = (*_REACH_TABLES, *_BOUNDS_TABLES)
_REACH = """
table ip netnsd {
  map published { type inet_proto . inet_service : ipv4_addr . inet_service; %(published)s }
  map offered { type inet_proto . inet_service : ipv4_addr . inet_service; %(offered)s }
  set owners { type ipv4_addr . uid; %(owners)s }
  set guests { type ipv4_addr . uid; %(guests)s }
  set hosts { type ipv4_addr; %(hosts)s }
  set lans { type ipv4_addr; %(lans)s }
  set declared { type ipv4_addr . inet_proto . inet_service; %(declared)s }
  set allowed { type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; %(allowed)s }
  set confined { type ipv4_addr; %(confined)s }
  set shielded { type ipv4_addr; %(shielded)s }
  set uplinks { type ifname; %(uplinks)s }

  # route_localnet on the bridges lets the host's 127.0.0.1:PORT reach environments; nothing may use it the other way.
  chain guard {
    type filter hook prerouting priority -300;
    iifname "%(bridge)s*" goto from_bridge
    ip saddr %(supernet)s iifname != "lo" drop
  }
  chain from_bridge {
    ip daddr 127.0.0.0/8 drop
    ip saddr != %(supernet)s drop
  }
  chain publish_local {
    type nat hook output priority -100;
    ip daddr 127.0.0.0/8 meta l4proto { tcp, udp } dnat ip to meta l4proto . th dport map @published
    fib daddr type local meta l4proto { tcp, udp } dnat ip to meta l4proto . th dport map @offered
  }
  chain publish_outside {
    type nat hook prerouting priority -100;
    iifname "%(bridge)s*" accept
    fib daddr type local meta l4proto { tcp, udp } dnat ip to meta l4proto . th dport map @offered
  }

  # Only the owner (and root) reaches an environment, and whoever it is shared with its declared ports. Every packet of
  # the original direction is checked, not just the first: another user's socket on the owner's source port would pass
  # as established otherwise.
  chain from_host {
    type filter hook output priority 0;
    # Not by oifname: of what publish_local translated it is still "lo" in this hook.
    ip daddr %(supernet)s goto to_environment
    # A socket bound to a device sends by it whatever the address: broadcast, multicast, 127/8.
    oifname "%(port)s*" meta skuid != 0 drop
  }
  # Who may comes first: each rule costs every packet, and the look at the routes costs most.
  chain to_environment {
    meta skuid 0 accept
    ip daddr . meta skuid @owners accept
    ip daddr . meta skuid @guests ip daddr . meta l4proto . th dport @declared accept
    ip daddr @hosts ip daddr . meta l4proto . th dport @declared accept
    fib daddr type local accept
    ct direction original meta skuid 0-4294967295 reject
    icmp type redirect drop
    ct state new reject
  }
  chain translate {
    type nat hook postrouting priority 100;
    # Servers inside take who comes from the bridge's address for the owner, and let it do what loopback may.
    ip daddr %(supernet)s oifname "%(bridge)s*" meta skuid != 0 ip daddr . meta skuid != @owners snat to %(guest)s
    ip saddr 127.0.0.0/8 oifname "%(bridge)s*" masquerade
    ip saddr %(supernet)s oifname != "lo" oifname != "%(bridge)s*" masquerade
  }

  # Between environments only what is allowed; to the outside what they begin, if they may; from the outside only to
  # ports that are offered. Here too packets of the original direction are never let for being established: a connection
  # may have been made while another tool had flushed these rules, or before a policy forbade it.
  chain through {
    type filter hook forward priority 0;
    iifname "%(bridge)s*" goto from_environment
    oifname "%(bridge)s*" goto from_outside
    iifname @uplinks oifname @uplinks drop
  }
  chain from_environment {
    ct direction reply ct state established goto answering
    ct direction reply ct state related accept
    oifname != "%(bridge)s*" goto to_outside
    ct state invalid drop
    ip saddr . ip daddr . meta l4proto . th dport @allowed accept
    goto refused
  }
  # An answer goes where the question may come from still: who has asked once must not be told for ever, as UDP is.
  chain answering {
    oifname "%(bridge)s*" ip daddr . ip saddr . meta l4proto . th sport @allowed accept
    oifname "%(bridge)s*" goto refused
    ip saddr @lans ip saddr . meta l4proto . th sport @declared goto answering_outside
    goto refused
  }
  chain answering_outside {
    ip saddr != @shielded accept
    ip daddr . ip saddr . meta l4proto . th sport @allowed accept
    goto refused
  }
  chain to_outside {
    ip saddr @confined goto confinement
    goto leaving
  }
  # Not "... != @allowed": what is too short to have ports is in no set, and not outside of one either.
  chain confinement {
    ip saddr . ip daddr . meta l4proto . th dport @allowed goto leaving
    goto refused
  }
  chain leaving {
    ct state established,related accept
    ct state invalid drop
    tcp flags syn tcp option maxseg size set rt mtu
    accept
  }
  # A reset is told at once; the kernel sends a peer about one ICMP error a second (net.ipv4.icmp_ratelimit). Not what
  # is connected: where elements of allowed are replaced, none of them is found from when the kernel begins the new
  # generation until the end of its commit (nf_tables_commit in net/netfilter/nf_tables_api.c). TCP sends again.
  chain refused {
    ct state established drop
    meta l4proto tcp reject with tcp reset
    reject with icmp type admin-prohibited
  }
  chain from_outside {
    ct direction reply ct state established,related accept
    ct status dnat ip daddr @lans ip daddr . meta l4proto . th dport @declared goto offering
    # What says that an answer was too large, too: without, large ones would end at the first narrow link.
    ct state related ct status dnat ip daddr @lans icmp type { destination-unreachable, time-exceeded } accept
    drop
  }
  chain offering {
    ip daddr != @shielded accept
    ip saddr . ip daddr . meta l4proto . th dport @allowed accept
    drop
  }

  # The host's own services are not for environments.
  chain to_host {
    type filter hook input priority 0;
    iifname != "%(bridge)s*" accept
    ct direction reply ct state established,related accept
    icmp type echo-request accept
    meta l4proto tcp reject with tcp reset
    reject with icmp type admin-prohibited
  }
}
table bridge netnsd {
  set seats { type iface_index . ether_addr . ipv4_addr; %(seats)s }

  # What an environment sends has its own addresses and is IPv4, whatever rights its processes have inside.
  chain from_port {
    type filter hook prerouting priority -300;
    iifname "%(port)s*" goto seated
  }
  chain seated {
    ether type ip meta iif . ether saddr . ip saddr @seats accept
    ether type arp meta iif . ether saddr . arp saddr ip @seats meta iif . arp saddr ether . arp saddr ip @seats accept
    drop
  }
}
"""
_BOUNDS = """
table ip netnsd_bounds {
  set gateways { type ipv4_addr; %(gateways)s }
  set flows { type ipv4_addr; size 65536; flags dynamic; }
  set seekers { type ipv4_addr; size 65536; flags dynamic, timeout; timeout 60s; }
  set neighbours { type ipv4_addr; size 4096; flags dynamic, timeout; timeout 10s; }

  # What goes on after the rules of who reaches whom.
  chain forwarded {
    type filter hook forward priority 10;
    iifname "%(bridge)s*" ct direction original ct state new goto begun
  }
  chain begun {
    add @flows { ip saddr ct count over %(flows)d } reject
    oifname != "%(bridge)s*" rt nexthop != @gateways goto to_neighbour
  }
  # Each neighbour that does not answer has a place in a table that all of the host shares, and which by default ends at
  # 1024 (arp(7), gc_thresh3), for some 8 seconds. So new ones are few at a time, of one environment and of all.
  chain to_neighbour {
    rt nexthop @neighbours accept
    update @seekers { ip saddr limit rate over 5/second burst 32 packets } reject
    limit rate over 40/second burst 256 packets reject
    add @neighbours { rt nexthop }
  }
  chain arrived {
    type filter hook input priority 10;
    # Each identifier of a ping is a flow of its own.
    iifname "%(bridge)s*" icmp type echo-request ct state new add @flows { ip saddr ct count over %(flows)d } drop
  }
}
"""
_TABLES_OF = {"seats": ("bridge", TABLE), "gateways": ("ip", BOUNDS)}


def table_of(name: str) -> str:
    """The family and the name of the table that has a set or map."""
    return " ".join(_TABLES_OF.get(name, ("ip", TABLE)))


class Kind(NamedTuple):
    """A set, or a map where it has data: how each field of its elements is packed."""

    key: tuple[Callable[[Any], bytes], ...]
    data: tuple[Callable[[Any], bytes], ...] = ()


# Integers of the host, such as a user's id and an interface's index, are in the host's order.
_host_order = struct.Struct("=I").pack
_address = socket.inet_aton
_protocol: Callable[[str], bytes] = {name: bytes([number]) for name, number in nfnetlink.PROTOCOLS.items()}.__getitem__
KINDS = {
    "published": Kind((_protocol, nfnetlink.port), (_address, nfnetlink.port)),
    "offered": Kind((_protocol, nfnetlink.port), (_address, nfnetlink.port)),
    "owners": Kind((_address, _host_order)),
    "guests": Kind((_address, _host_order)),
    "hosts": Kind((_address,)),
    "lans": Kind((_address,)),
    "declared": Kind((_address, _protocol, nfnetlink.port)),
    "confined": Kind((_address,)),
    "shielded": Kind((_address,)),
    "seats": Kind((_host_order, lambda mac: bytes.fromhex(mac.replace(":", "")), _address)),
}
# Set or map to its elements, each a tuple of fields: those of the key, then those of the data.
Fields = tuple[Any, ...]
Elements = dict[str, list[Fields]]


def of_openings(openings: Iterable[Opening]) -> Elements:
    """What is there for environments."""
    found: Elements = {"owners": [], "published": []}
    for opening in openings:
        address = opening.address
        found["owners"].append((address, opening.uid))
        published = [(p.protocol, p.published, address, p.port) for p in opening.publications]
        found["published"] += published
        if opening.guests or opening.reach != "owner":
            found.setdefault("guests", []).extend((address, uid) for uid in opening.guests)
            found.setdefault("declared", []).extend((address, p.protocol, p.port) for p in opening.publications)
        if opening.reach != "owner":
            found.setdefault("hosts", []).append((address,))
        if opening.reach == "lan":
            found.setdefault("lans", []).append((address,))
            found.setdefault("offered", []).extend(published)
    return {name: elements for name, elements in found.items() if elements}


def of_judgement(judgement: Judgement) -> Elements:
    """What is there for policies; the fields of ``allowed`` are spans of numbers."""
    found: Elements = {
        "allowed": [(p.sources, p.targets, p.protocols, p.ports) for p in sorted(judgement.passages)],
        "confined": [(_dotted(address),) for address in sorted(judgement.confined)],
        "shielded": [(_dotted(address),) for address in sorted(judgement.shielded)]}
    return {name: elements for name, elements in found.items() if elements}


def packed(elements: Mapping[str, Sequence[Fields]]) -> dict[str, list[nfnetlink.Element]]:
    """Elements as the kernel has them."""
    return {name: [_passage(fields) if name == "allowed" else _packed(KINDS[name], fields) for fields in some]
            for name, some in elements.items()}


def removal() -> str:
    """What takes all of the tables away, as nft commands."""
    return _removal(TABLES)


def reach(*, supernet: str, elements: Elements | None = None, uplinks: Sequence[str] = ()) -> str:
    """Who reaches whom, in place of what is there of that, as nft commands.

    Args:
        supernet: all environments' addresses, in CIDR form.
        elements: those of ``KINDS`` and ``allowed``.
        uplinks: interfaces that are not routed between.
    """
    values = {name: [written(name, fields) for fields in some] for name, some in (elements or {}).items()}
    values["uplinks"] = [f'"{name}"' for name in uplinks]
    return _removal(_REACH_TABLES) + _REACH % {
        **{name: _with(values.get(name, ())) for name in (*KINDS, "allowed", "uplinks")},
        # An address of no environment and of no bridge.
        "guest": str(ipaddress.ip_network(supernet).network_address),
        "supernet": supernet, "bridge": BRIDGE_PREFIX, "port": PORT_PREFIX}


def bounds(*, flows: int, gateways: Sequence[str] = ()) -> str:
    """How much of the host an environment fills, in place of what is there of that, as nft commands.

    Args:
        flows: connections of one environment that the host tracks at once.
        gateways: addresses of neighbours that an environment may always go by.
    """
    return _removal(_BOUNDS_TABLES) + _BOUNDS % {"flows": flows, "gateways": _with(gateways), "bridge": BRIDGE_PREFIX}


def written(name: str, fields: Fields) -> str:
    """An element as nft writes it."""
    if name == "allowed":
        sources, targets, protocols, ports = fields
        return " . ".join((_span(sources, _dotted), _span(targets, _dotted), _span(protocols, str), _span(ports, str)))
    keys = len(KINDS[name].key)
    parts = [" . ".join(map(str, part)) for part in (fields[:keys], fields[keys:]) if part]
    return " : ".join(parts)


def listed(name: str, element: Any) -> str:
    """An element of nft's JSON, listed with NUMERIC_PROTO, as ``comparable`` has it."""
    if isinstance(element, list):
        return " : ".join(listed(name, part) for part in element)
    if isinstance(element, dict) and "concat" in element:
        parts = [_flat(part) for part in element["concat"]]
        if name == "seats" and parts[0].startswith(PORT_PREFIX):  # nft names interfaces that are there
            parts[0] = str(FIRST_PORT_IFINDEX + int(parts[0].removeprefix(PORT_PREFIX)))
        return " . ".join(parts)
    return _flat(element)


def comparable(name: str, fields: Fields) -> str:
    """An element as ``listed`` has it. Names of protocols come from /etc/protocols, which small hosts lack."""
    if name == "allowed":
        return written(name, fields)
    return written(name, tuple(nfnetlink.PROTOCOLS.get(field, field) if isinstance(field, str) else field
                               for field in fields))


def _removal(tables: Iterable[tuple[str, str]]) -> str:
    return "".join(f"add table {family} {name}\ndelete table {family} {name}\n" for family, name in tables)


def _with(elements: Sequence[str]) -> str:
    return f"elements = {{ {', '.join(elements)} }}" if elements else ""


def _packed(kind: Kind, fields: Fields) -> nfnetlink.Element:
    # On the create path: the shorter of the two ends the key.
    key = nfnetlink.concatenation(*[pack(field) for pack, field in zip(kind.key, fields, strict=False)])
    if not kind.data:
        return nfnetlink.Element(key)
    data = [pack(field) for pack, field in zip(kind.data, fields[len(kind.key):], strict=True)]
    return nfnetlink.Element(key, nfnetlink.concatenation(*data))


def _passage(fields: Fields) -> nfnetlink.Element:
    first, last = (nfnetlink.concatenation(
        *[struct.pack(layout, span[end]) for layout, span in zip((">I", ">I", "B", ">H"), fields, strict=True)])
        for end in (0, 1))
    return nfnetlink.Element(first, b"", last)


def _dotted(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


def _span(span: Span, show: Callable[[int], str]) -> str:
    first, last = span
    return show(first) if first == last else f"{show(first)}-{show(last)}"


def _flat(part: Any) -> str:
    if isinstance(part, dict) and "range" in part:
        return "-".join(map(str, part["range"]))
    if isinstance(part, dict) and "prefix" in part:
        network = ipaddress.ip_network(f"{part['prefix']['addr']}/{part['prefix']['len']}")
        return f"{network[0]}-{network[-1]}"
    return str(part)  # anything else is none of ours, and so is drift

