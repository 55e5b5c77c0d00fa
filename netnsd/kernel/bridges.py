"""netnsd's bridges and the host's settings for them. Not hot: pyroute2 does the talking.

Everything here runs in NamespaceThread, in the host's namespace: /proc/sys/net and new sockets follow the thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netnsd.core.addressing import BRIDGE_PREFIX, FIRST_BRIDGE_IFINDEX, FIRST_PORT_IFINDEX, Bridge
from netnsd.kernel.rtnetlink import LINK_ALIAS
from netnsd.kernel.seats import Seats

_SYSCTL = Path("/proc/sys/net/ipv4")
_IPV6 = Path("/proc/sys/net/ipv6")
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFHWADDR, _SIOCGIFINDEX = 0x8913, 0x8915, 0x8927, 0x8933
_IFF_UP = 1
_REQUEST = struct.Struct("16s24s")  # struct ifreq


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of the host that an address plan must not overlap."""

    network: str
    interface: str


class Bridges:
    """Makes bridges when their first slot is wired, and knows what is there.

    Args:
        mtu_bytes: set explicitly, or a bridge takes its lowest port's.
        seats: is told of each.
    """

    def __init__(self, mtu_bytes: int, seats: Seats) -> None:
        self._mtu_bytes = mtu_bytes
        self._seats = seats
        self._present: set[int] = set()

    def load(self) -> None:
        """Read which of our bridges exist, and finish or remove what a killed daemon left half-made."""
        # By index, as a name may be anybody's and the alias comes after the link; the address comes last.
        ours = {link["index"]: link.get_attr("IFLA_IFNAME") for link in _links()
                if FIRST_BRIDGE_IFINDEX <= link["index"] < FIRST_PORT_IFINDEX
                and link.get_attr("IFLA_IFNAME").startswith(BRIDGE_PREFIX)}
        with _route() as route:
            addressed = {entry["index"] for entry in route.get_addr(family=socket.AF_INET)}
        self._delete(sorted(ours.keys() - addressed))
        self._present = ours.keys() & addressed
        for index in self._present:
            self._seats.add(index - FIRST_BRIDGE_IFINDEX)
            _configure(ours[index])

    def ensure(self, bridge: Bridge) -> None:
        """Make the bridge unless it is there. Raises OSError with a ``stage``-less errno."""
        if bridge.ifindex in self._present:
            return
        self._seats.add(bridge.index)
        if _is_whole(bridge):  # forgotten by a mistake, it has environments: it must not be made anew
            _configure(bridge.name)
            self._present.add(bridge.ifindex)
            return
        try:
            with _route() as route:
                # A fixed MAC: without one a bridge takes its lowest port's, which changes as environments come.
                route.link("add", ifname=bridge.name, index=bridge.ifindex, kind="bridge", mtu=self._mtu_bytes,
                           address=bridge.mac.hex(":"), br_mcast_snooping=0, state="up")
                route.link("set", index=bridge.ifindex, ifalias=LINK_ALIAS)
                route.addr("add", index=bridge.ifindex, address=bridge.address, prefixlen=bridge.prefix_length)
            _configure(bridge.name)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._delete([bridge.ifindex])
            raise OSError(error.errno, f"{bridge.name}: {error.strerror}") from error
        self._present.add(bridge.ifindex)

    def mend(self, needed: Iterable[Bridge], *, look: bool) -> list[str]:
        """Make these bridges and their settings as they should be; returns what was not. ``look``: change nothing.

        Raises OSError.
        """
        if not look:
            self._forget_lost()
        wrong: list[str] = []
        failures: list[OSError] = []
        for bridge in needed:
            try:
                self._mend(bridge, wrong, look=look)
            except OSError as error:  # the others are mended all the same
                failures.append(error)
        if failures:
            raise failures[0]
        return wrong

    def _mend(self, bridge: Bridge, wrong: list[str], *, look: bool) -> None:
        if not _is_whole(bridge):
            wrong.append(bridge.name)
            if not look:
                self._delete([bridge.ifindex])
                self._present.discard(bridge.ifindex)
                self.ensure(bridge)
            return
        for path, value in _settings(bridge.name):
            if path.read_text().strip() != value:
                wrong.append(str(path))
                if not look:
                    _write(path, value)

    def remove(self) -> None:
        """Remove all of our bridges."""
        self._delete(sorted(self._present))
        self._present.clear()

    def _forget_lost(self) -> None:
        """Of what somebody has deleted while no environment needed it, nobody tells the next that does."""
        for index in list(self._present):
            try:
                socket.if_indextoname(index)
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.ENODEV):  # nobody could tell
                    raise
                self._present.discard(index)

    def _delete(self, indexes: list[int]) -> None:
        with IPRoute() as route:
            for index in indexes:
                try:
                    route.link("del", index=index)
                except NetlinkError as error:
                    if error.code != errno.ENODEV:
                        raise OSError(error.code, str(error)) from error


