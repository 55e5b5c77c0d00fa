"""A service has ended when its first process has and nothing lives in its cgroup."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd.core.actor import Actor
from netnsd.core.environment import Environment, Service
from netnsd.core.interfaces import Exited
from netnsd.errors import KernelError, LaunchFailed, NetnsdError, StoreError
from tests.fakes.faults import failing, raising
from tests.fakes.world import ALICE, World, request

settled = trio.testing.wait_all_tasks_blocked


def stored(world: World, name: str = "s0") -> Service:
    """What the state file says, which must be what memory says."""
    [row] = world.store.environments()
    assert row.services == world.environments.registry.find(row.id, ALICE).services
    return row.services[name]


async def make(world: World, *commands: str) -> Environment:
    return await world.environments.create(request("web", *(commands or ("server",)), ports=1), ALICE)


async def test_an_end_is_kept_told_and_acknowledged(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = (await make(world)).services["s0"].launch_id
        assert launch is not None
        world.processes.end(launch, 3)
        await settled()
        assert (stored(world).state, stored(world).pid, stored(world).exit_code) == ("exited", None, 3)
        assert world.processes.acknowledged == [launch]
        assert world.kinds().count("ended") == 1


async def test_an_end_before_the_start_was_answered_is_not_lost(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world, "brief")
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("exited", 7)
        assert world.kinds().index("started") < world.kinds().index("ended")


async def test_a_late_report_of_an_earlier_launch_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        first = environment.services["s0"].launch_id
        assert first is not None
        await environments.restart(environment, 0)
        now = stored(world)
        world.processes.tell(Exited(first, 99))
        world.processes.tell(Exited("unheard of", 98))
        await settled()
        assert stored(world) == now
        assert now.state == "running"
        assert world.processes.acknowledged[-2:] == [first, "unheard of"]


async def test_what_put_itself_in_the_background_runs_until_its_cgroup_is_empty(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = (await make(world)).services["s0"].launch_id
        assert launch is not None
        world.processes.end(launch, 0, leaving=[5001, 5002])
        await settled()
        assert (stored(world).state, stored(world).pid) == ("running", 5001)
        world.cgroups.leave(5001)
        await settled()
        assert stored(world).state == "running"
        world.cgroups.leave(5002)
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("exited", 0)


@pytest.mark.parametrize("code", [None, 0, 7])
async def test_without_its_launcher_a_service_goes_on_and_has_the_code_that_the_kernel_tells(
        tmp_path: Path, code: int | None) -> None:
    world = World(tmp_path)
    async with world.running():
        pid = (await make(world)).services["s0"].pid
        assert pid is not None
        world.processes.lose_launcher()
        await settled()
        assert stored(world).state == "running"
        world.cgroups.codes = {} if code is None else {pid: code}
        world.cgroups.leave(pid)
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("exited", code)
        assert world.kinds().count("ended") == 1


@pytest.mark.parametrize("told", ["by the launcher", "by the kernel"])
async def test_the_code_of_a_service_is_its_first_process_s_whoever_tells_it(tmp_path: Path, told: str) -> None:
    world = World(tmp_path)
    async with world.running():
        service = (await make(world)).services["s0"]
        assert service.launch_id is not None
        assert service.pid is not None
        if told == "by the launcher":
            world.processes.end(service.launch_id, 3, leaving=[5001])
            await settled()
            world.processes.lose_launcher()
        else:
            world.processes.lose_launcher()
            world.cgroups.join("nd0/s-s0", 5001)
            await settled()
            world.cgroups.codes = {service.pid: 3}
            world.cgroups.leave(service.pid)
        await settled()
        assert (stored(world).state, stored(world).exit_code, stored(world).pid) == ("running", 3, 5001)
        world.cgroups.codes[5001] = 99
        world.cgroups.leave(5001)
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("exited", 3)


async def test_a_launcher_that_is_lost_during_a_start_leaves_a_service_that_is_watched(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        await environments.stop(environment, 0)
        with world.faults.recording() as steps:
            await environments.start(environment)
        number = steps.index("cgroups.create")
        await environments.stop(environment, 0)
        with world.faults.fail_at(number, lambda _: world.processes.lose_launcher(), after=True):
            create = world.cgroups.create

            async def slow(path: str) -> None:
                await create(path)
                world.processes.tell(None)
                await settled()

            world.cgroups.create = slow  # type: ignore[method-assign]
            await environments.start(environment)
        await settled()
        assert stored(world).state == "running"
        pid = stored(world).pid
        assert pid is not None
        world.cgroups.leave(pid)
        await settled()
        assert stored(world).state == "exited"


async def test_stop_asks_all_processes_and_kills_what_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, "server", "database")
        pids = [service.pid for service in environment.services.values()]
        await environments.stop(environment, 0.05)
        assert sorted(world.cgroups.signalled) == [(pid, 15) for pid in pids]
        assert environment.shown_state == "stopped"
        assert {(s.state, s.pid, s.exit_code) for s in environment.services.values()} == {("stopped", None, 137)}
        assert stored(world).state == "stopped"


async def test_stop_returns_when_servers_end_in_time(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        launch = environment.services["s0"].launch_id
        assert launch is not None
        world.cgroups.on_signal = lambda _pid, _signal: world.processes.end(launch, 0)
        with trio.fail_after(2):
            await environments.stop(environment, 3600)
        assert (stored(world).state, stored(world).exit_code) == ("stopped", 0)


async def test_start_starts_what_does_not_run_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, "server", "database")
        launch = environment.services["s1"].launch_id
        assert launch is not None
        world.processes.end(launch, 1)
        await settled()
        await environments.start(environment)
        assert len(world.processes.launches) == 3
        assert {s.state for s in environment.services.values()} == {"running"}


async def test_a_service_that_ran_before_starts_in_another_group(tmp_path: Path) -> None:
    """The kernel kills at once what is born in a group that was killed as a whole before."""
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        launch = environment.services["s0"].launch_id
        assert launch is not None
        [group] = [launched.cgroup for launched in world.processes.launches]
        kept = world.cgroups.groups[group]
        world.processes.end(launch, 1)
        await settled()
        await environments.start(environment)
        assert world.cgroups.groups[group] is not kept


@pytest.mark.parametrize("kind", [LaunchFailed, KernelError, StoreError])
async def test_a_start_that_fails_at_any_step_can_be_tried_again(tmp_path: Path, kind: type[NetnsdError]) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        await environments.stop(environment, 0)
        with world.faults.recording() as steps:
            await environments.start(environment)
        count = len(steps)
        for number in range(count):
            for again in (False, True):
                await environments.stop(environment, 0)
                before = environment.services["s0"]
                with world.faults.fail_at(number, raising(kind), again=again):
                    with pytest.raises(kind):
                        await environments.start(environment)
                await settled()
                assert environment.services["s0"] == before, steps[number]
                assert not world.processes.running
                assert not world.environments._supervisor._launches
                await environments.start(environment)
                assert stored(world).state == "running"


async def test_a_stop_that_fails_is_an_error_of_ours_and_can_be_tried_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, "server", "database")
        with world.faults.recording() as steps:
            await environments.stop(environment, 0)
        for number in range(len(steps)):
            await environments.start(environment)
            with world.faults.fail_at(number, failing):
                with contextlib.suppress(NetnsdError):
                    await environments.stop(environment, 0)
            await settled()
            await environments.stop(environment, 0)
            await settled()
            assert not world.processes.running, steps[number]


async def test_a_full_disk_does_not_lose_an_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world)
        launch = environment.services["s0"].launch_id
        assert launch is not None
        with world.faults.fail_at(0, failing, again=True):
            world.processes.end(launch, 3)
            await settled()
        assert (environment.services["s0"].state, environment.services["s0"].exit_code) == ("exited", 3)
        assert launch not in world.processes.acknowledged, "the launcher is to tell it again"
        assert "store_failed" in world.kinds()
    async with world.running():
        assert (stored(world).state, stored(world).exit_code) == ("exited", 3)
        assert launch in world.processes.acknowledged


async def test_the_code_of_a_first_process_is_kept_by_a_daemon_that_finds_the_launcher_gone(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = (await make(world)).services["s0"].launch_id
        assert launch is not None
        world.processes.end(launch, 3, leaving=[5001])
        await settled()
    world.processes.lose_launcher()
    world.cgroups.codes = {5001: 99}
    async with world.running():
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("running", 3)
        world.cgroups.leave(5001)
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("exited", 3)


@pytest.mark.parametrize("meanwhile", ["nothing", "ended", "daemonised", "launcher lost", "kernel tells", "killed"])
async def test_a_restart_of_the_daemon_interrupts_no_service(tmp_path: Path, meanwhile: str) -> None:
    world = World(tmp_path)
    async with world.running():
        service = (await make(world)).services["s0"]
    launch, pid = service.launch_id, service.pid
    assert launch is not None
    assert pid is not None
    match meanwhile:
        case "ended":
            world.processes.end(launch, 4)
        case "daemonised":
            world.processes.end(launch, 0, leaving=[5001])
        case "launcher lost" | "kernel tells":
            world.processes.lose_launcher()
        case "killed":
            world.processes.lose_launcher()
            world.cgroups.leave(pid)
    async with world.running():
        await settled()
        expected = {"nothing": ("running", pid, None), "ended": ("exited", None, 4), "daemonised": ("running", pid, 0),
                    "launcher lost": ("running", pid, None), "kernel tells": ("running", pid, None),
                    "killed": ("exited", None, None)}[meanwhile]
        assert (stored(world).state, stored(world).pid, stored(world).exit_code) == expected
        assert world.held()["published"]
        if expected[0] == "running":
            world.processes.end(launch, 6) if meanwhile == "nothing" else None
            world.cgroups.codes = {pid: 9} if meanwhile == "kernel tells" else {}
            for left in world.cgroups.pids(""):
                world.cgroups.leave(left)
            await settled()
            assert stored(world).state == "exited"
            assert stored(world).exit_code == {
                "nothing": 6, "daemonised": 0, "launcher lost": None, "kernel tells": 9}[meanwhile]


async def test_what_a_killed_daemon_left_half_made_is_undone_and_the_rest_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        kept = await environments.create(request("kept", "server", ports=1), ALICE)
        half = await environments.create(request("half", "server", ports=1), ALICE)
        lost = await environments.create(request("lost", "server", ports=1), ALICE)
        world.store.set_state(half.id, "creating")
        world.network.slots.pop(lost.slot.index)
        world.network.slots[99] = "orphan"
        await world.cgroups.create("nd98/s-x")
        world.files.furnished.add("orphan")
    async with world.running() as environments:
        await settled()
        assert [e.id for e in environments.registry.all()] == [kept.id]
        held = world.held()
        assert held["namespaces"] == {kept.slot.index: "kept"}
        assert held["files"] == {kept.id}
        assert all(group.startswith(kept.slot.cgroup) for group in held["cgroups"])
        assert held["ports"] == 1
        assert "lost" in world.kinds()


async def test_what_comes_back_gets_another_name_where_its_own_is_somebody_elses_since_the_reboot(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server", restart="always", ports=1), ALICE)
    after = World(tmp_path, boot_id="another boot")
    after.network.foreign.add("web")
    async with after.running() as environments:
        await trio.sleep(1)
        [found] = environments.registry.all()
        assert (found.id, found.slot, found.ports) == (web.id, web.slot, web.ports)
        assert found.netns == after.network.slots[web.slot.index] == "web.alice"
        assert [e.netns for e in after.store.environments()] == ["web.alice"]
        assert found.services["s0"].state == "running"


async def test_a_reboot_ends_every_environment(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world)
    after = World(tmp_path, boot_id="another boot")
    async with after.running():
        await settled()
        assert after.held() == {}
        assert "lost" in after.kinds()


async def test_what_comes_back_after_a_reboot_has_no_group_that_its_user_has_lost(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.create(request("web", "server", restart="always"), replace(ALICE, groups=(1001, 100, 7)))
    after = World(tmp_path, boot_id="another boot")
    after.accounts[ALICE.uid] = replace(ALICE, groups=(1001, 7, 8))
    for _ in range(2):  # and stays without it
        async with after.running() as environments:
            await settled()
            (web,) = environments.registry.all()
            (service,) = web.services.values()
            assert (service.command.gid, service.command.groups) == (ALICE.gid, (1001, 7))


@pytest.mark.parametrize("account", [None, replace(ALICE, user="eve")], ids=["gone", "somebody else's"])
async def test_what_would_come_back_for_nobody_is_lost(tmp_path: Path, account: Actor | None) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.create(request("web", "server", restart="always"), ALICE)
    after = World(tmp_path, boot_id="another boot")
    del after.accounts[ALICE.uid]
    if account is not None:
        after.accounts[ALICE.uid] = account
    async with after.running():
        await settled()
        assert after.held() == {}
        assert [details["reason"] for kind, _, details in after.events if kind == "lost"] == [
            "there is no user 'alice' any more"]


async def test_a_start_goes_on_when_an_orphan_cannot_be_removed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.network.slots[5] = "orphan"
    await world.cgroups.create("nd6/s-x")
    world.files.furnished.add("orphan")
    for step in ("network.unwire", "cgroups.remove", "files.remove"):
        world.faults.broken = {step}
        async with world.running() as environments:
            assert await environments.create(request(f"e-{step.partition('.')[0]}"), ALICE)
