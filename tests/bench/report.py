"""The report: JSON to keep, and a table to read."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

from netnsd import __version__
from tests.bench.figures import Bar, Figures, ratio
from tests.bench.parts import Sizes


def machine() -> dict[str, Any]:
    """What it was measured on. Memory in MiB."""
    return {"kernel": platform.release(), "architecture": platform.machine(), "python": platform.python_version(),
            "cpus": len(os.sched_getaffinity(0)), "cpu_model": _value("/proc/cpuinfo", "model name") or "unknown",
            "memory_mib": int(_value("/proc/meminfo", "MemTotal").split()[0]) // 1024}


def as_json(figures: Figures, bars: Sequence[Bar], sizes: Sizes, parts: Sequence[str], *,
            is_quick: bool) -> dict[str, Any]:
    """All of it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "netnsd": __version__,
        "machine": machine(),
        "parts": list(parts),
        "quick": is_quick,
        "sizes": {name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
        "ratios": _ratios(figures),
        "bars": [bar.as_json() for bar in bars],
        "figures": {name: {"unit": figures.units[name], "median": _round(figures.median(name)),
                           "p95": _round(figures.p95(name)), "count": len(taken)}
                    for name, taken in figures.samples.items()},
        "values": {name: round(value, 3) for name, value in figures.values.items()},
    }


# What is worth comparing beside the bars.
_COMPARISONS = (
    ("cold, POST", "floor"), ("warm, POST", "floor"), ("service, inside the daemon", "floor"), ("by hand", "floor"),
    ("by hand", "cold, POST"), ("delete, until gone, each", "delete, floor, each"),
)


def _ratios(figures: Figures) -> dict[str, float]:
    found = {f"{what} / {base}": ratio(figures.median(what), figures.median(base)) for what, base in _COMPARISONS}
    return {name: round(value, 2) for name, value in found.items() if value is not None}


def as_table(report: dict[str, Any]) -> str:
    """What a person reads."""
    found = report["machine"]
    lines = [f"{report['date']}  Linux {found['kernel']} {found['architecture']}, Python {found['python']}",
             f"{found['cpus']} x {found['cpu_model']}, {found['memory_mib']} MiB", ""]
    if report["quick"]:
        lines += ["--quick: smaller than what the bars are meant for", ""]
    rows: list[tuple[str, ...]] = [("what", "measured", "bar", "met")]
    for bar in report["bars"]:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.2f} {bar['unit']}".rstrip()
        met = {True: "met", False: "NOT MET", None: "?"}[bar["met"]]
        rows.append((bar["what"], measured, bar["bar"], met + (f" ({bar['note']})" if bar["note"] else "")))
    lines += _columns(rows)
    rows = [("figure", "median", "p95", "samples")]
    for name, taken in report["figures"].items():
        factor, unit = (1000, "ms") if taken["unit"] == "us" else (1, taken["unit"])
        rows.append((name, f"{taken['median'] / factor:.3f} {unit}", f"{taken['p95'] / factor:.3f} {unit}",
                     str(taken["count"])))
    lines += ["", *_columns(rows)]
    rows = [("ratio", "")] + [(name, f"{value:.2f}") for name, value in report["ratios"].items()]
    if len(rows) > 1:
        lines += ["", *_columns(rows)]
    rows = [("value", "")] + [(name, f"{value:g}") for name, value in report["values"].items()]
    if len(rows) > 1:
        lines += ["", *_columns(rows)]
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _value(path: str, key: str) -> str:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
