"""Creations are bounded; the lines of users take turns; and no turn is lost, whoever leaves when."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from netnsd.core.admission import AT_ONCE, Admission
from netnsd.errors import NetnsdError, Overloaded
from tests.fakes.world import ALICE, BOB, World, request


class Door:
    """An admission with people at it, each with a number. Lists have numbers, in the order of events."""

    def __init__(self, nursery: trio.Nursery, at_once: int, waiting: int) -> None:
        self.admission = Admission(at_once, waiting)
        self.at_once = at_once
        self.entered: list[int] = []
        self.refused: list[int] = []
        self.left: list[int] = []
        self.uids: list[int] = []
        self._nursery = nursery
        self._ends: list[trio.Event] = []
        self._scopes: list[trio.CancelScope] = []

    def come(self, uid: int) -> int:
        """Somebody of that user asks for a turn."""
        number = len(self.uids)
        self.uids.append(uid)
        self._ends.append(trio.Event())
        self._scopes.append(trio.CancelScope())
        self._nursery.start_soon(self._person, number)
        return number

    def end(self, number: int) -> None:
        """Be done, now or as soon as let in."""
        self._ends[number].set()

    def cancel(self, number: int) -> None:
        """Give up, waiting or let in."""
        self._scopes[number].cancel()

    @property
    def inside(self) -> list[int]:
        """Who is let in and has not left."""
        return [number for number in self.entered if number not in self.left]

    async def _person(self, number: int) -> None:
        try:
            with self._scopes[number]:
                async with self.admission.turn(self.uids[number]):
                    assert len(self.inside) < self.at_once
                    self.entered.append(number)
                    await self._ends[number].wait()
        except Overloaded:
            self.refused.append(number)
        finally:
            self.left.append(number)


@asynccontextmanager
async def door(at_once: int = 2, waiting: int = 5) -> AsyncIterator[Door]:
    """At its end all have left, and no turn is lost."""
    async with trio.open_nursery() as nursery:
        made = Door(nursery, at_once, waiting)
        yield made
        for number in range(len(made.uids)):
            made.end(number)
    assert (made.admission.under_way, made.admission.waiting) == (0, 0)
    assert made.admission._lines == {}


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


MOVES = st.lists(st.tuples(st.sampled_from(["come", "come", "come", "end", "cancel"]), st.integers(0, 30)), max_size=60)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3), st.integers(0, 4), MOVES)
def test_it_does_as_the_model_says(at_once: int, waiting: int, moves: list[tuple[str, int]]) -> None:
    """The model: who is inside, and lines in the order of their turns."""
    async def main() -> None:
        async with door(at_once, waiting) as made:
            inside: list[int] = []
            refused: list[int] = []
            lines: dict[int, list[int]] = {}

            def leave(number: int) -> None:
                inside.remove(number)
                if lines:
                    uid = next(iter(lines))
                    line = lines.pop(uid)
                    inside.append(line.pop(0))
                    if line:
                        lines[uid] = line

            for kind, value in moves:
                waiters = [number for line in lines.values() for number in line]
                if kind == "come":
                    uid = value % 3
                    number = made.come(uid)
                    if len(inside) < at_once:
                        inside.append(number)
                    elif len(lines.get(uid, [])) >= waiting:
                        refused.append(number)
                    else:
                        lines.setdefault(uid, []).append(number)
                elif kind == "end" and inside:
                    number = inside[value % len(inside)]
                    made.end(number)
                    leave(number)
                elif kind == "cancel" and (anybody := sorted([*inside, *waiters])):
                    number = anybody[value % len(anybody)]
                    made.cancel(number)
                    if number in inside:
                        leave(number)
                    else:
                        lines[made.uids[number]].remove(number)
                        lines = {uid: line for uid, line in lines.items() if line}
                await settle()
                assert made.inside == inside
                assert made.refused == refused
                assert made.admission.under_way == len(inside)
                assert made.admission.waiting == sum(map(len, lines.values()))
                assert made.admission.refused == len(refused)

    trio.run(main)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3), st.integers(0, 6), st.lists(st.lists(
    st.tuples(st.sampled_from(["come", "end", "cancel"]), st.integers(0, 40)), max_size=6), max_size=12))
def test_no_turn_is_lost_whatever_happens_in_one_moment(
    at_once: int, waiting: int, moments: list[list[tuple[str, int]]]
) -> None:
    """A turn may be given to somebody who gives up in the same moment: it goes to the next."""
    async def main() -> None:
        async with door(at_once, waiting) as made:
            for moment in moments:
                for kind, value in moment:
                    if kind == "come":
                        made.come(value % 3)
                    elif made.uids:
                        (made.end if kind == "end" else made.cancel)(value % len(made.uids))
                await settle()
                assert made.admission.under_way == len(made.inside)
                assert made.admission.waiting == len(made.uids) - len(made.inside) - len(made.left)
                assert not made.admission.waiting or made.admission.under_way == at_once, "somebody waits for nothing"

    trio.run(main)


async def test_one_who_gives_up_in_the_moment_of_being_let_in_passes_the_turn_on() -> None:
    async with door(1) as made:
        for uid in (1, 1, 2):
            made.come(uid)
            await settle()
        made.end(0)
        made.cancel(1)
        await settle()
        assert made.inside == [2]
        assert 1 not in made.entered or 1 in made.left


async def test_one_of_a_user_is_served_before_the_hundredth_of_another() -> None:
    async with door(1, 200) as made:
        for _ in range(100):
            made.come(ALICE.uid)
            await settle()
        bob = made.come(BOB.uid)
        await settle()
        made.end(0)
        await settle()
        made.end(1)
        await settle()
        assert made.inside == [bob], "one of alice's was first in line; then it is bob's turn"


async def test_users_take_turns_however_many_each_has() -> None:
    async with door(1, 200) as made:
        first = made.come(9)
        await settle()
        for uid, count in ((1, 6), (2, 2), (3, 1)):
            for _ in range(count):
                made.come(uid)
                await settle()
        made.end(first)
        for number in range(1, len(made.uids)):
            made.end(number)
        await settle()
        assert [made.uids[number] for number in made.entered] == [9, 1, 2, 3, 1, 2, 1, 1, 1, 1]


async def test_past_the_bound_the_answer_is_no_at_once_and_only_for_that_user() -> None:
    async with door(2, 3) as made:
        for _ in range(5):
            made.come(ALICE.uid)
            await settle()
        assert (made.refused, made.admission.waiting) == ([], 3)
        with pytest.raises(Overloaded) as caught:
            async with made.admission.turn(ALICE.uid):
                raise AssertionError("let in")
        assert caught.value.details == {"waiting": 3, "retry_after_seconds": 1}
        assert caught.value.hint
        assert made.admission.refused == 1
        bob = made.come(BOB.uid)
        await settle()
        assert bob not in made.refused


async def test_with_no_line_at_all_who_cannot_be_let_in_is_refused_and_nothing_is_lost() -> None:
    async with door(1, 0) as made:
        for _ in range(3):
            made.come(1)
            await settle()
            made.come(2)
            await settle()
            made.end(made.inside[0])
            await settle()
            assert made.inside == []
        assert len(made.entered) == len(made.refused) == 3


async def test_a_failure_inside_gives_the_turn_back() -> None:
    admission = Admission(1, 1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            async with admission.turn(1):
                raise RuntimeError
        assert admission.under_way == 0


# -- creations --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stuck(world: World) -> AsyncIterator[trio.Semaphore]:
    """So many are wired as the semaphore says, first come first; the most at one time must be within the bound."""
    release, original = trio.Semaphore(0), world.network.wire
    under_way: list[int] = []

    async def wire(slot: Any, netns: str) -> None:
        under_way.append(slot.index)
        assert len(under_way) <= AT_ONCE
        try:
            await release.acquire()
            await original(slot, netns)
        finally:
            under_way.remove(slot.index)

    world.network.wire = wire  # type: ignore[method-assign]
    yield release
    world.network.wire = original  # type: ignore[method-assign]


def outcome_of(world: World, into: list[tuple[str, str]]) -> Callable[..., Any]:
    async def create(name: str, who: Any) -> None:
        try:
            await world.environments.create(request(name), who)
        except NetnsdError as error:
            into.append((name, error.code))
        else:
            into.append((name, "made"))

    return create


async def test_creations_are_bounded_fair_and_refused_past_the_bound(tmp_path: Path) -> None:
    world, outcomes = World(tmp_path, creations_waiting=10), list[tuple[str, str]]()
    create = outcome_of(world, outcomes)
    async with world.running() as environments, stuck(world) as release, trio.open_nursery() as nursery:
        for number in range(AT_ONCE + 12):
            nursery.start_soon(create, f"a{number}", ALICE)
            await settle()
        assert outcomes == [(f"a{AT_ONCE + 10}", "overloaded"), (f"a{AT_ONCE + 11}", "overloaded")]
        nursery.start_soon(create, "b", BOB)
        await settle()
        assert (environments.admission.under_way, environments.admission.waiting) == (AT_ONCE, 11)
        for _ in range(AT_ONCE + 11):
            release.release()
            await settle()
        order = [name for name, how in outcomes if how == "made"]
        assert len(order) == AT_ONCE + 11
        assert order.index("b") <= AT_ONCE + 1
        assert (environments.admission.under_way, environments.admission.waiting) == (0, 0)


async def test_creations_that_wait_and_are_given_up_leave_nothing(tmp_path: Path) -> None:
    world, outcomes = World(tmp_path), list[tuple[str, str]]()
    create = outcome_of(world, outcomes)
    async with world.running() as environments, stuck(world) as release:
        async with trio.open_nursery() as nursery:
            for number in range(AT_ONCE + 5):
                nursery.start_soon(create, f"a{number}", ALICE)
            await settle()
            nursery.cancel_scope.cancel()
            for _ in range(AT_ONCE + 5):
                release.release()
        await settle()
        assert (environments.admission.under_way, environments.admission.waiting) == (0, 0)
        assert world.held() == {}
