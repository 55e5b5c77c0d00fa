"""Many at once by one request: all are made, or none is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.actor import Actor
from netnsd.core.environment import Environment
from netnsd.core.pool import PoolSettings
from netnsd.core.specification import MAX_COUNT
from netnsd.errors import (
    AddressesExhausted,
    InvalidLabel,
    InvalidName,
    InvalidRequest,
    LaunchFailed,
    NameTaken,
    NetnsdError,
    Overloaded,
    PortsExhausted,
    PortTaken,
)
from tests.fakes.faults import cancelling, failing
from tests.fakes.world import ALICE, BOB, World, request


async def many(world: World, count: int | None, who: Actor = ALICE, **fields: Any) -> list[Environment]:
    name = fields.pop("name", "web")
    wanted = request(name, *fields.pop("commands", ("server",)), count=count, **fields)
    return await world.environments.create_many(wanted, who, world.templates.create)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("count", [1, 2, 11])
async def test_names_are_numbered_and_the_answer_is_in_their_order(tmp_path: Path, count: int) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        made = await many(world, count)
        assert [e.name for e in made] == [f"web-{n}" for n in range(1, count + 1)]
        assert len({e.slot.index for e in made}) == len(environments.registry) == count
        assert world.kinds().count("created") == count


async def test_without_a_name_each_gets_one_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        assert len({e.name for e in await many(world, 10, name=None)}) == 10


async def test_each_gets_ports_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        made = await many(world, 5, ports=2)
        assert len({p.published for e in made for p in e.ports}) == 10


@pytest.mark.parametrize("count", [-1, 0, MAX_COUNT + 1, 1 << 40])
async def test_count_is_bounded(tmp_path: Path, count: int) -> None:
    world = World(tmp_path)
    async with world.running():
        with pytest.raises(InvalidRequest):
            await many(world, count)
        assert world.held() == {}


async def test_the_most_is_taken(tmp_path: Path) -> None:
    world = World(tmp_path, supernet="10.9.0.0/20", bridge_ports=250)
    async with world.running() as environments:
        assert len(await many(world, MAX_COUNT, commands=())) == len(environments.registry) == MAX_COUNT


@pytest.mark.parametrize(("fields", "error"), [
    ({"count": 30}, AddressesExhausted), ({"count": 11, "ports": 2}, PortsExhausted),
    ({"count": 3, "commands": ("server", "missing")}, LaunchFailed), ({"count": 12, "name": "n" * 61}, InvalidName),
    ({"count": 2, "labels": {"": "x"}}, InvalidLabel),
], ids=["addresses", "ports", "launch", "names", "labels"])
async def test_where_one_cannot_be_made_none_is_left(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    world = World(tmp_path, supernet="10.9.0.0/27", bridge_ports=29, published_range=(20000, 20020))
    async with world.running():
        with pytest.raises(error):
            await many(world, **fields)
        await settle()
        assert world.held() == {}


async def test_what_others_and_one_had_before_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        own = await environments.create(request("web-7", "server"), ALICE)
        others = await environments.create(request("web-3", "server"), BOB)
        with pytest.raises(NameTaken):
            await many(world, 10)
        await settle()
        assert {e.id for e in environments.registry.all()} == {own.id, others.id}
        assert len(world.processes.running) == 2


async def test_where_one_cannot_be_made_the_rest_is_not_tried(tmp_path: Path) -> None:
    world = World(tmp_path, supernet="10.9.0.0/22", bridge_ports=250)
    async with world.running() as environments:
        await environments.create(request("web-2"), ALICE)
        with pytest.raises(NameTaken):
            await many(world, 200)
        assert world.kinds().count("created") < 20


async def test_a_port_number_can_be_one_environments_only(tmp_path: Path) -> None:
    world = World(tmp_path)
    wanted = wire.CreateRequest(name="web", count=2, ports=[wire.PortRequest(port=80, publish=20001)])
    async with world.running() as environments:
        with pytest.raises(PortTaken):
            await environments.create_many(wanted, ALICE, world.templates.create)
        await settle()
        assert world.held() == {}


async def test_failure_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        with world.faults.recording() as steps:
            made = await many(world, 6, ports=1)
        count = len(steps)
        for environment in made:
            await world.environments.remove(environment)
        await settle()
        assert count > 60
        for number in range(count):
            with world.faults.fail_at(number, failing):
                with pytest.raises(NetnsdError, match="planted"):
                    await many(world, 6, ports=1)
            await settle()
            await world.environments.check()  # it may have been a step of an undo
            await settle()
            assert world.held() == {}, number


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_cancelled_at_any_step_leaves_nothing_or_all(tmp_path: Path, after: bool) -> None:
    world, number = World(tmp_path), 0
    async with world.running() as environments:
        while True:
            with trio.CancelScope() as scope:
                with world.faults.fail_at(number, cancelling(scope), after=after):
                    await many(world, 5, ports=1)
            if not scope.cancel_called:
                break
            await settle()
            if not scope.cancelled_caught:
                assert len(environments.registry) == 5
                for environment in environments.registry.all():
                    await environments.remove(environment)
                await settle()
            assert world.held() == {}, number
            number += 1
        assert number > 50


async def test_one_request_does_not_take_all_turns(tmp_path: Path) -> None:
    """Half of them: with a second user's single one there is no wait."""
    world = World(tmp_path)
    async with world.running() as environments:
        seen: list[tuple[int, int]] = []
        original = world.network.wire

        async def wire(slot: Any, netns: str) -> None:
            seen.append((environments.admission.under_way, environments.admission.waiting))
            await trio.lowlevel.checkpoint()
            await original(slot, netns)

        world.network.wire = wire  # type: ignore[method-assign]
        await many(world, 20)
        assert max(under_way for under_way, _ in seen) == 4
        assert {waiting for _, waiting in seen} == {0}


