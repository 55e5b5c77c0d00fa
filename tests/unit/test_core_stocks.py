"""What is in stock of templates is hidden until it is handed over, is never lost, and is never handed out dead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.interfaces import Listener
from netnsd.errors import (
    KernelError,
    NameTaken,
    NetnsdError,
    NetnsTaken,
    NotFound,
    StoreError,
)
from tests.fakes.faults import cancelling, failing, raising
from tests.fakes.world import ALICE, BOB, CAROL, World, actor
from tests.unit.stocking import Clock, add, asked, at_rest, stock_of, world

# -- stocks -----------------------------------------------------------------------------------------------------


async def test_what_is_in_stock_is_hidden_from_everybody(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 2)
        registry = environments.registry
        for environment in stock_of(made):
            for who in (ALICE, CAROL):
                for ref in (environment.id, environment.name, f"{environment.name}.alice"):
                    with pytest.raises(NotFound):
                        registry.find(ref, who)
                assert registry.own(who, environment.name) is None
        for who in (ALICE, CAROL):
            for everyones in (False, True):
                assert registry.visible(who, everyones=everyones, labels={}) == []
        assert made.templates.show("shop", ALICE).ready == 2
        name = stock_of(made)[0].name
        for create in (environments.create, made.templates.create):
            with pytest.raises(NameTaken):
                await create(wire.CreateRequest(name=name), ALICE)
        assert (await environments.create(wire.CreateRequest(name=name), BOB)).netns == f"{name}.bob"


async def test_who_asks_gets_one_that_runs_and_knows_its_new_name(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        before = {e.id: (e.slot, e.ports, e.services["main"].pid, e.netns, e.created_at) for e in stock_of(made)}
        web = await made.templates.create(asked(), ALICE)
        slot, ports, pid, netns, created_at = before[web.id]
        assert (web.slot, web.ports, web.services["main"].pid) == (slot, ports, pid)
        assert web.netns == "web" != netns
        assert web.created_at > created_at
        assert made.network.slots[slot.index] == "web"
        assert not made.network.is_taken(netns)
        assert made.store.environments()[-1] == web
        await trio.sleep(1)
        assert web.id not in {e.id for e in stock_of(made)}
        assert len(stock_of(made)) == 2, "another was made"
        assert (ALICE.uid, slot.address) in {(uid, address) for address, uid in made.firewall.owners}


async def test_a_namespaces_name_that_is_taken_gets_the_users(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        made.network.foreign = {"web", "x", "x.alice"}
        assert (await made.templates.create(asked(), ALICE)).netns == "web.alice"
        kept = {e.id for e in stock_of(made)}
        with pytest.raises(NetnsTaken):
            await made.templates.create(asked("x"), ALICE)
        assert {e.id for e in stock_of(made)} >= kept
        assert made.network.foreign == {"web", "x", "x.alice"}
        await at_rest(made)


async def test_a_name_that_the_user_has_leaves_the_stock(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        await made.environments.create(wire.CreateRequest(name="web"), ALICE)
        kept = stock_of(made)
        with pytest.raises(NameTaken):
            await made.templates.create(asked(), ALICE)
        assert stock_of(made) == kept
        await at_rest(made)


async def test_of_two_who_want_one_name_at_once_one_gets_it(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 3)
        outcomes: list[str] = []

        async def create(template: str | None) -> None:
            wanted = asked() if template else wire.CreateRequest(name="web")
            try:
                await made.templates.create(wanted, ALICE)
            except (NameTaken, NetnsTaken):
                outcomes.append("taken")
            else:
                outcomes.append("made")

        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for template in ("shop", "shop", None):
                    nursery.start_soon(create, template)
            assert sorted(outcomes) == ["made", "taken", "taken"]
            outcomes.clear()
            await environments.remove(environments.registry.find("web", ALICE))
            await at_rest(made)
            assert len(stock_of(made)) == 3


async def test_replace_removes_the_users_own_and_hands_one_over(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 1)
        old = await environments.create(wire.CreateRequest(name="web"), ALICE)
        [kept] = stock_of(made)
        new = await made.templates.create(asked(replace=True), ALICE)
        assert new is kept
        assert old not in environments.registry
        await at_rest(made)


async def test_one_whose_server_ended_is_not_handed_out_and_another_is_made(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        first = stock_of(made)[0]
        launch = first.services["main"].launch_id
        assert launch is not None
        made.processes.end(launch, 1)
        await trio.testing.wait_all_tasks_blocked()
        web = await made.templates.create(asked(), ALICE)
        assert web is not first
        assert web.services["main"].state == "running"
        await at_rest(made)
        assert first not in made.environments.registry
        assert len(stock_of(made)) == 2


async def test_one_whose_server_ends_while_way_is_made_is_not_handed_out(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 1)
        await environments.create(wire.CreateRequest(name="web"), ALICE)
        [first] = stock_of(made)

        def end(_step: str) -> None:
            assert first.services["main"].launch_id is not None
            made.processes.end(first.services["main"].launch_id, 1)

        with made.faults.fail_at(0, end):
            web = await made.templates.create(asked(replace=True), ALICE)
        assert web is not first
        await at_rest(made)


async def test_one_that_is_spoilt_is_passed_over(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        first, second = stock_of(made)
        made.network.unlinked.add(first.slot.index)
        assert await made.templates.create(asked(), ALICE) is second
        await at_rest(made)
        assert first not in made.environments.registry


async def test_without_any_ready_it_is_made_as_ever(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    made.network.everywhere = set()  # nothing becomes ready
    async with made.running():
        await add(made, 1)
        web = await made.templates.create(asked(), ALICE)
        assert web.stock == ""
        assert made.templates.show("shop", ALICE).ready == 0
        assert made.templates.pools(ALICE)[0].missed == 1


async def test_servers_that_do_not_get_ready_are_removed_and_the_reason_is_told_once(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    made = world(tmp_path)
    made.network.everywhere = set()
    async with made.running() as environments:
        await add(made, 2)
        await trio.sleep(3000)
        assert len(environments.registry) <= 1
        [(_, name, details)] = [event for event in made.events if event[0] == "template_stuck"]
        assert (name, details["uid"]) == ("shop", ALICE.uid)
        assert "3000/tcp" in details["reason"]
        assert made.templates.show("shop", ALICE).reason == details["reason"]
        assert made.kinds().count("created") < 40, "it waits longer each time"
        made.network.everywhere = {Listener("tcp", "0.0.0.0", 3000)}
        await trio.sleep(200)
        assert made.templates.show("shop", ALICE).ready == 2
        assert made.templates.show("shop", ALICE).reason == ""


@pytest.mark.parametrize("command", ["missing", "brief"])
async def test_commands_that_cannot_start_are_told_and_tried_ever_more_rarely(
    tmp_path: Path, command: str, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 1, specification=wire.Specification(command=[command]))
        await trio.sleep(3000)
        assert made.kinds().count("template_stuck") == 1
        assert 10 < made.kinds().count("removed") < 80
        await made.templates.remove("shop", ALICE)
        await at_rest(made)
        assert made.held() == {}


async def test_servers_that_end_soon_after_they_were_ready_are_not_started_all_the_time(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 1)

        async def crash() -> None:
            while True:
                await trio.sleep(0.2)
                for launch in list(made.processes.running):
                    made.processes.end(launch, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)
            await trio.sleep(600)
            nursery.cancel_scope.cancel()
        assert made.kinds().count("started") < 60


async def test_a_users_account_that_is_gone_is_told_and_used_again_when_it_is_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    made = world(tmp_path)
    account = made.accounts.pop(ALICE.uid)
    async with made.running():
        await add(made, 1)
        await trio.sleep(100)
        [details] = [details for kind, _, details in made.events if kind == "template_stuck"]
        assert "alice" in details["reason"]
        assert made.templates.pools(ALICE)[0].reason == details["reason"]
        assert made.held() == {}
        made.accounts[ALICE.uid] = account
        await trio.sleep(100)
        assert len(stock_of(made)) == 1


async def test_stock_runs_with_the_groups_that_the_account_has_now(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    made.accounts[ALICE.uid] = actor(ALICE.uid, "alice", is_admin=True)
    async with made.running():
        await add(made, 1)
        assert stock_of(made)[0].services["main"].command.groups == (ALICE.uid, 100)


# -- restarts -----------------------------------------------------------------------------------------------------


async def test_another_run_of_the_daemon_keeps_templates_and_stocks(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        added = await add(made, 2)
        kept = {e.id: e.services["main"].pid for e in stock_of(made)}
    async with made.running() as environments:
        await trio.sleep(1)
        assert made.templates.show("shop", ALICE) == wire.Template(
            **{name: getattr(made.templates.show("shop", ALICE) if name == "ready" else added, name)
               for name in wire.Template.__struct_fields__})
        assert {e.id: e.services["main"].pid for e in stock_of(made)} == kept
        assert environments.registry.visible(CAROL, everyones=True, labels={}) == []
        web = await made.templates.create(asked(), ALICE)
        assert web.id in kept
        assert web.services["main"].pid == kept[web.id]
        assert web.services["main"].command.env["SECRET"] == "hush"
        await at_rest(made)
    async with made.running() as environments:
        assert environments.registry.find("web", ALICE).services["main"].pid == kept[web.id]


async def test_what_died_while_the_daemon_was_down_is_not_handed_out(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        await add(made, 2)
        dead, alive = stock_of(made)
    assert dead.services["main"].launch_id is not None
    made.processes.end(dead.services["main"].launch_id, 1)
    async with made.running():
        assert (await made.templates.create(asked(), ALICE)).id == alive.id
        await at_rest(made)
        assert dead.id not in {e.id for e in made.environments.registry.all()}
        assert len(stock_of(made)) == 2


async def test_stock_whose_template_is_gone_goes_at_the_start(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        added = await add(made, 2)
        with made.store.transaction():  # killed before the stock was removed
            made.store.delete_template(added.id)
    async with made.running():
        await at_rest(made)
        assert made.held() == {}


BROKEN = {f"network.{verb}" for verb in ("claim", "unname", "unwire", "wire", "tidy")} | {
    "store.begin", "cgroups.remove", "firewall.close", "files.furnish", "files.remove", "processes.launch"}


# -- handing over, whatever happens -------------------------------------------------------------------------------


async def steps_of_handing_over(directory: Path) -> list[str]:
    async with (made := world(directory)).running():
        await add(made, 2)
        with made.faults.recording() as steps:
            await made.templates.create(asked(), ALICE)
        return list(steps)


async def test_steps_of_handing_over_are_few(tmp_path: Path, autojump_clock: Clock) -> None:
    steps = await steps_of_handing_over(tmp_path)
    for step in ("network.claim", "store.rename", "network.unname", "files.furnish"):
        assert step in steps


async def whole_or_refused(made: World, attempt: Callable[[], Any], what: Any) -> None:
    """After an attempt that may have failed: alice has the environment whole or not at all, and the stock is full."""
    await attempt()
    await at_rest(made)
    assert len(stock_of(made)) == 2, what
    found = [e for e in made.environments.registry.all() if not e.stock]
    for environment in found:
        assert environment.name == "web", what
        assert environment.state == "ready", what
        assert environment.services["main"].state == "running", what
        await made.environments.remove(environment)
    await at_rest(made)


@pytest.mark.parametrize("again", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("kind", [None, NetnsTaken, StoreError, KernelError])
async def test_handing_over_that_fails_at_any_step_loses_nothing(
    tmp_path: Path, kind: type[Exception] | None, again: bool, autojump_clock: Clock
) -> None:
    count = len(await steps_of_handing_over(tmp_path / "good"))
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        for number in range(count):
            async def attempt(number: int = number) -> None:
                action = failing if kind is None else raising(kind)
                with made.faults.fail_at(number, action, again=again and kind is None):
                    try:
                        await made.templates.create(asked(), ALICE)
                    except NetnsdError as error:
                        assert "planted" in str(error)  # noqa: PT017

            await whole_or_refused(made, attempt, number)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_handing_over_that_is_cancelled_at_any_step_loses_nothing(
    tmp_path: Path, after: bool, autojump_clock: Clock
) -> None:
    count = len(await steps_of_handing_over(tmp_path / "good"))
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        for number in range(count + 1):
            async def attempt(number: int = number) -> None:
                with trio.CancelScope() as scope, made.faults.fail_at(number, cancelling(scope), after=after):
                    await made.templates.create(asked(), ALICE)

            await whole_or_refused(made, attempt, number)


async def test_a_daemon_killed_at_any_step_of_handing_over_loses_nothing(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """After each step the world stops: what comes then is another run of the daemon on what there is."""
    count = len(await steps_of_handing_over(tmp_path / "good"))
    for number in range(count):
        made = world(tmp_path / str(number))

        def kill(step: str, made: World = made) -> None:
            # A killed daemon undoes nothing: whatever it would do is not done.
            made.faults.broken = BROKEN
            raise SystemExit(step)

        try:
            async with made.running():
                await add(made, 2)
                before = {e.id: e.services["main"].pid for e in stock_of(made)}
                with made.faults.fail_at(number, kill, after=True) as steps:
                    await made.templates.create(asked(), ALICE)
        except* (SystemExit, NetnsdError):
            pass
        made.faults.broken = set()
        async with made.running() as environments:
            await at_rest(made)
            found = {e.id: e.services["main"].pid for e in environments.registry.all()}
            assert before.items() <= found.items(), steps[number]
            assert {e.name for e in environments.registry.all() if not e.stock} <= {"web"}
            assert len(stock_of(made)) == 2, steps[number]


async def test_removing_the_template_while_one_is_handed_over_is_no_fault(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    count = len(await steps_of_handing_over(tmp_path / "good"))
    async with (made := world(tmp_path)).running() as environments:
        for number in range(count):
            for replace in (False, True):
                await add(made, 2)
                if replace:
                    await environments.create(wire.CreateRequest(name="web"), ALICE)
                reached = trio.Event()

                async def remove(reached: trio.Event = reached) -> None:
                    with trio.move_on_after(5):
                        await reached.wait()
                    await made.templates.remove("shop", ALICE)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(remove)
                    with made.faults.fail_at(number, lambda _, reached=reached: reached.set()):  # type: ignore[misc]
                        web = await made.templates.create(asked(replace=replace), ALICE)
                await at_rest(made)
                assert list(environments.registry.all()) == [web], (number, replace)
                assert web.state == "ready"
                await environments.remove(web)
                await at_rest(made)
                assert made.held() == {}


async def test_a_name_that_could_not_be_taken_back_goes_with_the_environment(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 1)
        made.faults.broken = {"network.unname"}
        for checked in (True, False):
            web = await made.templates.create(asked(), ALICE)
            await trio.sleep(1)
            assert "furnish_failed" in made.kinds()
            assert len(made.network.second_names) == 1
            made.faults.broken = set()
            if checked:
                await environments.check()
                assert made.network.second_names == set()
                assert made.network.slots[web.slot.index] == "web"
            await environments.remove(web)
            await at_rest(made)
            made.faults.broken = {"network.unname"}
