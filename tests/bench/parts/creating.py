"""One creation after the other: cold, warm, and warm with a service."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from tests.bench.figures import Bar, Figures, ratio
from tests.bench.hosts import Subject, has_pools, settle
from tests.bench.parts.part import Part

_SLEEPER = ["/bin/sleep", "3600"]
NO_POOL = "the daemon has no pool: made cold"


class Creations(Part):
    """Creations over a keep-alive connection, by the daemon's own account and by the clock."""

    needs_floor = True
    request: ClassVar[dict[str, Any]] = {}

    @property
    def subject(self) -> Subject:
        """The daemon."""
        return self.bench.hosts.cold

    def measure(self, figures: Figures) -> None:
        subject = self.subject
        subject.await_full_pool()
        settle()
        before = subject.warm_claims()
        for number in range(self.bench.sizes.per_round):
            time.sleep(self.bench.sizes.pause_ms / 1000)
            answer = subject.create(f"{self.name}-{number}", **self.request)
            figures.add(f"{self.name}, inside the daemon", [answer.work])
            figures.add(f"{self.name}, POST", [answer.took])
        after = subject.warm_claims()
        if before is not None and after is not None:
            figures.count(f"{self.name}: claims that were warm", after[0] - before[0])
            figures.count(f"{self.name}: claims that were not", after[1] - before[1])
        subject.remove_all()


class Cold(Creations):
    """Without a pool and without a service."""

    name = "cold"

    def bars(self, figures: Figures) -> list[Bar]:
        return [Bar("cold create, inside the daemon",
                    ratio(figures.median("cold, inside the daemon"), figures.median("floor")), "x floor", "<=", 1.5)]


class Warm(Creations):
    """From a full pool, without a service."""

    name = "warm"

    @property
    def subject(self) -> Subject:
        return self.bench.hosts.warm

    def bars(self, figures: Figures) -> list[Bar]:
        return [Bar("warm create, inside the daemon",
                    ratio(figures.median("warm, inside the daemon"), figures.median("floor")), "x floor", "<=", 0.4,
                    "" if has_pools() else NO_POOL)]


class WithService(Warm):
    """From a full pool, with a service that has been exec'd when the answer comes."""

    name = "service"
    request: ClassVar[dict[str, Any]] = {"command": _SLEEPER}

    def bars(self, figures: Figures) -> list[Bar]:
        median, note = figures.median("service, POST"), "" if has_pools() else NO_POOL
        return [Bar("create with a service, POST to answer", ratio(median, figures.median("floor")), "x floor",
                    "<=", 3.0, note),
                Bar("its 95th of 100", ratio(figures.p95("service, POST"), median), "x its median", "<=", 2.0, note)]