async def test_many_requests_for_many_are_refused_whole_past_the_bound(tmp_path: Path) -> None:
    world = World(tmp_path, creations_waiting=2, supernet="10.9.0.0/22", bridge_ports=250)
    outcomes: list[str] = []
    async with world.running() as environments:
        async def ask(number: int) -> None:
            try:
                await many(world, 5, name=f"n{number}")
            except Overloaded:
                outcomes.append("refused")
            else:
                outcomes.append("made")

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(ask, number)
        await settle()
        assert "refused" in outcomes
        assert len(environments.registry) == 5 * outcomes.count("made")
        assert (environments.admission.under_way, environments.admission.waiting) == (0, 0)


async def test_many_come_from_the_pool_as_far_as_it_goes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, pool=PoolSettings(size=4, most=0))
    async with world.running() as environments:
        await trio.sleep(1)
        await many(world, 6)
        assert (environments.pool.claimed, environments.pool.missed) == (4, 2)


async def test_a_removal_that_fails_does_not_hide_why_and_is_finished_later(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.create(request("web-9", "server"), ALICE)
        world.faults.broken = {"network.unwire"}
        with pytest.raises(NameTaken):
            await many(world, 10)
        assert "remove_failed" in world.kinds()
        world.faults.broken = set()
        await environments.check()
        await settle()
        assert [e.name for e in environments.registry.all()] == ["web-9"]


async def test_a_daemon_killed_meanwhile_leaves_each_whole_or_gone(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(many, world, 10)
            while len(environments.registry) < 7:
                await trio.lowlevel.checkpoint()
            # Of a killed daemon nothing is undone: here its undoing fails.
            world.faults.broken = {"store.begin", "network.unwire", "cgroups.remove", "firewall.close"}
            nursery.cancel_scope.cancel()
    world.faults.broken = set()
    async with world.running() as environments:
        await settle()
        for environment in list(environments.registry.all()):
            assert environment.state == "ready"
            assert environment.slot.index in world.network.slots
            await environments.remove(environment)
        await settle()
        assert world.held() == {}
