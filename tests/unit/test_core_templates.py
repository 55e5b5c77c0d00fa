"""Templates and what is in stock of them: one user's, hidden until handed over, never lost and never handed out dead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Listener
from netnsd.core.specification import MAX_LABELS
from netnsd.core.templates import MOST_TEMPLATES, MOST_WARM
from netnsd.errors import (
    InvalidCommand,
    InvalidLabel,
    InvalidName,
    InvalidPort,
    InvalidRequest,
    InvalidVariable,
    KernelError,
    LaunchFailed,
    NameTaken,
    NetnsdError,
    NetnsTaken,
    NotFound,
    StoreError,
)
from tests.fakes.faults import cancelling, failing, raising
from tests.fakes.world import ALICE, BOB, CAROL, World, actor

Clock = trio.testing.MockClock
SPECIFICATION = wire.Specification(command=["server"], ports=[wire.PortRequest(port=3000)], env={"SECRET": "hush"},
                                   labels={"app": "shop", "tier": "web"}, cwd="/srv")


def world(directory: Path, **options: Any) -> World:
    """One in which every namespace's server listens at once."""
    made = World(directory, **options)
    made.network.everywhere = {Listener("tcp", "0.0.0.0", 3000)}
    return made


async def add(made: World, warm: int = 2, *, who: Any = ALICE, name: str = "shop", replace: bool = False,
              specification: wire.Specification = SPECIFICATION) -> wire.Template:
    answer = await made.templates.add(
        wire.TemplateRequest(name=name, warm=warm, replace=replace, specification=specification), who)
    await trio.sleep(1)
    return answer


def asked(name: str | None = "web", template: str = "shop", **fields: Any) -> wire.CreateRequest:
    return wire.CreateRequest(name=name, template=template, **fields)


def stock_of(made: World, name: str = "shop", who: Any = ALICE) -> list[Environment]:
    return list(made.templates._stocks[made.templates.find(name, who).id].ready)


async def at_rest(made: World) -> None:
    """Let everything end that was begun, and see that each environment has one name and nothing else has one."""
    await made.environments.check()
    await trio.sleep(300)
    found = list(made.environments.registry.all())
    assert sorted(n for n in made.network.slots.values() if n) == sorted(e.netns for e in found)
    assert made.network.second_names == set()
    assert made.network.left == set()
    assert made.environments.registry._netns == {e.netns for e in found}
    assert sorted(e.netns for e in made.store.environments()) == sorted(e.netns for e in found)


# -- the templates themselves -------------------------------------------------------------------------------------


