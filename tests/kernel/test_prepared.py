"""Children that wait in a group for their order, and who holds a child's memory over its exec."""

# ruff: noqa: ASYNC230
# Small files of tests: nothing else waits meanwhile.

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from netnsd.errors import LaunchFailed
from tests.kernel.launching import UID, World, launching, needs_root, until

pytestmark = needs_root


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with launching() as world:
        yield world


async def prepared(world: World) -> int:
    """The pid of a child that waits in nd0/main, with nothing left to do."""
    world.processes.prepare("nd0/main")
    await until(lambda: len(world.tree.pids("nd0/main")) == 1)
    pid = world.tree.pids("nd0/main")[0]
    await until(lambda: _comm(pid) == "netnsd-waiting" and _is_asleep(pid))
    return pid


def _comm(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def _is_asleep(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def _descriptors(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_prepared_child_becomes_the_command(world: World) -> None:
    pid = await prepared(world)
    assert await world.processes.launch(world.order("sleep", "60")) == pid
    assert _comm(pid) == "sleep"
    assert await world.processes.known() != ([], [])


async def test_prepared_child_holds_nothing_but_its_channel_and_its_group(world: World) -> None:
    pid = await prepared(world)
    names = sorted(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")
                   if int(fd) > 2)
    assert names == ["/dev/null", world.tree.path("nd0/main"), "socket"]
    other = await world.processes.launch(world.order("sleep", "60", cgroup="nd0"))
    assert other != pid


async def test_group_is_prepared_once(world: World) -> None:
    pid = await prepared(world)
    world.processes.prepare("nd0/main")
    await world.processes.known()
    assert world.tree.pids("nd0/main") == [pid]


async def test_prepared_child_is_used_once(world: World) -> None:
    pid = await prepared(world)
    await world.processes.launch(world.order("sleep", "60"))
    assert await world.processes.launch(world.order("sleep", "60")) != pid


async def test_missing_group_is_not_prepared_and_told_at_the_launch(world: World) -> None:
    world.processes.prepare("none")
    with pytest.raises(LaunchFailed, match="cgroup: No such file"):
        await world.processes.launch(world.order("true", cgroup="none"))


async def test_killed_child_is_forgotten_and_a_launch_goes_on_without_it(world: World) -> None:
    launcher = world.processes.launcher_pid
    await world.run("true")
    before = _descriptors(launcher)
    os.kill(await prepared(world), signal.SIGKILL)
    await until(lambda: world.tree.pids("nd0/main") == [])
    assert await world.run("echo here") == "here\n"
    await until(lambda: _descriptors(launcher) == before)


async def test_child_goes_with_its_group(world: World) -> None:
    launcher = world.processes.launcher_pid
    before = _descriptors(launcher)
    await prepared(world)
    await world.tree.remove("nd0/main")
    await until(lambda: _descriptors(launcher) == before)
    await world.tree.create("nd0/main")
    assert await world.run("echo again") == "again\n"


async def test_child_ends_with_the_launcher(world: World) -> None:
    await prepared(world)
    launcher = world.processes.launcher_pid
    assert launcher is not None
    os.kill(launcher, signal.SIGKILL)
    await until(lambda: world.tree.pids("nd0/main") == [])


async def test_child_outlives_the_daemon(world: World) -> None:
    pid = await prepared(world)
    await world.disconnect()
    await world.connect()
    assert await world.processes.launch(world.order("sleep", "60")) == pid


async def test_order_too_long_for_a_message_starts_another_child(world: World) -> None:
    pid = await prepared(world)
    env = {"PATH": "/usr/bin:/bin", **{f"V{n}": "x" * 100_000 for n in range(5)}}
    command = await world.processes.launch(world.order("sleep", "60", env=env))
    assert command != pid
    await until(lambda: world.tree.pids("nd0/main") == [command])


@pytest.mark.parametrize("changes", [{"cwd": "/none"}, {"argv": ("none-such",)}, {"limits": {"fish": 1}}])
async def test_failed_start_of_a_prepared_child_leaves_nothing(world: World, changes: dict[str, object]) -> None:
    launcher = world.processes.launcher_pid
    before = _descriptors(launcher)
    await prepared(world)
    with pytest.raises(LaunchFailed):
        await world.processes.launch(world.order(**{"argv": ("true",), **changes}))
    assert world.tree.pids("nd0/main") == []
    assert _descriptors(launcher) == before


async def test_end_is_told_when_nothing_of_the_launcher_is_in_the_group(world: World) -> None:
    for _ in range(30):
        launch = world.order("true")
        await world.processes.launch(launch)
        assert await world.ended(launch.launch_id) == 0
        assert world.tree.pids("nd0/main") == []


async def test_command_is_soon_alone_in_its_group_and_has_no_children(world: World) -> None:
    pid = await world.processes.launch(world.order("sleep", "60"))
    await until(lambda: world.tree.pids("nd0/main") == [pid])
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        assert file.read() == ""


async def test_holder_has_the_commands_rights_and_ends_by_itself(world: World) -> None:
    launcher = world.processes.launcher_pid
    assert launcher is not None
    pid = await prepared(world)
    _freeze(world, "1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.processes.launch, world.order("sleep", "60"))
        await trio.testing.wait_all_tasks_blocked()
        assert len((await world.processes.known())[0]) == 1
        os.kill(launcher, signal.SIGSTOP)  # who would end it
        try:
            _freeze(world, "0")
            await until(lambda: len(world.tree.pids("nd0/main")) == 2 and _comm(pid) == "sleep")
            holder, = set(world.tree.pids("nd0/main")) - {pid}
            with open(f"/proc/{holder}/status") as file:
                status = dict(line.split(":\t", 1) for line in file.read().splitlines())
            assert [status[name].split() for name in ("Uid", "Gid")] == [[str(UID)] * 4] * 2
            assert (status["Groups"].strip(), status["CapPrm"], status["NoNewPrivs"]) == ("", "0" * 16, "1")
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                assert file.read() == ""
            await until(lambda: world.tree.pids("nd0/main") == [pid])
        finally:
            os.kill(launcher, signal.SIGCONT)


def _freeze(world: World, state: str) -> None:
    with open(world.tree.path("nd0/main") + "/cgroup.freeze", "w") as file:
        file.write(state)


@pytest.mark.parametrize("nofile", [3, 5, 6, 8])
@pytest.mark.parametrize("is_prepared", [True, False])
async def test_a_start_that_fails_for_its_limit_on_descriptors_is_told(
    world: World, nofile: int, is_prepared: bool
) -> None:
    """What is too little for the launcher's own descriptors is no success, whichever step notices."""
    if is_prepared:
        await prepared(world)
    with pytest.raises(LaunchFailed):
        await world.processes.launch(world.order("/missing", limits={"nofile": nofile}))
    await until(lambda: not world.tree.populated("nd0/main"))


async def test_the_copy_of_the_launchers_memory_is_not_the_users(world: World) -> None:
    """Neither the child, from where it has the user's ids, nor its holder can be read by that user."""
    pid = await prepared(world)
    await world.processes.launch(world.order("sleep", "60"))
    for member in world.tree.pids("nd0/main"):
        if member != pid:
            with contextlib.suppress(FileNotFoundError):
                assert os.stat(f"/proc/{member}/mem").st_uid == 0
    assert os.stat(f"/proc/{pid}/mem").st_uid == UID, "the command itself is its user's"
