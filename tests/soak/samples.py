"""What daemon, launcher, state directory, host and kernel hold at a moment at which nobody has an environment."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import Daemon, wait_until
from tests.soak.agents.client import Client
from tests.soak.figures import Row

# Others use the kernel meanwhile, so a cache may grow for them; and more of it is kept than is in use.
_CACHES = ("net_namespace", "mnt_cache", "nf_conntrack", "sock_inode_cache", "task_struct", "pid", "kmalloc-4k")
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """``values`` by name; see BOUNDS. ``pids`` of daemon and launcher say whose they are."""

    cycles: int
    pids: tuple[int, int]
    values: Mapping[str, float]


# How much each may grow between the sample after the warm-up and the end, and in what unit. Those of a process count
# over the stretch in which it did not die.
_OF_PROCESSES: dict[str, tuple[float | None, str]] = {
    "daemon: descriptors": (4, ""), "daemon: threads": (4, ""), "daemon: resident": (8, "MiB"),
    "launcher: descriptors": (4, ""), "launcher: threads": (0, ""), "launcher: resident": (4, "MiB"),
    "launcher: children": (0, ""),
}
_FEW_NAMESPACES = 100  # those of the host, the pool and the machine, and what a slab counts as in use
_OF_HOST: dict[str, tuple[float | None, str]] = {
    "names": (0, ""), "pins": (0, ""), "links": (0, ""), "elements": (0, ""), "cgroups": (0, ""), "mounts": (0, ""),
    "neighbours": (0, ""), "routes": (0, ""), "conntrack entries": (None, ""), "conntrack entries that stay": (0, ""),
    "runtime files": (0, ""), "log directories": (0, ""),
    "state file": (256, "KiB"), "write-ahead log": (4608, "KiB"),
}
_OF_KERNEL: dict[str, tuple[float | None, str]] = {
    "slab, unreclaimable": (48, "MiB"), "slab: net_namespace": (128, "objects"),
    **{f"slab: {cache}": (None, "objects") for cache in _CACHES[1:]}, "slab": (None, "MiB"), "percpu": (16, "MiB"),
}


def take(daemon: Daemon, pool: int, cycles: int) -> Sample:
    """Wait until all that was removed is gone, and count what there is."""
    counts = settled(daemon, pool)
    launcher = launcher_of(daemon)
    return Sample(cycles, (daemon.pid, launcher), {
        **_of_process("daemon", daemon.pid), **_of_process("launcher", launcher),
        "launcher: children": len(daemon.launcher_pids()) - 1, **counts, **_of_files(daemon), **_of_the_kernel()})


def settled(daemon: Daemon, pool: int) -> dict[str, int]:
    """Wait until there is a full pool of so many slots and nothing else; returns what the host holds then."""
    counts: dict[str, int] = {}

    def is_settled() -> bool:
        with contextlib.closing(Client(*sockets(daemon))) as client:
            pools = client.ask("PATCH", "/v1/pools/slots", {"size": pool}).body
            if client.ask("GET", "/v1/info").body["environments"] or pools["ready"] != pools["target"]:
                return False
        counts.clear()
        counts.update(counted(daemon))
        # Slots that a launcher's death left without their waiting child get none again.
        is_alone = len(daemon.launcher_pids()) <= pool + 1
        return is_alone and (counts["links"], counts["pins"], counts["names"]) == (pool, pool, 0)

    try:
        wait_until(is_settled, seconds=_SETTLE_SECONDS, what="the end of all that was removed")
    except AssertionError as error:
        raise AssertionError(f"{error}: {counts}, {len(daemon.launcher_pids())} processes of the launcher's") from None
    return counts


def counted(daemon: Daemon) -> dict[str, int]:
    """What the host holds now."""
    done = daemon.host.run([sys.executable, "-m", "tests.soak.agents.counting", daemon.cgroup], check=True, cwd="/",
                           env=AGENT_ENVIRONMENT)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def sockets(daemon: Daemon) -> tuple[str, str]:
    """The API's socket and the one for commands, as the test's own process names them."""
    return (str(daemon.host.path(daemon.socket)), str(daemon.host.path(f"{daemon.runtime_dir}/attach.sock")))


def launcher_of(daemon: Daemon) -> int:
    """The launcher: its children share its command line, and until their exec some have its name."""
    pids = daemon.launcher_pids()
    (pid,) = (pid for pid in pids if _parent_of(pid) not in (*pids, 0))
    return pid


def differences(daemon: Daemon) -> list[Any]:
    """What doctor finds that store and kernel do not agree about."""
    answer = json.loads(daemon.ctl("doctor", "-o", "json").stdout)
    found: list[Any] = answer.get("differences", []) if isinstance(answer, dict) else []
    return found


def compared(samples: list[Sample], steady: list[Sample]) -> list[Row]:
    """The rows of ``samples``, the first of which is that after the warm-up; ``steady``: those of one daemon's run."""
    def row(what: str, bound: tuple[float | None, str], among: list[Sample]) -> Row:
        return Row(what, among[0].values[what], among[-1].values[what], *bound)

    return [*(row(what, bound, steady) for what, bound in _OF_PROCESSES.items()),
            *(row(what, bound, samples) for what, bound in {**_OF_HOST, **_OF_KERNEL}.items()
              if what in samples[0].values)]


def _of_process(name: str, pid: int) -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {f"{name}: descriptors": len(os.listdir(f"/proc/{pid}/fd")), f"{name}: threads": int(status["Threads"]),
            f"{name}: resident": int(status["VmRSS"].split()[0]) / 1024}


def _of_files(daemon: Daemon) -> dict[str, float]:
    state = daemon.host.path(daemon.state_dir)
    runtime = daemon.host.path(daemon.runtime_dir)

    def kib(name: str) -> float:
        path = state / name
        return path.stat().st_size / 1024 if path.exists() else 0.0

    return {"state file": kib("netnsd.db"), "write-ahead log": kib("netnsd.db-wal"),
            "log directories": sum(len(found) for _, found, _ in os.walk(state / "logs")),
            "runtime files": sum(len(found) for top, _, found in os.walk(runtime) if not top.endswith("/slots"))}


def _of_the_kernel() -> dict[str, float]:
    """Of the whole machine; caches only where /proc/slabinfo can be read (proc_slabinfo(5): root)."""
    memory = {name: int(rest.split()[0]) / 1024 for name, _, rest in
              (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())}
    found = {"slab": memory["Slab"], "slab, unreclaimable": memory["SUnreclaim"], "percpu": memory.get("Percpu", 0.0)}
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except OSError:
        return found
    active = {fields[0]: int(fields[1]) for fields in map(str.split, lines[2:])}
    return {**found, **{f"slab: {cache}": active[cache] for cache in _CACHES if cache in active}}


def let_namespaces_go(seconds: float) -> None:
    """Wait until the kernel has destroyed the namespaces that were let go, so long at most.

    One in which a connection was open when it was removed lives until its sockets have given up (tcp_orphan_retries).
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _of_the_kernel().get("slab: net_namespace", 0.0) > _FEW_NAMESPACES:
        time.sleep(1)


def _parent_of(pid: int) -> int:
    """0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