async def test_a_template_is_shown_without_its_variables(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        added = await add(made, 0)
        assert (added.name, added.owner.user, added.warm, added.ready, added.reason) == ("shop", "alice", 0, 0, "")
        assert [(s.name, s.command, s.cwd) for s in added.services] == [("main", ["server"], "/srv")]
        assert added.labels == SPECIFICATION.labels
        assert made.templates.shown(ALICE) == [made.templates.show("shop", ALICE)] == [
            made.templates.show(added.id, ALICE)] == [added]
        assert "hush" not in repr(added)
        assert "SECRET" not in repr(added)


async def test_a_template_is_its_users_alone(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        own = await add(made, 0)
        assert made.templates.shown(BOB) == []
        for ref in ("shop", own.id):
            for verb in (made.templates.show, made.templates.find):
                with pytest.raises(NotFound):
                    verb(ref, BOB)
            with pytest.raises(NotFound):
                await made.templates.remove(ref, BOB)
            with pytest.raises(NotFound):
                await made.templates.create(asked(template=ref), BOB)
        theirs = await add(made, 0, who=BOB, specification=wire.Specification())
        assert made.templates.find("shop", BOB).id == theirs.id
        assert made.templates.find("shop", ALICE).id == own.id
        # An admin sees it by its id, and removes it; what runs as somebody is made by that user alone.
        assert made.templates.show(own.id, CAROL) == own
        assert made.templates.shown(CAROL) == []
        with pytest.raises(NotFound):
            await made.templates.create(asked(template=own.id), CAROL)
        await made.templates.remove(own.id, CAROL)
        assert made.templates.shown(ALICE) == []


@pytest.mark.parametrize(("fields", "error"), [
    ({"command": []}, InvalidCommand), ({"command": ["x"], "services": []}, InvalidCommand),
    ({"labels": {"": "x"}}, InvalidLabel), ({"env": {"a=b": "c"}}, InvalidVariable),
    ({"ports": [wire.PortRequest(port=0)]}, InvalidPort), ({"limits": {"x": 1}, "command": ["x"]}, InvalidCommand),
    ({"cwd": "srv", "command": ["x"]}, InvalidCommand)])
async def test_what_could_not_be_created_is_not_kept(
    tmp_path: Path, fields: dict[str, Any], error: type[NetnsdError]
) -> None:
    made = world(tmp_path)
    async with made.running():
        with pytest.raises(error):
            await add(made, 1, specification=wire.Specification(**fields))
        assert made.templates.shown(ALICE) == []
        assert made.store.templates() == []
        assert made.held() == {}


@pytest.mark.parametrize("name", ["", "-", "A", "x" * 64])
async def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    async with (made := world(tmp_path)).running():
        with pytest.raises(InvalidName):
            await add(made, 0, name=name)


@pytest.mark.parametrize(("warm", "fine"), [(-1, False), (0, True), (MOST_WARM, True), (MOST_WARM + 1, False)])
async def test_warm_is_bounded(tmp_path: Path, warm: int, fine: bool, autojump_clock: Clock) -> None:
    made = world(tmp_path, published_range=(20000, 20999))
    async with made.running():
        if fine:
            await add(made, warm)
            assert len(stock_of(made)) == warm
        else:
            with pytest.raises(InvalidRequest):
                await add(made, warm)
            assert made.templates.shown(ALICE) == []


async def test_templates_of_a_user_are_bounded(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        for number in range(MOST_TEMPLATES):
            await add(made, 0, name=f"t{number}")
        with pytest.raises(InvalidRequest):
            await add(made, 0, name="more")
        await add(made, 0, name="t1", replace=True)
        await add(made, 0, name="more", who=BOB)


async def test_an_existing_one_is_replaced_only_where_that_is_asked(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        old = await add(made)
        kept = {e.id for e in stock_of(made)}
        with pytest.raises(NameTaken):
            await add(made)
        assert {e.id for e in stock_of(made)} == kept
        new = await add(made, 1, replace=True, specification=wire.Specification(command=["other"]))
        assert new.id != old.id
        [environment] = stock_of(made)
        assert environment.id not in kept
        assert environment.services["main"].command.argv == ("other",)
        assert {e.id for e in made.environments.registry.all()} == {environment.id}
        assert [t.id for t in made.store.templates()] == [new.id]
        await at_rest(made)


@pytest.mark.parametrize("step", ["store.begin", "store.delete_template", "store.add_template", "store.commit"])
async def test_a_replacement_that_cannot_be_written_changes_nothing(
    tmp_path: Path, step: str, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made)
        before, kept = made.templates.shown(ALICE), stock_of(made)
        before = made.templates.shown(ALICE)
        made.faults.broken = {step}
        with pytest.raises(StoreError):
            await add(made, 1, replace=True)
        if step != "store.add_template":
            with pytest.raises(StoreError):
                await made.templates.remove("shop", ALICE)
        made.faults.broken = set()
        if step != "store.add_template":
            assert made.templates.shown(ALICE) == before
            assert stock_of(made) == kept


async def test_removing_a_template_takes_its_stock_along_and_leaves_what_was_handed_over(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made)
        web = await made.templates.create(asked(), ALICE)
        cold = await add(made, 0, name="cold")
        other = await made.templates.create(asked("other", "cold"), ALICE)
        await trio.sleep(1)
        await made.templates.remove("shop", ALICE)
        await at_rest(made)
        assert {e.id for e in made.environments.registry.all()} == {web.id, other.id}
        await made.templates.remove(cold.id, ALICE)
        for environment in (web, other):
            await made.environments.remove(environment)
        await at_rest(made)
        assert made.held() == {}


async def test_removing_a_template_while_its_stock_is_made_leaves_nothing(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """At every step of the making."""
    made, number = world(tmp_path), 0
    async with made.running():
        while True:
            reached = trio.Event()
            with made.faults.fail_at(number, lambda _step, reached=reached: reached.set()):  # type: ignore[misc]
                await made.templates.add(wire.TemplateRequest(name="shop", warm=2, specification=SPECIFICATION), ALICE)
                with trio.move_on_after(2):
                    await reached.wait()
            await made.templates.remove("shop", ALICE)
            await at_rest(made)
            assert made.held() == {}, number
            if not reached.is_set():
                break
            number += 1
        assert number > 30


# -- creating from one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 2], ids=["cold", "warm"])
async def test_what_is_created_is_what_the_template_says(tmp_path: Path, warm: int, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, warm)
        web = await made.templates.create(asked(labels={"tier": "mine", "x": "y"}), ALICE)
        assert (web.name, web.netns, web.uid, web.state, web.stock) == ("web", "web", ALICE.uid, "ready", "")
        assert web.labels == {"app": "shop", "tier": "mine", "x": "y"}
        command = web.services["main"].command
        assert (command.argv, command.cwd, command.uid, command.env["SECRET"]) == (("server",), "/srv", ALICE.uid,
                                                                                   "hush")
        assert [p.port for p in web.ports] == [3000]
        assert environments.registry.find("web", ALICE) is web
        assert environments.registry.find(web.id, ALICE) is web
        stock = made.templates._stocks[made.templates.find("shop", ALICE).id]
        assert (stock.claimed, stock.missed) == ((1, 0) if warm else (0, 0))
        assert [name for kind, name, _ in made.events if kind == "created"][-1] == "web"
        await at_rest(made)
        await environments.remove(web)
        await made.templates.remove("shop", ALICE)
        await at_rest(made)
        assert made.held() == {}


@pytest.mark.parametrize("warm", [0, 1], ids=["cold", "warm"])
async def test_without_a_name_one_is_made_up(tmp_path: Path, warm: int, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, warm)
        environment = await made.templates.create(asked(None), ALICE)
        assert environments.registry.find(environment.name, ALICE) is environment


@pytest.mark.parametrize("warm", [0, 1], ids=["cold", "warm"])
@pytest.mark.parametrize("fields", [
    {"command": ["x"]}, {"services": []}, {"ports": [wire.PortRequest(port=1)]}, {"env": {"A": "b"}}, {"cwd": "/"},
    {"setuid": True}, {"umask": 0}, {"limits": {"nofile": 3}}], ids=lambda fields: next(iter(fields)))
async def test_of_the_specification_nothing_but_labels_may_be_given_beside_it(
    tmp_path: Path, fields: dict[str, Any], warm: int, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, warm)
        with pytest.raises(InvalidRequest, match=next(iter(fields))):
            await made.templates.create(asked(**fields), ALICE)
        assert len(stock_of(made)) == warm


@pytest.mark.parametrize("warm", [0, 1], ids=["cold", "warm"])
@pytest.mark.parametrize(("fields", "error"), [
    ({"name": "Web"}, InvalidName), ({"labels": {"": "x"}}, InvalidLabel), ({"labels": {"x": "\n"}}, InvalidLabel),
    ({"labels": {f"l{n}": "" for n in range(MAX_LABELS - 1)}}, InvalidLabel)], ids=["name", "key", "value", "many"])
async def test_bad_names_and_labels_are_refused_and_the_stock_stays(
    tmp_path: Path, fields: dict[str, Any], error: type[NetnsdError], warm: int, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, warm)
        kept = stock_of(made)
        with pytest.raises(error):
            await made.templates.create(asked(**fields), ALICE)
        assert stock_of(made) == kept
        await at_rest(made)


async def test_many_can_be_made_from_a_template(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 3)
        kept = {e.id for e in stock_of(made)}
        found = await environments.create_many(asked(count=5), ALICE, made.templates.create)
        assert [e.name for e in found] == [f"web-{n}" for n in range(1, 6)]
        assert kept <= {e.id for e in found}
        await at_rest(made)
        assert len(stock_of(made)) == 3


async def test_many_from_a_template_that_cannot_all_be_made_leave_the_stock_whole(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running() as environments:
        await add(made, 2)
        await made.templates.create(asked("web-4"), ALICE)
        await trio.sleep(1)
        with pytest.raises(NameTaken):
            await environments.create_many(asked(count=5), ALICE, made.templates.create)
        await at_rest(made)
        assert len(stock_of(made)) == 2
        assert [e.name for e in environments.registry.all() if not e.stock] == ["web-4"]


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
        # Nobody is kept from the name that one in stock happens to have.
        name = stock_of(made)[0].name
        assert (await environments.create(wire.CreateRequest(name=name), ALICE)).netns == f"{name}.alice"


async def test_who_asks_gets_one_that_runs_and_knows_its_new_name(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        before = {e.id: (e.slot, e.ports, e.services["main"].pid, e.netns, e.created_at) for e in stock_of(made)}
        with made.faults.recording() as steps:
            web = await made.templates.create(asked(), ALICE)
            assert not {"network.wire", "processes.launch", "network.unwire"} & set(steps)
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
        del made.network.slots[first.slot.index]
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


async def test_of_more_in_stock_than_the_template_says_none_is_lost(tmp_path: Path, autojump_clock: Clock) -> None:
    made = world(tmp_path)
    async with made.running():
        await add(made, 3)
    async with made.running():
        await trio.sleep(100)
        assert len(stock_of(made)) == 3
        assert len(made.environments.registry) == 3


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
@pytest.mark.parametrize("kind", [None, NetnsTaken, OSError, RuntimeError])
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
                    except (NetnsdError, OSError, RuntimeError) as error:
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
        made, seen = world(tmp_path / str(number)), ""
        async with made.running():
            await add(made, 2)
            before = {e.id: e.services["main"].pid for e in stock_of(made)}

            def stop(step: str, made: World = made) -> None:
                # Of a killed daemon nothing is undone: every step after this one fails before it does anything.
                made.faults.broken = {f"network.{verb}" for verb in ("claim", "unname", "unwire", "wire", "tidy")} | {
                    "store.begin", "cgroups.remove", "firewall.close", "files.furnish", "files.remove",
                    "processes.launch"}
                raise RuntimeError(f"planted at {step}")

            with made.faults.fail_at(number, stop, after=True) as steps:
                with trio.move_on_after(1):
                    try:
                        await made.templates.create(asked(), ALICE)
                    except (NetnsdError, RuntimeError):
                        pass
            seen = steps[number]
        made.faults.broken = set()
        async with made.running() as environments:
            await at_rest(made)
            found = {e.id: e.services["main"].pid for e in environments.registry.all()}
            assert before.items() <= found.items(), (number, seen)
            assert {e.name for e in environments.registry.all() if not e.stock} <= {"web"}
            assert len(stock_of(made)) == 2, (number, seen)


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
        web = await made.templates.create(asked(), ALICE)
        assert "furnish_failed" in made.kinds()
        made.faults.broken = set()
        await environments.remove(web)
        await at_rest(made)


# -- what is told of them -----------------------------------------------------------------------------------------


async def test_pools_of_templates_are_shown_to_their_users_and_summed_up_for_others(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (made := world(tmp_path)).running():
        await add(made, 2)
        await add(made, 0, name="cold")
        await add(made, 1, who=BOB, name="theirs")
        await made.templates.create(asked(), ALICE)
        await trio.sleep(1)
        [pool] = made.templates.pools(ALICE)
        assert pool == wire.Pool(name="template/shop", size=2, target=2, ready=2, claimed=1, missed=0, reason="")
        assert [p.name for p in made.templates.pools(BOB)] == ["template/theirs"]
        assert made.templates.pools(CAROL) == []
        assert made.templates.pool() == wire.Pool(name="templates", size=3, target=3, ready=3, claimed=1, missed=0,
                                                  reason="")


__all__ = ["KernelError", "LaunchFailed"]
