"""Checks say whether a server works: at its start soon, later at their interval, and across restarts of the daemon."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netnsd import wire
from netnsd.core import specification, views
from netnsd.core.environment import Environment, Service
from netnsd.core.health import AT_ONCE, Judge
from netnsd.errors import InvalidPort, InvalidRequest, LauncherUnavailable, WaitTimeout
from tests.fakes.world import ALICE, BOB, World

settled = trio.testing.wait_all_tasks_blocked
Clock = trio.testing.MockClock
TCP = wire.HealthCheck(tcp=3000)
HTTP = wire.HealthCheck(http="/healthz", port=3000)
COMMAND = wire.HealthCheck(command=["./check"])


async def make(world: World, check: wire.HealthCheck, **fields: Any) -> Environment:
    wanted = wire.CreateRequest(name="web", command=["server"], health=check, **fields)
    return await world.environments.create(wanted, ALICE)


def stored(world: World) -> Service:
    [row] = world.store.environments()
    assert row.services == world.environments.registry.find(row.id, ALICE).services
    return row.services["main"]


def told(world: World) -> list[str]:
    return [kind for kind in world.kinds() if kind in ("healthy", "unhealthy")]


@pytest.mark.parametrize("check", [TCP, HTTP])
async def test_a_server_is_starting_until_it_answers_and_then_healthy(
        tmp_path: Path, autojump_clock: Clock, check: wire.HealthCheck) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, check)
        assert stored(world).health == "starting"
        await trio.sleep(3)
        assert stored(world).health == "starting"
        assert views.environment(environment).services[0].health == "starting"
        world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(1.1)
        assert stored(world).health == "healthy"
        assert told(world) == ["healthy"]
        (_time, address, port, path) = world.probes.looks[-1]
        assert (address, port, path) == (environment.slot.address, 3000, check.http or "")


async def test_looks_come_soon_at_first_and_then_at_the_interval(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, TCP)
        await trio.sleep(1)
        assert 4 <= len(world.probes.looks) <= 7
        world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(1)
        before = len(world.probes.looks)
        await trio.sleep(100)
        assert len(world.probes.looks) == before + 10
        assert told(world) == ["healthy"], "an event for a change, and none for a look"


@pytest.mark.parametrize("failure", ["closed", "silent", "status"])
async def test_so_many_failures_in_a_row_make_it_unhealthy_and_one_success_healthy(
        tmp_path: Path, autojump_clock: Clock, failure: str) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, HTTP)
        world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(1)
        began = len(world.probes.looks)

        def fail(on: bool) -> None:
            if failure == "closed":
                (world.network.heard.clear if on else lambda: world.network.listen(environment.slot, "tcp", 3000))()
            elif failure == "silent":
                world.probes.silent = {3000} if on else set()
            else:
                world.probes.statuses = {"/healthz": 500} if on else {}

        for retry in range(3):
            fail(True)
            while len(world.probes.looks) < began + retry + 1:
                await trio.sleep(0.5)
            await trio.sleep(5.5)
            assert stored(world).health == ("unhealthy" if retry == 2 else "healthy")
        assert stored(world).state == "running", "nothing is done to a server for that"
        fail(False)
        await trio.sleep(16)
        assert stored(world).health == "healthy"
        assert told(world) == ["healthy", "unhealthy", "healthy"]
        [reason] = [details["reason"] for kind, _, details in world.events if kind == "unhealthy"]
        assert reason == {"closed": "port 3000: Connection refused", "silent": "no answer within 5 s",
                          "status": "HTTP status 500"}[failure]


async def test_failures_of_the_start_period_do_not_count(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world, wire.HealthCheck(tcp=3000, start_period_seconds=60, retries=2))
        await trio.sleep(60)
        assert stored(world).health == "starting"
        await trio.sleep(12)
        assert stored(world).health == "unhealthy"


async def test_ready_waits_for_healthy_too(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        world.probes.statuses = {"/healthz": 503}
        environment = await make(world, HTTP, ports=[wire.PortRequest(port=3000)])
        world.network.listen(environment.slot, "tcp", 3000)
        with pytest.raises(WaitTimeout, match="service 'main' is starting"):
            await environments.wait(environment, "ready", 10)
        with pytest.raises(WaitTimeout, match="service 'main' is unhealthy"):
            await environments.wait(environment, "ready", 90)
        world.probes.statuses = {}
        await environments.wait(environment, "ready", 11)
        assert stored(world).health == "healthy"


async def test_a_command_is_run_inside_as_the_user_in_a_group_of_its_own(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, COMMAND, env={"A": "b"}, cwd="/srv")
        await trio.sleep(0.1)
        server, check = world.processes.launches[:2]
        assert check.argv == ("./check",)
        assert (check.uid, check.gid, check.groups, check.cwd, check.netns) == (
            server.uid, server.gid, server.groups, "/srv", server.netns)
        assert check.env == server.env
        slot = environment.slot.cgroup
        assert (server.cgroup, check.cgroup) == (f"{slot}/s-main", f"{slot}/h-main")
        world.processes.end(check.launch_id, 1, leaving=[7001])
        await trio.sleep(0.05)
        assert stored(world).health == "starting"
        assert world.cgroups.pids(check.cgroup) == [], "nothing of a check is left"
        await trio.sleep(0.2)
        world.processes.end(world.processes.launches[-1].launch_id, 0)
        await settled()
        assert stored(world).health == "healthy"
        assert world.cgroups.groups.keys() == {environment.slot.cgroup, f"{environment.slot.cgroup}/s-main"}


@pytest.mark.parametrize("failure", ["exit code 3", "no answer within 5 s", "missing: No such file or directory"])
async def test_a_command_that_fails_says_why(tmp_path: Path, autojump_clock: Clock, failure: str) -> None:
    world = World(tmp_path)
    async with world.running():
        command = ["missing"] if "missing" in failure else ["./check"]
        await make(world, wire.HealthCheck(command=command, start_period_seconds=0, retries=1))
        await settled()
        if failure == "exit code 3":
            world.processes.end(world.processes.launches[-1].launch_id, 3)
        await trio.sleep(5.5)
        assert stored(world).health == "unhealthy"
        [details] = [details for kind, _, details in world.events if kind == "unhealthy"]
        assert details["reason"] == failure
        assert [group for group in world.cgroups.groups if "/h-" in group] == []


@pytest.mark.parametrize("trouble", ["launcher lost", "launcher refuses"])
async def test_what_nobody_can_tell_says_nothing_of_a_server(tmp_path: Path, autojump_clock: Clock,
                                                             trouble: str) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, wire.HealthCheck(command=["./check"], retries=1, start_period_seconds=0))
        await settled()
        world.processes.end(world.processes.launches[-1].launch_id, 0)
        await trio.sleep(10.1)
        if trouble == "launcher lost":
            world.processes.lose_launcher()
        else:
            async def refuse(_launch: object) -> int:
                raise LauncherUnavailable("gone")

            world.processes.launch = refuse  # type: ignore[assignment]
            world.processes.end(world.processes.launches[-1].launch_id, 0)
        await trio.sleep(9 if trouble == "launcher lost" else 30)  # before the next check, which would be too late
        assert environment.services["main"].health == "healthy"


async def test_a_command_for_which_there_is_no_descriptor_says_nothing_of_a_server(
        tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world, COMMAND)
        await trio.sleep(0.05)

        def refuse(path: str, flags: int) -> int:
            raise OSError(errno.EMFILE, f"{path} {flags}")

        with monkeypatch.context() as patch:
            patch.setattr("netnsd.core.errands.os.open", refuse)
            before = len(world.processes.launches)
            await trio.sleep(60)
            assert len(world.processes.launches) == before
        await trio.sleep(11)
        assert len(world.processes.launches) > before
        assert told(world) == []


@pytest.mark.parametrize("check", [TCP, COMMAND])
@pytest.mark.parametrize("how", ["ended", "stopped", "removed"])
async def test_a_check_ends_with_its_server_and_begins_anew_with_it(tmp_path: Path, autojump_clock: Clock, how: str,
                                                                   check: wire.HealthCheck) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, check)
        await trio.sleep(0.05)  # a command runs now
        launch = environment.services["main"].launch_id
        assert launch is not None
        if how == "ended":
            world.processes.end(launch, 1)
        elif how == "stopped":
            await environments.stop(environment, 0)
        else:
            await environments.remove(environment)
        await settled()
        looks = len(world.probes.looks), len(world.processes.launches)
        await trio.sleep(120)
        assert (len(world.probes.looks), len(world.processes.launches)) == looks
        assert {"watched", "errands"}.isdisjoint(world.held())
        assert [group for group in world.cgroups.groups if "/h-" in group] == []
        if how == "removed":
            assert world.held() == {}
            return
        assert stored(world).health is None
        await environments.start(environment)
        await trio.sleep(0.05)
        assert stored(world).health == "starting"
        assert (len(world.probes.looks), len(world.processes.launches)) > looks


@pytest.mark.parametrize("state", ["starting", "healthy", "unhealthy"])
async def test_checks_go_on_in_the_next_run_of_the_daemon(tmp_path: Path, autojump_clock: Clock, state: str) -> None:
    world = World(tmp_path)
    async with world.running():
        environment = await make(world, TCP)
        if state == "healthy":
            world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(90 if state == "unhealthy" else 2)
        assert stored(world).health == state
    looks = len(world.probes.looks)
    events = len(world.events)
    async with world.running():
        assert stored(world).health == state
        if state == "healthy":
            world.network.heard.clear()
        else:
            world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(35)
        assert stored(world).health == ("unhealthy" if state == "healthy" else "healthy")
        assert len(world.probes.looks) > looks
        assert "started" not in [kind for kind, _, _ in world.events[events:]]


async def test_a_daemon_that_starts_does_not_look_at_all_of_them_at_once(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    services = [wire.ServiceRequest(name=f"s{number}", command=["server"], health=TCP) for number in range(32)]
    async with world.running() as environments:
        environment = await environments.create(wire.CreateRequest(name="web", services=services), ALICE)
        world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(2)
        assert {s.health for s in environment.services.values()} == {"healthy"}
    async with world.running():
        began, looks = trio.current_time(), len(world.probes.looks)
        await trio.sleep(9.99)
        new = [time - began for time, *_ in world.probes.looks[looks:]]
        assert len(new) == 32
        assert max(sum(start <= time < start + 1 for time in new) for start in range(10)) < 16


async def test_no_check_begins_in_what_is_being_removed(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment, create = await make(world, COMMAND), world.cgroups.create
        await settled()
        world.processes.end(world.processes.launches[-1].launch_id, 1)
        made: list[str] = []

        async def recording(path: str) -> None:
            made.append(path)
            await create(path)

        remove = world.cgroups.remove

        async def slowly(path: str) -> None:
            await remove(path)
            if path == environment.slot.cgroup:
                await trio.sleep(5)  # in which checks would be due

        world.cgroups.create, world.cgroups.remove = recording, slowly  # type: ignore[method-assign]
        world.cgroups.killed = lambda _pid: None  # the launcher tells the server's end late
        await environments.remove(environment)
        await trio.sleep(30)
        assert made == []
        assert {"cgroups", "watched", "errands"}.isdisjoint(world.held())


async def test_what_is_found_of_an_earlier_start_is_not_said_of_this_one(tmp_path: Path,
                                                                        autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await make(world, TCP)
        before = environment.services["main"]
        await environments.restart(environment, 0)
        world.environments._supervisor._judged(environment, before, "healthy", "")
        assert stored(world).health == "starting"
        await environments.stop(environment, 0)
        world.environments._supervisor._judged(environment, environment.services["main"], "healthy", "")
        assert stored(world).health is None


async def test_a_check_command_that_outlived_its_daemon_is_gone_before_the_next(tmp_path: Path,
                                                                               autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        await make(world, COMMAND)
        await trio.sleep(0.05)
        old = world.processes.launches[-1]
        remove = world.cgroups.remove

        async def killed(_path: str) -> None:
            """The daemon is killed: it tidies nothing."""

        world.cgroups.remove = killed  # type: ignore[assignment]
    world.cgroups.remove = remove  # type: ignore[method-assign]
    assert world.cgroups.pids(old.cgroup)
    async with world.running():
        await trio.sleep(0.2)
        assert old.launch_id not in world.processes.running
        assert old.launch_id in world.processes.acknowledged
        assert len(world.cgroups.pids(old.cgroup)) == 1, "of the next one"


async def test_one_users_checks_that_hang_hold_so_many_descriptors_and_no_other_users_checks(
        tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        world.probes.silent = {4000}
        hanging = [wire.ServiceRequest(name=f"s{number}", command=["server"], health=wire.HealthCheck(
            tcp=4000, timeout_seconds=3600, start_period_seconds=0)) for number in range(20)]
        for name in ("one", "two", "three"):
            await environments.create(wire.CreateRequest(name=name, services=hanging), ALICE)
        theirs = await environments.create(wire.CreateRequest(name="web", command=["server"], health=TCP), BOB)
        world.network.listen(theirs.slot, "tcp", 3000)
        await trio.sleep(100)
        assert theirs.services["main"].health == "healthy"
        assert len([look for look in world.probes.looks if look[2] == 4000]) == AT_ONCE
        await trio.sleep(2 * 3600)
        assert len({(address, port) for _, address, port, _ in world.probes.looks}) == 4
        assert len([look for look in world.probes.looks if look[2] == 4000]) >= 60, "the others have their turn"


async def test_in_stock_there_is_only_what_is_healthy(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    async with world.running():
        wanted = wire.Specification(command=["server"], health=HTTP)
        await world.templates.add(wire.TemplateRequest(name="shop", warm=1, specification=wanted), ALICE)
        await trio.sleep(2)
        [environment] = world.environments.registry.all()
        assert world.templates.pools(ALICE)[0].ready == 0
        world.network.listen(environment.slot, "tcp", 3000)
        await trio.sleep(2)
        assert world.templates.pools(ALICE)[0].ready == 1
        world.probes.statuses = {"/healthz": 500}
        await trio.sleep(40)
        assert world.templates.pools(ALICE)[0].ready == 0
        assert environment not in world.environments.registry


@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 50)), max_size=40), st.integers(1, 4), st.floats(0, 60))
def test_a_judge_never_says_unhealthy_before_so_many_failures_in_a_row(
        looks: list[tuple[bool, float]], retries: int, start_period: float) -> None:
    judge = Judge(wire.HealthCheck(tcp=1, retries=retries, start_period_seconds=start_period), "starting", 0.0)
    now, row, was_healthy = 0.0, 0, False
    for good, after in looks:
        now += after
        before, state = judge.state, judge.heard(good=good, now=now)
        row = 0 if good else row + 1
        was_healthy = was_healthy or good
        if good:
            assert state == "healthy"
        elif state == "unhealthy" and before != "unhealthy":
            assert row >= retries
        else:
            assert state == before
        if not was_healthy and now < start_period:
            assert state == "starting"
        assert 0 < judge.pause(now) <= 10


@pytest.mark.parametrize(("fields", "kind"), [
    ({}, InvalidRequest), ({"tcp": 1, "command": ["x"]}, InvalidRequest), ({"http": "/"}, InvalidRequest),
    ({"tcp": 1, "port": 2}, InvalidRequest), ({"port": 2}, InvalidRequest), ({"http": "x", "port": 1}, InvalidRequest),
    ({"http": "/a b", "port": 1}, InvalidRequest), ({"http": "/\r\nX: y", "port": 1}, InvalidRequest),
    ({"http": "/" + "x" * 1024, "port": 1}, InvalidRequest), ({"http": "/é", "port": 1}, InvalidRequest),
    ({"tcp": 0}, InvalidPort), ({"tcp": 65536}, InvalidPort), ({"http": "/", "port": 0}, InvalidPort),
    ({"command": []}, InvalidRequest), ({"command": [""]}, InvalidRequest), ({"command": ["a\0"]}, InvalidRequest),
    ({"tcp": 1, "interval_seconds": 0.99}, InvalidRequest), ({"tcp": 1, "interval_seconds": 86401}, InvalidRequest),
    ({"tcp": 1, "timeout_seconds": 0.09}, InvalidRequest), ({"tcp": 1, "retries": 0}, InvalidRequest),
    ({"tcp": 1, "retries": 1001}, InvalidRequest), ({"tcp": 1, "start_period_seconds": -1}, InvalidRequest),
    ({"tcp": 1, "interval_seconds": float("nan")}, InvalidRequest)])
def test_checks_that_cannot_be_are_refused(fields: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        specification.check_health(wire.HealthCheck(**fields))


@pytest.mark.parametrize("fields", [
    {"tcp": 1}, {"tcp": 65535}, {"http": "/", "port": 1}, {"http": "/a?b=c&d=%20~" + "x" * 1000, "port": 80},
    {"command": ["sh", "-c", "exit 0"]}, {"tcp": 1, "interval_seconds": 1, "timeout_seconds": 0.1, "retries": 1,
                                          "start_period_seconds": 0}])
def test_checks_that_can_be_are_taken(fields: dict[str, Any]) -> None:
    check = wire.HealthCheck(**fields)
    assert specification.check_health(check) is check
    assert specification.check_health(None) is None


def test_a_check_belongs_to_one_command() -> None:
    services = [wire.ServiceRequest(name="a", command=["x"])]
    for wanted in (wire.CreateRequest(health=TCP), wire.CreateRequest(health=TCP, services=services)):
        with pytest.raises(InvalidRequest):
            specification.check_services(wanted)
    [service] = specification.check_services(wire.CreateRequest(health=TCP, command=["x"]))
    assert service.health == TCP
