"""Commands on a client's own descriptors, with real processes and terminals."""

# ruff: noqa: ASYNC230
# Small files and processes of tests: nothing else waits meanwhile.

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from netnsd.core.interfaces import Launch
from tests.kernel.launching import World, launching, needs_root, until

pytestmark = needs_root


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with launching() as world:
        yield world


class Client:
    """The client's end. All waits are bounded by the socket's timeout."""

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.socket.settimeout(5)

    async def attach(self, world: World, launch: Launch) -> None:
        with self.theirs:
            os.close(await world.processes.attach(launch, self.theirs.fileno()))

    def frame(self) -> dict[str, Any]:
        header = self.socket.recv(4, socket.MSG_WAITALL)
        found: dict[str, Any] = json.loads(self.socket.recv(struct.unpack(">I", header)[0], socket.MSG_WAITALL))
        return found

    def give(self, *fds: int, data: bytes = b"\0") -> None:
        assert self.frame() == {"ready": True}
        socket.send_fds(self.socket, [data], list(fds))

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def client() -> Any:
    client = Client()
    yield client
    client.close()
    client.theirs.close()


class Pipes:
    def __init__(self) -> None:
        self.fds = [*os.pipe(), *os.pipe(), *os.pipe()]
        self.stdin, self.stdout, self.stderr = self.fds[1], self.fds[2], self.fds[4]

    def give_to(self, client: Client) -> None:
        mine = [self.fds[0], self.fds[3], self.fds[5]]
        client.give(*mine)
        for fd in mine:
            os.close(fd)
            self.fds.remove(fd)


@pytest.fixture
def pipes() -> Any:
    pipes = Pipes()
    yield pipes
    for fd in pipes.fds:
        os.close(fd)


def read_until(fd: int, text: bytes) -> bytes:
    said = b""
    while text not in said:
        ready, _, _ = select.select([fd], [], [], 5)
        assert ready, f"never said {text!r}: {said!r}"
        part = os.read(fd, 4096)
        assert part, f"never said {text!r}: {said!r}"
        said += part
    return said


async def test_descriptors_pass_straight_through(world: World, client: Client, pipes: Pipes) -> None:
    script = "read line; echo out $line; echo err >&2; ls -m /proc/$$/fd; hostname; id -u; exit 9"
    await client.attach(world, world.shell(script, log_fd=None))
    pipes.give_to(client)
    os.write(pipes.stdin, b"hello\n")
    assert read_until(pipes.stdout, b"12345") == b"out hello\n0, 1, 2\nweb\n12345\n"
    assert read_until(pipes.stderr, b"err") == b"err\n"
    assert client.frame() == {"exit": 9}
    assert client.socket.recv(1) == b""


async def test_command_is_in_its_cgroup_and_its_monitor_is_not(world: World, client: Client, pipes: Pipes) -> None:
    await client.attach(world, world.order("sleep", "60", log_fd=None))
    pipes.give_to(client)
    await until(lambda: _names(world) == ["sleep"])
    with open(f"/proc/{world.tree.pids('nd0')[0]}/stat") as file:
        monitor = int(file.read().split()[3])
    with open(f"/proc/{monitor}/comm") as comm, open(f"/proc/{monitor}/cgroup") as cgroup:
        assert comm.read() == "netnsd-monitor\n"
        assert world.tree.root not in cgroup.read()


def _names(world: World) -> list[str]:
    names = []
    for pid in world.tree.pids("nd0"):
        with open(f"/proc/{pid}/comm") as file:
            names.append(file.read().strip())
    return names


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 8)])
async def test_signals_are_relayed(world: World, client: Client, pipes: Pipes, number: int, code: int) -> None:
    script = "trap 'exit 8' USR1; echo set; while :; do sleep 0.05; done"
    await client.attach(world, world.shell(script, log_fd=None))
    pipes.give_to(client)
    read_until(pipes.stdout, b"set")
    client.socket.send(bytes([0, 200, number]))  # numbers that are no signals are passed over
    assert client.frame() == {"exit": code}


