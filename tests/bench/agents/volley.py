"""Sends many requests over some connections, as fast as answers come, and looks at the API meanwhile.

One thread, epoll, requests encoded before the first is sent: the daemon should be what is busy. Reads JSON from stdin:
socket, connections, requests ([method, path, body] each), probe (a path that is read now and then, or null),
probe_pause_ms. Prints JSON: begin and end (CLOCK_MONOTONIC, seconds), statuses (how many of each), took_us, probe_us.
"""

from __future__ import annotations

import collections
import json
import select
import socket
import sys
import time
from typing import Any

from tests.bench.connection import encode

_PATIENCE_SECONDS = 120.0


class Lane:
    """One connection: a request, its answer, the next request."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.socket = self._connected()
        self._answer = bytearray()
        self._wanted = -1
        self.sent_at = 0.0
        self.closes = False

    def _connected(self) -> socket.socket:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.connect(self._path)
        one.setblocking(False)
        return one

    def send(self, request: bytes) -> None:
        self._answer.clear()
        self._wanted = -1
        self.sent_at = time.perf_counter()
        if self.socket.send(request) != len(request):
            raise AssertionError("a request is larger than the socket's buffer")

    def receive(self) -> int:
        """Read what is there; the status once the answer is whole, else 0."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise AssertionError("the daemon closed a connection within an answer")
        self._answer += data
        if self._wanted < 0:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return 0
            head = bytes(self._answer[:end]).lower()
            at = head.index(b"content-length:") + len(b"content-length:")
            self._wanted = end + 4 + int(head[at:].split(b"\r\n", 1)[0])
            self.closes = b"\r\nconnection: close" in head
        return int(self._answer[9:12]) if len(self._answer) >= self._wanted else 0

    def text(self) -> str:
        """The answer."""
        return self._answer.decode(errors="replace")


class Volley:
    """All of it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._path = order["socket"]
        self._requests = collections.deque(encode(*request) for request in order["requests"])
        self._left = len(self._requests)
        self._poller = select.epoll()
        self._lanes: dict[int, Lane] = {}
        self._probe: Lane | None = None
        self._probe_request = encode("GET", order["probe"]) if order.get("probe") else b""
        self._pause = order.get("probe_pause_ms", 20) / 1000
        self._probe_due = 0.0
        self.statuses: collections.Counter[str] = collections.Counter()
        self.took: list[float] = []
        self.probed: list[float] = []
        self.failure = ""
        self._connections = min(order["connections"], self._left)

    def run(self) -> dict[str, Any]:
        """Send all, and wait for all answers."""
        lanes = [self._open() for _ in range(self._connections)]
        if self._probe_request:
            self._probe = self._open()
        begin = time.monotonic()
        self._probe_due = begin
        for lane in lanes:
            lane.send(self._requests.popleft())
        probing = False
        while self._left:
            now = time.monotonic()
            if now - begin > _PATIENCE_SECONDS:
                raise AssertionError(f"{self._left} answers are missing after {_PATIENCE_SECONDS} s")
            if self._probe is not None and not probing and now >= self._probe_due:
                self._probe.send(self._probe_request)
                probing = True
            for number, _event in self._poller.poll(self._patience(now, probing=probing)):
                lane = self._lanes[number]
                status = lane.receive()
                if not status:
                    continue
                took = (time.perf_counter() - lane.sent_at) * 1e6
                if lane is self._probe:
                    probing = False
                    self.probed.append(took)
                    self._probe_due = time.monotonic() + self._pause
                    self._probe = self._again(lane)
                else:
                    self._answered(lane, status, took)
        end = time.monotonic()
        return {"begin": begin, "end": end, "statuses": self.statuses, "took_us": self.took, "probe_us": self.probed,
                "failure": self.failure}

    def _patience(self, now: float, *, probing: bool) -> float:
        """How many seconds to wait for an answer before something else is due."""
        return 0.5 if probing or self._probe is None else max(0.0, self._probe_due - now)

    def _answered(self, lane: Lane, status: int, took: float) -> None:
        self.statuses[str(status)] += 1
        self.took.append(took)
        self._left -= 1
        if status >= 300 and not self.failure:
            self.failure = lane.text()
        if self._requests:
            self._again(lane).send(self._requests.popleft())

    def _open(self) -> Lane:
        lane = Lane(self._path)
        self._lanes[lane.socket.fileno()] = lane
        self._poller.register(lane.socket, select.EPOLLIN)
        return lane

    def _again(self, lane: Lane) -> Lane:
        """The lane, or one in its place where the daemon ends it: a server may bound a connection's requests."""
        if not lane.closes:
            return lane
        self._poller.unregister(lane.socket)
        del self._lanes[lane.socket.fileno()]
        lane.socket.close()
        return self._open()


if __name__ == "__main__":
    json.dump(Volley(json.load(sys.stdin)).run(), sys.stdout)
