"""The machine's world on a disposable host: a real daemon, real servers, and a process for each user's requests.

One host serves all examples; each leaves nothing for the next.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.bench.programs import AGENT_ENVIRONMENT
from tests.harness import Daemon, HostNamespace, wait_until
from tests.soak import samples
from tests.soak.agents.client import SERVER
from tests.stateful import model
from tests.stateful.driver import ALICE, BOB, CAROL

ROOT = "root"
_AGREEMENT_SECONDS = 20.0
_ANSWER_SECONDS = 40.0
_MOMENT_SECONDS = 0.0005
_PATH = {"PATH": "/usr/bin:/bin"}
_COMMANDS = {model.SLEEPER: ["sleep", "1000"], model.LISTENER: SERVER,
             model.BRIEF: ["sh", "-c", f"exit {model.BRIEF_CODE}"], model.MISSING: ["/nowhere/missing"]}
_CREATED = 201


class HostDriver:
    """Implements ``driver.Driver``. Use it as a context; needs root."""

    numbers = (20000, 20199)

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._is_shaken = False  # something died since doctor was last asked, which costs more than all the rest

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._host = stack.enter_context(HostNamespace())
            self._daemon = stack.enter_context(Daemon(self._host, config={
                "ports": {"range": "{}-{}".format(*self.numbers)}, "pool": {"size": 0, "most": 2}}))
            self._agents: dict[str, subprocess.Popen[bytes]] = {}
            for user in (ALICE, BOB, CAROL, ROOT):
                self._begin_agent(user, stack)
            # What the daemon makes once is there afterwards.
            self.ask(ALICE, "POST", "/v1/environments", {"name": "first", "cwd": "/"})
            self.ask(ALICE, "DELETE", "/v1/environments/first")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def begin(self) -> None:
        """See ``Driver``."""
        self.ask(CAROL, "PATCH", "/v1/pools/slots", {"size": 1})

    # -- what users do ----------------------------------------------------------------------------------------------

    def ask(self, user: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """See ``Driver``."""
        self._order(user, {"ask": [method, path, body]})
        answer = self._answer(user)
        assert "status" in answer, (user, method, path, body, answer, self._daemon.log()[-3000:])
        is_made = method == "POST" and path in ("/v1/environments", "/v1/templates") and answer["status"] == 200
        return _CREATED if is_made else answer["status"], answer["body"]

    def specification(self, command: str) -> dict[str, Any]:
        """See ``Driver``."""
        return {"command": _COMMANDS[command], "env": _PATH}

    def execute(self, user: str, ref: str, code: int) -> int | str:
        """See ``Driver``."""
        self._order(user, {"execute": [ref, code]})
        answer = self._answer(user)
        assert "ended" in answer, answer
        ended: int | str = answer["ended"]
        return ended

    def greeting(self, user: str, number: int) -> str:
        """See ``Driver``."""
        self._order(user, {"greeting": number})
        said: str = self._answer(user)["said"]
        return said

    # -- what dies --------------------------------------------------------------------------------------------------

    def end(self, pids: Sequence[int]) -> int:
        """See ``Driver``."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(self.is_alive(pid) for pid in pids), what="the servers' end")
        return 128 + signal.SIGKILL

    def crash(self, meanwhile: Callable[[], None], *, launcher: bool) -> None:
        """See ``Driver``."""
        old = samples.launcher_of(self._daemon)
        self._daemon.kill()
        if launcher:
            self._end_launcher(old)
        meanwhile()
        self._start()

    def crash_during(self, user: str, method: str, path: str, body: Any, moment: int) -> None:
        """See ``Driver``. ``moment``: in half milliseconds; the daemon may have answered by then."""
        self._order(user, {"ask": [method, path, body]})
        time.sleep(moment * _MOMENT_SECONDS)
        self._daemon.kill()
        self._answer(user)
        self._start()

    def restart(self) -> None:
        """See ``Driver``."""
        self._daemon.restart()
        self._connect()

    def lose_launcher(self) -> None:
        """See ``Driver``."""
        old = samples.launcher_of(self._daemon)
        self._end_launcher(old)
        self._is_shaken = True
        wait_until(lambda: self._has_another_launcher(old), what="a new launcher")

    def flush(self) -> None:
        """See ``Driver``."""
        self._host.run(["nft", "flush", "ruleset"], check=True)
        self._is_shaken = True
        wait_until(lambda: "netnsd" in self._host.run(["nft", "list", "tables"]).stdout, what="the rules")

    # -- what there is ----------------------------------------------------------------------------------------------

    def is_alive(self, pid: int) -> bool:
        """See ``Driver``."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
        except OSError:
            return False

    def agree(self, differences: Callable[[], list[str]]) -> None:
        """See ``Driver``."""
        deadline = time.monotonic() + _AGREEMENT_SECONDS
        while (found := differences()):
            assert time.monotonic() < deadline, "\n".join([*found, self._daemon.log()[-3000:]])
            time.sleep(0.01)

    def inside(self, visible: int, published: int) -> list[str]:
        """See ``Driver``."""
        _, info = self.ask(CAROL, "GET", "/v1/info")
        rows, stock, stock_ports, unsettled = self._rows()
        expected = [("environments", info["environments"], visible + stock), ("rows", rows, visible + stock),
                    ("leases", info["published_ports"], published + stock_ports),
                    ("rows that are not ready", unsettled, 0)]
        found = [f"{what}: {is_so} and not {should}" for what, is_so, should in expected if is_so != should]
        if not found and self._is_shaken:
            found = [f"doctor: {difference}" for difference in self.ask(CAROL, "GET", "/v1/doctor")[1]["differences"]]
            self._is_shaken = bool(found)
        return found

    def residue(self) -> list[str]:
        """See ``Driver``."""
        _, info = self.ask(CAROL, "GET", "/v1/info")
        counts = samples.counted(self._daemon)
        held = {"environments": info["environments"], "published ports": info["published_ports"],
                "pool": info["pool_ready"],
                **{kind: counts[kind] for kind in ("names", "pins", "links", "elements", "cgroups", "neighbours")},
                "processes": len(self._daemon.launcher_pids()) - 1, "rows": self._rows()[0],
                "differences": len(samples.differences(self._daemon))}
        return [f"{kind}: {count}" for kind, count in held.items() if count]

    def _rows(self) -> tuple[int, int, int, int]:
        """Environments' rows, those in stock, their ports, and rows that are not ready."""
        # By an agent: SQLite follows the link to the host's root, which leads it to our own.
        self._order(ROOT, {"rows": [f"{self._daemon.state_dir}/netnsd.db", (
            "SELECT count(*), count(nullif(stock, '')), (SELECT count(*) FROM ports JOIN environments ON"
            " environment = id WHERE stock != ''), count(nullif(state, 'ready')) FROM environments")]})
        rows, stock, ports, unsettled = self._answer(ROOT)["row"]
        return rows, stock, ports, unsettled

    # -- small things -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._daemon.start()
        self._connect()

    def _end_launcher(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.is_alive(pid), what="the launcher's end")

    def _has_another_launcher(self, old: int) -> bool:
        try:
            return samples.launcher_of(self._daemon) != old
        except ValueError:  # none yet, or it forks
            return False

    def _begin_agent(self, user: str, stack: ExitStack) -> None:
        self._agents[user] = agent = self._host.popen(
            [sys.executable, "-m", "tests.soak.agents.asking"], user=user, cwd="/", env=AGENT_ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None)
        stack.callback(agent.wait, timeout=5)
        stack.callback(agent.kill)
        self._introduce(user)

    def _connect(self) -> None:
        self._is_shaken = True
        for user in self._agents:
            self._introduce(user)

    def _introduce(self, user: str) -> None:
        # Not on its command line: who has these there passes for the launcher.
        self._order(user, {"sockets": [self._daemon.socket, f"{self._daemon.runtime_dir}/attach.sock"]})
        assert self._answer(user) == {}

    def _order(self, user: str, order: dict[str, Any]) -> None:
        stdin = self._agents[user].stdin
        assert stdin is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()

    def _answer(self, user: str) -> dict[str, Any]:
        stdout = self._agents[user].stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], _ANSWER_SECONDS)
        assert readable, f"{user} got no answer within {_ANSWER_SECONDS} s"
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer
