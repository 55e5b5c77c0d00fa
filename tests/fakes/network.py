"""Namespaces and links that are entries of a dict."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from netnsd.core.addressing import Slot
from netnsd.core.interfaces import Listener, Network, Publication
from netnsd.errors import KernelError, NetnsTaken


class FakeNetwork:
    """Implements ``core.interfaces.Network``.

    ``foreign`` are namespaces' names that others made; ``left`` are names of ours that outlived their slot, by which
    nobody finds it any more. ``everywhere`` listens in every namespace, beside what ``listen`` put in one.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()
        self.everywhere: set[Listener] = set()
        self.slots: dict[int, str | None] = {}
        self.second_names: set[tuple[int, str]] = set()
        self.foreign: set[str] = set()
        self.furnished: dict[int, tuple[Publication, ...]] = {}
        self.heard: dict[int, set[Listener]] = {}

    async def wire(self, slot: Slot, netns: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_taken(netns):
            raise NetnsTaken(f"the namespace {netns!r} was made by somebody else meanwhile", netns=netns)
        self.slots[slot.index] = netns

    async def prepare(self, slot: Slot) -> None:
        await trio.lowlevel.checkpoint()
        self.slots[slot.index] = None
        self.furnished.setdefault(slot.index, ())

    async def claim(self, slot: Slot, netns: str) -> None:
        await trio.lowlevel.checkpoint()
        self._require(slot, "claim")
        if self.is_taken(netns):
            raise NetnsTaken(f"the namespace {netns!r} was made by somebody else meanwhile", netns=netns)
        before = self.slots[slot.index]
        if before is not None:
            self.second_names.add((slot.index, before))
        self.slots[slot.index] = netns

    async def unname(self, slot: Slot, netns: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.slots.get(slot.index) == netns:  # another that it has is its name again
            others = sorted(name for index, name in self.second_names if index == slot.index)
            self.slots[slot.index] = others[0] if others else None
            netns = others[0] if others else netns
        self.second_names.discard((slot.index, netns))

    async def tidy(self, slots: Sequence[tuple[Slot, str]]) -> None:
        await trio.lowlevel.checkpoint()
        for slot, netns in slots:
            if slot.index in self.slots:
                self.slots[slot.index] = netns if netns in self._names(slot) else None
                self.second_names = {pair for pair in self.second_names if pair[0] != slot.index}

    async def furnish(self, slot: Slot, publications: Sequence[Publication]) -> None:
        await trio.lowlevel.checkpoint()
        self._require(slot, "furnish")
        held = self.furnished.get(slot.index, ())
        self.furnished[slot.index] = held + tuple(p for p in publications if p not in held)

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        await trio.lowlevel.checkpoint()
        for slot, netns in slots:
            names = self._names(slot)
            self.left |= names - {netns} if netns != "" else set()
            for held in (self.slots, self.furnished, self.heard):
                held.pop(slot.index, None)
            self.second_names = {pair for pair in self.second_names if pair[0] != slot.index}

    async def observe(self) -> set[int]:
        await trio.lowlevel.checkpoint()
        return set(self.slots)

    async def intact(self, slot: Slot, netns: str) -> bool:
        await trio.lowlevel.checkpoint()
        return netns in self._names(slot)

    async def listeners(self, slot: Slot) -> frozenset[Listener]:
        await trio.lowlevel.checkpoint()
        self._require(slot, "listeners")
        return frozenset(self.heard.get(slot.index, set()) | self.everywhere)

    def is_taken(self, netns: str) -> bool:
        return (netns in self.foreign | self.left or netns in self.slots.values()
                or netns in {name for _, name in self.second_names})

    def listen(self, slot: Slot, protocol: str, port: int, address: str = "0.0.0.0") -> None:
        """Be a server inside."""
        self.heard.setdefault(slot.index, set()).add(Listener(protocol, address, port))

    def _names(self, slot: Slot) -> set[str]:
        first = self.slots.get(slot.index)
        return {name for index, name in self.second_names if index == slot.index} | ({first} if first else set())

    def _require(self, slot: Slot, stage: str) -> None:
        if slot.index not in self.slots:
            raise KernelError.at(stage, FileNotFoundError(2, ""))


_: type[Network] = FakeNetwork
