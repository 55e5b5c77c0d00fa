"""The programs that netnsd is compared with, and the ones that the bench runs on its hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness import HostNamespace
from tests.harness.host import CODE

CHECKOUT = Path(__file__).parents[2]
_SOURCES = CHECKOUT / "scripts" / "bench.d"
# What an agent needs to find the bench's own modules, wherever it runs.
AGENT_ENVIRONMENT = {"PYTHONPATH": CODE, "PYTHONDONTWRITEBYTECODE": "1"}


class Programs:
    """The C programs of scripts/bench.d, built into ``directory``, and by_hand beside them."""

    def __init__(self, directory: Path) -> None:
        self.floor = str(directory / "floor")
        self.server = str(directory / "server")
        self.by_hand = str(_SOURCES / "by_hand")
        subprocess.run(["cc", "-O2", "-o", self.floor, str(_SOURCES / "floor.c")], check=True)
        subprocess.run(["cc", "-O2", "-static", "-o", self.server, str(_SOURCES / "server.c")], check=True)


def in_fresh_namespaces(host: HostNamespace, command: Sequence[str]) -> Any:
    """What a program prints, as JSON, run in network and mount namespaces of its own that go with it."""
    unshare = shutil.which("unshare")
    assert unshare is not None
    done = host.run([unshare, "--net", "--mount", "--propagation", "private", *command], check=True, cwd="/",
                    timeout=120)
    return json.loads(done.stdout)


def time_of(command: Sequence[str], environment: dict[str, str]) -> float:
    """Microseconds from starting a program to its end, with as little around it as Python allows."""
    actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), environment, file_actions=actions)
    _pid, status = os.waitpid(pid, 0)
    took = (time.perf_counter() - start) * 1e6
    if status:
        raise AssertionError(f"{' '.join(command)} ended with status {status}")
    return took
