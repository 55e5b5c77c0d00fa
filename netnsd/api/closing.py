"""Closing what a client may have laced with descriptors (see ``peer.refuse_descriptors``).

A lingering TCP socket, or a file of a file system in user space, can make close(2) wait for as long as its sender
likes. Where the kernel does not refuse descriptors, closing therefore happens in threads, of which there are so many
and no more; the connection counts as its user's until it is done.
"""

from __future__ import annotations

import contextlib
import os

import trio

_THREADS = 256


class Closer:
    """Closes sockets and descriptors.

    Args:
        filters_descriptors: the kernel refuses descriptors, so that closing never waits.
    """

    def __init__(self, *, filters_descriptors: bool) -> None:
        self.filters_descriptors = filters_descriptors
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._waits: set[trio.CancelScope] = set()
        self._left: list[int] = []

    async def close(self, connection: trio.socket.SocketType, *, is_laced: bool = False) -> None:
        """Close a socket, once; ``is_laced``: descriptors may lie in it although the kernel filters."""
        if connection.fileno() < 0:
            return
        if self.filters_descriptors and not is_laced:
            connection.close()
            return
        trio.lowlevel.notify_closing(connection)
        await self.close_all([connection.detach()])

    async def close_all(self, descriptors: list[int]) -> None:
        """Close descriptors, and return when they are: also in a cancelled scope, unless ``abandon`` is called."""
        self._left += descriptors
        with trio.CancelScope(shield=True) as scope:
            self._waits.add(scope)
            try:
                # RuntimeError: no thread can be started now. What is left is closed with what comes next.
                with contextlib.suppress(RuntimeError):
                    await trio.to_thread.run_sync(self._close_left, abandon_on_cancel=True, limiter=self._limiter)
            finally:
                self._waits.discard(scope)

    def abandon(self) -> None:
        """Wait no longer: the process ends."""
        for scope in list(self._waits):
            scope.cancel()

    def _close_left(self) -> None:
        while True:
            try:
                fd = self._left.pop()
            except IndexError:
                return
            os.close(fd)
