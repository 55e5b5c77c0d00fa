"""No user has more than its quota, however it asks; and what is gone makes room."""

from __future__ import annotations

import contextlib
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.environments import Environments
from netnsd.core.pool import PoolSettings
from netnsd.core.quotas import LIMITS
from netnsd.errors import (
    InvalidRequest,
    LaunchFailed,
    NetnsdError,
    QuotaExceeded,
    StoreError,
    TooManyCreations,
    WrongState,
)
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World, request
from tests.unit import stocking

MIB = 1 << 20


def quota(**limits: Any) -> wire.QuotaLimits:
    return wire.QuotaLimits(**limits)


def sized(name: str, memory: int | None = None, cpu: float | None = None, **fields: Any) -> wire.CreateRequest:
    return request(name, resources=wire.Resources(memory=memory, cpu=cpu), **fields)


def used(environments: Environments, who: Any = ALICE) -> tuple[int, int, int, float]:
    shown = environments.registry.quotas.shown(who.uid, who.user).used
    return shown.environments, shown.ports, shown.memory, shown.cpu


# A quota, what each environment takes, how many fit, and what is said of one more.
ROOMS: list[tuple[dict[str, Any], dict[str, Any], int, dict[str, Any]]] = [
    ({"environments": 2}, {}, 2, {"quota": "environments", "limit": 2, "used": 2, "asked": 1}),
    ({"environments": 0}, {}, 0, {"quota": "environments", "limit": 0, "used": 0, "asked": 1}),
    ({"ports": 5}, {"ports": 2}, 2, {"quota": "ports", "limit": 5, "used": 4, "asked": 2}),
    ({"memory": 100 * MIB}, {"memory": 40 * MIB}, 2,
     {"quota": "memory", "limit": 100 * MIB, "used": 80 * MIB, "asked": 40 * MIB}),
    ({"memory": 80 * MIB}, {"memory": 40 * MIB}, 2,
     {"quota": "memory", "limit": 80 * MIB, "used": 80 * MIB, "asked": 40 * MIB}),
    # Sums of these are not exact as floating-point numbers.
    ({"cpu": 0.3}, {"cpu": 0.1}, 3, {"quota": "cpu", "limit": 0.3, "used": 0.3, "asked": 0.1}),
    ({"cpu": 2.01}, {"cpu": 2.01}, 1, {"quota": "cpu", "limit": 2.01, "used": 2.01, "asked": 2.01}),
]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: f"{room[0]}")
@pytest.mark.parametrize("pool", [0, 4])
async def test_what_fits_is_made_and_one_more_is_refused_by_name_and_nothing_is_left(
        tmp_path: Path, autojump_clock: trio.testing.MockClock, room: tuple[Any, ...], pool: int) -> None:
    limits, one, fits, details = room
    world = World(tmp_path, quota=quota(**limits), pool=PoolSettings(size=pool))
    async with world.running() as environments:
        await trio.sleep(5)
        made = [await environments.create(sized(f"e{n}", **one), ALICE) for n in range(fits)]
        await trio.sleep(5)
        before = world.held()
        with pytest.raises(QuotaExceeded) as caught:
            await environments.create(sized("more", **one), ALICE)
        assert caught.value.details == details
        assert caught.value.hint
        await trio.sleep(5)
        assert world.held() == before
        if fits:
            assert await environments.create(sized("more", **one), BOB), "each has its own"
            await environments.remove(made[0])
            assert await environments.create(sized("more", **one), ALICE), "what is gone makes room"


async def test_under_a_quota_of_memory_or_cpu_each_environment_has_a_limit_of_it(tmp_path: Path) -> None:
    world = World(tmp_path, quota=quota(memory=100 * MIB, cpu=2))
    async with world.running() as environments:
        for wanted in (sized("web", cpu=1), sized("web", memory=MIB * 10)):
            with pytest.raises(QuotaExceeded, match="no limit") as caught:
                await environments.create(wanted, ALICE)
            assert caught.value.details["asked"] is None
        assert caught.value.hint == "Say how much it may take: --cpus."
        await environments.create(sized("web", 10 * MIB, 1), ALICE)
    world = World(tmp_path / "other", quota=quota(memory=100 * MIB), resources=wire.Resources(memory=60 * MIB))
    async with world.running() as environments:
        await environments.create(request("web"), ALICE)
        with pytest.raises(QuotaExceeded):
            await environments.create(request("more"), ALICE)


async def test_root_has_no_quota_and_admins_have_one(tmp_path: Path) -> None:
    world = World(tmp_path, quota=quota(environments=1))
    async with world.running() as environments:
        for name in ("a", "b", "c"):
            await environments.create(request(name), ROOT)
        await environments.create(request("a"), CAROL)
        with pytest.raises(QuotaExceeded):
            await environments.create(request("b"), CAROL)
        with pytest.raises(WrongState):
            environments.registry.quotas.put(0, "root", wire.QuotaRequest(environments=1))


