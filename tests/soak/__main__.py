"""Runs the long tests, and prints a table of figures. The exit status is 0 only where every bound holds."""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.programs import CHECKOUT
from tests.soak import cycles, machines
from tests.soak.figures import Row, table

_LEAST_SECONDS = 10.0
_FAILURES_SHOWN = 20
_FAULTS = "tests.faults"


@dataclass(frozen=True, slots=True)
class Order:
    """What a part is told: how long it may take, and with what seed it draws."""

    seconds: float
    seed: int
    cycles: int


Part = Callable[[Order], list[Row]]


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Run the long tests of netnsd.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all of it takes, about (default: 10)")
    parser.add_argument("--cycles", type=int, default=cycles.Sizes().total,
                        help="of creation, use and removal, at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="what is drawn; a run prints its own")
    parser.add_argument("--only", metavar="NAME[,NAME...]", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.minutes <= 0 or options.cycles < 1:
        parser.error("numbers are more than 0")
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(32)
    print(f"seed {seed}", flush=True)
    sys.exit(0 if _run([name for name in PARTS if name in names], options.minutes * 60, seed, options.cycles) else 1)


def _run(names: list[str], seconds: float, seed: int, count: int) -> bool:
    """Each part gets its share of the time that is left; what one leaves is the others'. Returns whether all held."""
    deadline = time.monotonic() + seconds
    names = [name for name in names if name != "faults" or importlib.util.find_spec(_FAULTS) is not None]
    holds = True
    for number, name in enumerate(names):
        share, part = PARTS[name]
        left = sum(PARTS[later][0] for later in names[number:])
        order = Order(max(_LEAST_SECONDS, (deadline - time.monotonic()) * share / left), seed, count)
        print(f"\n== {name}, {order.seconds:.0f} s", flush=True)
        begin = time.monotonic()
        try:
            rows = part(order)
        except Exception as error:  # the others are run all the same  # noqa: BLE001
            traceback.print_exception(error)
            rows = [Row("could not be run to its end", None, 1, 0)]
        print(table([*rows, Row("took", None, time.monotonic() - begin, None, "s")]), flush=True)
        holds = holds and all(row.holds for row in rows)
    print("\nall bounds hold" if holds else "\nNOT ALL BOUNDS HOLD", flush=True)
    return holds


def _cycles(order: Order) -> list[Row]:
    with cycles.on_a_host(order.seed, _tell) as run:
        run.run(cycles.Sizes.of(order.cycles), order.seconds)
        for failure in run.failures[:_FAILURES_SHOWN]:
            print(f"failed: {failure}")
        for difference in run.differences[:_FAILURES_SHOWN]:
            print(f"doctor: {difference}")
        return run.rows()


def _on_fakes(order: Order) -> list[Row]:
    return machines.on_fakes(order.seed, order.seconds, _tell)


def _on_a_host(order: Order) -> list[Row]:
    return machines.on_a_host(order.seed, order.seconds, _tell)


def _faults(order: Order) -> list[Row]:
    """Its own program, with its own table."""
    done = subprocess.run([sys.executable, "-m", _FAULTS, "--minutes", f"{order.seconds / 60:.2f}",
                           "--seed", str(order.seed)], cwd=CHECKOUT, check=False)
    return [Row("its exit status", None, done.returncode, 0)]


# Each with its share of the time.
PARTS: dict[str, tuple[float, Part]] = {"cycles": (5, _cycles), "fakes": (1, _on_fakes), "host": (2, _on_a_host),
                                        "faults": (2, _faults)}


def _tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
