"""Starting services again that ended by themselves: whether, and when.

A restart waits outside of its environment's lock, so that it delays neither a stop nor a removal, and looks once it has
the lock whether it is still due. What waits is written as ``restarting``: the next run of the daemon goes on with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from netnsd.core.environment import Environment, Service
from netnsd.errors import NetnsdError, NotFound, WrongState

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0
CALM_SECONDS = 10.0  # what ran for so long did not fail at its start


def is_wanted(service: Service) -> bool:
    """Whether a service that ended by itself is to be started again. An end that nobody could tell was a failure."""
    return service.restart == "always" or (service.restart == "on-failure" and service.exit_code != 0)


def pause(tries: int) -> float:
    """Seconds until the next start, after so many in a row that did not last."""
    return float(min(FIRST_PAUSE_SECONDS * 2 ** min(tries, 16), LONGEST_PAUSE_SECONDS))


def after_its_end(environment: Environment, service: Service) -> Service:
    """What a service is once nothing of it runs: stopped where somebody did that, to be started again, or neither."""
    state = service.state
    if state != "stopped":
        state = "restarting" if environment.state != "removing" and is_wanted(service) else "exited"
    return service.changed(state=state, pid=None, health=None)


class Restarts:
    """Restarts that are to come.

    Args:
        attempt: starts a service again where it is still due. Raises NotFound and WrongState where its environment is
            gone or going, and NetnsdError where it could not be started, which is tried again.
        failed: is told of each attempt that failed.
    """

    def __init__(self, attempt: Callable[[Environment, Service], Awaitable[None]],
                 failed: Callable[[Environment, Service, NetnsdError], None]) -> None:
        self._attempt = attempt
        self._failed = failed
        self._pending: dict[tuple[str, str], trio.CancelScope] = {}

    @property
    def pending(self) -> int:
        """How many are to come."""
        return len(self._pending)

    def schedule(self, nursery: trio.Nursery, environment: Environment, service: Service) -> None:
        """Start a service again, that is ``restarting``, when its pause is over."""
        self.cancel(environment, service.name)
        scope = self._pending[environment.id, service.name] = trio.CancelScope()
        nursery.start_soon(self._again, environment, service, scope)

    def cancel(self, environment: Environment, service: str) -> None:
        """It is not to come any more: the service was started or stopped by hand, or goes."""
        scope = self._pending.pop((environment.id, service), None)
        if scope is not None:
            scope.cancel()

    async def _again(self, environment: Environment, service: Service, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await self._pause(environment, service, scope)
                try:
                    await self._attempt(environment, service)
                except (NotFound, WrongState):
                    return
                except NetnsdError as error:
                    self._failed(environment, environment.services[service.name], error)
                else:
                    return

    async def _pause(self, environment: Environment, service: Service, scope: trio.CancelScope) -> None:
        """Only here it can be cancelled: an attempt that is under way looks by itself whether it is due."""
        key = environment.id, service.name
        self._pending[key] = scope
        try:
            await trio.sleep(pause(environment.services[service.name].tries))
        finally:
            if self._pending.get(key) is scope:
                del self._pending[key]
