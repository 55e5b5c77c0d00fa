"""What a new connection costs with few environments in the host's rules, and with ten thousand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.figures import Bar, Figures, ratio
from tests.bench.hosts import Subject, fresh, settle
from tests.bench.parts.part import Part
from tests.harness import ALICE
from tests.harness.waiting import wait_until

OWNERS = 10_000
_CONNECTIONS = 1000
_SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=512)
while True:
    server.accept()[0].close()
"""
# Microseconds of each connection: until it stands, and its peer has closed it.
_CLIENT = """
import json, socket, sys, time
taken = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as client:
        client.recv(1)
    taken.append((time.perf_counter() - began) * 1e6)
print(json.dumps(taken))
"""
_PORT = 3000


class Owners(Part):
    """Connections of an owner by address and by published port, with few and many elements in turn.

    The elements of others are written by nft while the daemon is stopped: it would take them away.
    """

    name = "owners"
    is_heavy = True

    def measure(self, figures: Figures) -> None:
        with fresh(0) as subject:
            made = json.loads(subject.daemon.ctl(
                "create", "web", "--port", str(_PORT), "-o", "json", "--", "/usr/bin/python3", "-c", _SERVER,
                str(_PORT), user=ALICE, check=True).stdout)
            ways = {"address": (made["address"], _PORT), "published port": ("127.0.0.1", made["ports"][0]["published"])}
            for number in range(self.bench.sizes.repeats):
                for many in ((False, True), (True, False))[number % 2]:
                    with _others(subject, OWNERS if many else 0):
                        for way, (address, port) in ways.items():
                            self.bench.tell(f"owners, {number + 1} of {self.bench.sizes.repeats}")
                            settle()
                            figures.add(_figure(way, many=many), self._connections(subject, address, port))

    def bars(self, figures: Figures) -> list[Bar]:
        return [Bar(f"connection by {way}, {OWNERS} owners",
                    ratio(figures.median(_figure(way, many=True)), figures.median(_figure(way, many=False))),
                    "x with one owner", "<=", 1.1) for way in ("address", "published port")]

    @staticmethod
    def _connections(subject: Subject, address: str, port: int) -> list[float]:
        found: list[float] = json.loads(subject.daemon.host.run(
            ["/usr/bin/python3", "-c", _CLIENT, address, str(port), str(_CONNECTIONS)], user=ALICE, cwd="/",
            timeout=60, check=True).stdout)
        return found


def _figure(way: str, *, many: bool) -> str:
    return f"connection by {way}, {'many' if many else 'one'}"


@contextmanager
def _others(subject: Subject, count: int) -> Iterator[None]:
    host, pid = subject.daemon.host, subject.daemon.pid
    where = [(f"10.203.{100 + n // 200}.{2 + n % 200}", 100_000 + n, 20_100 + n % 9900) for n in range(count)]
    sets = {"owners": [f"{address} . {uid}" for address, uid, _ in where],
            "guests": [f"{address} . {uid + 1}" for address, uid, _ in where],
            "declared": [f"{address} . tcp . {_PORT}" for address, _, _ in where],
            "hosts": [address for address, _, _ in where],
            "published": [f"udp . {port} : {address} . {_PORT}" for address, _, port in where[:9900]]}
    before = host.run(["nft", "list", "table", "ip", "netnsd"], check=True).stdout
    os.kill(pid, signal.SIGSTOP)
    try:
        if count:
            host.run(["nft", "-f", "-"], check=True, timeout=60, stdin="".join(
                f"add element ip netnsd {name} {{ {', '.join(elements)} }}\n" for name, elements in sets.items()))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: host.run(["nft", "list", "table", "ip", "netnsd"]).stdout == before, seconds=30,
               what="the daemon takes away what is nobody's")
