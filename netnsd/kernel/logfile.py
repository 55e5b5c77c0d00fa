"""Reading a service's log, which may grow at its end and lose its head while it is read."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable

import trio

_BLOCK_BYTES = 64 * 1024
_POLL_SECONDS = 0.05
_LOOK_BACK_BYTES = 64 << 20
# Reading a file takes a thread for a moment. Not those that everybody else waits for.
_THREADS = 8


async def read(path: str, tail: int | None, goes_on: Callable[[], bool] | None) -> AsyncIterator[bytes]:
    """The log's bytes: its last ``tail`` lines, or all that is left of it.

    Args:
        path: the file; one that does not exist has nothing to say.
        tail: lines, None for all.
        goes_on: None to end at the end, or says whether more may come.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        offset = await trio.to_thread.run_sync(_start, fd, tail, limiter=_limiter())
        while True:
            more = goes_on is not None and goes_on()
            offset, data = await trio.to_thread.run_sync(_next, fd, offset, limiter=_limiter())
            if data:
                yield data
            elif more:
                await trio.sleep(_POLL_SECONDS)
            else:
                return
    finally:
        os.close(fd)


_running: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("log readers")


def _limiter() -> trio.CapacityLimiter:
    try:
        return _running.get()
    except LookupError:
        _running.set(trio.CapacityLimiter(_THREADS))
        return _running.get()


def _next(fd: int, offset: int) -> tuple[int, bytes]:
    offset = _skip_hole(fd, offset)
    data = os.pread(fd, _BLOCK_BYTES, offset)
    return offset + len(data), data


def _skip_hole(fd: int, offset: int) -> int:
    end = os.fstat(fd).st_size  # before the look, so that what is written meanwhile is not skipped
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return max(offset, end)  # at the end, or nothing but a hole before it, which a server may make vast


def _start(fd: int, tail: int | None) -> int:
    """Where the last ``tail`` lines begin, looking back so far at most as logs are kept."""
    end = os.fstat(fd).st_size
    if tail is None:
        return _skip_hole(fd, 0)
    if tail == 0:
        return end
    first = _skip_hole(fd, max(0, end - _LOOK_BACK_BYTES))
    position = end
    lines = 0
    while position > first:
        size = min(_BLOCK_BYTES, position - first)
        block = os.pread(fd, size, position - size)
        # The newline that ends the last line begins no other.
        newline = block.rfind(b"\n", 0, len(block) - (position == end))
        while newline >= 0:
            lines += 1
            if lines == tail:
                return position - size + newline + 1
            newline = block.rfind(b"\n", 0, newline)
        position -= size
    return first
