"""Requests to a daemon on a disposable host, as a user."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.harness import ROOT, Daemon, User, wait_until
from tests.harness.host import tool

COMMAND = ["sleep", "1000"]
FIELDS = {"command": COMMAND, "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"}


@dataclass(frozen=True, slots=True)
class Api:
    """What ``user`` asks the daemon, one connection per request."""

    daemon: Daemon
    user: User = ROOT

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The answer's status, and its JSON."""
        status, text = self.text(method, path, body)
        return status, json.loads(text)

    def text(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """The answer's status, and its body."""
        data = [] if body is None else ["-H", "Content-Type: application/json", "--data-binary", "@-"]
        done = self.daemon.host.run(
            [tool("curl"), "-sS", "--max-time", "20", "--unix-socket", self.daemon.socket, "-X", method, *data,
             "-w", "\n%{http_code}", f"http://localhost{path}"],
            user=self.user, check=True, cwd="/", timeout=30, stdin=None if body is None else json.dumps(body))
        text, _, status = done.stdout.rpartition("\n")
        return int(status), text

    def good(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that says that it was done."""
        status, answer = self.ask(method, path, body)
        assert status in (200, 201, 202), (status, answer)
        return answer

    def create(self, name: str, **fields: Any) -> Any:
        """Create an environment with a server that does nothing, or as ``fields`` say."""
        common = {} if "template" in fields else FIELDS
        return self.good("POST", "/v1/environments", {"name": name, **common, **fields})

    def names(self) -> list[str]:
        """The user's environments."""
        return [e["name"] for e in self.good("GET", "/v1/environments")["environments"]]

    def pool(self, name: str = "slots") -> Any:
        """One pool, as it is shown."""
        return next(pool for pool in self.good("GET", "/v1/pools")["pools"] if pool["name"] == name)

    def filled(self, name: str = "slots", *, size: int | None = None, seconds: float = 20.0) -> Any:
        """Wait until a pool has what it is to have (a size of its own, if given); returns it."""
        def is_full() -> Any:
            pool = self.pool(name)
            return pool if pool["ready"] == pool["target"] and size in (None, pool["size"]) else None

        return wait_until(is_full, seconds=seconds, what=f"a full pool {name}")

    def resized(self, size: int) -> Any:
        """Have so many slots ready, and wait until there are."""
        self.good("PATCH", "/v1/pools/slots", {"size": size})
        return self.filled(size=size)


def netns_names(daemon: Daemon) -> list[str]:
    """What ip-netns(8) lists."""
    return sorted(line.split()[0] for line in daemon.host.run(["ip", "netns"], check=True).stdout.splitlines())
