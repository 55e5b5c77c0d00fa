"""What it costs to have environments that nobody uses at the moment."""

from __future__ import annotations

import time

from netnsd.daemon.config import Config
from tests.bench.figures import Bar, Figures
from tests.bench.hosts import fresh, settle
from tests.bench.parts.part import Part

# What follows creations by design is not idling: the pool is as large as its demand was for ten seconds.
_AFTER_SECONDS = 13.0


class Idle(Part):
    """Memory and processor time of daemon and launcher, with environments, a pool of the usual size, nothing asked."""

    name = "idle"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        sizes = self.bench.sizes
        with fresh(Config().pool.size) as subject:
            subject.fill(sizes.idle)
            subject.await_full_pool()
            settle()
            time.sleep(_AFTER_SECONDS)
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
