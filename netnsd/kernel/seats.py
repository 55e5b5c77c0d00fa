"""Which address may come from which port, and with which MAC: all slots of the bridges that there are.

A slot's address, MAC and port never change, whoever has it. So what one may send is known when its bridge is made,
and costs a creation nothing.
"""

from __future__ import annotations

import contextlib
import socket

from netnsd.core.addressing import Plan
from netnsd.kernel import nfnetlink, ruleset


class Seats:
    """The set ``seats`` of the table ``bridge netnsd``. In NamespaceThread, which is in the host's namespace."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bridges: dict[int, list[ruleset.Fields]] = {}
        self._socket: nfnetlink.ElementSocket | None = None

    def start(self) -> int:
        """Open a socket; returns its port id."""
        self._socket = nfnetlink.ElementSocket(ruleset.TABLE, socket.AF_BRIDGE)
        return self._socket.port_id

    def stop(self) -> None:
        """Close it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def elements(self) -> list[ruleset.Fields]:
        """All of them."""
        return [fields for some in self._bridges.values() for fields in some]

    def add(self, bridge: int) -> None:
        """There is a bridge of that index, or is about to be. Raises OSError."""
        if bridge in self._bridges or bridge >= self._plan.bridges:  # or it is of another plan, and has no slots
            return
        first = bridge * self._plan.bridge_ports
        slots = [self._plan.slot(index) for index in range(first, first + self._plan.bridge_ports)]
        seats = [(slot.port_ifindex, slot.mac.hex(":"), slot.address) for slot in slots]
        self._load(seats)
        self._bridges[bridge] = seats

    def load(self) -> None:
        """Put all of them into a table that was just loaded without. Raises OSError."""
        for seats in self._bridges.values():  # one message of all might not fit into a socket
            self._load(seats)

    def _load(self, seats: list[ruleset.Fields]) -> None:
        if self._socket is not None and seats:
            with contextlib.suppress(FileNotFoundError):  # no table yet, or not any more: it comes with them
                self._socket.add(ruleset.packed({"seats": seats}))
