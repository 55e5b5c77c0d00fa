"""Who reaches environments beside their owners: names of users and groups, and the ids that they have now.

A group's members are looked up when it is named and at each check, as a connection tells its user and not his groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from netnsd.core.actor import Members
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Firewall
from netnsd.core.particulars import Particulars, opening
from netnsd.core.registry import Registry
from netnsd.core.specification import MAX_GUESTS, named_guests
from netnsd.errors import InvalidRequest, NetnsdError

_LOOK_UP_SECONDS = 5.0
# Ids by kind and name, None where there is no such user or group; what is missing is not known.
_Answers = dict[tuple[str, str], tuple[int, ...] | None]


class Sharing:
    """Keeps ``guests`` of environments, and the firewall in step with them."""

    def __init__(self, firewall: Firewall, registry: Registry, particulars: Particulars, members: Members) -> None:
        self._firewall = firewall
        self._registry = registry
        self._particulars = particulars
        self._members = members

    async def guests(self, share: str) -> tuple[int, ...]:
        """The ids of those that ``share``, which was checked, names.

        Raises InvalidRequest for a user or a group that there is not.
        """
        found: set[int] = set()
        for kind, name in named_guests(share):
            with trio.move_on_after(_LOOK_UP_SECONDS) as deadline:
                members = await self._members(kind, name)
            if deadline.cancelled_caught:
                raise InvalidRequest(f"share: nobody said in time who {kind} {name!r} is",
                                     hint="The host's name service does not answer; try again.", name=name)
            if members is None:
                raise InvalidRequest(f"share: there is no {kind} {name!r}", hint="`getent` lists users and groups.",
                                     name=name)
            found.update(members)
        if len(found) > MAX_GUESTS:
            raise InvalidRequest(f"share: {len(found)} users are more than {MAX_GUESTS}",
                                 hint="Share with a smaller group, or with host.")
        return tuple(sorted(found - {0}))

    async def recall(self, environments: Iterable[Environment]) -> None:
        """Find guests of an earlier run of the daemon. Who cannot be found now is none, until a check finds him."""
        shared = [environment for environment in environments if named_guests(environment.share)]
        answers = await self._answers(shared)
        for environment in shared:
            environment.guests = self._found(environment, answers) or ()

    async def follow(self) -> None:
        """Let in who has become a guest since, and out who is none any more."""
        answers = await self._answers(self._registry.all())
        for environment in self._registry.all():
            if not named_guests(environment.share):
                continue
            guests = self._found(environment, answers)
            if guests is None:  # nobody knows: who was let in is still
                continue
            if guests != environment.guests and environment.state == "ready" and environment in self._registry:
                before, environment.guests = environment.guests, guests
                try:
                    await self._firewall.alter(opening(environment))
                except NetnsdError as error:
                    environment.guests = before
                    self._particulars.tell("share_failed", environment, reason=error.message)

    async def _answers(self, environments: Iterable[Environment]) -> _Answers:
        """What the name service says of each name, asked once. It may hang: after one that it leaves, none is asked."""
        answers: _Answers = {}
        for kind, name in dict.fromkeys(one for e in environments for one in named_guests(e.share)):
            with trio.move_on_after(_LOOK_UP_SECONDS) as deadline:
                answers[kind, name] = await self._members(kind, name)
            if deadline.cancelled_caught:
                break
        return answers

    def _found(self, environment: Environment, answers: _Answers) -> tuple[int, ...] | None:
        """Its guests; None where that is not known."""
        guests: set[int] = set()
        for kind, name in named_guests(environment.share):
            if (kind, name) not in answers:
                self._particulars.tell("share_failed", environment,
                                       reason=f"nobody said in time who {kind} {name!r} is")
                return None
            members = answers[kind, name]
            if members is None or len(guests.union(members)) > MAX_GUESTS:
                self._particulars.tell("share_failed", environment, reason=(
                    f"there is no {kind} {name!r}" if members is None
                    else f"with {kind} {name!r} there are more than {MAX_GUESTS} users"))
                continue
            guests.update(members)
        found = tuple(sorted(guests - {0}))
        try:
            self._registry.require_guests(environment.uid, found, environment)
        except InvalidRequest as error:
            self._particulars.tell("share_failed", environment, reason=error.message)
            return ()
        return found
