"""Thousands of environments made, used and removed by several clients at once, in three stretches.

A warm-up; a steady stretch in which no process of netnsd's dies, so that growth of theirs is seen; and a rough one, in
which daemon and launcher are killed and restarted in the middle of everything.
"""

from __future__ import annotations

import collections
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import ALICE, BOB, Daemon, HostNamespace, wait_until
from tests.soak import samples
from tests.soak.figures import Row
from tests.soak.samples import Sample

_USERS = (ALICE, BOB, ALICE, BOB)
_POOL = 8
_ROUND_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many cycles each stretch has at most, in rounds of so many per client, and a sample after so many rounds.

    ``calm``: how many seconds pass between two deaths, least and most. ``patience_seconds``: how long the last sample
    waits for the kernel to destroy what was let go.
    """

    warm_up: int = 400
    steady: int = 2800
    rough: int = 1800
    per_client: int = 25
    rounds_per_sample: int = 5
    calm: tuple[float, float] = (1.5, 5.0)
    patience_seconds: float = 120.0

    @property
    def total(self) -> int:
        """All cycles."""
        return self.warm_up + self.steady + self.rough

    @classmethod
    def of(cls, total: int) -> Self:
        """So many, in the same parts as usual."""
        usual = cls()
        warm_up, rough = total * usual.warm_up // usual.total, total * usual.rough // usual.total
        return cls(warm_up, total - warm_up - rough, rough)


@dataclass(slots=True)
class Cycles:
    """One run. ``tell`` is told how far it is."""

    daemon: Daemon
    clients: list[subprocess.Popen[bytes]]
    dice: random.Random
    tell: Callable[[str], None]
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    deaths: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    differences: list[Any] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    steady: list[Sample] = field(default_factory=list)
    again: int = 0
    rounds: int = 0
    seconds: float = 0.0

    @property
    def _sockets(self) -> list[str]:
        """As clients name them. In orders: who has them in its command line passes for the launcher."""
        return [self.daemon.socket, f"{self.daemon.runtime_dir}/attach.sock"]

    @property
    def done(self) -> int:
        """How many cycles there were."""
        return self.kinds.total()

    def run(self, sizes: Sizes, seconds: float) -> None:
        """All three stretches; the steady and the rough one are cut where there is no time for the whole of them."""
        begin = time.monotonic()
        self._stretch(sizes.warm_up, sizes, begin + seconds / 4)
        self._sample()
        self._stretch(sizes.steady, sizes, begin + seconds * 0.65)
        self._sample()
        self.steady = list(self.samples)
        assert len({sample.pids for sample in self.steady}) == 1, "a process died in the steady stretch"
        self._stretch(sizes.rough, sizes, begin + seconds, is_rough=True)
        samples.let_namespaces_go(sizes.patience_seconds)
        self._sample()

    def rows(self) -> list[Row]:
        """What is bounded of it."""
        died = ", ".join(f"{count} x {what}" for what, count in sorted(self.deaths.items()))
        return [
            Row("cycles", None, self.done, None), Row("cycles per second", None, self.done / self.seconds, None),
            *(Row(f"cycles: {kind}", None, count, None) for kind, count in sorted(self.kinds.items())),
            Row(f"deaths: {died or 'none'}", None, self.deaths.total(), None),
            Row("requests asked again for them", None, self.again, None),
            Row("cycles that failed", None, len(self.failures), 0),
            Row("differences that doctor found", None, len(self.differences), 0),
            *samples.compared(self.samples, self.steady)]

    def _stretch(self, cycles: int, sizes: Sizes, deadline: float, *, is_rough: bool = False) -> None:
        end = self.done + cycles
        rounds = 0
        while self.done < end and (time.monotonic() < deadline or not rounds):
            self._round(min(sizes.per_client, -(-(end - self.done) // len(self.clients))),
                        sizes.calm if is_rough else None, deadline)
            rounds += 1
            self.tell(f"{self.done} of {sizes.total} cycles, {self.done / self.seconds:.0f} per second,"
                      f" {self.deaths.total()} deaths, {len(self.failures)} failures")
            if self.samples and rounds % sizes.rounds_per_sample == 0:
                self._sample()

    def _round(self, count: int, calm: tuple[float, float] | None, deadline: float) -> None:
        """Every client does so many cycles, with deaths among them before the deadline, ``calm`` seconds apart."""
        begin = time.monotonic()
        self.rounds += 1
        for number, client in enumerate(self.clients):
            assert client.stdin is not None
            order = {"sockets": self._sockets, "prefix": f"c{number}-{self.rounds}",
                     "seed": self.dice.getrandbits(32), "count": count}
            client.stdin.write(json.dumps(order).encode() + b"\n")
            client.stdin.flush()
        waiting = {client.stdout: client for client in self.clients if client.stdout is not None}
        next_death = begin + self.dice.uniform(*calm) if calm else deadline
        while waiting:
            readable, _, _ = select.select(list(waiting), [], [], max(0.0, min(next_death - time.monotonic(), 1.0)))
            for stdout in readable:
                self._count(waiting.pop(stdout))
            if calm and waiting and next_death < min(time.monotonic(), deadline):
                self._die()
                next_death = time.monotonic() + self.dice.uniform(*calm)
            assert time.monotonic() - begin < _ROUND_SECONDS, f"a round took more than {_ROUND_SECONDS} s"
        self.seconds += time.monotonic() - begin

    def _count(self, client: subprocess.Popen[bytes]) -> None:
        assert client.stdout is not None
        line = client.stdout.readline()
        assert line, f"a client ended with {client.poll()}"
        answer = json.loads(line)
        self.kinds.update(answer["kinds"])
        self.again += answer["again"]
        self.failures += answer["failures"]

    def _die(self) -> None:
        """Have something of netnsd's die, and come back."""
        what = self.dice.choices(["kill", "restart", "launcher", "both"], weights=[5, 3, 2, 1])[0]
        self.deaths[what] += 1
        if what == "restart":
            self.daemon.restart()
            return
        launcher = samples.launcher_of(self.daemon)
        if what != "launcher":
            self.daemon.kill()
        if what != "kill":
            os.kill(launcher, signal.SIGKILL)
        if what != "launcher":
            time.sleep(self.dice.uniform(0, 0.3))
            self.daemon.start()
        wait_until(lambda: _has_launcher(self.daemon), seconds=10, what="a launcher")

    def _sample(self) -> None:
        self.samples.append(samples.take(self.daemon, _POOL, self.done))
        self.differences += samples.differences(self.daemon)


def _has_launcher(daemon: Daemon) -> bool:
    try:
        return samples.launcher_of(daemon) > 0
    except (ValueError, OSError):  # none, or more than one: the old one is not quite gone, or the new one forks
        return False


@contextmanager
def on_a_host(seed: int, tell: Callable[[str], None]) -> Iterator[Cycles]:
    """A daemon on a disposable host, and the clients of two users there."""
    with HostNamespace() as host, Daemon(host, config={"daemon": {"log_level": "warning"},
                                                        "pool": {"size": _POOL}}) as daemon:
        command = [sys.executable, "-m", "tests.soak.agents.cycling"]
        clients = [host.popen(command, user=user, cwd="/", env=AGENT_ENVIRONMENT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=None) for user in _USERS]
        try:
            yield Cycles(daemon, clients, random.Random(seed), tell)
        finally:
            for client in clients:
                client.kill()
                client.wait(timeout=5)
