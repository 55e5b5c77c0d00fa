"""A limit on processes holds, whatever is tried inside, and leaves nothing: cgroup v1 for real, v2's decisions."""

# ruff: noqa: ASYNC221, ASYNC240
# Processes and files of tests: nothing else waits meanwhile.

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from netnsd import wire
from netnsd.errors import KernelError, LimitUnavailable
from netnsd.kernel import limits
from netnsd.kernel.cgroup import CgroupTree
from netnsd.kernel.limits import Limits
from tests.harness import cgroups, wait_until

V1 = limits._find_v1("pids")
needs_v1 = pytest.mark.skipif(V1 is None, reason="needs a v1 hierarchy with pids")
AS_USER = ("setpriv", "--reuid", "12345", "--clear-groups")
# As many children as it can get, of which none ends.
BOMB = "i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; wait"


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    made = CgroupTree(f"netnsd-test-{os.getpid()}/nested")
    yield made
    made.close()
    for root in (made.root, *made._limits.old_roots):
        cgroups.kill(root)
        wait_until(partial(cgroups.remove, root), what="the end of what a failed test left")
    os.rmdir(os.path.dirname(made.root))


def groups_of_v1(tree: CgroupTree) -> list[str]:
    return [path for root in tree._limits.old_roots for path, _, _ in os.walk(root)]


def start(tree: CgroupTree, joins: tuple[str, ...], script: str) -> subprocess.Popen[bytes]:
    """As the launcher's child does."""
    enter = "".join(f"echo 0 >{group}/cgroup.procs; " for group in (tree.path("nd7/s-main"), *joins))
    return subprocess.Popen(["sh", "-c", f"{enter} exec {' '.join(AS_USER)} sh -c '{script}'"],
                            stderr=subprocess.DEVNULL)


@needs_v1
async def test_a_group_of_v1_holds_no_more_than_that_and_goes_with_ours(tree: CgroupTree) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(tree.run)
        await tree.create("nd7/s-main")
        tree.require(wire.Resources(pids=20))
        for _ in range(2):
            joins = tree.limit("nd7", wire.Resources(pids=20))
        assert len(joins) == 1
        assert tree.observe() == ["nd7"]
        process = start(tree, joins, BOMB)
        wait_until(lambda: len(tree.pids("nd7")) >= 19, what="the bomb")
        await trio.sleep(0.1)
        assert len(tree.pids("nd7")) <= 20
        for path, value in ((f"{joins[0]}/cgroup.procs", "0"), (f"{joins[0]}/pids.max", "max"),
                            (f"{os.path.dirname(joins[0])}/cgroup.procs", "0")):
            done = subprocess.run([*AS_USER, "sh", "-c", f"echo {value} >{path}"], capture_output=True, check=False)
            assert done.returncode != 0, path
        with trio.fail_after(5):
            await tree.remove("nd7")
        process.wait(timeout=5)
        assert groups_of_v1(tree) == []
        nursery.cancel_scope.cancel()


@needs_v1
async def test_what_left_the_group_of_v2_is_ended_by_the_group_of_v1(tree: CgroupTree) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(tree.run)
        await tree.create("nd7/s-main")
        await tree.create("nd8")
        joins = tree.limit("nd7", wire.Resources(pids=20))
        process = start(tree, joins, "exec sleep 1000")
        wait_until(lambda: process.pid in tree.pids("nd7"), what="the process")
        Path(tree.path("nd8/cgroup.procs")).write_text(str(process.pid))
        with trio.fail_after(5):
            await tree.remove("nd7")
        assert process.wait(timeout=5) == -9
        await tree.remove("nd8")
        nursery.cancel_scope.cancel()


@needs_v1
async def test_a_group_of_v1_that_was_left_alone_is_observed_and_removed(tree: CgroupTree) -> None:
    tree.limit("nd9", wire.Resources(pids=1))
    os.makedirs(tree.root, exist_ok=True)
    assert tree.observe() == ["nd9"]
    await tree.remove("nd9")
    assert tree.observe() == []
    assert groups_of_v1(tree) == []


