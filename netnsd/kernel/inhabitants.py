"""Processes by the network namespace that they are in, whatever cgroup they are in."""

from __future__ import annotations

import contextlib
import os
import signal


def find(namespaces: set[int]) -> list[int]:
    """The pids of processes whose network namespace has one of these inode numbers (of nsfs)."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _namespace_of(entry) in namespaces]


def kill(namespaces: set[int]) -> None:
    """SIGKILL every process in these namespaces. Through a pidfd, so that no other process can be hit."""
    for pid in find(namespaces):
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
