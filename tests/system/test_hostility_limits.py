"""The disk is full, descriptors run out: what cannot be done is said, and all that is there goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, CAROL, Daemon, HostNamespace, User, wait_until
from tests.system.api import COMMAND, Api
from tests.system.clients import PYTHON, Environment, ask, echo_server, is_gone, main_of, nothing_left, published

DISK_KIB = 1024
DESCRIPTORS = 160


def _echoing(daemon: Daemon, user: User, name: str = "web") -> Environment:
    return daemon.create_json(name, *echo_server(name, 3000), user=user, ports=[3000], wait=True)


def _check(daemon: Daemon) -> None:
    """What happens each minute."""
    os.kill(daemon.pid, signal.SIGHUP)


# -- the disk ---------------------------------------------------------------------------------------------------


class Small(Daemon):
    """A daemon whose own log is in the state directory."""

    @property
    def log_file(self) -> str:
        return f"{self.state_dir}/daemon.log"


@pytest.fixture
def small(host: HostNamespace) -> Iterator[Daemon]:
    """A daemon whose state directory is on a small disk."""
    daemon = Small(host)
    host.directory(daemon.state_dir)
    host.run(["mount", "-n", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "small", daemon.state_dir], check=True)
    with daemon:
        daemon.create_json("first", *COMMAND, user=ALICE)
        daemon.ctl("rm", "first", user=ALICE, check=True)
        yield daemon


def _fill(daemon: Daemon) -> Path:
    """Take all the room that is left; returns what takes it."""
    path: Path = daemon.host.path(f"{daemon.state_dir}/filler")
    with path.open("wb", buffering=0) as filler:
        for size in (4096, 1):
            try:
                while True:
                    filler.write(b"x" * size)
            except OSError:
                continue
    return path


def test_on_a_full_disk_creations_are_refused_and_all_else_goes_on_until_there_is_room(small: Daemon) -> None:
    with nothing_left(small.host):
        web, doomed = _echoing(small, ALICE), _echoing(small, ALICE, "doomed")
        filler = _fill(small)
        refused = []
        for number in range(40):  # until the log of SQLite has no room left in it
            name = f"more{number}"
            status, answer = Api(small, BOB).ask("POST", "/v1/environments", {"name": name, "labels": {"a": "x" * 60}})
            if status != 201:
                refused.append(answer["error"])
            if len(refused) == 5:
                break
        assert [error["code"] for error in refused] == ["store_error"] * 5
        assert all("disk is full" in error["message"] and "full" in error["hint"] for error in refused), refused
        assert small.ctl_json("show", "web", user=ALICE) == web
        assert ask(small.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello"
        assert len(small.ctl_json("ls", user=ALICE)) == 2
        assert small.ctl("exec", "web", "--", "echo", "hi", user=ALICE, check=True).stdout == "hi\n"
        done = small.ctl("rm", "doomed", user=ALICE)
        assert is_gone(main_of(doomed)["pid"]), "its processes end, whatever can be written"
        assert done.returncode == 0 or "full" in done.stderr
        filler.unlink()
        _check(small)
        wait_until(lambda: [e["name"] for e in small.ctl_json("ls", user=ALICE)] == ["web"], what="the removal's end")
        assert Api(small, BOB).create("again")["state"] == "running"
        small.kill()
        small.start()
        assert small.ctl_json("show", "web", user=ALICE) == web
        for environment in small.ctl_json("ls", "--all"):
            small.ctl("rm", environment["id"], check=True)


def test_a_server_that_fills_the_disk_with_its_log_does_not_hold_up_the_daemon(small: Daemon) -> None:
    noisy = small.create_json("noisy", "sh", "-c", "until [ -e go ]; do sleep 0.02; done; yes; exec sleep 1000",
                              user=ALICE)
    small.host.write(f"{ALICE.home}/go", "", user=ALICE)
    wait_until(lambda: os.statvfs(small.host.path(small.state_dir)).f_bavail == 0, what="a full disk")
    assert small.ctl_json("show", "noisy", user=ALICE)["id"] == noisy["id"]
    assert small.ctl("logs", "noisy", "--tail", "1", user=ALICE, check=True).stdout == "y\n"
    wait_until(lambda: small.ctl("rm", "noisy", user=ALICE).returncode in (0, 4), what="its end")
    assert small.ctl_json("ls", "--all") == []
    assert Api(small, BOB).create("again")["state"] == "running"


def test_a_disk_that_fails_is_a_store_error_and_nothing_is_lost(daemon: Daemon) -> None:
    web = _echoing(daemon, ALICE)
    unlimited = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))  # each write fails, and not for want of room
    try:
        for number in range(3):
            status, answer = Api(daemon, BOB).ask("POST", "/v1/environments", {"name": f"more{number}"})
            assert (status, answer["error"]["code"]) == (500, "store_error"), answer
            assert "disk I/O error" in answer["error"]["message"]
        assert daemon.ctl("rm", "web", user=ALICE).returncode == 1
        assert is_gone(main_of(web)["pid"])
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, unlimited)
    _check(daemon)
    wait_until(lambda: daemon.ctl_json("ls", "--all") == [], what="the removal's end")
    assert Api(daemon, BOB).create("again")["state"] == "running"
    daemon.restart()
    assert Api(daemon, BOB).names() == ["again"]


# -- descriptors ------------------------------------------------------------------------------------------------


class Frugal(Daemon):
    """A daemon that may have few descriptors."""

    @property
    def command(self) -> list[str]:
        return ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", *super().command]


@pytest.fixture
def frugal(host: HostNamespace) -> Iterator[Daemon]:
    with Frugal(host, config={"daemon": {"connections_per_user": 1000}}) as daemon:
        daemon.create_json("first", *COMMAND, user=ALICE)
        daemon.ctl("rm", "first", user=ALICE, check=True)
        yield daemon
    print(daemon.log()[-10000:])


_IDLE = """
import socket, sys
held = []
for _ in range(int(sys.argv[2])):
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    client.sendall(sys.argv[3].encode().decode("unicode_escape").encode())
    held.append(client)
