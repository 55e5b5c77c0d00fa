"""Processes that the kernel ended since their group had no more memory: how many there were, and news of more.

cgroup v2 counts them in memory.events, and inotify(7) tells when that changes; v1 counts in memory.oom_control, and
tells by an eventfd (cgroup-v1/memory.rst, 10). That comes before the count, as the kernel tells first and kills then
(mem_cgroup_oom in mm/memcontrol-v1.c).
"""

from __future__ import annotations

import errno
import os

import trio

NEW_FILE, _OLD_FILE = "memory.events", "memory.oom_control"
_COUNTED_SECONDS = 1.0
_LOOK_SECONDS = 0.02


def count(directory: str, *, is_old: bool) -> int:
    """How many were ended in a group; 0 where it is gone, or nobody counts. Raises OSError."""
    try:
        with open(os.path.join(directory, _OLD_FILE if is_old else NEW_FILE), encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return 0
        raise


async def more_in_v1(directory: str, seen: int) -> int:
    """Return once more than ``seen`` were ended in a group of v1, with how many. Raises OSError where it is gone."""
    news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        _subscribe(directory, news)
        while True:
            # News may be of a process that found room at last, which is not counted.
            with trio.move_on_after(_COUNTED_SECONDS):
                while (found := count(directory, is_old=True)) <= seen:
                    await trio.sleep(_LOOK_SECONDS)
                return found
            await trio.lowlevel.wait_readable(news)
            os.eventfd_read(news)
            os.stat(directory)  # its end is news too
    finally:
        os.close(news)


def _subscribe(directory: str, news: int) -> None:
    """The kernel keeps what it needs of both files, and forgets it with the eventfd's last descriptor."""
    subject = os.open(os.path.join(directory, _OLD_FILE), os.O_RDONLY | os.O_CLOEXEC)
    try:
        control = os.open(os.path.join(directory, "cgroup.event_control"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(control, f"{news} {subject}".encode())
        finally:
            os.close(control)
    finally:
        os.close(subject)
