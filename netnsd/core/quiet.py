"""When to do what nobody waits for: while nobody waits for anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

# Work behind begins so long after the last creation ended, and is put off so long at most.
_PAUSE_SECONDS = 0.005
_PATIENCE_SECONDS = 0.5


class Quiet:
    """Knows whether somebody waits for a creation. Who waits for long is waited for no more."""

    def __init__(self) -> None:
        self._began: dict[object, float] = {}
        self._last = 0.0

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """Somebody waits until this ends."""
        token = object()
        self._began[token] = trio.current_time()
        try:
            yield
        finally:
            del self._began[token]
            self._last = trio.current_time()

    async def wait(self) -> None:
        """Return when nobody waits, and nobody did a moment ago; after half a second in any case."""
        await trio.lowlevel.checkpoint()
        give_up = trio.current_time() + _PATIENCE_SECONDS
        while (now := trio.current_time()) < give_up:
            is_busy = any(began > now - _PATIENCE_SECONDS for began in self._began.values())
            rest = self._last + _PAUSE_SECONDS - now
            if not is_busy and rest <= 0:
                return
            await trio.sleep(max(rest, _PAUSE_SECONDS if is_busy else 0.0))
