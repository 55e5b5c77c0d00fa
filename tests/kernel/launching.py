"""A launcher with its own socket, a namespace, a cgroup subtree and files, for tests; all gone afterwards."""

# ruff: noqa: ASYNC220
# Small files and processes of tests: nothing else waits meanwhile.

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from netnsd.core.interfaces import Exited, Launch
from netnsd.kernel.cgroup import CgroupTree
from netnsd.kernel.processes import LauncherProcesses

UID = 12345
needs_root = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event, for at most 5 s."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


class World:
    """What a daemon would have around its launcher."""

    def __init__(self, directory: str, holder_pid: int, tree: CgroupTree, processes: LauncherProcesses) -> None:
        self.directory = directory
        self.netns = f"/proc/{holder_pid}/ns/net"
        self.tree = tree
        self.processes = processes
        self.hosts = self.write("hosts", "127.0.0.1 localhost inside\n")
        self.log = os.open(self.path("log"), os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)

        self.nursery: trio.Nursery | None = None
        self._connection = trio.CancelScope()
        self._disconnected = trio.Event()

    async def connect(self) -> None:
        """Be a daemon's start."""
        self._connection, self._disconnected = trio.CancelScope(), trio.Event()
        assert self.nursery is not None
        await self.nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._connection:
            await self.processes.run(task_status=task_status)
        self._disconnected.set()

    async def disconnect(self) -> None:
        """Be a daemon's end."""
        self._connection.cancel()
        await self._disconnected.wait()

    async def end_launcher(self) -> None:
        """And wait for its end, whoever its parent is."""
        with trio.fail_after(5):
            if self._disconnected.is_set():
                await self.connect()
            await until(lambda: self.processes.launcher_pid is not None)  # a new one may be on its way
            pid = self.processes.launcher_pid
            assert pid is not None
            handle = os.pidfd_open(pid)
            await self.disconnect()
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            await trio.lowlevel.wait_readable(handle)
            os.close(handle)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def write(self, name: str, text: str, mode: int = 0o644) -> str:
        with open(self.path(name), "w") as file:
            file.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def output(self) -> str:
        return os.pread(self.log, 1 << 20, 0).decode("utf-8", "surrogateescape")

    def order(self, *argv: str, **changes: Any) -> Launch:
        fields: dict[str, Any] = {
            "launch_id": str(uuid.uuid4()), "netns": self.netns, "cgroup": "nd0/main", "hostname": "web",
            "argv": argv, "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/tmp", "uid": UID, "gid": UID, "groups": (),
            "umask": 0o022, "limits": {}, "setuid": False, "hosts_file": self.hosts, "resolv_file": None,
            "log_fd": self.log,
        }
        return Launch(**{**fields, **changes})

    def shell(self, script: str, **changes: Any) -> Launch:
        return self.order("sh", "-c", script, **changes)

    async def ended(self, launch_id: str) -> int | None:
        """Its exit code, acknowledged."""
        with trio.fail_after(5):
            while True:
                exited = await self.processes.exits.receive()
                assert isinstance(exited, Exited)
                if exited.launch_id == launch_id:
                    self.processes.acknowledge(launch_id)
                    return exited.code

    async def run(self, script: str, **changes: Any) -> str:
        """What a script says that ends well."""
        os.truncate(self.path("log"), 0)
        launch = self.shell(script, **changes)
        await self.processes.launch(launch)
        code = await self.ended(launch.launch_id)
        assert code == 0, self.output()
        return self.output()


class PreparedProcesses(LauncherProcesses):
    """Prepares each launch."""

    async def launch(self, launch: Launch) -> int:
        self.prepare(launch.cgroup)
        return await super().launch(launch)


@asynccontextmanager
async def launching(kind: type[LauncherProcesses] = LauncherProcesses) -> AsyncIterator[World]:
    directory = tempfile.mkdtemp(prefix="netnsd-test-")
    os.chmod(directory, 0o755)
    tree = CgroupTree(f"netnsd-test-{os.getpid()}-{secrets.token_hex(4)}")
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    processes = kind(os.path.join(directory, "l.sock"), tree.root, ["/run/netns"])
    world = World(directory, holder.pid, tree, processes)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(tree.run)
            await tree.create("nd0/main")
            world.nursery = nursery
            await world.connect()
            try:
                yield world
            finally:
                with trio.CancelScope(shield=True):
                    await world.end_launcher()
                    await tree.remove("")
                nursery.cancel_scope.cancel()
    finally:
        tree.close()
        os.close(world.log)
        holder.kill()
        holder.wait()
        holder.stdout.close()
        shutil.rmtree(directory)
