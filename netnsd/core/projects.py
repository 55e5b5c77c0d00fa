"""Environments by whose they are and what for, as scripts name them that know nothing else: (dev_id, project).

The pair is kept in two labels, and makes the name: a readable part, and enough of a hash that two pairs do not meet.
The labels decide, so that a pair never leads to another's environment, even if they did.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from netnsd import wire
from netnsd.core import specification
from netnsd.errors import InvalidRequest, NameTaken, NotFound, WrongState

if TYPE_CHECKING:
    from netnsd.core.actor import Actor, Login
    from netnsd.core.environment import Environment
    from netnsd.core.environments import Environments
    from netnsd.core.templates import Templates

_DEVELOPER, _PROJECT = "dev_id", "project"
_HASH_DIGITS = 16
_MOST_CHARACTERS = 256


class Projects:
    """Starts, ends and finds them.

    Args:
        login: who a user is now.
        developers: dev_id to local user. For admins alone: anybody else's are their own.
    """

    def __init__(self, environments: Environments, templates: Templates, login: Login,
                 developers: Mapping[str, str]) -> None:
        self._environments = environments
        self._templates = templates
        self._login = login
        self._developers = developers
        self._turns: weakref.WeakValueDictionary[tuple[int, str], trio.Lock] = weakref.WeakValueDictionary()

    async def start(self, request: wire.ProjectRequest, actor: Actor) -> Environment:
        """The pair's environment, started, or made where there is none: of the owner's template of the project's name.

        A template's name is a DNS label: for ``new_feature`` it is ``new-feature``.

        Raises what a creation raises, and WrongState where the developer's user is gone.
        """
        labels = _checked(request.dev_id, request.project)
        name = name_of(request.dev_id, request.project)
        owner = await self._owner(request.dev_id, actor)
        turn = self._turns.setdefault((owner.uid, name), trio.Lock())
        async with turn:  # starts of one pair at once make one
            existing = self._own(owner, name, labels)
            if existing is not None and existing.state != "removing":
                await self._environments.start(existing)
                return existing
            if existing is not None:
                await self._environments.remove(existing)  # it is gone then
            template = (self._templates.own(owner.uid, request.project)
                        or self._templates.own(owner.uid, _words(request.project)))
            return await self._templates.create(
                wire.CreateRequest(name=name, labels=labels, template=None if template is None else template.name),
                owner)

    async def terminate(self, request: wire.ProjectReference, actor: Actor) -> Environment:
        """Remove one, and return what is gone then. Raises InvalidRequest, NotFound."""
        environment = await self.find(request, actor)
        await self._environments.remove(environment)
        return environment

    async def find(self, request: wire.ProjectReference, actor: Actor) -> Environment:
        """The one of a pair, or of an id. Raises InvalidRequest, NotFound."""
        if request.id is not None and request.dev_id is None and request.project is None:
            found = self._environments.registry.find(request.id, actor)
            if found.id != request.id:
                raise NotFound(f"there is no environment of the id {request.id[:80]!r}", hint="An id is no name.",
                               ref=request.id[:80])
            return found
        if request.id is not None or request.dev_id is None or request.project is None:
            raise InvalidRequest("dev_id and project are needed, or id", hint="Give the pair, or the id alone.")
        labels = _checked(request.dev_id, request.project)
        owner = await self._owner(request.dev_id, actor)
        existing = self._own(owner, name_of(request.dev_id, request.project), labels)
        if existing is None:
            raise NotFound(f"{request.dev_id[:80]!r} has no environment for {request.project[:80]!r}",
                           hint="GET /api/environments/status lists what there is.")
        return existing

    def visible(self, actor: Actor) -> list[Environment]:
        """All that the actor may see, oldest first."""
        return [e for e in self._environments.registry.visible(actor, everyones=True, labels={})
                if e.labels.keys() >= {_DEVELOPER, _PROJECT}]

    async def _owner(self, dev_id: str, actor: Actor) -> Actor:
        user = self._developers.get(dev_id) if actor.is_admin else None
        if user is None:
            return actor
        owner = await self._login(user)
        if owner is None or owner.uid == 0:  # an admin is not root
            raise WrongState(f"{dev_id[:80]!r} is {user!r}, of whom there is no account on this host, or who is root",
                             hint="Mend [api] dev_users.")
        return owner

    def _own(self, owner: Actor, name: str, labels: dict[str, str]) -> Environment | None:
        existing = self._environments.registry.own(owner, name)
        if existing is not None and not existing.labels.items() >= labels.items():
            raise NameTaken(f"the environment {name!r} is another's than that pair's", hint="Remove it.", name=name)
        return existing


def name_of(dev_id: str, project: str) -> str:
    """What the environment of a pair is called: a DNS label, always the same, and another for another pair."""
    digest = hashlib.sha256(json.dumps([dev_id, project]).encode()).hexdigest()[:_HASH_DIGITS]
    readable = _words(f"{dev_id}-{project}")[:specification.NAME_CHARACTERS - _HASH_DIGITS - 1].strip("-")
    return f"{readable}-{digest}" if readable else digest


def _words(text: str) -> str:
    """What a DNS label can hold of a text: of ``new_feature``, ``new-feature``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _checked(dev_id: str, project: str) -> dict[str, str]:
    for name, value in ((_DEVELOPER, dev_id), (_PROJECT, project)):
        if not value:
            raise InvalidRequest(f"{name} is empty", hint=f"It has 1 to {_MOST_CHARACTERS} printable characters.")
    return specification.check_labels({_DEVELOPER: dev_id, _PROJECT: project})
