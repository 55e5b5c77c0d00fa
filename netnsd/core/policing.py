"""Keeps what the firewall holds of policies in step with policies and environments: one judgement for all, in turn.

An environment counts from when it is admitted, before anything runs in it, to when the last of it is gone. What many
ask for at about the same time is judged once.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

from netnsd.core import judging
from netnsd.core.batch import Batcher
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Adapters, Emit
from netnsd.core.judgement import Judgement, Span
from netnsd.core.policy import Policy, concerning
from netnsd.core.registry import Registry
from netnsd.errors import NetnsdError, PoliciesExhausted, StoreError

Key = tuple[int, str]  # of a policy: its user's id, its name
MOST_POLICIES = 64  # of one user
MOST_PARTS = 1024  # of one user's policies together: combinations of a rule's peers and its ports, and conditions
MOST_BYTES = 1 << 18  # of one user's documents, as JSON
_AT_ONCE = 256
# Of less, the way to another thread and back takes longer than the work.
_LARGE = 64


@dataclass(slots=True)
class _Change:
    """What somebody asks for. ``policies``: those that change, None for one that goes. ``error``: why it was not.

    ``blamed``: the user who is told where his policies come to too much with it; others' are closed then.
    """

    blamed: int | None = None
    admits: frozenset[str] = frozenset()
    leaves: frozenset[str] = frozenset()
    policies: Mapping[Key, Policy | None] = field(default_factory=dict)
    error: NetnsdError | None = None


class Policing:
    """Judges, while ``run`` runs.

    Args:
        supernet: the first and the last address of all that may be environments'.
    """

    def __init__(self, adapters: Adapters, registry: Registry, supernet: ipaddress.IPv4Network, emit: Emit) -> None:
        self._firewall = adapters.firewall
        self._store = adapters.store
        self._registry = registry
        self._supernet: Span = (int(supernet.network_address), int(supernet.broadcast_address))
        self._emit = emit
        self.policies: Mapping[Key, Policy] = {}
        self._absent: set[str] = set()  # ids of environments that do not count: not yet, or no more
        self._judgement: Judgement | None = None
        self._closed: frozenset[int] = frozenset()  # users whose policies come to too much, and let nothing
        self._changes: Batcher[_Change] = Batcher(self._work, _AT_ONCE)
        self._waiting = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work for ever."""
        task_status.started()
        await self._changes.run()

    def load(self) -> None:
        """Read what the state file knows. Raises StoreError."""
        self.policies = {(policy.uid, policy.name): policy for policy in self._store.policies()}

    async def begin(self) -> None:
        """At the daemon's start: judge what was read, whatever the kernel holds. Raises KernelError."""
        await self._ask(_Change())

    def expect(self, environment: Environment) -> bool:
        """Whether it has to be admitted before anything runs in it. Till then nothing is let to it or from it."""
        is_concerned = self.concerns(environment)
        if is_concerned:
            self._absent.add(environment.id)
        return is_concerned

    def concerns(self, environment: Environment) -> bool:
        """Whether it matters to policies what that environment is; while somebody waits, nobody knows."""
        return bool(self._waiting) or concerning(self.policies.values(), environment)

    async def admit(self, environment: Environment) -> None:
        """Have it judged, and everybody else for it. Raises PoliciesExhausted, KernelError: it does not count then."""
        await self._ask(_Change(environment.uid, admits=frozenset({environment.id})))

    async def follow(self, environment: Environment) -> None:
        """Have everybody judged as they are now: labels, ``share`` or ``egress`` of this one have changed.

        Raises PoliciesExhausted, KernelError, with nothing changed.
        """
        await self._ask(_Change(environment.uid))

    async def leave(self, environments: Sequence[Environment]) -> None:
        """Nothing is let any more to or from these, of which nothing is left. Raises KernelError."""
        if self._waiting or self.policies or any(e.egress != "allow" for e in environments):
            await self._ask(_Change(leaves=frozenset(environment.id for environment in environments)))

    async def change(self, policies: Mapping[Key, Policy | None]) -> None:
        """Have other policies: None for one that goes. All or none, stored too.

        Raises PoliciesExhausted, KernelError, StoreError, with nothing changed.
        """
        added = next((policy.uid for policy in policies.values() if policy is not None), None)
        await self._ask(_Change(added, policies=policies))

    async def _ask(self, change: _Change) -> None:
        self._waiting += 1
        try:
            await self._changes.do(change)
        finally:
            self._waiting -= 1
        if change.error is not None:
            raise change.error

    async def _work(self, changes: list[_Change]) -> None:
        """All at once; where that cannot be, each by itself, so that nobody fails for another's."""
        try:
            await self._judge(changes)
        except NetnsdError as error:
            if len(changes) == 1:
                changes[0].error = error
                return
            for change in changes:
                try:
                    await self._judge([change])
                except NetnsdError as own:
                    change.error = own

    async def _judge(self, changes: Sequence[_Change]) -> None:
        known = list(self._registry.all())
        absent = self._absent.copy()
        policies = dict(self.policies)
        changed: dict[Key, Policy | None] = {}
        for change in changes:
            absent -= change.admits
            absent |= change.leaves
            changed |= change.policies
        for key, policy in changed.items():
            policies.pop(key, None)
            if policy is not None:
                policies[key] = policy
        for uid in {uid for uid, _ in changed}:
            _check_bounds([policy for policy in policies.values() if policy.uid == uid])
        judgement, closed = await self._compiled(
            list(policies.values()), [e for e in known if e.id not in absent], {change.blamed for change in changes})
        if changed:
            self._write(changed)
        if judgement != self._judgement:
            try:
                await self._firewall.judge(judgement)
            except BaseException as error:
                if not isinstance(error, NetnsdError):
                    self._judgement = None  # nobody knows
                self._take_back(changed)
                raise
        self._judgement, self.policies = judgement, policies
        for uid in closed - self._closed:
            self._emit("policies_closed", uid, "", "", reason="they come to more passages than the host keeps")
        self._closed = closed
        # Others may have come meanwhile that are expected.
        for change in changes:
            self._absent -= change.admits
            self._absent |= change.leaves
        self._absent &= {environment.id for environment in self._registry.all()}

    async def _compiled(self, policies: Sequence[Policy], environments: Sequence[Environment],
                        blamed: Collection[int | None]) -> tuple[Judgement, frozenset[int]]:
        """The judgement, and whose policies are closed for it. Raises PoliciesExhausted for those of a blamed user."""
        closed: frozenset[int] = frozenset()
        if not policies and all(environment.egress == "allow" for environment in environments):
            return Judgement(), closed
        while True:
            judge = partial(judging.judge, policies, environments, self._supernet, closed)
            try:
                if len(policies) * len(environments) < _LARGE:
                    return judge(), closed
                return await trio.to_thread.run_sync(judge), closed
            except PoliciesExhausted as error:
                if error.details["uid"] in blamed:
                    raise
                closed |= {error.details["uid"]}

    def _take_back(self, policies: Mapping[Key, Policy | None]) -> None:
        try:
            if policies:
                self._write({key: self.policies.get(key) for key in policies})
        except StoreError as error:  # at its next start the daemon tries again what it could not do now
            for uid, name in policies:
                self._emit("store_failed", uid, "", name, reason=error.message)

    def _write(self, policies: Mapping[Key, Policy | None]) -> None:
        with self._store.transaction():
            for (uid, name), policy in policies.items():
                if policy is None:
                    self._store.delete_policy(uid, name)
                else:
                    self._store.set_policy(policy)


def _check_bounds(policies: Sequence[Policy]) -> None:
    """Raise PoliciesExhausted where these, all of one user, are too many or say too much."""
    if len(policies) > MOST_POLICIES:
        raise PoliciesExhausted(f"{len(policies)} policies are more than {MOST_POLICIES}, which one user may have",
                                hint="Join some: a policy may have many rules.")
    parts = sum(policy.parts for policy in policies)
    if parts > MOST_PARTS:
        raise PoliciesExhausted(f"the policies of {policies[0].user!r} come to {parts} combinations of peers and"
                                f" ports and conditions on labels, more than {MOST_PARTS}",
                                hint="Name fewer peers, or ranges of ports.")
    size = sum(len(msgspec.json.encode(policy.document)) for policy in policies)
    if size > MOST_BYTES:
        raise PoliciesExhausted(f"the policies of {policies[0].user!r} would take {size} bytes, more than {MOST_BYTES}",
                                hint="Leave annotations out, or join some.")
