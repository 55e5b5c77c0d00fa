"""Processes by the network namespace that they are in, whatever cgroup they are in."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Set as AbstractSet


def find(namespaces: AbstractSet[int]) -> list[tuple[int, int]]:
    """(pid, namespace) of processes whose network namespace has one of these inode numbers (of nsfs)."""
    return [(int(entry), namespace) for entry in os.listdir("/proc")
            if entry.isdigit() and (namespace := _namespace_of(entry)) is not None and namespace in namespaces]


def kill(namespaces: AbstractSet[int]) -> None:
    """SIGKILL every process in these namespaces. Through a pidfd, so that no other process can be hit."""
    for pid, _namespace in find(namespaces):
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if _namespace_of(str(pid)) in namespaces:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)


def _namespace_of(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