@needs_v1
async def test_a_root_of_v1_that_was_left_empty_goes_with_the_next_removal(tree: CgroupTree) -> None:
    tree.limit("nd9", wire.Resources(pids=1))
    os.rmdir(f"{tree._limits._old['pids']}/nd9")
    await tree.remove("nd8")
    assert groups_of_v1(tree) == []


def test_who_asks_for_nothing_pays_for_nothing(tree: CgroupTree, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(tree.root)
    monkeypatch.setattr(tree, "_limits", None)
    tree.require(wire.Resources())
    assert tree.limit("nd7", wire.Resources()) == ()
    monkeypatch.undo()


# -- cgroup v2, in files that look like it ------------------------------------------------------------------------


ALL = {"memory": 64 << 20, "cpu": 1.5, "pids": 64}
# What is to be in which file.
IN_V2 = {"memory.max": "67108864", "memory.swap.max": "0", "cpu.max": "150000 100000", "pids.max": "64"}
IN_V1 = {"memory.limit_in_bytes": "67108864", "memory.memsw.limit_in_bytes": "67108864", "cpu.cfs_period_us": "100000",
         "cpu.cfs_quota_us": "150000", "pids.max": "64"}


def control_group(directory: Path, controllers: str = "cpu memory pids", handed_on: str = "") -> Path:
    directory.mkdir()
    (directory / "cgroup.controllers").write_text(controllers)
    (directory / "cgroup.subtree_control").write_text(handed_on)
    return directory


def limited_group(directory: Path, files: Iterable[str]) -> Path:
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_text("")
    return directory


def written(directory: Path, files: Iterable[str]) -> dict[str, str]:
    return {file: (directory / file).read_text() for file in files}


def limited(mount: Path, root: Path, monkeypatch: pytest.MonkeyPatch, v1: str | None) -> Limits:
    monkeypatch.setattr(limits, "_find_v1", lambda _controller: v1)
    return Limits(str(root), str(mount))


@pytest.mark.parametrize("kind", list(ALL))
def test_v2_is_used_where_it_is_handed_on_and_made_to_be_below_a_unit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mount = control_group(tmp_path / "mount")
    unit = control_group(mount / "netnsd-environments.service")
    root = control_group(unit / "netnsd")
    group = limited_group(root / "nd7", IN_V2)
    limit = limited(mount, root, monkeypatch, str(tmp_path / "v1"))
    limit.require({kind: ALL[kind]})
    assert limit.apply("nd7", {kind: ALL[kind]}) == ()
    assert written(group, IN_V2) == {file: value if file.startswith(kind) else "" for file, value in IN_V2.items()}
    assert (unit / "cgroup.subtree_control").read_text() == f"+{kind}"
    assert (root / "cgroup.subtree_control").read_text() == f"+{kind}"
    assert (mount / "cgroup.subtree_control").read_text() == "", "the host's own is the host's"
    assert limit.observe() == []
    assert limit.memory_group("nd7") == (str(group), False)


def test_where_v2_has_none_v1_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", controllers="io")
    group = limited_group(tmp_path / "v1" / "netnsd" / "nd7", IN_V1)
    limit = limited(mount, root, monkeypatch, str(tmp_path / "v1"))
    limit.require(ALL)
    assert limit.apply("nd7", ALL) == (str(group),), "once, though it is of three controllers"
    assert written(group, IN_V1) == IN_V1
    assert (mount / "cgroup.subtree_control").read_text() == "", "the host's own is the host's"
    assert limit.observe() == ["nd7"]
    assert limit.memory_group("nd7") == (str(group), True)


def test_each_limit_is_where_its_controller_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", controllers="cpu", handed_on="cpu")
    new, old = limited_group(root / "nd7", IN_V2), limited_group(tmp_path / "v1" / "netnsd" / "nd7", IN_V1)
    monkeypatch.setattr(limits, "_find_v1", {"memory": str(tmp_path / "v1")}.get)
    limit = Limits(str(root), str(mount))
    assert limit.apply("nd7", {"memory": 64 << 20, "cpu": 1.5}) == (str(old),)
    assert (new / "cpu.max").read_text() == "150000 100000"
    assert (old / "memory.limit_in_bytes").read_text() == "67108864"
    assert (new / "memory.max").read_text() == ""
    with pytest.raises(LimitUnavailable):
        limit.require(ALL)


def test_a_kernel_that_cannot_swap_has_no_files_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", handed_on="memory")
    group = limited_group(root / "nd7", ["memory.max"])
    assert limited(mount, root, monkeypatch, None).apply("nd7", {"memory": 64 << 20}) == ()
    assert (group / "memory.max").read_text() == "67108864"
    (group / "memory.max").unlink()
    with pytest.raises(KernelError):
        limited(mount, root, monkeypatch, None).apply("nd7", {"memory": 64 << 20})


@pytest.mark.parametrize("kind", list(ALL))
def test_where_neither_has_one_it_is_said_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        kind: str) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", controllers=" ".join(ALL.keys() - {kind}))
    limit = limited(mount, root, monkeypatch, None)
    for attempt in (limit.require, partial(limit.apply, "nd7")):
        with pytest.raises(LimitUnavailable, match=rf"cannot limit .*: .* has no {kind} controller") as caught:
            attempt({kind: ALL[kind]})
        assert caught.value.details == {"limit": kind}


