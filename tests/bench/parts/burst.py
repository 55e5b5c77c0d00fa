"""Many creations at once."""

from __future__ import annotations

import statistics

from tests.bench.figures import Bar, Figures, ratio, scaled
from tests.bench.hosts import POOL, fresh, settle
from tests.bench.parts.part import Part

_CONNECTIONS = 64
_BY_HAND = 20


class Burst(Part):
    """Creations over 64 connections, with a look at the list every now and then; beside it one by hand at a time."""

    name = "burst"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        sizes = self.bench.sizes
        with fresh(POOL) as subject:
            subject.fill(10)  # the first of everything meets cold caches
            subject.remove_all()
            for number in range(sizes.repeats):
                self.bench.tell(f"burst of {sizes.burst}, {number + 1} of {sizes.repeats}")
                settle()
                self.bench.by_hand(_BY_HAND, figures)
                subject.await_full_pool()
                settle()
                found = subject.volley(
                    [("POST", "/v1/environments", subject.request(f"burst-{one}")) for one in range(sizes.burst)],
                    connections=_CONNECTIONS, probe="/v1/environments")
                failed = sizes.burst - found["statuses"].get("201", 0)
                figures.count("burst: failures", failed)
                if failed:
                    self.bench.tell(f"a creation failed: {found['failure'][:200]}\n")
                figures.add("burst, per environment", [(found["end"] - found["begin"]) * 1e6 / sizes.burst])
                figures.add("burst, POST", found["took_us"])
                figures.add("burst, GET of the list meanwhile", found["probe_us"])
                subject.remove_all()

    def bars(self, figures: Figures) -> list[Bar]:
        by_hand = statistics.fmean(figures.samples["by hand"]) if "by hand" in figures.samples else None
        return [Bar("burst, throughput", ratio(by_hand, figures.median("burst, per environment")),
                    "x by hand", ">=", 8.0),
                Bar("burst, failures", figures.values.get("burst: failures"), "", "<=", 0),
                Bar("burst, GET meanwhile, 95th of 100", scaled(figures.p95("burst, GET of the list meanwhile"), 1e-3),
                    "ms", "<=", 100.0)]
