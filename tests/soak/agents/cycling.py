"""Makes environments, uses them and removes them, one cycle after the other, as the user whose process this is.

Each line on stdin is an order: ``sockets`` (the API's and the one for commands), ``prefix`` of names, ``seed``, and
``count`` of cycles. Each is answered by a line: ``kinds`` (how many cycles of each), ``again`` (how many requests were
made again), ``failures`` (texts; there should be none). The daemon may die and come back at any time.
"""

from __future__ import annotations

import collections
import json
import random
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.soak.agents.client import PATIENCE_SECONDS, SERVER, Client, GoneError, NetnsdError, greeting, path_of

_FIELDS = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin"}}
_PORT = 3000
_KEPT = 8  # connections that stay open when their server goes
_PAUSE_SECONDS = 0.02
# Says what the server beside it says.
_ASK_BESIDE = ["/bin/bash", "-c", f'read -r name </dev/tcp/localhost/{_PORT}; echo "$name"']
_SECOND = {"name": "second", "command": ["/bin/bash", "-c", (
    f'until exec 3</dev/tcp/localhost/{_PORT}; do sleep 0.02; done 2>/dev/null; read -r name <&3; echo "heard $name"')]}
_LAUNCHER_AWAY = ("launcher_unavailable", "launch_failed")
Environment = dict[str, Any]


