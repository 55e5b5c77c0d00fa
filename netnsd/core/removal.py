"""Removing environments: one idempotent tear-down, for a failed creation, a removal, and what a killed daemon left.

What goes on in one environment is ended first; what the kernel has of many then goes together, behind each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from netnsd.core.batch import Batcher
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Adapters
from netnsd.core.particulars import Particulars, opening
from netnsd.core.policing import Policing
from netnsd.core.pool import messages
from netnsd.core.registry import Registry
from netnsd.core.supervisor import Supervisor
from netnsd.errors import KernelError, NetnsdError, StoreError

# The kernel needs half a millisecond per link, in which nothing else can be wired.
BATCH = 64
_AT_ONCE = 2
_KILL_AGAIN_SECONDS = 0.5


class Removal:
    """Removes environments, while ``run`` runs."""

    def __init__(self, adapters: Adapters, registry: Registry, supervisor: Supervisor,
                 particulars: Particulars, policing: Policing) -> None:
        self._a = adapters
        self._registry = registry
        self._supervisor = supervisor
        self._particulars = particulars
        self._policing = policing
        self._under_way: dict[str, trio.Event] = {}
        self._reaper: Batcher[_Doomed] = Batcher(self._reap, BATCH, workers=_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work for ever."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._reaper.run)
            task_status.started()

    async def remove(self, environment: Environment) -> None:
        """End every process of it and remove all that it had. It is gone when this returns.

        Raises KernelError where something could not be removed; it is tried again later.
        """
        self.mark([environment])
        await self._remove(environment)

    async def remove_many(self, environments: Sequence[Environment]) -> dict[str, NetnsdError]:
        """Remove many; returns what went wrong, by id."""
        failures: dict[str, NetnsdError] = {}

        async def remove(environment: Environment) -> None:
            try:
                await self._remove(environment)
            except NetnsdError as error:
                failures[environment.id] = error

        self.mark(environments)
        async with trio.open_nursery() as nursery:
            for environment in environments:
                nursery.start_soon(remove, environment)
        return failures

    async def remove_quietly(self, environments: Sequence[Environment]) -> None:
        """Remove them; what fails is told as an event, and tried again later."""
        self.mark(environments)
        async with trio.open_nursery() as nursery:
            for environment in environments:
                nursery.start_soon(self._remove_quietly, environment)

    def remove_behind(self, *environments: Environment) -> None:
        """Begin to remove them, and return at once. What fails is tried again later."""
        self.mark(environments)
        assert self._nursery is not None
        for environment in environments:
            if environment.id not in self._under_way:
                self._nursery.start_soon(self._remove_quietly, environment)

    def remove_again(self) -> None:
        """Try again what could not be removed, and return at once: it may take long, and be in vain."""
        self.remove_behind(*(e for e in self._registry.all() if e.state == "removing"))

    async def undo(self, environment: Environment) -> None:
        """Remove an environment whose lock is held; what fails is told as an event, and tried again later."""
        self.mark([environment])
        try:
            await self._tear_down(environment)
        except NetnsdError as error:
            self._particulars.tell("remove_failed", environment, reason=error.message)

    def mark(self, environments: Sequence[Environment]) -> None:
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
                self._particulars.tell("store_failed", environment, reason=error.message)
        self._supervisor.pulse()

    async def _remove(self, environment: Environment) -> None:
        under_way = self._under_way.get(environment.id)
        if under_way is not None:
            await under_way.wait()
            if environment in self._registry:
                raise KernelError(f"{environment.name!r} could not be removed whole",
                                  hint="It is tried again every minute.")
        if environment not in self._registry:
            return
        ended = self._under_way[environment.id] = trio.Event()
        lock = self._particulars.lock(environment)
        try:
            with trio.CancelScope(shield=True):
                await self._wrest(environment, lock)
                try:
                    if environment in self._registry:
                        await self._tear_down(environment)
                finally:
                    lock.release()
        finally:
            del self._under_way[environment.id]
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

    async def _remove_quietly(self, environment: Environment) -> None:
        try:
            await self._remove(environment)
        except NetnsdError as error:
            self._particulars.tell("remove_failed", environment, reason=error.message)

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
        self._particulars.forget(environment)
        self._supervisor.forget(environment)
        self._particulars.tell("removed", environment)

    async def _reap(self, doomed: list[_Doomed]) -> None:
        """Remove what the kernel has of many environments at once, and forget those of which that was the last."""
        environments = [one.environment for one in doomed]
        errors: list[Exception] = []
        untidy = [(e.slot, e.netns) for e in environments if e.id in self._particulars.untidy]
        for step in (partial(self._a.firewall.close, [opening(e) for e in environments]),
                     *([partial(self._a.network.tidy, untidy)] if untidy else ()),
                     partial(self._a.network.unwire, [(e.slot, e.netns) for e in environments]),
                     partial(self._a.firewall.forget, [e.slot.address for e in environments])):
            try:
                await step()
            except (NetnsdError, ExceptionGroup) as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("reap", errors)
        last = [one.environment for one in doomed if one.is_last]
        await self._policing.leave(last)  # before its address is anybody else's
        self._registry.release(last)


@dataclass(frozen=True, slots=True)
class _Doomed:
    """An environment to reap. ``is_last``: nothing of it is left anywhere else."""

    environment: Environment
    is_last: bool
