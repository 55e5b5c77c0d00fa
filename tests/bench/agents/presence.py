"""What the kernel has of environments, counted on their host: links, pins, names, nft elements, cgroups.

usage: presence CGROUP. Each line on stdin is an order, answered by a line of JSON: ``count`` gives the counts;
``until {counts}`` waits until there are no more than those, and gives when each was so (CLOCK_MONOTONIC, seconds).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_LINK = re.compile(r"^ *nd\d+:", re.MULTILINE)
_COSTLY = "elements"  # a run of nft, which also holds locks that the daemon needs
# Of the bridges, and of the host's ways out; and what is counted, which goes by itself.
_NOT_OF_ENVIRONMENTS = frozenset({"seats", "uplinks", "gateways", "flows", "seekers", "neighbours"})
_PAUSE_SECONDS = 0.008
_PATIENCE_SECONDS = 120.0


def counters(cgroup: str) -> dict[str, Callable[[], int]]:
    """How each is counted."""
    return {"names": _names, "cgroups": lambda: _directories(cgroup), "links": _links, "pins": _pins,
            "elements": _elements}


def main() -> None:
    """Run as a program."""
    counts = counters(sys.argv[1])
    for line in sys.stdin:
        verb, _, rest = line.partition(" ")
        if verb.strip() == "count":
            answer: dict[str, Any] = {kind: count() for kind, count in counts.items()}
        else:
            answer = _until(counts, json.loads(rest))
        print(json.dumps(answer), flush=True)


def _until(counts: dict[str, Callable[[], int]], wanted: dict[str, int]) -> dict[str, float]:
    """What is gone is not counted again until all are; the costly kind is counted when the others are gone."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    gone: dict[str, float] = {}
    while len(gone) < len(counts):
        for kind, count in counts.items():
            if kind in gone or (kind == _COSTLY and len(gone) < len(counts) - 1):
                continue
            if count() <= wanted[kind]:
                gone[kind] = time.monotonic()
        if time.monotonic() > deadline:
            raise AssertionError(f"not gone after {_PATIENCE_SECONDS} s: {', '.join(counts.keys() - gone.keys())}")
        time.sleep(_PAUSE_SECONDS)
    left = {kind: count() for kind, count in counts.items()}
    if any(left[kind] > wanted[kind] for kind in counts):
        raise AssertionError(f"came again: {left} instead of {wanted}")
    return gone


def _names() -> int:
    return len(os.listdir("/run/netns"))


def _links() -> int:
    with open("/proc/self/net/dev", encoding="ascii") as devices:
        return len(_LINK.findall(devices.read()))


def _pins() -> int:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        return sum(" - nsfs " in line for line in mounts)


def _directories(top: str) -> int:
    return sum(len(below) for _, below, _ in os.walk(top))


def _elements() -> int:
    done = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, text=True, check=True)
    return sum(len(row[kind].get("elem", [])) for row in json.loads(done.stdout)["nftables"] for kind in ("set", "map")
               if kind in row and row[kind]["name"] not in _NOT_OF_ENVIRONMENTS)


if __name__ == "__main__":
    main()
