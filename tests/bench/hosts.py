"""Where it is measured: disposable hosts, one for each daemon and one for what the daemons are compared with."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any, Self

import msgspec

from netnsd.daemon.config import Config
from tests.bench.connection import Answer, Connection, RefusedError
from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import Daemon, HostNamespace
from tests.harness.waiting import wait_until

POOL = 64
_LABEL = "bench"
_POOL_SECONDS = 60.0
# The kernel destroys namespaces behind the scenes, with locks held that a creation needs: what one kind leaves must not
# slow the next one down. Nothing says that it is done, so: a pause, and then the processors have to be idle. Others may
# use them too, so not for ever.
_SETTLE_SECONDS = 0.15
_IDLE_SECONDS = 0.06
_IDLE_SHARE = 0.85
_IDLE_DEADLINE_SECONDS = 1.0


class Subject:
    """A daemon on a host of its own, and a connection to it."""

    def __init__(self, daemon: Daemon, pool: int) -> None:
        self.daemon = daemon
        self.pool = pool if has_pools() else 0
        self.socket = str(daemon.host.path(daemon.socket))
        self.connection = Connection(self.socket)
        self._can_remove_many = True

    def create(self, name: str, **request: Any) -> Answer:
        """Create an environment that ``remove_all`` will remove."""
        return self.connection.request("POST", "/v1/environments", self.request(name, **request))

    def request(self, name: str | None, **request: Any) -> dict[str, Any]:
        """The body of such a creation."""
        return {"name": name, "labels": {_LABEL: "1"}, "cwd": "/", **request}

    def names(self) -> list[str]:
        """All environments."""
        return [one["name"] for one in self.connection.request("GET", "/v1/environments").body["environments"]]

    def fill(self, count: int, *, prefix: str = "fill", **request: Any) -> None:
        """Create many, without measuring it."""
        self.volley([("POST", "/v1/environments", self.request(f"{prefix}-{number}", **request))
                     for number in range(count)], connections=16)

    def removals(self) -> list[tuple[str, str, None]]:
        """The requests that remove all environments: one, or one for each where the daemon does not know that."""
        if self._can_remove_many:
            return [("DELETE", f"/v1/environments?label={_LABEL}=1", None)]
        return [("DELETE", f"/v1/environments/{name}", None) for name in self.names()]

    def remove_all(self) -> None:
        """Remove all environments, and wait until the daemon says that they are gone."""
        if self._can_remove_many:
            try:
                self.connection.request(*self.removals()[0])
            except RefusedError as error:
                if error.status != HTTPStatus.METHOD_NOT_ALLOWED:
                    raise
                self._can_remove_many = False
        if not self._can_remove_many:
            self.volley(self.removals(), connections=POOL)
        wait_until(lambda: not self.names(), seconds=120, what="the end of all environments")

    def learn_removal(self) -> bool:
        """Whether one request removes many; an environment is made and removed to find out."""
        self.create("learn")
        self.remove_all()
        return self._can_remove_many

    def volley(self, requests: Sequence[tuple[str, str, object]], *, connections: int,
               probe: str | None = None) -> dict[str, Any]:
        """Send many requests at once; see ``agents.volley``. Raises AssertionError where one failed."""
        if not requests:
            return {}
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.agents.volley"], env={**AGENT_ENVIRONMENT, "LANG": "C.UTF-8"},
            capture_output=True, timeout=180, check=False, text=True, input=json.dumps(
                {"socket": self.socket, "connections": connections, "requests": requests, "probe": probe}))
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        if not probe:
            assert not result["failure"], result["failure"]
        return result

    def pool_counts(self) -> Mapping[str, int] | None:
        """What the daemon says of its pool of slots; see ``wire.Pool``. None where it has none."""
        if not self.pool:
            return None
        try:
            pools = self.connection.request("GET", "/v1/pools").body["pools"]
        except RefusedError:
            return None
        found: Mapping[str, int] = next(pool for pool in pools if pool["name"] == "slots")
        return found

    def await_full_pool(self) -> None:
        """Wait until as many slots are ready as the daemon wants: a creation that meets a refill is another thing."""
        def is_full() -> bool:
            counts = self.pool_counts()
            return counts is None or counts["ready"] >= max(counts["size"], counts["target"])

        wait_until(is_full, seconds=_POOL_SECONDS, what="a full pool")

    def warm_claims(self) -> tuple[int, int] | None:
        """So far: creations that took a slot from the pool, and those that found none. None where nobody counts."""
        counts = self.pool_counts()
        return (counts["claimed"], counts["missed"]) if counts else None

    def memory_mib(self) -> tuple[float, float]:
        """Resident memory of the daemon, and of the launcher with the children that wait, in MiB.

        Children share most of the launcher's pages, and each shared page counts once (Pss in proc(5)).
        """
        launcher = sum(_proportional_kib(pid) for pid in self.launcher_pids())
        return _resident_kib(self.daemon.pid) / 1024, launcher / 1024

    def cpu_seconds(self) -> float:
        """Processor time that daemon and launcher have taken so far: all threads, user and system.

        By the processes' CPU clocks, which count what utime and stime count, but in nanoseconds (see
        pthread_getcpuclockid(3); the number is made as in linux/posix-timers.h).
        """
        pids = [self.daemon.pid, *filter(_is_launcher, self.launcher_pids())]
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)

    def launcher_pids(self) -> list[int]:
        """The launcher's processes."""
        return self.daemon.launcher_pids()


