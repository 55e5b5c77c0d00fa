"""The service: makes, finds, starts, stops and removes environments, through the Protocols of ``interfaces``.

Crash-only: a row says what is intended before the kernel is touched, and one idempotent tear-down serves a failed
creation, a removal, and what a killed daemon left. Verbs on one environment take turns; different ones do not wait.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import trio

from netnsd import wire
from netnsd.core import reconcile, specification
from netnsd.core.actor import Actor
from netnsd.core.addressing import Plan
from netnsd.core.allocation import PortAllocator, SlotAllocator
from netnsd.core.batch import Batcher
from netnsd.core.environment import Command, Environment, PublishedPort, Service
from netnsd.core.interfaces import Cgroups, Clock, Files, Firewall, Network, Opening, Processes, Publication, Store
from netnsd.core.supervisor import Supervisor, group_of
from netnsd.errors import KernelError, NameTaken, NetnsdError, NetnsTaken, NotFound, WaitTimeout, WrongState

_UNDO_SECONDS = 30.0
_REMOVAL_BATCH = 256
_USER_IN_NETNS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,62}\Z")
_EXEC_GROUP = "exec"


class Emit(Protocol):
    """Tells what happened; ``uid`` is the environment's owner's."""

    def __call__(self, kind: str, uid: int, environment: str, name: str, **details: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Adapters:
    """What core works with."""

    network: Network
    firewall: Firewall
    processes: Processes
    cgroups: Cgroups
    store: Store
    files: Files
    clock: Clock


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration decides for core. ``published_range`` is inclusive."""

    published_range: tuple[int, int]
    allow_setuid: bool
    boot_id: str


@dataclass(frozen=True, slots=True)
class _Blueprint:
    name: str
    labels: dict[str, str]
    share: str
    ports: list[wire.PortRequest]
    commands: dict[str, Command]


