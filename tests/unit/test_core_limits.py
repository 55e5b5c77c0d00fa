"""What is limited is limited for every command of an environment, and a host that cannot says so at the creation."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core import views
from netnsd.core.pool import PoolSettings
from netnsd.core.specification import check_resources
from netnsd.errors import InvalidRequest, LimitUnavailable
from tests.fakes.world import ALICE, World, request

LIMITED = wire.Resources(memory=64 << 20, cpu=0.5, pids=64)


async def test_every_command_of_a_limited_environment_joins_its_limit(tmp_path: Path,
                                                                      autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(wire.CreateRequest(
            name="web", command=["server"], resources=LIMITED, health=wire.HealthCheck(command=["./check"])), ALICE)
        await environments.attach(environment, wire.ExecRequest(ref="web", command=["sh"]), ALICE, 0)
        await trio.sleep(0.05)
        assert world.cgroups.limited == {environment.slot.cgroup: LIMITED}
        launches = [*world.processes.launches, *(launch for launch, _ in world.processes.attached)]
        assert {launch.argv[0] for launch in launches} == {"server", "./check", "sh"}
        assert {launch.joins for launch in launches} == {(f"/fake/limits/{environment.slot.cgroup}",)}
        assert views.environment(environment).resources == LIMITED
    async with world.running() as environments:  # and so does what a later run of the daemon starts
        [environment] = environments.registry.all()
        await environments.restart(environment, 0)
        assert world.processes.launches[-1].joins
        await environments.remove(environment)
        assert world.held() == {}


async def test_what_is_ended_for_lack_of_memory_is_told_once_with_whose_it_was(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(wire.CreateRequest(name="web", resources=LIMITED, services=[
            wire.ServiceRequest(name=name, command=[name]) for name in ("a", "b")]), ALICE)
        group = web.slot.cgroup
        world.cgroups.oom_kill(group)  # the kernel tells before the launcher does
        await trio.sleep(0.1)
        world.processes.end(web.services["a"].launch_id or "", 137)
        await trio.sleep(5)
        assert shortages(world) == [("a", 1)]
        kinds = world.kinds()
        assert kinds.index("oom_killed") < kinds.index("ended")
        world.processes.end(web.services["b"].launch_id or "", 137)  # by somebody else
        world.cgroups.oom_kill(group, 2)  # and these are no services
        await trio.sleep(5)
        assert shortages(world) == [("a", 1), ("b", 2)] or shortages(world) == [("a", 1), ("", 2)]
        assert views.environment(web).oom_kills == 3
        await environments.remove(web)
        assert world.held() == {}


def shortages(world: World) -> list[tuple[str, int]]:
    return [(details["service"], details["count"]) for kind, _, details in world.events if kind == "oom_killed"]


async def test_a_command_that_is_ended_for_lack_of_memory_is_told_of_and_counted_over_a_restart(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        lab = await environments.create(wire.CreateRequest(name="lab", resources=LIMITED), ALICE)
        bare = await environments.create(wire.CreateRequest(name="bare"), ALICE)
        await environments.attach(lab, wire.ExecRequest(ref="lab", command=["sh"]), ALICE, 0)
        await environments.attach(bare, wire.ExecRequest(ref="bare", command=["sh"]), ALICE, 0)
        assert set(environments._supervisor._shortage._scopes) == {lab.id}, "who has no limit is not watched"
        world.cgroups.oom_kill(lab.slot.cgroup)
        world.cgroups.oom_kill(bare.slot.cgroup)
        await trio.sleep(5)
        assert shortages(world) == [("", 1)]
    async with world.running() as environments:
        [lab, _] = environments.registry.all()
        assert views.environment(lab).oom_kills == 1
        await trio.sleep(5)
        assert shortages(world) == [("", 1)], "what was told is no news"
        world.cgroups.oom_kill(lab.slot.cgroup)
        await trio.sleep(5)
        assert shortages(world) == [("", 1), ("", 1)]


async def test_what_cannot_be_watched_now_is_watched_from_the_next_command_on(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        world.faults.broken = {"cgroups.more_oom_kills"}
        web = await environments.create(wire.CreateRequest(name="web", command=["server"], resources=LIMITED), ALICE)
        await trio.sleep(5)
        world.faults.broken = set()
        await environments.attach(web, wire.ExecRequest(ref="web", command=["sh"]), ALICE, 0)
        world.cgroups.oom_kill(web.slot.cgroup)
        await trio.sleep(5)
        assert shortages(world) == [("", 1)]
        world.faults.broken = {"cgroups.oom_kills"}
        world.processes.end(web.services["main"].launch_id or "", 137)
        await trio.sleep(5)
        assert web.services["main"].state == "exited"


# -- bandwidth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("command", [None, ["server"]])
async def test_bandwidth_is_held_when_the_environment_is_there_and_again_when_its_link_is_made_anew(
        tmp_path: Path, autojump_clock: trio.testing.MockClock, pool: int, command: list[str] | None) -> None:
    world = World(tmp_path, pool=PoolSettings(size=pool))
    async with world.running() as environments:
        await trio.sleep(5)
        web = await environments.create(wire.CreateRequest(
            name="web", command=command, resources=wire.Resources(bandwidth=1_000_000)), ALICE)
        assert world.network.bandwidths == {web.slot.index: 1_000_000}
        assert world.cgroups.limited == {}
        world.network.unlinked.add(web.slot.index)
        await environments.check()
        await trio.sleep(5)
        assert "mended" in world.kinds()
        assert world.network.bandwidths == {web.slot.index: 1_000_000}
    world.network.bandwidths.clear()
    async with world.running() as environments:
        await trio.sleep(5)
        assert world.network.bandwidths == {web.slot.index: 1_000_000}


@pytest.mark.parametrize("pool", [0, 2])
async def test_a_host_without_token_buckets_refuses_the_creation_and_nothing_is_left(
        tmp_path: Path, autojump_clock: trio.testing.MockClock, pool: int) -> None:
    world = World(tmp_path, pool=PoolSettings(size=pool))
    world.network.can_limit = False
    async with world.running() as environments:
        await trio.sleep(5)
        with pytest.raises(LimitUnavailable):
            await environments.create(wire.CreateRequest(
                name="web", resources=wire.Resources(bandwidth=1_000_000)), ALICE)
        assert list(environments.registry.all()) == []
        await environments.create(request("web", "server"), ALICE)


# -- what can be asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least", "most"), [
    ("memory", 4 << 20, 1 << 50), ("pids", 1, 4194304), ("bandwidth", 64_000, 32_000_000_000)])
def test_limits_are_in_range(name: str, least: int, most: int) -> None:
    for value in (least, least + 1, most - 1, most):
        assert getattr(check_resources(wire.Resources(**{name: value}), wire.Resources()), name) == value
    for value in (-1, 0, least - 1, most + 1):
        with pytest.raises(InvalidRequest, match=name):
            check_resources(wire.Resources(**{name: value}), wire.Resources())


@pytest.mark.parametrize(("cpu", "good"), [(-1, False), (0, False), (0.009, False), (0.01, True), (8192, True),
                                           (8192.1, False), (float("inf"), False), (float("nan"), False)])
def test_processors_are_in_range(cpu: float, good: bool) -> None:
    if good:
        assert check_resources(wire.Resources(cpu=cpu), wire.Resources()).cpu == cpu
    else:
        with pytest.raises(InvalidRequest):
            check_resources(wire.Resources(cpu=cpu), wire.Resources())


async def test_what_nobody_says_is_as_it_is_configured(tmp_path: Path) -> None:
    world = World(tmp_path, resources=wire.Resources(memory=64 << 20, pids=100))
    async with world.running() as environments:
        silent = await environments.create(request("silent"), ALICE)
        assert silent.resources == wire.Resources(memory=64 << 20, pids=100)
        own = await environments.create(request("own", resources=wire.Resources(pids=7, cpu=1)), ALICE)
        assert own.resources == wire.Resources(memory=64 << 20, pids=7, cpu=1)
    async with world.running() as environments:
        assert [e.resources for e in environments.registry.all()] == [silent.resources, own.resources]


async def test_without_a_limit_nothing_is_joined(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.cgroups.lacking = {"memory", "cpu", "pids"}
    async with world.running() as environments:
        await environments.create(request("web", "server"), ALICE)
        assert world.cgroups.limited == {}
        assert world.processes.launches[0].joins == ()


@pytest.mark.parametrize("pool", [0, 2])
async def test_a_host_that_cannot_limit_refuses_the_creation_and_nothing_else(tmp_path: Path, pool: int) -> None:
    world = World(tmp_path, pool=PoolSettings(size=pool))
    world.cgroups.lacking = {"memory", "cpu", "pids"}
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
