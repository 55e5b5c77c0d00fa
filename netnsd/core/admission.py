"""How many creations are under way at once, and whose turn is next.

Creations beyond what the host does at once wait in a line per user, and the lines take turns: who asks for five hundred
does not keep waiting who asks for one. A line has an end, past which the answer is no, at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from netnsd.errors import Overloaded

# The kernel makes one namespace at a time; the others are read, recorded, or wait for their server's start.
AT_ONCE = 8
_RETRY_SECONDS = 1


class Admission:
    """Bounds creations.

    Args:
        at_once: under way at the same time, of all users.
        waiting: that wait, of one user.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once = at_once
        self._most_waiting = waiting
        self._under_way = 0
        # In the order of their turns.
        self._lines: dict[int, deque[trio.Event]] = {}
        self.refused = 0

    @property
    def waiting(self) -> int:
        """How many wait, of all users."""
        return sum(map(len, self._lines.values()))

    @property
    def under_way(self) -> int:
        """How many were let in and have not ended."""
        return self._under_way

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[Callable[[], None]]:
        """Wait for a turn of that user's, and have it until what this gives is called, or to the end.

        Raises Overloaded at once where too many wait already.
        """
        if self._under_way < self._at_once:
            self._under_way += 1
        else:
            await self._wait(uid)
        is_held = True

        def give_back() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._pass_on()

        try:
            yield give_back
        finally:
            give_back()

    async def _wait(self, uid: int) -> None:
        line = self._lines.get(uid, deque())
        if len(line) >= self._most_waiting:
            self.refused += 1
            raise Overloaded(f"{len(line)} creations of yours wait already",
                             hint=f"Try again in {_RETRY_SECONDS} s, or ask for many with one request (count).",
                             waiting=len(line), retry_after_seconds=_RETRY_SECONDS)
        turn = trio.Event()
        line.append(turn)
        self._lines[uid] = line  # a line that nobody stands in is never among them
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():  # it was given the turn in the same moment
                self._pass_on()
            else:
                self._leave(uid, turn)
            raise

    def _leave(self, uid: int, turn: trio.Event) -> None:
        self._lines[uid].remove(turn)
        if not self._lines[uid]:
            del self._lines[uid]

    def _pass_on(self) -> None:
        """Give a turn that ended to the first of the next line, which goes behind the others."""
        if not self._lines:
            self._under_way -= 1
            return
        uid = next(iter(self._lines))
        line = self._lines.pop(uid)
        line.popleft().set()
        if line:
            self._lines[uid] = line
