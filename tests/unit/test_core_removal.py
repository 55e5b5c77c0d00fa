"""Removal goes on after a failure, says so, keeps the row, and is finished later."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd.core.environment import Environment
from netnsd.core.environments import Environments
from netnsd.errors import KernelError, NetnsdError, NotFound, WrongState
from tests.fakes.faults import cancelling, failing
from tests.fakes.world import ALICE, World, request

REQUEST = request("web", "server", "database", ports=3)


async def removal_steps(directory: Path) -> list[str]:
    world = World(directory)
    async with world.running() as environments:
        environment = await environments.create(REQUEST, ALICE)
        with world.faults.recording() as steps:
            await environments.remove(environment)
        await trio.testing.wait_all_tasks_blocked()
        assert world.held() == {}
        return list(steps)


async def test_removal_takes_all_adapters_steps(tmp_path: Path) -> None:
    steps = await removal_steps(tmp_path)
    for step in ("cgroups.remove", "firewall.close", "network.unwire", "files.remove", "store.delete"):
        assert step in steps


async def test_removal_that_fails_at_any_step_goes_on_and_is_finished_by_a_later_check(tmp_path: Path) -> None:
    plan = await removal_steps(tmp_path / "good")
    world = World(tmp_path)
    async with world.running() as environments:
        for number in range(len(plan)):
            environment = await environments.create(REQUEST, ALICE)
            failed = False
            with world.faults.fail_at(number, failing, again=True) as steps:
                try:
                    await environments.remove(environment)
                except NetnsdError as error:
                    failed = True
                    assert "planted" in error.message, number  # noqa: PT017
            await trio.testing.wait_all_tasks_blocked()
            step = steps[number]  # ends are told when they are: not always in the order of the plan
            held = world.held()
            if failed:
                assert environment.state == "removing", step
                assert held["rows"] == [environment.id], step
                assert environments.registry.find("web", ALICE) is environment
                # One thing is left at most, beside what says that it is to go.
                kept = set(held) - {"rows", "registry", "slots", "ports", "furnished ids", "locks", "launches",
                                    "quotas"}
                expected = {"cgroups.remove": {"cgroups", "processes"}, "firewall.close": {"owners", "published"},
                            "network.unwire": {"namespaces", "furnished"}, "files.remove": {"files"}}
                assert kept <= expected.get(step, set()), (number, step)
                await environments.check()
                await trio.testing.wait_all_tasks_blocked()
                held = world.held()
            assert held == {}, (number, step)


async def test_removal_that_fails_is_finished_by_the_next_run(tmp_path: Path) -> None:
    plan = await removal_steps(tmp_path / "good")
    for number, step in enumerate(plan):
        world = World(tmp_path / str(number))
        async with world.running() as environments:
            environment = await environments.create(REQUEST, ALICE)
            with world.faults.fail_at(number, failing, again=True):
                with contextlib.suppress(NetnsdError):
                    await environments.remove(environment)
        async with world.running() as environments:
            await trio.testing.wait_all_tasks_blocked()
            if environments.registry.all():  # the intent could not be written, and nothing was done
                assert step.startswith("store."), step
                await environments.remove(environments.registry.find("web", ALICE))
                await trio.testing.wait_all_tasks_blocked()
            assert world.held() == {}, (number, step)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_removal_that_is_cancelled_at_any_step_is_done_all_the_same(tmp_path: Path, after: bool) -> None:
    world = World(tmp_path)
    count = len(await removal_steps(tmp_path / "good"))
    async with world.running() as environments:
        for number in range(count):
            environment = await environments.create(REQUEST, ALICE)
            with trio.CancelScope() as scope:
                with world.faults.fail_at(number, cancelling(scope), after=after) as steps:
                    await environments.remove(environment)
            await trio.testing.wait_all_tasks_blocked()
            assert world.held() == {}, steps[number]


async def test_removal_by_many_at_once_is_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(REQUEST, ALICE)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(environments.remove, environment)
        await trio.testing.wait_all_tasks_blocked()
        assert world.kinds().count("removed") == 1
        assert world.held() == {}


async def test_removal_of_many_at_once_is_done_in_few_batches(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        made = [await environments.create(request(f"e{n}"), ALICE) for n in range(20)]
        await trio.testing.wait_all_tasks_blocked()
        with world.faults.recording() as steps:
            async with trio.open_nursery() as nursery:
                for environment in made:
                    nursery.start_soon(environments.remove, environment)
        assert steps.count("network.unwire") <= 3
        await trio.testing.wait_all_tasks_blocked()
        assert world.held() == {}


async def test_verbs_on_what_is_being_removed_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(REQUEST, ALICE)
        environment.state = "removing"
        for verb in (environments.start(environment), environments.stop(environment, 0),
                     environments.restart(environment, 0)):
            with pytest.raises(WrongState):
                await verb


async def test_verbs_that_wait_for_their_turn_learn_that_it_was_removed(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(REQUEST, ALICE)
        refused: list[NetnsdError] = []

        async def start() -> None:
            try:
                await environments.start(environment)
            except (NotFound, WrongState) as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(environments.remove, environment)
            nursery.start_soon(start)
        await trio.testing.wait_all_tasks_blocked()
        assert len(refused) == 1
        assert world.held() == {}


async def test_removal_ends_a_stop_that_waits_for_a_server(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environment = await environments.create(REQUEST, ALICE)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(environments.stop, environment, 3600)
                await trio.testing.wait_all_tasks_blocked()
                await environments.remove(environment)
        await trio.testing.wait_all_tasks_blocked()
        assert world.held() == {}


async def test_one_that_cannot_be_removed_does_not_hold_back_others_of_its_batch(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        made = [await environments.create(request(f"e{n}"), ALICE) for n in range(6)]
        await trio.testing.wait_all_tasks_blocked()
        unwire = world.network.unwire

        async def stubborn(slots: list[tuple[object, str]]) -> None:
            await unwire([pair for pair in slots if pair[1] != "e3"])  # type: ignore[misc]
            if any(netns == "e3" for _, netns in slots):
                raise ExceptionGroup("unwire", [KernelError("busy")])

        world.network.unwire = stubborn  # type: ignore[method-assign, assignment]
        outcomes: dict[str, bool] = {}
        await _remove_all(environments, made, outcomes)
        assert outcomes == {f"e{n}": n != 3 for n in range(6)}


async def _remove_all(environments: Environments, made: list[Environment], outcomes: dict[str, bool]) -> None:
    async def remove(environment: Environment) -> None:
        try:
            await environments.remove(environment)
            outcomes[environment.name] = True
        except KernelError:
            outcomes[environment.name] = False

    async with trio.open_nursery() as nursery:
        for environment in made:
            nursery.start_soon(remove, environment)


async def test_check_restores_rules_that_another_tool_took_away(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await environments.create(REQUEST, ALICE)
        before = world.held()
        assert not await environments.check()
        world.firewall.flush()
        assert await environments.check()
        assert world.held() == before
