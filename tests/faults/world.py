"""A disposable host with a planted daemon, somebody who is not to be disturbed, and a look at what is left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from tests.faults.control import Control
from tests.harness import ALICE, ROOT, Daemon, HostNamespace, Snapshot, User, settle, wait_until
from tests.harness.daemon import Section
from tests.harness.host import CODE
from tests.harness.waiting import DeadlineError
from tests.system.clients import PYTHON, Environment, echo_server, is_gone, main_of, published

_HERE = Path(__file__).parent
ANSWER_SECONDS = 20.0  # what takes longer hangs
SETTLE_SECONDS = 15.0


class PlantedDaemon(Daemon):
    """``netnsd serve`` with points in it, and so its launcher."""

    def __init__(self, host: HostNamespace, *, config: Mapping[str, Section] | None = None, name: str = "d") -> None:
        super().__init__(host, config=config, name=name)
        host.directory(f"{self.base}/cache", mode=0o777)
        self.control = Control(str(host.path(f"{self.base}/control")), create=True)
        self.launcher_control = Control(str(host.path(f"{self.base}/launcher.control")), create=True)

        self._forks: Forks | None = None

    @property
    def command(self) -> list[str]:
        serve = super().command[1:]
        return [sys.executable, str(_HERE / "daemon.py"), f"{self.base}/control", f"{self.base}/cache", *serve]

    def _spawn(self, env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        if self._forks is None:
            self._forks = Forks(self.host.popen(self.command, stdin=subprocess.PIPE, stderr=log))
        return cast("subprocess.Popen[bytes]", Fork(self._forks, {"env": dict(env), "log": self.log_file}))

    def close(self) -> None:
        super().close()
        if self._forks is not None:
            self._forks.close()


class Forks:
    """daemon.py, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._heard = b""

    def ask(self, order: dict[str, Any]) -> None:
        """Have a daemon forked."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode())
        self._process.stdin.flush()

    def hear(self, seconds: float) -> list[int]:
        """The numbers of the next line. Raises TimeoutExpired."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise subprocess.TimeoutExpired("netnsd serve", seconds)
            part = os.read(self._process.stdout.fileno(), 4096)
            assert part, "the program that forks daemons ended"
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return [int(word) for word in line.split()]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=5)


class Fork:
    """A daemon that was forked by daemon.py: what Popen has of one that was started."""

    def __init__(self, forks: Forks, order: dict[str, Any]) -> None:
        self._forks = forks
        self._forks.ask(order)
        self.returncode: int | None = None
        (self.pid,) = self._forks.hear(ANSWER_SECONDS)

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float = ANSWER_SECONDS) -> int:
        """Its exit code. Raises TimeoutExpired."""
        if self.returncode is None:
            pid, self.returncode = self._forks.hear(timeout)
            assert pid == self.pid
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request; status 0 where the daemon did not answer, and ``body`` says why."""

    status: int
    body: Any

    @property
    def is_good(self) -> bool:
        """Whether it was done."""
        return 200 <= self.status < 300

    @property
    def code(self) -> str:
        """The error's code; empty where there is none."""
        return str(self.body["error"]["code"]) if isinstance(self.body, dict) and "error" in self.body else ""


