"""Measures, and prints a table or JSON. Bars are printed beside the figures; they never decide the exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench import report
from tests.bench.figures import Bar, Figures
from tests.bench.hosts import Hosts, settle
from tests.bench.parts import PARTS, Bench, Part, Sizes
from tests.bench.programs import Programs

_FULL = Sizes()
_QUICK = Sizes(samples=20, burst=100, density=300, delete=100, idle=100, idle_seconds=5.0, repeats=2)

_LINES = 5  # of what a failure has to say


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure netnsd, beside the kernel's floor.")
    parser.add_argument("--only", metavar="NAME[,NAME...]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--samples", type=int, help=f"of each kind that is cheap to take (default: {_FULL.samples})")
    parser.add_argument("--quick", action="store_true", help="a small run, to see that all of it works")
    parser.add_argument("--idle-seconds", type=float,
                        help=f"how long idling is watched (default: {_FULL.idle_seconds:g})")
    parser.add_argument("--pause-ms", type=int, default=0, help="before each sample, on both sides (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    small = _QUICK if options.quick else _FULL
    samples = small.samples if options.samples is None else options.samples
    seconds = small.idle_seconds if options.idle_seconds is None else options.idle_seconds
    if samples < 1 or seconds <= 0 or options.pause_ms < 0:
        parser.error("numbers are 1 or more")
    sizes = Sizes(samples=samples, burst=small.burst, density=small.density, delete=small.delete, idle=small.idle,
                  repeats=small.repeats, idle_seconds=seconds, pause_ms=options.pause_ms)
    run = Run([PARTS[name] for name in PARTS if name in names], sizes)
    run.measure()
    found = report.as_json(run.figures, run.bars, sizes, names, is_quick=options.quick)
    print(json.dumps(found, indent=2) if options.json else report.as_table(found))
    if run.failures:
        sys.exit("\n".join(f"could not be measured: {name}: {reason}" for name, reason in run.failures.items()))


class Run:
    """One run. ``failures``: parts that could not be measured, and why; the others are measured all the same."""

    def __init__(self, kinds: Sequence[type[Part]], sizes: Sizes) -> None:
        self._kinds = kinds
        self._sizes = sizes
        self.figures = Figures()
        self.bars: list[Bar] = []
        self.failures: dict[str, str] = {}

    def measure(self) -> None:
        """Take everything."""
        with tempfile.TemporaryDirectory(prefix="netnsd-bench-") as built, Hosts() as hosts:
            bench = Bench(hosts, Programs(Path(built)), self._sizes, _tell)
            parts = [kind(bench) for kind in self._kinds]
            self._take_rounds(bench, [part for part in parts if not part.is_heavy])
            for part in parts:
                if part.is_heavy:
                    _tell(part.name)
                    settle()
                    self._take(part, self.figures)
            _tell("")
            self.bars = [bar for part in parts for bar in self._bars_of(part)]

    def _take_rounds(self, bench: Bench, parts: Sequence[Part]) -> None:
        if not parts:
            return
        each = self._sizes.per_round
        rounds = -(-self._sizes.samples // each)
        for number in range(rounds + 1):
            # The first of everything meets cold caches: a bridge is made, modules are imported. It does not count.
            figures = self.figures if number else Figures()
            if any(part.needs_floor for part in parts):
                settle()
                figures.add("floor", bench.floor(each, pause_ms=self._sizes.pause_ms)["create"])
            for part in parts:
                _tell(f"round {number} of {rounds}: {part.name}")
                self._take(part, figures)

    def _take(self, part: Part, figures: Figures) -> None:
        if part.name in self.failures:
            return
        try:
            part.measure(figures)
        except (AssertionError, LookupError, OSError, subprocess.SubprocessError) as error:
            lines = (str(error) or repr(error)).strip().splitlines()
            self.failures[part.name] = "\n".join(lines if len(lines) <= _LINES else [lines[0], "...", *lines[-_LINES:]])

    def _bars_of(self, part: Part) -> list[Bar]:
        bars = part.bars(self.figures)
        if part.name not in self.failures:
            return bars
        return [replace(bar, measured=None, note="could not be measured") for bar in bars]


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what:<70}\r")


if __name__ == "__main__":
    main()
