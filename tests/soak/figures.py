"""What a soak found, beside what it must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. ``first`` and ``last``: after the warm-up and at the end; None where there is one value.

    ``most``: of the growth, or of the one value; None: it is told and has no bound.
    """

    what: str
    first: float | None
    last: float
    most: float | None
    unit: str = ""

    @property
    def measured(self) -> float:
        """What is bounded."""
        return self.last if self.first is None else self.last - self.first

    @property
    def holds(self) -> bool:
        """Whether the bound holds."""
        return self.most is None or self.measured <= self.most


def table(rows: Iterable[Row]) -> str:
    """What a person reads."""
    lines = [("figure", "after warm-up", "at the end", "growth", "at most", "")]
    for row in rows:
        first = "" if row.first is None else _number(row.first)
        growth = "" if row.first is None else _number(row.last - row.first)
        most = "" if row.most is None else _number(row.most)
        verdict = "" if row.most is None else "holds" if row.holds else "DOES NOT HOLD"
        lines.append((row.what + (f" ({row.unit})" if row.unit else ""), first, _number(row.last), growth, most,
                      verdict))
    return "\n".join(_columns(lines))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if number in (0, 5) else cell.rjust(width)
                      for number, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
