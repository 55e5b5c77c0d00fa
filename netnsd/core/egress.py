"""``egress`` of an environment: what it reaches outside of the host. Pure."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from netnsd.core.judgement import ANY_PORT, Span
from netnsd.core.traffic import EVERYTHING, PROTOCOLS, Reach, Traffic, of_protocol, reach_of, united
from netnsd.errors import InvalidRequest

ALLOW, DENY = "allow", "deny"
MOST_ENTRIES = 64
ALL_ADDRESSES: Span = (0, (1 << 32) - 1)
_ENTRY = re.compile(r"(?P<address>\d[\d.]*)(?:/(?P<length>\d{1,2}))?(?::(?P<port>\d{1,5})(?:-(?P<end>\d{1,5}))?)?"
                    r"(?:/(?P<protocol>[a-z]+))?\Z", re.ASCII)


@lru_cache(maxsize=1024)
def reach(egress: str) -> Reach:
    """What an environment with that ``egress`` may reach, as if every address were outside.

    ``allow``, ``deny``, or entries CIDR[:PORT[-PORT]][/PROTOCOL] with commas between. A port without a protocol is of
    TCP and UDP, a protocol without a port means all of its ports. Raises InvalidRequest.
    """
    if egress == ALLOW:
        return ((ALL_ADDRESSES, EVERYTHING),)
    if egress == DENY:
        return ()
    entries = egress.split(",")
    if len(entries) > MOST_ENTRIES:
        raise InvalidRequest(f"egress has {len(entries)} entries, more than {MOST_ENTRIES}", hint="Join some.")
    return reach_of([_entry(entry) for entry in entries])


def _entry(text: str) -> tuple[Span, Traffic]:
    found = _ENTRY.match(text)
    if found is None:
        raise _wrong(text, "is not allow, deny, or CIDR[:PORT[-PORT]][/PROTOCOL]")
    try:
        network = ipaddress.IPv4Network(f"{found['address']}/{found['length'] or 32}")
    except ValueError as error:
        raise _wrong(text, f"has no IPv4 network: {str(error)[:80]}") from error
    ports = ANY_PORT
    if found["port"] is not None:
        ports = (int(found["port"]), int(found["end"] or found["port"]))
        if not 1 <= ports[0] <= ports[1] <= ANY_PORT[1]:
            raise _wrong(text, "has no ports from 1 to 65535, in order")
    protocol = found["protocol"]
    if protocol is not None and protocol not in PROTOCOLS:
        raise _wrong(text, "has another protocol than tcp, udp and sctp")
    span = (int(network.network_address), int(network.broadcast_address))
    if protocol is not None:
        return span, of_protocol(protocol, ports)
    return span, EVERYTHING if found["port"] is None else united([of_protocol("tcp", ports), of_protocol("udp", ports)])


def _wrong(text: str, why: str) -> InvalidRequest:
    shown = repr(text if len(text) <= 64 else text[:64] + "...")
    return InvalidRequest(f"egress {shown} {why}", hint="Write 10.1.0.0/16, 10.1.2.3:443/tcp, 0.0.0.0/0:53 ...")
