"""How much goes over an environment's link: a token bucket at each of its ends (tc-tbf(8)).

Each end bounds what it sends, so both directions are held where packets still wait, and a sender is slowed instead of
having its packets dropped. What runs inside has no right over the end there (CAP_NET_ADMIN of the host's user
namespace).
"""

from __future__ import annotations

import errno

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netnsd.errors import LimitUnavailable

# A packet may be larger than the link's MTU until the link cuts it (GSO).
_LEAST_BURST_BYTES = 1 << 14
_LEAST_QUEUE_BYTES, _MOST_QUEUE_BYTES = 1 << 16, 1 << 24


def bound(ifindex: int, bits_per_second: int) -> None:
    """Bound what a link of the calling thread's namespace sends. May be done again.

    Raises OSError, and LimitUnavailable where the kernel has no token bucket.
    """
    rate = bits_per_second // 8
    burst = max(_LEAST_BURST_BYTES, rate // 100)
    queue = min(max(_LEAST_QUEUE_BYTES, rate // 10), _MOST_QUEUE_BYTES)
    try:
        with IPRoute() as route:
            route.tc("replace", "tbf", ifindex, rate=rate, burst=burst, limit=queue + burst)
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            raise LimitUnavailable(
                "this host cannot limit bandwidth: the kernel has no token bucket",
                hint="Leave the limit out, or load the module sch_tbf.", limit="bandwidth") from error
        raise OSError(error.code, f"tc: {error}") from error
