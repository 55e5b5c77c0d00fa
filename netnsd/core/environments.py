"""The service: makes, finds, starts, stops and removes environments, through the Protocols of ``interfaces``.

Crash-only: a row says what is intended before the kernel is touched, and one idempotent tear-down serves a failed
creation, a removal, and what a killed daemon left. Verbs on one environment take turns; different ones do not wait.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import msgspec
import trio

from netnsd import wire
from netnsd.core import reconcile, specification
from netnsd.core.actor import Actor
from netnsd.core.addressing import Plan, Slot
from netnsd.core.admission import AT_ONCE, Admission
from netnsd.core.allocation import SlotAllocator
from netnsd.core.batch import Batcher
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Cgroups, Clock, Files, Firewall, Network, Opening, Processes, Publication, Store
from netnsd.core.pool import FIRST_SERVICE, Pool, SlotMaker, SlotSpoilt, messages
from netnsd.core.quiet import Quiet
from netnsd.core.registry import Blueprint, Registry, Settings
from netnsd.core.supervisor import Supervisor, group_of, seen_by
from netnsd.core.waiting import Aim, Waits
from netnsd.errors import KernelError, NetnsdError, StoreError, WrongState

_UNDO_SECONDS = 30.0
# The kernel needs half a millisecond per link, in which nothing else can be wired.
_REMOVAL_BATCH = 64
_REMOVALS_AT_ONCE = 2
_KILL_AGAIN_SECONDS = 0.5
_EXEC_GROUP = "exec"
_MANY_AT_ONCE = 4  # of one request: half of what the host does at once


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


class Environments:
    """All environments of this host. ``run`` must be running while anything else is called."""

    def __init__(self, adapters: Adapters, plan: Plan, settings: Settings, emit: Emit) -> None:
        self._a = adapters
        self._plan = plan
        self.settings = settings
        self._emit = emit
        self._locks: dict[str, trio.Lock] = {}
        self._furnished: set[str] = set()
        self._untidy: set[str] = set()  # have a name in /run/netns beside their own
        self._attended: set[str] = set()
        self._removals: dict[str, trio.Event] = {}
        self._unsettled: deque[Environment] = deque()
        self._has_unsettled = trio.Event()
        self._quiet = Quiet()
        self._reaper: Batcher[_Doomed] = Batcher(self._reap, _REMOVAL_BATCH, workers=_REMOVALS_AT_ONCE)
        self._supervisor = Supervisor(adapters, emit, settings.hard_limits)
        self._slots = SlotAllocator(plan.slots)
        self.registry = Registry(settings, adapters.store, adapters.clock, self._slots,
                                 is_listening=adapters.firewall.is_listening, is_taken=adapters.network.is_taken)
        self.pool = Pool(SlotMaker(adapters), self._slots, plan, settings.pool, self._quiet,
                         tell=lambda reason: emit("pool_stuck", 0, "", "", reason=reason))
        self.admission = Admission(AT_ONCE, settings.creations_waiting)
        self._waits = Waits(adapters.network, self.registry.__contains__, self._supervisor.changed)
        self._nursery: trio.Nursery | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is there, then work until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._reaper.run)
            await self._nursery.start(self._supervisor.run)
            await self._take_over()
            self._nursery.start_soon(self._supervisor.follow_exits)
            self._nursery.start_soon(self._settle_all)
            self._nursery.start_soon(self.pool.run)
            task_status.started()

    async def check(self) -> bool:
        """Put the host's rules right, and try again what could not be removed, or lose a name.

        Returns whether rules were wrong.
        """
        was_wrong = await self._a.firewall.check()
        async with trio.open_nursery() as nursery:
            for environment in self.registry.all():
                if environment.state == "removing" and environment.id not in self._removals:
                    nursery.start_soon(self._remove_quietly, environment)
                elif environment.id in self._untidy:
                    nursery.start_soon(self._tidy, environment)
        return was_wrong

    async def _tidy(self, environment: Environment) -> None:
        async with self._lock(environment.id):
            if environment.state == "ready":
                with contextlib.suppress(NetnsdError):  # next time, then
                    await self._a.network.tidy([(environment.slot, environment.netns)])
                    self._untidy.discard(environment.id)

    async def _take_over(self) -> None:
        desired = self._a.store.environments()
        for environment in desired:
            self.registry.remember(environment)
        try:
            await self._a.network.tidy([(e.slot, e.netns) for e in desired])
        except KernelError as error:
            self._emit("orphan_left", 0, "", "", reason=error.message)
        observed = await self._observe(desired)
        actions = reconcile.plan(desired, observed)
        await self._a.firewall.restore([_opening(e) for e, _ in actions.adopt])
        for environment, services in actions.adopt:
            environment.state = "ready"
            if FIRST_SERVICE not in environment.services:  # it may have come from the pool a moment ago
                self._attended.add(environment.id)
            # Again, as the daemon may have been killed between the answer and that; done twice it changes nothing.
            self._settle(environment)
            self._supervisor.adopt(environment, services, reported=observed.running.keys())
        await self._clear(actions)
        self._mark_removing(actions.undo + actions.lost)
        async with trio.open_nursery() as nursery:
            for environment in actions.undo + actions.lost:
                nursery.start_soon(self._remove_quietly, environment)
        for environment in actions.lost:
            self._tell("lost", environment, reason="its namespace, name or link is gone")

    async def _clear(self, actions: reconcile.Actions) -> None:
        """Remove what belongs to no environment. What cannot be removed does not keep the others waiting."""
        async def remove_files(name: str) -> None:
            self._a.files.remove(name)

        async def attempt(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                self._emit("orphan_left", 0, "", "", reason="; ".join(messages(error)))

        # Of a larger supernet there may be slots that this one has not.
        slots = [(self._plan.slot(index), "") for index in actions.orphan_slots if index < self._plan.slots]
        async with trio.open_nursery() as nursery:
            for name in actions.orphan_cgroups:
                nursery.start_soon(attempt, partial(self._a.cgroups.remove, name))
        for first in range(0, len(slots), _REMOVAL_BATCH):
            await attempt(partial(self._a.network.unwire, slots[first:first + _REMOVAL_BATCH]))
        for name in actions.orphan_files:
            await attempt(partial(remove_files, name))

    async def _observe(self, desired: list[Environment]) -> reconcile.Observed:
        running, exited = await self._a.processes.known()
        return reconcile.Observed(
            intact=frozenset([e.id for e in desired if e.boot_id == self.settings.boot_id
                              and await self._a.network.intact(e.slot, e.netns)]),
            slots=frozenset(await self._a.network.observe()),
            cgroups=frozenset(self._a.cgroups.observe()),
            files=frozenset(self._a.files.observe()),
            populated=frozenset((e.id, s) for e in desired for s in e.services
                                if self._a.cgroups.populated(group_of(e.slot, s))),
            running={r.launch_id: r.pid for r in running},
            exited={x.launch_id: x.code for x in exited},
        )

    # -- making -------------------------------------------------------------------------------------------------

    async def create(self, request: wire.CreateRequest, actor: Actor) -> Environment:
        """Make an environment and start its services. It is whole when this returns, or gone when it raises.

        Raises Overloaded where too many creations of the actor's wait already.
        """
        with self._quiet.disturbed():
            async with self.admission.turn(actor.uid) as give_back:
                return await self._create(request, actor, give_back)

    async def create_many(
        self, request: wire.CreateRequest, actor: Actor,
        create: Callable[[wire.CreateRequest, Actor], Awaitable[Environment]],
    ) -> list[Environment]:
        """Make ``count`` environments by ``create``, or none where one cannot be made. Others take turns with these."""
        numbers = iter(specification.check_count(request.count))
        made: list[Environment] = []
        failures: list[NetnsdError] = []

        async def work(scope: trio.CancelScope) -> None:
            for number in numbers:
                name = None if request.name is None else f"{request.name}-{number}"
                one = msgspec.structs.replace(request, name=name, count=None)
                try:
                    made.append(await create(one, actor))
                except NetnsdError as error:
                    failures.append(error)
                    scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(_MANY_AT_ONCE):
                    nursery.start_soon(work, nursery.cancel_scope)
            await trio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            await self._remove_all(made)
            raise
        if failures:
            await self._remove_all(made)
            raise failures[0]
        return sorted(made, key=lambda e: (len(e.name), e.name))

    async def _remove_all(self, environments: list[Environment]) -> None:
        with trio.CancelScope(shield=True):
            self._mark_removing(environments)
            async with trio.open_nursery() as nursery:
                for environment in environments:
                    nursery.start_soon(self._remove_quietly, environment)

    async def _create(self, request: wire.CreateRequest, actor: Actor, wired: Callable[[], None]) -> Environment:
        blueprint = Blueprint.of(request, actor, self.settings)
        await self.make_way(request, actor)
        slot = self.pool.take()
        if slot is not None:
            try:
                return await self._make(blueprint, actor, slot, wired, is_warm=True)
            except SlotSpoilt as error:
                self._emit("slot_spoilt", 0, "", "", slot=slot.index, reason=str(error))
        return await self._make(blueprint, actor, self._plan.slot(self._slots.take()), wired, is_warm=False)

    async def make_way(self, request: wire.CreateRequest, actor: Actor) -> None:
        """Remove the actor's environment of that name, where the request says so."""
        existing = self.registry.own(actor, request.name or "")
        if existing is not None and request.replace:
            await self.remove(existing)

    # -- of templates: made before demand, and handed over ---------------------------------------------------------

    async def stock(self, request: wire.CreateRequest, actor: Actor, template: str) -> Environment:
        """Make an environment that nobody sees until it is handed over. ``template``: the id that it is kept for."""
        blueprint = replace(Blueprint.of(request, actor, self.settings), stock=template)
        async with self.admission.turn(actor.uid) as give_back:
            return await self._make(blueprint, actor, self._plan.slot(self._slots.take()), give_back, is_warm=False)

    async def hand_over(self, environment: Environment, name: str, labels: dict[str, str]) -> Environment:
        """Give an environment of the stock its name and labels: its owner has it then, as if just created.

        Its id, address and ports stay, and what its servers know of themselves. Raises NameTaken and NetnsTaken, and
        it stays in stock; WrongState, NotFound and KernelError where it is no good.
        """
        with self._quiet.disturbed():
            async with self._ready(environment):
                old, new = environment.netns, self.registry.free_netns(name, environment.uid, environment.user)
                try:
                    await self._a.network.claim(environment.slot, new)
                    self._waits.require(environment)  # it may have been removed meanwhile
                    self.registry.hand_over(environment, name, new, labels)
                except BaseException:
                    await self._unname(environment, new)
                    raise
                await self._unname(environment, old)
                self.registry.free(old)
                try:
                    self._a.files.furnish(environment)
                except NetnsdError as error:  # it is done again when something is started there
                    self._tell("furnish_failed", environment, reason=error.message)
        self._supervisor.pulse()
        self._tell("created", environment)
        return environment

    async def _unname(self, environment: Environment, netns: str) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._a.network.unname(environment.slot, netns)
        except NetnsdError as error:  # a check takes it back, or the environment's end, or the next start
            self._untidy.add(environment.id)
            self._tell("furnish_failed", environment, reason=error.message)

    async def _make(self, blueprint: Blueprint, actor: Actor, slot: Slot, wired: Callable[[], None], *,
                    is_warm: bool) -> Environment:
        """``wired`` is called when the kernel's part is done, and only servers are to be started."""
        try:
            environment = self.registry.reserve(blueprint, actor, slot)
        except BaseException:
            if is_warm:
                self.pool.put_back(slot)
            else:
                self._slots.release(slot.index)
            raise
        lock = self._lock(environment.id)
        lock.acquire_nowait()  # nobody knows it yet; a wait here that is cancelled would leave the row
        try:
            made = self._claim(environment) if is_warm else self._a.network.wire(slot, environment.netns)
            try:
                await self._a.firewall.open(_opening(environment))  # while the namespace is made
            finally:
                await made
            if environment.services:
                await self._furnish(environment)
                wired()  # a server may take as long to start as its user likes: others do not wait for that
                for service in list(environment.services.values()):
                    await self._supervisor.start(environment, service)
            self._waits.require(environment)  # it may have been removed meanwhile
            if environment.services:
                self._write_ready([environment])
            environment.state = "ready"
            self._supervisor.pulse()
        except BaseException as error:
            was_removed = environment.state == "removing"
            with trio.move_on_after(_UNDO_SECONDS, shield=True):
                await self._undo(environment)
            if was_removed and isinstance(error, NetnsdError):  # what failed did so for that
                raise WrongState(f"{environment.name!r} was removed while it was made",
                                 hint="Create it again.") from error
            raise
        finally:
            lock.release()
        self._tell("created", environment)
        if not environment.services or environment.id in self._attended:
            self._settle(environment)
        return environment

    async def _claim(self, environment: Environment) -> None:
        try:
            await self._a.network.claim(environment.slot, environment.netns)
        except KernelError as error:
            raise SlotSpoilt(error.message) from error
        if not environment.ports:
            self._furnished.add(environment.id)
        if FIRST_SERVICE not in environment.services:
            self._attended.add(environment.id)

    async def _furnish(self, environment: Environment) -> None:
        if environment.id not in self._furnished:
            await self._a.network.furnish(environment.slot, _opening(environment).publications)
            self._furnished.add(environment.id)

    def _settle(self, environment: Environment) -> None:
        """What an environment without a server needs later than its creator: it is done behind the answer.

        Its row says "creating" till then. Should the daemon be killed, the next one finds that all of it is there.
        """
        self._unsettled.append(environment)
        self._has_unsettled.set()

    async def _settle_all(self) -> None:
        while True:
            await self._has_unsettled.wait()
            self._has_unsettled = trio.Event()
            await self._quiet.wait()
            try:
                self._write_ready([e for e in self._unsettled if e in self.registry and e.state == "ready"])
            except StoreError as error:
                self._emit("store_failed", 0, "", "", reason=error.message)
            while self._unsettled:
                environment = self._unsettled.popleft()
                await self._furnish_behind(environment)
                await self._dismiss(environment)

    async def _furnish_behind(self, environment: Environment) -> None:
        """Furnish though nothing runs there yet. A failure shows when something is to run."""
        await self._quiet.wait()
        if environment not in self.registry or environment.id in self._furnished:
            return
        async with self._lock(environment.id):
            if environment.state == "ready":
                try:
                    await self._furnish(environment)
                except NetnsdError as error:
                    self._tell("furnish_failed", environment, reason=error.message)

    async def _dismiss(self, environment: Environment) -> None:
        """End the process that waits to become a service which this environment does not have."""
        if environment.id not in self._attended:
            return
        await self._quiet.wait()
        self._attended.discard(environment.id)
        if environment in self.registry:
            try:
                await self._a.cgroups.remove(group_of(environment.slot, FIRST_SERVICE))
            except NetnsdError as error:  # it goes with the environment
                self._tell("furnish_failed", environment, reason=error.message)

    def _write_ready(self, environments: list[Environment]) -> None:
        with self._a.store.transaction():
            for environment in environments:
                for service in environment.services.values():
                    self._a.store.set_service(environment.id, service)
                self._a.store.set_state(environment.id, "ready")

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

    async def attach(self, request: wire.ExecRequest, actor: Actor, connection: int) -> int:
        """Run a command in an environment on descriptors that the peer of ``connection`` (borrowed) will send.

        Returns a descriptor that can be read from when the session has ended. The caller closes it.
        """
        environment = self.registry.find(request.ref, actor)
        command = specification.command(
            argv=request.command, env=request.env, cwd=request.cwd, umask=request.umask, limits=request.limits,
            setuid=request.setuid, actor=actor, allow_setuid=self.settings.allow_setuid)
        async with self._ready(environment):
            await self._furnish(environment)
            group = f"{environment.slot.cgroup}/{_EXEC_GROUP}"
            await self._a.cgroups.create(group)
            launch = self._supervisor.launch_of(environment, command, group, uuid.uuid4().hex)
            return await self._a.processes.attach(replace(launch, tty=request.tty), connection)

    async def changed(self) -> None:
        """Return at the next change of any environment or service."""
        await self._supervisor.changed()

    def pulse(self) -> None:
        """Wake who waits for a change."""
        self._supervisor.pulse()

    async def wait(self, environment: Environment, aim: Aim, timeout_seconds: float) -> None:
        """See ``waiting.Waits``."""
        await self._waits.wait(environment, aim, timeout_seconds)

    # -- removing -----------------------------------------------------------------------------------------------

    async def remove(self, environment: Environment) -> None:
        """End every process of it and remove all that it had. It is gone when this returns.

        Raises KernelError where something could not be removed; it is tried again later.
        """
        self._mark_removing([environment])
        await self._remove(environment)

    async def remove_many(self, environments: Sequence[Environment]) -> dict[str, NetnsdError]:
        """Remove many; returns what went wrong, by id."""
        failures: dict[str, NetnsdError] = {}

        async def remove(environment: Environment) -> None:
            try:
                await self._remove(environment)
            except NetnsdError as error:
                failures[environment.id] = error

        self._mark_removing(environments)
        async with trio.open_nursery() as nursery:
            for environment in environments:
                nursery.start_soon(remove, environment)
        return failures

    def remove_behind(self, *environments: Environment) -> None:
        """Begin to remove them, and return at once. What fails is tried again later."""
        self._mark_removing(environments)
        assert self._nursery is not None
        for environment in environments:
            if environment.id not in self._removals:
                self._nursery.start_soon(self._remove_quietly, environment)

    async def _remove(self, environment: Environment) -> None:
        under_way = self._removals.get(environment.id)
        if under_way is not None:
            await under_way.wait()
            if environment in self.registry:
                raise KernelError(f"{environment.name!r} could not be removed whole",
                                  hint="It is tried again every minute.")
        if environment not in self.registry:
            return
        ended = self._removals[environment.id] = trio.Event()
        lock = self._lock(environment.id)
        try:
            with trio.CancelScope(shield=True):
                await self._wrest(environment, lock)
                try:
                    if environment in self.registry:
                        await self._tear_down(environment)
                finally:
                    lock.release()
        finally:
            del self._removals[environment.id]
            ended.set()

    async def _wrest(self, environment: Environment, lock: trio.Lock) -> None:
        """Take the lock from who waits for servers to start or to end: kill them, again while new ones come."""
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            pass
        else:
            return
        while True:
            with contextlib.suppress(NetnsdError):  # told when it is torn down
                await self._a.cgroups.remove(environment.slot.cgroup)
            with trio.move_on_after(_KILL_AGAIN_SECONDS) as waited:
                await lock.acquire()
            if not waited.cancelled_caught:
                return

    async def _undo(self, environment: Environment) -> None:
        self._mark_removing([environment])
        try:
            await self._tear_down(environment)
        except NetnsdError as error:
            self._tell("remove_failed", environment, reason=error.message)

    async def _remove_quietly(self, environment: Environment) -> None:
        try:
            await self._remove(environment)
        except NetnsdError as error:
            self._tell("remove_failed", environment, reason=error.message)

    async def _tear_down(self, environment: Environment) -> None:
        failures: list[str] = []
        try:
            await self._a.cgroups.remove(environment.slot.cgroup)
        except NetnsdError as error:
            failures.append(error.message)
        try:
            self._a.files.remove(environment.id)
        except NetnsdError as error:
            failures.append(error.message)
        doomed = _Doomed(environment, is_last=not failures)
        try:
            try:
                await self._reaper.do(doomed)
            except ExceptionGroup:  # another's of the same batch, perhaps
                await self._reap([doomed])
        except (NetnsdError, ExceptionGroup) as error:
            failures.extend(messages(error))
        if failures:
            raise KernelError(f"{environment.name!r} could not be removed whole: {'; '.join(failures)}",
                              hint="It is tried again every minute.", failures=failures)
        self._furnished.discard(environment.id)
        self._untidy.discard(environment.id)
        self._attended.discard(environment.id)
        self._locks.pop(environment.id, None)
        self._supervisor.forget(environment)
        self._tell("removed", environment)

    async def _reap(self, doomed: list[_Doomed]) -> None:
        """Remove what the kernel has of many environments at once, and forget those of which that was the last."""
        environments = [one.environment for one in doomed]
        errors: list[Exception] = []
        untidy = [(e.slot, e.netns) for e in environments if e.id in self._untidy]
        for step in (partial(self._a.firewall.close, [_opening(e) for e in environments]),
                     *([partial(self._a.network.tidy, untidy)] if untidy else ()),
                     partial(self._a.network.unwire, [(e.slot, e.netns) for e in environments])):
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("reap", errors)
        self.registry.release([one.environment for one in doomed if one.is_last])

    # -- small things -------------------------------------------------------------------------------------------

    def _mark_removing(self, environments: Sequence[Environment]) -> None:
        """Say that they go. Where even that cannot be written they go all the same, and it is tried again."""
        environments = [environment for environment in environments if environment.state != "removing"]
        for environment in environments:
            environment.state = "removing"
        try:
            with self._a.store.transaction():
                for environment in environments:
                    self._a.store.set_state(environment.id, "removing")
        except StoreError as error:
            for environment in environments:
                self._tell("store_failed", environment, reason=error.message)
        self._supervisor.pulse()

    def _lock(self, environment_id: str) -> trio.Lock:
        return self._locks.setdefault(environment_id, trio.Lock())

    def _ready(self, environment: Environment) -> AbstractAsyncContextManager[None]:
        return _Turn(self._lock(environment.id), partial(self._waits.require, environment))

    def _tell(self, kind: str, environment: Environment, **details: Any) -> None:
        self._emit(kind, seen_by(environment), environment.id, environment.name, **details)


@dataclass(frozen=True, slots=True)
class _Doomed:
    """An environment to reap. ``is_last``: nothing of it is left anywhere else."""

    environment: Environment
    is_last: bool


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
