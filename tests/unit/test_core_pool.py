"""Slots that are made before demand: none is lost or has two owners, and there are as many as there should be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from netnsd.core.addressing import Plan, Slot
from netnsd.core.allocation import SlotAllocator
from netnsd.core.pool import _AGAIN_SECONDS, _RECENT_SECONDS, Pool, PoolSettings
from netnsd.core.quiet import Quiet
from netnsd.errors import KernelError
from tests.fakes.network import FakeNetwork

PLAN = Plan("10.9.0.0/26", 13)  # 4 bridges of 13 slots
MOST = 6
LONG_SECONDS = 3 * _RECENT_SECONDS


class Ledger(FakeNetwork):
    """A network that does not let a slot be made while it is there, nor removed while somebody has it.

    The next calls of prepare and unwire fail as ``failures`` says: before they did anything, after, or not ("").
    """

    def __init__(self) -> None:
        super().__init__()
        self.owned: set[int] = set()
        self.failures: list[str] = []
        self.prepared = 0

    async def prepare(self, slot: Slot) -> None:
        assert slot.index not in self.slots, "made, though it is there"
        assert slot.index not in self.owned
        async with self._planted():
            await super().prepare(slot)
            self.prepared += 1

    async def unwire(self, slots: Sequence[tuple[Slot, str | None]]) -> None:
        assert not {slot.index for slot, _ in slots} & self.owned, "removed, though somebody has it"
        try:
            async with self._planted():
                await super().unwire(slots)
        except KernelError as error:
            raise ExceptionGroup("unwire", [error]) from error

    @asynccontextmanager
    async def _planted(self) -> AsyncIterator[None]:
        kind = self.failures.pop(0) if self.failures else ""
        if kind == "before":
            raise KernelError("planted", stage="before")
        yield
        if kind == "after":
            raise KernelError("planted", stage="after")


@dataclass
class Host:
    """A pool, and its owners' part. ``taken``: nobody's yet; ``owned``: has or had an owner."""

    network: Ledger
    size: int
    most: int = MOST
    rate: float = 100.0
    told: list[str] = field(default_factory=list)
    taken: list[Slot] = field(default_factory=list)
    owned: list[Slot] = field(default_factory=list)
    quiet: Quiet = field(default_factory=Quiet)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """One run of a daemon, which is killed at its end; the next one removes what belongs to nobody."""
        self.slots = SlotAllocator(PLAN.slots)
        for slot in self.owned:
            self.slots.claim(slot.index)
        self.taken.clear()  # a row that no kernel answered for: undone
        failures, self.network.failures = self.network.failures, []
        orphans = set(await self.network.survey()) - {slot.index for slot in self.owned}
        await self.network.unwire([(PLAN.slot(index), "") for index in orphans])
        self.network.failures = failures
        self.pool = Pool(self.network, self.slots, PLAN, PoolSettings(self.size, self.most, self.rate), self.quiet,
                         tell=self.told.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pool.run)
            yield
            nursery.cancel_scope.cancel()

    def take(self) -> Slot | None:
        """Take one, and see that it is as new."""
        slot = self.pool.take()
        if slot is not None:
            assert slot not in [*self.taken, *self.owned], "two owners"
            assert self.network.slots[slot.index] is None, "it had a name"
            assert slot.index in self.network.furnished
            self.taken.append(slot)
        return slot

    async def claim(self, slot: Slot) -> None:
        """Be an environment's."""
        self.taken.remove(slot)
        self.owned.append(slot)
        self.network.owned.add(slot.index)
        await self.network.claim(slot, f"e{slot.index}")

    async def end(self, slot: Slot) -> None:
        """Remove an environment, or one that was never made."""
        self.network.owned.discard(slot.index)
        failures, self.network.failures = self.network.failures, []
        await self.network.unwire([(slot, f"e{slot.index}" if slot in self.owned else None)])
        self.network.failures = failures
        (self.owned if slot in self.owned else self.taken).remove(slot)
        self.slots.release(slot.index)

    def check(self) -> None:
        """What holds at any moment at which nothing is under way."""
        ready = {slot.index for slot in self.pool._ready}
        held = {slot.index for slot in [*self.taken, *self.owned]}
        assert len(ready) == self.pool.ready
        assert not ready & held
        assert ready | held <= self.network.slots.keys()
        assert PLAN.slots - self.slots.free >= len(ready | held)
        assert self.pool.target <= max(self.pool.size, self.most)
        assert self.pool.target >= self.pool.size

    def check_at_rest(self) -> None:
        """What holds when nothing fails and nobody came for a while."""
        self.check()
        held = {slot.index for slot in [*self.pool._ready, *self.taken, *self.owned]}
        assert self.network.slots.keys() == held, "made, and neither ready nor owned"
        assert PLAN.slots - self.slots.free == len(held), "indexes that nobody has"
        assert self.pool.ready == self.pool.target == self.pool.size


