"""Rules that are entries of a dict."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from netnsd.core.interfaces import Firewall, Opening
from netnsd.core.judgement import Judgement
from netnsd.errors import KernelError


class FakeFirewall:
    """Implements ``core.interfaces.Firewall``. ``host`` are (protocol, port) pairs of the host's own sockets."""

    def __init__(self) -> None:
        self.owners: set[tuple[str, int]] = set()
        self.published: dict[tuple[str, int], tuple[str, int]] = {}
        self.host: set[tuple[str, int]] = set()
        self.forgotten: set[str] = set()
        self.loaded = False
        self.judgement = Judgement()
        self._desired: dict[str, Opening] = {}

    async def open(self, opening: Opening) -> None:
        await trio.lowlevel.checkpoint()
        wanted = _published([opening])
        if any(self.published.get(key, value) != value for key, value in wanted.items()):
            raise KernelError("nftables: File exists", stage="nftables")
        self.published |= wanted
        self.owners.add((opening.address, opening.uid))
        self._desired[opening.address] = opening

    async def alter(self, opening: Opening) -> None:
        before = self._desired.get(opening.address)
        if before is not None:
            await self.close([before])
            await self.open(opening)
        await trio.lowlevel.checkpoint()

    async def close(self, openings: Sequence[Opening]) -> None:
        await trio.lowlevel.checkpoint()
        for opening in openings:
            self._desired.pop(opening.address, None)
        for key in _published(openings):
            self.published.pop(key, None)
        self.owners -= _owners(openings)

    async def forget(self, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self.forgotten.update(addresses)

    async def restore(self, openings: Sequence[Opening]) -> bool:
        await trio.lowlevel.checkpoint()
        self._desired = {opening.address: opening for opening in openings}
        return await self.check()

    async def check(self) -> bool:
        await trio.lowlevel.checkpoint()
        openings = list(self._desired.values())
        wanted = (True, _owners(openings), _published(openings))
        if (self.loaded, self.owners, self.published) == wanted:
            return False
        self.loaded, self.owners, self.published = wanted
        return True

    async def judge(self, judgement: Judgement) -> None:
        await trio.lowlevel.checkpoint()
        self.judgement = judgement

    async def differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        await trio.lowlevel.checkpoint()
        held = {str(item) for item in (*self.owners, *self.published.items())}
        wanted, tolerated = ({str(item) for item in (*_owners(some), *_published(some).items())}
                             for some in (openings, moving))
        return sorted(wanted - held), sorted(held - wanted - tolerated)

    def is_listening(self, protocol: str, port: int) -> bool:
        return (protocol, port) in self.host

    def flush(self) -> None:
        """Be another tool that takes everything away."""
        self.loaded = False
        self.owners.clear()
        self.published.clear()


def _owners(openings: Sequence[Opening]) -> set[tuple[str, int]]:
    return {(opening.address, opening.uid) for opening in openings}


def _published(openings: Sequence[Opening]) -> dict[tuple[str, int], tuple[str, int]]:
    return {(p.protocol, p.published): (o.address, p.port) for o in openings for p in o.publications}


_: type[Firewall] = FakeFirewall
