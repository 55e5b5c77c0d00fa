"""What a namespace needs before servers run in it, done by NamespaceThread inside it: sysctls and the inner table.

Most dev servers listen on 127.0.0.1 alone. Traffic to the environment's address for which no socket listens is sent
to 127.0.0.1 instead; so is TCP from the host where a socket listens on all addresses, as some servers that do trust
loopback alone. And an environment reaches its own published ports as the host does, at localhost:PUBLISHED.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from netnsd.core.interfaces import Publication
from netnsd.kernel import nfnetlink
from netnsd.kernel.nft import Nft, NftError

_SYSCTLS = (
    # Servers are not root: any port may be bound, and ping works without a capability.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
    # Lets the table below send what arrived by eth0 to 127.0.0.1.
    ("/proc/sys/net/ipv4/conf/eth0/route_localnet", b"1"),
)
_IPV6_OFF = "/proc/sys/net/ipv6/conf/all/disable_ipv6"

_TABLE = """
table ip netnsd {
  map published { type inet_proto . inet_service : inet_service; }
  chain guard {
    type filter hook prerouting priority -300;
    iifname "eth0" ip daddr 127.0.0.0/8 drop
  }
  chain arriving {
    type nat hook prerouting priority -100;
    iifname "eth0" fib daddr type local meta l4proto { tcp, udp } jump loopback
  }
  chain loopback {
    socket wildcard 0 return
    meta l4proto udp socket wildcard 1 return
    ip saddr != @host@ socket wildcard 1 return
    dnat to 127.0.0.1
  }
  # Databases let in only who comes from 127.0.0.1 by default. Who comes from the host's address is the owner, and comes
  # by loopback too; nobody else has that address.
  chain arrived {
    type nat hook input priority 100;
    iifname "eth0" ip saddr @host@ ip daddr 127.0.0.1 snat to 127.0.0.1
  }
  chain own {
    type nat hook output priority -100;
    ip daddr 127.0.0.0/8 meta l4proto { tcp, udp } redirect to : meta l4proto . th dport map @published
  }
}
"""


def furnish(host: str, publications: Sequence[Publication]) -> None:
    """Set up the calling thread's namespace. May be done again.

    Args:
        host: the address by which the host's own processes come in.
        publications: the environment's published ports.

    Raises OSError, NftError.
    """
    for path, value in _SYSCTLS:
        _write(path, value)
    if os.path.exists(_IPV6_OFF):
        _write(_IPV6_OFF, b"1")
    # Not "delete, then add": closing a socket that deleted a table waits 10 ms and more for its memory to be freed
    # (nft_rcv_nl_event in net/netfilter/nf_tables_api.c).
    with Nft() as nft:
        try:
            nft.run("create table ip netnsd\n" + _TABLE.replace("@host@", host))
        except NftError as error:
            if not error.exists:
                raise
    publish(publications)


def publish(publications: Sequence[Publication]) -> None:
    """Let the calling thread's namespace, which is furnished, reach its own published ports. May be done again.

    Raises OSError.
    """
    if publications:
        with contextlib.closing(nfnetlink.ElementSocket("netnsd")) as elements:
            elements.add({"published": [nfnetlink.publication(p.protocol, p.published, nfnetlink.port(p.port))
                                        for p in publications]})


def _write(path: str, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
