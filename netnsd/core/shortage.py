"""Tells of processes that the kernel ended, as their environment's limit of memory left no room for them.

The kernel counts them by environment. When a service's first process ends by SIGKILL, one that was not told of yet was
that service's; the others are told of a little later, as it is not known whose they were. Only environments with such a
limit are watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from netnsd.core.environment import Environment
from netnsd.core.interfaces import Cgroups
from netnsd.errors import NetnsdError

_OF_A_SERVICE_SECONDS = 0.5  # in which the end of a service is reported


class Shortage:
    """Watches environments.

    Args:
        tell: is told of an environment, of a service of it ("": not known which), and how many there were.
    """

    def __init__(self, cgroups: Cgroups, tell: Callable[[Environment, str, int], None]) -> None:
        self._cgroups = cgroups
        self._tell = tell
        self._scopes: dict[str, trio.CancelScope] = {}

    def follow(self, nursery: trio.Nursery, environment: Environment) -> None:
        """Watch an environment that has a limit, until it is forgotten."""
        if environment.resources.memory is not None and environment.id not in self._scopes:
            scope = self._scopes[environment.id] = trio.CancelScope()
            nursery.start_soon(self._watch, environment, scope)

    def adopt(self, environment: Environment) -> None:
        """What was ended before an earlier run of the daemon ended is no news; neither is what it missed."""
        with contextlib.suppress(NetnsdError):
            environment.oom_kills = self._cgroups.oom_kills(environment.slot.cgroup)

    def forget(self, environment: Environment) -> None:
        """The environment is gone."""
        scope = self._scopes.pop(environment.id, None)
        if scope is not None:
            scope.cancel()

    def look(self, environment: Environment, service: str = "") -> None:
        """Tell of those that were ended since the last look."""
        if environment.resources.memory is None:
            return
        try:
            found = self._cgroups.oom_kills(environment.slot.cgroup)
        except NetnsdError:  # out of descriptors, say: the next look tells
            return
        if found > environment.oom_kills:
            more = found - environment.oom_kills
            environment.oom_kills = found
            self._tell(environment, service, more)

    async def _watch(self, environment: Environment, scope: trio.CancelScope) -> None:
        with scope:
            try:
                while True:
                    await self._cgroups.more_oom_kills(environment.slot.cgroup, environment.oom_kills)
                    await trio.sleep(_OF_A_SERVICE_SECONDS)
                    self.look(environment)
            except NetnsdError:  # nothing runs there yet, or there are no descriptors: the next command has it followed
                self._scopes.pop(environment.id, None)
