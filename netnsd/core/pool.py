"""Slots made before demand: wired, furnished, and nobody's. A creation that gets one has only to name it.

In the cgroup of what is to be its first service a process waits to become that: a process is most of a server's start.

A slot that had an owner is never used again: it is deleted, and another one made. What a killed daemon left of its pool
belongs to no environment, and goes with the orphans at the next start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from netnsd.core.addressing import Plan, Slot
from netnsd.core.allocation import SlotAllocator
from netnsd.core.quiet import Quiet
from netnsd.core.supervisor import group_of
from netnsd.errors import NetnsdError

if TYPE_CHECKING:
    from netnsd.core.interfaces import Adapters

MOST_SLOTS = 1000
FIRST_SERVICE = "main"  # what a plain command is called
_RECENT_SECONDS = 10.0
_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """``size``: kept ready. ``most``: up to so many while creations come fast. ``rate``: made per second, at most."""

    size: int = 0
    most: int = 0
    rate: float = 100.0


class SlotSpoilt(Exception):
    """Somebody took a part of a slot away before it was claimed. Nobody outside hears of it: another is made."""


class Maker(Protocol):
    """Makes slots and removes them, as ``core.interfaces.Network`` does."""

    async def prepare(self, slot: Slot) -> None:
        """Make it. Raises KernelError; something of it may be left."""
        ...

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        """Remove what there is of (slot, name) pairs."""
        ...


class SlotMaker:
    """Makes slots with a process that waits in the group of what is to be their first service."""

    def __init__(self, adapters: Adapters) -> None:
        self._a = adapters

    async def prepare(self, slot: Slot) -> None:
        """See ``Maker``."""
        await self._a.network.prepare(slot)
        await self._a.cgroups.create(group_of(slot, FIRST_SERVICE))
        self._a.processes.prepare(group_of(slot, FIRST_SERVICE))

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        """See ``Maker``."""
        for slot, _name in slots:
            await self._a.cgroups.remove(slot.cgroup)
        await self._a.network.unwire(slots)


class Pool:
    """Slots that are ready to be claimed. ``run`` fills it.

    Between ``size`` and ``most`` it keeps as many as were asked for in the last ten seconds, as demand comes again.

    Args:
        maker: makes slots.
        quiet: says when nobody waits for a creation; slots are made then.
        tell: is told why it cannot be filled, once per reason.
    """

    def __init__(self, maker: Maker, slots: SlotAllocator, plan: Plan, settings: PoolSettings, quiet: Quiet, *,
                 tell: Callable[[str], None]) -> None:
        self._maker = maker
        self._slots = slots
        self._plan = plan
        self._settings = settings
        self._quiet = quiet
        self._tell = tell
        self._ready: deque[Slot] = deque()
        # On their way out. They keep their indexes until the kernel has let go of them.
        self._leaving: list[Slot] = []
        self._asked: deque[float] = deque(maxlen=max(settings.most, 1))
        self._changed = trio.Event()
        self.size = settings.size
        self.claimed = 0
        self.missed = 0
        self.reason = ""

    @property
    def ready(self) -> int:
        """How many can be claimed now."""
        return len(self._ready)

    @property
    def held(self) -> int:
        """How many there are, those included that could not be removed."""
        return len(self._ready) + len(self._leaving)

    @property
    def target(self) -> int:
        """How many there should be."""
        if not self.size:
            return 0
        oldest = trio.current_time() - _RECENT_SECONDS
        while self._asked and self._asked[0] < oldest:
            self._asked.popleft()
        return max(self.size, len(self._asked))

    def take(self) -> Slot | None:
        """A slot for the caller alone, or None: it makes its own then. Nothing here awaits."""
        if self.size:
            self._asked.append(trio.current_time())
            self._pulse()
        if not self._ready:
            self.missed += bool(self.size)
            return None
        self.claimed += 1
        return self._ready.popleft()

    def put_back(self, slot: Slot) -> None:
        """Take back a slot that was never anybody's."""
        self.claimed -= 1
        self._ready.appendleft(slot)
        self._pulse()

    @property
    def waiting(self) -> Sequence[Slot]:
        """Those that can be claimed now; a copy."""
        return list(self._ready)

    def give_up(self, spoilt: Sequence[Slot]) -> None:
        """Have these removed, as far as nobody has claimed them, and others made."""
        for slot in spoilt:
            if slot in self._ready:
                self._ready.remove(slot)
                self._leaving.append(slot)
        if spoilt:
            self._pulse()

    def resize(self, size: int) -> None:
        """Keep so many; none at 0. Slots too many are removed soon."""
        self.size = size
        self._asked.clear()
        self._pulse()

    async def run(self) -> None:
        """Keep it as it should be, for ever."""
        while True:
            self._changed = trio.Event()
            pause = _RECENT_SECONDS if self.target > self.size else float("inf")
            try:
                if self._leaving or len(self._ready) > self.target:
                    await self._remove(len(self._ready) - self.target)
                    continue
                if len(self._ready) < self.target:
                    await self._quiet.wait()
                    await self._add()
                    await trio.sleep(1 / self._settings.rate)
                    continue
            except (NetnsdError, ExceptionGroup) as error:
                self._stuck("; ".join(messages(error)))
                pause = _AGAIN_SECONDS
                await trio.sleep(0.1)
            with trio.move_on_after(pause):
                await self._changed.wait()

    async def drain(self) -> None:
        """Remove what is ready, while ``run`` does not."""
        await self._remove(len(self._ready))

    async def _add(self) -> None:
        slot = self._plan.slot(self._slots.take())
        try:
            await self._maker.prepare(slot)
        except BaseException:
            self._leaving.append(slot)
            with trio.CancelScope(shield=True):
                await self._remove(0)
            raise
        self._ready.append(slot)
        self.reason = ""

    async def _remove(self, count: int) -> None:
        """Remove so many that are ready, and what could not be removed before."""
        self._leaving += [self._ready.pop() for _ in range(min(count, len(self._ready)))]
        slots = list(self._leaving)
        if slots:
            await self._maker.unwire([(slot, None) for slot in slots])
        for slot in slots:
            self._leaving.remove(slot)
            self._slots.release(slot.index)

    def _stuck(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            self._tell(reason)

    def _pulse(self) -> None:
        self._changed.set()


def messages(error: Exception) -> list[str]:
    """What an error says, or each that a group of them has."""
    if isinstance(error, ExceptionGroup):
        return [message for part in error.exceptions for message in messages(part)]
    return [str(error)]
