"""The host's table, in a network namespace that is thrown away: it loads, and every drift is seen and repaired."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path

import pytest
import trio

from netnsd.core.interfaces import Opening, Publication
from netnsd.errors import KernelError
from netnsd.kernel import libc
from netnsd.kernel.bridges import Forwarding
from netnsd.kernel.firewall import TABLE, NftFirewall
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.nft import Nft
from netnsd.kernel.ruleset_watch import RulesetWatch

SUPERNET = "10.203.0.0/16"
WEB = Opening("10.203.0.2", 61001, (Publication("tcp", 20000, 3000), Publication("udp", 20000, 53)))
DATABASE = Opening("10.203.0.3", 61002, (Publication("tcp", 20001, 5432),))
BARE = Opening("10.203.0.4", 61002, ())
ALL = [WEB, DATABASE, BARE]


class Table:
    """A firewall in its own network namespace; ``nft`` is another tool there."""

    def __init__(self, thread: NamespaceThread, firewall: NftFirewall) -> None:
        self._thread, self.firewall = thread, firewall

    async def nft(self, commands: str) -> str:
        def run() -> str:
            with Nft() as nft:
                return nft.run(commands)

        return await self._thread.run(run, Priority.CHECK)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[list[float]]:
        """When changes by others were noticed, so far."""
        watch = await self._thread.run(lambda: RulesetWatch(TABLE, self.firewall.senders), Priority.CHECK)
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
    firewall = NftFirewall(thread, SUPERNET, 64, Forwarding(tmp_path / "forwarding"))
    await firewall.start()
    yield Table(thread, firewall)
    await firewall.stop(remove=True)
    thread.__exit__(None, None, None)


async def test_rules_load_and_are_one_table(table: Table) -> None:
    assert await table.firewall.restore(ALL)
    listing = await table.nft("list ruleset")
    assert listing.count("table ") == 1
    for name in ("guard", "from_bridge", "publish_local", "from_host", "to_environment", "translate", "through",
                 "from_environment", "to_host"):
        assert f"chain {name} {{" in listing
    assert "tcp . 20000 : 10.203.0.2 . 3000" in listing
    assert "udp . 20000 : 10.203.0.2 . 53" in listing
    assert "10.203.0.4 . 61002" in listing


async def test_restoring_what_is_right_changes_nothing(table: Table) -> None:
    assert await table.firewall.restore(ALL)
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
    "add element ip netnsd pairs { 10.203.0.2 . 10.203.0.3 }", 'add element ip netnsd uplinks { "eth9" }',
    "flush set ip netnsd uplinks; flush chain ip netnsd through",
])
async def test_drift_is_seen_and_repaired(table: Table, drift: str) -> None:
    await table.firewall.restore(ALL)
    before = await table.nft("list ruleset")
    await table.nft(drift)
    assert await table.firewall.restore(ALL), "the drift was not seen"
    assert await table.nft("list ruleset") == before
    assert not await table.firewall.restore(ALL)


@pytest.mark.parametrize("change", [
    "flush ruleset", "delete table ip netnsd", "flush chain ip netnsd through", "add chain ip netnsd strange",
    "insert rule ip netnsd from_host accept", "flush set ip netnsd owners",
    "delete element ip netnsd owners { 10.203.0.4 . 61002 }", "add element ip netnsd owners { 10.203.0.2 . 61002 }",
    "add set ip netnsd strange { type ipv4_addr; }",
])
async def test_what_others_change_in_the_table_is_noticed_at_once(table: Table, change: str) -> None:
    await table.firewall.restore(ALL)
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
    await table.firewall.restore(many)
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
    assert not await table.firewall.restore([WEB, BARE])
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
