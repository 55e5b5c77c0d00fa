"""Where the machine has cgroup v2, and who lives in a group."""

from __future__ import annotations

import os
from functools import cache


@cache
def cgroup2_mount() -> str:
    """The mount point of cgroup v2, on hybrid hosts too. Raises LookupError where there is none."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            head, _, tail = line.partition(" - ")
            if tail.split(" ", 1)[0] == "cgroup2":
                return head.split()[4]
    raise LookupError("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


def limits_of(name: str) -> list[str]:
    """Where the groups are that limit environments by cgroup v1, for a daemon whose cgroup is called ``name``."""
    return [f"/sys/fs/cgroup/{controller}/{name.replace('/', '.')}" for controller in ("pids", "memory", "cpu")]


def members(path: str) -> list[int]:
    """The processes in the group ``path`` (absolute) and below it, lowest first."""
    pids: list[int] = []
    for directory, _, _ in os.walk(path):
        try:
            with open(f"{directory}/cgroup.procs", encoding="ascii") as procs:
                pids += map(int, procs.read().split())
        except (FileNotFoundError, OSError):  # removed meanwhile: ENOENT, or ENODEV once it was open
            continue
    return sorted(pids)


def kill(path: str) -> None:
    """SIGKILL whatever lives in the group ``path`` or below it; no such group is fine."""
    try:
        descriptor = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.write(descriptor, b"1")
    finally:
        os.close(descriptor)


def remove(path: str) -> bool:
    """Remove an empty group and those below it; whether it is gone."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError:  # EBUSY: a process in it is not reaped yet
            return False
    return not os.path.exists(path)
