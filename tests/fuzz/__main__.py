"""python -m tests.fuzz --minutes N: schemathesis over the whole API, against a daemon on a disposable host."""

from __future__ import annotations

import argparse
import random
import sys

from tests.fuzz import campaign
from tests.soak.figures import table


def main() -> int:
    """Run as a program; 1 where a check failed or something grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, about (default: 10)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="what is drawn; a run prints its own")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with campaign.on_a_host(lambda line: print(line, file=sys.stderr, flush=True)) as run:
        run.run(60 * options.minutes, options.seed)
        rows = run.rows()
    print(table(rows))
    for failure in (*run.failures, *run.differences):
        print(failure)
    return not all(row.holds for row in rows)


if __name__ == "__main__":
    sys.exit(main())
