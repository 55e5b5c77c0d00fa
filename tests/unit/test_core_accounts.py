"""What is started again has no right that its creator's account has lost since, whoever or whatever starts it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.actor import Actor
from netnsd.core.environment import Command, Environment
from netnsd.errors import LaunchFailed
from tests.fakes.world import ALICE, World, actor, request

settled = trio.testing.wait_all_tasks_blocked
Clock = trio.testing.MockClock
Again = Callable[[World, Environment], Awaitable[None]]
WITH_GROUP = replace(ALICE, groups=(1001, 100, 7))
LOST = replace(ALICE, groups=(1001, 7, 8))


async def _restart(world: World, environment: Environment) -> None:
    await world.environments.restart(environment, 0)


async def _stop_and_start(world: World, environment: Environment) -> None:
    await world.environments.stop(environment, 0)
    await world.environments.start(environment)


async def _by_policy(world: World, environment: Environment) -> None:
    launch = environment.services["s0"].launch_id
    assert launch is not None
    world.processes.end(launch, 1)
    await trio.sleep(1)


def again(test: Any) -> Any:
    return pytest.mark.parametrize("start", [_restart, _stop_and_start, _by_policy],
                                   ids=["restart", "stop and start", "policy"])(test)


def launched(world: World) -> Command:
    """What the service was last started as, which memory and the state file have, too."""
    [row] = world.store.environments()
    [live] = world.environments.registry.all()
    assert row.services == live.services
    last = world.processes.launches[-1]
    command = row.services["s0"].command
    assert (last.uid, last.gid, last.groups) == (command.uid, command.gid, command.groups)
    return command


@again
async def test_a_group_that_the_account_has_lost_is_dropped_for_good(
        tmp_path: Path, autojump_clock: Clock, start: Again) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", restart="always"), WITH_GROUP)
        assert launched(world).groups == (1001, 100, 7), "a creation has what its creator has"
        world.accounts[ALICE.uid] = LOST
        await start(world, environment)
        assert environment.shown_state == "running"
        assert launched(world).groups == (1001, 7), "and none that it did not have"
        world.accounts[ALICE.uid] = WITH_GROUP
        await start(world, environment)
        assert launched(world).groups == (1001, 7)
    async with world.running():
        assert launched(world).groups == (1001, 7)


@again
async def test_a_first_group_that_is_lost_is_the_accounts_own_again(
        tmp_path: Path, autojump_clock: Clock, start: Again) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", restart="always"), replace(ALICE, gid=7))
        await start(world, environment)
        assert launched(world).gid == ALICE.gid


@again
@pytest.mark.parametrize("account", [None, replace(ALICE, user="eve")], ids=["gone", "somebody else's"])
async def test_nothing_is_started_as_somebody_who_has_the_number_now(
        tmp_path: Path, autojump_clock: Clock, start: Again, account: Actor | None) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", restart="always"), ALICE)
        before = len(world.processes.launches)
        del world.accounts[ALICE.uid]
        if account is not None:
            world.accounts[ALICE.uid] = account
        if start is _by_policy:
            await start(world, environment)
            assert "restart_failed" in world.kinds()
        else:
            with pytest.raises(LaunchFailed, match="no user 'alice' any more"):
                await start(world, environment)
        assert len(world.processes.launches) == before
        world.accounts[ALICE.uid] = ALICE  # the name service did not answer, say
        await start(world, environment) if start is not _by_policy else await trio.sleep(10)
        assert environment.shown_state == "running"


@again
async def test_who_never_had_an_account_keeps_no_group_but_the_first(
        tmp_path: Path, autojump_clock: Clock, start: Again) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", restart="always"), actor(4711, "4711"))
        assert launched(world).groups == (4711, 100)
        await start(world, environment)
        assert (launched(world).gid, launched(world).groups) == (4711, ())


async def test_stock_is_not_made_as_somebody_who_has_the_number_now(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        world.accounts[ALICE.uid] = replace(ALICE, user="eve")
        await world.templates.add(wire.TemplateRequest(name="shop", warm=1, specification=wire.Specification(
            command=["server"])), ALICE)
        await trio.sleep(10)
        assert world.processes.launches == []
        assert "alice" in world.templates.pools(ALICE)[0].reason


async def test_a_creation_asks_for_no_account(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        del world.accounts[ALICE.uid]
        await environments.create(request("web", "server"), ALICE)
        await settled()
        assert launched(world).groups == ALICE.groups
