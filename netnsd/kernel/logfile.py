"""Reading a service's log, which may grow at its end and lose its head while it is read."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable

import trio

_BLOCK_BYTES = 64 * 1024
_POLL_SECONDS = 0.05


async def read(path: str, tail: int | None, goes_on: Callable[[], bool] | None) -> AsyncIterator[bytes]:
    """The log's bytes: its last ``tail`` lines, or all that is left of it.

    Args:
        path: the file; one that does not exist has nothing to say.
        tail: lines, None for all.
        goes_on: None to end at the end, or says whether more may come.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        offset = await trio.to_thread.run_sync(_start, fd, tail)
        while True:
            more = goes_on is not None and goes_on()
            offset, data = await trio.to_thread.run_sync(_next, fd, offset)
            if data:
                yield data
            elif more:
                await trio.sleep(_POLL_SECONDS)
            else:
                return
    finally:
        os.close(fd)


def _next(fd: int, offset: int) -> tuple[int, bytes]:
    offset = _skip_hole(fd, offset)
    data = os.pread(fd, _BLOCK_BYTES, offset)
    return offset + len(data), data


def _skip_hole(fd: int, offset: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return offset  # at the end


def _start(fd: int, tail: int | None) -> int:
    """Where the last ``tail`` lines begin."""
    first = _skip_hole(fd, 0)
    if tail is None:
        return first
    end = position = os.fstat(fd).st_size
    lines = 0
    while position > first:
        size = min(_BLOCK_BYTES, position - first)
        block = os.pread(fd, size, position - size)
        for index in range(len(block) - 1, -1, -1):
            at = position - size + index
            if block[index] == 0x0A and at != end - 1:
                lines += 1
                if lines == tail:
                    return at + 1
        position -= size
    return first if tail else end
