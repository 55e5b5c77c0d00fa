"""A server in an environment, and one TCP connection to it that is asked all the time whether it lives."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.harness import Container, User

PORT = 3000
_SECONDS = 20.0

# Echoes what comes, on any number of connections, and ends on SIGTERM.
_SERVER = f"""
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(64):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
Server(("", {PORT}), Echo).serve_forever()
"""

# Asks every 5 ms until its standard input ends; says at the end how often it was answered. Any failure ends it.
_CLIENT = """
import select, socket, sys, time
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10)
answers, longest = 0, 0.0
print("connected", flush=True)
ended = False
while not ended:  # the last time after the end was asked for
    ended = bool(select.select([sys.stdin], [], [], 0.005)[0])
    asked = time.monotonic()
    line.sendall(b"%08d" % answers)
    assert line.recv(8, socket.MSG_WAITALL) == b"%08d" % answers, "the connection was closed"
    longest = max(longest, time.monotonic() - asked)
    answers += 1
print(answers, longest)
"""


@dataclass(frozen=True, slots=True)
class Server:
    """An environment with an echo server in it."""

    container: Container
    name: str
    user: User

    @classmethod
    def started(cls, container: Container, name: str, user: User) -> Server:
        """Create it, and wait until it listens."""
        container.ctl("create", name, "--port", str(PORT), "--wait", "--", "python3", "-c", _SERVER, user=user)
        return cls(container, name, user)

    def shown(self) -> dict[str, Any]:
        """What netnsctl shows of it."""
        environment: dict[str, Any] = self.container.ctl_json("show", self.name, user=self.user)
        return environment

    def identity(self) -> tuple[Any, ...]:
        """What must stay the same while it lives: id, address, published port, its process."""
        shown = self.shown()
        (service,) = shown["services"]
        return shown["id"], shown["address"], shown["ports"][0]["published"], service["pid"], service["state"]

    def answers(self) -> bool:
        """Whether a new connection to its published port is answered."""
        with self.line():
            return True

    @contextlib.contextmanager
    def line(self) -> Iterator[None]:
        """One connection that must hold from the beginning of the block to its end."""
        published = self.shown()["ports"][0]["published"]
        client = self.container.popen(["python3", "-c", _CLIENT, str(published)], user=self.user,
                                      stdin=subprocess.PIPE)
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            readable, _, _ = select.select([client.stdout], [], [], _SECONDS)
            assert readable, "no connection came about"
            assert client.stdout.readline() == b"connected\n", client.stdout.read().decode()
            yield
        finally:
            client.stdin.close()
            client.wait(timeout=_SECONDS)
        said = client.stdout.read().decode()
        assert client.returncode == 0, f"the connection did not hold:\n{said}"
        answers, longest = said.split()
        assert int(answers) > 0
        assert float(longest) < 5.0

    def remove(self) -> None:
        """Remove the environment."""
        self.container.ctl("rm", self.name, user=self.user)


def messages(container: Container, unit: str) -> list[dict[str, Any]]:
    """What a unit's main process logged, as the objects that its lines are. Fails where a line is none.

    Why a start failed is said in words.
    """
    said = [entry["MESSAGE"] for entry in container.journal(unit) if entry.get("_TRANSPORT") == "stdout"]
    return [json.loads(line) for line in said if not line.startswith(("netnsd: ", "  hint: "))]
