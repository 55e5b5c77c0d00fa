"""Namespaces and links that are entries of a dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from netnsd.core.addressing import Bridge, Slot
from netnsd.core.interfaces import Inhabitant, Inspection, Listener, Network, Publication, Wiring
from netnsd.errors import KernelError, LimitUnavailable, NetnsLost, NetnsTaken


class FakeNetwork:
    """Implements ``core.interfaces.Network``.

    ``foreign`` are namespaces' names that others made; ``left`` are names of ours that outlived their slot, by which
    nobody finds it any more. ``everywhere`` listens in every namespace, beside what ``listen`` put in one.
    ``unpinned`` and ``unlinked`` are slots that lost a part, ``nameless`` those whose name somebody took away,
    ``bad_bridges`` names of what is wrong about bridges, ``strays`` are who is in a slot's namespace.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()
        self.can_limit = True
        self.bandwidths: dict[int, int] = {}
        self.everywhere: set[Listener] = set()
        self.slots: dict[int, str | None] = {}
        self.second_names: set[tuple[int, str]] = set()
        self.foreign: set[str] = set()
        self.furnished: dict[int, tuple[Publication, ...]] = {}
        self.heard: dict[int, set[Listener]] = {}
        self.unpinned: set[int] = set()
        self.unlinked: set[int] = set()
        self.nameless: set[int] = set()
        self.bad_bridges: list[str] = []
        self.strays: dict[int, list[Inhabitant]] = {}
        self.masters: dict[int, int] = {}

    async def wire(self, slot: Slot, netns: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_taken(netns):
            raise NetnsTaken(f"the namespace {netns!r} was made by somebody else meanwhile", netns=netns)
        self._make(slot, netns)

    async def prepare(self, slot: Slot) -> None:
        await trio.lowlevel.checkpoint()
        self._make(slot, None)
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

    async def furnish(self, slot: Slot, publications: Sequence[Publication], bandwidth: int | None = None) -> None:
        await trio.lowlevel.checkpoint()
        self._require(slot, "furnish")
        if bandwidth is not None:
            if not self.can_limit:
                raise LimitUnavailable("this host cannot limit bandwidth", limit="bandwidth")
            self.bandwidths[slot.index] = bandwidth
        held = self.furnished.get(slot.index, ())
        self.furnished[slot.index] = held + tuple(p for p in publications if p not in held)

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        await trio.lowlevel.checkpoint()
        for slot, netns in slots:
            names = self._names(slot)
            self.left |= names - {netns} if netns != "" else set()
            for held in (self.slots, self.furnished, self.bandwidths, self.heard, self.masters, self.strays):
                held.pop(slot.index, None)
            for lost in (self.unpinned, self.unlinked, self.nameless):
                lost.discard(slot.index)
            self.second_names = {pair for pair in self.second_names if pair[0] != slot.index}

    async def survey(self) -> Mapping[int, Wiring]:
        await trio.lowlevel.checkpoint()
        return {index: Wiring(
            pinned=index not in self.unpinned,
            names=frozenset() if index in self.unpinned | self.nameless else frozenset(self._names_of(index)),
            master=None if index in self.unlinked else self.masters.get(index),
            is_sound=index not in self.unlinked) for index in self.slots}

    async def mend(self, slot: Slot, netns: str) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        index = slot.index
        if index not in self.slots or {index} <= self.unpinned & (self.nameless | self.unlinked):
            raise NetnsLost(f"nothing leads to the namespace {netns!r} any more")
        if netns in self.foreign and netns not in self._names(slot) - self._hidden(index):
            raise NetnsTaken(f"the namespace {netns!r} was made by somebody else meanwhile", netns=netns)
        parts = (("pin", self.unpinned), ("name", self.nameless), ("link", self.unlinked))
        mended = [part for part, lost in parts if index in lost]
        if index not in self.nameless and netns not in self._names(slot):
            self.slots[index] = netns
            mended.append("name")
        for _part, lost in parts:
            lost.discard(index)
        if "link" in mended:
            self.bandwidths.pop(index, None)
        return mended

    async def mend_bridges(self, bridges: Sequence[Bridge], *, look: bool = False) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        wrong = list(self.bad_bridges)
        if not look:
            self.bad_bridges.clear()
        return wrong

    async def inspect(self) -> Inspection:
        await trio.lowlevel.checkpoint()
        return Inspection(dict(self.strays), frozenset())

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

    def _make(self, slot: Slot, netns: str | None) -> None:
        self.slots[slot.index] = netns
        self.masters[slot.index] = slot.bridge.ifindex
        for lost in (self.unpinned, self.unlinked, self.nameless):
            lost.discard(slot.index)

    def _hidden(self, index: int) -> set[str]:
        return self._names_of(index) if index in self.nameless else set()

    def _names(self, slot: Slot) -> set[str]:
        return self._names_of(slot.index)

    def _names_of(self, index: int) -> set[str]:
        first = self.slots.get(index)
        return {name for other, name in self.second_names if other == index} | ({first} if first else set())

    def _require(self, slot: Slot, stage: str) -> None:
        if slot.index not in self.slots or (stage == "claim" and slot.index in self.unlinked):
            raise KernelError.at(stage, FileNotFoundError(2, ""))


_: type[Network] = FakeNetwork
