"""What is measured, in rounds: a little of each kind after the other, so that all of them meet the same machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import Daemon, HostNamespace
from tests.harness.daemon import program

_PARTS = Path(__file__).parents[2] / "scripts" / "bench.d"
_ROUND = 10
_CONNECTIONS = 16
# The kernel destroys namespaces behind the scenes, with locks held that a creation needs: what one kind leaves must not
# slow the next one down. There is nothing to wait for that says that it is done.
_SETTLE_SECONDS = 0.2
_SLEEPER = ["/bin/sleep", "3600"]

Samples = list[float]


class Connection:
    """A keep-alive connection to the daemon's socket, with nothing in the way: what is timed is the daemon."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(self._path)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def request(self, method: str, path: str, body: object = None) -> tuple[float, Any]:
        """Microseconds from sending the request to having its whole answer, and the answer."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        start = time.perf_counter()
        self._socket.sendall(head + payload)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        answered, _, rest = data.partition(b"\r\n\r\n")
        length = int(next(line.split(b":")[1] for line in answered.split(b"\r\n")
                          if line.lower().startswith(b"content-length:")))
        while len(rest) < length:
            rest += self._receive()
        took = (time.perf_counter() - start) * 1e6
        if b"\r\nconnection: close" in answered.lower():  # a server may bound the requests of one connection
            self.close()
            self._connect()
        status = int(answered.split(b" ", 2)[1])
        if not 200 <= status < 300:
            raise AssertionError(f"{method} {path}: {status} {rest.decode(errors='replace')}")
        return took, json.loads(rest)

    def _receive(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise AssertionError("the daemon closed the connection")
        return data


class Bench:
    """A daemon on a disposable host, and the programs that it is compared with. Use it as a context; needs root."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.cpus = len(os.sched_getaffinity(0))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netnsd-bench-")))
            self._floor = str(built / "floor")
            subprocess.run(["cc", "-O2", "-o", self._floor, str(_PARTS / "floor.c")], check=True)
            # A host of their own: what the others make there and leave to its end would slow the daemon's down.
            self._others = stack.enter_context(HostNamespace())
            host = stack.enter_context(HostNamespace())
            daemon = stack.enter_context(Daemon(host, config={"daemon": {"log_level": "warning"}}))
            self._socket = str(host.path(daemon.socket))
            self._connection = Connection(self._socket)
            stack.callback(self._connection.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def measure(self, samples: int, delete: int, tell: Callable[[str], None]) -> dict[str, Samples]:
        """Everything, by name, in microseconds.

        Args:
            samples: of each kind, at least.
            delete: environments that are deleted at once.
            tell: is told what goes on.
        """
        taken: dict[str, Samples] = {}
        rounds = -(-samples // _ROUND)
        self._round({})  # the first of everything meets cold caches: a bridge is made, modules are imported
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            self._round(taken)
        for number in range(5):
            tell(f"deleting {delete}, {number + 1} of 5")
            self._delete(taken, delete)
        tell("")
        return taken

    def _round(self, taken: dict[str, Samples]) -> None:
        self._other(taken, "floor", "create", [self._floor, str(_ROUND)])
        self._creates(taken, "create", {})
        self._other(taken, "by hand", "create", [str(_PARTS / "by_hand"), str(_ROUND)])
        self._creates(taken, "create with a service", {"command": _SLEEPER, "cwd": "/"})
        self._programs(taken)

    def _creates(self, taken: dict[str, Samples], name: str, request: dict[str, Any]) -> None:
        names = [f"bench-{number}" for number in range(_ROUND)]
        time.sleep(_SETTLE_SECONDS)
        for one in names:
            took, _answer = self._connection.request("POST", "/v1/environments", {"name": one, **request})
            taken.setdefault(name, []).append(took)
        for one in names:
            self._connection.request("DELETE", f"/v1/environments/{one}")

    def _other(self, taken: dict[str, Samples], name: str, verb: str, command: Sequence[str]) -> None:
        """A program that makes environments in namespaces of its own, which go with it; ``verb``: what is kept."""
        time.sleep(_SETTLE_SECONDS)
        unshare = shutil.which("unshare")
        assert unshare is not None
        done = self._others.run([unshare, "--net", "--mount", "--propagation", "private", *command], check=True,
                                cwd="/", timeout=120)
        found = json.loads(done.stdout)
        if verb == "create":
            taken.setdefault(f"{name} create", []).extend(found["create"])
        else:
            taken.setdefault(f"{name} delete", []).append(found["delete"])

    def _programs(self, taken: dict[str, Samples]) -> None:
        time.sleep(_SETTLE_SECONDS)
        ctl = program("netnsctl")
        environment = {"NETNSD_SOCKET": self._socket, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for number in range(_ROUND):
            for name, command in (("python3 -c pass", [sys.executable, "-c", "pass"]),
                                  ("netnsctl ls", [ctl, "ls"]),
                                  ("netnsctl create", [ctl, "create", f"bench-{number}"])):
                taken.setdefault(name, []).append(_run(command, environment))
        for number in range(_ROUND):
            self._connection.request("DELETE", f"/v1/environments/bench-{number}")

    def _delete(self, taken: dict[str, Samples], count: int) -> None:
        """Delete many over several connections; a sample is the time per environment until the last one is gone."""
        self._other(taken, "floor", "delete", [self._floor, str(count)])
        for number in range(count):
            self._connection.request("POST", "/v1/environments", {"name": f"bench-{number}"})
        time.sleep(_SETTLE_SECONDS)
        connections = [Connection(self._socket) for _ in range(_CONNECTIONS)]
        workers = [threading.Thread(target=_delete_all, args=(connection, range(first, count, _CONNECTIONS)))
                   for first, connection in enumerate(connections)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        taken.setdefault("delete", []).append((time.perf_counter() - start) * 1e6 / count)
        for connection in connections:
            connection.close()
        _took, left = self._connection.request("GET", "/v1/environments")
        if left["environments"]:
            raise AssertionError("not everything was deleted")
        self._other(taken, "by hand", "delete", [str(_PARTS / "by_hand"), str(4 * _ROUND)])


def _delete_all(connection: Connection, numbers: range) -> None:
    for number in numbers:
        connection.request("DELETE", f"/v1/environments/bench-{number}")


def _run(command: Sequence[str], environment: dict[str, str]) -> float:
    """Microseconds from starting a program to its end, with as little around it as Python allows."""
    actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), environment, file_actions=actions)
    _pid, status = os.waitpid(pid, 0)
    took = (time.perf_counter() - start) * 1e6
    if status:
        raise AssertionError(f"{' '.join(command)} ended with status {status}")
    return took
