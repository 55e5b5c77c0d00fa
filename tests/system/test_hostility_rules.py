"""Others take the host's rules away: how long what they keep apart is open, and that nothing of them is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from tests.harness import ALICE, BOB, MALLORY, Daemon, HostNamespace, User, wait_until
from tests.harness.host import Place
from tests.system.api import Api
from tests.system.clients import (
    PYTHON,
    Conversation,
    Environment,
    ask,
    echo_server,
    main_of,
    published,
)

# What a firewall's service loads at its start and at each reload: everything away, then its own, in one transaction.
# Its rules track connections, as most do, so that the kernel goes on tracking while ours are gone.
RELOADED = """#!/usr/sbin/nft -f
flush ruleset
table inet filter {
  chain input { type filter hook input priority 0; ct state established,related accept; }
  chain forward { type filter hook forward priority 0; ct state established,related accept; }
  chain output { type filter hook output priority 0; }
}
"""
WAYS: dict[str, Callable[[HostNamespace], list[str]]] = {
    "flush ruleset": lambda _: ["nft", "flush", "ruleset"],
    "delete table": lambda _: ["nft", "delete", "table", "ip", "netnsd"],
    "reload": lambda host: ["nft", "-f", host.write("/run/test/nftables.conf", RELOADED)],
}
# Longest that anything may be open, in seconds; README promises a second, and a busy machine is slow.
MOST_SECONDS = 1.0
# Connects again and again until its stdin ends, and tells when it began each attempt that differs from the one before.
_PROBE = """
import select, socket, sys, json, time, os
address, port = sys.argv[1], int(sys.argv[2])
seen, last, attempts = [], None, 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.monotonic()
    client = socket.socket()
    client.settimeout(0.05)
    try:
        client.connect((address, port))
        client.sendall(b"hello")
        reached = bool(client.recv(99))
    except OSError:
        reached = False
    client.close()
    time.sleep(0.0005)  # there are several of us, and the machine is small
    attempts += 1
    if reached != last:
        seen.append((began, reached))
        last = reached
seen.append((time.monotonic(), None))
json.dump([attempts, seen], sys.stdout)
"""
# Connects as soon as it can, and when it is told to go on says whether that connection still works.
_INTRUDER = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
line = None
while line is None:
    client = socket.socket()
    client.settimeout(0.2)
    try:
        client.connect((address, port))
        client.sendall(b"hello")
        client.recv(99)
        line = client
    except OSError:
        client.close()
print("in", flush=True)
sys.stdin.readline()
line.settimeout(1)
try:
    line.sendall(b"still"); print("heard" if line.recv(99) else "cut")
except OSError:
    print("cut")
"""


