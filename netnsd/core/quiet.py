"""When to do what nobody waits for: while nobody waits for anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

# Work behind begins so long after the last creation ended, and is put off so long at most.
_PAUSE_SECONDS = 0.005
_PATIENCE_SECONDS = 0.5


class Quiet:
    """Knows whether somebody waits for a creation."""

    def __init__(self) -> None:
        self._busy = 0
        self._last = 0.0

    @contextmanager
    def disturbed(self) -> Iterator[Callable[[], None]]:
        """Somebody waits until what this gives is called, or to the end."""
        self._busy += 1
        is_disturbed = True

        def calm() -> None:
            nonlocal is_disturbed
            if is_disturbed:
                is_disturbed = False
                self._busy -= 1
                self._last = trio.current_time()

        try:
            yield calm
        finally:
            calm()

    async def wait(self) -> None:
        """Return when nobody waits, and nobody did a moment ago; after half a second in any case."""
        await trio.lowlevel.checkpoint()
        give_up = trio.current_time() + _PATIENCE_SECONDS
        while (now := trio.current_time()) < give_up:
            rest = self._last + _PAUSE_SECONDS - now
            if not self._busy and rest <= 0:
                return
            await trio.sleep(max(rest, _PAUSE_SECONDS if self._busy else 0.0))
