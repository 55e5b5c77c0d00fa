"""From asking for an environment with a web server to the first answer of that."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.bench.figures import Bar, Figures, plus, ratio
from tests.bench.hosts import has_pools, settle
from tests.bench.parts.creating import NO_POOL
from tests.bench.parts.part import Part
from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import HostNamespace

_PORT = 8000
_BARE, _ENVIRONMENT = "first 200, bare server", "first 200, POST"


class First200(Part):
    """The clock runs in a process on the environment's host, which asks for it, and then knocks until it is let in."""

    name = "first200"
    needs_floor = True

    def measure(self, figures: Figures) -> None:
        program, warm = self.bench.programs.server, self.bench.hosts.warm
        settle()
        figures.add(_BARE, self._run(self.bench.hosts.others, {"program": program}))
        warm.await_full_pool()
        settle()
        request = warm.request(None, command=[program, str(_PORT)])  # without a name, one request serves all
        figures.add(_ENVIRONMENT, self._run(warm.daemon.host, {"socket": warm.daemon.socket, "request": request}))
        warm.remove_all()

    def _run(self, host: HostNamespace, order: dict[str, Any]) -> list[float]:
        sizes = self.bench.sizes
        done = host.run([sys.executable, "-m", "tests.bench.agents.first200"], env=AGENT_ENVIRONMENT, cwd="/",
                        check=True, timeout=120, stdin=json.dumps({"port": _PORT, "count": sizes.per_round,
                                                       "pause_ms": sizes.pause_ms, **order}))
        taken: list[float] = json.loads(done.stdout)
        return taken

    def bars(self, figures: Figures) -> list[Bar]:
        base = plus(figures.median("floor"), figures.median(_BARE))
        return [Bar("POST to the first HTTP 200 at its address", ratio(figures.median(_ENVIRONMENT), base),
                    "x (floor + bare start)", "<=", 3.0, "" if has_pools() else NO_POOL)]