def run(main: Callable[[], Any]) -> None:
    """Run it on a clock that jumps to the next deadline."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


MOVES = st.lists(st.one_of(
    st.tuples(st.just("take"), st.integers(1, 4)), st.tuples(st.just("put back"), st.integers(0, 9)),
    st.tuples(st.just("claim"), st.integers(0, 9)), st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("resize"), st.integers(0, 8)),
    st.tuples(st.just("pass"), st.sampled_from([0, 3, 8, 60, 900, 6000, 11000])),
    st.tuples(st.just("fail"), st.lists(st.sampled_from(["", "before", "after"]), max_size=4)),
    st.tuples(st.just("restart"), st.none())), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(0, 8), MOVES)
def test_no_slot_is_lost_or_has_two_owners_whatever_happens(size: int, most: int, moves: list[tuple[str, Any]]) -> None:
    async def main() -> None:
        host = Host(Ledger(), size, most)
        todo = list(moves)
        while True:
            async with host.running():
                while todo and todo[0][0] != "restart":
                    await move(host, *todo.pop(0))
                    host.check()
                if not todo:
                    host.network.failures = []
                    await trio.sleep(LONG_SECONDS)
                    host.check_at_rest()
                    host.pool.resize(0)
                    await trio.sleep(1)
                    host.check_at_rest()
                    return
            todo.pop(0)

    run(main)


async def move(host: Host, kind: str, value: Any) -> None:
    if kind == "take":
        for _ in range(value):
            host.take()
    elif kind == "put back" and host.taken:
        host.pool.put_back(host.taken.pop(value % len(host.taken)))
    elif kind == "claim" and host.taken:
        await host.claim(host.taken[value % len(host.taken)])
    elif kind == "end" and (had := [*host.taken, *host.owned]):
        await host.end(had[value % len(had)])
    elif kind == "resize":
        host.pool.resize(value)
    elif kind == "pass":
        await trio.sleep(value / 1000)
    elif kind == "fail":
        host.network.failures += value


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["prepare", "unwire"])
def test_a_pool_that_is_cancelled_at_any_step_loses_nothing(call: str, after: bool) -> None:
    class Network(Ledger):
        """Cancels the pool's run at a call."""

        scope = trio.CancelScope()

    async def cancelling(self: Network, slots: Any, *, original: Callable[[Any], Any]) -> None:
        if not after:
            self.scope.cancel()
            await trio.lowlevel.checkpoint()
        await original(slots)
        if after:
            self.scope.cancel()
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        network = Network()
        original = getattr(network, call)
        setattr(network, call, lambda slots: cancelling(network, slots, original=original))
        slots = SlotAllocator(PLAN.slots)
        pool = Pool(network, slots, PLAN, PoolSettings(3, 0), Quiet(), tell=lambda _: None)
        if call == "unwire":  # there is something to remove
            for _ in range(3):
                pool._ready.append(PLAN.slot(slots.take()))
                await network.prepare(pool._ready[-1])
            pool.resize(0)
        with network.scope:
            await pool.run()
        await pool.drain()
        assert network.slots == {}
        assert slots.free == PLAN.slots

    run(main)


