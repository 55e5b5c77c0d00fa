"""Keeps what there is as it should be: at the daemon's start, and whenever somebody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from netnsd.core import reconcile
from netnsd.core.addressing import Plan
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Adapters, Emit
from netnsd.core.particulars import Particulars, opening
from netnsd.core.pool import FIRST_SERVICE, messages
from netnsd.core.registry import Registry
from netnsd.core.removal import BATCH, Removal
from netnsd.core.settling import Settling
from netnsd.core.supervisor import Supervisor, group_of
from netnsd.errors import KernelError, NetnsdError


class Caretaker:
    """Compares what should be with what is, and mends it."""

    def __init__(self, adapters: Adapters, plan: Plan, boot_id: str, emit: Emit, *, registry: Registry,
                 supervisor: Supervisor, particulars: Particulars, settling: Settling, removal: Removal) -> None:
        self._a = adapters
        self._plan = plan
        self._boot_id = boot_id
        self._emit = emit
        self._registry = registry
        self._supervisor = supervisor
        self._particulars = particulars
        self._settling = settling
        self._removal = removal

    async def check(self) -> bool:
        """Put the host's rules right, and try again what could not be removed, or lose a name.

        Returns whether rules were wrong.
        """
        was_wrong = await self._a.firewall.check()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._removal.remove_again)
            for environment in self._registry.all():
                if environment.id in self._particulars.untidy:
                    nursery.start_soon(self._tidy, environment)
        return was_wrong

    async def _tidy(self, environment: Environment) -> None:
        async with self._particulars.lock(environment):
            if environment.state == "ready":
                with contextlib.suppress(NetnsdError):  # next time, then
                    await self._a.network.tidy([(environment.slot, environment.netns)])
                    self._particulars.untidy.discard(environment.id)

    async def take_over(self) -> None:
        """Go on with what an earlier run of the daemon made, and remove what it left half-made."""
        desired = self._a.store.environments()
        for environment in desired:
            self._registry.remember(environment)
        try:
            await self._a.network.tidy([(e.slot, e.netns) for e in desired])
        except KernelError as error:
            self._emit("orphan_left", 0, "", "", reason=error.message)
        observed = await self._observe(desired)
        actions = reconcile.plan(desired, observed)
        await self._a.firewall.restore([opening(e) for e, _ in actions.adopt])
        for environment, services in actions.adopt:
            environment.state = "ready"
            if FIRST_SERVICE not in environment.services:  # it may have come from the pool a moment ago
                self._particulars.attended.add(environment.id)
            # Again, as the daemon may have been killed between the answer and that; done twice it changes nothing.
            self._settling.settle(environment)
            self._supervisor.adopt(environment, services, reported=observed.running.keys())
        await self._clear(actions)
        await self._removal.remove_quietly(actions.undo + actions.lost)
        for environment in actions.lost:
            self._particulars.tell("lost", environment, reason="its namespace, name or link is gone")

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
        for first in range(0, len(slots), BATCH):
            await attempt(partial(self._a.network.unwire, slots[first:first + BATCH]))
        for name in actions.orphan_files:
            await attempt(partial(remove_files, name))

    async def _observe(self, desired: list[Environment]) -> reconcile.Observed:
        running, exited = await self._a.processes.known()
        return reconcile.Observed(
            intact=frozenset([e.id for e in desired if e.boot_id == self._boot_id
                              and await self._a.network.intact(e.slot, e.netns)]),
            slots=frozenset(await self._a.network.observe()),
            cgroups=frozenset(self._a.cgroups.observe()),
            files=frozenset(self._a.files.observe()),
            populated=frozenset((e.id, s) for e in desired for s in e.services
                                if self._a.cgroups.populated(group_of(e.slot, s))),
            running={r.launch_id: r.pid for r in running},
            exited={x.launch_id: x.code for x in exited},
        )
