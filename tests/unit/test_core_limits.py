"""What is limited is limited for every command of an environment, and a host that cannot says so at the creation."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core import views
from netnsd.core.pool import PoolSettings
from netnsd.errors import LimitUnavailable
from tests.fakes.world import ALICE, World, request

LIMITED = wire.Resources(pids=64)


async def test_every_command_of_a_limited_environment_joins_its_limit(tmp_path: Path,
                                                                      autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(wire.CreateRequest(
            name="web", command=["server"], resources=LIMITED, health=wire.HealthCheck(command=["./check"])), ALICE)
        await environments.attach(wire.ExecRequest(ref="web", command=["sh"]), ALICE, 0)
        await trio.sleep(0.05)
        assert world.cgroups.limited == {environment.slot.cgroup: 64}
        launches = [*world.processes.launches, *(launch for launch, _ in world.processes.attached)]
        assert {launch.argv[0] for launch in launches} == {"server", "./check", "sh"}
        assert {launch.joins for launch in launches} == {(f"/fake/pids/{environment.slot.cgroup}",)}
        assert views.environment(environment).resources == LIMITED
    async with world.running() as environments:  # and so does what a later run of the daemon starts
        [environment] = environments.registry.all()
        await environments.restart(environment, 0)
        assert world.processes.launches[-1].joins
        await environments.remove(environment)
        assert world.held() == {}


async def test_without_a_limit_nothing_is_joined(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.cgroups.can_limit = False
    async with world.running() as environments:
        await environments.create(request("web", "server"), ALICE)
        assert world.cgroups.limited == {}
        assert world.processes.launches[0].joins == ()


@pytest.mark.parametrize("pool", [0, 2])
async def test_a_host_that_cannot_limit_refuses_the_creation_and_nothing_else(tmp_path: Path, pool: int) -> None:
    world = World(tmp_path, pool=PoolSettings(size=pool))
    world.cgroups.can_limit = False
    async with world.running() as environments:
        for wanted in (wire.CreateRequest(name="lab", resources=LIMITED),
                       wire.CreateRequest(name="web", command=["server"], resources=LIMITED)):
            with pytest.raises(LimitUnavailable):
                await environments.create(wanted, ALICE)
        with pytest.raises(LimitUnavailable):
            await world.templates.add(wire.TemplateRequest(
                name="shop", specification=wire.Specification(resources=LIMITED)), ALICE)
        assert environments.registry.visible(ALICE, everyones=True, labels={}) == []
        assert world.store.environments() == []
        assert world.store.templates() == []
        environment = await environments.create(request("web", "server"), ALICE)
        await environments.remove(environment)
