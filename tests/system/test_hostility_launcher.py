"""The launcher is killed, again and again, and stopped: creations end one way or the other, and servers go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, wait_until
from tests.system.api import COMMAND, Api
from tests.system.clients import ask, echo_server, inside, is_gone, main_of, nothing_left, published


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One that made an environment before: what it makes once is there."""
    with Daemon(host) as started:
        started.create_json("first", *COMMAND, user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started
    print(started.log()[-10000:])


def _launchers(daemon: Daemon) -> list[int]:
    """The launchers that live, without children that have not become servers yet."""
    return [pid for pid in daemon.launcher_pids() if Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/comm").read_text() == "netnsd-launcher\n"]


def _launcher(daemon: Daemon, *, other_than: int = 0) -> int:
    def find() -> int:
        return next((pid for pid in _launchers(daemon) if pid != other_than), 0)

    return wait_until(find, what="a launcher")


def _create(daemon: Daemon, user: User, number: int) -> tuple[int, Any]:
    body = {"name": f"{user}{number}", "command": COMMAND, "cwd": "/", "ports": [{"port": 3000}]}
    return Api(daemon, user).ask("POST", "/v1/environments", body)


def test_a_launcher_that_is_killed_during_many_starts_costs_those_at_most_and_leaves_nothing(daemon: Daemon) -> None:
    with nothing_left(daemon.host, seconds=10):
        with ThreadPoolExecutor(12) as pool:
            creations = [pool.submit(_create, daemon, user, number) for number in range(12) for user in (ALICE, BOB)]
            for turn in range(3):
                wait_until(lambda turn=turn: sum(c.done() for c in creations) >= 2 + 6 * turn,  # type: ignore[misc]
                           seconds=20, what="some of the creations")
                os.kill(_launcher(daemon), signal.SIGKILL)
            answers = [creation.result(timeout=60) for creation in creations]
        good = [environment for status, environment in answers if status == 201]
        assert {answer["error"]["code"] for status, answer in answers if status != 201} <= {"launcher_unavailable"}
        assert good, "some are made before, between or after"
        shown = {e["id"]: e for e in daemon.ctl_json("ls", "--all")}
        assert shown.keys() == {e["id"] for e in good}, "what was answered, and no other"
        for environment in good:
            service = main_of(shown[environment["id"]])
            assert (service["state"], service["pid"]) == ("running", main_of(environment)["pid"])
            assert not is_gone(service["pid"])
        daemon.ctl("rm", *shown, check=True)


def test_a_launcher_that_is_killed_again_and_again_costs_no_server(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        web = daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000], wait=True)
        pid = _launcher(daemon)
        for turn in range(5):
            os.kill(pid, signal.SIGKILL)
            assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello"
            pid = _launcher(daemon, other_than=pid)
            made = daemon.create_json(f"more{turn}", *COMMAND, user=BOB)
            assert inside(daemon, "web", "echo", "hi", user=ALICE) == "hi"
            daemon.ctl("rm", made["name"], user=BOB, check=True)
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        assert _launchers(daemon) == [pid]
        # Its end is known, though nobody has its exit code.
        os.kill(main_of(web)["pid"], signal.SIGKILL)
        daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE)
        assert main_of(daemon.ctl_json("show", "web", user=ALICE))["state"] == "exited"
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_a_launcher_that_stands_still_holds_up_what_is_to_be_started_and_nothing_else(daemon: Daemon) -> None:
    with nothing_left(daemon.host), ThreadPoolExecutor(2) as pool:
        web = daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000], wait=True)
        launcher = _launcher(daemon)
        os.kill(launcher, signal.SIGSTOP)
        try:
            starts = [pool.submit(_create, daemon, ALICE, number) for number in range(2)]
            wait_until(lambda: len(daemon.ctl_json("ls", user=ALICE)) == 3, what="creations under way")
            began = time.monotonic()
            assert daemon.ctl_json("show", "web", user=ALICE)["services"] == web["services"]
            assert daemon.create_json("bare", user=BOB)["state"] == "running"
            assert Api(daemon, BOB).ask("GET", "/v1/health")[0] == 200
            assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello"
            daemon.ctl("rm", "bare", user=BOB, check=True)
            daemon.ctl("rm", "web", user=ALICE, check=True)
            assert is_gone(main_of(web)["pid"])
            daemon.host.run(["nft", "flush", "ruleset"], check=True)
            wait_until(lambda: "owners" in daemon.host.run(["nft", "list", "ruleset"]).stdout, what="the rules")
            assert time.monotonic() - began < 15
            assert not any(start.done() for start in starts), "they wait for it"
        finally:
            os.kill(launcher, signal.SIGCONT)
        answers = [start.result(timeout=20) for start in starts]
        assert [status for status, _ in answers] == [201, 201], json.dumps(answers)
        assert all(main_of(environment)["state"] == "running" for _, environment in answers)
        for _, environment in answers:
            daemon.ctl("rm", environment["id"], check=True)
