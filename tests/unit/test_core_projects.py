"""Environments by (dev_id, project): one for a pair, whose it is to be, and another for another pair."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netnsd import wire
from netnsd.core import specification
from netnsd.core.environment import Environment
from netnsd.core.projects import name_of
from netnsd.errors import InvalidLabel, InvalidRequest, KernelError, NameTaken, NotFound, WrongState
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World, request

PAIR = wire.ProjectRequest(dev_id="user123", project="new_feature")
REFERENCE = wire.ProjectReference(dev_id="user123", project="new_feature")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    made.accounts[ROOT.uid] = ROOT
    made.developers = {"user123": "alice", "gone": "nobody-of-that-name", "boss": "root"}
    async with made.running():
        yield made


def labels() -> dict[str, str]:
    return {"dev_id": "user123", "project": "new_feature"}


# -- names ------------------------------------------------------------------------------------------------------


@given(st.text(max_size=80), st.text(max_size=80))
def test_a_name_is_a_dns_label_and_always_the_same(dev_id: str, project: str) -> None:
    name = name_of(dev_id, project)
    assert specification.check_name(name) == name == name_of(dev_id, project)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_another_pair_has_another_name(a: str, b: str, c: str, d: str) -> None:
    assert (name_of(a, b) == name_of(c, d)) == ((a, b) == (c, d))


@pytest.mark.parametrize(("one", "other"), [
    (("a-b", "c"), ("a", "b-c")), (("a", "b"), ("A", "b")), (("a", "b"), ("b", "a")), (("a_b", "c"), ("a-b", "c")),
    (("x" * 80, "a"), ("x" * 80, "b")), (("a", ""), ("", "a")), (("é", "x"), ("e", "x"))])
def test_pairs_that_look_alike_have_names_of_their_own(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert name_of(*one) != name_of(*other)


def test_a_name_can_be_read() -> None:
    assert name_of("user123", "new_feature").startswith("user123-new-feature-")


# -- starting ---------------------------------------------------------------------------------------------------


async def test_a_pair_has_one_environment_which_is_started_again(world: World) -> None:
    made = await world.projects.start(PAIR, BOB)
    assert (made.user, made.labels, dict(made.services)) == ("bob", labels(), {})
    assert await world.projects.start(PAIR, BOB) is made
    assert len(world.environments.registry) == 1
    other = await world.projects.start(PAIR, dataclasses.replace(CAROL, is_admin=False))
    assert (other.user, other.name) == ("carol", made.name)


async def test_what_was_stopped_runs_again(world: World) -> None:
    await world.templates.add(wire.TemplateRequest(
        name="shop", specification=wire.Specification(command=["server"], labels={"team": "x"})), BOB)
    pair = wire.ProjectRequest(dev_id="d", project="shop")
    made = await world.projects.start(pair, BOB)
    assert made.labels == {"team": "x", "dev_id": "d", "project": "shop"}
    assert made.services["main"].command.argv == ("server",)
    await world.environments.stop(made, 0)
    assert {s.state for s in made.services.values()} == {"stopped"}
    assert await world.projects.start(pair, BOB) is made
    assert [s.state for s in made.services.values()] == ["running"]


async def test_the_template_is_called_as_a_dns_label_can_be(world: World) -> None:
    for name in ("new-feature", "other"):
        await world.templates.add(wire.TemplateRequest(
            name=name, specification=wire.Specification(command=[name])), BOB)
    for project, command in (("new_feature", "new-feature"), ("New Feature!", "new-feature"), ("other", "other")):
        made = await world.projects.start(wire.ProjectRequest(dev_id="d", project=project), BOB)
        assert made.services["main"].command.argv == (command,)
    assert not (await world.projects.start(wire.ProjectRequest(dev_id="d", project="!"), BOB)).services


async def test_the_template_is_the_owners(world: World) -> None:
    for owner in (ALICE, CAROL):
        await world.templates.add(wire.TemplateRequest(
            name="shop", specification=wire.Specification(command=[owner.user])), owner)
    pair = wire.ProjectRequest(dev_id="user123", project="shop")
    assert (await world.projects.start(pair, CAROL)).services["main"].command.argv == ("alice",)
    assert (await world.projects.start(pair, BOB)).services == {}


async def test_starts_at_once_make_one(world: World) -> None:
    await world.templates.add(wire.TemplateRequest(
        name="shop", specification=wire.Specification(command=["server"])), BOB)
    pair, found = wire.ProjectRequest(dev_id="d", project="shop"), list[Environment]()

    async def start() -> None:
        found.append(await world.projects.start(pair, BOB))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(start)
    assert len(found) == 10
    assert len({e.id for e in found}) == len(world.environments.registry) == 1
    assert not world.projects._turns


async def test_a_start_behind_one_that_failed_makes_it(world: World) -> None:
    world.faults.broken.add("network.wire")
    results: list[object] = []

    async def start() -> None:
        try:
            results.append(await world.projects.start(PAIR, BOB))
        except KernelError as error:
            world.faults.broken.clear()
            results.append(error.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        nursery.start_soon(start)
    assert results[0] == "kernel_error"
    assert [e.id for e in world.environments.registry.all()] == [results[1].id]  # type: ignore[attr-defined]


async def test_starts_and_ends_at_once_leave_one_or_none(world: World) -> None:
    async def end() -> None:
        with contextlib.suppress(NotFound):
            await world.projects.terminate(REFERENCE, BOB)

    async def start() -> None:
        with contextlib.suppress(WrongState, NotFound):  # it was removed as it was made, or started
            await world.projects.start(PAIR, BOB)

    for _ in range(20):
        async with trio.open_nursery() as nursery:
            for step in (start, end, start, end, start):
                nursery.start_soon(step)
        assert len(world.environments.registry) <= 1
    await end()
    assert world.held() == {}


# -- whose ------------------------------------------------------------------------------------------------------


async def test_an_admin_starts_for_whom_the_configuration_names_and_others_for_themselves(world: World) -> None:
    hers = await world.projects.start(PAIR, CAROL)
    assert (hers.uid, hers.user) == (ALICE.uid, "alice")
    assert await world.projects.find(REFERENCE, CAROL) is hers
    assert await world.projects.find(REFERENCE, ALICE) is hers
    his = await world.projects.start(PAIR, BOB)
    assert his.user == "bob"
    assert (await world.projects.start(wire.ProjectRequest(dev_id="unmapped", project="p"), CAROL)).user == "carol"
    await world.projects.terminate(REFERENCE, BOB)
    assert [e.user for e in world.projects.visible(CAROL)] == ["alice", "carol"]
    assert [e.user for e in world.projects.visible(ALICE)] == ["alice"]


@pytest.mark.parametrize("dev_id", ["gone", "boss"])
async def test_a_developer_without_account_or_root_is_refused(world: World, dev_id: str) -> None:
    with pytest.raises(WrongState):
        await world.projects.start(wire.ProjectRequest(dev_id=dev_id, project="p"), CAROL)
    assert world.held() == {}


async def test_what_is_named_so_by_hand_is_not_the_pairs(world: World) -> None:
    await world.environments.create(request(name_of("user123", "new_feature")), BOB)
    with pytest.raises(NameTaken):
        await world.projects.start(PAIR, BOB)
    with pytest.raises(NameTaken):
        await world.projects.terminate(REFERENCE, BOB)


# -- ending and finding -----------------------------------------------------------------------------------------


async def test_ended_by_pair_or_by_id_and_not_twice(world: World) -> None:
    for by_id in (False, True):
        made = await world.projects.start(PAIR, BOB)
        reference = wire.ProjectReference(id=made.id) if by_id else REFERENCE
        for other in (ALICE, CAROL) if not by_id else (ALICE,):
            with pytest.raises(NotFound):
                await world.projects.terminate(reference, other)
        await world.projects.terminate(reference, BOB)
        assert world.held() == {}
        with pytest.raises(NotFound):
            await world.projects.terminate(reference, BOB)


@pytest.mark.parametrize("fields", [{}, {"dev_id": "a"}, {"project": "a"}, {"dev_id": "a", "id": "x"},
                                    {"dev_id": "a", "project": "b", "id": "x"}])
async def test_half_a_reference_is_none(world: World, fields: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        await world.projects.find(wire.ProjectReference(**fields), BOB)


async def test_an_id_is_no_name(world: World) -> None:
    made = await world.projects.start(PAIR, BOB)
    for ref in (made.name, f"{made.name}.bob"):
        with pytest.raises(NotFound):
            await world.projects.find(wire.ProjectReference(id=ref), BOB)


@pytest.mark.parametrize(("dev_id", "project", "error"), [
    ("", "p", InvalidRequest), ("d", "", InvalidRequest), ("d\n", "p", InvalidLabel), ("d", "p" * 257, InvalidLabel)])
async def test_what_no_label_can_hold_is_refused(world: World, dev_id: str, project: str,
                                                 error: type[Exception]) -> None:
    with pytest.raises(error):
        await world.projects.start(wire.ProjectRequest(dev_id=dev_id, project=project), BOB)
    assert world.held() == {}


async def test_others_environments_are_not_listed_among_them(world: World) -> None:
    await world.environments.create(request("web", labels={"dev_id": "x"}), BOB)
    made = await world.projects.start(PAIR, BOB)
    assert world.projects.visible(BOB) == [made]
