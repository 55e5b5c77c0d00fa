"""The host's clock jumps, by years: nothing of the daemon's goes by it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime
from glob import glob
from pathlib import Path

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, wait_until
from tests.harness.daemon import program
from tests.system.api import COMMAND
from tests.system.clients import Environment, ask, echo_server, nothing_left, published

YEAR_SECONDS = 365 * 24 * 3600
_LIBRARIES = "/usr/lib/*/faketime/libfaketimeMT.so.1"


class Clock:
    """The wall clock of a daemon, which reads a file each time that it looks; its monotonic clock is the machine's."""

    def __init__(self, host: HostNamespace) -> None:
        (library,) = glob(_LIBRARIES)
        self._file = host.path(host.write("/run/test/clock", "+0"))
        self.env = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": "/run/test/clock", "FAKETIME_NO_CACHE": "1",
                    "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}

    def jump(self, seconds: int) -> None:
        """Be so far from the machine's from now on."""
        new = Path(f"{self._file}.new")
        new.write_text(f"{seconds:+d}")
        new.replace(self._file)


@pytest.fixture
def clock(host: HostNamespace) -> Clock:
    return Clock(host)


@pytest.fixture
def daemon(host: HostNamespace, clock: Clock) -> Iterator[Daemon]:
    with Daemon(host, env=clock.env) as started:
        started.create_json("first", *COMMAND, user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started


def _ahead_seconds(environment: Environment) -> float:
    """How far from the machine's clock it was when it was created."""
    return datetime.fromisoformat(environment["created_at"]).timestamp() - time.time()


def test_what_there_is_works_and_stays_in_order_whatever_the_clock_says(daemon: Daemon, clock: Clock) -> None:
    with nothing_left(daemon.host):
        web = daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000], wait=True)
        waiting = daemon.host.popen([program("netnsctl"), "wait", "web", "--for", "exit", "--timeout", "60"],
                                    user=ALICE, env={"NETNSD_SOCKET": daemon.socket})
        following = daemon.host.popen([program("netnsctl"), "logs", "web", "--follow"], user=ALICE,
                                      env={"NETNSD_SOCKET": daemon.socket})
        for number, jump in enumerate((YEAR_SECONDS, -YEAR_SECONDS, 0)):
            clock.jump(jump)
            made = daemon.create_json(f"later{number}", *COMMAND, user=ALICE, wait=True)
            assert abs(_ahead_seconds(made) - jump) < 60, "the clock jumped"
            assert [e["name"] for e in daemon.ctl_json("ls", user=ALICE)] == [
                "web", *(f"later{n}" for n in range(number + 1))]
            assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello"
            assert ask(daemon.host, "tcp", web["address"], 3000, user=BOB) != "web heard hello"
            timed = time.monotonic()
            assert daemon.ctl("wait", "web", "--for", "exit", "--timeout", "0.3", user=ALICE).returncode == 6
            assert 0.2 < time.monotonic() - timed < 5
            assert daemon.ctl("exec", "web", "--", "echo", "hi", user=ALICE, check=True).stdout == "hi\n"
            assert daemon.ctl("ls", user=ALICE, check=True).stdout.count("main: running") == number + 2
        assert (waiting.poll(), following.poll()) == (None, None)
        before = daemon.ctl_json("ls", user=ALICE)
        for jump in (-YEAR_SECONDS, YEAR_SECONDS):
            daemon.kill()
            clock.jump(jump)
            daemon.start()
            assert daemon.ctl_json("ls", user=ALICE) == before, "in the same order, after a restart too"
        assert daemon.ctl_json("show", "web", user=ALICE)["services"] == web["services"]
        for environment in before:
            daemon.ctl("rm", environment["id"], user=ALICE, check=True)


def test_warm_ones_and_what_is_handed_over_are_in_order_whatever_the_clock_says(daemon: Daemon, clock: Clock) -> None:
    daemon.ctl("template", "add", "shop", "--warm", "2", "--", *COMMAND, user=ALICE, check=True)
    daemon.ctl("pool", "resize", "3", check=True)
    names = []
    for number, jump in enumerate((0, -YEAR_SECONDS, YEAR_SECONDS)):
        clock.jump(jump)
        for name, options in ((f"own{number}", ()), (f"shop{number}", ("--template", "shop"))):
            wait_until(lambda: daemon.ctl_json("template", "show", "shop", user=ALICE)["ready"] == 2, seconds=15,
                       what="the stock")
            daemon.ctl("create", name, *options, user=ALICE, check=True)
            names.append(name)
    assert [e["name"] for e in daemon.ctl_json("ls", user=ALICE)] == names
    daemon.kill()
    daemon.start()
    assert [e["name"] for e in daemon.ctl_json("ls", user=ALICE)] == names


def test_a_clock_that_goes_wild_costs_no_cpu_and_no_check(daemon: Daemon, clock: Clock) -> None:
    daemon.create_json("web", *COMMAND, user=ALICE)

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    spent, began = cpu_seconds(), time.monotonic()
    for number in range(20):
        clock.jump(YEAR_SECONDS * (-1) ** number)
        time.sleep(0.05)
    assert cpu_seconds() - spent < 0.5 * (time.monotonic() - began)
    # What is looked at once a second still is.
    daemon.host.path("/run/harness/resolv.conf").write_text("nameserver 198.51.100.3\n")
    wait_until(lambda: "198.51.100.3" in daemon.ctl("exec", "web", "--", "cat", "/etc/resolv.conf",
                                                     user=ALICE).stdout, what="the host's name server")
    daemon.host.run(["nft", "flush", "ruleset"], check=True)
    wait_until(lambda: "owners" in daemon.host.run(["nft", "list", "ruleset"]).stdout, what="the rules")
