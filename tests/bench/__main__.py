"""Measures, and prints a table or JSON. All figures are medians; ratios are of medians taken in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.measuring import Bench, Samples


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Compare netnsd with the kernel's floor.")
    parser.add_argument("--samples", type=int, default=100, help="of each kind (default: 100)")
    parser.add_argument("--delete", type=int, default=200, help="environments to delete at once (default: 200)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if options.samples < 1 or options.delete < 1:
        parser.error("numbers are 1 or more")
    with Bench() as bench:
        samples = bench.measure(options.samples, options.delete, _tell if sys.stderr.isatty() else lambda _what: None)
    report = {
        "machine": {"kernel": platform.release(), "python": platform.python_version(), "cpus": bench.cpus},
        "samples": options.samples,
        "results": {name: _summary(taken) for name, taken in samples.items()},
        "ratios": _ratios(samples),
    }
    print(json.dumps(report, indent=2) if options.json else _table(report))


def _tell(what: str) -> None:
    sys.stderr.write(f"\r{what:<60}\r")


def _summary(taken: Sequence[float]) -> dict[str, float | int]:
    ordered = sorted(taken)
    return {"median_us": round(statistics.median(ordered), 1), "p95_us": round(ordered[int(len(ordered) * 0.95)], 1),
            "count": len(ordered)}


# What is measured, and what it is compared with.
COMPARISONS = (
    ("create", "floor create"),
    ("create with a service", "floor create"),
    ("by hand create", "floor create"),
    ("by hand create", "create"),
    ("delete", "floor delete"),
    ("by hand delete", "delete"),
    ("netnsctl ls", "python3 -c pass"),
    ("netnsctl create", "python3 -c pass"),
)


def _ratios(samples: Mapping[str, Samples]) -> dict[str, float]:
    return {f"{what} / {base}": round(statistics.median(samples[what]) / statistics.median(samples[base]), 2)
            for what, base in COMPARISONS}


def _table(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    lines = [f"Linux {machine['kernel']}, Python {machine['python']}, {machine['cpus']} CPUs", "",
             f"{'':<26}{'median':>12}{'p95':>12}{'samples':>9}"]
    lines += [f"{name:<26}{found['median_us'] / 1000:>9.2f} ms{found['p95_us'] / 1000:>9.2f} ms{found['count']:>9}"
              for name, found in report["results"].items()]
    lines += ["", *(f"{name:<44}{ratio:>8.2f}" for name, ratio in report["ratios"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
