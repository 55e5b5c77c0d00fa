"""NetworkPolicy documents as users have them: applied, shown, removed. What they come to is ``policing``'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from netnsd.core.actor import Actor, Members
from netnsd.core.interfaces import Clock, Emit
from netnsd.core.policing import Key, Policing
from netnsd.core.policy import Policy
from netnsd.core.policy_documents import documents_of, name_and_namespace, policy_of
from netnsd.core.registry import Registry
from netnsd.errors import Forbidden, InvalidPolicy, NotFound


class Policies:
    """All policies of this host."""

    def __init__(self, policing: Policing, registry: Registry, clock: Clock, members: Members, emit: Emit) -> None:
        self._policing = policing
        self._registry = registry
        self._clock = clock
        self._members = members
        self._emit = emit

    async def apply(self, given: Sequence[Any], actor: Actor) -> list[Policy]:
        """Have these policies, in place of those of the same names: all, or none. They act when this returns.

        Raises InvalidPolicy, Forbidden, PoliciesExhausted, KernelError, StoreError.
        """
        policies: dict[Key, Policy] = {}
        now = self._clock.now()
        for document in documents_of(given):
            name, namespace = name_and_namespace(document)
            uid, user = await self._owner(namespace, name, actor)
            if (uid, name) in policies:
                raise InvalidPolicy(f"policy {name!r} is given twice", hint="Give each its own name.",
                                    field="metadata.name")
            # Not in the loop that serves everybody: a large one takes a while.
            policies[uid, name] = await trio.to_thread.run_sync(policy_of, document, uid, user, now)
        if policies:
            await self._policing.change(policies)
        for policy in policies.values():
            self._emit("policy_applied", policy.uid, "", policy.name)
        return list(policies.values())

    async def remove(self, ref: str, actor: Actor) -> None:
        """Have a policy no more. Raises NotFound, PoliciesExhausted, KernelError, StoreError."""
        policy = self.find(ref, actor)
        await self._policing.change({(policy.uid, policy.name): None})
        self._emit("policy_removed", policy.uid, "", policy.name)

    def find(self, ref: str, actor: Actor) -> Policy:
        """The policy that ``actor`` means: a name of its own, or NAME.USER. Raises NotFound."""
        policies = self._policing.policies
        found = policies.get((actor.uid, ref)) or next(
            (p for p in policies.values() if f"{p.name}.{p.user}" == ref and actor.may_see(p.uid)), None)
        if found is None:
            raise NotFound(f"there is no policy {ref[:80]!r}", hint="`netnsctl policy ls` lists yours.", ref=ref[:80])
        return found

    def visible(self, actor: Actor, *, everyones: bool) -> list[Policy]:
        """The actor's own, or all that it may see, by user and name."""
        return sorted((p for p in self._policing.policies.values()
                       if (actor.may_see(p.uid) if everyones else p.uid == actor.uid)), key=lambda p: (p.user, p.name))

    def selected(self, policy: Policy) -> list[str]:
        """The names of the environments that it is about, but for those in stock, which have none yet."""
        return [e.name for e in self._registry.all() if policy.selects(e) and not e.stock]

    async def _owner(self, namespace: str | None, name: str, actor: Actor) -> tuple[int, str]:
        if namespace in (None, actor.user):
            return actor.uid, actor.user
        assert namespace is not None
        if not actor.is_admin:
            raise Forbidden(f"policy {name!r} is for {namespace[:80]!r}, and you are {actor.user!r}",
                            hint="A namespace is a user: leave metadata.namespace out.")
        found = await self._members("user", namespace)
        if found is None:
            raise InvalidPolicy(f"policy {name!r}: metadata.namespace {namespace[:80]!r} is no user of this host",
                                hint="A namespace is a user.", field="metadata.namespace")
        return found[0], namespace
