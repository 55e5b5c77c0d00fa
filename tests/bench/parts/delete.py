"""Many removals at once, until the kernel has nothing of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.bench.figures import Bar, Figures, scaled
from tests.bench.hosts import POOL, Subject, fresh, settle
from tests.bench.parts.part import Part
from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness.daemon import Daemon

_FLOOR = "delete, floor, each"
_SLEEPER = ["/bin/sleep", "3600"]


class Delete(Part):
    """One request for all of them. The kernel is watched by a process on the host; the daemon's word is not taken."""

    name = "delete"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        sizes = self.bench.sizes
        with fresh(0) as subject, _watcher(subject.daemon) as watcher:
            in_one = subject.learn_removal()
            figures.values["delete: requests for all of them"] = 1 if in_one else sizes.delete
            settle()
            before = _ask(watcher, "count")
            for number in range(sizes.repeats):
                self.bench.tell(f"delete of {sizes.delete}, {number + 1} of {sizes.repeats}")
                settle()
                figures.add(_FLOOR, [self.bench.floor(sizes.delete)["delete"]])
                self._delete(subject, watcher, before, figures, "delete")
            for number in range(-(-sizes.repeats // 2)):
                self.bench.tell(f"delete of {sizes.delete} with a server each, {number + 1}")
                self._delete(subject, watcher, before, figures, "delete with a server", command=_SLEEPER)

    def _delete(self, subject: Subject, watcher: subprocess.Popen[bytes], before: dict[str, int], figures: Figures,
                name: str, **request: Any) -> None:
        count = self.bench.sizes.delete
        subject.fill(count, prefix="delete", **request)
        settle()
        there = _ask(watcher, "count")
        assert there["names"] == before["names"] + count, there
        removals = subject.removals()
        _order(watcher, "until " + json.dumps(before))
        found = subject.volley(removals, connections=POOL, probe="/v1/environments")
        assert not found["failure"], found["failure"]
        gone = {kind: moment for kind, moment in _answer(watcher).items() if there[kind] > before[kind]}

        def each(moment: float) -> list[float]:
            return [(moment - found["begin"]) * 1e6 / count]

        figures.add(f"{name}, until gone, each", each(max(gone.values())))
        figures.add(f"{name}, until answered, each", each(found["end"]))
        for kind, moment in gone.items():
            figures.add(f"{name}, until the {kind} are gone, each", each(moment))
        figures.add(f"{name}, GET of the list meanwhile", found["probe_us"])

    def bars(self, figures: Figures) -> list[Bar]:
        return [Bar("delete of many, until gone, each", scaled(figures.median("delete, until gone, each"), 1e-3), "ms",
                    "<=", 1.5)]


@contextlib.contextmanager
def _watcher(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    process = daemon.host.popen([sys.executable, "-m", "tests.bench.agents.presence", daemon.cgroup], cwd="/",
                                env=AGENT_ENVIRONMENT, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=10)


def _order(watcher: subprocess.Popen[bytes], line: str) -> None:
    assert watcher.stdin is not None
    watcher.stdin.write(line.encode() + b"\n")
    watcher.stdin.flush()


def _answer(watcher: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert watcher.stdout is not None
    line = watcher.stdout.readline()
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        raise AssertionError((line + watcher.stdout.read()).decode(errors="replace")) from None
    return answer


def _ask(watcher: subprocess.Popen[bytes], line: str) -> dict[str, Any]:
    _order(watcher, line)
    return _answer(watcher)
