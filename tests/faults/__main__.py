"""python -m tests.faults --minutes N: crash points and failures, as many as there is time for, in random order."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time

from tests.faults import campaign, trials
from tests.faults.trials import Outcome


def main() -> int:
    """Run as a program; 1 where differences were found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long, at most (default: 5)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="the order; by default another one")
    parser.add_argument("--path", action="append", help="only this path, such as 'create'; may be repeated")
    parser.add_argument("--only", choices=("kills", "failures"), help="only these")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    wanted = [path for path in campaign.ALL if not options.path or path.name in options.path]
    if not wanted:
        parser.error(f"paths are: {', '.join(path.name for path in campaign.ALL)}")

    def tell(outcome: Outcome) -> None:
        if outcome.differences:
            print(outcome, file=sys.stderr, flush=True)

    with campaign.worlds() as world_of:
        recordings = campaign.recorded(world_of, wanted)
        kills = campaign.shuffled(itertools.chain.from_iterable(map(trials.kills, recordings)), options.seed)
        failures = campaign.shuffled(itertools.chain.from_iterable(map(trials.failures, recordings)), options.seed)
        chosen = {"kills": kills, "failures": failures}.get(options.only) or [
            trial for pair in itertools.zip_longest(kills, failures) for trial in pair if trial is not None]
        print(f"seed {options.seed}: {len(wanted)} paths, {len(kills)} kills and {len(failures)} failures to choose"
              f" from", file=sys.stderr, flush=True)
        figures = campaign.run(world_of, chosen, seconds=until - time.monotonic(), tell=tell)
    print(json.dumps({"seed": options.seed, **figures.as_json()}) if options.json else figures)
    return bool(figures.differences)


if __name__ == "__main__":
    sys.exit(main())
