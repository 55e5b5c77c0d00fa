"""Whole runs of netnsctl, beside a Python that does nothing."""

from __future__ import annotations

import os
import sys
import time

from tests.bench.figures import Bar, Figures, ratio
from tests.bench.hosts import settle
from tests.bench.parts.part import Part
from tests.bench.programs import time_of
from tests.harness.daemon import program

_NOTHING = "python3 -c pass"


class Client(Part):
    """From the start of a process to its end."""

    name = "client"

    def measure(self, figures: Figures) -> None:
        warm, ctl = self.bench.hosts.warm, program("netnsctl")
        warm.await_full_pool()
        settle()
        environment = {"NETNSD_SOCKET": warm.socket, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for number in range(self.bench.sizes.per_round):
            for name, command in ((_NOTHING, [sys.executable, "-c", "pass"]),
                                  ("netnsctl ls", [ctl, "ls"]),
                                  ("netnsctl create", [ctl, "create", f"client-{number}", "--label", "bench=1"])):
                time.sleep(self.bench.sizes.pause_ms / 1000)
                figures.add(name, [time_of(command, environment)])
        warm.remove_all()

    def bars(self, figures: Figures) -> list[Bar]:
        base = figures.median(_NOTHING)
        return [Bar(what, ratio(figures.median(what), base), f"x {_NOTHING}", "<=", bar)
                for what, bar in (("netnsctl ls", 5.0), ("netnsctl create", 6.0))]
