"""The host's rules: implements ``core.interfaces.Firewall``.

One table. Its rules never change with the number of environments; elements of its maps and sets do. Everything is
loaded in one transaction, so there is no moment in which a part of it is missing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import trio
from pyroute2.netlink.exceptions import NetlinkError

from netnsd.core.addressing import BRIDGE_PREFIX
from netnsd.core.interfaces import Opening
from netnsd.core.judgement import Judgement
from netnsd.errors import KernelError
from netnsd.kernel import bridges, nfnetlink, sockets
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.nft import Nft, NftError

T = TypeVar("T")

TABLE = "netnsd"
_RULES = """
table ip netnsd {
  map published { type inet_proto . inet_service : ipv4_addr . inet_service; %(published)s }
  set owners { type ipv4_addr . uid; %(owners)s }
  set pairs { type ipv4_addr . ipv4_addr; }
  set uplinks { type ifname; %(uplinks)s }
  set flows { type ipv4_addr; size 65536; flags dynamic; }

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
  }

  # Only the owner (and root) reaches an environment. Every packet of the original direction is checked, not just the
  # first: another user's socket on the owner's source port would pass as established otherwise.
  chain from_host {
    type filter hook output priority 0;
    # Not by oifname: of what publish_local translated it is still "lo" in this hook.
    ip daddr %(supernet)s goto to_environment
    # A socket bound to a device sends by it whatever the address: broadcast, multicast, 127/8.
    oifname "nd*" meta skuid != 0 drop
  }
  # Who may comes first: each rule costs every packet, and the look at the routes costs most.
  chain to_environment {
    meta skuid 0 accept
    ip daddr . meta skuid @owners accept
    fib daddr type local accept
    ct direction original meta skuid 0-4294967295 reject
    icmp type redirect drop
    ct state new reject
  }
  chain translate {
    type nat hook postrouting priority 100;
    ip saddr 127.0.0.0/8 oifname "%(bridge)s*" masquerade
    ip saddr %(supernet)s oifname != "lo" oifname != "%(bridge)s*" masquerade
  }

  # Between environments only pairs that are let; to the outside what they begin; from the outside nothing. Here too
  # packets of the original direction are never let for being established: a connection may have been made while another
  # tool had flushed these rules.
  chain through {
    type filter hook forward priority 0;
    iifname "%(bridge)s*" jump from_environment
    iifname "%(bridge)s*" accept
    oifname "%(bridge)s*" ct direction reply ct state established,related accept
    oifname "%(bridge)s*" drop
    iifname @uplinks oifname @uplinks drop
  }
  chain from_environment {
    ct direction reply ct state established,related accept
    oifname != "%(bridge)s*" ct state established,related accept
    ct state invalid drop
    ct state new add @flows { ip saddr ct count over %(flows)d } reject
    oifname "%(bridge)s*" ip saddr . ip daddr @pairs accept
    # A reset is told at once; the kernel sends a peer about one ICMP error a second (net.ipv4.icmp_ratelimit).
    oifname "%(bridge)s*" meta l4proto tcp reject with tcp reset
    oifname "%(bridge)s*" reject with icmp type admin-prohibited
    tcp flags syn tcp option maxseg size set rt mtu
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
"""
_UID = struct.Struct("=I")
# Their messages fit what a socket takes at once (net.core.wmem_default).
_OPENINGS_EACH = 500
_REPLACE = "add table ip netnsd\ndelete table ip netnsd\n"


class NftFirewall:
    """The table ``netnsd`` of the host.

    Args:
        thread: does everything; shared with the network.
        supernet: all environments' addresses, in CIDR form.
        flows_per_address: connections of one environment that the host tracks at once.
        forwarding: is switched on for the uplinks once the rules are there.
    """

    def __init__(self, thread: NamespaceThread, supernet: str, flows_per_address: int,
                 forwarding: bridges.Forwarding) -> None:
        self._thread = thread
        self._supernet = supernet
        self._flows = flows_per_address
        self._nft: Nft | None = None
        self._elements: nfnetlink.ElementSocket | None = None
        # Adding elements does not wait for the thread, but must not meet a reload of the table.
        self._changing = threading.Lock()
        self._loaded = ""
        self._uplinks: list[str] = []
        self._desired: dict[str, Opening] = {}
        self._forwarding = forwarding
        self._judgement = Judgement()

    async def start(self) -> None:
        """Open nftables in the host's namespace."""
        await self._thread.run(self._start, Priority.CREATE)

    async def stop(self, *, remove: bool) -> None:
        """Close; with ``remove`` the table goes too (no environment is left)."""
        await self._thread.run(lambda: self._stop(remove=remove), Priority.CREATE)

    async def open(self, opening: Opening) -> None:
        """See ``core.interfaces.Firewall``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            if self._changing.acquire(blocking=False):
                try:
                    self._open(opening)
                finally:
                    self._changing.release()
            else:
                await self._thread.run(self._in_turn(lambda: self._open(opening)), Priority.CREATE)
        except FileNotFoundError:  # another tool took the table away a moment ago
            await self._thread.run(self._in_turn(lambda: self._open_anew(opening)), Priority.CREATE)

    async def close(self, openings: Sequence[Opening]) -> None:
        """See ``core.interfaces.Firewall``."""
        await trio.to_thread.run_sync(self._in_turn(lambda: self._close(openings)))

    async def judge(self, judgement: Judgement) -> None:
        """See ``core.interfaces.Firewall``."""
        await self._thread.run(self._in_turn(lambda: self._judge(judgement)), Priority.CREATE)

    @property
    def senders(self) -> frozenset[int]:
        """The port ids of the sockets by which rules are changed here. libnftables' has the process's, as the first."""
        assert self._elements is not None
        return frozenset((os.getpid(), self._elements.port_id))

    async def repair(self) -> bool:
        """Put back what somebody has just changed, before anything else is done; returns whether it had to be."""
        return await self._thread.run(self._in_turn(self._repair), Priority.RULES)

    async def restore(self, openings: Sequence[Opening]) -> bool:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(lambda: self._restore(openings)), Priority.CHECK)

    async def check(self) -> bool:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(self._put_right), Priority.CHECK)

    async def differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(lambda: self._differences(openings, moving)), Priority.CHECK)

    def is_listening(self, protocol: str, port: int) -> bool:
        """See ``core.interfaces.Firewall``."""
        try:
            return sockets.is_listening(protocol, port)
        except OSError as error:
            raise KernelError.at("port", error) from error

    def _judge(self, judgement: Judgement) -> None:
        self._judgement = judgement

    def _in_turn(self, change: Callable[[], T]) -> Callable[[], T]:
        def locked() -> T:
            with self._changing:
                return change()

        return locked

    def _start(self) -> None:
        self._nft = Nft()
        self._run("list tables")  # now it has its port id, the process's, which the first socket gets
        self._elements = nfnetlink.ElementSocket(TABLE)

    def _stop(self, *, remove: bool) -> None:
        try:
            if remove:
                self._forwarding.switch_back()
                self._run(_REPLACE)
        finally:
            if self._nft is not None:
                self._nft.close()
                self._nft = None
            if self._elements is not None:
                self._elements.close()
                self._elements = None

    def _run(self, commands: str, *, output_flags: int = 0) -> str:
        assert self._nft is not None
        return self._nft.run(commands, output_flags=output_flags)

    def _open(self, opening: Opening) -> None:
        assert self._elements is not None
        try:
            self._elements.add(_packed([opening]))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise KernelError.at("nftables", error) from error
        self._desired[opening.address] = opening

    def _open_anew(self, opening: Opening) -> None:
        """Load the table with it: whoever takes the table away in a loop may have done so again."""
        try:
            self._open(opening)
        except FileNotFoundError:
            self._desired[opening.address] = opening
            try:
                self._put_right()
            except BaseException:
                del self._desired[opening.address]
                raise

    def _close(self, openings: Sequence[Opening]) -> None:
        assert self._elements is not None
        for opening in openings:
            self._desired.pop(opening.address, None)
        try:
            if not self._delete(_packed(openings)):
                for name, elements in _packed(openings).items():
                    for element in elements:
                        self._delete({name: [element]})
        except OSError as error:
            raise KernelError.at("nftables", error) from error

    def _delete(self, elements: dict[str, list[nfnetlink.Element]]) -> bool:
        """Delete elements, all or nothing; returns False where one is missing."""
        assert self._elements is not None
        try:
            self._elements.delete(elements)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def _restore(self, openings: Sequence[Opening]) -> bool:
        self._desired = {opening.address: opening for opening in openings}
        return self._put_right()

    def _repair(self) -> bool:
        is_gone = False
        if self._loaded:
            try:
                if is_gone := not self._listing():
                    self._close_off(list(self._desired.values()))
            except OSError as error:
                raise _unusable(error) from error
        return self._put_right() or is_gone

    def _close_off(self, openings: Sequence[Opening]) -> None:
        """Put back a table that is gone: first what keeps users apart, then who may all the same.

        The rules alone take a millisecond, and as text a thousand elements take 20 more.
        """
        assert self._elements is not None
        self._load((), self._uplinks)
        with contextlib.suppress(FileNotFoundError):  # gone again, and told again
            for first in range(0, len(openings), _OPENINGS_EACH):
                self._elements.add(_packed(openings[first:first + _OPENINGS_EACH]))

    def _put_right(self) -> bool:
        """Compare what is loaded with what should be, as it is now: this thread does every change in turn."""
        try:
            return self._load_if_wrong(list(self._desired.values()))
        except (OSError, ValueError, NetlinkError) as error:
            raise _unusable(error) from error

    def _load_if_wrong(self, openings: Sequence[Opening]) -> bool:
        # A host that forwards anyway is let; where only netnsd needs it, it must not become a router between uplinks.
        uplinks = [] if bridges.host_forwards() else bridges.uplinks()
        if self._loaded:
            self._forwarding.switch_on(uplinks)
        is_right = self._loaded and self._listing() == self._loaded and uplinks == self._uplinks
        if is_right and self._present() == _present(openings, uplinks):
            return False
        self._load(openings, uplinks)
        # Once and for all: later, somebody else may have put something in before it is listed.
        self._loaded, self._uplinks = self._loaded or self._listing(), uplinks
        self._forwarding.switch_on(uplinks)
        return True

    def _differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        present, wanted = self._present(), _present(openings, self._uplinks)
        if present is None or self._listing() != self._loaded:
            return ["table ip netnsd, or rules of it"], []
        missing, surplus = wanted - present, present - wanted - _present(moving, ())
        return ([f"{name} {{ {element} }}" for name, element in sorted(missing)],
                [f"{name} {{ {element} }}" for name, element in sorted(surplus)])

    def _load(self, openings: Sequence[Opening], uplinks: Sequence[str]) -> None:
        self._run(_REPLACE + rules(supernet=self._supernet, flows=self._flows, openings=openings, uplinks=uplinks))

    def _listing(self) -> str:
        try:
            return self._run("list table ip netnsd", output_flags=Nft.TERSE)
        except NftError as error:
            if error.is_missing:
                return ""
            raise

    def _present(self) -> set[tuple[str, str]] | None:
        """The elements that are there; None where a set is taken away meanwhile."""
        found = set()
        for kind, name in (("map", "published"), ("set", "owners"), ("set", "pairs"), ("set", "uplinks")):
            try:
                text = self._run(f"list {kind} ip netnsd {name}", output_flags=Nft.JSON | Nft.NUMERIC_PROTO)
            except NftError as error:
                if error.is_missing:
                    return None
                raise
            listing = json.loads(text)
            for entry in listing["nftables"]:
                for element in entry.get(kind, {}).get("elem", []):
                    found.add((name, _flat(element)))
        return found


def _unusable(error: Exception) -> KernelError:
    return KernelError(f"firewall: {error}", stage="firewall", errno="",
                       hint="`netnsctl doctor` checks what this host lacks.")


def rules(*, supernet: str, flows: int, openings: Sequence[Opening] = (), uplinks: Sequence[str] = ()) -> str:
    """The whole table as nft commands. Arguments as in ``NftFirewall``; ``uplinks`` are not routed between."""
    elements = dict(_elements(openings)) | {"uplinks": [f'"{name}"' for name in uplinks]}
    return _RULES % {
        **{name: f"elements = {{ {', '.join(values)} }}" if values else "" for name, values in elements.items()},
        "supernet": supernet, "bridge": BRIDGE_PREFIX, "flows": flows}


def _elements(openings: Iterable[Opening]) -> list[tuple[str, list[str]]]:
    """The elements of each set and map, as nft writes them."""
    owners: list[str] = []
    published: list[str] = []
    for opening in openings:
        owners.append(f"{opening.address} . {opening.uid}")
        published.extend(f"{p.protocol} . {p.published} : {opening.address} . {p.port}" for p in opening.publications)
    return [("owners", owners), ("published", published)]


def _packed(openings: Iterable[Opening]) -> dict[str, list[nfnetlink.Element]]:
    """The same elements as the kernel has them: keys, and data of maps. A user's id is in the host's order."""
    owners: list[nfnetlink.Element] = []
    published: list[nfnetlink.Element] = []
    for opening in openings:
        address = socket.inet_aton(opening.address)
        owners.append((nfnetlink.concatenation(address, _UID.pack(opening.uid)), b""))
        published.extend(nfnetlink.publication(p.protocol, p.published, address, nfnetlink.port(p.port))
                         for p in opening.publications)
    return {name: elements for name, elements in (("owners", owners), ("published", published)) if elements}


def _present(openings: Iterable[Opening], uplinks: Iterable[str]) -> set[tuple[str, str]]:
    return ({(name, _numeric(value)) for name, values in _elements(openings) for value in values}
            | {("uplinks", name) for name in uplinks})


def _numeric(value: str) -> str:
    """An element as nft lists it with NUMERIC_PROTO. Names come from /etc/protocols, which small hosts lack."""
    first, separator, rest = value.partition(" . ")
    return str(nfnetlink.PROTOCOLS.get(first, first)) + separator + rest


def _flat(element: Any) -> str:
    """An element of nft's JSON, as nft writes it."""
    if isinstance(element, list):
        return " : ".join(_flat(part) for part in element)
    if isinstance(element, dict) and "concat" in element:
        return " . ".join(str(part) for part in element["concat"])
    return str(element)  # anything else is none of ours, and so is drift