class Hosts:
    """The hosts that all light parts share, made when they are asked for first. Use it as a context; needs root."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._others: HostNamespace | None = None
        self._subjects: dict[int, Subject] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._subjects.clear()
        self._others = None
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    @property
    def others(self) -> HostNamespace:
        """For what netnsd is compared with: what that leaves to its end would slow a daemon on the same host."""
        if self._others is None:
            self._others = self._stack.enter_context(HostNamespace())
        return self._others

    @property
    def cold(self) -> Subject:
        """A daemon without a pool."""
        return self._subject(0)

    @property
    def warm(self) -> Subject:
        """A daemon with a pool."""
        return self._subject(POOL)

    def _subject(self, pool: int) -> Subject:
        if pool not in self._subjects:
            self._subjects[pool] = self._stack.enter_context(fresh(pool))
        return self._subjects[pool]


@contextmanager
def fresh(pool: int) -> Iterator[Subject]:
    """A daemon on a new host, both gone afterwards; ``pool``: how many slots it keeps warm."""
    config: dict[str, dict[str, str | int]] = {"daemon": {"log_level": "warning"}}
    if has_pools():
        config["pool"] = {"size": pool}
    with HostNamespace() as host, Daemon(host, config=config) as daemon:
        subject = Subject(daemon, pool)
        with contextlib.closing(subject.connection):
            yield subject


def has_pools() -> bool:
    """Whether this netnsd can keep slots warm."""
    return any(section.name == "pool" for section in msgspec.structs.fields(Config))


def settle() -> None:
    """Let the kernel finish what it does behind the scenes."""
    time.sleep(_SETTLE_SECONDS)
    deadline = time.monotonic() + _IDLE_DEADLINE_SECONDS
    while time.monotonic() < deadline:
        idle, total = _processor_ticks()
        time.sleep(_IDLE_SECONDS)
        idle_after, total_after = _processor_ticks()
        if idle_after - idle >= _IDLE_SHARE * (total_after - total):
            return


def _processor_ticks() -> tuple[int, int]:
    """Idle ticks and all ticks of all processors so far (proc_stat(5))."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(part) for part in stat.readline().split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _is_launcher(pid: int) -> bool:
    """Whether it is the launcher itself: children that wait come and go, and do nothing."""
    with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
        return file.read().strip() == "netnsd-launcher"


def _proportional_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def _resident_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
