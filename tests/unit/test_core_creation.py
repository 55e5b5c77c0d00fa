"""Creation is whole or leaves nothing, whichever of its steps fails or is cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.addressing import Slot
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Publication
from netnsd.errors import (
    KernelError,
    LauncherUnavailable,
    LaunchFailed,
    NameTaken,
    NetnsTaken,
    NotFound,
    StoreError,
    WrongState,
)
from tests.fakes import FakeNetwork
from tests.fakes.faults import cancelling, failing, raising
from tests.fakes.world import ALICE, BOB, World, request

# Two services, so that a step may fail when one runs already; three ports, so that some may be given back.
REQUEST = request("web", "server", "database", ports=3)
ERRORS = [KernelError, StoreError, LaunchFailed, LauncherUnavailable, NetnsTaken]


async def good_steps(directory: Path) -> list[str]:
    world = World(directory)
    async with world.running() as environments:
        with world.faults.recording() as steps:
            await environments.create(REQUEST, ALICE)
        return list(steps)


async def test_steps_cover_every_adapter(tmp_path: Path) -> None:
    steps = await good_steps(tmp_path)
    assert {step.partition(".")[0] for step in steps} == {"network", "firewall", "processes", "cgroups", "store",
                                                          "files"}
    for step in ("network.wire", "firewall.open", "network.furnish", "cgroups.create", "files.furnish",
                 "files.open_log", "processes.launch", "store.add", "store.set_state", "store.commit"):
        assert step in steps


@pytest.mark.parametrize("kind", [*ERRORS, OSError, RuntimeError])
async def test_creation_that_fails_at_any_step_leaves_nothing(tmp_path: Path, kind: type[Exception]) -> None:
    count = len(await good_steps(tmp_path / "good"))
    assert count > 20
    world = World(tmp_path)
    async with world.running() as environments:
        for number in range(count):
            with world.faults.fail_at(number, raising(kind)) as steps:
                with pytest.raises(kind, match="planted"):
                    await environments.create(REQUEST, ALICE)
            assert world.held() == {}, f"step {number}, {steps[number]}"
        assert await environments.create(REQUEST, ALICE)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("commands", [("server", "database"), ()], ids=["services", "none"])
async def test_creation_that_is_cancelled_at_any_step_leaves_nothing_or_is_whole(
    tmp_path: Path, commands: tuple[str, ...], after: bool
) -> None:
    wanted = request("web", *commands, ports=3)
    world = World(tmp_path)
    async with world.running() as environments:
        number, whole = 0, 0
        while True:
            with trio.CancelScope() as scope:
                with world.faults.fail_at(number, cancelling(scope), after=after) as steps:
                    await environments.create(wanted, ALICE)
            if not scope.cancel_called:
                break
            await trio.testing.wait_all_tasks_blocked()
            if scope.cancelled_caught:
                assert world.held() == {}, f"step {number}, {steps[number]}"
            else:
                whole += 1
                await environments.remove(environments.registry.find("web", ALICE))
                await trio.testing.wait_all_tasks_blocked()
                assert world.held() == {}, f"step {number}, {steps[number]}"
            number += 1
        assert number > (20 if commands else 8)
        # Only after its last await may a creation miss that it was cancelled.
        assert whole <= 6


async def test_creation_that_was_cancelled_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        with trio.CancelScope() as scope:
            scope.cancel()
            await environments.create(REQUEST, ALICE)
        assert scope.cancelled_caught
        assert world.held() == {}


async def test_services_that_ran_are_ended_when_a_later_one_cannot_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        with pytest.raises(LaunchFailed):
            await environments.create(request("web", "server", "missing", ports=1), ALICE)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.processes.launches) == 1
        assert world.held() == {}
        assert world.processes.ended == {}, "the launcher may forget what was undone"


async def test_undo_that_fails_at_any_step_is_finished_by_a_later_check(tmp_path: Path) -> None:
    world = World(tmp_path)
    impossible = request("web", "server", "missing", ports=2)
    async with world.running() as environments:
        with world.faults.recording() as steps:
            with pytest.raises(LaunchFailed):
                await environments.create(impossible, ALICE)
        plan = list(steps)
        first = len(plan) - plan[::-1].index("processes.launch")
        assert {step.partition(".")[0] for step in plan[first:]} == {"store", "cgroups", "firewall", "network", "files"}
        for number in range(first, len(plan)):
            with world.faults.fail_at(number, failing, again=True):
                with pytest.raises((LaunchFailed, KernelError, StoreError)):
                    await environments.create(impossible, ALICE)
            for left in environments.registry.all():
                assert left.state == "removing", f"step {number}, {plan[number]}"
            await environments.check()
            await trio.testing.wait_all_tasks_blocked()
            assert world.held() == {}, f"step {number}, {plan[number]}"


async def test_name_that_is_taken_by_somebody_elses_namespace_gets_the_users(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.network.foreign.add("web")
    async with world.running() as environments:
        assert (await environments.create(request(), ALICE)).netns == "web.alice"
        with pytest.raises(NameTaken):
            await environments.create(request(), ALICE)
        world.network.foreign.add("web.bob")
        with pytest.raises(NetnsTaken):
            await environments.create(request(), BOB)
        assert len(world.held()["rows"]) == 1


async def test_a_free_port_is_none_of_the_numbers_that_are_asked_for_beside_it(tmp_path: Path) -> None:
    low = 20000
    asked = [wire.PortRequest(port=80), wire.PortRequest(port=81, publish=low), wire.PortRequest(port=82)]
    async with World(tmp_path, published_range=(low, low + 2)).running() as environments:
        environment = await environments.create(wire.CreateRequest(name="web", ports=asked), ALICE)
        assert [(p.port, p.published) for p in environment.ports] == [(80, low + 1), (81, low), (82, low + 2)]


async def test_two_users_may_have_the_same_name(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        first, second = await environments.create(request(), ALICE), await environments.create(request(), BOB)
        assert (first.netns, second.netns) == ("web", "web.bob")
        assert environments.registry.find("web", BOB) is second
        with pytest.raises(NotFound):
            environments.registry.find("web.alice", BOB)
        assert environments.registry.find("web.bob", BOB) is second


async def test_replace_makes_another_after_the_old_is_gone(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        old = await environments.create(REQUEST, ALICE)
        new = await environments.create(request("web", "server", ports=1, replace=True), ALICE)
        assert new.id != old.id
        assert [e.id for e in environments.registry.all()] == [new.id]
        assert world.kinds().count("removed") == 1


async def test_creations_at_once_get_names_slots_and_ports_of_their_own(tmp_path: Path) -> None:
    world = World(tmp_path, published_range=(20000, 20099))
    made: list[Environment] = []
    async with world.running() as environments:
        async def create(number: int) -> None:
            made.append(await environments.create(request(f"e{number}", "server", ports=2), ALICE))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(create, number)
        assert len({e.slot.address for e in made}) == 50
        assert len({p.published for e in made for p in e.ports}) == 100


async def test_of_two_creations_of_one_name_at_once_one_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    refused: list[NameTaken] = []
    async with world.running() as environments:
        async def create() -> None:
            try:
                await environments.create(request("web", "server"), ALICE)
            except NameTaken as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(create)
        assert len(refused) == 2
        assert len(world.held()["rows"]) == 1


async def test_removal_of_what_is_being_made_ends_the_creation(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        outcome: list[object] = []

        async def create() -> None:
            try:
                outcome.append(await environments.create(REQUEST, ALICE))
            except WrongState as error:
                outcome.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            while "namespaces" not in world.held():
                await trio.lowlevel.checkpoint()
            await environments.remove(environments.registry.find("web", ALICE))
        assert isinstance(outcome[0], WrongState)
        await trio.testing.wait_all_tasks_blocked()
        assert world.held() == {}


async def test_what_a_killed_daemon_had_not_furnished_is_furnished_by_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        made = await environments.create(request("web", ports=1), ALICE)
    world.network.furnished.pop(made.slot.index, None)  # killed right after the answer
    async with world.running():
        with trio.fail_after(5):
            while made.slot.index not in world.network.furnished:
                await trio.lowlevel.checkpoint()


async def test_what_is_made_while_another_is_furnished_behind_is_written_as_ready_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    begun, goes_on = trio.Event(), trio.Event()
    furnish = FakeNetwork.furnish

    async def slow(self: FakeNetwork, slot: Slot, publications: Sequence[Publication], bandwidth: int | None) -> None:
        begun.set()
        await goes_on.wait()
        await furnish(self, slot, publications, bandwidth)

    monkeypatch.setattr(FakeNetwork, "furnish", slow)
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.create(request("first"), ALICE)
        await begun.wait()
        await environments.create(request("second"), ALICE)
        goes_on.set()
        await trio.sleep(10)
        assert {e.name: e.state for e in world.store.environments()} == {"first": "ready", "second": "ready"}
