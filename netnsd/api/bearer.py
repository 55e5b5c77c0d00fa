"""By what right a request asks: the kernel's word on a Unix socket, a bearer token on TCP. Before all routing.

On a Unix socket a token is refused, not ignored. Who put a proxy before it would have every client act as the proxy,
with or without a token; and a client that sends one of little scope means to be held to it.
"""

from __future__ import annotations

import math
from typing import Any

import structlog
import trio

from netnsd.api import problems
from netnsd.api.tcp import Visitor
from netnsd.core.actor import Actor
from netnsd.core.pace import Pace
from netnsd.core.tokens import Grant, Tokens, unauthorized
from netnsd.errors import BadRequest, NetnsdError, RateLimited, Unauthorized

# Wrong tokens of one address that are answered as such.
FAILURES_AT_ONCE = 10
_FAILURES_PER_SECOND = 0.2
# What of a refused request's body is read, so that its sender reads the answer, and not of a connection that was reset.
_DRAINED_BYTES = 64 << 10
_DRAIN_SECONDS = 2.0
_log = structlog.get_logger()


class Bearer:
    """An application around another, whose requests have an actor and a grant then.

    Args:
        requests: of one token.
    """

    def __init__(self, app: Any, tokens: Tokens, requests: Pace) -> None:
        self._app = app
        self._tokens = tokens
        self._requests = requests
        self._failures = Pace(_FAILURES_PER_SECOND, FAILURES_AT_ONCE)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request (ASGI)."""
        state = scope["state"]
        words = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        refusal: NetnsdError
        try:
            if "visitor" in state:
                actor, grant = await self._authority(words, state["visitor"])
                scope = {**scope, "state": {**state, "actor": actor, "grant": grant}}
            elif words:
                raise BadRequest("a token means nothing on this socket: the kernel says who you are",
                                 hint="Leave the header authorization out.")
        except NetnsdError as error:
            refusal = error
        except Exception:  # of the name service, say  # noqa: BLE001
            refusal = problems.fault(scope["method"], scope["path"])
        else:
            await self._app(scope, receive, send)
            return
        await _drain(scope, receive)
        await problems.send(refusal, send)

    async def _authority(self, words: list[str], visitor: Visitor) -> tuple[Actor, Grant]:
        try:
            actor, grant = await self._tokens.authority(_token_in(words))
        except Unauthorized:
            _require_calm(self._failures, visitor.origin, "wrong tokens")
            _log.info("token_refused", origin=visitor.origin)  # not more often than such answers
            raise
        _require_calm(self._requests, grant.token, "requests with this token")
        visitor.become(actor.uid)
        return actor, grant


def _token_in(words: list[str]) -> str:
    scheme, _, token = words[0].partition(" ") if len(words) == 1 else ("", "", "")
    if scheme.lower() != "bearer":
        raise unauthorized()
    return token.strip()


def _require_calm(pace: Pace, key: str | None, what: str) -> None:
    wait = pace.take(key, trio.current_time())
    if wait:
        seconds = math.ceil(wait)
        raise RateLimited(f"too many {what}", hint=f"Try again in {seconds} s.", retry_after_seconds=seconds)


async def _drain(scope: Any, receive: Any) -> None:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if not lengths or int(lengths[0]) > _DRAINED_BYTES:
        return
    with trio.move_on_after(_DRAIN_SECONDS):
        while (await receive()).get("more_body"):
            pass
