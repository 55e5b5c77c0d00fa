"""Exit codes of processes that are not our children, through a pidfd that was opened before they ended.

The kernel keeps what waitpid(2) would have said for as long as such a pidfd is open: PIDFD_GET_INFO with
PIDFD_INFO_EXIT, Linux 6.15 (include/uapi/linux/pidfd.h, fs/pidfs.c). It is there once the process was reaped.
"""

from __future__ import annotations

import fcntl
import functools
import os
import struct
from collections.abc import Callable

import trio

_INFO = struct.Struct("=QQ11Ii")  # struct pidfd_info, as long as its first version: mask first, exit_code last
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3
_REAPED_SECONDS, _LOOK_SECONDS = 5.0, 0.01


@functools.cache
def is_known() -> bool:
    """Whether the kernel tells: tried once, on a child that ends with a code of its own."""
    try:
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
    except OSError:
        return False
    handle = os.pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        return _status(handle) == 3 << 8
    finally:
        os.close(handle)


async def of(pid: int, is_it: Callable[[], bool]) -> int | None:
    """Return when a process has ended, with its code, 128 + n for signal n; None where the kernel does not tell.

    ``is_it``: whether that pid is the process that is meant, looked at once the pidfd is open.
    """
    if not is_known():
        return None
    try:
        handle = os.pidfd_open(pid)
    except OSError:  # it has ended, or we are out of descriptors
        return None
    try:
        if not is_it():
            return None
        await trio.lowlevel.wait_readable(handle)
        # Its parent, mostly process 1, reaps it at once; some that are no real init look now and then.
        with trio.move_on_after(_REAPED_SECONDS):
            while (status := _status(handle)) is None:
                await trio.sleep(_LOOK_SECONDS)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        return None
    finally:
        os.close(handle)


def _status(handle: int) -> int | None:
    """The wait status of the process of a pidfd; None while it was not reaped, or where the kernel does not tell."""
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _INFO_EXIT, *(0,) * 13)
    try:
        fcntl.ioctl(handle, _GET_INFO, info)
    except OSError:  # an older kernel: ENOTTY, or ESRCH once it was reaped
        return None
    mask, *_, status = _INFO.unpack(info)
    return int(status) if mask & _INFO_EXIT else None
