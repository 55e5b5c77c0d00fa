"""Bearer tokens: who may ask without the kernel's word for it, and for what.

A token is 256 random bits, and what is kept of it is SHA-256. A slow hash is for what people make up: it makes each
guess dear where there are few to be made. Nobody guesses 256 bits, however fast; a slow hash would only let whoever
sends wrong tokens keep us busy.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from netnsd import wire
from netnsd.core import specification
from netnsd.core.environment import Token
from netnsd.errors import Forbidden, InvalidRequest, NameTaken, NotFound, Unauthorized

if TYPE_CHECKING:
    from netnsd.core.actor import Actor, Login
    from netnsd.core.interfaces import Clock, Emit, Store

MOST_TOKENS = 100
MOST_SECONDS = 10 * 365 * 86400.0
# The id tells an owner which of its tokens was found somewhere; the rest is the secret. The prefix is for programs that
# look for secrets in what people publish.
_SHAPE = re.compile(r"netnsd_([0-9a-f]{12})_[0-9a-f]{64}\Z")
_SCOPES: tuple[wire.Scope, ...] = ("read", "write", "admin")
_NOBODYS = bytes(32)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do at most. ``token``: the id of the one that it came with; None: it needed none."""

    scope: wire.Scope
    token: str | None = None

    def covers(self, scope: wire.Scope) -> bool:
        """Whether what needs ``scope`` may be done."""
        return _SCOPES.index(self.scope) >= _SCOPES.index(scope)

    def require(self, scope: wire.Scope) -> None:
        """Raises Forbidden where what needs ``scope`` may not be done."""
        if not self.covers(scope):
            raise Forbidden(f"that needs the scope {scope}, and the token's is {self.scope}",
                            hint="An admin's scope counts only while its owner is an admin." if scope == "admin" else
                            f"Use another token: netnsctl token create NAME --scope {scope}.", scope=scope)


# Who is vouched for by the kernel needs no token.
VOUCHED_FOR = Grant("admin")


