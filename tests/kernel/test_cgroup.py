"""The cgroup subtree, on the real cgroup2 mount."""

# ruff: noqa: ASYNC230, ASYNC240
# Small files and processes of tests: nothing else waits meanwhile.

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from netnsd.errors import KernelError
from netnsd.kernel import cgroup
from netnsd.kernel.cgroup import CgroupTree, find_cgroup2
from tests.kernel.launching import needs_root

pytestmark = needs_root


@pytest.fixture
async def tree(nursery: trio.Nursery) -> AsyncIterator[CgroupTree]:
    tree = CgroupTree(f"netnsd-test-{os.getpid()}-{secrets.token_hex(4)}")
    await nursery.start(tree.run)
    yield tree
    with trio.CancelScope(shield=True):
        await tree.remove("")
    assert not os.path.exists(tree.root)
    nursery.cancel_scope.cancel()
    tree.close()


class Herd:
    """Processes in cgroups."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def add(self, tree: CgroupTree, path: str, *argv: str) -> subprocess.Popen[bytes]:
        join = 'echo $$ >"$0"/cgroup.procs && echo && exec "$@"'
        process = subprocess.Popen(["sh", "-c", join, tree.path(path), *argv], stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        return process


@pytest.fixture
def herd() -> Iterator[Herd]:
    herd = Herd()
    yield herd
    for process in herd.processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_mount_is_found() -> None:
    assert os.path.exists(os.path.join(find_cgroup2(), "cgroup.procs"))


async def test_create_makes_parents_and_may_be_done_again(tree: CgroupTree) -> None:
    for _ in range(2):
        await tree.create("nd0/main")
    await tree.create("nd1")
    assert tree.observe() == ["nd0", "nd1"]


async def test_groups_that_are_not_there_are_empty(tree: CgroupTree) -> None:
    assert tree.observe() == []
    assert tree.pids("none") == []
    assert not tree.populated("none")
    tree.signal("none", signal.SIGTERM)
    await tree.empty("none")
    await tree.remove("none")


@pytest.mark.parametrize("path", ["/etc", "..", "a/../../b"])
async def test_paths_stay_below_the_root(tree: CgroupTree, path: str) -> None:
    with pytest.raises(ValueError, match="not below"):
        await tree.remove(path)


async def test_processes_below_a_group_count(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0/main")
    await tree.create("nd0/db")
    pids = [herd.add(tree, path, "sleep", "60").pid for path in ("nd0/main", "nd0/db", "nd0/db")]
    assert tree.pids("nd0") == sorted(pids)
    assert tree.pids("nd0/main") == pids[:1]
    assert tree.populated("nd0")
    assert not tree.populated("nd1")


async def test_signal_reaches_every_process_below(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0/main")
    processes = [herd.add(tree, path, "sleep", "60") for path in ("nd0", "nd0/main")]
    tree.signal("nd0", signal.SIGTERM)
    assert [process.wait(5) for process in processes] == [-signal.SIGTERM] * 2


async def test_empty_returns_for_all_waiters_at_the_last_end(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0/main")
    first, last = (herd.add(tree, "nd0/main", "sleep", "60") for _ in range(2))
    done: list[str] = []

    async def wait(path: str) -> None:
        await tree.empty(path)
        done.append(path)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for path in ("nd0", "nd0/main", "nd0/main"):
                nursery.start_soon(wait, path)
            await trio.testing.wait_all_tasks_blocked()
            first.kill()
            first.wait()
            with trio.move_on_after(0.1):
                await tree.empty("nd0")
            assert done == []
            last.kill()
            last.wait()
    assert len(done) == 3


async def test_empty_of_a_cancelled_waiter_leaves_others_their_watch(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0")
    process = herd.add(tree, "nd0", "sleep", "60")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.empty, "nd0")
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01) as scope:
                await tree.empty("nd0")
            assert scope.cancelled_caught
            process.kill()


async def test_empty_is_told_of_a_group_that_was_removed(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0/main")
    herd.add(tree, "nd0/main", "sleep", "60")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.empty, "nd0/main")
            await trio.testing.wait_all_tasks_blocked()
            await tree.remove("nd0")
    assert tree.observe() == []


async def test_remove_kills_what_ignores_signals_and_forks(tree: CgroupTree, herd: Herd) -> None:
    await tree.create("nd0/a/b")
    await tree.create("nd0/c")
    herd.add(tree, "nd0/a/b", "sh", "-c", "trap '' TERM HUP INT; while :; do sleep 0.001 & done")
    herd.add(tree, "nd0/c", "sleep", "60")
    with trio.fail_after(10):
        await tree.remove("nd0")
    assert tree.observe() == []


async def test_remove_that_takes_too_long_is_a_kernel_error(
    tree: CgroupTree, herd: Herd, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tree.create("nd0")
    herd.add(tree, "nd0", "sleep", "60")
    monkeypatch.setattr(cgroup, "REMOVE_SECONDS", 0.05)
    monkeypatch.setattr(cgroup, "_write", lambda *_: None)  # as if the process were in uninterruptible sleep
    with pytest.raises(KernelError) as caught:
        await tree.remove("nd0")
    assert caught.value.details == {"stage": "cgroup", "errno": "ETIMEDOUT"}
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["a b", "ö", "x'\"\\$*", "-rf", "a:b"])
async def test_any_name_works(tree: CgroupTree, herd: Herd, name: str) -> None:
    await tree.create(f"{name}/main")
    herd.add(tree, f"{name}/main", "sleep", "60")
    assert tree.observe() == [name]
    assert len(tree.pids(name)) == 1
    await tree.remove(name)
    assert tree.observe() == []


async def test_nothing_is_watched_when_nobody_waits(tree: CgroupTree, herd: Herd) -> None:
    for index in range(20):
        await tree.create(f"nd{index}")
        process = herd.add(tree, f"nd{index}", "sleep", "60")
        process.kill()
        with trio.fail_after(5):
            await tree.empty(f"nd{index}")
    with open(f"/proc/self/fdinfo/{tree._inotify}") as file:
        assert "inotify wd" not in file.read()