class Environments:
    """All environments of this host. ``run`` must be running while anything else is called."""

    def __init__(self, adapters: Adapters, plan: Plan, settings: Settings, emit: Emit) -> None:
        self._a = adapters
        self._plan = plan
        self._settings = settings
        self._emit = emit
        self._by_id: dict[str, Environment] = {}
        self._by_name: dict[tuple[int, str], Environment] = {}
        self._locks: dict[str, trio.Lock] = {}
        self._furnished: set[str] = set()
        self._slots = SlotAllocator(plan.slots)
        self._ports = PortAllocator(*settings.published_range, adapters.firewall.is_listening)
        self._reaper = Batcher(self._reap, _REMOVAL_BATCH)
        self._supervisor = Supervisor(adapters, emit)
        self._nursery: trio.Nursery | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is there, then work until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._reaper.run)
            await self._nursery.start(self._supervisor.run)
            await self._take_over()
            self._nursery.start_soon(self._supervisor.follow_exits)
            task_status.started()

    async def check(self) -> bool:
        """Put the host's rules right, and try again what could not be removed. Returns whether rules were wrong."""
        for environment in [e for e in self._by_id.values() if e.state == "removing"]:
            if not self._lock(environment.id).statistics().locked:
                await self._remove_quietly(environment)
        return await self._a.firewall.restore([_opening(e) for e in self._by_id.values() if e.state == "ready"])

    async def _take_over(self) -> None:
        desired = self._a.store.environments()
        for environment in desired:
            self._remember(environment)
        actions = reconcile.plan(desired, await self._observe(desired))
        await self._a.firewall.restore([_opening(e) for e, _ in actions.adopt])
        for environment, services in actions.adopt:
            self._furnished.add(environment.id)
            self._supervisor.adopt(environment, services)
        for index in actions.orphan_slots:
            await self._a.network.unwire([(self._plan.slot(index), "")])
        for name in actions.orphan_cgroups:
            await self._a.cgroups.remove(name)
        for name in actions.orphan_files:
            self._a.files.remove(name)
        async with trio.open_nursery() as nursery:
            for environment in actions.undo + actions.lost:
                nursery.start_soon(self._remove_quietly, environment)
        for environment in actions.lost:
            self._tell("lost", environment, reason="its namespace, name or link is gone")

    async def _observe(self, desired: list[Environment]) -> reconcile.Observed:
        running, exited = await self._a.processes.known()
        return reconcile.Observed(
            intact=frozenset([e.id for e in desired if e.boot_id == self._settings.boot_id
                              and await self._a.network.intact(e.slot, e.netns)]),
            slots=frozenset(await self._a.network.observe()),
            cgroups=frozenset(self._a.cgroups.observe()),
            files=frozenset(self._a.files.observe()),
            populated=frozenset((e.id, s) for e in desired for s in e.services
                                if self._a.cgroups.populated(group_of(e, s))),
            running={r.launch_id: r.pid for r in running},
            exited={x.launch_id: x.code for x in exited},
        )

    # -- finding ------------------------------------------------------------------------------------------------

    def find(self, ref: str, actor: Actor) -> Environment:
        """The environment that ``actor`` means: a name of its own, NAME.USER, or an id. Raises NotFound."""
        found = self._by_name.get((actor.uid, ref)) or self._by_id.get(ref)
        if found is None and "." in ref:
            name, _, user = ref.partition(".")
            found = next((e for e in self._by_id.values() if e.name == name and e.user == user), None)
        if found is None or not actor.may_see(found.uid):
            raise NotFound(f"there is no environment {ref[:80]!r}", hint="`netnsctl ls` lists yours.", ref=ref[:80])
        return found

    def list(self, actor: Actor, *, everyones: bool, labels: dict[str, str]) -> list[Environment]:
        """The actor's environments, or all that it may see, that have all of ``labels``; oldest first."""
        return [e for e in self._by_id.values()
                if (actor.may_see(e.uid) if everyones else e.uid == actor.uid)
                and all(e.labels.get(key) == value for key, value in labels.items())]

    @property
    def count(self) -> int:
        """How many environments there are."""
        return len(self._by_id)

    @property
    def published(self) -> int:
        """How many host ports are leased."""
        return self._ports.leased

    @property
    def addresses_free(self) -> int:
        """How many environments more the supernet has room for."""
        return self._slots.free

    # -- making -------------------------------------------------------------------------------------------------

    async def create(self, request: wire.CreateRequest, actor: Actor) -> Environment:
        """Make an environment and start its services. It is whole when this returns, or gone when it raises."""
        blueprint = self._blueprint(request, actor)
        existing = self._by_name.get((actor.uid, blueprint.name))
        if existing is not None and request.replace:
            await self.remove(existing)
        environment = self._reserve(blueprint, actor)
        async with self._lock(environment.id):
            try:
                await self._make(environment)
            except BaseException:
                with trio.move_on_after(_UNDO_SECONDS, shield=True):
                    await self._undo(environment)
                raise
        self._tell("created", environment)
        return environment

    def _blueprint(self, request: wire.CreateRequest, actor: Actor) -> _Blueprint:
        name = f"e{uuid.uuid4().hex[:8]}" if request.name is None else specification.check_name(request.name)
        variables = specification.check_variables(request.env)
        commands = {
            service.name: specification.command(
                argv=service.command, env={**variables, **service.env}, cwd=service.cwd or request.cwd,
                umask=request.umask, limits=request.limits,
                setuid=request.setuid if service.setuid is None else service.setuid,
                actor=actor, allow_setuid=self._settings.allow_setuid)
            for service in specification.check_services(request)
        }
        ports = specification.check_ports(request.ports, self._settings.published_range)
        return _Blueprint(name, specification.check_labels(request.labels), request.share, ports, commands)

    def _reserve(self, blueprint: _Blueprint, actor: Actor) -> Environment:
        """Write the intent. Nothing here awaits, so no two callers can reserve the same thing."""
        if (actor.uid, blueprint.name) in self._by_name:
            raise NameTaken(f"you have an environment {blueprint.name!r} already",
                            hint="Choose another name, remove it, or pass --replace.", name=blueprint.name)
        netns = self._free_netns(blueprint.name, actor)
        environment_id = str(uuid.uuid4())
        slot = self._plan.slot(self._slots.take())
        ports: list[PublishedPort] = []
        try:
            for wanted in blueprint.ports:
                ports.append(self._lease(wanted, environment_id, actor))
            environment = Environment(
                id=environment_id, name=blueprint.name, uid=actor.uid, user=actor.user, slot=slot, netns=netns,
                labels=blueprint.labels, share=blueprint.share, created_at=self._a.clock.now(),
                boot_id=self._settings.boot_id, ports=tuple(ports),
                services={name: Service(name, command) for name, command in blueprint.commands.items()})
            with self._a.store.transaction():
                self._a.store.add(environment)
        except BaseException:
            self._slots.release(slot.index)
            for port in ports:
                self._ports.release(port.protocol, port.published)
            raise
        self._by_id[environment.id] = self._by_name[environment.uid, environment.name] = environment
        return environment

    def _lease(self, wanted: wire.PortRequest, environment_id: str, actor: Actor) -> PublishedPort:
        if wanted.publish is None:
            published = self._ports.take(wanted.protocol, environment_id)
        else:
            published = self._ports.take_number(wanted.protocol, wanted.publish, environment_id,
                                                partial(self._name_for, actor))
        return PublishedPort(wanted.port, wanted.protocol, published)

    def _name_for(self, actor: Actor, environment_id: str) -> str | None:
        holder = self._by_id.get(environment_id)
        return holder.name if holder is not None and actor.may_see(holder.uid) else None

    def _free_netns(self, name: str, actor: Actor) -> str:
        user = actor.user if _USER_IN_NETNS.match(actor.user) else str(actor.uid)
        ours = {e.netns for e in self._by_id.values()}
        for candidate in (name, f"{name}.{user}"):
            if candidate not in ours and not self._a.network.is_taken(candidate):
                return candidate
        raise NetnsTaken(f"namespaces {name!r} and '{name}.{user}' both exist and are not this environment's",
                         hint="Choose another name.", name=name)

    async def _make(self, environment: Environment) -> None:
        await self._a.network.wire(environment.slot, environment.netns)
        await self._a.firewall.open(_opening(environment))
        if environment.services:
            await self._furnish(environment)
            for service in list(environment.services.values()):
                await self._supervisor.start(environment, service)
        self._set_state(environment, "ready")
        if not environment.services:
            assert self._nursery is not None
            self._nursery.start_soon(self._furnish_behind, environment)

    async def _furnish(self, environment: Environment) -> None:
        if environment.id not in self._furnished:
            await self._a.network.furnish(environment.slot, _opening(environment).publications)
            self._furnished.add(environment.id)

    async def _furnish_behind(self, environment: Environment) -> None:
        """Furnish after the answer: nothing runs there yet. A failure shows when something is to run."""
        async with self._lock(environment.id):
            if environment.state == "ready":
                try:
                    await self._furnish(environment)
                except NetnsdError as error:
                    self._tell("furnish_failed", environment, reason=error.message)

    # -- using --------------------------------------------------------------------------------------------------

    async def start(self, environment: Environment) -> None:
        """Start what does not run."""
        async with self._ready(environment):
            await self._furnish(environment)
            for service in list(environment.services.values()):
                await self._supervisor.start(environment, service)

    async def stop(self, environment: Environment, grace_seconds: float) -> None:
        """Ask every server to end (SIGTERM), and end what has not after ``grace_seconds``."""
        async with self._ready(environment):
            await self._supervisor.stop(environment, grace_seconds)

    async def restart(self, environment: Environment, grace_seconds: float) -> None:
        """Stop, then start."""
        async with self._ready(environment):
            await self._supervisor.stop(environment, grace_seconds)
            await self._furnish(environment)
            for service in list(environment.services.values()):
                await self._supervisor.start(environment, service)

    async def attach(self, request: wire.ExecRequest, actor: Actor, connection: int) -> None:
        """Run a command in an environment on descriptors that the peer of ``connection`` (borrowed) will send."""
        environment = self.find(request.ref, actor)
        command = specification.command(
            argv=request.command, env=request.env, cwd=request.cwd, umask=request.umask, limits=request.limits,
            setuid=request.setuid, actor=actor, allow_setuid=self._settings.allow_setuid)
        async with self._ready(environment):
            await self._furnish(environment)
            group = f"{environment.slot.cgroup}/{_EXEC_GROUP}"
            await self._a.cgroups.create(group)
            launch = self._supervisor.launch_of(environment, command, group, uuid.uuid4().hex)
            await self._a.processes.attach(replace(launch, tty=request.tty), connection)

    async def wait(self, environment: Environment, what: str, timeout_seconds: float) -> None:
        """Return when it is ``ready`` (declared ports have listeners), its services ended (``exit``), or ``gone``.

        Raises WaitTimeout, and WrongState where what is waited for cannot come any more.
        """
        waits: dict[str, Callable[[Environment], Awaitable[None]]] = {
            "ready": self._until_ready, "exit": self._until_exit, "gone": self._until_gone}
        with trio.move_on_after(timeout_seconds) as scope:
            await waits[what](environment)
        if scope.cancelled_caught:
            missing = await self._silent_ports(environment) if what == "ready" and environment.id in self._by_id else []
            seen = f": nothing listens on {', '.join(missing)}" if missing else f": it is {environment.shown_state}"
            raise WaitTimeout(f"{environment.name!r} is not {what} after {timeout_seconds:g} s{seen}",
                              hint="`netnsctl logs` shows what its servers said.")

    async def _until_ready(self, environment: Environment) -> None:
        pause = 0.01
        while True:
            self._require(environment)
            for service in environment.services.values():
                if service.state in ("exited", "stopped"):
                    raise WrongState(f"service {service.name!r} of {environment.name!r} {service.state} before it was"
                                     f" ready (exit code {service.exit_code})",
                                     hint="`netnsctl logs` shows what it said.", service=service.name,
                                     exit_code=service.exit_code)
            if not await self._silent_ports(environment):
                return
            await trio.sleep(pause)
            pause = min(pause * 1.5, 0.2)

    async def _silent_ports(self, environment: Environment) -> list[str]:
        if not environment.ports:
            return []
        heard = {(x.protocol, x.port) for x in await self._a.network.listeners(environment.slot)}
        return [f"{p.port}/{p.protocol}" for p in environment.ports if (p.protocol, p.port) not in heard]

    async def _until_exit(self, environment: Environment) -> None:
        while any(s.state in ("starting", "running") for s in environment.services.values()):
            self._require(environment)
            await self._supervisor.changed()

    async def _until_gone(self, environment: Environment) -> None:
        while environment.id in self._by_id:
            await self._supervisor.changed()

    # -- removing -----------------------------------------------------------------------------------------------

    async def remove(self, environment: Environment) -> None:
        """End every process of it and remove all that it had. It is gone when this returns.

        Raises KernelError where something could not be removed; it is tried again later.
        """
        if environment.state == "ready":
            self._set_state(environment, "removing")
        async with self._lock(environment.id):
            if environment.id in self._by_id:
                with trio.CancelScope(shield=True):
                    await self._tear_down(environment)

    async def _undo(self, environment: Environment) -> None:
        try:
            self._set_state(environment, "removing")
            await self._tear_down(environment)
        except NetnsdError as error:
            self._tell("remove_failed", environment, reason=error.message)

    async def _remove_quietly(self, environment: Environment) -> None:
        try:
            await self.remove(environment)
        except NetnsdError as error:
            self._tell("remove_failed", environment, reason=error.message)

    async def _tear_down(self, environment: Environment) -> None:
        failures: list[str] = []
        for step in (partial(self._a.cgroups.remove, environment.slot.cgroup),
                     partial(self._reaper.do, environment)):
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                failures.extend(_messages(error))
        try:
            self._a.files.remove(environment.id)
        except NetnsdError as error:
            failures.append(error.message)
        if failures:
            raise KernelError(f"{environment.name!r} could not be removed whole: {'; '.join(failures)}",
                              hint="It is tried again every minute.", failures=failures)
        with self._a.store.transaction():
            self._a.store.delete(environment.id)
        self._forget(environment)
        self._tell("removed", environment)

    async def _reap(self, environments: list[Environment]) -> None:
        """Remove what the kernel has of many environments at once."""
        errors: list[Exception] = []
        for step in (partial(self._a.firewall.close, [_opening(e) for e in environments]),
                     partial(self._a.network.unwire, [(e.slot, e.netns) for e in environments])):
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("reap", errors)

    # -- small things -------------------------------------------------------------------------------------------

    def _remember(self, environment: Environment) -> None:
        self._by_id[environment.id] = self._by_name[environment.uid, environment.name] = environment
        self._slots.claim(environment.slot.index)
        for port in environment.ports:
            self._ports.restore(port.protocol, port.published, environment.id)

    def _forget(self, environment: Environment) -> None:
        del self._by_id[environment.id]
        del self._by_name[environment.uid, environment.name]
        self._furnished.discard(environment.id)
        self._locks.pop(environment.id, None)
        self._slots.release(environment.slot.index)
        for port in environment.ports:
            self._ports.release(port.protocol, port.published)
        self._supervisor.forget(environment)

    def _set_state(self, environment: Environment, state: Any) -> None:
        with self._a.store.transaction():
            self._a.store.set_state(environment.id, state)
        environment.state = state
        self._supervisor.pulse()

    def _lock(self, environment_id: str) -> trio.Lock:
        return self._locks.setdefault(environment_id, trio.Lock())

    def _require(self, environment: Environment) -> None:
        if environment.id not in self._by_id:
            raise NotFound(f"{environment.name!r} was removed", hint="`netnsctl ls` lists what there is.")
        if environment.state == "removing":
            raise WrongState(f"{environment.name!r} is being removed", hint="Create it again when it is gone.")

    def _ready(self, environment: Environment) -> AbstractAsyncContextManager[None]:
        return _Turn(self._lock(environment.id), partial(self._require, environment))

    def _tell(self, kind: str, environment: Environment, **details: Any) -> None:
        self._emit(kind, environment.uid, environment.id, environment.name, **details)


class _Turn:
    """An environment's lock, with a look at whether the environment is still there once it is held."""

    def __init__(self, lock: trio.Lock, require: Callable[[], None]) -> None:
        self._lock, self._require = lock, require

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            self._require()
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def _opening(environment: Environment) -> Opening:
    return Opening(environment.slot.address, environment.uid,
                   tuple(Publication(p.protocol, p.published, p.port) for p in environment.ports))


def _messages(error: Exception) -> list[str]:
    if isinstance(error, ExceptionGroup):
        return [message for part in error.exceptions for message in _messages(part)]
    return [str(error)]
