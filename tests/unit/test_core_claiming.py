"""Creation from a full pool is whole or leaves nothing but the pool, whichever of its steps fails or is cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd.core.interfaces import Publication
from netnsd.core.pool import PoolSettings
from netnsd.core.registry import Blueprint
from netnsd.errors import KernelError, LauncherUnavailable, LaunchFailed, NameTaken, NetnsTaken, StoreError, WrongState
from tests.fakes.faults import cancelling, failing, raising
from tests.fakes.world import ALICE, BOB, World, request

SIZE = 2
REQUEST = request("web", "server", "database", ports=3)
BARE = request("web")


def world(directory: Path, *, size: int = SIZE, **options: Any) -> World:
    return World(directory, pool=PoolSettings(size, 0), **options)


async def filled(made: World) -> None:
    """Let the pool fill, and what is done behind answers be done."""
    await trio.sleep(11)
    pool = made.environments.pool
    assert pool.ready == pool.target == pool.size, pool.reason


def beside_the_pool(made: World) -> dict[str, Any]:
    """What is held, without the slots that wait in the pool; those must be as new."""
    held = made.held()
    ready = {slot.index for slot in made.environments.pool._ready}
    for index in ready:
        assert held["namespaces"].pop(index) is None
        assert held["furnished"].pop(index) == ()
        for group in (f"nd{index}", f"nd{index}/s-main"):  # where a process waits to become the first service
            held["cgroups"].remove(group)
    held["slots"] = held.get("slots", 0) - len(ready)
    return {name: value for name, value in held.items() if value}


async def good_steps(directory: Path, wanted: Any = REQUEST) -> list[str]:
    made = world(directory)
    async with made.running() as environments:
        await filled(made)
        with made.faults.recording() as steps:
            await environments.create(wanted, ALICE)
        return list(steps)


async def test_creation_from_the_pool_names_and_does_not_make(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    steps = await good_steps(tmp_path)
    assert "network.claim" in steps
    assert "network.furnish" in steps, "its ports are not in the pool's"
    assert not {"network.wire", "network.prepare", "network.unwire"} & set(steps)


async def test_creation_without_ports_needs_nothing_inside(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    steps = await good_steps(tmp_path, request("web", "server"))
    assert [step for step in steps if step.startswith("network.")] == ["network.is_taken", "network.claim"]


async def test_what_was_claimed_is_as_what_was_made(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Between a cold and a warm one nobody can tell by what is there."""
    found = []
    for size in (0, SIZE):
        made = world(tmp_path / str(size), size=size)
        async with made.running() as environments:
            await filled(made)
            await environments.create(REQUEST, ALICE)
            await filled(made)
            assert environments.pool.claimed == bool(size)
            held = made.held() if not size else beside_the_pool(made)
            found.append({name: value if isinstance(value, int) else len(value) for name, value in held.items()})
            assert "web" in made.network.slots.values()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [KernelError, StoreError, LaunchFailed, LauncherUnavailable, NetnsTaken, OSError,
                                  RuntimeError])
async def test_creation_that_fails_at_any_step_leaves_the_pool_and_nothing_else(
    tmp_path: Path, kind: type[Exception], autojump_clock: trio.testing.MockClock
) -> None:
    count = len(await good_steps(tmp_path / "good"))
    assert count > 20
    made, spoilt = world(tmp_path), 0
    async with made.running() as environments:
        for number in range(count):
            await filled(made)
            with made.faults.fail_at(number, raising(kind)) as steps:
                try:
                    environment = await environments.create(REQUEST, ALICE)
                except kind:
                    environment = None
            if environment is not None:
                assert (kind, steps[number]) == (KernelError, "network.claim")
                assert "network.wire" in steps
                spoilt += 1
                await environments.remove(environment)
            await filled(made)
            assert beside_the_pool(made) == {}, f"step {number}, {steps[number]}"
        assert made.kinds().count("slot_spoilt") == spoilt == (kind is KernelError)
        assert await environments.create(REQUEST, ALICE)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("wanted", [REQUEST, BARE], ids=["services", "none"])
