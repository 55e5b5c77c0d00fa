"""What an environment without a server needs later than its creator: done behind the answer, while nobody waits.

Its row says "creating" till then. Should the daemon be killed, the next one finds that all of it is there.
"""

from __future__ import annotations

import trio

from netnsd.core.environment import Environment
from netnsd.core.interfaces import Adapters
from netnsd.core.particulars import Particulars, opening
from netnsd.core.pool import FIRST_SERVICE
from netnsd.core.quiet import Quiet
from netnsd.core.registry import Registry
from netnsd.core.supervisor import group_of
from netnsd.errors import NetnsdError, StoreError


class Settling:
    """Settles environments one after the other, while ``run`` runs."""

    def __init__(self, adapters: Adapters, registry: Registry, particulars: Particulars, quiet: Quiet) -> None:
        self._a = adapters
        self._registry = registry
        self._particulars = particulars
        self._quiet = quiet
        self._unsettled: list[Environment] = []
        self._has_unsettled = trio.Event()

    def settle(self, environment: Environment) -> None:
        """Do it soon."""
        self._unsettled.append(environment)
        self._has_unsettled.set()

    async def run(self) -> None:
        """Work for ever."""
        while True:
            await self._has_unsettled.wait()
            self._has_unsettled = trio.Event()
            await self._quiet.wait()
            environments, self._unsettled = self._unsettled, []  # what comes meanwhile has a turn of its own
            ready = [e for e in environments if e in self._registry and e.state == "ready"]
            try:
                self.write_ready(ready)
            except StoreError as error:
                for environment in ready:
                    self._particulars.tell("store_failed", environment, reason=error.message)
            for environment in environments:
                await self._furnish_behind(environment)
                await self._dismiss(environment)

    async def furnish(self, environment: Environment) -> None:
        """Have what servers need, if it is not there yet. Raises KernelError, LimitUnavailable."""
        if environment.id not in self._particulars.furnished:
            await self._a.network.furnish(environment.slot, opening(environment).publications,
                                          environment.resources.bandwidth)
            self._particulars.furnished.add(environment.id)

    def write_ready(self, environments: list[Environment]) -> None:
        """Write that they are whole, and what their services are. Raises StoreError."""
        with self._a.store.transaction():
            for environment in environments:
                for service in environment.services.values():
                    self._a.store.set_service(environment.id, service)
                self._a.store.set_state(environment.id, "ready")

    async def _furnish_behind(self, environment: Environment) -> None:
        """Furnish though nothing runs there yet. A failure shows when something is to run."""
        await self._quiet.wait()
        if environment not in self._registry or environment.id in self._particulars.furnished:
            return
        async with self._particulars.lock(environment):
            if environment.state == "ready":
                try:
                    await self.furnish(environment)
                except NetnsdError as error:
                    self._particulars.tell("furnish_failed", environment, reason=error.message)

    async def _dismiss(self, environment: Environment) -> None:
        """End the process that waits to become a service which this environment does not have."""
        attended = self._particulars.attended
        if environment.id not in attended:
            return
        await self._quiet.wait()
        attended.discard(environment.id)
        if environment in self._registry:
            try:
                await self._a.cgroups.remove(group_of(environment.slot, FIRST_SERVICE))
            except NetnsdError as error:  # it goes with the environment
                self._particulars.tell("furnish_failed", environment, reason=error.message)
