"""Waiting for what becomes of an environment, as ``wait`` and ``create --wait`` do. Without click."""

from __future__ import annotations

import time

from netnsd.client.transport import environment_path
from netnsd.errors import WaitTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from netnsd.client.session import Session

# How much longer than its own limit an answer may take before we give up on the daemon.
_MARGIN_SECONDS = 30.0


def wait_for(session: Session, ref: str, condition: str, limit: float | None) -> Any:
    """The daemon's answer once ``condition`` (ready, exit, gone) holds; ``limit`` (seconds) None waits for ever.

    Raises WaitTimeout, WrongState, NotFound and the transport's errors.
    """
    margin = None if limit is None else limit + _MARGIN_SECONDS
    path = environment_path(ref, "wait", **{"for": condition, "timeout": None if limit is None else f"{limit:g}"})
    while True:
        began = time.monotonic()
        try:
            return session.client.request("GET", path, None, margin)
        except WaitTimeout:
            # Nobody asked for a limit: this was the daemon's own, unless it does not wait at all.
            if limit is not None or time.monotonic() - began < 1:
                raise
