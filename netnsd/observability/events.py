"""What happened, for whoever listens: a short memory and live followers."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from operator import attrgetter
from typing import Any

import trio

from netnsd import wire

_REMEMBERED = 1000
_FOLLOWER_BACKLOG = 2 * _REMEMBERED  # more than one request can cause at once


class EventLog:
    """Events of this run of the daemon. A follower that does not read is dropped, not waited for.

    Args:
        now: the time as RFC 3339.
    """

    def __init__(self, now: Callable[[], str]) -> None:
        self._now = now
        self._seq = 0
        self._past: dict[int, deque[wire.Event]] = {}
        self._followers: dict[trio.MemorySendChannel[wire.Event], Callable[[int], bool]] = {}

    def emit(self, kind: str, uid: int, environment: str, name: str, /, **details: Any) -> None:
        """Tell everybody; ``uid`` is whose event it is: the environment's owner's.

        Of those who have events remembered, the one who has most loses the oldest: nobody can crowd out others'.
        """
        self._seq += 1
        event = wire.Event(seq=self._seq, time=self._now(), kind=kind, environment=environment, name=name,
                           details=details)
        self._past.setdefault(uid, deque()).append(event)
        if sum(map(len, self._past.values())) > _REMEMBERED:
            max(self._past.values(), key=len).popleft()
        for follower in [f for f, may_see in self._followers.items() if may_see(uid)]:
            try:
                follower.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                follower.close()
                self._followers.pop(follower, None)

    async def follow(self, may_see: Callable[[int], bool], after: int, goes_on: bool = True,
                     ) -> AsyncGenerator[wire.Event, None]:
        """Remembered events later than number ``after`` that the follower may see; then new ones, where it goes on."""
        send, receive = trio.open_memory_channel[wire.Event](_FOLLOWER_BACKLOG)
        past = sorted((event for uid, events in self._past.items() if may_see(uid) for event in events),
                      key=attrgetter("seq"))
        self._followers[send] = may_see
        try:
            for event in past:
                if event.seq > after:
                    yield event
            if not goes_on:
                return
            async for event in receive:
                yield event
        finally:
            self._followers.pop(send, None)
            send.close()
            receive.close()
