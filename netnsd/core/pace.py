"""How often something may be done: token buckets, one for each key. Pure: the time is told.

A bucket holds ``burst`` at most, each use takes one, and ``rate`` come back per second.
"""

from __future__ import annotations

from collections.abc import Hashable

_MOST = 4096


class Pace:
    """Buckets by key.

    Args:
        rate: per second.
        burst: at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left: dict[Hashable, tuple[float, float]] = {}  # what was left, and when

    def take(self, key: Hashable, now: float) -> float:
        """Use one: 0 where there was one, else the seconds until there is."""
        left, then = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        if len(self._left) >= _MOST:  # the one that was used longest ago is the fullest, or nearly
            del self._left[next(iter(self._left))]
        self._left[key] = (left if wait else left - 1, now)
        return wait
