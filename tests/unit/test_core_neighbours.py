"""What one user does, or an earlier run of the daemon left, does not keep others waiting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd.core.admission import AT_ONCE
from netnsd.core.interfaces import Launch
from netnsd.core.pool import PoolSettings
from tests.fakes.world import ALICE, BOB, World, request
from tests.unit import stocking


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Commands called ``hangs`` are not exec'd before this is set."""
    released = trio.Event()
    from tests.fakes.processes import FakeProcesses

    launch = FakeProcesses.launch

    async def slow(self: FakeProcesses, order: Launch) -> int:
        if order.argv[0] == "hangs":
            await released.wait()
        return await launch(self, order)

    monkeypatch.setattr(FakeProcesses, "launch", slow)
    return released


async def test_commands_that_hang_in_their_start_keep_no_turn_and_no_quiet(
    tmp_path: Path, hanging: trio.Event, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, pool=PoolSettings(2, 0))
    async with world.running() as environments, trio.open_nursery() as nursery:
        await trio.sleep(1)
        for number in range(3 * AT_ONCE):
            nursery.start_soon(environments.create, request(f"slow-{number}", "hangs"), ALICE)
        await trio.sleep(1)
        assert environments.admission.under_way == environments.admission.waiting == 0
        with trio.fail_after(0.1):
            await environments.create(request("quick", "server"), BOB)
        await trio.sleep(1)
        assert environments.pool.ready == 2, "the pool did not find it quiet"
        hanging.set()


async def test_asking_again_and_again_for_a_removal_is_one_removal(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        made = [await environments.create(request(f"e{number}"), ALICE) for number in range(5)]
        with world.faults.recording() as steps:
            for _ in range(20):
                environments.remove_behind(*made)
                await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                for environment in made:
                    nursery.start_soon(environments.remove, environment)
        await trio.testing.wait_all_tasks_blocked()
        assert world.held() == {}
        assert steps.count("store.set_state") == len(made)
        assert steps.count("cgroups.remove") <= 2 * len(made)
        assert world.kinds().count("removed") == len(made)


async def test_what_waits_in_an_adopted_environment_without_that_service_is_ended(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, pool=PoolSettings(2, 0))
    async with world.running() as environments:
        await trio.sleep(1)
        made = await environments.create(request("web"), ALICE)
        assert environments.pool.claimed == 1
        assert f"{made.slot.cgroup}/s-main" in world.cgroups.groups
    async with world.running():
        await trio.sleep(1)
        assert f"{made.slot.cgroup}/s-main" not in world.cgroups.groups


async def test_orphans_of_a_killed_daemon_are_removed_together(tmp_path: Path) -> None:
    world = World(tmp_path)
    for index in range(20):
        world.network.slots[index] = None
        await world.cgroups.create(f"nd{index}/s-main")
    with world.faults.recording() as steps:
        async with world.running():
            pass
    assert steps.count("network.unwire") == 1
    assert world.network.slots == {}
    assert world.cgroups.groups == {}


async def test_stock_has_no_group_that_the_templates_creator_had_not(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = stocking.world(tmp_path)
    few = replace(ALICE, groups=(100,))
    made.accounts[ALICE.uid] = replace(ALICE, groups=(100, 27, 4))
    async with made.running():
        await stocking.add(made, 1, who=few)
        await trio.sleep(1)
        (environment,) = stocking.stock_of(made)
        assert environment.services["main"].command.groups == (100,)


async def test_stock_is_not_made_as_a_group_that_the_account_has_lost(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = stocking.world(tmp_path)
    async with made.running():
        await stocking.add(made, 1, who=replace(ALICE, gid=77))
        await trio.sleep(1)
        assert stocking.stock_of(made) == []
        (shown,) = made.templates.shown(ALICE)
        assert "77" in shown.reason


async def test_nobody_but_root_hears_of_what_is_in_stock(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = stocking.world(tmp_path)

    def heard() -> list[tuple[str, Any]]:
        return [(kind, details["uid"]) for kind, _, details in made.events if kind in ("created", "started")]

    async with made.running():
        await stocking.add(made, 1)
        await trio.sleep(1)
        assert heard() == [("started", 0), ("created", 0)]
        await made.templates.create(stocking.asked("web"), ALICE)
        assert heard()[2] == ("created", ALICE.uid)


async def test_templates_of_a_user_are_bounded_in_size(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    from netnsd import wire
    from netnsd.errors import InvalidRequest

    made = stocking.world(tmp_path)
    large = wire.Specification(command=["x" * 400_000])
    async with made.running():
        await stocking.add(made, 0, name="a", specification=large)
        await stocking.add(made, 0, name="b", specification=large)
        with pytest.raises(InvalidRequest, match="KiB"):
            await stocking.add(made, 0, name="c", specification=large)
        await stocking.add(made, 0, name="b", replace=True, specification=large)
        await stocking.add(made, 0, name="c", who=BOB, specification=large)
