"""What happened, for whoever listens: a short memory and live followers."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import trio

from netnsd import wire

_REMEMBERED = 1000
_FOLLOWER_BACKLOG = 256


class EventLog:
    """Events of this run of the daemon. A follower that does not read is dropped, not waited for.

    Args:
        now: the time as RFC 3339.
    """

    def __init__(self, now: Callable[[], str]) -> None:
        self._now = now
        self._seq = 0
        self._past: deque[tuple[int, wire.Event]] = deque(maxlen=_REMEMBERED)
        self._followers: set[trio.MemorySendChannel[tuple[int, wire.Event]]] = set()

    def emit(self, kind: str, uid: int, environment: str, name: str, **details: Any) -> None:
        """Tell everybody; ``uid`` is the environment's owner's."""
        self._seq += 1
        event = wire.Event(seq=self._seq, time=self._now(), kind=kind, environment=environment, name=name,
                           details=details)
        self._past.append((uid, event))
        for follower in list(self._followers):
            try:
                follower.send_nowait((uid, event))
            except (trio.WouldBlock, trio.BrokenResourceError):
                follower.close()
                self._followers.discard(follower)

    async def follow(self, may_see: Callable[[int], bool], after: int) -> AsyncGenerator[wire.Event, None]:
        """Remembered events later than number ``after`` that the follower may see, then new ones, for ever."""
        send, receive = trio.open_memory_channel[tuple[int, wire.Event]](_FOLLOWER_BACKLOG)
        past = list(self._past)
        self._followers.add(send)
        try:
            for uid, event in past:
                if event.seq > after and may_see(uid):
                    yield event
            async for uid, event in receive:
                if may_see(uid):
                    yield event
        finally:
            self._followers.discard(send)
            send.close()
            receive.close()
