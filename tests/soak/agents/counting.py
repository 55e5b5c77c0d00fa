"""What a host holds that environments could leave behind, counted in its namespaces. Prints JSON: kind to count.

usage: counting CGROUP
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.agents.presence import counters

_CLOSED_SECONDS = 120


def main() -> None:
    """Run as a program."""
    counts = {kind: count() for kind, count in counters(sys.argv[1]).items()}
    counts |= {"neighbours": _neighbours(), "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
               "routes": len(_ip("route", "show", "table", "all")), **_tracked()}
    print(json.dumps(counts))


def _neighbours() -> int:
    """Those that somebody made. The kernel's own come with each packet for an address that is gone, and go again."""
    return len(_ip("neighbour", "show", "nud", "permanent"))


def _ip(*arguments: str) -> list[object]:
    done = subprocess.run(["ip", "-j", *arguments], capture_output=True, text=True, check=True)
    found: list[object] = json.loads(done.stdout or "[]")
    return found


def _tracked() -> dict[str, int]:
    """Connections that are tracked, and of these the ones that stay for long; {} where the kernel does not list them.

    What was closed stays for two minutes at most (nf_conntrack-sysctl.rst: time_wait); what is open, for days.
    """
    try:
        lines = Path("/proc/net/nf_conntrack").read_text().splitlines()
    except FileNotFoundError:
        return {}
    stays = sum(int(line.split()[4]) > _CLOSED_SECONDS for line in lines)
    return {"conntrack entries": len(lines), "conntrack entries that stay": stays}


if __name__ == "__main__":
    main()
