"""Who gets through to whom, really: servers in environments, and somebody in each that tries all of them at once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from tests.harness import HostNamespace
from tests.harness.host import Place
from tests.policies.oracle import TCP, UDP, Pod
from tests.system.clients import PYTHON, Environment, main_of

PORTS = (80, 81, 443)
KINDS = {TCP: "tcp", UDP: "udp"}
# A probe: protocol and port.
Probe = tuple[int, int]
PROBES: tuple[Probe, ...] = tuple((protocol, port) for protocol in (TCP, UDP) for port in PORTS)

# Answers with its name at every port of an address, TCP and UDP; says on a line who came.
_SERVER = """
import select, socket, sys
name, address, ports = sys.argv[1].encode(), sys.argv[2], [int(port) for port in sys.argv[3:]]
sockets = {}
for port in ports:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, port))
    tcp = socket.create_server((address, port), backlog=256)
    for one, kind in ((udp, "udp"), (tcp, "tcp")):
        one.setblocking(False)
        sockets[one] = (kind, port)
print("ready", flush=True)
talking = set()
while True:
    for one in select.select([*sockets, *talking], [], [])[0]:
        try:
            if one in talking:
                text = one.recv(4096)
                if text:
                    one.send(text)
                else:
                    talking.discard(one)
                    one.close()
                continue
            kind, port = sockets[one]
            if kind == "udp":
                text, peer = one.recvfrom(4096)
                one.sendto(name + b" " + text, peer)
            else:
                connection, peer = one.accept()
                connection.send(name)
                talking.add(connection)
            print("came", kind, port, peer[0], flush=True)
        except OSError:
            talking.discard(one)
"""
# Tries all at once that a line of JSON asks for, [[kind, address, port, source], ...], and says who answered, or null.
_PROBER = """
import json, select, socket, sys, time
for line in sys.stdin:
    ways = [tuple(way) for way in json.loads(line)["ways"]]
    until, again = time.monotonic() + json.loads(line)["seconds"], 0.0
    found = dict.fromkeys(ways)
    waiting = {}
    for way in ways:
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM if way[0] == "tcp" else socket.SOCK_DGRAM)
        one.setblocking(False)
        if way[3]:
            one.bind((way[3], 0))
        one.connect_ex(way[1:3])
        waiting[one] = way
    while waiting and time.monotonic() < until:
        if time.monotonic() >= again:  # a datagram may be lost where many come at once
            for one, way in waiting.items():
                if way[0] == "udp":
                    try:
                        one.send(b"hello")
                    except OSError:
                        pass
            again = time.monotonic() + 0.1
        for one in select.select(list(waiting), [], [], 0.02)[0]:
            way = waiting[one]
            try:
                found[way] = one.recv(4096).decode().split()[0]
            except OSError:
                if way[0] == "udp":  # an error of ICMP; it is tried again
                    continue
            del waiting[one]
            one.close()
    for one in waiting:
        one.close()
    print(json.dumps([found[way] for way in ways]), flush=True)
"""


def server(name: str, address: str = "0.0.0.0") -> list[str]:
    """A command that answers with its name at every port of ``PORTS``."""
    return [PYTHON, "-c", _SERVER, name, address, *map(str, PORTS)]


class Prober:
    """Somebody in a network who tries ways. Close it."""

    def __init__(self, place: Place, *, user: str | None = None) -> None:
        self._process = place.popen([PYTHON, "-c", _PROBER], user=user, cwd="/", stdin=subprocess.PIPE)

    def begin(self, ways: Sequence[tuple[str, str, int, str]], seconds: float) -> None:
        """Try them all for so long: protocol, address, port, and from which address; empty for any."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ways": ways, "seconds": seconds}).encode() + b"\n")
        self._process.stdin.flush()

    def end(self) -> list[str | None]:
        """Who answered."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: list[str | None] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=5)
        self._process.stdout.close()


def network_of(host: HostNamespace, environment: Environment) -> Place:
    """The environment's network, with the host's files."""
    return Place(host.host_pid, main_of(environment)["pid"], host.cgroup)


def pod_of(environment: Environment) -> Pod:
    """The environment for the oracle."""
    return Pod(environment["owner"]["user"], environment["address"], environment["labels"], environment["egress"],
               environment["share"])


class Party:
    """Environments with a server and a prober in each, by name."""

    def __init__(self, host: HostNamespace, environments: Sequence[Environment]) -> None:
        self.pods = {environment["name"]: pod_of(environment) for environment in environments}
        self._probers = {environment["name"]: Prober(network_of(host, environment), user=environment["owner"]["user"])
                         for environment in environments}

    def close(self) -> None:
        """End the probers."""
        for prober in self._probers.values():
            prober.close()

    def reached(self, *, seconds: float = 0.35, others: Mapping[str, str] | None = None
                ) -> dict[tuple[str, str], set[Probe]]:
        """Every ordered pair of names, and which probes came through; ``others`` are targets outside, by address."""
        targets = {name: pod.address for name, pod in self.pods.items()} | dict(others or {})
        asked = {}
        for source, prober in self._probers.items():
            asked[source] = [(target, probe) for target in targets if target != source for probe in PROBES]
            prober.begin([(KINDS[protocol], targets[target], port, "") for target, (protocol, port) in asked[source]],
                         seconds)
        found: dict[tuple[str, str], set[Probe]] = {}
        for source, prober in self._probers.items():
            for (target, probe), answer in zip(asked[source], prober.end(), strict=True):
                came = found.setdefault((source, target), set())
                if answer is not None:
                    assert answer == target, f"{target} is not who answers {source} there, but {answer}"
                    came.add(probe)
        return found


def table(names: Sequence[str], targets: Sequence[str], reached: Mapping[tuple[str, str], Any]) -> str:
    """From each row to each column: ports that are reached, t of TCP and u of UDP."""
    rows = [["from \\ to", *targets]]
    for source in names:
        cells = [" ".join(f"{KINDS[protocol][0]}{port}" for protocol, port in sorted(reached.get((source, target), ())))
                 if source != target else "" for target in targets]
        rows.append([source, *(("all" if len(cell.split()) == len(PROBES) else cell) or "-" for cell in cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)