def host_routes() -> list[HostRoute]:
    """The host's IPv4 routes with a destination, without those of our own bridges."""
    with _route() as route:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
        routes = []
        for entry in route.get_routes(family=socket.AF_INET):
            interface = names.get(entry.get_attr("RTA_OIF"), "")
            if entry["dst_len"] and not interface.startswith(BRIDGE_PREFIX):
                network = ipaddress.ip_network(f"{entry.get_attr('RTA_DST')}/{entry['dst_len']}", strict=False)
                routes.append(HostRoute(str(network), interface))
        return routes


def uplinks() -> tuple[list[str], list[str]]:
    """The interfaces by which the host's default routes leave, and the addresses of their gateways."""
    with _route() as route:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
        defaults = list(route.get_default_routes(family=socket.AF_INET))
    interfaces = {names[entry.get_attr("RTA_OIF")] for entry in defaults if entry.get_attr("RTA_OIF") in names}
    return sorted(interfaces), sorted({entry.get_attr("RTA_GATEWAY") for entry in defaults} - {None})


def host_forwards() -> bool:
    """Whether the host forwards between all its interfaces (net.ipv4.ip_forward)."""
    return (_SYSCTL / "ip_forward").read_text().strip() == "1"


class Forwarding:
    """Forwarding of what arrives by single interfaces; the firewall decides what is forwarded.

    Args:
        record: a file that remembers, over restarts, what was off before.
    """

    def __init__(self, record: Path) -> None:
        self._record = record

    def switch_on(self, interfaces: list[str]) -> None:
        """Switch it on, and remember where it was off.

        Again for our bridges: the kernel switches all off when somebody writes 0 to net.ipv4.ip_forward.
        """
        for own in (_SYSCTL / "conf").glob(f"{BRIDGE_PREFIX}*/forwarding"):
            _write(own, "1")
        changed = [name for name in interfaces if _forwarding_of(name).read_text().strip() == "0"]
        if changed:
            before = self._record.read_text() if self._record.exists() else ""
            self._record.write_text(before + "".join(f"{name}\n" for name in changed))
        for name in changed:
            _write(_forwarding_of(name), "1")

    def switch_back(self) -> None:
        """Switch it off where it was off before."""
        if not self._record.exists():
            return
        for name in self._record.read_text().split():
            with contextlib.suppress(FileNotFoundError):
                _write(_forwarding_of(name), "0")
        self._record.unlink()


def _forwarding_of(interface: str) -> Path:
    return _SYSCTL / "conf" / interface / "forwarding"


def _configure(name: str) -> None:
    for path, value in _settings(name):
        _write(path, value)


def _settings(name: str) -> list[tuple[Path, str]]:
    own = _SYSCTL / "conf" / name
    # 127.0.0.1:PORT of the host is translated to an environment's address; the firewall's guard closes the hole
    # that route_localnet opens the other way (Documentation/networking/ip-sysctl.rst).
    settings = [(own / "route_localnet", "1"), (own / "forwarding", "1"), (own / "send_redirects", "0")]
    # The rules are IPv4's: no environment may reach the host by the bridge's link-local address.
    if _IPV6.exists():
        settings.append((_IPV6 / "conf" / name / "disable_ipv6", "1"))
    return settings


def _is_whole(bridge: Bridge) -> bool:
    """Whether it is there under its index, is up, and has its address and its MAC: netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        def ask(request: int) -> bytes:
            return fcntl.ioctl(asker, request, _REQUEST.pack(bridge.name.encode(), b""))[16:]

        try:
            flags = int.from_bytes(ask(_SIOCGIFFLAGS)[:2], sys.byteorder)
            index = int.from_bytes(ask(_SIOCGIFINDEX)[:4], sys.byteorder)
            return (index == bridge.ifindex and bool(flags & _IFF_UP) and ask(_SIOCGIFHWADDR)[2:8] == bridge.mac
                    and ask(_SIOCGIFADDR)[4:8] == socket.inet_aton(bridge.address))
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EADDRNOTAVAIL):
                raise
            return False


@contextlib.contextmanager
def _route() -> Iterator[Any]:
    """A socket of pyroute2's, whose errors are those of any system call. Raises OSError."""
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error


def _links() -> list:  # type: ignore[type-arg]
    with _route() as route:
        return list(route.get_links())


def _write(path: Path, value: str) -> None:
    path.write_text(value)
