"""What a part is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tests.bench.figures import Bar, Figures
from tests.bench.hosts import Hosts
from tests.bench.programs import Programs, in_fresh_namespaces


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    ``per_round``: samples of a round. ``pause_ms``: before each sample, on both sides of a comparison.
    """

    samples: int = 100
    per_round: int = 10
    burst: int = 500
    density: int = 2000
    delete: int = 500
    idle: int = 500
    idle_seconds: float = 30.0
    repeats: int = 5
    pause_ms: int = 0


@dataclass(slots=True)
class Bench:
    """What all parts share."""

    hosts: Hosts
    programs: Programs
    sizes: Sizes
    tell: Callable[[str], None]

    def floor(self, count: int, *, pause_ms: int = 0) -> dict[str, Any]:
        """What the floor takes: ``create``, a list of microseconds, and ``delete``, those of each of all at once."""
        found: dict[str, Any] = in_fresh_namespaces(self.hosts.others, [self.programs.floor, str(count), str(pause_ms)])
        return found

    def by_hand(self, count: int, figures: Figures) -> None:
        """Take samples of the by-hand way."""
        figures.add("by hand", in_fresh_namespaces(self.hosts.others, [self.programs.by_hand, str(count)])["create"])


class Part:
    """One thing that is measured.

    A light part takes a few samples in each of many rounds, in turn with the others. A heavy one (``is_heavy``) fills a
    host of its own, so it has a turn of its own after them, within which it takes what it is compared with in turn too.
    """

    name: ClassVar[str]
    is_heavy: ClassVar[bool] = False
    needs_floor: ClassVar[bool] = False

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def measure(self, figures: Figures) -> None:
        """Take the samples of one round, or all of a heavy part."""
        raise NotImplementedError

    def bars(self, figures: Figures) -> list[Bar]:
        """How the figures stand."""
        raise NotImplementedError
