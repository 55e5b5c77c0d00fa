"""The data path from the host into an environment, and through a published port, beside a bare veth on a bridge."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from tests.bench.figures import Bar, Figures, ratio
from tests.bench.hosts import fresh, settle
from tests.bench.parts.part import Part
from tests.harness import HostNamespace
from tests.harness.host import tool
from tests.harness.waiting import wait_until

# Short, and so many: on few processors a stream is as fast as the scheduler happens to place its ends.
_MEGABYTES = 400
_PORT = 5201
_BARE_ADDRESS = "10.201.0.2"
_WIRING = """link add bare0 type bridge
address add 10.201.0.1/24 dev bare0
link set bare0 up
link add bv0 type veth peer name eth0 netns bare
link set bv0 up master bare0
"""
_INSIDE = f"link set lo up\naddress add {_BARE_ADDRESS}/24 dev eth0\nlink set eth0 up\n"
_BARE, _DIRECT, _PUBLISHED = "data, bare veth and bridge", "data, environment", "data, published port"


class Data(Part):
    """One TCP stream each by iperf3, in turn."""

    name = "data"
    is_heavy = True

    @property
    def _rounds(self) -> int:
        return 6 * self.bench.sizes.repeats

    def measure(self, figures: Figures) -> None:
        others = self.bench.hosts.others
        with fresh(0) as subject, _bare_server(others):
            iperf = tool("iperf3")
            made = subject.create("data", command=[iperf, "-s"], ports=[{"port": _PORT}]).body
            host, published = subject.daemon.host, made["ports"][0]
            ways = ((_BARE, others, _BARE_ADDRESS, _PORT), (_DIRECT, host, made["address"], _PORT),
                    (_PUBLISHED, host, "127.0.0.1", published["published"]))
            for way in ways:
                wait_until(lambda way=way: _stream(*way[1:], megabytes=10), what=way[0])  # type: ignore[misc]
            for number in range(self._rounds):
                self.bench.tell(f"data path, {number + 1} of {self._rounds}")
                settle()
                for name, where, address, port in ways if number % 2 else ways[::-1]:
                    figures.add(name, [_stream(where, address, port, megabytes=_MEGABYTES)], unit="Gbit/s")

    def bars(self, figures: Figures) -> list[Bar]:
        direct = figures.median(_DIRECT)
        return [Bar("data path, host to environment", ratio(direct, figures.median(_BARE)),
                    "x bare veth + bridge", ">=", 0.95),
                Bar("data path, published port", ratio(figures.median(_PUBLISHED), direct),
                    "x the environment's address", ">=", 0.85)]


@contextlib.contextmanager
def _bare_server(host: HostNamespace) -> Iterator[None]:
    """iperf3 behind a bridge that nobody but ip(8) has made."""
    ip = tool("ip")
    host.run([ip, "netns", "add", "bare"], check=True, cwd="/")
    host.run([ip, "-batch", "-"], check=True, cwd="/", stdin=_WIRING)
    host.run([ip, "-n", "bare", "-batch", "-"], check=True, cwd="/", stdin=_INSIDE)
    server = host.popen([ip, "netns", "exec", "bare", tool("iperf3"), "-s"], cwd="/")
    try:
        yield
    finally:
        server.kill()
        server.wait(timeout=5)
        host.run([ip, "netns", "delete", "bare"], check=True, cwd="/")
        host.run([ip, "link", "delete", "bare0"], check=True, cwd="/")


def _stream(host: HostNamespace, address: str, port: int, *, megabytes: int) -> float:
    """What arrived, in Gbit/s; 0 where the server did not answer."""
    done = host.run([tool("iperf3"), "-c", address, "-p", str(port), "-J", "-n", f"{megabytes}M"], cwd="/",
                    timeout=60)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    rate: float = found.get("end", {}).get("sum_received", {}).get("bits_per_second", 0.0)
    return rate / 1e9
