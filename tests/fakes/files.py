"""Files that are names in a set, and a clock that ticks when it is looked at."""

from __future__ import annotations

import os

from netnsd.core.environment import Environment
from netnsd.core.interfaces import Clock, Files


class FakeFiles:
    """Implements ``core.interfaces.Files``; logs are real descriptors of nothing."""

    def __init__(self) -> None:
        self.furnished: set[str] = set()
        self.logs: dict[str, set[str]] = {}
        self.descriptors: list[int] = []

    def furnish(self, environment: Environment) -> tuple[str, str | None]:
        self.furnished.add(environment.id)
        return f"/fake/{environment.id}/hosts", f"/fake/{environment.id}/resolv.conf"

    def open_log(self, environment: Environment, service: str) -> int:
        self.logs.setdefault(environment.id, set()).add(service)
        self.descriptors.append(os.memfd_create(f"{service}.log"))
        return self.descriptors[-1]

    def log_path(self, environment_id: str, service: str) -> str:
        return f"/fake/{environment_id}/{service}.log"

    def remove(self, environment_id: str) -> None:
        self.furnished.discard(environment_id)
        self.logs.pop(environment_id, None)

    def observe(self) -> set[str]:
        return self.furnished | self.logs.keys()


class FakeClock:
    """Implements ``core.interfaces.Clock``: each look is a second later."""

    def __init__(self) -> None:
        self._seconds = 0

    def now(self) -> str:
        self._seconds += 1
        return f"2030-01-01T{self._seconds // 3600:02}:{self._seconds // 60 % 60:02}:{self._seconds % 60:02}.000000Z"


_: type[Files] = FakeFiles
__: type[Clock] = FakeClock
