"""From asking for a server to its first answer, on the host that it is asked on. Prints a JSON list of microseconds.

Reads JSON from stdin: program, port, count, pause_ms, and for environments socket and request (a whole one of the
API's). Without a socket the program is started right here: what its start takes by itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any

from tests.bench.connection import Connection

_PATIENCE_SECONDS = 5.0
_PAUSE_SECONDS = 30e-6
_GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def main() -> None:
    """Run as a program."""
    order: dict[str, Any] = json.load(sys.stdin)
    taken = []
    connection = Connection(order["socket"]) if "socket" in order else None
    for _ in range(order["count"]):
        time.sleep(order["pause_ms"] / 1000)
        taken.append(_bare(order) if connection is None else _environment(connection, order))
    json.dump(taken, sys.stdout)


def _environment(connection: Connection, order: dict[str, Any]) -> float:
    start = time.perf_counter()
    made = connection.request("POST", "/v1/environments", order["request"])
    _await_200(made.body["address"], order["port"])
    return (time.perf_counter() - start) * 1e6


def _bare(order: dict[str, Any]) -> float:
    start = time.perf_counter()
    pid = os.posix_spawn(order["program"], [order["program"], str(order["port"])], {})
    try:
        _await_200("127.0.0.1", order["port"])
        return (time.perf_counter() - start) * 1e6
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _await_200(address: str, port: int) -> None:
    """Knock until somebody is there. The pause leaves the processor to the server."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(_PATIENCE_SECONDS)
            try:
                client.connect((address, port))
                client.sendall(_GET)
                if client.recv(4096).startswith(b"HTTP/1.1 200 "):
                    return
            except ConnectionError:  # not yet
                pass
        if time.monotonic() > deadline:
            raise AssertionError(f"no answer from {address}:{port} within {_PATIENCE_SECONDS} s")
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
