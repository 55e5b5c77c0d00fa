"""Looks from the host at what listens in a fake network."""

from __future__ import annotations

import trio

from netnsd.core.addressing import Plan
from netnsd.core.interfaces import Probes
from tests.fakes.network import FakeNetwork


class FakeProbes:
    """Implements ``core.interfaces.Probes``: what listens accepts, and answers 200.

    ``statuses`` are other answers, by path, and ``silent`` are ports that never answer; ``looks`` are all that were
    made: when, where, and the path.
    """

    def __init__(self, network: FakeNetwork, plan: Plan) -> None:
        self._network = network
        self._plan = plan
        self.statuses: dict[str, int] = {}
        self.silent: set[int] = set()
        self.looks: list[tuple[float, str, int, str]] = []

    async def tcp(self, address: str, port: int) -> str:
        await self._look(address, port, "")
        return "" if self._listens(address, port) else f"port {port}: Connection refused"

    async def http(self, address: str, port: int, path: str) -> str:
        await self._look(address, port, path)
        if not self._listens(address, port):
            return f"port {port}: Connection refused"
        status = self.statuses.get(path, 200)
        return "" if 200 <= status < 400 else f"HTTP status {status}"

    async def _look(self, address: str, port: int, path: str) -> None:
        self.looks.append((trio.current_time(), address, port, path))
        await trio.lowlevel.checkpoint()
        if port in self.silent:
            await trio.sleep_forever()

    def _listens(self, address: str, port: int) -> bool:
        found = (self._network.everywhere, *(heard for index, heard in self._network.heard.items()
                                             if self._plan.slot(index).address == address))
        return any((x.protocol, x.port) == ("tcp", port) for heard in found for x in heard)


_: type[Probes] = FakeProbes