print("held", flush=True)
sys.stdin.read()
"""


class Held:
    """Connections of a user's that ask for ``request`` and are kept."""

    def __init__(self, daemon: Daemon, user: User, count: int, request: str = "") -> None:
        self._process = daemon.host.popen([PYTHON, "-c", _IDLE, daemon.socket, str(count), request], user=user,
                                          cwd="/", stdin=-1)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"held\n"

    def release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=5)


def _descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def _cpu_seconds(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ask_on(connection: socket.socket, method: str, path: str, body: Any = None) -> int:
    """One request on a connection that is kept; its status."""
    data = json.dumps(body).encode() if body is not None else b""
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536) or b"HTTP/1.1 000 \r\n\r\n"
    return int(answer.split()[1])


# A follower looks at its log 20 times a second.
@pytest.mark.parametrize(("holding", "share"), [("idle connections", 0.2), ("followed logs", 0.7)])
def test_when_descriptors_run_out_nothing_is_lost_and_all_are_served_again_when_there_are_some(
        frugal: Daemon, holding: str, share: float) -> None:
    with nothing_left(frugal.host), ExitStack() as stack:
        web, doomed = _echoing(frugal, ALICE), _echoing(frugal, ALICE, "doomed")
        ends = frugal.create_json("ends", "sh", "-c", "until [ -e go ]; do sleep 0.02; done; exit 7", user=ALICE)
        chatty = Api(frugal, BOB).create("chatty")
        kept = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        kept.settimeout(20)
        kept.connect(str(frugal.host.path(frugal.socket)))
        assert _ask_on(kept, "GET", "/v1/health") == 200
        request = ("" if holding == "idle connections"
                   else f"GET /v1/environments/{chatty['id']}/logs?follow=1 HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        held = Held(frugal, BOB, 2 * DESCRIPTORS, request)
        wait_until(lambda: _descriptors(frugal) >= DESCRIPTORS, what="the last descriptor")
        spent, began = _cpu_seconds(frugal), time.monotonic()
        frugal.host.write(f"{ALICE.home}/go", "", user=ALICE)
        wait_until(lambda: is_gone(main_of(ends)["pid"]), what="the server's end")
        assert ask(frugal.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello"
        assert _ask_on(kept, "DELETE", f"/v1/environments/{doomed['id']}") in (200, 204, 500)
        time.sleep(2)  # of which the share of a processor is measured
        busy = (_cpu_seconds(frugal) - spent) / (time.monotonic() - began)
        assert busy < share, f"{busy:.0%} of a processor while nothing can be accepted"
        assert frugal.process is not None
        assert frugal.process.poll() is None
        assert frugal.log().count("accept_failed") <= 2, "said now and then, not each time"
        held.release()
        kept.close()
        assert frugal.ctl("wait", "ends", "--for", "exit", "--timeout", "10", user=ALICE).returncode == 7
        _check(frugal)
        wait_until(lambda: "doomed" not in [e["name"] for e in frugal.ctl_json("ls", user=ALICE)], what="the removal")
        assert is_gone(main_of(doomed)["pid"])
        assert Api(frugal, CAROL).create("new")["state"] == "running"
        for environment in frugal.ctl_json("ls", "--all"):
            frugal.ctl("rm", environment["id"], check=True)