# -- how many ---------------------------------------------------------------------------------------------------


async def test_it_fills_to_its_size_and_no_further(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 4)
    async with host.running():
        await trio.sleep(60)
        assert (host.pool.ready, host.pool.target, host.network.prepared) == (4, 4, 4)


async def test_it_makes_so_many_a_second_at_most(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 13, rate=10.0)
    async with host.running():
        began = trio.current_time()
        for number in range(1, 14):
            while host.pool.ready < number:
                await trio.sleep(0.001)
            assert trio.current_time() - began >= (number - 1) * 0.1 - 0.001


async def test_it_grows_with_recent_demand_and_shrinks_when_that_is_over(
    autojump_clock: trio.testing.MockClock
) -> None:
    host = Host(Ledger(), 2)
    async with host.running():
        await trio.sleep(1)
        for number in range(9):
            host.take()
            assert host.pool.target == min(max(2, number + 1), MOST)
        assert (host.pool.claimed, host.pool.missed) == (2, 7)
        await trio.sleep(1)
        assert host.pool.ready == host.pool.target == MOST
        await trio.sleep(_RECENT_SECONDS - 1.5)
        assert host.pool.ready == MOST
        await trio.sleep(_RECENT_SECONDS)
        assert host.pool.ready == host.pool.target == 2


async def test_demand_before_the_last_ten_seconds_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 1)
    async with host.running():
        for _ in range(5):  # one every four seconds: three in any ten
            host.take()
            await trio.sleep(4)
            assert host.pool.target <= 3


async def test_resizing_takes_effect_at_once_and_forgets_demand(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 2)
    async with host.running():
        await trio.sleep(1)
        for _ in range(MOST):
            host.take()
        await trio.sleep(1)
        for size in (1, 5, 0, 3):
            host.pool.resize(size)
            assert host.pool.target == size
            await trio.sleep(1)
            assert host.pool.ready == size


async def test_an_empty_pool_of_size_none_counts_no_demand(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 0)
    async with host.running():
        for _ in range(10):
            assert host.pool.take() is None
        await trio.sleep(LONG_SECONDS)
        assert (host.pool.target, host.pool.ready, host.network.prepared) == (0, 0, 0)


async def test_draining_removes_what_is_ready_and_gives_its_indexes_back(
    autojump_clock: trio.testing.MockClock
) -> None:
    host = Host(Ledger(), 5)
    async with host.running():
        await trio.sleep(1)
        owned = host.take()
        assert owned is not None
        await host.claim(owned)
    await host.pool.drain()
    await host.pool.drain()
    assert host.network.slots == {owned.index: f"e{owned.index}"}
    assert host.slots.free == PLAN.slots - 1


# -- when it cannot ---------------------------------------------------------------------------------------------


class Broken(Ledger):
    """Cannot make a slot while it has a ``reason``."""

    reason = "no memory"

    async def prepare(self, slot: Slot) -> None:
        await super().prepare(slot)
        if self.reason:
            raise KernelError(self.reason, stage="namespace")


async def test_a_pool_that_cannot_fill_says_so_once_and_fills_when_it_can(
    autojump_clock: trio.testing.MockClock
) -> None:
    network = Broken()
    host = Host(network, 3)
    async with host.running():
        await trio.sleep(20 * _AGAIN_SECONDS)
        assert host.told == ["no memory"]
        assert host.pool.reason == "no memory"
        assert host.pool.take() is None
        assert 10 < network.prepared < 50, "it tries again, and not all the time"
        network.reason = "no descriptors"
        await trio.sleep(20 * _AGAIN_SECONDS)
        assert host.told == ["no memory", "no descriptors"]
        network.reason = ""
        await trio.sleep(LONG_SECONDS)
        host.check_at_rest()
        assert host.pool.reason == ""
        network.reason = "no memory"
        host.take()
        await trio.sleep(LONG_SECONDS)
        assert host.told == ["no memory", "no descriptors", "no memory"], "another time is told again"


