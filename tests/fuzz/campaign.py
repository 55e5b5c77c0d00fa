"""schemathesis against a real daemon: all checks, all phases, as users of a disposable host, over each listener."""

from __future__ import annotations

import collections
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import ALICE, BOB, CAROL, Daemon, HostNamespace, User
from tests.soak import samples
from tests.soak.figures import Row
from tests.soak.samples import Sample

USERS = (ALICE, CAROL)
_SPARE_SECONDS = 90.0
_ROUND_SECONDS = 60.0
_MORE_SECONDS = 30.0  # most of a short round is schemathesis's own start, on a machine that is busy
_CONFIGURATION = """
max-failures = 20
continue-on-failure = true
[cache]
enabled = false
[checks]
# 503 says that the host or the daemon has no more of something, 504 that what was waited for did not come: nothing has
# failed. 500 always fails.
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]
# 422 is also the answer where a command is not there, which no schema can say. refusals_are_of_the_host lets pass that
# alone, by its code.
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422", "503", "504"]
"""


@dataclass(frozen=True, slots=True)
class Listener:
    """A way to the API. ``order``: what the agent is told of it for a user."""

    name: str
    order: Callable[[Daemon, User], dict[str, Any]]


def _over_tcp(daemon: Daemon, user: User) -> dict[str, Any]:
    scope = "admin" if user is CAROL else "write"
    token = daemon.ctl_json("token", "create", f"fuzz-{next(_numbers)}", "--scope", scope, user=user)["token"]
    return {"url": f"http://{_ADDRESS}", "token": token}


_ADDRESS = "127.0.0.1:7070"
_numbers = itertools.count(1)
LISTENERS = (
    Listener("unix", lambda daemon, _user: {"socket": daemon.socket, "url": "http://localhost"}),
    Listener("tcp", _over_tcp),
)


@dataclass(slots=True)
class Campaign:
    """One daemon, which is asked by an unprivileged user and by an admin in turn. ``tell`` is told how far it is."""

    daemon: Daemon
    tell: Callable[[str], None]
    answers: dict[str, collections.Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    differences: list[Any] = field(default_factory=list)
    seen: list[Sample] = field(default_factory=list)

    def run(self, seconds: float, seed: int, least: int = 1) -> None:
        """As many rounds as there is time for, at least one of each user over each listener.

        Where a machine is busy with other things, there are more, until ``least`` requests went over each listener.
        """
        deadline = time.monotonic() + seconds
        pairs = [(listener, user) for listener in LISTENERS for user in USERS]
        length = min(seconds / len(pairs), _ROUND_SECONDS)
        number = 0
        while number < len(pairs) or time.monotonic() + length <= deadline:
            self._round(*pairs[number % len(pairs)], length, seed + number)
            number += 1
        while not self.failures and (
                short := [pair for pair in pairs if self.answers[pair[0].name].total() < least]):
            self._round(*short[number % len(short)], max(length, _MORE_SECONDS), seed + number)
            number += 1
        assert self.daemon.process is not None
        assert self.daemon.process.poll() is None, "the daemon has ended"

    def rows(self) -> list[Row]:
        """What is bounded of it; of growth, from when each user has asked."""
        warm = self.seen[1:] if len(self.seen) > len(USERS) else self.seen
        return [*(Row(f"requests over {name}", None, counts.total(), None) for name, counts in self.answers.items()),
                *(Row(f"answers {status} over {name}", None, count, 0 if status == "500" else None)
                  for name, counts in self.answers.items() for status, count in sorted(counts.items())),
                Row("rounds in which a check failed", None, len(self.failures), 0),
                Row("differences that doctor found", None, len(self.differences), 0),
                *samples.compared(warm, warm)]

    def _round(self, listener: Listener, user: User, seconds: float, seed: int) -> None:
        holds, answers, text = _ask(self.daemon, user, seconds, seed, listener.order(self.daemon, user))
        counts = self.answers.setdefault(listener.name, collections.Counter())
        counts.update(answers)
        if not holds:
            self.failures.append(f"{user} over {listener.name}, seed {seed}:\n{text}")
        if "request_failed" in self.daemon.log():
            self.failures.append(f"a fault in the daemon:\n{self.daemon.log()[-8000:]}")
        self._clear(user)
        self.differences += samples.differences(self.daemon)
        self.seen.append(samples.take(self.daemon, 0, counts.total()))
        self.tell(f"{user} over {listener.name}, seed {seed}: {sum(answers.values())} requests, "
                  f"{'all checks hold' if holds else 'CHECKS FAILED'}; {counts.total()} in all, "
                  f"{self.seen[-1].values['daemon: resident']:.1f} MiB")

    def _clear(self, user: User) -> None:
        """Remove all that the user made."""
        if tokens := [token["id"] for token in self.daemon.ctl_json("token", "ls", user=user)]:
            self.daemon.ctl("token", "revoke", *tokens, user=user)  # some go with what they were made with
        for kind in ("template", "policy"):
            if names := [one["name"] for one in self.daemon.ctl_json(kind, "ls", user=user)]:
                self.daemon.ctl(kind, "rm", *names, user=user, check=True)
        if user is CAROL:
            self.daemon.ctl("quota", "reset", str(BOB), user=user, check=True)
        self.daemon.ctl("rm", "--all", "--yes", user=user, check=True, timeout=60)


def _ask(daemon: Daemon, user: User, seconds: float, seed: int,
         order: dict[str, Any]) -> tuple[bool, dict[str, int], str]:
    """Whether every check held, the number of answers by status, and what schemathesis said."""
    directory = f"/run/test/fuzz-{user}-{seed}"
    daemon.host.directory(directory, user=user)
    token = order.pop("token", None)
    known = [] if token is None else ["--header", f"Authorization: Bearer {token}"]
    arguments = [*known, "--checks", "all", "--max-time", str(max(int(seconds), 1)), "--seed", str(seed), "--no-color"]
    full = {"directory": directory, "configuration": _CONFIGURATION, "arguments": arguments, **order}
    done = daemon.host.run([sys.executable, "-m", "tests.fuzz.agents.asking", json.dumps(full)], user=user, cwd="/",
                           env=AGENT_ENVIRONMENT, timeout=seconds + _SPARE_SECONDS)
    text, _, last = done.stdout.rstrip().rpartition("\n")
    answers: dict[str, int] = json.loads(last) if last.startswith("{") else {}
    return done.returncode == 0 and bool(answers), answers, f"{text}\n{done.stderr}"


@contextmanager
def on_a_host(tell: Callable[[str], None]) -> Iterator[Campaign]:
    """A campaign against a daemon of its own."""
    with HostNamespace() as host, Daemon(host, config={
            "daemon": {"log_level": "warning"},
            "api": {"listen": _ADDRESS, "requests_per_second": 10_000, "requests_burst": 10_000}}) as daemon:
        yield Campaign(daemon, tell)