class Cycler:
    """One order's work."""

    def __init__(self, client: Client, prefix: str, seed: int) -> None:
        self._client = client
        self._prefix = prefix
        self._random = random.Random(seed)
        self._template = f"{prefix}-t"
        self._kept: collections.deque[socket.socket] = collections.deque()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.again = 0
        self.failures: list[str] = []

    def run(self, count: int) -> dict[str, Any]:
        """All of it; a failure ends the cycle that it is of, and no other."""
        wanted = {"name": self._template, "warm": 1, "replace": True,
                  "specification": {**_FIELDS, "command": SERVER, "ports": [{"port": _PORT}]}}
        self._good("POST", "/v1/templates", wanted)
        done = 0
        while done < count:
            kind, cycle = self._random.choices(
                [("server", self._server), ("template", self._from_template), ("two services", self._two_services),
                 ("no service", self._bare), ("many", self._many), ("stopped", self._stopped)],
                weights=[35, 20, 10, 15, 10, 10])[0]
            name = f"{self._prefix}-{done}"
            try:
                made = cycle(name)
            except (AssertionError, NetnsdError, GoneError) as error:
                self.failures.append(f"{kind} {name}: {error}")
                made = 1
            self.kinds[kind] += made
            done += made
        for connection in self._kept:
            connection.close()
        self._client.insist("DELETE", f"/v1/templates/{self._template}")
        self._client.insist("DELETE", f"/v1/environments?label=soak={self._prefix}")
        return {"kinds": self.kinds, "again": self.again + self._client.again, "failures": self.failures}

    # -- the kinds of cycles; each returns how many environments it was ---------------------------------------------

    def _server(self, name: str) -> int:
        made = self._create(name, command=SERVER, ports=[{"port": _PORT}])
        self._serves(made, keep=self._random.random() < 0.3)
        if self._random.random() < 0.4:
            self._executes(made)
        return self._remove(name)

    def _from_template(self, name: str) -> int:
        made = self._create(name, template=self._template)
        self._serves(made)
        return self._remove(name)

    def _two_services(self, name: str) -> int:
        services = [{"name": "main", "command": SERVER}, _SECOND]
        made = self._create(name, services=services, ports=[{"port": _PORT}])
        self._insist_until(lambda: self._service(name, "second")["state"] == "exited", f"{name}: the second service")
        ended = self._service(name, "second")
        _require(ended["exit_code"] in (0, None), f"the second service ended with {ended['exit_code']}")
        said = greeting(made["ports"][0]["published"])
        _require(said == made["id"], f"the first service said {said!r}")
        return self._remove(name)

    def _bare(self, name: str) -> int:
        made = self._create(name)
        said = self._execute(made["id"], ["/bin/sh", "-c", "echo $NETNSD_ID; exit 3"])
        _require(said == (3, f"{made['id']}\n"), f"a command said {said}")
        return self._remove(name)

    def _many(self, name: str) -> int:
        self._create(name, count=3)
        query = "&".join(f"ref={name}-{number}" for number in (1, 2, 3))
        self._client.insist("DELETE", f"/v1/environments?{query}")
        for number in (1, 2, 3):
            self._gone(f"{name}-{number}")
        return 3

    def _stopped(self, name: str) -> int:
        made = self._create(name, command=SERVER, ports=[{"port": _PORT}])
        self._serves(made)
        for verb, state in (("stop", "stopped"), ("start", "running")):
            body = {"grace_seconds": 5} if verb == "stop" else {}
            # One that could not be started for a dying launcher is started again.
            self._insist_until(lambda v=verb, b=body, s=state: self._client.insist(  # type: ignore[misc]
                "POST", path_of(name, v), b).body.get("state") == s, f"{name}: {verb}")
        self._serves(made)
        self._client.insist("DELETE", path_of(name) + "?wait=0")
        self._gone(name)
        return 1

    # -- their parts ------------------------------------------------------------------------------------------------

    def _create(self, name: str, **fields: Any) -> Any:
        """Make it, also where the daemon dies over it: it is whole then, or gone."""
        common = {} if "template" in fields else _FIELDS
        wanted = {"name": name, "labels": {"soak": self._prefix}, **common, **fields}
        deadline = time.monotonic() + PATIENCE_SECONDS
        first = f"{name}-1" if "count" in fields else name
        while True:
            try:
                reply = self._client.ask("POST", "/v1/environments", wanted)
            except GoneError:
                self.again += 1
                found = self._client.insist("GET", path_of(first))
                if not found.code and "count" not in fields:
                    return found.body
                if "count" in fields:  # some of them may be there
                    self._client.insist("DELETE", f"/v1/environments?label=soak={self._prefix}")
                continue
            if not reply.code:
                return reply.body
            if time.monotonic() > deadline or not (reply.status == 503 or reply.code in _LAUNCHER_AWAY):
                raise AssertionError(f"create: {reply.code}: {reply.body['message']}")
            self.again += 1
            time.sleep(_PAUSE_SECONDS)

    def _serves(self, made: Environment, *, keep: bool = False) -> None:
        """Its server answers at its published port, and is its own."""
        published = made["ports"][0]["published"]
        ready = self._client.insist("GET", path_of(made["id"], "wait") + "?for=ready&timeout=20")
        _require(not ready.code, f"it is not ready: {ready.code}: {ready.body}")
        kept: list[socket.socket] | None = [] if keep else None
        said = greeting(published, keep=kept)
        _require(said == made["id"], f"at port {published} {said!r} answers instead of {made['id']}")
        for connection in kept or ():
            self._kept.append(connection)
            if len(self._kept) > _KEPT:
                self._kept.popleft().close()

    def _executes(self, made: Environment) -> None:
        said = self._execute(made["id"], _ASK_BESIDE)
        _require(said == (0, f"{made['id']}\n"), f"the server beside a command said {said}")

    def _execute(self, ref: str, command: list[str]) -> tuple[int, str]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._client.execute(ref, command)
            except (GoneError, NetnsdError) as error:
                is_away = isinstance(error, GoneError) or error.status == 503 or error.code in _LAUNCHER_AWAY
                if not is_away or time.monotonic() > deadline:
                    raise
            self.again += 1
            time.sleep(_PAUSE_SECONDS)

    def _service(self, ref: str, name: str) -> dict[str, Any]:
        shown = self._good("GET", path_of(ref))
        service: dict[str, Any] = next(s for s in shown["services"] if s["name"] == name)
        return service

    def _remove(self, name: str) -> int:
        self._client.insist("DELETE", path_of(name))
        self._gone(name)
        return 1

    def _gone(self, name: str) -> None:
        self._insist_until(lambda: self._client.insist("GET", path_of(name)).code == "not_found", f"the end of {name}")

    def _good(self, method: str, path: str, body: object = None) -> Any:
        reply = self._client.insist(method, path, body)
        _require(not reply.code, f"{method} {path}: {reply.code}: {reply.body}")
        return reply.body

    @staticmethod
    def _insist_until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            _require(time.monotonic() < deadline, f"{what} did not come")
            time.sleep(_PAUSE_SECONDS)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def main() -> None:
    """Run as a program."""
    for line in sys.stdin:
        order = json.loads(line)
        client = Client(*order["sockets"])
        print(json.dumps(Cycler(client, order["prefix"], order["seed"]).run(order["count"])), flush=True)
        client.close()


if __name__ == "__main__":
    main()
