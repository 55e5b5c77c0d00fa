"""The adapters that are to keep the promises: a set of fakes, and the real ones on a disposable host."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from netnsd.core.addressing import Plan, Slot
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Cgroups, Files, Firewall, Launch, Network, Probes, Processes, Store
from netnsd.kernel.bridges import Forwarding
from netnsd.kernel.cgroup import CgroupTree
from netnsd.kernel.files import EnvironmentFiles
from netnsd.kernel.firewall import NftFirewall
from netnsd.kernel.namespace_thread import NamespaceThread, Priority, enter
from netnsd.kernel.network import NETNS_DIRECTORY, KernelNetwork
from netnsd.kernel.probes import HostProbes
from netnsd.kernel.processes import LauncherProcesses
from netnsd.kernel.seats import Seats
from netnsd.store import SqliteStore
from tests.fakes import FakeCgroups, FakeFiles, FakeFirewall, FakeNetwork, FakeProbes, FakeProcesses

SUPERNET = "10.203.0.0/16"
PLAN = Plan(SUPERNET, 250)


def environment(slot: Slot, name: str) -> Environment:
    """One that owns ``slot``."""
    return Environment(id=f"id-{name}", name=name, uid=61001, user="alice", slot=slot, netns=name, labels={},
                       share="owner", created_at="2030-01-01T00:00:00.000000Z", boot_id="b")


@dataclass
class Subjects:
    """What is tested. The verbs below are how a test is a server, or another tool."""

    network: Network
    firewall: Firewall
    processes: Processes
    cgroups: Cgroups
    store: Store
    files: Files
    probes: Probes
    directory: Path

    async def listen(self, slot: Slot, protocol: str, port: int) -> None:
        """Be a server inside."""
        raise NotImplementedError

    async def make_foreign(self, name: str) -> None:
        """Be somebody who makes a namespace of that name."""
        raise NotImplementedError

    async def lose_link(self, slot: Slot) -> None:
        """Be somebody who deletes a slot's link."""
        raise NotImplementedError

    async def lose_name(self, slot: Slot) -> None:
        """Be somebody who deletes the name ``web`` of a slot."""
        raise NotImplementedError

    async def lose_pin(self, slot: Slot) -> None:
        """Be somebody who unmounts a slot's pin."""
        raise NotImplementedError

    async def break_bridge(self, slot: Slot) -> None:
        """Be somebody who deletes a slot's bridge."""
        raise NotImplementedError

    async def drift(self) -> None:
        """Be a tool that flushes the host's rules."""
        raise NotImplementedError

    def launch(self, slot: Slot, netns: str, script: str, log: int) -> Launch:
        """A shell's start. The words ``missing`` and ``exit N`` mean to the fake what they mean to a shell."""
        return Launch(launch_id=secrets.token_hex(16), netns=f"/run/netns/{netns}", cgroup=f"{slot.cgroup}/s-main",
                      hostname=netns, argv=(script,) if script == "missing" else ("/bin/sh", "-c", script),
                      env={"PATH": "/usr/bin:/bin"}, cwd="/", uid=61001, gid=61001, groups=(), umask=0o022, limits={},
                      setuid=False, hosts_file="/etc/hosts", resolv_file=None, log_fd=log)

    async def end(self, launch: Launch, pid: int) -> None:
        """Have the process end with signal 9."""
        raise NotImplementedError


