"""The promises of ``core.interfaces``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from netnsd import wire
from netnsd.core.addressing import Slot
from netnsd.core.interfaces import Exited, Inspection, Listener, Network, Opening, Publication
from netnsd.core.reconcile import faults
from netnsd.errors import KernelError, LaunchFailed, NetnsLost, NetnsTaken
from netnsd.kernel import exit_info
from tests.conformance.conftest import IS_REAL
from tests.conformance.subjects import PLAN, Subjects, environment

WEB, DB, FAR = PLAN.slot(0), PLAN.slot(1), PLAN.slot(251)
OPEN_WEB = Opening(WEB.address, 61001, (Publication("tcp", 20000, 3000), Publication("udp", 20000, 53)))
OPEN_DB = Opening(DB.address, 61002, (Publication("tcp", 20001, 5432),))


async def is_whole(network: Network, slot: Slot, name: str) -> bool:
    return faults(environment(slot, name), await network.survey()) == ()


# -- Network ----------------------------------------------------------------------------------------------------


async def test_what_is_wired_is_there_and_what_is_unwired_is_not(subjects: Subjects) -> None:
    network = subjects.network
    for slot, name in ((WEB, "web"), (DB, "db"), (FAR, "web.alice")):
        assert not network.is_taken(name)
        await network.wire(slot, name)
        assert network.is_taken(name)
        assert await is_whole(network, slot, name)
        assert not await is_whole(network, slot, "other")
    assert set(await network.survey()) == {0, 1, 251}
    await network.unwire([(WEB, "web"), (FAR, "web.alice")])
    assert set(await network.survey()) == {1}
    assert not network.is_taken("web")
    assert not await is_whole(network, WEB, "web")
    assert await is_whole(network, DB, "db")


async def test_unwiring_again_and_unwiring_nothing_are_fine(subjects: Subjects) -> None:
    await subjects.network.wire(WEB, "web")
    for _ in range(2):
        await subjects.network.unwire([(WEB, "web"), (DB, "never-was")])
    await subjects.network.unwire([])
    assert set(await subjects.network.survey()) == set()


async def test_a_slot_can_be_wired_again_at_once_under_another_name(subjects: Subjects) -> None:
    for number in range(5):
        await subjects.network.wire(WEB, f"e{number}")
        await subjects.network.unwire([(WEB, f"e{number}")])
    assert set(await subjects.network.survey()) == set()


async def test_a_foreign_namespace_is_taken_refused_and_untouched(subjects: Subjects) -> None:
    await subjects.make_foreign("theirs")
    assert subjects.network.is_taken("theirs")
    with pytest.raises(NetnsTaken):
        await subjects.network.wire(WEB, "theirs")
    assert set(await subjects.network.survey()) == set()
    await subjects.network.unwire([(WEB, "theirs")])
    assert subjects.network.is_taken("theirs")


async def test_an_orphan_is_unwired_without_its_name(subjects: Subjects) -> None:
    await subjects.network.wire(WEB, "web")
    await subjects.network.unwire([(WEB, "")])
    assert set(await subjects.network.survey()) == set()
    assert not subjects.network.is_taken("web")


async def test_listeners_are_of_the_slot_and_furnishing_may_be_done_again(subjects: Subjects) -> None:
    for slot, name in ((WEB, "web"), (DB, "db")):
        await subjects.network.wire(slot, name)
        for _ in range(2):
            await subjects.network.furnish(slot, OPEN_WEB.publications)
    await subjects.listen(WEB, "tcp", 80)
    await subjects.listen(WEB, "udp", 53)
    assert await subjects.network.listeners(WEB) == {Listener("tcp", "0.0.0.0", 80), Listener("udp", "0.0.0.0", 53)}
    assert await subjects.network.listeners(DB) == frozenset()


async def test_what_is_not_wired_cannot_be_furnished_or_asked(subjects: Subjects) -> None:
    with pytest.raises(KernelError):
        await subjects.network.furnish(WEB, ())
    with pytest.raises(KernelError):
        await subjects.network.listeners(WEB)


async def test_a_prepared_slot_has_no_name_until_it_is_claimed_and_is_whole_then(subjects: Subjects) -> None:
    network = subjects.network
    for slot in (WEB, DB, FAR):
        await network.prepare(slot)
    assert set(await network.survey()) == {0, 1, 251}
    assert not network.is_taken("web")
    assert not await is_whole(network, WEB, "web")
    await network.claim(WEB, "web")
    assert network.is_taken("web")
    assert await is_whole(network, WEB, "web")
    assert not await is_whole(network, DB, "web")
    await network.furnish(WEB, OPEN_WEB.publications)
    await subjects.listen(WEB, "tcp", 80)
    assert await network.listeners(WEB) == {Listener("tcp", "0.0.0.0", 80)}
    assert await network.listeners(DB) == frozenset()
    await network.unwire([(WEB, "web"), (DB, None)])
    assert not network.is_taken("web")
    assert set(await network.survey()) == {251}
    await network.unwire([(FAR, None), (FAR, None)])
    assert set(await network.survey()) == set()


async def test_what_a_slot_lost_is_mended_and_what_it_has_is_let_be(subjects: Subjects) -> None:
    network = subjects.network
    await network.wire(WEB, "web")
    await network.wire(DB, "db")
    await subjects.listen(WEB, "tcp", 80)
    assert await network.mend(WEB, "web") == []
    for lose, part in ((subjects.lose_link, "link"), (subjects.lose_name, "name"), (subjects.lose_pin, "pin")):
        await lose(WEB)
        lacking = faults(environment(WEB, "web"), await network.survey())
        assert part in lacking
        assert await network.mend(WEB, "web") == [part]
        assert await is_whole(network, WEB, "web")
        assert await is_whole(network, DB, "db")
        assert await network.listeners(WEB) == {Listener("tcp", "0.0.0.0", 80)}, "it is the same namespace"
    await subjects.lose_link(WEB)
    await subjects.lose_name(WEB)
    assert set(await network.mend(WEB, "web")) == {"link", "name"}
    assert await is_whole(network, WEB, "web")


async def test_a_slot_to_which_nothing_leads_is_lost(subjects: Subjects) -> None:
    with pytest.raises(NetnsLost):
        await subjects.network.mend(WEB, "web")
    await subjects.network.wire(WEB, "web")
    await subjects.lose_pin(WEB)
    await subjects.lose_name(WEB)
    with pytest.raises(NetnsLost):
        await subjects.network.mend(WEB, "web")


async def test_a_name_that_became_somebody_elses_is_let_be(subjects: Subjects) -> None:
    await subjects.network.wire(WEB, "web")
    await subjects.lose_name(WEB)
    await subjects.make_foreign("web")
    with pytest.raises(NetnsTaken):
        await subjects.network.mend(WEB, "web")
    assert faults(environment(WEB, "web"), await subjects.network.survey()) == ("name",)
    await subjects.network.unwire([(WEB, "web")])
    assert subjects.network.is_taken("web")


async def test_bridges_are_mended_and_looked_at(subjects: Subjects) -> None:
    network = subjects.network
    await network.wire(WEB, "web")
    assert await network.mend_bridges([WEB.bridge]) == []
    await subjects.break_bridge(WEB)
    wrong = await network.mend_bridges([WEB.bridge], look=True)
    assert wrong
    assert await network.mend_bridges([WEB.bridge]) == wrong
    assert await network.mend_bridges([WEB.bridge], look=True) == []
    await network.mend(WEB, "web")
    assert await is_whole(network, WEB, "web")


async def test_nobody_is_in_a_slot_in_which_nothing_was_started(subjects: Subjects) -> None:
    await subjects.network.wire(WEB, "web")
    assert await subjects.network.inspect() == Inspection({}, frozenset())


async def test_a_slot_can_be_prepared_wired_and_prepared_again(subjects: Subjects) -> None:
    for number in range(3):
        await subjects.network.prepare(WEB)
        await subjects.network.unwire([(WEB, None)])
        await subjects.network.wire(WEB, f"e{number}")
        await subjects.network.unwire([(WEB, f"e{number}")])
        await subjects.network.prepare(WEB)
        await subjects.network.claim(WEB, f"e{number}")
        await subjects.network.unwire([(WEB, f"e{number}")])
    assert set(await subjects.network.survey()) == set()


async def test_a_prepared_slot_can_be_furnished_with_ever_more_publications(subjects: Subjects) -> None:
    await subjects.network.prepare(WEB)
    await subjects.network.claim(WEB, "web")
    for publications in ((), OPEN_WEB.publications[:1], OPEN_WEB.publications, OPEN_WEB.publications, ()):
        await subjects.network.furnish(WEB, publications)
    assert await is_whole(subjects.network, WEB, "web")


async def test_a_claim_of_a_foreign_name_is_refused_and_the_slot_is_as_it_was(subjects: Subjects) -> None:
    await subjects.make_foreign("theirs")
    await subjects.network.prepare(WEB)
    for _ in range(2):
        with pytest.raises(NetnsTaken):
            await subjects.network.claim(WEB, "theirs")
    await subjects.network.wire(DB, "db")
    with pytest.raises(NetnsTaken):
        await subjects.network.claim(WEB, "db")
    await subjects.network.claim(WEB, "web")
    assert await is_whole(subjects.network, WEB, "web")
    assert await is_whole(subjects.network, DB, "db")
    await subjects.network.unname(WEB, "web")
    await subjects.network.unwire([(WEB, "theirs")])  # a record that was written before the claim
    assert subjects.network.is_taken("theirs")


async def test_a_claim_of_a_slot_whose_link_is_gone_is_an_error_and_gives_no_name(subjects: Subjects) -> None:
    await subjects.network.prepare(WEB)
    await subjects.lose_link(WEB)
    with pytest.raises(KernelError):
        await subjects.network.claim(WEB, "web")
    assert not subjects.network.is_taken("web")
    with pytest.raises(KernelError):
        await subjects.network.claim(DB, "web")
    assert not subjects.network.is_taken("web")
    await subjects.network.unwire([(WEB, None)])
    assert set(await subjects.network.survey()) == set()


async def test_a_slot_may_have_two_names_until_one_is_taken_back(subjects: Subjects) -> None:
    network = subjects.network
    await network.wire(WEB, "old")
    await network.claim(WEB, "new")
    assert network.is_taken("old")
    assert network.is_taken("new")
    assert await is_whole(network, WEB, "old")
    assert await is_whole(network, WEB, "new")
    for _ in range(2):
        await network.unname(WEB, "old")
        assert not network.is_taken("old")
        assert not await is_whole(network, WEB, "old")
        assert await is_whole(network, WEB, "new")
    await network.claim(WEB, "newer")
    await network.unname(WEB, "newer")
    assert await is_whole(network, WEB, "new"), "the other one may be taken back, too"
    assert not network.is_taken("newer")
    await network.unwire([(WEB, "new")])
    assert not network.is_taken("new")


async def test_a_name_that_is_not_the_slots_is_not_taken_back(subjects: Subjects) -> None:
    await subjects.make_foreign("theirs")
    await subjects.network.wire(WEB, "web")
    await subjects.network.wire(DB, "db")
    for name in ("theirs", "db", "never-was"):
        await subjects.network.unname(WEB, name)
    await subjects.network.unname(FAR, "db")
    assert subjects.network.is_taken("theirs")
    assert await is_whole(subjects.network, DB, "db")
    assert await is_whole(subjects.network, WEB, "web")


async def test_tidying_leaves_each_slot_the_one_name(subjects: Subjects) -> None:
    network = subjects.network
    await subjects.make_foreign("theirs")
    for slot, names in ((WEB, ("a", "b", "c")), (DB, ("d",)), (FAR, ("e", "f"))):
        await network.wire(slot, names[0])
        for name in names[1:]:
            await network.claim(slot, name)
    for _ in range(2):
        await network.tidy([(WEB, "b"), (DB, "d"), (PLAN.slot(7), "theirs"), (PLAN.slot(8), "gone")])
        assert [name for name in "abcdef" if network.is_taken(name)] == ["b", "d", "e", "f"], "far was not named"
        assert await is_whole(network, WEB, "b")
        assert await is_whole(network, DB, "d")
    await network.tidy([])
    assert network.is_taken("theirs")
    await network.tidy([(FAR, "lost")])
    assert not network.is_taken("e")
    assert not network.is_taken("f")
    assert set(await network.survey()) == {0, 1, 251}
    await network.unwire([(WEB, "b"), (DB, "d"), (FAR, "lost")])
    assert set(await network.survey()) == set()


# -- Firewall ---------------------------------------------------------------------------------------------------


async def test_rules_are_restored_once_and_drift_is_seen(subjects: Subjects) -> None:
    firewall = subjects.firewall
    await firewall.restore([])
    assert not await firewall.restore([])
    await firewall.open(OPEN_WEB)
    await firewall.open(OPEN_WEB)
    assert not await firewall.restore([OPEN_WEB])
    assert await firewall.restore([OPEN_WEB, OPEN_DB])
    await subjects.drift()
    assert await firewall.restore([OPEN_WEB, OPEN_DB])
    assert not await firewall.restore([OPEN_DB, OPEN_WEB])
    await firewall.close([OPEN_WEB])
    assert await firewall.restore([OPEN_WEB, OPEN_DB])
    for _ in range(2):
        await firewall.close([OPEN_WEB, OPEN_DB])
    assert not await firewall.restore([])


async def test_opening_what_another_has_is_refused_whole(subjects: Subjects) -> None:
    await subjects.firewall.restore([OPEN_DB])
    with pytest.raises(KernelError):
        await subjects.firewall.open(Opening(WEB.address, 61001, (Publication("tcp", 20005, 1),
                                                                 Publication("tcp", 20001, 1))))
    assert not await subjects.firewall.restore([OPEN_DB])


# -- Cgroups ----------------------------------------------------------------------------------------------------


async def test_groups_come_with_parents_and_go_with_what_is_below(subjects: Subjects) -> None:
    for _ in range(2):
        await subjects.cgroups.create("nd0/s-main")
    await subjects.cgroups.create("nd1")
    assert subjects.cgroups.observe() == ["nd0", "nd1"]
    for _ in range(2):
        await subjects.cgroups.remove("nd0")
    assert subjects.cgroups.observe() == ["nd1"]


async def test_a_group_that_is_not_there_is_empty(subjects: Subjects) -> None:
    assert subjects.cgroups.pids("nd7/none") == []
    assert not subjects.cgroups.populated("nd7/none")
    subjects.cgroups.signal("nd7/none", 15)
    with trio.fail_after(2):
        await subjects.cgroups.empty("nd7/none")


async def test_the_code_of_a_process_is_told_by_its_group_to_who_asked_before_its_end(subjects: Subjects) -> None:
    async with place(subjects) as log:
        launch = subjects.launch(WEB, "web", "exec sleep 60", log)
        pid = await subjects.processes.launch(launch)
        await subjects.cgroups.create("nd1")
        with trio.fail_after(5):
            assert await subjects.cgroups.exit_code("nd1", pid) is None, "it is no process of that group"
            async with trio.open_nursery() as nursery:
                told: list[int | None] = []

                async def ask() -> None:
                    told.append(await subjects.cgroups.exit_code("nd0/s-main", pid))

                nursery.start_soon(ask)
                await trio.sleep(0.1)
                assert told == []
                await subjects.end(launch, pid)
            assert told == [137 if not IS_REAL or exit_info.is_known() else None]
            assert await subjects.cgroups.exit_code("nd0/s-main", pid) is None, "it is no process of any group"


async def test_a_limit_may_be_set_again_and_goes_with_its_group(subjects: Subjects) -> None:
    subjects.cgroups.require(wire.Resources())
    assert subjects.cgroups.limit("nd0", wire.Resources()) == ()
    subjects.cgroups.require(wire.Resources(pids=3))
    async with place(subjects) as log:
        for _ in range(2):
            joins = subjects.cgroups.limit("nd0", wire.Resources(pids=3))
        launch = replace(subjects.launch(WEB, "web", "exec sleep 60", log), joins=joins)
        pid = await subjects.processes.launch(launch)
        if IS_REAL:
            groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii")  # noqa: ASYNC240  # the kernel's
            assert all(group.partition("/pids/")[2] in groups for group in joins)
        assert subjects.cgroups.observe() == ["nd0"]
        with trio.fail_after(5):
            await subjects.cgroups.remove("nd0")
        assert subjects.cgroups.observe() == []
        assert not any(os.path.exists(group) for group in joins)  # noqa: ASYNC240  # in memory


# -- Probes -----------------------------------------------------------------------------------------------------


async def test_a_look_from_the_host_finds_what_listens_inside(subjects: Subjects) -> None:
    await subjects.network.wire(WEB, "web")
    await subjects.network.furnish(WEB, ())
    await subjects.firewall.open(OPEN_WEB)
    await subjects.listen(WEB, "tcp", 3000)
    with trio.fail_after(5):
        assert await subjects.probes.tcp(WEB.address, 3000) == ""
        assert await subjects.probes.tcp(WEB.address, 3001) == "port 3001: Connection refused"
        assert await subjects.probes.http(WEB.address, 3001, "/") == "port 3001: Connection refused"


# -- Processes --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def place(subjects: Subjects) -> AsyncIterator[int]:
    """A wired slot with a cgroup; yields a log."""
    await subjects.network.wire(WEB, "web")
    await subjects.cgroups.create("nd0/s-main")
    log = os.open("/dev/null", os.O_WRONLY)
    yield log
    os.close(log)


async def ended(subjects: Subjects, launch_id: str) -> int | None:
    with trio.fail_after(5):
        while True:
            exited = await subjects.processes.exits.receive()
            assert isinstance(exited, Exited)
            if exited.launch_id == launch_id:
                return exited.code


async def test_a_launch_runs_in_its_cgroup_and_its_end_is_told_until_acknowledged(subjects: Subjects) -> None:
    async with place(subjects) as log:
        launch = subjects.launch(WEB, "web", "exec sleep 60", log)
        pid = await subjects.processes.launch(launch)
        with trio.fail_after(5):  # what helped it to start goes in a moment
            while not subjects.cgroups.pids("nd0") == subjects.cgroups.pids("nd0/s-main") == [pid]:
                await trio.lowlevel.checkpoint()
        running, _ = await subjects.processes.known()
        assert [(r.launch_id, r.pid) for r in running] == [(launch.launch_id, pid)]
        await subjects.end(launch, pid)
        assert await ended(subjects, launch.launch_id) == 137
        with trio.fail_after(5):
            await subjects.cgroups.empty("nd0")
        assert not subjects.cgroups.populated("nd0")
        running, exits = await subjects.processes.known()
        assert (list(running), list(exits)) == ([], [Exited(launch.launch_id, 137)])
        subjects.processes.acknowledge(launch.launch_id)
        assert [list(part) for part in await subjects.processes.known()] == [[], []]


async def test_removing_a_cgroup_ends_what_lives_in_it(subjects: Subjects) -> None:
    async with place(subjects) as log:
        launch = subjects.launch(WEB, "web", "trap '' TERM; sleep 60 & wait", log)
        await subjects.processes.launch(launch)
        with trio.fail_after(5):
            await subjects.cgroups.remove("nd0")
        assert await ended(subjects, launch.launch_id) == 137
        assert subjects.cgroups.observe() == []


async def test_what_cannot_be_started_names_its_stage_and_leaves_nothing(subjects: Subjects) -> None:
    async with place(subjects) as log:
        with pytest.raises(LaunchFailed) as caught:
            await subjects.processes.launch(subjects.launch(WEB, "web", "missing", log))
        assert (caught.value.details["stage"], caught.value.details["errno"]) == ("exec", "ENOENT")
        await subjects.cgroups.remove("nd0/s-main")
        with pytest.raises(LaunchFailed) as caught:
            await subjects.processes.launch(subjects.launch(WEB, "web", "exec sleep 60", log))
        assert caught.value.details["stage"] == "cgroup"
        assert [list(part) for part in await subjects.processes.known()] == [[], []]


# -- Files and Store --------------------------------------------------------------------------------------------


async def test_files_come_and_go(subjects: Subjects) -> None:
    one, two = environment(WEB, "web"), environment(DB, "db")
    assert subjects.files.observe() == set()
    hosts, _ = subjects.files.furnish(one)
    assert subjects.files.furnish(one)[0] == hosts
    log = subjects.files.open_log(two, "main")
    assert os.write(log, b"x") == 1
    os.close(log)
    assert subjects.files.log_path(two.id, "main") != subjects.files.log_path(two.id, "other")
    assert subjects.files.observe() == {one.id, two.id}
    for _ in range(2):
        subjects.files.remove(one.id)
    assert subjects.files.observe() == {two.id}
    subjects.files.remove(two.id)
    assert subjects.files.observe() == set()


async def test_rows_are_written_whole_or_not(subjects: Subjects) -> None:
    with subjects.store.transaction():
        subjects.store.add(environment(WEB, "web"))
    with pytest.raises(RuntimeError), subjects.store.transaction():  # noqa: PT012
        subjects.store.delete("id-web")
        raise RuntimeError
    assert subjects.store.environments() == [environment(WEB, "web")]
