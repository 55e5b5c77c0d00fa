"""Which mounts servers must not inherit.

Part of the launcher: standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import select

from netnsd.kernel import libc
from netnsd.kernel._order import StageError


class Hiding:
    """Keeps mounts at and below some directories out of this mount namespace, which children copy.

    A copied pin keeps a deleted namespace alive. Unmounting the directory once is not enough: where it is bound on
    itself and shared, as by `ip netns`, pins come to lie below it as well; and later mounts arrive by propagation.
    """

    def __init__(self, directories: list[str]) -> None:
        self._directories = [os.path.realpath(directory) for directory in directories]
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._changed = select.poll()  # POLLPRI since the last poll: man 5 proc
        self._changed.register(self._mounts, select.POLLPRI)
        self._unmount()

    def refresh(self) -> None:
        """Look again if any mount came or went. Raises StageError ``mounts``."""
        if self._changed.poll(0):
            self._unmount()

    def _unmount(self) -> None:
        # What is stacked on one name goes one by one; what lay below a mount that went shows in the next round.
        while found := self._find():
            failures = 0
            for path in found:
                try:
                    libc.umount2(path, libc.MNT_DETACH)
                except OSError:  # went with what was above it
                    failures += 1
            if failures == len(found):
                raise StageError("mounts", errno.EBUSY, found[0])

    def _find(self) -> list[str]:
        """Not those that lie under a later mount of a directory above: no path leads to them, to unmount or to use."""
        found = []
        os.lseek(self._mounts, 0, os.SEEK_SET)
        table = b"".join(iter(lambda: os.read(self._mounts, 1 << 16), b""))
        for line in table.splitlines():
            fields = line.split(b" ", 5)
            path = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), fields[4])
            name = path.decode("utf-8", "surrogateescape")
            if (any(name == directory or name.startswith(directory + "/") for directory in self._directories)
                    and _mount_at(name) == int(fields[0])):
                found.append(name)
        return found


def _mount_at(path: str) -> int:
    """The id of the mount that ``path`` leads to; 0 where it leads nowhere."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"mnt_id:")), 0)
    finally:
        os.close(fd)
