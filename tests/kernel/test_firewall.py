"""The host's table, in a network namespace that is thrown away: it loads, and every drift is seen and repaired."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from netnsd.core.addressing import Plan
from netnsd.core.interfaces import Opening, Publication
from netnsd.core.judgement import Judgement, Passage
from netnsd.errors import KernelError
from netnsd.kernel import libc
from netnsd.kernel.bridges import Forwarding
from netnsd.kernel.firewall import NftFirewall
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.nft import Nft
from netnsd.kernel.ruleset_watch import RulesetWatch
from netnsd.kernel.seats import Seats

SUPERNET = "10.203.0.0/16"
FLOWS = 64
WEB = Opening("10.203.0.2", 61001, (Publication("tcp", 20000, 3000), Publication("udp", 20000, 53)))
DATABASE = Opening("10.203.0.3", 61002, (Publication("tcp", 20001, 5432),))
BARE = Opening("10.203.0.4", 61002, ())
SHARED = Opening("10.203.99.5", 61001, (Publication("tcp", 29002, 80), Publication("udp", 29002, 53)), (61002, 61003))
HOSTED = Opening("10.203.99.6", 61001, (Publication("tcp", 29003, 80),), reach="host")
OFFERED = Opening("10.203.99.7", 61002, (Publication("tcp", 29004, 80),), (61004,), "lan")
ALL = [WEB, DATABASE, BARE, SHARED, HOSTED, OFFERED]
A, B, C = (int(ipaddress.ip_address(f"10.203.0.{number}")) for number in (2, 3, 4))
EVERYWHERE = (0, 0xFFFFFFFF)
TALKING = Judgement(frozenset({
    Passage((A, B), (C, C), (6, 6), (80, 90)), Passage((C, C), (A, A), (17, 17), (53, 53)), Passage((C, C), (B, B)),
    Passage((B, B), (1, A - 1), (6, 6), (443, 443)), Passage((10, 900), (C + 3, C + 3), (6, 6), (80, 80))}),
    frozenset({B}), frozenset({C + 3}))
SEATED = "1100000 . 02:4e:0a:cb:00:02 . 10.203.0.2"


class Table:
    """A firewall in its own network namespace; ``nft`` is another tool there."""

    def __init__(self, thread: NamespaceThread, firewall: NftFirewall, runtime: Path) -> None:
        self._thread, self.firewall, self._runtime = thread, firewall, runtime

    async def next_run(self, *, flows: int = FLOWS) -> NftFirewall:
        """As the next daemon has it, beside the first one. Stop it, and leave what it has loaded."""
        seats = Seats(Plan(SUPERNET, 250))
        seats.add(0)
        firewall = NftFirewall(self._thread, SUPERNET, flows, seats=seats,
                               forwarding=Forwarding(self._runtime / "forwarding"), record=self._runtime / "ruleset")
        await firewall.start()
        return firewall

    async def nft(self, commands: str) -> str:
        def run() -> str:
            with Nft() as nft:
                return nft.run(commands)

        return await self._thread.run(run, Priority.CHECK)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[list[float]]:
        """When changes by others were noticed, so far."""
        watch = await self._thread.run(lambda: RulesetWatch(self.firewall.senders), Priority.CHECK)
        noticed: list[float] = []

        async def follow() -> None:
            async with aclosing(watch.changes()) as changes:
                async for _ in changes:
                    noticed.append(trio.current_time())  # noqa: PERF401  it never ends

        with closing(watch):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                yield noticed
                nursery.cancel_scope.cancel()


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[Table]:
    made: list[NamespaceThread] = []

    def begin() -> None:  # a thread that is started in a namespace is in it, and takes it for the host's
        libc.unshare(libc.CLONE_NEWNET)
        made.append(NamespaceThread().__enter__())

    starter = threading.Thread(target=begin)
    starter.start()
    starter.join()
    [thread] = made
    seats = Seats(Plan(SUPERNET, 250))
    seats.add(0)
    firewall = NftFirewall(thread, SUPERNET, FLOWS, forwarding=Forwarding(tmp_path / "forwarding"), seats=seats,
                           record=tmp_path / "ruleset")
    await firewall.start()
    yield Table(thread, firewall, tmp_path)
    await firewall.stop(remove=True)
    thread.__exit__(None, None, None)


async def test_rules_load_and_are_one_table(table: Table) -> None:
    assert await table.firewall.restore(ALL)
    listing = await table.nft("list ruleset")
    assert listing.count("table ") == 3
    for name in ("guard", "from_bridge", "publish_local", "from_host", "to_environment", "translate", "through",
                 "from_environment", "to_host"):
        assert f"chain {name} {{" in listing
    assert "tcp . 20000 : 10.203.0.2 . 3000" in listing
    assert "udp . 20000 : 10.203.0.2 . 53" in listing
    assert "10.203.0.4 . 61002" in listing


async def test_restoring_what_is_right_changes_nothing(table: Table) -> None:
    assert await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    before = await table.nft("list ruleset")
    for _ in range(3):
        assert not await table.firewall.restore(ALL)
    assert not await table.firewall.restore(list(reversed(ALL)))
    assert await table.nft("list ruleset") == before


@pytest.mark.parametrize("drift", [
    "flush ruleset", "delete table ip netnsd", "flush chain ip netnsd guard",
    "flush map ip netnsd published", "flush set ip netnsd owners",
    "delete element ip netnsd published { tcp . 20000 }", "delete element ip netnsd owners { 10.203.0.4 . 61002 }",
    "add element ip netnsd published { tcp . 29999 : 10.203.0.9 . 1 }",
    "add element ip netnsd owners { 10.203.0.2 . 61002 }",
    ("delete element ip netnsd published { tcp . 20000 };"
    "add element ip netnsd published { tcp . 20000 : 10.203.0.2 . 1 }"),
    "insert rule ip netnsd from_host accept", "insert rule ip netnsd to_environment accept",
    "flush chain ip netnsd from_bridge", "add rule ip netnsd to_host accept", "add chain ip netnsd strange",
    "add element ip netnsd allowed { 10.203.0.2 . 10.203.0.3 . tcp . 80 }", 'add element ip netnsd uplinks { "eth9" }',
    "flush set ip netnsd uplinks; flush chain ip netnsd through", "add element ip netnsd_bounds gateways { 10.9.9.9 }",
    "delete element ip netnsd guests { 10.203.99.5 . 61003 }", "add element ip netnsd guests { 10.203.0.2 . 61003 }",
    "flush set ip netnsd declared", "add element ip netnsd hosts { 10.203.0.2 }", "flush set ip netnsd lans",
    "add element ip netnsd offered { tcp . 20000 : 10.203.0.2 . 3000 }", "flush set ip netnsd confined",
    "flush set ip netnsd shielded", "flush set ip netnsd allowed",
    "add element ip netnsd allowed { 10.203.0.2 . 0.0.0.0/0 . 0-255 . 0-65535 }",
    "delete element ip netnsd allowed { 10.203.0.4 . 10.203.0.3 . 0-255 . 0-65535 }",
    "delete table bridge netnsd", "flush chain bridge netnsd seated", "flush set bridge netnsd seats",
    f"delete element bridge netnsd seats {{ {SEATED} }}",
    "add element bridge netnsd seats { 1100000 . 02:4e:0a:cb:00:02 . 10.203.0.3 }",
])
async def test_drift_is_seen_and_repaired(table: Table, drift: str) -> None:
    await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    before = await table.nft("list ruleset")
    await table.nft(drift)
    assert await table.firewall.restore(ALL), "the drift was not seen"
    assert await table.nft("list ruleset") == before
    assert not await table.firewall.restore(ALL)


@pytest.mark.parametrize("change", [
    "flush ruleset", "delete table ip netnsd", "flush chain ip netnsd through", "add chain ip netnsd strange",
    "insert rule ip netnsd from_host accept", "flush set ip netnsd owners",
    "delete element ip netnsd owners { 10.203.0.4 . 61002 }", "add element ip netnsd owners { 10.203.0.2 . 61002 }",
    "add set ip netnsd strange { type ipv4_addr; }", "flush set ip netnsd confined", "delete table bridge netnsd",
    "insert rule bridge netnsd seated accept", f"delete element bridge netnsd seats {{ {SEATED} }}",
])
async def test_what_others_change_in_the_table_is_noticed_at_once(table: Table, change: str) -> None:
    await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    async with table.watched() as noticed:
        await table.nft(change)
        with trio.fail_after(1):
            while not noticed:
                await trio.sleep(0.001)


async def test_what_we_change_ourselves_and_what_is_not_in_the_table_is_not_noticed(table: Table) -> None:
    await table.firewall.restore([WEB])
    async with table.watched() as noticed:
        await table.firewall.open(DATABASE)
        await table.firewall.close([DATABASE])
        await table.firewall.restore(ALL)
        await table.firewall.alter(WEB)
        await table.firewall.alter(replace(WEB, guests=(61009,)))
        await table.firewall.alter(WEB)
        await table.firewall.judge(TALKING)
        await table.firewall.judge(Judgement())
        assert not await table.firewall.repair()
        await table.nft("add table ip filter; add chain ip filter c; add table inet netnsd; delete table ip filter")
        await trio.sleep(0.05)
        assert noticed == []
        await table.nft("delete table ip netnsd")
        with trio.fail_after(1):
            while not noticed:
                await trio.sleep(0.001)
        assert await table.firewall.repair()
        assert not await table.firewall.check()


async def test_a_table_that_is_gone_is_put_back_with_thousands_of_elements(table: Table) -> None:
    many = [Opening(f"10.203.{n // 250}.{n % 250 + 2}", 61001, (Publication("tcp", 20000 + n, 80),))
            for n in range(3000)]
    await table.firewall.restore([*many, SHARED, OFFERED])
    await table.firewall.judge(TALKING)
    before = await table.nft("list ruleset")
    await table.nft("flush ruleset")
    assert await table.firewall.repair()
    assert sorted(await table.nft("list ruleset")) == sorted(before)
    assert not await table.firewall.check()
    await table.firewall.close(many)


async def test_opening_while_the_table_is_gone_puts_it_back_with_all_that_was_opened(table: Table) -> None:
    await table.firewall.restore([WEB])
    await table.nft("flush ruleset")
    await table.firewall.open(DATABASE)
    assert not await table.firewall.restore([WEB, DATABASE])


async def test_other_tables_are_left_alone(table: Table) -> None:
    await table.nft("add table ip filter; add chain ip filter c; add rule ip filter c accept")
    other = await table.nft("list table ip filter")
    await table.firewall.restore(ALL)
    await table.firewall.close(ALL)
    await table.firewall.restore([])
    assert await table.nft("list table ip filter") == other


async def test_opening_and_closing_are_each_others_undoing(table: Table) -> None:
    await table.firewall.restore([])
    before = await table.nft("list ruleset")
    for opening in ALL:
        await table.firewall.open(opening)
        await table.firewall.open(opening)  # again is fine
    assert not await table.firewall.restore(ALL)
    await table.firewall.close([DATABASE])
    assert not await table.firewall.restore([WEB, BARE, SHARED, HOSTED, OFFERED])
    await table.firewall.close(ALL)  # one is gone already
    await table.firewall.close(ALL)
    assert await table.nft("list ruleset") == before


async def test_opening_is_all_or_nothing(table: Table) -> None:
    await table.firewall.restore([DATABASE])
    before = await table.nft("list ruleset")
    with pytest.raises(KernelError):
        await table.firewall.open(Opening("10.203.0.9", 61001, (Publication("tcp", 20005, 80),
                                                               Publication("tcp", 20001, 80))))
    assert await table.nft("list ruleset") == before


async def test_closing_when_the_table_is_gone_is_fine(table: Table) -> None:
    await table.firewall.restore(ALL)
    await table.nft("flush ruleset")
    await table.firewall.close(ALL)


async def test_many_elements_are_restored(table: Table) -> None:
    many = [Opening(f"10.203.{n // 250}.{n % 250 + 2}", 61001, (Publication("tcp", 20000 + n, 80),))
            for n in range(2000)]
    await table.firewall.restore(many)
    assert not await table.firewall.restore(many)
    assert await table.firewall.restore(many[1:])
    await table.firewall.close(many)
    assert not await table.firewall.restore([])


@pytest.mark.parametrize("after", [
    replace(WEB, reach="host"), replace(WEB, reach="lan"), replace(WEB, guests=(61002, 61003)), WEB,
    replace(WEB, uid=61007),
])
@pytest.mark.parametrize("before", [WEB, replace(WEB, guests=(61002,)), replace(WEB, reach="lan", guests=(61005,))])
async def test_what_is_altered_is_as_if_opened_so(table: Table, before: Opening, after: Opening) -> None:
    await table.firewall.restore([before, DATABASE])
    await table.firewall.alter(after)
    assert not await table.firewall.check()
    assert not await table.firewall.restore([after, DATABASE])
    await table.firewall.close([after])
    assert not await table.firewall.restore([DATABASE])


async def test_altering_what_others_took_away_puts_it_right(table: Table) -> None:
    await table.firewall.restore(ALL)
    await table.nft("delete element ip netnsd guests { 10.203.99.5 . 61003 }")
    altered = replace(SHARED, guests=(61002,))
    await table.firewall.alter(altered)
    assert not await table.firewall.restore([WEB, DATABASE, BARE, altered, HOSTED, OFFERED])


async def test_a_judgement_takes_the_place_of_the_one_before(table: Table) -> None:
    await table.firewall.restore([WEB])
    bare = await table.nft("list ruleset")
    await table.firewall.judge(TALKING)
    listing = await table.nft("list ruleset")
    for element in ("10.203.0.2/31 . 10.203.0.4 . tcp . 80-90", "10.203.0.4 . 10.203.0.2 . udp . 53",
                    "10.203.0.4 . 10.203.0.3 . 0-255 . 0-65535"):
        assert element in listing
    # What overlaps with something of before, which goes in the same step.
    wider = Judgement(frozenset({Passage((A, C), (A, C), (6, 6), (1, 1000))}), frozenset({A}))
    await table.firewall.judge(wider)
    assert "10.203.0.2-10.203.0.4 . 10.203.0.2-10.203.0.4 . tcp . 1-1000" in await table.nft("list ruleset")
    assert not await table.firewall.check()
    await table.firewall.judge(Judgement())
    assert await table.nft("list ruleset") == bare


async def test_a_judgement_that_the_kernel_refuses_changes_nothing(table: Table) -> None:
    await table.firewall.restore([WEB])
    await table.firewall.judge(TALKING)
    before = await table.nft("list ruleset")
    overlapping = Judgement(frozenset({Passage((A, C), (A, A)), Passage((B, B), (A, A), (6, 6))}))
    with pytest.raises(KernelError):
        await table.firewall.judge(overlapping)
    assert await table.nft("list ruleset") == before
    assert not await table.firewall.check()


async def test_a_judgement_outlives_a_flush_and_a_reload(table: Table) -> None:
    await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    before = await table.nft("list ruleset")
    await table.nft("flush ruleset")
    await table.firewall.judge(replace(TALKING, confined=frozenset()))
    await table.firewall.judge(TALKING)
    assert sorted(await table.nft("list ruleset")) == sorted(before)


async def test_differences_name_elements_of_every_kind(table: Table) -> None:
    await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    assert await table.firewall.differences(ALL, []) == ([], [])
    await table.nft(f"delete element bridge netnsd seats {{ {SEATED} }}; flush set ip netnsd confined")
    await table.nft("add element ip netnsd guests { 10.203.0.2 . 61003 }")
    assert await table.firewall.differences(ALL, []) == (
        ["confined { 10.203.0.3 }", f"seats {{ {SEATED} }}"], ["guests { 10.203.0.2 . 61003 }"])


@pytest.mark.parametrize("count", [60, 6000])
async def test_many_passages_are_replaced_in_one_step(table: Table, count: int) -> None:
    """Their messages take more than a socket takes by default, and deleting them one by one minutes."""
    def many(first_port: int) -> Judgement:
        return Judgement(frozenset(
            Passage((A + 2 * row, A + 2 * row), (A + 2 * column, A + 2 * column), (6, 6), (first_port, first_port + 9))
            for row in range(60) for column in range(count // 60)), frozenset({A}))

    await table.firewall.restore([WEB])
    bare = await table.nft("list ruleset")
    async with table.watched() as noticed:
        for first_port in (1, 5):  # these overlap with those before, which must go in the same step
            await table.firewall.judge(many(first_port))
        assert not await table.firewall.check()
        await table.firewall.judge(Judgement())
        assert noticed == [], "our own changes are nobody else's"
    assert sorted(await table.nft("list ruleset")) == sorted(bare)


async def test_many_passages_that_the_kernel_refuses_change_nothing(table: Table) -> None:
    await table.firewall.restore([WEB])
    many = frozenset(Passage((A, A), (B, B), (6, 6), (port, port)) for port in range(1, 400, 2))
    await table.firewall.judge(Judgement(many))
    before = await table.nft("list ruleset")
    with pytest.raises(KernelError):
        await table.firewall.judge(Judgement(frozenset({Passage((A, C), (A, A)), Passage((B, B), (A, A), (6, 6))})))
    assert await table.nft("list ruleset") == before
    assert not await table.firewall.check()


async def test_before_the_first_load_a_judgement_is_only_known(table: Table) -> None:
    """A daemon before may have left another, with which it would overlap."""
    await table.firewall.judge(TALKING)
    assert await table.nft("list ruleset") == ""
    await table.firewall.restore([WEB])
    assert "10.203.0.2/31 . 10.203.0.4 . tcp . 80-90" in await table.nft("list ruleset")


async def test_what_an_earlier_run_has_loaded_stays_where_it_is_right(table: Table) -> None:
    """Loaded again it would refuse for an instant what policies let, and forget how much each has."""
    await table.firewall.restore(ALL)
    await table.firewall.judge(TALKING)
    for openings, judgement, is_right in ((ALL, TALKING, True), (ALL, Judgement(), False), ([WEB], TALKING, False),
                                          (ALL, TALKING, False)):
        await table.nft("add element ip netnsd_bounds seekers { 10.203.0.2 }")
        next_run = await table.next_run()
        await next_run.judge(judgement)
        assert await next_run.restore(openings) is not is_right
        assert ("expires" in await table.nft("list set ip netnsd_bounds seekers")) is is_right
        assert not await next_run.check()
        await next_run.stop(remove=False)
    again = await table.next_run()
    await again.judge(TALKING)
    await table.nft("insert rule ip netnsd to_environment accept")
    assert await again.restore(ALL)
    await again.stop(remove=False)


async def test_rules_of_another_release_are_loaded_anew(table: Table) -> None:
    await table.firewall.restore(ALL)
    other = await table.next_run(flows=65)
    assert await other.restore(ALL)
    assert "over 65" in await table.nft("list ruleset")
    await other.stop(remove=False)


async def test_what_has_been_counted_outlives_a_judgement_that_loads_all_anew(table: Table) -> None:
    many = Judgement(frozenset(Passage((A, A), (C, C), (6, 6), (port, port)) for port in range(1, 2000, 2)))
    await table.firewall.restore([WEB])
    await table.firewall.judge(many)
    await table.nft("add element ip netnsd_bounds seekers { 10.203.0.2 }")
    await table.firewall.judge(Judgement())
    assert "10.203.0.2 expires" in await table.nft("list set ip netnsd_bounds seekers")
    assert not await table.firewall.check()
