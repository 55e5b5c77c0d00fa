"""What it costs to have environments that nobody uses at the moment."""

from __future__ import annotations

import time

from tests.bench.figures import Bar, Figures
from tests.bench.hosts import POOL, fresh, settle
from tests.bench.parts.part import Part


class Idle(Part):
    """Memory and processor time of daemon and launcher, with environments and a full pool and nothing asked."""

    name = "idle"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        sizes = self.bench.sizes
        with fresh(POOL) as subject:
            subject.fill(sizes.idle)
            subject.await_full_pool()
            settle()
            time.sleep(1.0)  # what follows a creation by design, such as a refill's end, is not idling
            self.bench.tell(f"idle: {sizes.idle_seconds:g} s with {sizes.idle} environments")
            began, used = time.monotonic(), subject.cpu_seconds()
            time.sleep(sizes.idle_seconds)
            used = subject.cpu_seconds() - used
            figures.values["idle: % of a core"] = 100 * used / (time.monotonic() - began)
            figures.values["idle: daemon MiB"], figures.values["idle: launcher MiB"] = subject.memory_mib()
            self.bench.tell("idle: removing all")
            subject.remove_all()

    def bars(self, figures: Figures) -> list[Bar]:
        daemon, launcher = figures.values.get("idle: daemon MiB"), figures.values.get("idle: launcher MiB")
        both = None if daemon is None or launcher is None else daemon + launcher
        return [Bar("idle, memory of daemon and launcher", both, "MiB", "<=", 120.0),
                Bar("idle, processor time", figures.values.get("idle: % of a core"), "% of a core", "<=", 0.1)]
