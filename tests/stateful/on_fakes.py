"""The machine's world on fakes: the real application, service and state file, and a kernel of sets.

The service runs in a thread of its own, by a clock that stands still unless it is told to go on. A kill lets no step
follow, also none of what would tidy up.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote

import trio
import trio.testing

from netnsd import wire
from netnsd.api.app import application
from netnsd.api.routes import Context
from netnsd.api.trail import Trail
from netnsd.core.actor import Actor
from netnsd.core.interfaces import Listener
from netnsd.core.pool import PoolSettings
from netnsd.core.tokens import VOUCHED_FOR
from netnsd.errors import NetnsdError
from netnsd.observability.events import EventLog
from tests.fakes import world
from tests.fakes.faults import Killed
from tests.fakes.world import World
from tests.stateful import accounts, model

T = TypeVar("T")
_ACTORS = {"alice": world.ALICE, "bob": world.BOB, "carol": world.CAROL}
_COMMANDS = {model.SLEEPER: "server", model.LISTENER: "server", model.BRIEF: "brief", model.MISSING: "missing"}
_PAUSE_SECONDS, _PAUSES = 0.05, 60
_REAL_SECONDS = 30.0
_KILLED = 128 + signal.SIGKILL


class FakeDriver:
    """Implements ``driver.Driver``. Close it, or use it as a context."""

    numbers = (20000, 20199)

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """See ``Driver``."""
        self.close()
        self._directory = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.world = World(self._directory, published_range=self.numbers, pool=PoolSettings(size=1, most=2))
        self.world.network.everywhere = {Listener("tcp", "0.0.0.0", 3000), Listener("udp", "0.0.0.0", 3001),
                                         Listener("tcp", "0.0.0.0", 3002)}
        self._is_closing = False
        self._failure: BaseException | None = None
        self._up, self._down = threading.Event(), threading.Event()
        self._clock = trio.testing.MockClock()
        self._thread = threading.Thread(target=self._serve, name="service on fakes")
        self._thread.start()
        self._await(self._up)

    def close(self) -> None:
        """End the service."""
        if self._thread is not None:
            self._is_closing = True
            if self._thread.is_alive():
                try:
                    self._call(self._kill)
                    self._call(self._start)
                except trio.RunFinishedError:
                    pass
            self._thread.join(_REAL_SECONDS)
            assert not self._thread.is_alive(), "the service does not end"
            self._thread = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    # -- what users do ----------------------------------------------------------------------------------------------

    def ask(self, user: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """See ``Driver``."""
        answer: tuple[int, Any] = self._call(self._driven, lambda: self._request(_ACTORS[user], method, path, body))
        return answer

    def specification(self, command: str) -> dict[str, Any]:
        """See ``Driver``."""
        return {"command": [_COMMANDS[command]]}

    def execute(self, user: str, ref: str, code: int) -> int | str:
        """See ``Driver``. A command that is handed over ends as it is told to."""
        ended: int | str = self._call(self._driven, lambda: self._attach(_ACTORS[user], ref, code))
        return ended

    def greeting(self, user: str, number: int) -> str:
        """See ``Driver``."""
        said: str = self._call(self._synchronous, lambda: self._greeting(_ACTORS[user].uid, number))
        return said

    # -- what dies --------------------------------------------------------------------------------------------------

    def end(self, pids: Sequence[int]) -> int:
        """See ``Driver``."""
        self._call(self._synchronous, lambda: self._end(pids))
        return _KILLED

    def crash(self, meanwhile: Callable[[], None], *, launcher: bool) -> None:
        """See ``Driver``."""
        self._call(self._kill)
        self._await(self._down)
        if launcher:
            self._call(self._synchronous, self.world.processes.lose_launcher)
        meanwhile()
        self._call(self._start)
        self._await(self._up)

    def crash_during(self, user: str, method: str, path: str, body: Any, moment: int) -> None:
        """See ``Driver``. ``moment``: how many steps are done."""
        self._call(self._killed_at, lambda: self._request(_ACTORS[user], method, path, body), moment)
        self._await(self._down)
        self._call(self._start)
        self._await(self._up)

    def restart(self) -> None:
        """See ``Driver``. On fakes every end is a kill; this one is at rest."""
        self._call(self._rest)
        self.crash(lambda: None, launcher=False)

    def lose_launcher(self) -> None:
        """See ``Driver``."""
        self._call(self._synchronous, self.world.processes.lose_launcher)

    def flush(self) -> None:
        """See ``Driver``."""
        self._call(self._flush)

    # -- what there is ----------------------------------------------------------------------------------------------

    def is_alive(self, pid: int) -> bool:
        """See ``Driver``."""
        return any(pid in members for members in self.world.cgroups.groups.values())

    def agree(self, differences: Callable[[], list[str]]) -> None:
        """See ``Driver``."""
        self._call(self._rest)
        found = differences()
        assert not found, "\n".join(found)

    def inside(self, visible: int, published: int) -> list[str]:
        """See ``Driver``."""
        return self._call(self._synchronous, lambda: accounts.differences(self.world, visible, published))

    def residue(self) -> list[str]:
        """See ``Driver``."""
        return self._call(self._synchronous, lambda: [f"{kind}: {what}" for kind, what in self.world.held().items()])

    # -- in the thread of the service -------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            trio.run(self._main, clock=self._clock, strict_exception_groups=True)
        except BaseException as error:  # noqa: BLE001  it is told where it is waited for
            self._failure = error
        finally:
            self._up.set()
            self._down.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        while not self._is_closing:
            self._again, self._killed = trio.Event(), trio.Event()
            self.world.faults.is_dead = False
            self.world.events.clear()  # what it said in its last moments, when no step could be done
            try:
                async with self.world.running() as environments:
                    self._application = self._app(environments)
                    self._down.clear()
                    self._up.set()
                    await self._killed.wait()
                    self.world.faults.is_dead = True
            except* Killed:
                pass
            self._killed.set()
            self._up.clear()
            self._down.set()
            await self._again.wait()

    def _app(self, environments: Any) -> Any:
        async def doctor() -> list[wire.Check]:
            return []

        def info() -> wire.Info:
            raise NotImplementedError

        def read_log(*_: object) -> Any:
            raise NotImplementedError

        events = EventLog(self.world.clock.now)
        return application(Context(environments, self.world.templates, lambda: b"", info, doctor,
                                   self.world.files.log_path, read_log, events.follow, tokens=self.world.tokens,
                                   projects=self.world.projects, policies=self.world.policies,
                                   follow_audit=events.follow, trail=Trail(events.emit)))

    async def _request(self, actor: Actor, method: str, path: str, body: Any) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        plain, _, query = path.partition("?")
        scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(plain),
                 "raw_path": plain.encode(), "query_string": query.encode(), "root_path": "",
                 "server": ("netnsd", None),
                 "state": {"actor": actor, "grant": VOUCHED_FOR, "is_certified": False, "stopping": lambda: False},
                 "headers": [(b"host", b"localhost"), (b"content-length", str(len(data)).encode())]}
        received, sent = [{"type": "http.request", "body": data, "more_body": False}], []

        async def receive() -> dict[str, Any]:
            if not received:
                await trio.sleep_forever()
            return received.pop()

        async def send(message: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(message)

        await self._application(scope, receive, send)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))

    async def _attach(self, actor: Actor, ref: str, code: int) -> int | str:
        try:
            environment = self.world.environments.registry.find(ref, actor)
            request = wire.ExecRequest(ref=ref, command=["true"], cwd="/")
            ended = await self.world.environments.attach(environment, request, actor, 0)
        except NetnsdError as error:
            return error.code
        os.close(ended)
        return code

    def _greeting(self, uid: int, number: int) -> str:
        address, _port = self.world.firewall.published.get(("tcp", number), ("", 0))
        if (address, uid) not in self.world.firewall.owners:
            return "ECONNREFUSED"
        return next((e.id for e in self.world.environments.registry.all() if e.slot.address == address), "nobody")

    def _end(self, pids: Sequence[int]) -> None:
        for launch, pid in list(self.world.processes.running.items()):
            if pid in pids:
                self.world.processes.end(launch, _KILLED)
        for pid in pids:
            self.world.cgroups.leave(pid)

    async def _flush(self) -> None:
        self.world.firewall.flush()
        assert await self.world.environments.check(), "nobody noticed that the rules are gone"

    async def _driven(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it to its end, with as much time as it takes."""
        results: list[T] = []

        async def do() -> None:
            results.append(await work())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(do)
            for _ in range(_PAUSES * 10):
                await trio.testing.wait_all_tasks_blocked()
                if results or not nursery.child_tasks:
                    break
                self._clock.jump(_PAUSE_SECONDS)
            else:
                raise AssertionError("it has no end")
        return results[0]

    async def _rest(self) -> None:
        """Let everything end that goes on behind."""
        for _ in range(_PAUSES):
            await trio.testing.wait_all_tasks_blocked()
            self._clock.jump(_PAUSE_SECONDS)
        await trio.testing.wait_all_tasks_blocked()

    async def _synchronous(self, work: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return work()

    async def _kill(self) -> None:
        self._killed.set()
        await trio.lowlevel.checkpoint()

    async def _start(self) -> None:
        self._again.set()
        await trio.lowlevel.checkpoint()

    async def _killed_at(self, work: Callable[[], Awaitable[Any]], moment: int) -> None:
        faults = self.world.faults

        def die(step: str) -> None:
            faults.is_dead = True
            self._killed.set()
            raise Killed(step)

        try:
            with faults.fail_at(moment, die):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work)
                    for _ in range(_PAUSES):
                        await trio.testing.wait_all_tasks_blocked()
                        if faults.is_dead:
                            break
                        self._clock.jump(_PAUSE_SECONDS)
                    faults.is_dead = True  # it was done before
                    self._killed.set()
                    nursery.cancel_scope.cancel()
        except* Killed:
            pass

    # -- between the threads ----------------------------------------------------------------------------------------

    def _call(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        try:
            return trio.from_thread.run(work, *arguments, trio_token=self._token)
        except trio.RunFinishedError:
            if self._failure is not None:
                raise AssertionError("the service failed") from self._failure
            raise

    def _await(self, event: threading.Event) -> None:
        assert event.wait(_REAL_SECONDS), "the service does not come up, or down"
        if self._failure is not None:
            raise AssertionError("the service failed") from self._failure
