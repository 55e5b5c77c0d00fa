"""A limit on processes holds, whatever is tried inside, and leaves nothing: cgroup v1 for real, v2's decisions."""

# ruff: noqa: ASYNC221, ASYNC240
# Processes and files of tests: nothing else waits meanwhile.

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from netnsd import wire
from netnsd.errors import KernelError, LimitUnavailable
from netnsd.kernel import limits
from netnsd.kernel.cgroup import CgroupTree
from netnsd.kernel.limits import PidsLimit
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
    for root in (made.root, made._limits._old_root or made.root):
        cgroups.kill(root)
        wait_until(partial(cgroups.remove, root), what="the end of what a failed test left")
    os.rmdir(os.path.dirname(made.root))


def groups_of_v1(tree: CgroupTree) -> list[str]:
    assert tree._limits._old_root is not None
    return [path for path, _, _ in os.walk(tree._limits._old_root)]


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
    assert tree._limits._old_root is not None
    os.rmdir(f"{tree._limits._old_root}/nd9")
    await tree.remove("nd8")
    assert groups_of_v1(tree) == []


def test_who_asks_for_nothing_pays_for_nothing(tree: CgroupTree, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(tree.root)
    monkeypatch.setattr(tree, "_limits", None)
    tree.require(wire.Resources())
    assert tree.limit("nd7", wire.Resources()) == ()
    monkeypatch.undo()


# -- cgroup v2, in files that look like it ------------------------------------------------------------------------


def control_group(directory: Path, controllers: str = "cpu pids", handed_on: str = "") -> Path:
    directory.mkdir()
    (directory / "cgroup.controllers").write_text(controllers)
    (directory / "cgroup.subtree_control").write_text(handed_on)
    return directory


def limited(mount: Path, root: Path, monkeypatch: pytest.MonkeyPatch, v1: str | None) -> PidsLimit:
    monkeypatch.setattr(limits, "_find_v1", lambda _controller: v1)
    return PidsLimit(str(root), str(mount))


def test_v2_is_used_where_it_is_handed_on_and_made_to_be_below_a_unit(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    unit = control_group(mount / "netnsd-environments.service")
    root = control_group(unit / "netnsd")
    (root / "nd7").mkdir()
    (root / "nd7" / "pids.max").write_text("max")
    limit = limited(mount, root, monkeypatch, str(tmp_path / "v1"))
    limit.require()
    assert limit.apply("nd7", 64) == ()
    assert (root / "nd7" / "pids.max").read_text() .startswith("64")
    assert (unit / "cgroup.subtree_control").read_text() == "+pids"
    assert (root / "cgroup.subtree_control").read_text() == "+pids"
    assert (mount / "cgroup.subtree_control").read_text() == "", "the host's own is the host's"
    assert limit.observe() == []


def test_where_v2_has_none_v1_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", controllers="cpu")
    group = tmp_path / "v1" / "netnsd" / "nd7"
    group.mkdir(parents=True)
    (group / "pids.max").write_text("")
    limit = limited(mount, root, monkeypatch, str(tmp_path / "v1"))
    limit.require()
    assert limit.apply("nd7", 64) == (str(group),)
    assert (group / "pids.max").read_text() == "64"
    assert (mount / "cgroup.subtree_control").read_text() == "", "the host's own is the host's"
    assert limit.observe() == ["nd7"]


def test_where_neither_has_one_it_is_said_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", controllers="cpu")
    limit = limited(mount, root, monkeypatch, None)
    for attempt in (limit.require, lambda: limit.apply("nd7", 64)):
        with pytest.raises(LimitUnavailable, match=r"cannot limit processes: .* has no pids controller") as caught:
            attempt()
        assert caught.value.details == {"limit": "pids"}


def test_what_the_kernel_refuses_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = control_group(tmp_path / "mount")
    root = control_group(mount / "netnsd", handed_on="pids")
    (root / "nd7").mkdir()  # no pids.max
    with pytest.raises(KernelError):
        limited(mount, root, monkeypatch, None).apply("nd7", 64)