async def test_death_of_the_client_ends_all_that_the_command_started(
    world: World, client: Client, pipes: Pipes
) -> None:
    script = "trap '' HUP; setsid sleep 60 & (trap '' HUP; sleep 60) & echo set; wait; sleep 60"
    await client.attach(world, world.shell(script, log_fd=None))
    pipes.give_to(client)
    read_until(pipes.stdout, b"set")
    client.close()
    with trio.fail_after(5):
        await world.tree.empty("nd0")


async def test_death_of_the_client_is_a_hangup_first(world: World, client: Client, pipes: Pipes) -> None:
    path = world.write("hung-up", "", 0o666)
    script = f"trap 'echo yes >{path}; exit' HUP; echo set; while :; do sleep 0.05; done"
    await client.attach(world, world.shell(script, log_fd=None))
    pipes.give_to(client)
    read_until(pipes.stdout, b"set")
    client.close()
    with trio.fail_after(1.5):
        await world.tree.empty("nd0")
    with open(path) as file:
        assert file.read() == "yes\n"


async def test_client_that_leaves_before_it_gave_anything_starts_nothing(world: World, client: Client) -> None:
    await client.attach(world, world.order("sleep", "60", log_fd=None))
    assert client.frame() == {"ready": True}
    client.close()
    with trio.fail_after(5):
        await world.tree.empty("nd0")


@pytest.mark.parametrize(("data", "count"), [(b"x", 3), (b"\0", 1), (b"\0", 4)])
async def test_anything_but_three_descriptors_is_refused(
    world: World, client: Client, data: bytes, count: int
) -> None:
    await client.attach(world, world.order("true", log_fd=None))
    client.give(*[0] * count, data=data)
    assert client.frame()["error"]["details"] == {"stage": "stdio", "errno": "EBADMSG"}


async def test_missing_command_is_told_to_the_client(world: World, client: Client, pipes: Pipes) -> None:
    await client.attach(world, world.order("none-such", log_fd=None))
    pipes.give_to(client)
    error = client.frame()["error"]
    assert (error["code"], error["details"]) == ("launch_failed", {"stage": "exec", "errno": "ENOENT"})
    assert error["message"] == "exec: No such file or directory: none-such"
    assert "PATH" in error["hint"]


async def test_directory_that_cannot_be_entered_is_told_before_ready(world: World, client: Client) -> None:
    await client.attach(world, world.order("true", cwd="/none", log_fd=None))
    assert client.frame()["error"]["details"] == {"stage": "chdir", "errno": "ENOENT"}


async def test_terminal_is_the_commands_own(world: World, client: Client) -> None:
    master, slave = pty.openpty()
    script = """
        test -t 0 && test -t 1 && test -t 2 && echo three
        : </dev/tty && echo dev
        trap 'echo interrupted; exit 7' INT
        echo set
        while :; do sleep 0.05; done
    """
    try:
        await client.attach(world, world.shell(script, log_fd=None, tty=True))
        client.give(slave, slave, slave)
        assert read_until(master, b"set").replace(b"\r", b"") == b"three\ndev\nset\n"
        os.write(master, b"\x03")
        assert b"interrupted" in read_until(master, b"interrupted")
        assert client.frame() == {"exit": 7}
    finally:
        os.close(master)
        os.close(slave)


async def test_terminal_of_another_session_is_not_taken(world: World, client: Client, pipes: Pipes) -> None:
    await client.attach(world, world.order("true", log_fd=None, tty=True))
    pipes.give_to(client)  # and no terminal
    assert client.frame()["error"]["details"] == {"stage": "stdio", "errno": "ENOTTY"}


async def test_attached_command_survives_the_launcher(world: World, client: Client, pipes: Pipes) -> None:
    await client.attach(world, world.shell("read line; exit 4", log_fd=None))
    pipes.give_to(client)
    await until(lambda: _names(world) == ["sh"])
    pid = world.processes.launcher_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with trio.fail_after(5):
        assert await world.processes.exits.receive() is None
    os.write(pipes.stdin, b"\n")
    assert client.frame() == {"exit": 4}
