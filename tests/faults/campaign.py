"""Many trials on disposable hosts, and the figures of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from tests.faults import paths, trials
from tests.faults.paths import Path
from tests.faults.trials import Outcome, Recording, Trial
from tests.faults.world import World
from tests.harness import HostNamespace


@dataclass
class Figures:
    """What was tried. ``points``: places in the code at which something was made to happen."""

    points: set[str] = field(default_factory=set)
    kills: int = 0
    failures: int = 0
    missed: int = 0
    differences: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a trial. One whose step did not come about in this run, as threads took other turns, is missed."""
        if outcome.reached:
            self.points.add(outcome.trial.point)
            self.failures += bool(outcome.trial.what)
            self.kills += not outcome.trial.what
        else:
            self.missed += 1
        if outcome.differences:
            self.differences.append(outcome)

    def __str__(self) -> str:
        return (f"{len(self.points)} points, {self.kills} kills, {self.failures} failures, {self.missed} missed, "
                f"{len(self.differences)} differences, {self.seconds:.0f} s")

    def as_json(self) -> dict[str, object]:
        """The same for programs."""
        numbers = {key: value for key, value in asdict(self).items() if isinstance(value, (int, float))}
        return {**numbers, "points": len(self.points), "differences": [str(o) for o in self.differences]}


@contextmanager
def worlds() -> Iterator[Callable[[Path], World]]:
    """Gives each path its world, made when it is first asked for: with a bystander, or where nobody has anything."""
    made: dict[bool, World] = {}
    with HostNamespace() as crowded, HostNamespace() as lonely:
        # ip-netns(8) mounts its directory when it is first used, and so does the daemon; that stays.
        lonely.run(["sh", "-ec", "ip netns add x; ip netns delete x"], check=True)

        def world_of(path: Path) -> World:
            is_first = path in paths.FIRST_PATHS
            if is_first not in made:
                made[is_first] = World(lonely if is_first else crowded, with_bystander=not is_first).__enter__()
            return made[is_first]

        try:
            yield world_of
        finally:
            for world in made.values():
                world.__exit__(None, None, None)


ALL = (*paths.PATHS, *paths.FIRST_PATHS)


def recorded(world_of: Callable[[Path], World], wanted: Iterable[Path] = ALL) -> list[Recording]:
    """What steps the paths take."""
    return [trials.record(world_of(path), path) for path in wanted]


def first_of_each(candidates: Iterable[Trial], key: Callable[[Trial], object] = lambda t: (t.point, t.in_launcher),
                  done: set[object] | None = None) -> list[Trial]:
    """One trial per key, without those that are done, which it is added to."""
    seen = set() if done is None else done
    chosen = []
    for trial in candidates:
        if key(trial) not in seen:
            seen.add(key(trial))
            chosen.append(trial)
    return chosen


def shuffled(candidates: Iterable[Trial], seed: int) -> list[Trial]:
    """In an order that the seed decides."""
    listed = list(candidates)
    random.Random(seed).shuffle(listed)
    return listed


def run(world_of: Callable[[Path], World], chosen: Iterable[Trial], *, seconds: float = float("inf"),
        tell: Callable[[Outcome], None] = lambda _outcome: None, figures: Figures | None = None) -> Figures:
    """Try them one after another until the time is up."""
    figures = figures or Figures()
    began = time.monotonic()
    for trial in chosen:
        if time.monotonic() - began > seconds:
            break
        outcome = trials.attempt(world_of(trial.path), trial)
        figures.add(outcome)
        tell(outcome)
    figures.seconds += time.monotonic() - began
    return figures