@dataclass
class Probe:
    """Attempts to connect from ``place`` as ``user``, back to back, while the context lasts."""

    place: Place
    user: User
    address: str
    port: int
    attempts: int = 0
    seen: list[tuple[float, bool | None]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._process = self.place.popen([PYTHON, "-c", _PROBE, self.address, str(self.port)], user=self.user, cwd="/",
                                         stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        output, _error = self._process.communicate(timeout=10)
        self.attempts, self.seen = json.loads(output)

    def spans(self, *, reached: bool) -> list[float]:
        """How long each stretch of attempts with that outcome lasted, in ms."""
        return [(after - began) * 1000 for (began, was), (after, _) in zip(self.seen, self.seen[1:], strict=False)
                if was is reached]

    @property
    def ends_reached(self) -> bool:
        """The last attempt's outcome."""
        return bool(self.seen[-2][1])


@pytest.fixture
def host(tidy_daemon: Daemon) -> Iterator[HostNamespace]:
    yield tidy_daemon.host
    tidy_daemon.host.run(["nft", "delete", "table", "inet", "filter"])


@pytest.fixture
def web(tidy_daemon: Daemon) -> Environment:
    return tidy_daemon.create_json("web", *echo_server("web", 3000, "0.0.0.0"), user=ALICE, ports=[3000], wait=True)


@pytest.fixture
def other(tidy_daemon: Daemon) -> Environment:
    return tidy_daemon.create_json("other", *echo_server("other", 3000, "0.0.0.0"), user=BOB, ports=[3000], wait=True)


def _place_of(host: HostNamespace, environment: Environment) -> Place:
    return Place(host.host_pid, main_of(environment)["pid"], host.cgroup)


def _is_back(host: HostNamespace) -> bool:
    return "chain from_host" in host.run(["nft", "list", "table", "ip", "netnsd"]).stdout


@pytest.mark.parametrize("way", WAYS)
def test_what_was_closed_is_open_for_a_moment_only_when_the_rules_are_taken_away(
        host: HostNamespace, web: Environment, other: Environment, way: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    place = _place_of(host, web)
    probes = {"another user to the address": Probe(host, BOB, web["address"], 3000),
              "another user to the published port": Probe(host, MALLORY, "127.0.0.1", published(web)),
              "environment to environment": Probe(place, ALICE, other["address"], 3000)}
    with ExitStack() as stack:
        for probe in probes.values():
            stack.enter_context(probe)
        for _ in range(3):
            host.run(WAYS[way](host), check=True)
            wait_until(lambda: _is_back(host), seconds=MOST_SECONDS, what="the table")
            time.sleep(0.05)  # further attempts, which must be refused
    place.reap()
    worst = {name: max(probe.spans(reached=True), default=0.0) for name, probe in probes.items()}
    with capsys.disabled():
        told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in worst.items())
        print(f"\n[{way}] open at most: {told}")
    assert all(probe.attempts > 50 and not probe.ends_reached for probe in probes.values())
    assert worst["another user to the published port"] == 0.0, "what is not translated is nobody's"
    assert max(worst.values()) <= MOST_SECONDS * 1000


@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_was_made_while_the_rules_were_gone_is_cut_when_they_are_back(
        tidy_daemon: Daemon, host: HostNamespace, web: Environment, other: Environment, way: str) -> None:
    host.run(["nft", "-f", host.write("/run/test/nftables.conf", RELOADED)], check=True)
    wait_until(lambda: _is_back(host), what="the table")
    place = _place_of(host, web)
    # Nothing puts rules back while the daemon is stopped: each gets in for sure.
    os.kill(tidy_daemon.pid, signal.SIGSTOP)
    try:
        host.run(WAYS[way](host), check=True)
        if way != "reload":
            host.run(["nft", "-f", host.write("/run/test/more.conf", RELOADED.replace("flush ruleset", ""))])
        intruders = [place.popen([PYTHON, "-c", _INTRUDER, other["address"], "3000"], user=ALICE, cwd="/",
                                 stdin=subprocess.PIPE),
                     host.popen([PYTHON, "-c", _INTRUDER, web["address"], "3000"], user=BOB, cwd="/",
                                stdin=subprocess.PIPE)]
        for intruder in intruders:
            assert _line(intruder) == "in"
    finally:
        os.kill(tidy_daemon.pid, signal.SIGCONT)
    wait_until(lambda: _is_back(host), what="the table")
    for intruder in intruders:
        assert intruder.communicate(b"go on\n", timeout=10)[0] == b"cut\n"
    place.reap()


def _line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_twenty_reloads_behind_each_other_lose_nothing_of_what_several_clients_create_meanwhile(
        tidy_daemon: Daemon, host: HostNamespace) -> None:
    config = host.write("/run/test/nftables.conf", RELOADED)
    with ThreadPoolExecutor(4) as pool:
        makers = [pool.submit(_make, tidy_daemon, user, f"{user}{n}") for user in (ALICE, BOB) for n in range(2)]
        for _ in range(20):
            host.run(["nft", "-f", config], check=True)
            time.sleep(0.03)
        made = [environment for maker in makers for environment in maker.result(timeout=60)]
    assert all(status == 201 for status, _ in made), made
    wait_until(lambda: _is_back(host), what="the table")
    wanted = {(e["address"], e["owner"]["uid"]) for _, e in made}
    wait_until(lambda: _owners(host) == wanted, seconds=2, what="who may reach what")
    assert len(_elements(host, "map", "published")) == len(wanted) == 24
    assert "internal" not in tidy_daemon.log()
    assert "rules_missing" not in tidy_daemon.log()


def _make(daemon: Daemon, user: User, name: str) -> list[tuple[int, Any]]:
    api = Api(daemon, user)
    return [api.ask("POST", "/v1/environments", {"name": f"{name}-{n}", "ports": [{"port": 3000}]}) for n in range(6)]


def _elements(host: HostNamespace, kind: str, name: str) -> list[Any]:
    listing = json.loads(host.run(["nft", "-j", "list", kind, "ip", "netnsd", name], check=True).stdout)
    return [element for row in listing["nftables"] for element in row.get(kind, {}).get("elem", [])]


def _owners(host: HostNamespace) -> set[tuple[str, int]]:
    return {(e["concat"][0], int(e["concat"][1])) for e in _elements(host, "set", "owners")}


@pytest.mark.parametrize("change", [
    "delete element ip netnsd owners {{ {address} . {uid} }}",
    "add element ip netnsd owners {{ {address} . {other} }}",
    "delete element ip netnsd published {{ tcp . {port} }}",
    "add element ip netnsd allowed {{ {address} . 10.203.0.99 . tcp . 80 }}",
    "flush set ip netnsd owners",
    "insert rule ip netnsd from_host accept",
    "delete rule ip netnsd from_host handle {handle}",
    "flush chain ip netnsd through",
    "add chain ip netnsd mine",
], ids=lambda change: change.partition(" {")[0].replace(" ip netnsd", ""))
def test_what_somebody_changes_in_our_table_by_hand_is_put_right_at_once(
        host: HostNamespace, web: Environment, change: str) -> None:
    def listing() -> str:
        return host.run(["nft", "-s", "list", "table", "ip", "netnsd"]).stdout

    before = listing()
    rules = host.run(["nft", "-a", "list", "chain", "ip", "netnsd", "from_host"], check=True).stdout
    handle = next(line for line in rules.splitlines() if "goto to_environment" in line).rpartition(" ")[2]
    host.run(["nft", change.format(address=web["address"], uid=ALICE.uid, other=BOB.uid, port=published(web),
                                   handle=handle)], check=True)
    began = time.monotonic()
    wait_until(lambda: listing() == before, seconds=MOST_SECONDS, what="the table as it was")
    assert ask(host, "tcp", web["address"], 3000, user=ALICE) == "web heard hello"
    assert ask(host, "tcp", web["address"], 3000, user=BOB) != "web heard hello"
    assert time.monotonic() - began < 2 * MOST_SECONDS


def test_conversations_with_a_published_port_outlive_a_flush(host: HostNamespace, web: Environment) -> None:
    with Conversation(host, "127.0.0.1", published(web), user=ALICE) as line:
        assert line.say("before") == "web heard before"
        host.run(["nft", "flush", "ruleset"], check=True)
        wait_until(lambda: _is_back(host), seconds=MOST_SECONDS, what="the table")
        assert line.say("after") == "web heard after"
