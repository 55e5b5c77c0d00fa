"""Whether services work: looked at again and again, from the host or by a command inside. One task for each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from netnsd import wire
from netnsd.core.environment import Environment, Service
from netnsd.core.errands import Errands
from netnsd.core.interfaces import Probes
from netnsd.errors import LaunchFailed, NetnsdError, NotFound, WrongState

# While it may still be starting, who waits for it wants to know soon.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 1.0

# Looks of one user under way: each may hold a descriptor of the daemon for as long as it may take.
AT_ONCE = 32

# What was found of a service's launch: the state, and why it is not healthy.
Found = Callable[[Environment, Service, wire.HealthState, str], None]


class Judge:
    """From what single looks find to a state. Pure; times are in seconds of any one clock.

    Failures do not count while it may still be starting: until it was healthy once, or the start period is over.
    """

    def __init__(self, check: wire.HealthCheck, state: wire.HealthState, now: float) -> None:
        self.state = state
        self._check = check
        self._failures = 0
        self._starts_until = now + check.start_period_seconds
        self._short_pause = _FIRST_PAUSE_SECONDS

    def heard(self, *, good: bool, now: float) -> wire.HealthState:
        """The state after a look."""
        if good:
            self._failures, self.state = 0, "healthy"
        elif not self._may_start(now):
            self._failures += 1
            if self._failures >= self._check.retries:
                self.state = "unhealthy"
        return self.state

    def pause(self, now: float) -> float:
        """How long to wait before the next look."""
        if not self._may_start(now):
            return self._check.interval_seconds
        pause, self._short_pause = self._short_pause, min(1.5 * self._short_pause, _LONGEST_PAUSE_SECONDS)
        return min(pause, self._check.interval_seconds)

    def _may_start(self, now: float) -> bool:
        return self.state == "starting" and now < self._starts_until


class Health:
    """Looks after the services that have a check, from each start to its end.

    Args:
        probes: looks from the host.
        errands: runs commands inside.
        found: is told of each change.
    """

    def __init__(self, probes: Probes, errands: Errands, found: Found) -> None:
        self._probes = probes
        self._errands = errands
        self._found = found
        self._scopes: dict[str, trio.CancelScope] = {}
        self._turns: dict[int, trio.CapacityLimiter] = {}

    @property
    def watched(self) -> int:
        """How many services are looked after."""
        return len(self._scopes)

    def follow(self, nursery: trio.Nursery, environment: Environment, service: Service) -> None:
        """Look after a service that runs, until ``forget``. One without a check is not looked after."""
        if service.check is not None and service.launch_id is not None and service.launch_id not in self._scopes:
            scope = self._scopes[service.launch_id] = trio.CancelScope()
            nursery.start_soon(self._watch, environment, service, service.check, scope)

    def forget(self, launch_id: str | None) -> None:
        """It has ended, or is being stopped."""
        scope = self._scopes.pop(launch_id or "", None)
        if scope is not None:
            scope.cancel()

    async def _watch(self, environment: Environment, service: Service, check: wire.HealthCheck,
                     scope: trio.CancelScope) -> None:
        judge = Judge(check, service.health or "starting", trio.current_time())
        with scope:
            if judge.state != "starting":  # an earlier run's: not all of a host's at once
                await trio.sleep(check.interval_seconds * int((service.launch_id or "")[:4] or "0", 16) / 0x10000)
            while True:
                try:
                    reason = await self._look(environment, service, check)
                except (NotFound, WrongState):
                    return
                except NetnsdError:  # it could not be looked at, which says nothing of it
                    pass
                else:
                    before = judge.state
                    state = judge.heard(good=not reason, now=trio.current_time())
                    if state != before:
                        self._found(environment, service, state, reason)
                await trio.sleep(judge.pause(trio.current_time()))

    async def _look(self, environment: Environment, service: Service, check: wire.HealthCheck) -> str:
        """Why it is not healthy; empty where it is. Raises NetnsdError where nobody could find out."""
        turn = self._turns.setdefault(environment.uid, trio.CapacityLimiter(AT_ONCE))
        try:
            async with turn:  # the time that a look may take begins only then
                return await self._attempt(environment, service, check)
        except trio.TooSlowError:
            return f"no answer within {check.timeout_seconds:g} s"
        except LaunchFailed as error:
            return error.message

    async def _attempt(self, environment: Environment, service: Service, check: wire.HealthCheck) -> str:
        if check.command is not None:
            code = await self._errands.run(environment, service.name,
                                           replace(service.command, argv=tuple(check.command)), check.timeout_seconds)
            return "" if code == 0 else f"exit code {code}"
        with trio.fail_after(check.timeout_seconds):
            return await self._probe(environment.slot.address, check)

    def _probe(self, address: str, check: wire.HealthCheck) -> Awaitable[str]:
        if check.http is not None and check.port is not None:
            return self._probes.http(address, check.port, check.http)
        assert check.tcp is not None
        return self._probes.tcp(address, check.tcp)