async def test_usage_is_what_there_is_after_any_sequence_and_after_a_restart(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path, quota=quota(environments=6, ports=5, memory=200 * MIB, cpu=3))
    chance = random.Random(1)
    for run in range(3):
        async with world.running() as environments:
            for step in range(60):
                who = chance.choice((ALICE, BOB))
                mine = environments.registry.visible(who, everyones=False, labels={})
                if mine and chance.random() < 0.4:
                    await environments.remove(chance.choice(mine))
                    continue
                wanted = sized(f"r{run}s{step}", chance.randint(4, 80) * MIB, chance.choice((0.01, 0.1, 0.7)),
                               ports=chance.randint(0, 2))
                if chance.random() < 0.2:
                    wanted = request(f"r{run}s{step}", "missing", resources=wanted.resources)
                with contextlib.suppress(QuotaExceeded, LaunchFailed):
                    await environments.create(wanted, who)
            for who in (ALICE, BOB):
                mine = environments.registry.visible(who, everyones=False, labels={})
                assert used(environments, who) == (
                    len(mine), sum(len(e.ports) for e in mine), sum(e.resources.memory or 0 for e in mine),
                    round(sum(e.resources.cpu or 0 for e in mine), 3))
                assert used(environments, who) <= (6, 5, 200 * MIB, 3)
    async with world.running() as environments:
        await environments.remove_many(list(environments.registry.all()))
        assert world.held() == {}


@pytest.mark.parametrize("count", [5, 6, 9])
async def test_many_at_once_are_all_there_or_none(tmp_path: Path, count: int) -> None:
    world = World(tmp_path, quota=quota(environments=5))
    async with world.running() as environments:
        asked = request("web", count=count)
        if count <= 5:
            assert len(await environments.create_many(asked, ALICE, environments.create)) == count
        else:
            slots = environments.registry.addresses_free
            with pytest.raises(QuotaExceeded) as caught:
                await environments.create_many(asked, ALICE, environments.create)
            assert caught.value.details["asked"] == count, "it is known before any is made"
            assert environments.registry.addresses_free == slots
            assert "created" not in world.kinds()
            assert world.held() == {}


async def test_who_asks_by_many_connections_at_once_gets_no_more(tmp_path: Path) -> None:
    world = World(tmp_path, quota=quota(environments=3, memory=90 * MIB))
    async with world.running() as environments:
        outcomes: list[str] = []

        async def create(number: int) -> None:
            try:
                await environments.create(sized(f"e{number}", 30 * MIB), ALICE)
            except NetnsdError as error:
                outcomes.append(error.code)
            else:
                outcomes.append("made")

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(create, number)
        assert sorted(outcomes) == ["made"] * 3 + ["quota_exceeded"] * 9
        assert used(environments) == (3, 0, 90 * MIB, 0)


async def test_a_replacement_takes_the_room_of_what_it_replaces(tmp_path: Path) -> None:
    world = World(tmp_path, quota=quota(environments=1))
    async with world.running() as environments:
        first = await environments.create(request("web"), ALICE)
        second = await environments.create(request("web", replace=True), ALICE)
        assert first.id != second.id


@pytest.mark.parametrize("limits", [{"memory": 50 * MIB}, {"ports": 1, "memory": None}, {"creations_per_minute": 1}])
async def test_what_nothing_can_come_in_place_of_stays(tmp_path: Path, limits: dict[str, Any]) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        environments.registry.quotas.put(ALICE.uid, "alice", wire.QuotaRequest(**limits))
        first = await environments.create(sized("web", 40 * MIB, ports=1), ALICE)
        with pytest.raises((QuotaExceeded, TooManyCreations)):
            await environments.create(sized("web", 60 * MIB, ports=2, replace=True), ALICE)
        assert environments.registry.find("web", ALICE) is first
        assert first.state == "ready"
        await world.templates.add(wire.TemplateRequest(
            name="large", warm=0, specification=wire.Specification(
                resources=wire.Resources(memory=60 * MIB),
                ports=[wire.PortRequest(port=1), wire.PortRequest(port=2)])), ALICE)
        with pytest.raises((QuotaExceeded, TooManyCreations)):
            await world.templates.create(wire.CreateRequest(name="web", template="large", replace=True), ALICE)
        assert environments.registry.find("web", ALICE) is first


# -- what is kept warm ------------------------------------------------------------------------------------------


