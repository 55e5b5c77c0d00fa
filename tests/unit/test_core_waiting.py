"""Waiting ends when what is waited for is there, cannot come any more, or does not come in time; batches; views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core import views
from netnsd.core.batch import Batcher
from netnsd.errors import KernelError, NotFound, ShuttingDown, WaitTimeout, WrongState
from tests.fakes.world import ALICE, World, request

settled = trio.testing.wait_all_tasks_blocked


async def test_ready_is_when_every_declared_port_has_a_listener(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", ports=2), ALICE)
        with pytest.raises(WaitTimeout, match="nothing listens on 3000/tcp, 3001/tcp"):
            await environments.wait(environment, "ready", 1)
        world.network.listen(environment.slot, "tcp", 3000)
        world.network.listen(environment.slot, "udp", 3001)
        with pytest.raises(WaitTimeout, match="nothing listens on 3001/tcp"):
            await environments.wait(environment, "ready", 1)
        world.network.listen(environment.slot, "tcp", 3001)
        await environments.wait(environment, "ready", 1)


async def test_ready_without_ports_is_at_once_and_fails_when_a_server_ends_first(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.wait(await environments.create(request("a", "server"), ALICE), "ready", 1)
        environment = await environments.create(request("b", "brief", ports=1), ALICE)
        with pytest.raises(WrongState, match="exit code 7") as caught:
            await environments.wait(environment, "ready", 1)
        assert caught.value.details == {"service": "s0", "exit_code": 7}


async def test_a_listener_of_before_the_last_start_makes_nothing_ready(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", ports=1), ALICE)
        world.network.listen(environment.slot, "tcp", 3000)
        await environments.wait(environment, "ready", 5)
        world.network.heard.clear()
        await environments.restart(environment, 0)
        with pytest.raises(WaitTimeout, match="nothing listens on 3000/tcp"):
            await environments.wait(environment, "ready", 1)


async def test_exit_is_when_no_service_runs(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "one", "two"), ALICE)
        with pytest.raises(WaitTimeout):
            await environments.wait(environment, "exit", 1)
        for launch in list(world.processes.running):
            world.processes.end(launch, 0)
        await environments.wait(environment, "exit", 1)


@pytest.mark.parametrize(("aim", "expected"), [("ready", (NotFound, WrongState)), ("exit", (NotFound, WrongState)),
                                               ("gone", ())])
async def test_removal_ends_every_wait(tmp_path: Path, aim: str, expected: tuple[type[Exception], ...]) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server", ports=1), ALICE)
        seen: list[Exception] = []

        async def wait() -> None:
            try:
                await environments.wait(environment, aim, 60)  # type: ignore[arg-type]
            except (NotFound, WrongState) as error:
                seen.append(error)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.sleep(0.05)
                await environments.remove(environment)
        assert [isinstance(error, expected) for error in seen] == [True] * len(seen)
        assert bool(seen) == bool(expected)


# -- batches ----------------------------------------------------------------------------------------------------


class Work:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = trio.Semaphore(0)

    async def __call__(self, items: list[int]) -> None:
        self.batches.append(items)
        await self.go.acquire()
        if 13 in items:
            raise KernelError("thirteen")


async def ask(batcher: Batcher[int], item: int, outcomes: dict[int, str]) -> None:
    try:
        await batcher.do(item)
        outcomes[item] = "done"
    except (KernelError, ShuttingDown) as error:
        outcomes[item] = error.code


async def test_what_comes_during_work_is_the_next_batch_and_errors_reach_that_batch_only() -> None:
    work = Work()
    outcomes: dict[int, str] = {}
    batcher = Batcher(work, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        for item in (1, 12, 13, 14, 15):
            nursery.start_soon(ask, batcher, item, outcomes)
            await settled()
        for _ in range(3):
            work.go.release()
            await settled()
        assert work.batches == [[1], [12, 13, 14], [15]]
        assert outcomes == {1: "done", 12: "kernel_error", 13: "kernel_error", 14: "kernel_error", 15: "done"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("items", [1, 3, 60])
async def test_the_end_of_a_batcher_releases_all_who_wait(items: int) -> None:
    outcomes: dict[int, str] = {}
    batcher = Batcher(Work(), 3)
    with trio.fail_after(5):
        async with trio.open_nursery() as outside:
            async with trio.open_nursery() as inside:
                inside.start_soon(batcher.run)
                for item in range(items):
                    outside.start_soon(ask, batcher, item, outcomes)
                await settled()
                inside.cancel_scope.cancel()
        await ask(batcher, 99, outcomes)
    assert set(outcomes.values()) == {"shutting_down"}
    assert len(outcomes) == items + 1


async def test_a_caller_that_is_cancelled_stops_waiting_only() -> None:
    work = Work()
    batcher = Batcher(work, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        with trio.move_on_after(0.01) as scope:
            await batcher.do(1)
        assert scope.cancelled_caught
        assert work.batches == [[1]]
        nursery.cancel_scope.cancel()


# -- views ------------------------------------------------------------------------------------------------------


async def test_no_variable_of_a_command_is_shown_or_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    secret = "correct horse battery staple"
    async with world.running() as environments:
        environment = await environments.create(
            request("web", "server", ports=1, env={"TOKEN": secret}, labels={"a": "b"}), ALICE)
        await environments.stop(environment, 0)
        await environments.remove(environment)
        shown = msgspec.json.encode(views.environment(environment)).decode()
    assert secret not in shown
    assert "TOKEN" not in shown
    assert secret not in repr(world.events)
    assert world.processes.launches[0].env["TOKEN"] == secret


@pytest.mark.parametrize(("change", "state"), [
    (lambda e: None, "running"), (lambda e: setattr(e, "state", "creating"), "creating"),
    (lambda e: setattr(e, "state", "removing"), "removing"), (lambda e: e.services.clear(), "running"),
    (lambda e: e.services.update(s0=e.services["s0"].changed(state="exited")), "stopped"),
    (lambda e: e.services.update(s0=e.services["s0"].changed(state="starting")), "running"),
])
async def test_shown_states(tmp_path: Path, change: Callable[[object], None], state: str) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(request("web", "server"), ALICE)
        change(environment)
        assert views.environment(environment).state == state
        assert isinstance(views.environment(environment), wire.Environment)
