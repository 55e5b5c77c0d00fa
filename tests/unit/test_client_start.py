from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fake_daemon import FakeDaemon

HEAVY = ("trio", "pyroute2", "msgspec", "asyncio", "http.client", "yaml", "structlog", "ssl", "hypercorn")
NOT_FOR_LISTING = (*HEAVY, "click", "subprocess", "termios", "pty", "tty", "resource", "shlex", "urllib.parse",
                   "inspect", "netnsd.wire", "netnsd.client.attach", "netnsd.client.waiting", "dataclasses", "pathlib")


def imported(stderr: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("module", ["netnsd.client.cli", "netnsd.client.app", "netnsd.client.listing",
                                    "netnsd.client.creating", "netnsd.client.templates", "netnsd.client.streams",
                                    "netnsd.client.attach"])
def test_importing_the_client_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {module}"], capture_output=True,
                          text=True, timeout=30, check=True)
    found = imported(done.stderr)
    assert module in found
    assert found.isdisjoint(HEAVY)


def test_listing_imports_only_what_it_uses(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        daemon.add("web")
        done = subprocess.run([sys.executable, "-X", "importtime", "-m", "netnsd.client", "ls"], capture_output=True,
                              text=True, timeout=30, check=True, env=os.environ | {"NETNSD_SOCKET": daemon.socket_path})
    assert "web" in done.stdout
    found = imported(done.stderr)
    assert "netnsd.client.render" in found
    assert found.isdisjoint(NOT_FOR_LISTING)


def test_interrupt_while_starting_is_quiet() -> None:
    code = ("import sys, os, signal; import netnsd.client.cli as c\n"
            "class Stop:\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Stop()); sys.exit(c.main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_fault_of_our_own_is_no_traceback() -> None:
    code = ("import netnsd.client.app as a, netnsd.client.cli as c, sys\n"
            "def run(args): raise KeyError('oops')\n"
            "a.run = run; sys.exit(c.main())")
    env = {k: v for k, v in os.environ.items() if k != "NETNSCTL_DEBUG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False,
                          env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("netnsctl: a fault in netnsctl itself: KeyError")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False,
                          env=env | {"NETNSCTL_DEBUG": "1"})
    assert "Traceback" in done.stderr
