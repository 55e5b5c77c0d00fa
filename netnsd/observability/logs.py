"""Structured logs: for people on a terminal, JSON otherwise. Event names are constants; the rest are fields."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, BinaryIO, cast

import msgspec
import structlog

# Without the local variables of each frame, which hold users' secrets.
_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))


def configure(level: str) -> None:
    """Set up structlog for the process; ``level`` is debug, info, warning or error."""
    terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback) if terminal
        else structlog.processors.JSONRenderer(serializer=_json))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [_TRACEBACKS]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=(structlog.PrintLoggerFactory(sys.stderr) if terminal
                        else structlog.BytesLoggerFactory(cast("BinaryIO", _Lenient(sys.stderr.fileno())))),
        cache_logger_on_first_use=True,
    )


class _Lenient:
    """A descriptor to write lines to. Where it fails (a full disk, a reader that has gone) lines are lost, no more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, line: bytes) -> int:
        """Write what can be written."""
        rest = line
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest):]
        return len(line)

    def flush(self) -> None:
        """Nothing is kept back."""


def _json(entry: Any, **_: Any) -> bytes:
    """What is none of JSON's types is shown as Python shows it. A line is written by every change: msgspec is fast."""
    return msgspec.json.encode(entry, enc_hook=repr)
