"""What ended by itself is started again as its policy says, more and more slowly, and what was ended by hand is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core import restarts
from netnsd.core.environment import Command, Environment, Service
from netnsd.errors import KernelError, LaunchFailed, NetnsdError, StoreError, WaitTimeout
from tests.fakes.faults import raising
from tests.fakes.world import ALICE, World, request

settled = trio.testing.wait_all_tasks_blocked
Clock = trio.testing.MockClock


async def make(world: World, restart: str = "always", *commands: str, **fields: Any) -> Environment:
    wanted = request("web", *(commands or ("server",)), restart=restart, **fields)
    return await world.environments.create(wanted, ALICE)


def stored(world: World) -> Service:
    """The service as the state file has it, which must be as memory has it."""
    [row] = world.store.environments()
    assert row.services == world.environments.registry.find(row.id, ALICE).services
    return row.services["s0"]


def end(world: World, code: int | None = 1) -> None:
    launch = stored(world).launch_id
    assert launch is not None
    world.processes.end(launch, code)


@pytest.mark.parametrize(("policy", "code", "again"), [
    ("no", 1, False), ("no", None, False), ("on-failure", 0, False), ("on-failure", 1, True), ("on-failure", 137, True),
    ("on-failure", None, True), ("always", 0, True), ("always", 1, True), ("always", None, True)])
async def test_a_policy_says_which_ends_are_followed_by_a_start(
        tmp_path: Path, autojump_clock: Clock, policy: str, code: int | None, again: bool) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, policy)
        first = stored(world)
        end(world, code)
        await settled()
        assert (stored(world).state, stored(world).exit_code) == ("restarting" if again else "exited", code)
        assert environment.shown_state == ("running" if again else "stopped")
        await trio.sleep(1)
        now = stored(world)
        if again:
            assert (now.state, now.exit_code, now.restarts) == ("running", None, 1)
            assert now.launch_id != first.launch_id
            assert now.pid != first.pid
        else:
            assert (now.state, now.restarts) == ("exited", 0)
        told = [kind for kind in world.kinds() if kind in ("started", "ended", "restarting")]
        assert told == ["started", "ended", *(["restarting", "started"] if again else [])]


def test_pauses_double_from_a_tenth_of_a_second_to_half_a_minute() -> None:
    pauses = [restarts.pause(tries) for tries in range(11)]
    assert pauses[:3] == [pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.4)]
    assert pauses[8:] == [pytest.approx(25.6), 30, 30]
    assert restarts.pause(10**9) == 30


async def test_what_ends_at_once_is_started_ever_more_slowly(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        began = trio.current_time()
        await make(world, "on-failure", "brief")
        await trio.sleep(60)
        # 0.1 + 0.2 + ... + 25.6 seconds, and then one each half minute.
        assert len(world.processes.launches) == 1 + 9
        await trio.sleep(3600 - (trio.current_time() - began))
        assert 120 < len(world.processes.launches) < 132
        assert stored(world).restarts == len(world.processes.launches) - 1


@pytest.mark.parametrize(("ran", "pause"), [(restarts.CALM_SECONDS - 0.01, 1.6), (restarts.CALM_SECONDS, 0.1)])
async def test_what_ran_for_a_while_is_started_soon(tmp_path: Path, autojump_clock: Clock, ran: float,
                                                    pause: float) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world)
        for _ in range(4):
            end(world)
            await trio.sleep(9)
        await trio.sleep(20)  # the fourth start came a while ago, whatever its pause was
        end(world, 1)
        await trio.sleep(0.15)
        assert stored(world).state == "running", "it ran for long before that"
        for _ in range(3):
            end(world)
            await trio.sleep(restarts.pause(stored(world).tries) + 0.01)
        assert stored(world).tries == 4
        await trio.sleep(ran - 0.01)
        end(world)
        await settled()
        [*_, (_kind, _name, details)] = [event for event in world.events if event[0] == "restarting"]
        assert details["after_seconds"] == pytest.approx(pause)


async def test_a_start_by_hand_does_not_wait_and_counts_anew(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        for _ in range(6):
            end(world)
            await trio.sleep(restarts.pause(stored(world).tries) + 0.01)
        end(world)
        await settled()
        assert stored(world).state == "restarting"
        began = trio.current_time()
        await environments.start(environment)
        assert trio.current_time() - began < 0.1
        assert (stored(world).state, stored(world).restarts, stored(world).tries) == ("running", 0, 0)
        launched = len(world.processes.launches)
        await trio.sleep(60)
        assert len(world.processes.launches) == launched, "the start that was pending does not come beside it"
        assert world.held().get("restarts") is None


@pytest.mark.parametrize("when", ["running", "waiting", "starting"])
async def test_a_stop_by_hand_ends_it_until_a_start_by_hand(tmp_path: Path, autojump_clock: Clock, when: str) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment, create = await make(world), world.cgroups.create
        if when != "running":
            end(world)
            await settled()
        if when == "starting":  # the stop waits for the lock that the restart holds
            reached = trio.Event()

            async def slow(path: str) -> None:
                reached.set()
                await trio.sleep(5)
                await create(path)

            world.cgroups.create = slow  # type: ignore[method-assign]
            await reached.wait()
        await environments.stop(environment, 0)
        world.cgroups.create = create  # type: ignore[method-assign]
        assert stored(world).state == "stopped"
        assert environment.shown_state == "stopped"
        assert not world.environments._supervisor._restarts.pending
        launched = len(world.processes.launches)
        await trio.sleep(120)
        assert stored(world).state == "stopped"
        assert len(world.processes.launches) == launched
        assert not world.held().get("restarts")
        await environments.start(environment)
        end(world)
        await trio.sleep(1)
        assert (stored(world).state, stored(world).restarts) == ("running", 1)


@pytest.mark.parametrize("when", ["waiting", "starting"])
async def test_a_removal_is_not_kept_waiting_and_leaves_nothing(tmp_path: Path, autojump_clock: Clock,
                                                                when: str) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, ports=1)
        if when == "waiting":
            for _ in range(8):
                end(world)
                await trio.sleep(restarts.pause(stored(world).tries) + 0.01)
        launch = world.processes.launch
        if when == "starting":
            async def hang(_launch: object) -> int:
                """Hang as an exec on a dead file server does, until the group is killed."""
                while world.cgroups.groups:
                    await trio.sleep(0.01)
                raise LaunchFailed("killed", stage="exec", errno="EIO")

            world.processes.launch = hang  # type: ignore[assignment]
        end(world)
        await settled()
        await trio.sleep(0.2)
        assert stored(world).state == ("restarting" if when == "waiting" else "starting")
        began = trio.current_time()
        await environments.remove(environment)
        assert trio.current_time() - began < 1
        world.processes.launch = launch  # type: ignore[method-assign]
        await trio.sleep(120)
        assert world.held() == {}
        assert world.kinds().count("removed") == 1


async def test_a_removal_is_followed_by_no_restart(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        await environments.remove(environment)
        await trio.sleep(120)
        assert {"restarting", "restart_failed"}.isdisjoint(world.kinds())
        assert world.held() == {}


async def test_a_restart_that_was_due_before_a_start_by_hand_does_not_shorten_the_pause_after_that(
        tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment, launch = await make(world), world.processes.launch
        for _ in range(2):
            end(world)
            await trio.sleep(restarts.pause(stored(world).tries) + 0.01)
        end(world)
        await settled()

        async def slowly(wanted: Any) -> int:
            """Has ended when it is told to have started, which the pending restart waits for meanwhile."""
            await trio.sleep(5)
            pid = await launch(wanted)
            world.processes.end(wanted.launch_id, 1)
            await settled()
            return pid

        world.processes.launch = slowly  # type: ignore[assignment]
        await environments.start(environment)
        world.processes.launch = launch  # type: ignore[method-assign]
        launched = len(world.processes.launches)
        assert stored(world).state == "restarting"
        await trio.sleep(0.05)
        assert len(world.processes.launches) == launched
        await trio.sleep(0.1)
        assert len(world.processes.launches) == launched + 1


@pytest.mark.parametrize("kind", [LaunchFailed, KernelError, StoreError])
async def test_a_start_that_fails_is_a_try_that_failed(tmp_path: Path, autojump_clock: Clock,
                                                       kind: type[NetnsdError]) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world)
        with world.faults.recording() as steps:
            end(world)
            await trio.sleep(1)
        first = steps.index("cgroups.create")
        for number in range(first, len(steps)):
            began = len(world.processes.launches)
            with world.faults.fail_at(number, raising(kind)):
                end(world)
                await trio.sleep(20)  # the pause is over, and that after it, and it ran for a while
            await settled()
            assert stored(world).state == "running", steps[number]
            assert "restart_failed" in world.kinds()
            assert len(world.processes.running) == 1, steps[number]
            assert len(world.processes.launches) > began
        assert stored(world).restarts > len(steps) - first


async def test_a_program_that_is_gone_is_looked_for_again_with_pauses(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world)
        launch = world.processes.launch

        async def missing(_launch: object) -> int:
            raise LaunchFailed("server: No such file or directory", stage="exec", errno="ENOENT")

        world.processes.launch = missing  # type: ignore[assignment]
        end(world)
        await trio.sleep(3600)
        failed = world.kinds().count("restart_failed")
        assert 110 < failed < 140
        assert (stored(world).state, stored(world).restarts) == ("restarting", failed)
        assert not world.processes.running
        with pytest.raises(LaunchFailed):
            await environments.start(environment)
        assert stored(world).state == "restarting", "a start by hand that failed leaves it as it was"
        world.processes.launch = launch  # type: ignore[method-assign]
        await trio.sleep(31)
        assert stored(world).state == "running"


async def test_what_put_itself_in_the_background_has_ended_when_nothing_of_it_runs(tmp_path: Path,
                                                                                   autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = (await make(world)).services["s0"].launch_id
        assert launch is not None
        world.processes.end(launch, 0, leaving=[5001])
        await trio.sleep(60)
        assert (stored(world).state, stored(world).pid, stored(world).restarts) == ("running", 5001, 0)
        world.cgroups.leave(5001)
        await trio.sleep(1)
        assert (stored(world).state, stored(world).restarts) == ("running", 1)


@pytest.mark.parametrize("meanwhile", ["in its pause", "ended", "ended, unknown to all"])
async def test_a_restart_of_the_daemon_goes_on_with_what_is_to_come(tmp_path: Path, autojump_clock: Clock,
                                                                    meanwhile: str) -> None:
    world = World(tmp_path)
    async with world.running():
        service = (await make(world)).services["s0"]
        for _ in range(5):
            end(world)
            await trio.sleep(restarts.pause(stored(world).tries) + 0.01)
        service = stored(world)
        if meanwhile == "in its pause":
            end(world)
            await settled()
            assert stored(world).state == "restarting"
    assert service.launch_id is not None
    assert service.pid is not None
    if meanwhile == "ended":
        world.processes.end(service.launch_id, 3)
    elif meanwhile == "ended, unknown to all":
        world.processes.lose_launcher()
        world.cgroups.leave(service.pid)
    async with world.running() as environments:
        await settled()
        assert stored(world).state == "restarting"
        assert stored(world).restarts == 5
        await trio.sleep(2)
        assert stored(world).state == "restarting", "its pauses were longer already"
        await trio.sleep(2)
        assert (stored(world).state, stored(world).restarts) == ("running", 6)
        assert world.kinds().count("ended") == 6
        [environment] = environments.registry.all()
        await environments.stop(environment, 0)
    async with world.running():
        await trio.sleep(60)
        assert stored(world).state == "stopped"


async def test_without_a_policy_what_ended_while_the_daemon_was_down_stays_ended(tmp_path: Path,
                                                                               autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = (await make(world, "on-failure")).services["s0"].launch_id
    assert launch is not None
    world.processes.end(launch, 0)
    async with world.running():
        await trio.sleep(60)
        assert (stored(world).state, stored(world).exit_code) == ("exited", 0)


async def test_wait_for_exit_and_for_ready_go_on_while_it_is_started_again(tmp_path: Path,
                                                                           autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, "on-failure", "brief")
        with pytest.raises(WaitTimeout, match="is not exit after 30"):
            await environments.wait(environment, "exit", 30)
        with pytest.raises(WaitTimeout, match="'s0' is restarting after exit code 7"):
            await environments.wait(environment, "ready", 30)
        await environments.stop(environment, 0)
        await environments.wait(environment, "exit", 1)


async def test_a_server_that_ends_while_others_of_its_environment_are_started_is_started_again(
        tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        launch = world.processes.launch

        async def slowly(wanted: Any) -> int:
            if wanted.cgroup.endswith("s1"):
                await trio.sleep(5)
            return await launch(wanted)

        world.processes.launch = slowly  # type: ignore[assignment]
        environment = await make(world, "always", "brief", "server")
        assert environment.services["s0"].state == "restarting"
        world.processes.launch = launch  # type: ignore[method-assign]
        await trio.sleep(5)
        assert stored(world).restarts > 2
        assert environment.services["s1"].restarts == 0


async def test_in_stock_there_is_nothing_that_ended(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        wanted = wire.Specification(command=["server"], restart="always")
        await world.templates.add(wire.TemplateRequest(name="shop", warm=1, specification=wanted), ALICE)
        await trio.sleep(1)
        [first] = world.environments.registry.all()
        launch = first.services["main"].launch_id
        assert launch is not None
        world.processes.end(launch, 1)
        await trio.sleep(10)
        [second] = world.environments.registry.all()
        assert second.id != first.id
        made = await world.templates.create(wire.CreateRequest(name="web", template="shop"), ALICE)
        assert made.services["main"].restart == "always"


@pytest.mark.parametrize(("policy", "code", "wanted"), [("no", 1, False), ("on-failure", 0, False),
                                                        ("on-failure", None, True), ("always", 0, True)])
def test_is_wanted(policy: Any, code: int | None, wanted: bool) -> None:
    command = Command(("x",), {}, "/", 1, 1, (), 0, {}, False)
    assert restarts.is_wanted(Service("main", command, exit_code=code, restart=policy)) == wanted


async def test_what_fails_before_its_launch_is_tried_more_and_more_slowly_too(
        tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world)
    async with world.running():  # of what is furnished another run of the daemon knows nothing
        world.faults.broken = {"network.furnish"}
        end(world)
        await trio.sleep(60)
        pauses = [details["after_seconds"] for kind, _, details in world.events if kind == "restart_failed"]
        assert pauses[:3] == [0.2, 0.4, 0.8]
        assert len(pauses) < 12
        world.faults.broken = set()
        await trio.sleep(restarts.LONGEST_PAUSE_SECONDS + 1)
        assert stored(world).state == "running"
        assert stored(world).restarts == len(pauses) + 1