class FakeSubjects(Subjects):
    """In memory, but for the state file."""

    network: FakeNetwork
    firewall: FakeFirewall
    processes: FakeProcesses
    cgroups: FakeCgroups

    @classmethod
    @asynccontextmanager
    async def opened(cls, directory: Path) -> AsyncIterator[Self]:
        """All of them."""
        cgroups, store = FakeCgroups(), SqliteStore(directory / "state", PLAN)
        network = FakeNetwork()
        yield cls(network, FakeFirewall(), FakeProcesses(cgroups), cgroups, store, FakeFiles(),
                  FakeProbes(network, PLAN), directory)
        store.close()

    async def listen(self, slot: Slot, protocol: str, port: int) -> None:
        self.network.listen(slot, protocol, port)

    async def make_foreign(self, name: str) -> None:
        self.network.foreign.add(name)

    async def lose_link(self, slot: Slot) -> None:
        self.network.unlinked.add(slot.index)

    async def lose_name(self, slot: Slot) -> None:
        self.network.nameless.add(slot.index)

    async def lose_pin(self, slot: Slot) -> None:
        self.network.unpinned.add(slot.index)

    async def break_bridge(self, slot: Slot) -> None:
        self.network.bad_bridges.append(slot.bridge.name)

    async def drift(self) -> None:
        self.firewall.flush()

    async def end(self, launch: Launch, pid: int) -> None:
        self.cgroups.codes[pid] = 137
        self.processes.end(launch.launch_id, 137)


class RealSubjects(Subjects):
    """On the kernel. ``thread`` is in the host's network namespace."""

    thread: NamespaceThread
    sockets: list[socket.socket]
    foreign: list[str]

    @classmethod
    @asynccontextmanager
    async def opened(cls, directory: Path) -> AsyncIterator[Self]:
        """All of them, as the daemon joins them; and nothing is left of them."""
        runtime, state = directory / "run", directory / "state"
        runtime.mkdir()
        for path in (directory, *directory.parents[:2]):
            path.chmod(0o755)
        store = SqliteStore(state, PLAN)
        cgroups = CgroupTree(f"netnsd-test-{os.getpid()}-{secrets.token_hex(4)}")
        with NamespaceThread() as thread:
            seats = Seats(PLAN)
            network = KernelNetwork(thread, runtime, 1500, seats)
            firewall = NftFirewall(thread, SUPERNET, 64, forwarding=Forwarding(runtime / "forwarding"), seats=seats,
                                   record=runtime / "ruleset")
            await network.open()
            await firewall.start()
            processes = LauncherProcesses(str(runtime / "l.sock"), cgroups.root,
                                          hide=[str(NETNS_DIRECTORY), str(network.pins)])
            async with trio.open_nursery() as nursery:
                await nursery.start(cgroups.run)
                await nursery.start(processes.run)
                await firewall.restore([])
                made = cls(network, firewall, processes, cgroups, store,
                           EnvironmentFiles(runtime, state, 1 << 20), HostProbes(), directory)
                made.thread, made.sockets, made.foreign = thread, [], []
                yield made
                for kept in made.sockets:
                    kept.close()
                for name in made.foreign:
                    await trio.run_process(["ip", "netns", "delete", name])
                with trio.fail_after(5):
                    await cgroups.remove("")
                await network.unwire([(PLAN.slot(index), "") for index in await network.survey()])
                processes.retire()
                nursery.cancel_scope.cancel()
            await firewall.stop(remove=True)
            await network.close(remove=True)
        cgroups.close()
        store.close()

    async def listen(self, slot: Slot, protocol: str, port: int) -> None:
        def bind() -> socket.socket:
            enter(f"{self.directory}/run/slots/{slot.index}")
            made = socket.socket(type=socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
            made.bind(("0.0.0.0", port))
            if protocol == "tcp":
                made.listen()
            return made

        self.sockets.append(await self.thread.run(bind, Priority.CHECK))

    async def make_foreign(self, name: str) -> None:
        await trio.run_process(["ip", "netns", "add", name])
        self.foreign.append(name)

    async def lose_link(self, slot: Slot) -> None:
        await trio.run_process(["ip", "link", "delete", slot.port_name])

    async def lose_name(self, slot: Slot) -> None:
        await trio.run_process(["ip", "netns", "delete", "web"])

    async def lose_pin(self, slot: Slot) -> None:
        await trio.run_process(["umount", f"{self.directory}/run/slots/{slot.index}"])

    async def break_bridge(self, slot: Slot) -> None:
        await trio.run_process(["ip", "link", "delete", slot.bridge.name])

    async def drift(self) -> None:
        await trio.run_process(["nft", "flush", "ruleset"])

    async def end(self, launch: Launch, pid: int) -> None:
        os.kill(pid, 9)
