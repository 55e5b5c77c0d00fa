"""Very many environments on one host."""

from __future__ import annotations

import os

from tests.bench.figures import Bar, Figures, ratio, scaled
from tests.bench.hosts import Subject, fresh, settle
from tests.bench.parts.part import Part
from tests.bench.programs import time_of
from tests.harness.daemon import program

_ENDS = 100
_LISTINGS = 5
_WARM_UP = 10


class Density(Part):
    """The first and the last hundred are made one after the other, cold; those between them, sixteen at a time."""

    name = "density"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        count = self.bench.sizes.density
        ends = min(_ENDS, count // 3)
        with fresh(0) as subject:
            subject.fill(_WARM_UP, prefix="first")
            subject.remove_all()
            settle()
            self.bench.tell(f"density: the first {ends} of {count}")
            _create(subject, "low", ends, figures, "density, the first, inside the daemon")
            self.bench.tell(f"density: up to {count - ends}")
            subject.fill(count - 2 * ends)
            settle()
            self.bench.tell(f"density: the last {ends} of {count}")
            _create(subject, "high", ends, figures, "density, the last, inside the daemon")
            figures.values["density: environments"] = len(subject.names())
            figures.values["density: daemon MiB"], figures.values["density: launcher MiB"] = subject.memory_mib()
            settle()
            environment = {"NETNSD_SOCKET": subject.socket, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
            figures.add("density, netnsctl ls",
                        [time_of([program("netnsctl"), "ls"], environment) for _ in range(_LISTINGS)])
            self.bench.tell("density: removing all")
            subject.remove_all()
            settle()

    def bars(self, figures: Figures) -> list[Bar]:
        return [Bar("density, the last creates", ratio(figures.median("density, the last, inside the daemon"),
                                                       figures.median("density, the first, inside the daemon")),
                    "x the first", "<=", 2.5),
                Bar("density, memory of the daemon", figures.values.get("density: daemon MiB"), "MiB", "<=", 150.0),
                Bar("density, netnsctl ls", scaled(figures.median("density, netnsctl ls"), 1e-6), "s", "<=", 0.5)]


def _create(subject: Subject, prefix: str, count: int, figures: Figures, name: str) -> None:
    figures.add(name, [subject.create(f"{prefix}-{number}").work for number in range(count)])