def test_what_there_is_to_limit_with_is_told_and_nothing_is_changed(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount", handed_on="cpu")
    root = mount / "netnsd"
    assert limited(mount, root, monkeypatch, None).has() == {"memory": False, "cpu": True, "pids": False}
    assert limited(mount, root, monkeypatch, "/v1").has() == dict.fromkeys(ALL, True)
    unit = control_group(mount / "unit.service", controllers="memory pids")
    below = limited(mount, unit / "netnsd", monkeypatch, None)
    assert below.has() == {"memory": True, "cpu": False, "pids": True}
    assert not root.exists()
    assert (unit / "cgroup.subtree_control").read_text() == ""


def test_what_the_kernel_refuses_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", handed_on="pids")
    (root / "nd7").mkdir()  # no pids.max
    with pytest.raises(KernelError):
        limited(mount, root, monkeypatch, None).apply("nd7", {"pids": 64})


async def test_a_change_of_the_count_of_v2_is_news(tree: CgroupTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own file here has no count, so that one is written into a file that looks like it."""
    os.makedirs(tree.path("nd7"))
    async with trio.open_nursery() as nursery:
        await nursery.start(tree.run)
        directory = Path(f"/tmp/netnsd-{os.getpid()}-events")
        directory.mkdir()
        file = directory / "memory.events"
        try:
            file.write_text("oom 4\noom_kill 1\noom_group_kill 3\n")
            monkeypatch.setattr(tree._limits, "memory_group", lambda _group: (str(directory), False))
            assert tree.oom_kills("nd7") == 1
            with trio.fail_after(5):
                assert await tree.more_oom_kills("nd7", 0) == 1
            told: list[int] = []

            async def wait() -> None:
                told.append(await tree.more_oom_kills("nd7", 1))

            nursery.start_soon(wait)
            await trio.sleep(0.05)
            assert told == []
            file.write_text("oom 4\noom_kill 3\n")
            with trio.fail_after(5):
                while not told:
                    await trio.sleep(0.01)
            assert told == [3]
        finally:
            file.unlink()
            directory.rmdir()
        assert tree.oom_kills("nd7") == 0
        with pytest.raises(KernelError):
            await tree.more_oom_kills("nd7", 0)
        nursery.cancel_scope.cancel()
