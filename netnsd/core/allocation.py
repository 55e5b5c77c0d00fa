"""Who gets which slot and which host port. Pure: no kernel, no state file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from netnsd.errors import AddressesExhausted, PortsExhausted, PortTaken


class SlotAllocator:
    """Hands out slot indexes, 0 to ``size - 1``.

    A freed index goes to the end of the line: the kernel may hold a deleted link's name for a moment.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._used: set[int] = set()
        self._next = 0
        self._freed: deque[int] = deque()

    @property
    def free(self) -> int:
        """How many are left."""
        return self._size - len(self._used)

    @property
    def used(self) -> frozenset[int]:
        """Which are somebody's."""
        return frozenset(self._used)

    def claim(self, index: int) -> bool:
        """Have an index that is known to be in use, or about to be cleared; returns whether nobody had it."""
        had = index in self._used
        self._used.add(index)
        return not had

    def take(self) -> int:
        """The next free index. Raises AddressesExhausted."""
        # Fresh ones first only until the first round is over; the bridges that exist are filled before new ones.
        if len(self._freed) > _KEEP_FREED or self._next >= self._size:
            while self._freed:
                index = self._freed.popleft()
                if index not in self._used:
                    self._used.add(index)
                    return index
        while self._next < self._size:
            index = self._next
            self._next += 1
            if index not in self._used:
                self._used.add(index)
                return index
        raise AddressesExhausted(f"all {self._size} addresses of the supernet are in use",
                                 hint="Remove environments, or configure a larger [network] supernet.")

    def release(self, index: int) -> None:
        """Give an index back that the kernel has let go of."""
        if index in self._used:
            self._used.remove(index)
            self._freed.append(index)


# So many freed indexes lie still before the oldest is used again.
_KEEP_FREED = 64


class PortAllocator:
    """Leases host ports from a range, inclusive, per protocol.

    Args:
        low, high: the range.
        is_listening: asks the host whether a socket has the port already.
        holder: names who has a leased port, for the caller to decide whether to say so.
    """

    def __init__(self, low: int, high: int, is_listening: Callable[[str, int], bool]) -> None:
        self.low, self.high = low, high
        self._is_listening = is_listening
        self._leases: dict[tuple[str, int], str] = {}
        self._next = low

    @property
    def leases(self) -> Mapping[tuple[str, int], str]:
        """Who holds which (protocol, port)."""
        return self._leases

    def restore(self, protocol: str, port: int, holder: str) -> None:
        """Know a lease of an earlier run again."""
        self._leases[protocol, port] = holder

    def take(self, protocol: str, holder: str) -> int:
        """Lease the next free port to the environment ``holder``. Raises PortsExhausted."""
        size = self.high - self.low + 1
        for offset in range(size):
            port = self.low + (self._next - self.low + offset) % size
            if (protocol, port) not in self._leases and not self._is_listening(protocol, port):
                self._leases[protocol, port] = holder
                self._next = port + 1 if port < self.high else self.low
                return port
        raise PortsExhausted(f"no free {protocol} port in {self.low}-{self.high}",
                             hint="Remove environments, or widen [ports] range.")

    def take_number(self, protocol: str, port: int, holder: str, knows: Callable[[str], str | None]) -> int:
        """Lease exactly ``port``. Raises PortTaken, naming the holder where ``knows`` gives a name for its id."""
        other = self._leases.get((protocol, port))
        if other is not None:
            name = knows(other)
            raise PortTaken(f"published port {port}/{protocol} is taken" + (f" by {name}" if name else ""),
                            hint="Ask for another, or for none and get a free one.", port=port,
                            **({"holder": name} if name else {}))
        if self._is_listening(protocol, port):
            raise PortTaken(f"published port {port}/{protocol} is in use by a server of the host",
                            hint="Ask for another, or for none and get a free one.", port=port)
        self._leases[protocol, port] = holder
        return port

    def release(self, protocol: str, port: int) -> None:
        """Give a lease back."""
        self._leases.pop((protocol, port), None)
