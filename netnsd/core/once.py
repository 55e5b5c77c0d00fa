"""Creations that are asked for again under the same key: what the first made is the answer, and nothing is made twice.

A key is its user's own. What it was sent with is kept with what was made, in the state file, so that it holds over a
restart, and as long as the environment: what is gone is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
import trio

from netnsd import wire
from netnsd.core.actor import Actor
from netnsd.core.environment import Environment
from netnsd.core.registry import Registry
from netnsd.errors import IdempotencyConflict, InvalidRequest

MOST_CHARACTERS = 255
_DIGEST_BYTES = 16
# Makes what is missing of a request, under its mark; given what there is of it already.
Make = Callable[[str, Sequence[Environment]], Awaitable[list[Environment]]]


class Mark(NamedTuple):
    """A key and what came with it, as they are kept: digests, which tell nothing of either."""

    key: str
    body: str

    @classmethod
    def of(cls, key: str, request: wire.CreateRequest) -> Mark:
        """The mark of a request under a key, which may be quoted: a string of RFC 8941, as the draft has it.

        Raises InvalidRequest. See draft-ietf-httpapi-idempotency-key-header.
        """
        if len(key) > 1 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not (key.isascii() and key.isprintable() and 1 <= len(key) <= MOST_CHARACTERS):
            raise InvalidRequest("the Idempotency-Key is malformed",
                                 hint=f"Send 1 to {MOST_CHARACTERS} printable characters, such as a UUID, once.")
        return cls(_digest(key.encode()), _digest(msgspec.json.encode(request)))

    def __str__(self) -> str:
        return f"{self.key}:{self.body}"


class Once:
    """Keys of creations that are under way, or whose environments are there."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._under_way: dict[tuple[int, str], tuple[Mark, trio.Event]] = {}

    async def make(self, actor: Actor, key: str | None, request: wire.CreateRequest, make: Make) -> list[Environment]:
        """What ``make`` makes of a request, or an earlier call with the actor's same key has made.

        Raises IdempotencyConflict where that was another request, InvalidRequest where the key cannot be one.
        """
        if key is None:
            return await make("", ())
        mark = Mark.of(key, request)
        while (first := self._under_way.get((actor.uid, mark.key))) is not None:
            _require_same(mark, str(first[0]))
            await first[1].wait()  # where it failed, this one tries
        made = self._registry.marked(actor.uid, mark.key)
        for environment in made:
            _require_same(mark, environment.request)
        if len(made) >= (1 if request.count is None else request.count):
            return sorted(made, key=lambda e: (len(e.name), e.name))
        ended = trio.Event()
        self._under_way[actor.uid, mark.key] = mark, ended
        try:
            return await make(str(mark), made)
        finally:
            del self._under_way[actor.uid, mark.key]
            ended.set()


def _require_same(mark: Mark, other: str) -> None:
    if str(mark) != other:
        raise IdempotencyConflict("this Idempotency-Key was sent with another request",
                                  hint="Send another key with each request, and the same only to ask again.")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
