"""Templates are one user's, hide what is secret, are checked when they are kept, and make what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.specification import MAX_LABELS
from netnsd.core.templates import MOST_TEMPLATES, MOST_WARM
from netnsd.errors import (
    InvalidCommand,
    InvalidLabel,
    InvalidName,
    InvalidPort,
    InvalidRequest,
    InvalidVariable,
    NameTaken,
    NetnsdError,
    NotFound,
    StoreError,
)
from tests.fakes.world import ALICE, BOB, CAROL
from tests.unit.stocking import SPECIFICATION, Clock, add, asked, at_rest, stock_of, world

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
