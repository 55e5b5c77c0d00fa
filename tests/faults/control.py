"""What a test and a planted process share: a page that arms it, and a list of the steps that it took.

Standard library only.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

_BYTES = 4096
_ARMED, _ACTION, _PERSISTS = 0, 1, 2
_NUMBERS = struct.Struct("=III")  # the occurrence, how many were seen, how often it fired
_NUMBERS_AT, _TEXT_AT = 16, 64
_LENGTH = struct.Struct("=I")
KILL, FAIL = 1, 2


@dataclass(frozen=True, slots=True)
class Step:
    """A call that a planted process made: where in the code, of what, and of which kind."""

    point: str
    name: str
    kind: str


class Control:
    """The shared page at ``path``, and beside it ``path``.steps. ``create`` by the test, mapped by the process."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        self._steps = f"{path}.steps"
        if create:
            Path(path).write_bytes(b"\0" * _BYTES)
            Path(self._steps).write_bytes(b"")
            os.chmod(self._steps, 0o666)  # children write to it when they are users already
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), _BYTES)
        self._lock = threading.Lock()

    # -- the test's end -------------------------------------------------------------------------------------------

    def record(self) -> None:
        """Forget what was, and write down every step from now on."""
        self._arm(0, "", "", 0, persists=False)

    def kill_at(self, point: str, occurrence: int) -> None:
        """Have the process kill itself as it is about to take that step for the ``occurrence``-th time, from 1."""
        self._arm(KILL, point, "", occurrence, persists=False)

    def fail_at(self, point: str, occurrence: int, what: str, *, persists: bool = False) -> None:
        """Have that step fail so; with ``persists`` each time from then on."""
        self._arm(FAIL, point, what, occurrence, persists=persists)

    def disarm(self) -> None:
        """Let everything be."""
        self._page[_ARMED] = 0

    @property
    def fired(self) -> int:
        """How often something was made to happen since it was armed."""
        fired: int = _NUMBERS.unpack_from(self._page, _NUMBERS_AT)[2]
        return fired

    def steps(self) -> list[Step]:
        """What was taken since it was armed."""
        lines = Path(self._steps).read_text(encoding="utf-8").splitlines()
        return [Step(*line.split("\t")) for line in lines]

    def _arm(self, action: int, point: str, what: str, occurrence: int, *, persists: bool) -> None:
        self.disarm()
        os.truncate(self._steps, 0)
        self._page[_ACTION], self._page[_PERSISTS] = action, persists
        _NUMBERS.pack_into(self._page, _NUMBERS_AT, occurrence, 0, 0)
        text = f"{point}\t{what}".encode()
        _LENGTH.pack_into(self._page, _NUMBERS_AT + _NUMBERS.size, len(text))
        self._page[_TEXT_AT:_TEXT_AT + len(text)] = text
        self._page[_ARMED] = 1

    # -- the process's end ----------------------------------------------------------------------------------------

    @property
    def is_armed(self) -> bool:
        """Whether steps count."""
        return bool(self._page[_ARMED])

    def step(self, step: Step) -> str | None:
        """A step is about to be taken. Kills the process, or returns how the step is to fail, if it is."""
        with self._lock:
            if not self._page[_ACTION]:
                self._write(step)
                return None
            (length,) = _LENGTH.unpack_from(self._page, _NUMBERS_AT + _NUMBERS.size)
            point, what = self._page[_TEXT_AT:_TEXT_AT + length].decode().split("\t")
            if point != step.point:
                return None
            occurrence, seen, fired = _NUMBERS.unpack_from(self._page, _NUMBERS_AT)
            seen += 1
            fires = seen == occurrence or (seen > occurrence and self._page[_PERSISTS])
            _NUMBERS.pack_into(self._page, _NUMBERS_AT, occurrence, seen, fired + bool(fires))
            if not fires:
                return None
            if self._page[_ACTION] == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
        return what

    def note(self, step: Step) -> None:
        """Write down a call that is no step, in a recording."""
        if not self._page[_ACTION]:
            self._write(step)

    def _write(self, step: Step) -> None:
        # Opened each time: launcher and children close what they do not know. In append mode one write is whole.
        fd = os.open(self._steps, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, f"{step.point}\t{step.name}\t{step.kind}\n".encode())
        finally:
            os.close(fd)
