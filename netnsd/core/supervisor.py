"""Services: starting and stopping them, and knowing when they ended.

The cgroup is the truth, not the pid: a server that put itself in the background is still in its cgroup, and runs. So
a service has ended when its first process has and nothing lives in its cgroup.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import trio

from netnsd import wire
from netnsd.core.environment import ALIVE, Environment, Service
from netnsd.core.errands import Errands
from netnsd.core.health import Health
from netnsd.core.interfaces import Exited
from netnsd.core.launching import Launching, started_again
from netnsd.core.restarts import CALM_SECONDS, Restarts, after_its_end, pause
from netnsd.core.shortage import Shortage
from netnsd.errors import NetnsdError, StoreError

if TYPE_CHECKING:
    from netnsd.core.actor import Account
    from netnsd.core.addressing import Slot
    from netnsd.core.interfaces import Adapters, Emit

_REPORT_SECONDS = 1.0
_WATCH_AGAIN_SECONDS = 1.0
_KILLED = 128 + signal.SIGKILL


class Supervisor:
    """Knows each service's latest start by its launch id.

    Args:
        turn: an environment's lock, under which things of it are started and stopped; raises where it goes.
        furnish: makes an environment fit for servers, once.
        account: who a user is now.
    """

    def __init__(self, adapters: Adapters, emit: Emit, hard_limits: dict[str, int], *,
                 turn: Callable[[Environment], AbstractAsyncContextManager[None]],
                 furnish: Callable[[Environment], Awaitable[None]], account: Account) -> None:
        self._a = adapters
        self._emit = emit
        self._shortage = Shortage(adapters.cgroups, self._short)
        self.launching = Launching(adapters, hard_limits, self._follow_memory)
        self._turn = turn
        self._furnish = furnish
        self._account = account
        self._restarts = Restarts(self._start_again, self._restart_failed)
        self._errands = Errands(adapters, turn, self.launching.launch_of)
        self._health = Health(adapters.probes, self._errands, self._judged)
        # Environment, service, and since when it runs.
        self._launches: dict[str, tuple[Environment, str, float]] = {}
        self._early: dict[str, int | None] = {}
        self.restarts = 0
        self._losses = 0
        self._watched: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self._pulse = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks that watch services; runs until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def follow_exits(self) -> None:
        """Take the launcher's reports, for ever."""
        async for exited in self._a.processes.exits:
            if exited is None:
                self._launcher_lost()
            else:
                self._on_exit(exited)

    async def changed(self) -> None:
        """Return at the next change of any service or environment."""
        await self._pulse.wait()

    def pulse(self) -> None:
        """Something changed: wake who waits."""
        self._pulse.set()
        self._pulse = trio.Event()

    # -- starting and stopping ----------------------------------------------------------------------------------

    async def start(self, environment: Environment, service: Service) -> None:
        """Start a service by hand, unless it runs. Raises LaunchFailed, and it is as it was."""
        if service.state not in ("starting", "running"):
            # A restart that is pending finds that it is not due, and where this fails it still is.
            await self._launch(environment, service.changed(restarts=0, tries=0), before=service)

    async def _start_again(self, environment: Environment, ended: Service) -> None:
        """Start a service that ended, unless something else became of it meanwhile."""
        async with self._turn(environment):
            service = environment.services[ended.name]
            if service.state != "restarting" or service.launch_id != ended.launch_id:
                return
            self.restarts += 1
            # Whatever fails: the pauses between attempts must grow, also where it fails before the launch.
            service = environment.services[ended.name] = service.changed(
                restarts=service.restarts + 1, tries=service.tries + 1)
            await self._furnish(environment)
            await self._launch(environment, service, before=service)

    def _restart_failed(self, environment: Environment, service: Service, error: NetnsdError) -> None:
        self._tell("restart_failed", environment, service.name, reason=error.message, restarts=service.restarts,
                   after_seconds=pause(service.tries))

    async def _launch(self, environment: Environment, service: Service, before: Service) -> None:
        """Start a service. Raises LaunchFailed, and it is as ``before``."""
        if environment.state != "creating":  # else its creator has just been vouched for
            service = await self._as_now(environment, service)
            before = before.changed(command=service.command)
        launch_id = uuid.uuid4().hex
        losses = self._losses
        self._launches[launch_id] = (environment, service.name, trio.current_time())
        group = group_of(environment.slot, service.name)
        try:
            self._save(environment, service.changed(state="starting", launch_id=launch_id, pid=None, exit_code=None))
            if service.launch_id is not None:
                # An interrupted stop may have left the group, and what is born in one that was killed as a whole, ever,
                # is killed at once: cgroup_css_set_fork (kernel/cgroup/cgroup.c) looks at the parent's kill_seq.
                await self._a.cgroups.remove(group)
            await self._a.cgroups.create(group)
            log = self._a.files.open_log(environment, service.name)
            try:
                pid = await self._a.processes.launch(
                    self.launching.launch_of(environment, service.command, group, launch_id, log))
            finally:
                os.close(log)
            self._launches[launch_id] = (environment, service.name, trio.current_time())
            self._save(environment, environment.services[service.name].changed(
                state="running", pid=pid, health="starting" if service.check else None))
        except BaseException:
            self._launches.pop(launch_id, None)
            self._early.pop(launch_id, None)
            environment.services[service.name] = before  # whatever else fails: "starting" could never be started
            with trio.CancelScope(shield=True):
                await self._a.cgroups.remove(group)
            self._save(environment, before)
            raise
        if losses != self._losses:  # who started it may be gone, and its end not be told
            self._watch(environment, environment.services[service.name], pid)
        self._tell("started", environment, service.name, pid=pid)
        self._follow(environment, environment.services[service.name])
        if launch_id in self._early:
            self._on_exit(Exited(launch_id, self._early.pop(launch_id)))

    async def _as_now(self, environment: Environment, service: Service) -> Service:
        """With no group that its creator's account has lost: for good, also for what looks at its health."""
        now = started_again(environment, service, await self._account(environment.uid))
        if now != service:
            with self._a.store.transaction():
                self._a.store.set_command(environment.id, now)
        return now

    async def stop(self, environment: Environment, grace_seconds: float) -> None:
        """End all services of an environment: SIGTERM to every process, cgroup.kill after ``grace_seconds``.

        Raises the first error, after all others were asked to end; what is left can be stopped again.
        """
        failures: list[NetnsdError] = []

        async def stop_one(service: Service) -> None:
            try:
                await self._stop_one(environment, service, grace_seconds)
            except NetnsdError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for service in list(environment.services.values()):
                if service.state in ALIVE or self._a.cgroups.populated(
                        group_of(environment.slot, service.name)):
                    nursery.start_soon(stop_one, service)
        if failures:
            raise failures[0]

    async def _stop_one(self, environment: Environment, service: Service, grace_seconds: float) -> None:
        group = group_of(environment.slot, service.name)
        self._save(environment, service.changed(state="stopped", health=None))
        self._restarts.cancel(environment, service.name)
        self._health.forget(service.launch_id)
        self._a.cgroups.signal(group, signal.SIGTERM)
        with trio.move_on_after(grace_seconds):
            await self._a.cgroups.empty(group)
        await self._a.cgroups.remove(group)
        with trio.move_on_after(_REPORT_SECONDS):
            while service.launch_id in self._launches:
                await self.changed()

    # -- ends ---------------------------------------------------------------------------------------------------

    def adopt(self, environment: Environment, services: dict[str, Service], reported: AbstractSet[str]) -> None:
        """Go on with services that an earlier run of the daemon started.

        ``reported``: the launches whose ends the launcher will tell; the others' cgroups are watched.
        """
        if environment.resources.memory is not None:
            self._shortage.adopt(environment)
            self._follow_memory(environment)
        for found in services.values():
            before, service = environment.services[found.name], found
            if before.state in ("starting", "running") and service.state == "exited":
                service = after_its_end(environment, service)
            if service.state == "running" and service.check is not None and service.health is None:
                service = service.changed(health="starting")
            if service.launch_id is not None and service.state == "running":
                self._launches[service.launch_id] = (environment, service.name, trio.current_time())
                if service.launch_id not in reported:
                    self._watch(environment, service, _of_unknown_end(service))
            if service != before:
                self._save(environment, service)
            if service.launch_id is not None and service.state != "running":
                self._a.processes.acknowledge(service.launch_id)
                if before.state == "running":
                    self._tell("ended", environment, service.name, exit_code=service.exit_code)
            if service.state == "running":
                self._follow(environment, service)
            elif service.state == "restarting":
                self._restart_later(environment, service)

    def forget(self, environment: Environment) -> None:
        """The environment is gone."""
        for service in environment.services.values():
            self._restarts.cancel(environment, service.name)
            self._health.forget(service.launch_id)
            if service.launch_id is not None and self._launches.pop(service.launch_id, None) is not None:
                self._a.processes.acknowledge(service.launch_id)
        self._shortage.forget(environment)
        self.pulse()

    def _on_exit(self, exited: Exited) -> None:
        known = self._launches.get(exited.launch_id)
        if known is None:
            self._errands.take(exited)
            self._a.processes.acknowledge(exited.launch_id)
            return
        environment, name, _since = known
        service = environment.services[name]
        if service.launch_id != exited.launch_id:  # told late: another start followed
            self._launches.pop(exited.launch_id)
            self._a.processes.acknowledge(exited.launch_id)
            return
        if service.state == "starting":
            self._early[exited.launch_id] = exited.code
            return
        service = service.changed(exit_code=exited.code)
        group = group_of(environment.slot, name)
        try:
            lives = self._a.cgroups.populated(group)
            remaining = self._a.cgroups.pids(group) if lives else []
        except NetnsdError:  # out of descriptors, say: watched until it can be told
            lives, remaining = True, []
        if lives:
            if self._note(environment, service.changed(pid=remaining[0] if remaining else None)):
                self._a.processes.acknowledge(exited.launch_id)
            self._watch(environment, service)
        else:
            self._ended(environment, service)

    def _launcher_lost(self) -> None:
        """Nobody reports these services' ends any more: their cgroups do, and of their codes the kernel may know."""
        self._losses += 1
        self._errands.launcher_lost()
        for environment, name, _since in self._launches.values():
            if environment.services[name].state != "starting":  # its cgroup is empty before its start
                self._watch(environment, environment.services[name], _of_unknown_end(environment.services[name]))

    def _watch(self, environment: Environment, service: Service, first: int | None = None) -> None:
        """Notice its end by its cgroup. ``first``: the process whose code is the service's, where nobody tells it."""
        assert self._nursery is not None
        if service.launch_id is not None and service.launch_id not in self._watched:
            self._watched.add(service.launch_id)
            self._nursery.start_soon(self._watch_group, environment, service, first)

    async def _watch_group(self, environment: Environment, service: Service, first: int | None) -> None:
        assert service.launch_id is not None
        group, code = group_of(environment.slot, service.name), None
        while True:
            try:
                if first is not None:
                    code, first = await self._a.cgroups.exit_code(group, first), None
                if code is not None:
                    self._tell_code(environment, service, code, self._a.cgroups.pids(group))
                    code = None
                await self._a.cgroups.empty(group)
                break
            except NetnsdError:  # it cannot be watched now; what it is watched for still comes
                await trio.sleep(_WATCH_AGAIN_SECONDS)
        self._watched.discard(service.launch_id)
        current = environment.services[service.name]
        if current.launch_id == service.launch_id and service.launch_id in self._launches:
            self._ended(environment, current)

    def _tell_code(self, environment: Environment, service: Service, code: int, left: list[int]) -> None:
        """The first process has ended; what is ``left`` of the service serves on, if anything is."""
        current = environment.services[service.name]
        if current.launch_id == service.launch_id and service.launch_id in self._launches:
            self._note(environment, current.changed(exit_code=code, pid=left[0] if left else None))

    def _ended(self, environment: Environment, service: Service) -> None:
        assert service.launch_id is not None
        _, _, since = self._launches.pop(service.launch_id)
        self._health.forget(service.launch_id)
        if trio.current_time() - since >= CALM_SECONDS:
            service = service.changed(tries=0)
        service = after_its_end(environment, service)
        if self._note(environment, service):
            self._a.processes.acknowledge(service.launch_id or "")
        if service.exit_code in (None, _KILLED):
            self._shortage.look(environment, service.name)
        self._tell("ended", environment, service.name, exit_code=service.exit_code)
        if service.state == "restarting":
            self._restart_later(environment, service)

    def _follow_memory(self, environment: Environment) -> None:
        assert self._nursery is not None
        self._shortage.follow(self._nursery, environment)

    def _short(self, environment: Environment, service: str, count: int) -> None:
        self._tell("oom_killed", environment, service, count=count, memory=environment.resources.memory)
        self.pulse()

    def _follow(self, environment: Environment, service: Service) -> None:
        assert self._nursery is not None
        self._health.follow(self._nursery, environment, service)

    def _judged(self, environment: Environment, looked_at: Service, state: wire.HealthState, reason: str) -> None:
        service = environment.services[looked_at.name]
        if service.launch_id != looked_at.launch_id or service.state != "running":
            return
        self._note(environment, service.changed(health=state))
        if state == "healthy":
            self._tell("healthy", environment, service.name)
        else:
            self._tell("unhealthy", environment, service.name, reason=reason)

    def _restart_later(self, environment: Environment, service: Service) -> None:
        assert self._nursery is not None
        self._tell("restarting", environment, service.name, exit_code=service.exit_code, restarts=service.restarts,
                   after_seconds=pause(service.tries))
        self._restarts.schedule(self._nursery, environment, service)

    def _save(self, environment: Environment, service: Service) -> None:
        # While it is being made its row says so, and all of it is undone if the daemon dies; its end writes the rest.
        if environment.state != "creating":
            with self._a.store.transaction():
                self._a.store.set_service(environment.id, service)
        environment.services[service.name] = service
        self.pulse()

    def _note(self, environment: Environment, service: Service) -> bool:
        """Save what happened by itself; where it cannot be written it holds all the same. Returns whether it was."""
        environment.services[service.name] = service
        self.pulse()
        try:
            with self._a.store.transaction():
                self._a.store.set_service(environment.id, service)
        except StoreError as error:
            self._tell("store_failed", environment, service.name, reason=error.message)
            return False
        return True

    def _tell(self, kind: str, environment: Environment, service: str, **details: object) -> None:
        self._emit(kind, seen_by(environment), environment.id, environment.name, service=service, **details)


def seen_by(environment: Environment) -> int:
    """Whose events an environment's are: its owner's, or while it is in stock and nobody knows it, root's."""
    return 0 if environment.stock else environment.uid


def _of_unknown_end(service: Service) -> int | None:
    """The first process of a service, while nobody knows how that ended."""
    return service.pid if service.exit_code is None else None


def group_of(slot: Slot, service: str) -> str:
    """The cgroup of a service, relative to netnsd's root."""
    # A prefix keeps services apart from the group of commands that users run (``exec``).
    return f"{slot.cgroup}/s-{service}"