class Tokens:
    """All tokens of this host.

    Args:
        login: who a user is now.
    """

    def __init__(self, store: Store, clock: Clock, login: Login, emit: Emit) -> None:
        self._store = store
        self._clock = clock
        self._login = login
        self._emit = emit
        self._by_id = {token.id: token for token in store.tokens()}

    async def authority(self, text: str) -> tuple[Actor, Grant]:
        """Who asks with a token, and what it may: never more than its owner may now. Raises Unauthorized."""
        return await self._standing(self.verify(text))

    async def confirm(self, grant: Grant) -> None:
        """For what goes on after its request was let in: its right is what it was. Raises Unauthorized."""
        if grant.token is None:
            return
        self.require(grant)
        _, now = await self._standing(self._by_id[grant.token])
        if now != grant:
            raise unauthorized()

    def require(self, grant: Grant) -> None:
        """As ``confirm``, without a look at the account, which may take long. Raises Unauthorized."""
        token = self._by_id.get(grant.token or "")
        if grant.token is not None and (token is None or self._is_over(token)):
            raise unauthorized()

    async def _standing(self, token: Token | None) -> tuple[Actor, Grant]:
        owner = None if token is None else await self._login(token.uid)
        # It may have been revoked meanwhile; and a uid may have become somebody else's.
        if token is None or owner is None or owner.user != token.user or token.id not in self._by_id:
            raise unauthorized()
        scope = "write" if token.scope == "admin" and not owner.is_admin else token.scope
        return replace(owner, is_admin=owner.is_admin and scope == "admin", how="token"), Grant(scope, token.id)

    def verify(self, text: str) -> Token | None:
        """The token that ``text`` is, where it is good. Takes as long for any that is not."""
        match = _SHAPE.match(text)
        token = self._by_id.get(match[1]) if match else None
        is_it = hmac.compare_digest(_hash(text), _NOBODYS if token is None else token.hash)
        return token if is_it and token is not None and not self._is_over(token) else None

    async def issue(self, request: wire.TokenRequest, actor: Actor, grant: Grant) -> wire.IssuedToken:
        """Make a token. One that is made with another ends with that.

        Raises InvalidName, InvalidRequest, Forbidden, NameTaken.
        """
        name = specification.check_name(request.name, what="token name")
        seconds = request.expires_seconds
        if seconds is not None and not 1 <= seconds <= MOST_SECONDS:
            raise InvalidRequest(f"expires_seconds {seconds:.0f} is not from 1 to {MOST_SECONDS:.0f}, ten years",
                                 hint="Leave it out for a token that does not expire.")
        grant.require(request.scope)
        owner = await self._owner(request, actor)
        if request.scope == "admin" and not (actor.is_admin and owner.is_admin):
            raise Forbidden("only an admin may have a token of the scope admin", hint="Ask for the scope write.")
        self._drop_expired(owner.uid)
        own = [t for t in self._by_id.values() if t.uid == owner.uid]
        if any(t.name == name for t in own):
            raise NameTaken(f"there is a token {name!r} already", hint="Choose another name, or revoke it.", name=name)
        if len(own) >= MOST_TOKENS:
            raise InvalidRequest(f"there are {MOST_TOKENS} tokens already", hint="Revoke one.")
        parent = None if grant.token is None else self._by_id.get(grant.token)
        if grant.token is not None and parent is None:  # revoked meanwhile
            raise unauthorized()
        now = self._clock.now()
        expiries = [*([] if seconds is None else [_later(now, seconds)]),
                    *([] if parent is None or parent.expires_at is None else [parent.expires_at])]
        token_id = secrets.token_hex(6)
        text = f"netnsd_{token_id}_{secrets.token_hex(32)}"
        token = Token(token_id, name, owner.uid, owner.user, _hash(text), request.scope,
                      None if parent is None else parent.id, now, min(expiries, default=None))
        with self._store.transaction():
            self._store.add_token(token)
        self._by_id[token_id] = token
        self._emit("token_created", token.uid, "", name, token=token_id, scope=token.scope, by=actor.user)
        return wire.IssuedToken(**_fields(token, is_over=False), token=text)

    def revoke(self, ref: str, actor: Actor) -> None:
        """Revoke one of the actor's by name, or by id one that it may see, with all that were made with it.

        Raises NotFound.
        """
        own = next((t for t in self._by_id.values() if t.uid == actor.uid and t.name == ref), None)
        token = own or self._by_id.get(ref)
        if token is None or not actor.may_see(token.uid):
            raise NotFound(f"there is no token {ref[:80]!r}", ref=ref[:80], hint="`netnsctl token ls` lists yours."
                           + (" Another's is revoked by its id: `token ls --all`." if actor.is_admin else ""))
        for gone in self._forget(token):
            self._emit("token_revoked", gone.uid, "", gone.name, token=gone.id, by=actor.user)

    def shown(self, actor: Actor, *, everyones: bool) -> list[wire.Token]:
        """The actor's own, or all that it may see, oldest first."""
        return [wire.Token(**_fields(t, is_over=self._is_over(t))) for t in self._by_id.values()
                if t.uid == actor.uid or (everyones and actor.may_see(t.uid))]

    async def _owner(self, request: wire.TokenRequest, actor: Actor) -> Actor:
        if request.user is not None and request.user != actor.user and not actor.is_admin:
            raise Forbidden("only an admin may create a token for another user", hint="Leave user out.")
        owner = await self._login(actor.uid if request.user is None else request.user)
        if owner is None:
            raise InvalidRequest(f"there is no account of {(request.user or actor.user)[:80]!r} on this host",
                                 hint="A token is a local user's.")
        if owner.uid != actor.uid and not actor.is_admin:
            # A connection may be older than its user's account; the name may be somebody else's by now.
            raise Forbidden("only an admin may create a token for another user", hint="Leave user out.")
        if owner.uid == 0 and actor.uid != 0:  # an admin is not root
            raise Forbidden("only root may create a token for root", hint="Ask root.")
        return owner

    def _drop_expired(self, uid: int) -> None:
        """Whose time is over for good: their names are free again."""
        for token in [t for t in self._by_id.values() if t.uid == uid and self._is_over(t)]:
            self._forget(token)

    def _forget(self, token: Token) -> list[Token]:
        if token.id not in self._by_id:
            return []
        with self._store.transaction():
            self._store.delete_token(token.id)
        gone = [self._by_id.pop(token.id)]
        for parent in gone:  # grows
            children = [t for t in self._by_id.values() if t.parent == parent.id]
            gone += [self._by_id.pop(child.id) for child in children]
        return gone

    def _is_over(self, token: Token) -> bool:
        return token.expires_at is not None and token.expires_at <= self._clock.now()


def unauthorized() -> Unauthorized:
    """The one answer to every token that is not good: it does not tell which was one once."""
    return Unauthorized("a good token is needed",
                        hint="Send `Authorization: Bearer TOKEN`, of `netnsctl token create`.")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _later(now: str, seconds: float) -> str:
    """RFC 3339 as ``Clock`` writes it, which sorts as time goes."""
    then = datetime.datetime.fromisoformat(now) + datetime.timedelta(seconds=seconds)
    return then.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _fields(token: Token, *, is_over: bool) -> dict[str, Any]:
    return {"id": token.id, "name": token.name, "owner": wire.Owner(uid=token.uid, user=token.user),
            "scope": token.scope, "parent": token.parent, "created_at": token.created_at,
            "expires_at": token.expires_at, "expired": is_over}
