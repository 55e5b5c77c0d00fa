"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSE_SECONDS = 0.005


class DeadlineError(AssertionError):
    """What was waited for did not come."""


def wait_until(condition: Callable[[], T], *, seconds: float = 5.0, what: str = "the condition") -> T:
    """Call ``condition`` until it returns something true, and return that.

    Raises DeadlineError, with the last value, after ``seconds``. The condition is tried a last time at the deadline.
    """
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= deadline
        value = condition()
        if value:
            return value
        if late:
            raise DeadlineError(f"{what} did not hold within {seconds} s (last seen: {value!r})")
        time.sleep(_PAUSE_SECONDS)
