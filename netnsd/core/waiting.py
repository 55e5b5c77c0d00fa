"""Waiting for an environment to become what a caller needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

import trio

from netnsd.core.environment import ALIVE, Environment
from netnsd.core.interfaces import Network
from netnsd.errors import KernelError, NotFound, WaitTimeout, WrongState

Aim = Literal["ready", "exit", "gone"]
_FRESH_SECONDS = 0.01
_MOST_HEARD = 256
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.2


class _Heard(NamedTuple):
    """What listened in an environment, as (protocol, port): true ``until`` then, of these launches of its services."""

    until: float
    launches: tuple[str | None, ...]
    found: frozenset[tuple[str, int]]


class Waits:
    """Waits for environments.

    Args:
        network: says what listens inside.
        exists: whether an environment is still there.
        changed: returns at the next change of any environment or service.
    """

    def __init__(self, network: Network, exists: Callable[[Environment], bool],
                 changed: Callable[[], Awaitable[None]]) -> None:
        self._network = network
        self._exists = exists
        self._changed = changed
        self._looking = trio.Lock()
        self._heard: dict[str, _Heard] = {}

    async def wait(self, environment: Environment, aim: Aim, timeout_seconds: float) -> None:
        """Return when it is ``ready``, its services ended for good (``exit``), or it is ``gone``.

        Ready: its services run and are healthy, where that is looked at, and its declared ports have listeners.

        Raises WaitTimeout, and WrongState or NotFound where what is waited for cannot come any more.
        """
        waits = {"ready": self._until_ready, "exit": self._until_exit, "gone": self._until_gone}
        with trio.move_on_after(timeout_seconds) as scope:
            await waits[aim](environment)
        if not scope.cancelled_caught:
            return
        missing = await self._missing(environment) if aim == "ready" and self._exists(environment) else ""
        seen = missing or f"it is {environment.shown_state}"
        raise WaitTimeout(f"{environment.name!r} is not {aim} after {timeout_seconds:g} s: {seen}",
                          hint="`netnsctl logs` shows what its servers said.")

    def require(self, environment: Environment) -> None:
        """Raise NotFound or WrongState where an environment is gone, or going."""
        if not self._exists(environment):
            raise NotFound(f"{environment.name!r} was removed", hint="`netnsctl ls` lists what there is.")
        if environment.state == "removing":
            raise WrongState(f"{environment.name!r} is being removed", hint="Create it again when it is gone.")

    async def _until_ready(self, environment: Environment) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            self.require(environment)
            for service in environment.services.values():
                if service.state in ("exited", "stopped"):
                    raise WrongState(
                        f"service {service.name!r} of {environment.name!r} {service.state} before it was ready"
                        f" (exit code {service.exit_code})", hint="`netnsctl logs` shows what it said.",
                        service=service.name, exit_code=service.exit_code)
            try:
                if environment.state == "ready" and not await self._missing(environment):
                    return
            except KernelError:
                self.require(environment)  # it was removed while it was looked at
                raise
            await trio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    async def _missing(self, environment: Environment) -> str:
        """What keeps an environment from being ready, for people; empty where nothing does."""
        for service in environment.services.values():
            if service.state != "running":
                after = "" if service.exit_code is None else f" after exit code {service.exit_code}"
                return f"service {service.name!r} is {service.state}{after}"
            if service.health not in (None, "healthy"):
                return f"service {service.name!r} is {service.health}"
        if not environment.ports:
            return ""
        heard = await self._listeners(environment)
        silent = [f"{p.port}/{p.protocol}" for p in environment.ports if (p.protocol, p.port) not in heard]
        return f"nothing listens on {', '.join(silent)}" if silent else ""

    async def _listeners(self, environment: Environment) -> frozenset[tuple[str, int]]:
        """What listens inside, at most a moment old: many may wait, and looking takes the one thread that creates."""
        async with self._looking:
            seen = self._heard.get(environment.id)
            began = trio.current_time()
            # What listened before a service was started again says nothing of the one that runs now.
            launches = tuple(s.launch_id for s in environment.services.values())
            if seen is None or began > seen.until or launches != seen.launches:
                found = frozenset((x.protocol, x.port) for x in await self._network.listeners(environment.slot))
                if len(self._heard) >= _MOST_HEARD:
                    self._heard.clear()
                # An environment with very many sockets is looked at less often.
                spent = trio.current_time() - began
                seen = self._heard[environment.id] = _Heard(began + max(_FRESH_SECONDS, 5 * spent), launches, found)
            return seen.found

    async def _until_exit(self, environment: Environment) -> None:
        while environment.state == "creating" or any(
                s.state in ALIVE for s in environment.services.values()):
            self.require(environment)
            await self._changed()

    async def _until_gone(self, environment: Environment) -> None:
        while self._exists(environment):
            await self._changed()
