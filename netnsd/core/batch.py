"""Do together what many callers ask for at about the same time."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from netnsd.errors import ShuttingDown

T = TypeVar("T")


class Batcher(Generic[T]):
    """Collects items while ``work`` is busy, then gives it all of them at once.

    Args:
        work: does a batch. What it raises reaches every caller of that batch.
        limit: the most items of one batch.
        workers: batches at the same time.
    """

    def __init__(self, work: Callable[[list[T]], Awaitable[None]], limit: int, *, workers: int = 1) -> None:
        self._work = work
        self._workers = workers
        self._send, self._receive = trio.open_memory_channel[tuple[T, "_Outcome"]](10 * limit)
        self._limit = limit
        self._stopped = False

    async def do(self, item: T) -> None:
        """Return when the item's batch is done, or raise what it raised. Cancelling stops the waiting only."""
        if self._stopped:
            raise _stopping()
        outcome = _Outcome()
        await self._send.send((item, outcome))
        await outcome.done.wait()
        if outcome.error is not None:
            raise outcome.error

    async def run(self) -> None:
        """Work for ever; the owning nursery ends it, and then who still waits gets ShuttingDown."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._workers):
                    nursery.start_soon(self._work_on)
        finally:
            self._stopped = True
            while True:
                try:
                    _, outcome = self._receive.receive_nowait()
                except trio.WouldBlock:
                    break
                outcome.end(_stopping())

    async def _work_on(self) -> None:
        while True:
            batch = [await self._receive.receive()]
            while len(batch) < self._limit:
                try:
                    batch.append(self._receive.receive_nowait())
                except trio.WouldBlock:
                    break
            error: Exception | None = None
            try:
                await self._work([item for item, _ in batch])
            except Exception as caught:  # every caller of the batch gets it  # noqa: BLE001
                error = caught
            except BaseException:
                for _, outcome in batch:
                    outcome.end(_stopping())
                raise
            for _, outcome in batch:
                outcome.end(error)


class Shared(Generic[T]):
    """One answer for all who ask at about the same time, found after they asked.

    However many ask, and again and again: it is found by one at a time, and after each time rests for as long.

    Args:
        find: finds the answer. What it raises reaches the one for whom it was called; the next one tries again.
    """

    def __init__(self, find: Callable[[], Awaitable[T]]) -> None:
        self._find = find
        self._turn = trio.Lock()
        self._rests_until = -math.inf
        self._next: list[T] = []

    async def get(self) -> T:
        """The answer."""
        mine = self._next
        async with self._turn:
            if not mine:
                await trio.sleep_until(self._rests_until)
                self._next = []  # who asks from here on may know of what this one does not see any more
                began = trio.current_time()
                try:
                    mine.append(await self._find())
                finally:
                    ended = trio.current_time()
                    self._rests_until = ended + (ended - began)
            return mine[0]


class _Outcome:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None

    def end(self, error: Exception | None) -> None:
        """Let the caller go on."""
        self.error = error
        self.done.set()


def _stopping() -> ShuttingDown:
    return ShuttingDown("the daemon is stopping", hint="It goes on when the daemon is back.")
