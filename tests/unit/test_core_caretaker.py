"""What others broke is mended, what differs is told, and what is nobody's is removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd.core.audit import Difference
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Inhabitant
from netnsd.core.pool import PoolSettings
from netnsd.errors import KernelError
from tests.fakes.world import ALICE, BOB, World, request
from tests.unit import stocking

Lose = Callable[[World, Environment], None]


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


def _named(differences: list[Difference]) -> set[tuple[str, str, str]]:
    return {(d.kind, d.what, d.subject) for d in differences}


LOSSES: dict[str, Lose] = {
    "pin": lambda world, e: world.network.unpinned.add(e.slot.index),
    "name": lambda world, e: world.network.nameless.add(e.slot.index),
    "link": lambda world, e: world.network.unlinked.add(e.slot.index),
}


@pytest.mark.parametrize("part", LOSSES)
@pytest.mark.parametrize("is_restarted", [False, True], ids=["running", "down"])
async def test_a_lost_part_is_mended_told_once_and_no_server_notices(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, part: str, is_restarted: bool
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server", ports=1), ALICE)
        await environments.create(request("other", "server"), BOB)
        running = dict(world.processes.running)
        LOSSES[part](world, web)
        if not is_restarted:
            [found] = [d for d in await environments.caretaker.differences() if d.what == part]
            assert (found.kind, found.environment) == ("missing", web.id)
            await environments.check()
            assert await environments.caretaker.differences() == []
    async with world.running() as environments:
        await settled()
        assert world.kinds().count("mended") == 1
        assert [details["what"] for kind, _, details in world.events if kind == "mended"] == [[part]]
        assert world.processes.running == running
        assert len(list(environments.registry.all())) == 2
        assert await environments.caretaker.differences() == []


async def test_what_lost_its_link_is_furnished_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        for name, commands in (("web", ["server"]), ("bare", [])):
            made = await environments.create(request(name, *commands), ALICE)
            await trio.sleep(1)
            world.network.furnished.clear()
            world.network.unlinked.add(made.slot.index)
            await environments.check()
            await trio.sleep(1)
            assert made.slot.index in world.network.furnished


async def test_an_environment_to_which_nothing_leads_ends_and_the_others_go_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server", ports=1), ALICE)
        kept = await environments.create(request("kept", "server", ports=1), ALICE)
        world.network.unpinned.add(web.slot.index)
        world.network.nameless.add(web.slot.index)
        await environments.check()
        await trio.sleep(1)
        assert list(environments.registry.all()) == [kept]
        assert world.kinds().count("lost") == 1
        assert list(world.held()["namespaces"].values()) == ["kept"]


@pytest.mark.parametrize("part", ["pin", "link", "bridge"])
async def test_a_waiting_slot_that_lost_a_part_is_nobodys_and_another_is_made(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, part: str
) -> None:
    world = World(tmp_path, pool=PoolSettings(size=2, most=2))
    async with world.running() as environments:
        await trio.sleep(5)
        [spoilt, other] = environments.pool.waiting
        if part == "bridge":
            world.network.masters[spoilt.index] = 0
        else:
            {"pin": world.network.unpinned, "link": world.network.unlinked}[part].add(spoilt.index)
        await environments.check()
        assert environments.pool.waiting == [other]
        await trio.sleep(5)
        assert environments.pool.ready == 2
        assert spoilt.index not in world.network.slots
        assert await environments.caretaker.differences() == []
        assert (await environments.create(request("web"), ALICE)).slot == other


async def test_a_bridge_concerns_somebody_also_while_there_is_nobody(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        assert environments.caretaker.concerns(links={world.plan.slot(0).bridge.ifindex}, names=())
        assert not environments.caretaker.concerns(links={world.plan.slot(0).port_ifindex, 7}, names={"web"})


async def test_what_cannot_be_mended_now_is_tried_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server"), ALICE)
        world.network.unlinked.add(web.slot.index)
        world.faults.broken = {"network.mend"}
        await environments.check()
        assert "mend_failed" in world.kinds()
        assert _named(await environments.caretaker.differences()) == {("missing", "link", web.slot.port_name)}
        world.faults.broken = set()
        await environments.check()
        assert await environments.caretaker.differences() == []
        assert web in environments.registry


async def test_a_check_does_not_wait_for_who_has_an_environment_for_long(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server"), ALICE)
        other = await environments.create(request("other", "server"), ALICE)
        lock = environments._particulars.lock(web)
        async with lock:
            for environment in (web, other):
                world.network.unlinked.add(environment.slot.index)
            with trio.fail_after(2):
                await environments.check()
            assert world.network.unlinked == {web.slot.index}
        await environments.check()
        assert not world.network.unlinked


async def test_a_check_does_not_wait_for_what_cannot_be_removed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        stuck = await environments.create(request("stuck", "server"), ALICE)
        web = await environments.create(request("web", "server"), BOB)
        remove = world.cgroups.remove

        async def slow(path: str) -> None:
            if path.startswith(stuck.slot.cgroup):
                await trio.sleep(10)
                raise KernelError("it does not end")
            await remove(path)

        world.cgroups.remove = slow  # type: ignore[method-assign]
        with pytest.raises(KernelError):
            await environments.remove(stuck)
        for _ in range(3):
            world.network.unlinked.add(web.slot.index)
            with trio.fail_after(1):
                await environments.check()
            assert not world.network.unlinked
        world.cgroups.remove = remove  # type: ignore[method-assign]
        await trio.sleep(20)
        await environments.check()
        await settled()
        assert list(environments.registry.all()) == [web]


async def test_a_start_at_which_nothing_can_be_mended_takes_no_longer_for_many(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        for number in range(200):
            await environments.create(request(f"e{number}"), ALICE)
        await trio.sleep(1)
        world.network.unlinked |= world.network.slots.keys()
    world.faults.broken = {"network.mend"}
    with trio.fail_after(5):
        async with world.running() as environments:
            assert world.kinds().count("mend_failed") == len(environments.registry) == 200
    world.faults.broken = set()


@pytest.mark.parametrize("step", ["firewall.check", "network.mend_bridges"])
async def test_a_check_mends_although_something_else_cannot_be_put_right(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, step: str
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server"), ALICE)
        world.network.unlinked.add(web.slot.index)
        world.faults.broken = {step}
        with pytest.raises(KernelError):
            await environments.check()
        assert not world.network.unlinked


async def test_every_difference_is_named_and_what_is_nobodys_is_pruned(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        web = await environments.create(request("web", "server", ports=1), ALICE)
        await trio.sleep(1)
        assert await environments.caretaker.differences() == []
        world.network.slots[99] = "orphan"
        world.network.masters[99] = 1
        await world.cgroups.create("nd98/s-x")
        world.files.furnished.add("ghost")
        world.firewall.owners.add(("10.9.0.99", 7))
        world.network.bad_bridges.append("ndbr0")
        world.network.second_names.add((web.slot.index, "second"))
        world.network.strays[web.slot.index] = [Inhabitant(4711, 0, "sleep")]
        world.cgroups.groups[f"{web.slot.cgroup}/s-s0"].clear()
        environments.registry._ports.restore("udp", 20009, "ghost")
        expected = {
            ("orphan", "netns", "nd99"), ("orphan", "cgroup", "nd98"), ("orphan", "files", "ghost"),
            ("orphan", "element", "('10.9.0.99', 7)"), ("missing", "bridge", "ndbr0"),
            ("orphan", "name", "/run/netns/second"), ("stray", "process", "4711"), ("missing", "process", "s0"),
            ("orphan", "port", "20009/udp")}
        assert _named(await environments.caretaker.differences()) == expected
        removed, left = await environments.caretaker.prune()
        # A process that is said to run is the supervisor's business, a lease without a row a fault of ours.
        stays = {("stray", "process", "4711"), ("missing", "process", "s0"), ("orphan", "port", "20009/udp")}
        assert _named(left) == stays
        assert _named(removed) == expected - stays
        assert world.network.slots.keys() == {web.slot.index}
        assert not any(group.startswith("nd98") for group in world.cgroups.groups)
        assert world.files.observe() == {web.id}


async def test_what_comes_and_goes_meanwhile_is_no_difference_and_is_never_pruned(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, published_range=(20000, 20099), pool=PoolSettings(size=3, most=3))
    ended = trio.Event()

    async def churn(number: int) -> None:
        round_number = 0
        while not ended.is_set():
            round_number += 1
            made = await world.environments.create(request(f"e{number}-{round_number}", "server", ports=2), ALICE)
            await trio.sleep(0.01 * (1 + number))
            await world.environments.remove(made)

    found: list[Any] = []
    async with world.running() as environments:
        kept = await environments.create(request("kept", "server", ports=1), BOB)
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(churn, number)
            for _ in range(8):
                found += await environments.caretaker.differences()
                removed, left = await environments.caretaker.prune()
                found += removed + left
                await environments.check()
                await trio.sleep(0.03)
            ended.set()
        assert found == []
        assert list(environments.registry.all()) == [kept]
        assert world.kinds().count("mended") == world.kinds().count("lost") == 0


async def test_a_slot_that_is_pruned_is_nobodys_meanwhile_and_can_be_had_afterwards(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        world.network.slots[0], world.network.masters[0] = None, 1
        free = environments.registry.addresses_free
        unwire, meanwhile = world.network.unwire, []

        async def slow(slots: Any) -> None:
            meanwhile.append(await environments.create(request("web"), ALICE))
            await unwire(slots)

        world.network.unwire = slow  # type: ignore[method-assign]
        await environments.caretaker.prune()
        world.network.unwire = unwire  # type: ignore[method-assign]
        assert meanwhile[0].slot.index != 0
        assert environments.registry.addresses_free == free - 1


async def test_a_slot_whose_group_is_pruned_is_nobodys_meanwhile_and_can_be_had_afterwards(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        await world.cgroups.create("nd0/s-s0")
        free = environments.registry.addresses_free
        remove = world.cgroups.remove
        meanwhile: list[Environment] = []

        async def slow(path: str) -> None:
            if path == "nd0" and not meanwhile:
                meanwhile.append(await environments.create(request("web", "server"), ALICE))
            await remove(path)

        world.cgroups.remove = slow  # type: ignore[method-assign]
        await environments.caretaker.prune()
        assert meanwhile[0].services["s0"].state == "running"
        assert meanwhile[0].slot.index != 0
        assert environments.registry.addresses_free == free - 1


async def test_a_slot_that_this_supernet_has_not_is_left_and_nobody_gets_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as environments:
        world.network.slots[5000], world.network.masters[5000] = None, 1
        free = environments.registry.addresses_free
        _removed, left = await environments.caretaker.prune()
        assert _named(left) == {("orphan", "netns", "nd5000")}
        assert environments.registry.addresses_free == free
        for number in range(2 * world.plan.slots):
            made = await environments.create(request(f"e{number}"), ALICE)
            await environments.remove(made)


async def test_what_is_handed_over_while_names_are_pruned_keeps_its_name(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = stocking.world(tmp_path)
    async with world.running() as environments:
        await stocking.add(world, 1)
        [stocked] = stocking.stock_of(world)
        world.network.second_names.add((stocked.slot.index, "second"))
        tidy = world.network.tidy
        async with trio.open_nursery() as nursery:
            async def meet(slots: Any) -> None:
                world.network.tidy = tidy  # type: ignore[method-assign]
                nursery.start_soon(world.templates.create, stocking.asked(), ALICE)
                await settled()
                await tidy(slots)

            world.network.tidy = meet  # type: ignore[method-assign]
            await environments.caretaker.prune()
        assert (stocked.netns, world.network.slots[stocked.slot.index]) == ("web", "web")
        assert not world.network.second_names
