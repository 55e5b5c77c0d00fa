"""Who an environment is shared with: checked, found, followed, and never left half-changed."""

from __future__ import annotations

import grp
import threading
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.api import peer
from netnsd.core import registry
from netnsd.core.environment import Environment
from netnsd.core.environments import Environments
from netnsd.core.interfaces import Opening
from netnsd.core.specification import MAX_SHARES, check_share, named_guests
from netnsd.errors import InvalidLabel, InvalidRequest, KernelError, NotFound, StoreError
from tests.fakes.faults import raising
from tests.fakes.world import ALICE, BOB, World, request

SHARED = msgspec.structs.replace(request("web", "server", ports=1), share="user:bob,group:shop")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.groups["shop"] = (0, 1002, 1009)
    return world


def held(world: World, environment: Environment) -> Opening:
    return world.firewall._desired[environment.slot.address]


@pytest.mark.parametrize("share", ["owner", "host", "lan", "user:bob", "group:shop,user:bob", "user:b.o-b_1"])
def test_a_share_is_kept_as_it_is(share: str) -> None:
    assert check_share(share) == share


@pytest.mark.parametrize("share", ["", "all", "Host", "owner,host", "user", "user:", "user:a b", "user:a/b", "uid:1",
                                   "user:bob,", ",user:bob", "user:bob,group:", "user:a\n", "user:a:b", "user:a\0",
                                   ",".join(f"user:u{n}" for n in range(MAX_SHARES + 1)), f"user:{'a' * 65}"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(InvalidRequest):
        check_share(share)


def test_names_are_told_once() -> None:
    assert check_share("user:bob,group:bob,user:bob") == "user:bob,group:bob"
    assert named_guests("user:bob,group:bob") == [("user", "bob"), ("group", "bob")]
    assert named_guests("lan") == []


async def test_guests_are_those_whom_it_names_but_root(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(SHARED, ALICE)
        assert (held(world, web).guests, held(world, web).reach) == ((1002, 1009), "owner")
        for share in ("host", "lan"):
            await environments.change(web, wire.ChangeRequest(share=share))
            assert (held(world, web).guests, held(world, web).reach) == ((), share)


async def test_who_is_not_there_makes_nothing(world: World) -> None:
    async with world.running() as environments:
        with pytest.raises(InvalidRequest, match="no user 'eve'"):
            await environments.create(msgspec.structs.replace(SHARED, share="user:eve"), ALICE)
        assert world.held() == {}


async def test_a_change_that_fails_changes_nothing(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(SHARED, ALICE)
        before = (web.share, web.labels, web.guests, held(world, web))

        async def refused(kind: type[Exception], change: wire.ChangeRequest, step: str = "") -> None:
            with world.faults.recording() as steps:
                await environments.change(web, wire.ChangeRequest(share=web.share))
            if step:
                with world.faults.fail_at(steps.index(step), raising(kind)), pytest.raises(kind):
                    await environments.change(web, change)
            else:
                with pytest.raises(kind):
                    await environments.change(web, change)
            assert (web.share, web.labels, web.guests, held(world, web)) == before
            [row] = world.store.environments()
            assert (row.share, row.labels) == before[:2]

        await refused(InvalidRequest, wire.ChangeRequest(share="everybody"))
        await refused(InvalidRequest, wire.ChangeRequest(share="user:eve"))
        await refused(InvalidLabel, wire.ChangeRequest(labels={"-": "x"}, share="host"))
        await refused(StoreError, wire.ChangeRequest(labels={"a": "x"}, share="host"), "store.commit")
        await refused(KernelError, wire.ChangeRequest(labels={"a": "x"}, share="host"), "firewall.alter")


async def test_labels_are_merged(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(msgspec.structs.replace(SHARED, labels={"a": "1", "b": "2"}), ALICE)
        await environments.change(web, wire.ChangeRequest(labels={"b": None, "c": "3"}))
        assert web.labels == {"a": "1", "c": "3"}
        assert world.store.environments()[0].labels == {"a": "1", "c": "3"}
        assert web.share == SHARED.share


async def test_what_is_gone_is_not_changed(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(SHARED, ALICE)
        await environments.remove(web)
        with pytest.raises(NotFound):
            await environments.change(web, wire.ChangeRequest(share="host"))
        assert world.held() == {}


async def _after(environments: Environments, world: World, web: Environment, shop: tuple[int, ...] | None) -> set[int]:
    if shop is None:
        del world.groups["shop"]
    else:
        world.groups["shop"] = shop
    await environments.check()
    return set(held(world, web).guests)


async def test_a_check_lets_in_who_has_joined_a_group_and_out_who_has_left(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(SHARED, ALICE)
        assert await _after(environments, world, web, (1010,)) == {1002, 1010}
        assert await _after(environments, world, web, None) == {1002}
        assert [kind for kind, _, _ in world.events].count("share_failed") == 1
        del world.accounts[BOB.uid]
        assert await _after(environments, world, web, (1011,)) == {1011}


async def test_a_restart_finds_the_guests_again(world: World) -> None:
    async with world.running() as environments:
        await environments.create(SHARED, ALICE)
    world.groups["shop"] = (1020,)
    async with world.running() as environments:
        [web] = environments.registry.all()
        assert held(world, web).guests == (1002, 1020)


async def test_a_name_service_that_hangs_keeps_nothing_else_waiting(
        world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    """One name's time is lost in all, whatever waits for a check has it before, and nobody is cut for it."""
    async with world.running() as environments:
        webs = []
        for number in range(20):
            world.groups[f"g{number}"] = (1002, 1100 + number)
            webs.append(await environments.create(msgspec.structs.replace(
                request(f"web-{number}", "server"), share=f"user:bob,group:g{number}"), ALICE))
        order: list[tuple[str, float]] = []
        begun = trio.current_time()

        async def hang(_kind: str, _name: str) -> None:
            order.append(("asked", trio.current_time() - begun))
            await trio.sleep_forever()

        async def look() -> bool:
            order.append(("checked", trio.current_time() - begun))
            return False

        monkeypatch.setattr(environments._sharing, "_members", hang)
        monkeypatch.setattr(environments.caretaker, "check", look)
        await environments.check()
        assert [what for what, _ in order] == ["checked", "asked"]
        assert trio.current_time() - begun == 5.0
        assert [web.guests for web in webs] == [(1002, 1100 + number) for number in range(20)]
        assert held(world, webs[0]).guests == (1002, 1100)
        await environments._sharing.recall(webs)
        assert {web.guests for web in webs} == {()}


async def test_look_ups_that_hang_leave_threads_to_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    monkeypatch.setattr(grp, "getgrnam", lambda _name: hung.wait(20))
    try:
        async with trio.open_nursery() as nursery:
            for number in range(50):  # more than trio has threads by default
                nursery.start_soon(peer.members, "group", f"g{number}")
            await trio.sleep(0.05)
            with trio.fail_after(5):
                assert await trio.to_thread.run_sync(lambda: "served") == "served"
            nursery.cancel_scope.cancel()
    finally:
        hung.set()


async def test_guests_of_all_of_a_users_environments_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check lists all of them, while nothing can be made."""
    monkeypatch.setattr(registry, "MOST_GUESTS", 4)
    world.groups["many"] = (1010, 1011, 1012)
    async with world.running() as environments:
        webs = [await environments.create(msgspec.structs.replace(SHARED, name=name), ALICE) for name in ("a", "b")]
        with pytest.raises(InvalidRequest, match="6 guests, more than 4"):
            await environments.create(msgspec.structs.replace(SHARED, name="c"), ALICE)
        await environments.create(msgspec.structs.replace(SHARED, name="c"), BOB)
        with pytest.raises(InvalidRequest, match="more than 4"):
            await environments.create(
                msgspec.structs.replace(SHARED, name="a", share="group:many", replace=True), ALICE)
        assert webs[0] in environments.registry
        world.groups["shop"] = (1002, 1009, 1010)
        with pytest.raises(InvalidRequest, match="more than 4"):
            await environments.change(webs[0], wire.ChangeRequest(share="group:shop"))
        await environments.change(webs[0], wire.ChangeRequest(share="user:bob"))
        await environments.check()
        assert [len(held(world, web).guests) for web in webs] == [1, 3]
        world.groups["shop"] = (1002, 1009, 1010, 1011)
        await environments.check()
        assert [len(held(world, web).guests) for web in webs] == [1, 0]
        assert [web.guests for web in webs] == [(1002,), ()]