class Agent:
    """A process that asks as ``user``."""

    def __init__(self, daemon: Daemon, user: User) -> None:
        self._process = daemon.host.popen([PYTHON, f"{CODE}/tests/faults/agent.py", daemon.socket], user=user, cwd="/",
                                          stdin=subprocess.PIPE, stderr=None)

    def begin(self, **order: Any) -> None:
        """Ask, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"seconds": ANSWER_SECONDS, **order}).encode() + b"\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """The answer to what was begun."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS + 5)
        assert readable, "the agent does not answer"
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def reply(self) -> Reply:
        """The answer to a request that was begun."""
        answer = self.end()
        return Reply(answer.get("status", 0), answer.get("body", answer.get("error")))

    def ask(self, method: str, path: str, body: Any = None) -> Reply:
        """Ask, and wait."""
        self.begin(method=method, path=path, body=body)
        return self.reply()

    def good(self, method: str, path: str, body: Any = None) -> Any:
        """The body of an answer that says that it was done."""
        reply = self.ask(method, path, body)
        assert reply.is_good, (method, path, reply)
        return reply.body

    def say(self, protocol: str, address: str, port: int, seconds: float = 5.0) -> str:
        """What a server answers."""
        self.begin(say=protocol, address=address, port=port, seconds=seconds)
        return str(self.end()["answer"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=5)


class World:
    """The host, the daemon, ALICE's environment ``bystander`` with a connection to its server, and what was at first.

    Args:
        with_bystander: without it nothing keeps the daemon from taking all away at its end.
    """

    def __init__(self, host: HostNamespace, *, config: Mapping[str, Section] | None = None, with_bystander: bool = True,
                 name: str = "d") -> None:
        self.host = host
        # A creation may not grow the pool behind a trial's back.
        self.daemon = PlantedDaemon(host, config={"pool": {"size": 0, "most": 0}, **(config or {})}, name=name)
        self.alice = Agent(self.daemon, ALICE)
        self.root = Agent(self.daemon, ROOT)
        self.control = self.daemon.control
        self._with_bystander = with_bystander
        self.bystander: Environment = {}
        self.before: Snapshot | None = None
        self.said = ""
        self._log_seen = 0

    def __enter__(self) -> Self:
        try:
            self.daemon.start()
            if self._with_bystander:
                self._begin()
            else:
                assert self.daemon.stop() == 0
                self.before = self.look()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.disarm()
        try:
            for agent in (self.alice, self.root):
                agent.close()
        finally:
            self.daemon.__exit__(kind, error, trace)

    def _begin(self) -> None:
        # What is made once is there then.
        self.alice.good("POST", "/v1/environments", {"name": "first", "command": ["sleep", "1000"], "cwd": "/",
                                                     "env": {"PATH": "/usr/bin:/bin"}})
        self.bystander = self.alice.good("POST", "/v1/environments", {
            "name": "bystander", "command": echo_server("bystander", 3000), "cwd": "/", "ports": [{"port": 3000}]})
        assert self.alice.say("tcp", "127.0.0.1", published(self.bystander)) == "bystander heard hello"
        self.alice.begin(connect=True, port=published(self.bystander))
        assert self.alice.end() == {}
        self.alice.good("DELETE", "/v1/environments/first")
        self.before = self.look()

    # -- the daemon -----------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the daemon runs."""
        return self.daemon.process is not None and self.daemon.process.poll() is None

    def await_end(self, seconds: float) -> bool:
        """Whether it ended in time."""
        assert self.daemon.process is not None
        try:
            self.daemon.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def start(self) -> None:
        """Start the daemon, with nothing armed."""
        self.disarm()
        self.daemon.start()

    def be_new(self) -> None:
        """Have a daemon that has made nothing yet: no bridge, no cgroup."""
        if self.is_alive:
            assert self.daemon.stop() == 0
        self.start()

    def record(self) -> None:
        """Write down every step of daemon and launcher from now on."""
        self.daemon.launcher_control.record()
        self.control.record()

    def disarm(self) -> None:
        """Let daemon and launcher be."""
        self.control.disarm()
        self.daemon.launcher_control.disarm()

    def hang_up(self) -> None:
        """Have the daemon look after what is left now, not in a minute."""
        os.kill(self.daemon.pid, signal.SIGHUP)

    def new_log(self) -> str:
        """What the daemon logged since the last call."""
        text = self.daemon.log()
        new, self._log_seen = text[self._log_seen:], len(text)
        return new

    # -- what is there --------------------------------------------------------------------------------------------

    def environments(self) -> dict[str, Environment]:
        """ALICE's, without the bystander."""
        listed = self.alice.good("GET", "/v1/environments")["environments"]
        return {e["name"]: e for e in listed if e["name"] != "bystander"}

    def look(self) -> Snapshot:
        """The host without what users keep, and without what every daemon is itself."""
        seen = Snapshot.of_host(self.host)
        own = (f"{self.daemon.base}/cache", f"{self.daemon.state_dir}/", f"{self.daemon.base}/notify")
        kept = (f"{self.daemon.state_dir}/logs/",)
        return replace(
            seen, files=frozenset(
                p for p in seen.files if p.startswith(kept) or not p.startswith(("/run/home/", *own))),
            processes=frozenset(line for line in seen.processes if "/run/test/" not in line))

    def rows(self) -> dict[str, int]:
        """How many rows each table of the state file has."""
        self.root.begin(rows=f"{self.daemon.state_dir}/netnsd.db")
        return self.root.end()

    def _rows_beside(self, expected: Mapping[str, int]) -> list[str]:
        return [f"the state file has {count} {table}" for table, count in self.rows().items()
                if count != expected.get(table, 0) and table in ("environments", "ports", "services", "templates")]

    def change_state(self, statement: str, *values: str) -> None:
        """Change one row of the state file of a daemon that does not run."""
        self.root.begin(change=statement, state=f"{self.daemon.state_dir}/netnsd.db", values=values)
        assert self.root.end() == {"changed": 1}

    def complaints_of_bystander(self) -> list[str]:
        """What happened to the bystander, which nothing may happen to."""
        if not self._with_bystander:
            return []
        shown = self.alice.ask("GET", "/v1/environments/bystander")
        found = [] if shown.body == self.bystander else [f"the bystander is {shown.body}, was {self.bystander}"]
        if is_gone(main_of(self.bystander)["pid"]):
            found.append("the bystander's server is gone")
        self.alice.begin(speak=True)
        if (answer := self.alice.end()) != {"answer": "bystander heard still there?"}:
            found.append(f"the bystander's connection: {answer}")
        if (said := self.alice.say("tcp", "127.0.0.1", published(self.bystander))) != "bystander heard hello":
            found.append(f"the bystander's port: {said}")
        return found

    def complaints_of(self, environment: Environment) -> list[str]:
        """What is missing for an environment to be whole: it runs, and each of its ports answers."""
        name = environment["name"]
        with contextlib.suppress(DeadlineError):
            wait_until(lambda: not self._is_on_its_way(name), what="what a restart policy does")
        environment = self.environments().get(name, environment) | {"ports": environment["ports"]}
        if environment["state"] != "running":
            return [f"{name} is {environment['state']}"]
        found = [f"{name}: {s['name']} is {s['state']}" for s in environment["services"]
                 if s["state"] != "running" or s["pid"] is None or is_gone(s["pid"])]
        for port in environment["ports"] if environment["services"] else ():
            said = self.alice.say(port["protocol"], "127.0.0.1", port["published"])
            if said != "web heard hello":
                found.append(f"{name}: port {port}: {said}")
        said = self.alice.say("tcp", environment["address"], 9, seconds=0.0)
        if "ConnectionRefused" not in said:
            found.append(f"{name}: its address {environment['address']}: {said}")
        return found

    def _is_on_its_way(self, name: str) -> bool:
        services = self.environments().get(name, {"services": []})["services"]
        return any(service["state"] in ("starting", "restarting") for service in services)

    def leaks(self, seconds: float = SETTLE_SECONDS) -> list[str]:
        """What is there and was not at first, once everything of a trial was removed."""
        assert self.before is not None
        if not self._with_bystander:
            return self._leaks_of_nothing(seconds)
        expected = {"environments": 1, "ports": 1, "services": 1}
        # A state file that could not be put back is, a second later; what could not be removed, at the next check.
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._rows_beside(expected) and time.monotonic() < deadline:
            self.hang_up()
            time.sleep(0.2)
        found = [*settle(self.before, self.look, seconds=seconds), *self._rows_beside(expected)]
        info = self.root.good("GET", "/v1/info")
        if (info["environments"], info["published_ports"]) != (1, 1):
            found.append(f"{info['environments']} environments and {info['published_ports']} ports are leased")
        return found

    def _leaks_of_nothing(self, seconds: float) -> list[str]:
        """The same where nothing is kept: a daemon that ends takes all away but its state. It is stopped then."""
        assert self.before is not None
        found = self._rows_beside({})
        if self.daemon.stop() != 0:
            found.append("the daemon did not end well")
        return found + settle(self.before, self.look, seconds=seconds)

    def wait_quiet(self, seconds: float = 0.3) -> None:
        """Wait until no step was recorded for a while: what is done behind an answer is done."""
        def taken() -> int:
            return len(self.control.steps()) + len(self.daemon.launcher_control.steps())

        steps, since = taken(), time.monotonic()

        def is_quiet() -> bool:
            nonlocal steps, since
            now = taken()
            if now != steps:
                steps, since = now, time.monotonic()
            return time.monotonic() - since > seconds

        wait_until(is_quiet, seconds=SETTLE_SECONDS, what="a quiet daemon")
