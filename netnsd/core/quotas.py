"""What each user may have in all, and what it has. Nothing here awaits, so that no two creations take the same room.

What there is of a user is counted as it comes and goes: a creation must not look at all environments. What is in stock
for a user's templates is the user's.
"""

from __future__ import annotations

import math
from collections import deque
from operator import sub

import msgspec
import trio

from netnsd import wire
from netnsd.core.environment import Environment, Quota
from netnsd.core.interfaces import Store
from netnsd.errors import InvalidRequest, QuotaExceeded, TooManyCreations, WrongState

LIMITS = tuple(field.name for field in msgspec.structs.fields(wire.QuotaLimits))
MOST = 1 << 50  # of anything
_UNLIMITED = wire.QuotaLimits()
_ROOT = 0
_WINDOW_SECONDS = 60.0

# Environments, ports, bytes of memory, and thousandths of a processor: all of them whole, so that sums are exact.
_COUNTED = ("environments", "ports", "memory", "cpu")
_Amounts = tuple[int, int, int, int]
_NOTHING: _Amounts = (0, 0, 0, 0)


class Quotas:
    """The quotas of all users. Root has none.

    Args:
        defaults: of users of whom no admin has said anything.
        store: where what admins say is kept.
    """

    def __init__(self, defaults: wire.QuotaLimits, store: Store) -> None:
        self._defaults = defaults
        self._store = store
        self._own: dict[int, Quota] = {}
        self._held: dict[int, _Amounts] = {}
        self._created: dict[int, deque[float]] = {}

    def load(self) -> None:
        """Read what admins have said. Raises StoreError."""
        self._own = {quota.uid: quota for quota in self._store.quotas()}

    # -- counting -----------------------------------------------------------------------------------------------

    def require(self, uid: int, resources: wire.Resources, ports: int, count: int = 1, *,
                instead_of: Environment | None = None) -> None:
        """Raise QuotaExceeded or TooManyCreations where ``count`` environments of that kind are too many more.

        ``instead_of``: that one goes before.
        """
        limits = self.limits(uid)
        if limits == _UNLIMITED:
            return
        held: tuple[int, ...] = self._held.get(uid, _NOTHING)
        if instead_of is not None:
            held = tuple(map(sub, held, _amounts(instead_of.resources, len(instead_of.ports))))
        for name, used, one in zip(_COUNTED, held, _amounts(resources, ports), strict=True):
            most = getattr(limits, name)
            if most is None:
                continue
            # What has no limit could take all that there is.
            if name in ("memory", "cpu") and getattr(resources, name) is None:
                raise QuotaExceeded(f"you have a quota of {name}, and this environment no limit of it",
                                    hint=f"Say how much it may take: --{'cpus' if name == 'cpu' else name}.",
                                    quota=name, limit=most, used=_shown(name, used), asked=None)
            if one and used + one * count > _amount(name, most):
                asked = _shown(name, one * count)
                raise QuotaExceeded(
                    f"your quota of {name} is {most:.15g}: you have {_shown(name, used):.15g}, and ask for "
                    f"{asked:.15g}",
                    hint="Remove environments, or ask an admin (netnsctl quota set).", quota=name, limit=most,
                    used=_shown(name, used), asked=asked)
        if limits.creations_per_minute is not None:
            self._require_pace(uid, limits.creations_per_minute, count)

    def _require_pace(self, uid: int, most: int, count: int) -> None:
        created, now = self._created.get(uid, deque()), trio.current_time()
        while created and created[0] <= now - _WINDOW_SECONDS:
            created.popleft()
        too_many = len(created) + count - most
        if too_many <= 0:
            return
        reason = f"your quota is {most} creations a minute: in the last one there were {len(created)}"
        details = {"quota": "creations_per_minute", "limit": most, "used": len(created), "asked": count}
        if count > most:
            raise TooManyCreations(reason, hint="Ask for fewer at once.", **details)
        after = max(1, math.ceil(created[too_many - 1] + _WINDOW_SECONDS - now))
        raise TooManyCreations(reason, hint=f"Try again in {after} s.", **details, retry_after_seconds=after)

    def take(self, environment: Environment) -> None:
        """Count an environment in that is made now."""
        self.remember(environment)
        if self.limits(environment.uid).creations_per_minute is not None:
            self._created.setdefault(environment.uid, deque()).append(trio.current_time())

    def remember(self, environment: Environment) -> None:
        """Count an environment in."""
        self._count(environment, 1)

    def give_back(self, environment: Environment) -> None:
        """Count an environment out."""
        self._count(environment, -1)

    def _count(self, environment: Environment, sign: int) -> None:
        (a, b, c, d), (e, f, g, h) = (self._held.pop(environment.uid, _NOTHING),
                                      _amounts(environment.resources, len(environment.ports)))
        held = (a + sign * e, b + sign * f, c + sign * g, d + sign * h)
        if held != _NOTHING:
            self._held[environment.uid] = held

    # -- what admins say ----------------------------------------------------------------------------------------

    def limits(self, uid: int) -> wire.QuotaLimits:
        """What holds for a user."""
        if uid == _ROOT:
            return _UNLIMITED
        own = self._own.get(uid)
        return self._defaults if own is None else msgspec.structs.replace(self._defaults, **own.said)

    def known(self) -> dict[int, str]:
        """Whom an admin has given a quota of its own: names by uid."""
        return {quota.uid: quota.user for quota in self._own.values()}

    def put(self, uid: int, user: str, wanted: wire.QuotaRequest) -> None:
        """Give a user a quota of its own, in place of the one before. What it has beyond that stays.

        Raises InvalidRequest, WrongState, StoreError.
        """
        if uid == _ROOT:
            raise WrongState("root has no quota", hint="Name another user.")
        said = {name: value for name in LIMITS if (value := getattr(wanted, name)) is not msgspec.UNSET}
        for name, value in said.items():
            if value is not None and not 0 <= value <= MOST:
                raise InvalidRequest(f"{name} {value:g} is not from 0 to {MOST}", hint="null is unlimited.")
        quota = Quota(uid, user, said)
        with self._store.transaction():
            self._store.set_quota(quota)
        self._own[uid] = quota

    def reset(self, uid: int) -> None:
        """Let a user have what users have by default. Raises StoreError."""
        with self._store.transaction():
            self._store.delete_quota(uid)
        self._own.pop(uid, None)

    def shown(self, uid: int, user: str) -> wire.Quota:
        """A user's quota, and what it has."""
        own, held = self._own.get(uid), self._held.get(uid, _NOTHING)
        used = {name: _shown(name, amount) for name, amount in zip(_COUNTED, held, strict=True)}
        return wire.Quota(owner=wire.Owner(uid=uid, user=user), limits=self.limits(uid),
                          used=msgspec.convert(used, wire.QuotaUsage), own=sorted(own.said) if own else [])


def _amounts(resources: wire.Resources, ports: int) -> _Amounts:
    return 1, ports, resources.memory or 0, _amount("cpu", resources.cpu or 0)


def _amount(name: str, value: float) -> int:
    return round(value * 1000) if name == "cpu" else int(value)


def _shown(name: str, amount: int) -> float:
    return amount / 1000 if name == "cpu" else amount
