"""What this run of the daemon knows of each environment beyond its row, and how it tells of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from netnsd.core.environment import Environment
from netnsd.core.interfaces import Emit, Opening, Publication, Reach
from netnsd.core.supervisor import seen_by
from netnsd.errors import NotFound

_REACH: dict[str, Reach] = {"host": "host", "lan": "lan"}


class Particulars:
    """Of environments, by id; gone with the environment, or with the daemon.

    ``furnished``: what servers need is there. ``untidy``: they have a name in /run/netns beside their own.
    ``attended``: a process waits in the group of a first service that they do not have.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._locks: dict[str, trio.Lock] = {}
        self.furnished: set[str] = set()
        self.untidy: set[str] = set()
        self.attended: set[str] = set()

    def lock(self, environment: Environment) -> trio.Lock:
        """Verbs on one environment take turns by it."""
        return self._locks.setdefault(environment.id, trio.Lock())

    def turn(self, environment: Environment, require: Callable[[Environment], None]
             ) -> AbstractAsyncContextManager[None]:
        """The environment's lock, with a look (which raises) at whether it is still there once it is held."""
        return _Turn(self, environment, require)

    def forget(self, environment: Environment) -> None:
        """It is gone."""
        for known in (self.furnished, self.untidy, self.attended):
            known.discard(environment.id)
        self._locks.pop(environment.id, None)

    def tell(self, kind: str, environment: Environment, **details: Any) -> None:
        """Something happened to an environment."""
        self._emit(kind, seen_by(environment), environment.id, environment.name, **details)


class _Turn:
    def __init__(self, particulars: Particulars, environment: Environment,
                 require: Callable[[Environment], None]) -> None:
        self._particulars, self._environment, self._require = particulars, environment, require
        self._lock = particulars.lock(environment)

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            self._require(self._environment)
        except BaseException as error:
            self._lock.release()
            if isinstance(error, NotFound):
                self._particulars.forget(self._environment)  # the lock may have been made anew for it
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def opening(environment: Environment) -> Opening:
    """What the firewall is to hold for an environment."""
    return Opening(environment.slot.address, environment.uid,
                   tuple(Publication(p.protocol, p.published, p.port) for p in environment.ports),
                   environment.guests, _REACH.get(environment.share, "owner"))
