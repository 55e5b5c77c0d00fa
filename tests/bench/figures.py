"""What was found: samples and single values by name, and how they stand against their bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure beside what it should be. ``measured`` None: it could not be taken, and ``note`` says why."""

    what: str
    measured: float | None
    unit: str
    sense: Literal["<=", ">="]
    bar: float
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bar if self.sense == "<=" else self.measured >= self.bar

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        measured = None if self.measured is None else round(self.measured, 4)
        return {"what": self.what, "measured": measured, "unit": self.unit, "bar": f"{self.sense} {self.bar:g}",
                "met": self.met, "note": self.note}


@dataclass(slots=True)
class Figures:
    """``samples`` are in microseconds unless ``units`` says otherwise, ``values`` in what their name says."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, taken: Sequence[float], *, unit: str = "us") -> None:
        """Add samples."""
        self.samples.setdefault(name, []).extend(taken)
        self.units[name] = unit

    def count(self, name: str, more: float) -> None:
        """Add to a single value."""
        self.values[name] = self.values.get(name, 0) + more

    def median(self, name: str) -> float | None:
        """The median, where there are samples."""
        taken = self.samples.get(name)
        return statistics.median(taken) if taken else None

    def p95(self, name: str) -> float | None:
        """The 95th of 100, where there are samples."""
        taken = sorted(self.samples.get(name, []))
        return taken[min(len(taken) - 1, int(len(taken) * 0.95))] if taken else None


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base`` where both are there."""
    return None if value is None or not base else value / base


def scaled(value: float | None, factor: float) -> float | None:
    """``value * factor`` where it is there."""
    return None if value is None else value * factor


def plus(one: float | None, other: float | None) -> float | None:
    """Their sum where both are there."""
    return None if one is None or other is None else one + other