async def test_creation_that_is_cancelled_at_any_step_leaves_the_pool_or_is_whole(
    tmp_path: Path, wanted: Any, after: bool, autojump_clock: trio.testing.MockClock
) -> None:
    made, number = world(tmp_path), 0
    async with made.running() as environments:
        while True:
            await filled(made)
            with trio.CancelScope() as scope:
                with made.faults.fail_at(number, cancelling(scope), after=after) as steps:
                    await environments.create(wanted, ALICE)
            if not scope.cancel_called:
                break
            await filled(made)
            if not scope.cancelled_caught:
                await environments.remove(environments.registry.find("web", ALICE))
                await filled(made)
            assert beside_the_pool(made) == {}, f"step {number}, {steps[number]}"
            number += 1
        assert number > (15 if wanted is REQUEST else 5)


async def test_undo_that_fails_at_any_step_is_finished_by_a_later_check(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    impossible = request("web", "server", "missing", ports=2)
    async with made.running() as environments:
        await filled(made)
        with made.faults.recording() as steps:
            with pytest.raises(LaunchFailed):
                await environments.create(impossible, ALICE)
        plan = list(steps)
        for number in range(len(plan) - plan[::-1].index("processes.launch"), len(plan)):
            await filled(made)
            with made.faults.fail_at(number, failing, again=True):
                with pytest.raises((LaunchFailed, KernelError, StoreError)):
                    await environments.create(impossible, ALICE)
            await environments.check()
            await filled(made)
            assert beside_the_pool(made) == {}, f"step {number}, {plan[number]}"


async def test_a_spoilt_slot_falls_back_to_one_that_is_made_and_says_so(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    async with made.running() as environments:
        await filled(made)
        first = environments.pool._ready[0]
        made.network.unlinked.add(first.index)  # somebody deleted its link
        environment = await environments.create(REQUEST, ALICE)
        assert environment.slot != first
        assert made.network.slots[environment.slot.index] == "web"
        [details] = [details for kind, _, details in made.events if kind == "slot_spoilt"]
        assert details["slot"] == first.index
        assert details["reason"]
        assert details["uid"] == 0, "it is nobody's"
        await filled(made)
        assert [e.id for e in environments.registry.all()] == [environment.id]
        await environments.remove(environment)
        await filled(made)
        assert beside_the_pool(made) == {}


async def test_a_request_that_is_refused_gives_the_slot_back_as_it_was(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    async with made.running() as environments:
        await environments.create(BARE, ALICE)
        await filled(made)
        before = list(environments.pool._ready)
        claimed = environments.pool.claimed
        with pytest.raises(NameTaken):
            await environments.create(BARE, ALICE)
        assert list(environments.pool._ready) == before
        assert environments.pool.claimed == claimed


async def test_a_name_that_somebody_takes_in_the_last_moment_is_an_error_and_not_a_spoilt_slot(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    async with made.running() as environments:
        await filled(made)
        with made.faults.recording() as steps:
            await environments.remove(await environments.create(BARE, ALICE))
        await filled(made)
        with made.faults.fail_at(steps.index("network.claim"), lambda _: made.network.foreign.add("web")):
            with pytest.raises(NetnsTaken):
                await environments.create(BARE, ALICE)
        await filled(made)
        assert beside_the_pool(made) == {}
        assert made.network.foreign == {"web"}
        assert "slot_spoilt" not in made.kinds()


async def test_a_pool_that_cannot_fill_leaves_creations_as_they_were(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    made.faults.broken = {"network.prepare"}
    async with made.running() as environments:
        await trio.sleep(60)
        for name in ("one", "two"):
            await environments.create(request(name, "server"), ALICE)
        assert (environments.pool.claimed, environments.pool.missed) == (0, 2)
        assert made.kinds().count("pool_stuck") == 1
        [details] = [details for kind, _, details in made.events if kind == "pool_stuck"]
        assert "network.prepare" in details["reason"]


async def test_the_last_addresses_are_for_who_asks(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    made = world(tmp_path, size=40, supernet="10.9.0.0/27", bridge_ports=29)
    async with made.running() as environments:
        await trio.sleep(60)
        assert environments.pool.ready == made.plan.slots
        for number in range(made.plan.slots):
            await environments.create(request(f"e{number}"), ALICE)
            await trio.sleep(1)
        assert len({e.slot.index for e in environments.registry.all()}) == made.plan.slots


async def test_a_killed_daemons_pool_is_removed_and_another_is_made(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    async with made.running() as environments:
        await filled(made)
        kept = await environments.create(REQUEST, ALICE)
        await filled(made)
    for size in (SIZE, 0):
        for index in made.network.slots.keys() - {kept.slot.index}:
            made.network.furnished[index] = (Publication("tcp", 1, 1),)  # tells the old ones
        made.settings = world(tmp_path, size=size).settings
        async with made.running() as environments:
            await filled(made)
            assert environments.registry.find("web", ALICE).slot == kept.slot
            assert made.network.slots[kept.slot.index] == "web"
            assert len(made.network.slots) == 1 + size
            assert all(made.network.furnished[slot.index] == () for slot in environments.pool._ready)


async def test_a_daemon_killed_between_row_and_name_leaves_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The row is written first: whatever of a claim there is, the next start takes the whole slot away."""
    for number, wanted in enumerate((REQUEST, BARE)):
        for name in (None, "web"):
            made = world(tmp_path / f"{number}{name}")
            async with made.running() as environments:
                await filled(made)
                slot = environments.pool.take()
                assert slot is not None
                environment = environments.registry.reserve(Blueprint.of(wanted, ALICE, made.settings), ALICE, slot)
                if name is not None:
                    await made.network.claim(slot, name)
            async with made.running() as environments:
                await filled(made)
                if wanted is BARE and name is not None:
                    # It was whole already, but for its rules.
                    assert environments.registry.find("web", ALICE).id == environment.id
                    assert (slot.address, ALICE.uid) in made.firewall.owners
                else:
                    assert beside_the_pool(made) == {}


async def test_creations_at_once_get_slots_of_their_own_from_the_pool_and_beside_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path, size=5, published_range=(20000, 20099))
    async with made.running() as environments:
        await filled(made)
        async with trio.open_nursery() as nursery:
            for number in range(30):
                wanted = request(f"e{number}", "server", ports=2)
                nursery.start_soon(environments.create, wanted, (ALICE, BOB)[number % 2])
        found = list(environments.registry.all())
        assert len({e.slot.index for e in found}) == 30
        assert sorted(name for name in made.network.slots.values() if name) == sorted(e.netns for e in found)
        assert environments.pool.claimed >= 5
        async with trio.open_nursery() as nursery:
            for environment in found:
                nursery.start_soon(environments.remove, environment)
        await trio.sleep(30)
        await filled(made)
        assert beside_the_pool(made) == {}


async def test_removal_of_what_is_being_claimed_ends_the_creation(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path)
    async with made.running() as environments:
        await filled(made)
        outcome: list[object] = []

        async def create() -> None:
            try:
                outcome.append(await environments.create(REQUEST, ALICE))
            except (WrongState, LaunchFailed) as error:  # its group may be gone as its server starts
                outcome.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            while "web" not in made.network.slots.values():
                await trio.lowlevel.checkpoint()
            await environments.remove(environments.registry.find("web", ALICE))
        assert isinstance(outcome[0], WrongState | LaunchFailed)
        await filled(made)
        assert beside_the_pool(made) == {}


async def test_no_slot_is_made_while_a_creation_is_under_way(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = world(tmp_path, size=3)
    async with made.running() as environments:
        await filled(made)
        with made.faults.recording() as steps:
            for number in range(6):
                await environments.create(request(f"e{number}", "server"), ALICE)
        assert "network.prepare" not in steps
        assert (environments.pool.claimed, environments.pool.missed) == (3, 3)
        with made.faults.recording() as steps:
            await trio.sleep(1)
        assert steps.count("network.prepare") == 3


@pytest.mark.parametrize("size", [0, SIZE], ids=["cold", "warm"])
@pytest.mark.parametrize("wanted", [BARE, request("web", ports=1), REQUEST], ids=["bare", "ports", "services"])
async def test_what_is_removed_before_all_is_done_behind_its_answer_leaves_nothing(
    tmp_path: Path, wanted: Any, size: int, autojump_clock: trio.testing.MockClock
) -> None:
    class Removing:
        """The environment is removed at one of the moments at which its settling waits."""

        turn, waits = 0, 0

        def disturbed(self) -> Any:
            return quiet.disturbed()

        async def wait(self) -> None:
            self.waits += 1
            if self.waits == self.turn and web is not None:
                await environments.remove(web)
            await quiet.wait()

    made = world(tmp_path, size=size)
    async with made.running() as environments:
        quiet, removing = environments._quiet, Removing()
        environments._quiet = removing  # type: ignore[assignment]
        for turn in range(1, 6):
            web = None
            await filled(made)
            removing.waits, removing.turn = 0, turn
            web = await environments.create(wanted, ALICE)
            await filled(made)
            if web in environments.registry:
                await environments.remove(web)
            await filled(made)
            assert beside_the_pool(made) == {}, turn