async def test_what_is_kept_warm_counts_and_a_stock_beyond_the_quota_says_why_it_is_not_full(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = stocking.world(tmp_path, quota=quota(environments=3))
    async with world.running() as environments:
        await stocking.add(world, warm=2)
        assert used(environments)[:2] == (2, 2)
        await environments.create(request("own"), ALICE)
        with pytest.raises(QuotaExceeded):
            await environments.create(request("more"), ALICE)
        # One that is warm is handed over within the quota: it is counted already. None can be made in its place.
        assert await world.templates.create(stocking.asked(), ALICE)
        await trio.sleep(200)
        assert used(environments)[0] == 3
        [pool] = world.templates.pools(ALICE)
        assert pool.ready == 1
        assert "quota of environments is 3" in pool.reason
        assert "template_stuck" in world.kinds()
        await environments.remove(environments.registry.find("own", ALICE))
        await trio.sleep(200)
        [pool] = world.templates.pools(ALICE)
        assert (pool.ready, pool.reason) == (2, "")


# -- creations a minute -----------------------------------------------------------------------------------------


async def test_creations_a_minute_are_refused_until_there_is_room_and_it_is_said_when(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path, quota=quota(creations_per_minute=3))
    async with world.running() as environments:
        for name in ("a", "b", "c"):
            await environments.remove(await environments.create(request(name), ALICE))
            await trio.sleep(10)
        with pytest.raises(TooManyCreations) as caught:
            await environments.create(request("d"), ALICE)
        assert caught.value.details == {"quota": "creations_per_minute", "limit": 3, "used": 3, "asked": 1,
                                        "retry_after_seconds": 30}
        assert await environments.create(request("d"), BOB)
        await trio.sleep(29)
        with pytest.raises(TooManyCreations) as caught:
            await environments.create(request("d"), ALICE)
        assert caught.value.details["retry_after_seconds"] == 1
        await trio.sleep(1)
        assert await environments.create(request("d"), ALICE)
        with pytest.raises(TooManyCreations) as caught:
            await environments.create(request("e"), ALICE)
        assert caught.value.details["retry_after_seconds"] == 10
        with pytest.raises(TooManyCreations) as caught:
            await environments.create_many(request("m", count=2), ALICE, environments.create)
        assert caught.value.details["retry_after_seconds"] == 20
        with pytest.raises(TooManyCreations) as caught:
            await environments.create_many(request("m", count=4), ALICE, environments.create)
        assert "retry_after_seconds" not in caught.value.details


# -- what admins say --------------------------------------------------------------------------------------------


async def test_an_admins_word_goes_before_the_configuration_and_outlives_the_daemon(tmp_path: Path) -> None:
    world = World(tmp_path, quota=quota(environments=1, ports=3))
    async with world.running() as environments:
        quotas = environments.registry.quotas
        quotas.put(ALICE.uid, "alice", wire.QuotaRequest(environments=2, memory=None))
        assert quotas.limits(ALICE.uid) == quota(environments=2, ports=3)
        assert quotas.limits(BOB.uid) == quota(environments=1, ports=3)
        assert quotas.shown(ALICE.uid, "alice").own == ["environments", "memory"]
        for name in ("a", "b"):
            await environments.create(request(name), ALICE)
    async with world.running() as environments:
        quotas = environments.registry.quotas
        assert quotas.limits(ALICE.uid) == quota(environments=2, ports=3)
        with pytest.raises(QuotaExceeded):
            await environments.create(request("c"), ALICE)
        quotas.put(ALICE.uid, "alice", wire.QuotaRequest(ports=None))
        assert quotas.limits(ALICE.uid) == quota(environments=1, ports=None), "all of it is replaced"
        assert used(environments)[0] == 2, "what there is stays"
        with pytest.raises(QuotaExceeded):
            await environments.create(request("c"), ALICE)
        quotas.put(ALICE.uid, "alice", wire.QuotaRequest(environments=None))
        await environments.create(request("c"), ALICE)
        quotas.reset(ALICE.uid)
        quotas.reset(ALICE.uid)
        assert quotas.limits(ALICE.uid) == quota(environments=1, ports=3)
    async with world.running() as environments:
        assert environments.registry.quotas.known() == {}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [-1, (1 << 50) + 1])
async def test_quotas_are_in_range(tmp_path: Path, name: str, value: int) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        for good in (0, 1 << 50, None):
            environments.registry.quotas.put(ALICE.uid, "alice", wire.QuotaRequest(**{name: good}))
        before = environments.registry.quotas.limits(ALICE.uid)
        with pytest.raises(InvalidRequest, match=name):
            environments.registry.quotas.put(ALICE.uid, "alice", wire.QuotaRequest(**{name: value}))
        assert environments.registry.quotas.limits(ALICE.uid) == before


async def test_what_cannot_be_written_does_not_hold(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        quotas = environments.registry.quotas
        quotas.put(ALICE.uid, "alice", wire.QuotaRequest(environments=1))
        for step, change in (
                ("store.set_quota", partial(quotas.put, ALICE.uid, "alice", wire.QuotaRequest(environments=9))),
                ("store.delete_quota", partial(quotas.reset, ALICE.uid))):
            world.faults.broken = {step}
            with pytest.raises(StoreError):
                change()
            assert quotas.limits(ALICE.uid) == quota(environments=1)
        world.faults.broken = set()
        await environments.create(request("web"), ALICE)
        world.faults.broken = {"store.add"}
        quotas.put(ALICE.uid, "alice", wire.QuotaRequest(environments=2))
        with pytest.raises(StoreError):
            await environments.create(request("more"), ALICE)
        assert used(environments)[0] == 1, "what was not made is not counted"