async def test_asking_all_the_time_does_not_make_a_broken_pool_try_all_the_time(
    autojump_clock: trio.testing.MockClock
) -> None:
    network = Broken()
    host = Host(network, 3)
    async with host.running():
        for _ in range(1000):
            host.pool.take()
            await trio.sleep(0.01)
        assert network.prepared <= 120


async def test_a_pool_of_more_than_there_are_addresses_takes_them_all_and_says_so(
    autojump_clock: trio.testing.MockClock
) -> None:
    host = Host(Ledger(), 100)
    async with host.running():
        await trio.sleep(60)
        assert host.pool.ready == PLAN.slots
        assert len(host.told) == 1
        assert "addresses" in host.pool.reason
        slot = host.take()
        assert slot is not None
        await host.claim(slot)
        await trio.sleep(60)
        await host.end(slot)
        await trio.sleep(60)
        assert host.pool.ready == PLAN.slots


async def test_what_could_not_be_removed_is_tried_again_and_then_its_index_is_free(
    autojump_clock: trio.testing.MockClock
) -> None:
    network = Ledger()
    host = Host(network, 5)
    async with host.running():
        await trio.sleep(1)
        network.failures = ["before"] * 3
        host.pool.resize(1)
        await trio.sleep(1)
        assert host.pool.ready == 1
        assert host.slots.free == PLAN.slots - 5, "what the kernel may still have is nobody else's"
        assert host.pool.reason
        await trio.sleep(4 * _AGAIN_SECONDS)
        host.check_at_rest()
        assert len(host.told) == 1


async def test_indexes_do_not_run_out_while_nothing_can_be_made_or_removed(
    autojump_clock: trio.testing.MockClock
) -> None:
    network = Ledger()
    host = Host(network, 3)
    async with host.running():
        await trio.sleep(1)
        network.failures = ["before", "before"] * 500
        host.take()
        await trio.sleep(100 * _AGAIN_SECONDS)
        assert host.slots.free >= PLAN.slots - 5
        network.failures = []
        await trio.sleep(LONG_SECONDS)
        host.check_at_rest()


# -- behind everything else ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 120)), min_size=1, max_size=8))
@settings(deadline=None)
def test_no_slot_is_begun_while_somebody_waits_for_less_than_half_a_second(spans: list[tuple[int, int]]) -> None:
    """(pause before, length) of creations, in milliseconds, one after the other."""
    class Watched(Ledger):
        """Notes whether somebody waits when a slot is begun."""

        busy = False
        began: list[bool]

        async def prepare(self, slot: Slot) -> None:
            self.began.append(self.busy)
            await super().prepare(slot)

    async def main() -> None:
        network = Watched()
        network.began = []
        host = Host(network, 5)
        async with host.running():
            for pause, length in spans:
                await trio.sleep(pause / 1000)
                with host.quiet.disturbed():
                    network.busy = True
                    host.take()
                    await trio.sleep(length / 1000)
                    network.busy = False
            await trio.sleep(60)
            assert host.pool.ready == host.pool.target
            # Where pauses are shorter than what counts as one, patience may end within a creation.
            if all(pause >= 20 for pause, _ in spans):
                assert not any(network.began)

    run(main)


async def test_slots_are_made_at_last_though_somebody_always_waits(autojump_clock: trio.testing.MockClock) -> None:
    host = Host(Ledger(), 3)
    async with host.running():
        with host.quiet.disturbed():
            await trio.sleep(0.4)
            assert host.network.prepared == 0
            await trio.sleep(5)
            assert host.pool.ready == 3


async def test_slots_are_handed_out_oldest_first_and_one_put_back_is_the_next(
    autojump_clock: trio.testing.MockClock
) -> None:
    host = Host(Ledger(), 4)
    async with host.running():
        await trio.sleep(1)
        order = [slot.index for slot in host.pool._ready]
        first = host.take()
        assert first is not None
        assert first.index == order[0]
        host.taken.remove(first)
        host.pool.put_back(first)
        assert [slot.index for slot in host.pool._ready] == order
        assert host.pool.claimed == 0
