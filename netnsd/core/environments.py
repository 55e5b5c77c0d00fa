"""The service: makes, finds, starts, stops and removes environments, through the Protocols of ``interfaces``.

Crash-only: a row says what is intended before the kernel is touched, and one idempotent tear-down serves a failed
creation, a removal, and what a killed daemon left. Verbs on one environment take turns; different ones do not wait.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial

import msgspec
import trio

from netnsd import wire
from netnsd.core import specification
from netnsd.core.actor import Account, Actor, Members
from netnsd.core.addressing import Plan, Slot
from netnsd.core.admission import AT_ONCE, Admission
from netnsd.core.allocation import SlotAllocator
from netnsd.core.caretaker import Caretaker
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Adapters, Emit
from netnsd.core.once import Once
from netnsd.core.particulars import Particulars, opening
from netnsd.core.policing import Policing
from netnsd.core.pool import FIRST_SERVICE, Pool, SlotMaker, SlotSpoilt
from netnsd.core.quiet import Quiet
from netnsd.core.registry import Blueprint, Registry, Settings
from netnsd.core.removal import Removal
from netnsd.core.settling import Settling
from netnsd.core.sharing import Sharing
from netnsd.core.supervisor import Supervisor
from netnsd.core.takeover import Takeover
from netnsd.core.waiting import Aim, Waits
from netnsd.errors import KernelError, NetnsdError, WrongState

_UNDO_SECONDS = 30.0
_EXEC_GROUP = "exec"
_MANY_AT_ONCE = 4  # of one request: half of what the host does at once


class Environments:
    """All environments of this host. ``run`` must be running while anything else is called."""

    def __init__(self, adapters: Adapters, plan: Plan, settings: Settings, emit: Emit, *,
                 account: Account, members: Members) -> None:
        self._a = adapters
        self._plan = plan
        self.settings = settings
        self._emit = emit
        self._quiet = Quiet()
        self._slots = SlotAllocator(plan.slots)
        self._particulars = Particulars(emit)
        self.registry = Registry(settings, adapters.store, adapters.clock, self._slots,
                                 is_listening=adapters.firewall.is_listening, is_taken=adapters.network.is_taken)
        self._sharing = Sharing(adapters.firewall, self.registry, self._particulars, members)
        self.once = Once(self.registry)
        self._settling = Settling(adapters, self.registry, self._particulars, self._quiet)
        self.policing = Policing(adapters, self.registry, plan.supernet, emit)
        self._supervisor = Supervisor(adapters, emit, settings.hard_limits, turn=self._ready,
                                      furnish=self._settling.furnish, account=account)
        self.pool = Pool(SlotMaker(adapters), self._slots, plan, settings.pool, self._quiet,
                         tell=lambda reason: emit("pool_stuck", 0, "", "", reason=reason))
        self.admission = Admission(AT_ONCE, settings.creations_waiting)
        self._waits = Waits(adapters.network, self.registry.__contains__, self._supervisor.changed)
        self._removal = Removal(adapters, self.registry, self._supervisor, self._particulars, self.policing)
        self.caretaker = Caretaker(adapters, plan, self._slots, emit, registry=self.registry,
                                   particulars=self._particulars, settling=self._settling, removal=self._removal,
                                   pool=self.pool)
        self._takeover = Takeover(
            adapters, settings.boot_id, emit, account, registry=self.registry, supervisor=self._supervisor,
            particulars=self._particulars, settling=self._settling, removal=self._removal, caretaker=self.caretaker,
            sharing=self._sharing, policing=self.policing)

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is there, then work until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.policing.run)
            await nursery.start(self._removal.run)
            await nursery.start(self._supervisor.run)
            await self._takeover.run()
            nursery.start_soon(self._supervisor.follow_exits)
            nursery.start_soon(self._settling.run)
            nursery.start_soon(self.pool.run)
            task_status.started()

    # -- making -------------------------------------------------------------------------------------------------

    async def create(self, request: wire.CreateRequest, actor: Actor, mark: str = "") -> Environment:
        """Make an environment and start its services. It is whole when this returns, or gone when it raises.

        ``mark``: of the request (``once.Mark``), to be kept with it.
        Raises Overloaded where too many creations of the actor's wait already.
        """
        with self._quiet.disturbed():
            async with self.admission.turn(actor.uid) as give_back:
                return await self._create(request, actor, mark, give_back)

    async def create_many(
        self, request: wire.CreateRequest, actor: Actor,
        create: Callable[[wire.CreateRequest, Actor], Awaitable[Environment]], there: Sequence[Environment] = (),
    ) -> list[Environment]:
        """Make ``count`` environments by ``create``, or none where one cannot be made. Others take turns with these.

        Those that are ``there`` already are some of them. Returns all.
        """
        names = {environment.name for environment in there}
        numbers = [number for number in specification.check_count(request.count)
                   if (number > len(there) if request.name is None else f"{request.name}-{number}" not in names)]
        if request.template is None and not request.replace:  # nothing is made in vain
            resources = specification.check_resources(request.resources, self.settings.resources)
            self.registry.quotas.require(actor.uid, resources, len(request.ports), len(numbers))
        numbers_left = iter(numbers)
        made: list[Environment] = []
        failures: list[NetnsdError] = []

        async def work(scope: trio.CancelScope) -> None:
            for number in numbers_left:
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
            await self._undo_all(made)
            raise
        if failures:
            await self._undo_all(made)
            raise failures[0]
        return sorted([*there, *made], key=lambda e: (len(e.name), e.name))

    async def _undo_all(self, environments: list[Environment]) -> None:
        with trio.CancelScope(shield=True):
            await self._removal.remove_quietly(environments)

    async def _create(self, request: wire.CreateRequest, actor: Actor, mark: str,
                      wired: Callable[[], None]) -> Environment:
        blueprint = replace(await self._blueprint(request, actor), request=mark)
        existing = self.registry.own(actor, blueprint.name) if request.replace else None
        if existing is not None:  # it stays where nothing could come in its place
            self.registry.quotas.require(actor.uid, blueprint.resources, len(blueprint.ports), instead_of=existing)
            self.registry.require_guests(actor.uid, blueprint.guests, existing)
        await self.make_way(request, actor)
        slot = self.pool.take()
        if slot is not None:
            try:
                return await self._make(blueprint, actor, slot, wired, is_warm=True)
            except SlotSpoilt as error:
                self._emit("slot_spoilt", 0, "", "", slot=slot.index, reason=str(error))
        return await self._make(blueprint, actor, self._plan.slot(self._slots.take()), wired, is_warm=False)

    async def _blueprint(self, request: wire.CreateRequest, actor: Actor) -> Blueprint:
        blueprint = Blueprint.of(request, actor, self.settings)
        if specification.named_guests(blueprint.share):
            blueprint = replace(blueprint, guests=await self._sharing.guests(blueprint.share))
        return blueprint

    async def make_way(self, request: wire.CreateRequest, actor: Actor) -> None:
        """Remove the actor's environment of that name, where the request says so."""
        existing = self.registry.own(actor, request.name or "")
        if existing is not None and request.replace:
            await self._removal.remove(existing)

    # -- of templates: made before demand, and handed over ---------------------------------------------------------

    async def stock(self, request: wire.CreateRequest, actor: Actor, template: str) -> Environment:
        """Make an environment that nobody sees until it is handed over. ``template``: the id that it is kept for."""
        blueprint = replace(await self._blueprint(request, actor), stock=template)
        async with self.admission.turn(actor.uid) as give_back:
            return await self._make(blueprint, actor, self._plan.slot(self._slots.take()), give_back, is_warm=False)

    async def hand_over(self, environment: Environment, name: str, labels: dict[str, str],
                        mark: str = "") -> Environment:
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
                    was_concerned = self.policing.concerns(environment)
                    self.registry.hand_over(environment, name, new, labels, mark)
                except BaseException:
                    await self._unname(environment, new)
                    raise
                await self._unname(environment, old)
                self.registry.free(old)
                try:
                    self._a.files.furnish(environment)
                except NetnsdError as error:  # it is done again when something is started there
                    self._particulars.tell("furnish_failed", environment, reason=error.message)
            if was_concerned or self.policing.concerns(environment):
                await self._judge_anew(environment)
        self._supervisor.pulse()
        self._particulars.tell("created", environment)
        return environment

    async def _judge_anew(self, environment: Environment) -> None:
        """Its labels are others now. Where that cannot be judged, it goes."""
        try:
            await self.policing.follow(environment)
        except BaseException:
            await self._undo_all([environment])
            raise

    async def _unname(self, environment: Environment, netns: str) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._a.network.unname(environment.slot, netns)
        except NetnsdError as error:  # a check takes it back, or the environment's end, or the next start
            self._particulars.untidy.add(environment.id)
            self._particulars.tell("furnish_failed", environment, reason=error.message)

    async def _make(self, blueprint: Blueprint, actor: Actor, slot: Slot, wired: Callable[[], None], *,
                    is_warm: bool) -> Environment:
        """``wired`` is called when the kernel's part is done, and only servers are to be started."""
        try:
            self._a.cgroups.require(blueprint.resources)
            environment = self.registry.reserve(blueprint, actor, slot)
        except BaseException:
            if is_warm:
                self.pool.put_back(slot)
            else:
                self._slots.release(slot.index)
            raise
        is_concerned = self.policing.expect(environment)
        lock = self._particulars.lock(environment)
        lock.acquire_nowait()  # nobody knows it yet; a wait here that is cancelled would leave the row
        try:
            made = self._claim(environment) if is_warm else self._a.network.wire(slot, environment.netns)
            try:
                await self._a.firewall.open(opening(environment))  # while the namespace is made
                if is_concerned:
                    await self.policing.admit(environment)
            finally:
                await made
            if environment.services or environment.resources.bandwidth is not None:
                await self._settling.furnish(environment)
            if environment.services:
                wired()  # a server may take as long to start as its user likes: others do not wait for that
                for service in list(environment.services.values()):
                    await self._supervisor.start(environment, service)
            self._waits.require(environment)  # it may have been removed meanwhile
            if environment.services:
                self._settling.write_ready([environment])
            environment.state = "ready"
            self._supervisor.pulse()
        except BaseException as error:
            was_removed = environment.state == "removing"
            with trio.move_on_after(_UNDO_SECONDS, shield=True):
                await self._removal.undo(environment)
            if was_removed and isinstance(error, NetnsdError):  # what failed did so for that
                raise WrongState(f"{environment.name!r} was removed while it was made",
                                 hint="Create it again.") from error
            raise
        finally:
            lock.release()
        self._particulars.tell("created", environment)
        if not environment.services or environment.id in self._particulars.attended:
            self._settling.settle(environment)
        return environment

    async def _claim(self, environment: Environment) -> None:
        try:
            await self._a.network.claim(environment.slot, environment.netns)
        except KernelError as error:
            raise SlotSpoilt(error.message) from error
        if not environment.ports and environment.resources.bandwidth is None:
            self._particulars.furnished.add(environment.id)
        if FIRST_SERVICE not in environment.services:
            self._particulars.attended.add(environment.id)

    # -- using --------------------------------------------------------------------------------------------------

    async def start(self, environment: Environment) -> None:
        """Start what does not run."""
        async with self._ready(environment):
            await self._settling.furnish(environment)
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
            await self._settling.furnish(environment)
            for service in list(environment.services.values()):
                await self._supervisor.start(environment, service)

    async def change(self, environment: Environment, request: wire.ChangeRequest) -> None:
        """Change what may be changed while it runs. Shares act on the next connection, and end those of who is out.

        Raises InvalidRequest, InvalidLabel, StoreError and KernelError, with nothing changed.
        """
        share = specification.check_share(environment.share if request.share is None else request.share)
        egress = specification.check_egress(environment.egress if request.egress is None else request.egress)
        specification.check_labels({name: value or "" for name, value in request.labels.items()})  # those to go, too
        guests = environment.guests if request.share is None else await self._sharing.guests(share)
        async with self._ready(environment):
            self.registry.require_guests(environment.uid, guests, environment)
            before = replace(environment)
            labels = specification.check_labels(specification.merged(environment.labels, request.labels))
            self.registry.change(environment, labels=labels, share=share, egress=egress, guests=guests)
            try:
                await self._enforce(environment, before)
            except BaseException:
                self.registry.change(environment, labels=before.labels, share=before.share, egress=before.egress,
                                     guests=before.guests)
                with trio.move_on_after(_UNDO_SECONDS, shield=True):
                    for step in (partial(self._a.firewall.alter, opening(environment)),
                                 partial(self.policing.follow, environment)):
                        with contextlib.suppress(NetnsdError):
                            await step()
                raise
        self._particulars.tell("changed", environment, share=share, egress=egress)

    async def _enforce(self, environment: Environment, before: Environment) -> None:
        """Have the firewall let what is let now: nobody from outside is let in before policies have their say."""
        steps: list[Callable[[], Awaitable[None]]] = [partial(self._a.firewall.alter, opening(environment))]
        if environment.egress != before.egress or self.policing.concerns(before) or (
                self.policing.concerns(environment)):
            steps.insert(0 if environment.share == "lan" else 1, partial(self.policing.follow, environment))
        for step in steps:
            await step()

    async def attach(self, environment: Environment, request: wire.ExecRequest, actor: Actor, connection: int) -> int:
        """Run a command in an environment on descriptors that the peer of ``connection`` (borrowed) will send.

        Returns a descriptor that can be read from when the session has ended. The caller closes it.
        """
        command = specification.command(
            argv=request.command, env=request.env, cwd=request.cwd, umask=request.umask, limits=request.limits,
            setuid=request.setuid, actor=actor, allow_setuid=self.settings.allow_setuid)
        async with self._ready(environment):
            await self._settling.furnish(environment)
            group = f"{environment.slot.cgroup}/{_EXEC_GROUP}"
            await self._a.cgroups.create(group)
            launch = self._supervisor.launching.launch_of(environment, command, group, uuid.uuid4().hex)
            return await self._a.processes.attach(replace(launch, tty=request.tty), connection)

    @property
    def restarts(self) -> int:
        """How often a service was started again, or was to be, since the daemon's start."""
        return self._supervisor.restarts

    async def changed(self) -> None:
        """Return at the next change of any environment or service."""
        await self._supervisor.changed()

    def pulse(self) -> None:
        """Wake who waits for a change."""
        self._supervisor.pulse()

    async def wait(self, environment: Environment, aim: Aim, timeout_seconds: float) -> None:
        """See ``waiting.Waits``."""
        await self._waits.wait(environment, aim, timeout_seconds)

    def _ready(self, environment: Environment) -> AbstractAsyncContextManager[None]:
        return self._particulars.turn(environment, self._waits.require)

    # -- removing and mending -----------------------------------------------------------------------------------

    async def remove(self, environment: Environment) -> None:
        """See ``removal.Removal``."""
        await self._removal.remove(environment)

    async def remove_many(self, environments: Sequence[Environment]) -> dict[str, NetnsdError]:
        """See ``removal.Removal``."""
        return await self._removal.remove_many(environments)

    def remove_behind(self, *environments: Environment) -> None:
        """See ``removal.Removal``."""
        self._removal.remove_behind(*environments)

    async def check(self) -> bool:
        """See ``caretaker.Caretaker`` and ``sharing.Sharing``."""
        try:
            return await self.caretaker.check()
        finally:  # it asks the name service, for which what is broken must not wait
            await self._sharing.follow()
