"""The audit trail: who asked for which change, and what came of it, also where the answer was no.

Nothing of a request's body is in it but the name that it asks for: variables and arguments hold secrets. It goes to the
daemon's log, which lasts, and to a short memory, which admins read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from netnsd.core.actor import Actor
from netnsd.core.environment import Environment

DONE = "ok"
_REF_CHARACTERS = 80
_SECRET = re.compile(r"(netnsd_[0-9a-f]{12}_)[0-9a-f]+", re.IGNORECASE)
_READING = frozenset({"GET", "HEAD"})
# Whoever is refused even a look is told of, too.
_REFUSALS = frozenset({"forbidden", "foreign_request"})
_log = structlog.get_logger()


class Subject(NamedTuple):
    """What a request was about. ``environment``: an id, "" for anything else. ``code``: "" for that of the request."""

    environment: str
    name: str
    owner: int | None = None
    code: str = ""


@dataclass(slots=True)
class Deed:
    """One request, filled in while it is done.

    ``route`` is the path with its {ref}; ``ref`` what the caller put there. ``name``: what a creation asks for.
    ``code``: of the error that was answered, or ``DONE``. ``token``: the id of the bearer token, where there was one.
    """

    actor: Actor
    method: str
    route: str
    ref: str = ""
    name: str = ""
    code: str = "cancelled"
    token: str | None = None
    subjects: list[Subject] = field(default_factory=list)

    def about(self, environment: Environment, code: str = "") -> Environment:
        """It is about this one; returns it."""
        self.subjects.append(Subject(environment.id, environment.name, environment.uid, code))
        return environment

    @property
    def counts(self) -> bool:
        """Whether it is told of."""
        return self.method not in _READING or self.code in _REFUSALS


class Trail:
    """Keeps deeds.

    Args:
        emit: has them remembered, by whose they are: ``EventLog.emit``.
    """

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit

    def keep(self, deed: Deed) -> None:
        """Tell of a deed that is over, for each environment that it was about."""
        if not deed.counts:
            return
        actor = deed.actor
        for subject in deed.subjects or [Subject("", deed.name)]:
            details: dict[str, Any] = {
                "uid": actor.uid, "user": actor.user, "how": actor.how, "token": deed.token, "method": deed.method,
                "route": deed.route, "ref": _shown(deed.ref), "owner": subject.owner, "code": subject.code or deed.code}
            _log.info("audit", environment=subject.environment, name=_shown(subject.name), **details)
            self._emit("audit", actor.uid, subject.environment, _shown(subject.name), **details)


def _shown(text: str) -> str:
    """What a client sent, for a log that may be a terminal: and that may be a token, where its name is asked for."""
    text = _SECRET.sub(r"\1...", text)[:_REF_CHARACTERS]
    return text if text.isprintable() else text.encode("unicode_escape").decode()
