"""Keeps what there is as it should be: mends what others broke, tells what differs, and removes what is nobody's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from netnsd.core import audit, reconcile
from netnsd.core.addressing import FIRST_BRIDGE_IFINDEX, FIRST_PORT_IFINDEX, PORT_PREFIX
from netnsd.core.audit import Difference, Held
from netnsd.core.batch import Shared
from netnsd.core.interfaces import Adapters, Emit
from netnsd.core.particulars import Particulars, opening
from netnsd.core.pool import Pool, messages
from netnsd.core.reconcile import Orphans
from netnsd.core.removal import BATCH, Removal
from netnsd.core.supervisor import group_of
from netnsd.errors import KernelError, NetnsdError, NetnsLost, NetnsTaken

if TYPE_CHECKING:
    from netnsd.core.addressing import Bridge, Plan
    from netnsd.core.allocation import SlotAllocator
    from netnsd.core.environment import Environment
    from netnsd.core.registry import Registry
    from netnsd.core.settling import Settling

_GROUP = re.compile(rf"{PORT_PREFIX}(0|[1-9][0-9]{{0,8}})\Z")
# A link that was deleted has its name for a moment longer.
_MEND_TRIES, _MEND_AGAIN_SECONDS = 5, 0.1
# A stop may hold an environment for as long as its server is given to end.
_TURN_SECONDS = 1.0
# What is on its way is not there any more after that, or is there.
_LOOK_AGAIN_SECONDS = 0.2


class Caretaker:
    """Compares what should be with what is, and mends it."""

    def __init__(self, adapters: Adapters, plan: Plan, slots: SlotAllocator, emit: Emit, *, registry: Registry,
                 particulars: Particulars, settling: Settling, removal: Removal, pool: Pool) -> None:
        self._a = adapters
        self._plan = plan
        self._slots = slots
        self._emit = emit
        self._registry = registry
        self._particulars = particulars
        self._settling = settling
        self._removal = removal
        self._pool = pool
        self._differing = Shared(self._differences)

    async def check(self) -> bool:
        """Put right what others changed, and try again what could not be removed, or lose a name.

        Returns whether the host's rules were wrong. Raises KernelError where they, or bridges, cannot be put right.
        """
        self._removal.remove_again()  # nobody waits for that: what others have lost is not theirs to wait for
        async with trio.open_nursery() as nursery:
            for environment in self._registry.all():
                if environment.id in self._particulars.untidy:
                    nursery.start_soon(self._in_turn, environment, self._tidy)
        try:
            return await self._a.firewall.check()
        finally:
            await self._mend_all()

    def concerns(self, *, links: Collection[int], names: Collection[str]) -> bool:
        """Whether links that went (by index), or names in /run/netns, are an environment's that should have them.

        A bridge concerns whoever comes next, too.
        """
        ready = [e for e in self._registry.all() if e.state == "ready"]
        return bool(any(FIRST_BRIDGE_IFINDEX <= link < FIRST_PORT_IFINDEX for link in links)
                    or (links and any(e.slot.port_ifindex in links for e in ready))
                    or (names and any(e.netns in names for e in ready)))

    async def _mend_all(self) -> None:
        environments = [e for e in self._registry.all() if e.state == "ready"]
        try:
            for name in await self._a.network.mend_bridges(self._bridges(environments)):
                self._emit("bridge_mended", 0, "", "", what=name)
        finally:  # those of other bridges do not depend on one that cannot be mended
            await self._mend_slots(environments)

    async def _mend_slots(self, environments: Iterable[Environment]) -> None:
        waiting = self._pool.waiting
        wiring = await self._a.network.survey()
        self._pool.give_up([slot for slot in waiting if not reconcile.is_wired(slot, wiring)])
        async with trio.open_nursery() as nursery:
            for environment in environments:
                if reconcile.faults(environment, wiring):
                    nursery.start_soon(self._in_turn, environment, self._mend_or_end)

    def _bridges(self, environments: Iterable[Environment]) -> list[Bridge]:
        """Those that are needed by these, or by who gets a slot that waits for somebody."""
        slots = [*(environment.slot for environment in environments), *self._pool.waiting]
        return list({slot.bridge.index: slot.bridge for slot in slots}.values())

    async def _in_turn(self, environment: Environment, job: Callable[[Environment], Awaitable[None]]) -> None:
        """Do it unless somebody else has the environment for long: the next check tries again."""
        lock = self._particulars.lock(environment)
        with trio.move_on_after(_TURN_SECONDS) as waiting:
            await lock.acquire()
        if waiting.cancelled_caught:
            return
        try:
            if environment.state == "ready" and environment in self._registry:
                await job(environment)
        finally:
            lock.release()

    async def _mend_or_end(self, environment: Environment) -> None:
        try:
            await self.mend(environment)
            if environment.services:
                await self._settling.furnish(environment)
            else:
                self._settling.settle(environment)
        except NetnsLost as error:
            self._particulars.tell("lost", environment, reason=error.message)
            self._removal.remove_behind(environment)
        except NetnsdError as error:  # the next check tries again
            self._particulars.tell("mend_failed", environment, reason=error.message)

    async def mend(self, environment: Environment) -> None:
        """Give an environment back what the kernel lost of it. Where its name is somebody else's now, it gets another.

        Raises NetnsLost, NetnsTaken, KernelError, StoreError.
        """
        try:
            mended = await self._mend(environment)
        except NetnsTaken:
            old = self._registry.rename(environment)
            mended = await self._mend(environment)
            await self._a.network.unname(environment.slot, old)  # it may lie below somebody else's
        if "link" in mended:
            self._particulars.furnished.discard(environment.id)
        if mended:
            self._particulars.tell("mended", environment, what=list(mended), netns=environment.netns_path)

    async def _mend(self, environment: Environment) -> Sequence[str]:
        for _ in range(_MEND_TRIES - 1):
            with contextlib.suppress(KernelError):
                return await self._a.network.mend(environment.slot, environment.netns)
            await trio.sleep(_MEND_AGAIN_SECONDS)
        return await self._a.network.mend(environment.slot, environment.netns)

    async def _tidy(self, environment: Environment) -> None:
        with contextlib.suppress(NetnsdError):  # next time, then
            await self._a.network.tidy([(environment.slot, environment.netns)])
            self._particulars.untidy.discard(environment.id)

    # -- differences --------------------------------------------------------------------------------------------

    async def differences(self) -> list[Difference]:
        """What does not agree. What is on its way meanwhile is no difference. Raises KernelError, StoreError.

        Anybody may ask, and it takes long on a host with many environments.
        """
        return await self._differing.get()

    async def _differences(self) -> list[Difference]:
        first = await self._look()
        if not first:
            return []
        await trio.sleep(_LOOK_AGAIN_SECONDS)
        second = set(await self._look())
        return [difference for difference in first if difference in second]

    async def _look(self) -> list[Difference]:
        rows, orphans = await self._orphans()
        inspection = await self._a.network.inspect()
        wiring = await self._a.network.survey()
        environments = list(self._registry.all())
        ready = [opening(e) for e in environments if e.state == "ready"]
        missing, surplus = await self._a.firewall.differences(
            ready, [opening(e) for e in environments if e.state != "ready"])
        wrong = await self._a.network.mend_bridges(
            self._bridges([e for e in environments if e.state == "ready"]), look=True)
        # From here on nothing awaits: what is compared with the environments of this moment is of this moment.
        environments = list(self._registry.all())
        return audit.differences(environments, Held(
            wiring=wiring, inspection=inspection, orphans=orphans, rows=rows, leases=self._registry.leases,
            members={e.slot.index: frozenset(self._a.cgroups.pids(e.slot.cgroup)) for e in environments
                     if e.slot.index in inspection.inhabitants},
            populated=frozenset((e.id, name) for e in environments for name in e.services
                                if self._a.cgroups.populated(group_of(e.slot, name))),
            missing_elements=missing, surplus_elements=surplus, bridges=wrong))

    async def _orphans(self) -> tuple[frozenset[str], Orphans]:
        """The state file's rows, and what is nobody's, neither before nor after the look."""
        slots, ids = self._slots.used, {e.id for e in self._registry.all()}
        wired = (await self._a.network.survey()).keys()
        found = reconcile.orphans(wired, self._a.cgroups.observe(), self._a.files.observe(),
                                  slots=slots | self._slots.used, ids=ids | {e.id for e in self._registry.all()})
        return self._a.store.ids(), found

    async def prune(self) -> tuple[list[Difference], list[Difference]]:
        """Mend what is missing, and remove what is nobody's; returns what differed and does no more, and what is left.

        Raises KernelError, StoreError.
        """
        before = await self.differences()
        # By a check, when nobody else has the environment: while it is handed over it has two names of right.
        self._particulars.untidy.update({d.environment for d in before if (d.kind, d.what) == ("orphan", "name")}
                                        & {e.id for e in self._registry.all()})
        await self.check()
        _rows, orphans = await self._orphans()
        still = {d.subject for d in before if d.kind == "orphan"}
        # Nobody gets a slot while something of it is removed; those of a larger supernet nobody may get at all.
        claimed = [index for index in {*orphans.slots, *_indexes(orphans.cgroups)}
                   if index < self._plan.slots and self._plan.port_name(index) in still and self._slots.claim(index)]
        orphans = Orphans(
            slots=tuple(index for index in orphans.slots if index in claimed),
            cgroups=tuple(name for name in orphans.cgroups if name in still),
            files=tuple(name for name in orphans.files if name in still))
        try:
            await self.clear(orphans)
        finally:
            for index in claimed:
                self._slots.release(index)
        for difference in before:
            if difference.kind == "orphan" and difference.what == "row":
                with self._a.store.transaction():
                    self._a.store.delete(difference.subject)
        after = await self.differences() if before else []
        return [difference for difference in before if difference not in after], after

    async def clear(self, orphans: Orphans) -> None:
        """Remove what belongs to no environment. What cannot be removed does not keep the others waiting."""
        async def remove_files(name: str) -> None:
            self._a.files.remove(name)

        async def attempt(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                self._emit("orphan_left", 0, "", "", reason="; ".join(messages(error)))

        # Of a larger supernet there may be slots that this one has not.
        slots: Sequence[int] = [index for index in orphans.slots if index < self._plan.slots]
        async with trio.open_nursery() as nursery:
            for name in orphans.cgroups:
                nursery.start_soon(attempt, partial(self._a.cgroups.remove, name))
        for first in range(0, len(slots), BATCH):
            batch = [(self._plan.slot(index), "") for index in slots[first:first + BATCH]]
            await attempt(partial(self._a.network.unwire, batch))
        for name in orphans.files:
            await attempt(partial(remove_files, name))


def _indexes(cgroups: Iterable[str]) -> list[int]:
    """The slots that groups with such names are of."""
    return [int(found[1]) for name in cgroups if (found := _GROUP.match(name))]
