"""From policies and environments to what the firewall is to hold: few boxes that do not overlap. Pure.

Environments that nothing tells apart are one class, and what matters is decided for two classes at a time. In the end
neighbours with the same rights become one span: by slots, so that addresses between two bridges do not part them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

from netnsd.core import egress
from netnsd.core.environment import Environment
from netnsd.core.judgement import Judgement, Passage, Span
from netnsd.core.policy import Peers, Policy, Rule
from netnsd.core.traffic import EVERYTHING, NOTHING, Reach, Traffic, common, common_reach, reach_of, united, without
from netnsd.errors import PoliciesExhausted

# The kernel's set takes many more, but any change of it takes a copy, 9 microseconds for each, and 27 where many are
# replaced; and meanwhile nothing can be wired.
MOST_PASSAGES = 32768
MOST_PASSAGES_EACH = 8192
# Steps of one user's policies, some 0.3 microseconds each: whoever comes or goes meanwhile waits.
MOST_STEPS_EACH = 1 << 20
# To join what one part of a rule lets with what the others do.
_STEPS_OF_PART = 64
_EVERYBODY = 1


def judge(policies: Sequence[Policy], environments: Iterable[Environment], supernet: Span,
          closed: frozenset[int] = frozenset()) -> Judgement:
    """What these policies, and the ``egress`` of each environment, come to.

    Between environments the baseline is deny: one that no ingress policy selects lets none in, and one that no egress
    policy selects may go. To the outside, policies and ``egress`` must both agree. From the outside, those with an
    ingress policy are reached as it says, if they are shared with the network.

    Args:
        policies: everybody's.
        environments: all that there are.
        supernet: first and last address of all that may be environments'.
        closed: ids of users whose policies let nothing, as they come to too much.

    Raises PoliciesExhausted where that is more than the kernel is to hold; details: ``uid``, whose it is for the most
    part.
    """
    return _Judge(policies, sorted(environments, key=lambda e: e.slot.index), supernet, closed).judgement()


@dataclass(slots=True)
class _Class:
    """Environments that all policies treat alike. ``known`` has a bit for each of the peers that they are of."""

    uid: int
    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    known: int
    egress: str
    is_shared: bool
    members: list[int] = field(default_factory=list)


class _Judge:
    """``places``: of the environments, in the order of their slots."""

    def __init__(self, policies: Sequence[Policy], environments: list[Environment], supernet: Span,
                 closed: frozenset[int]) -> None:
        self._closed = closed
        self._environments = environments
        self._addresses = [_address(environment) for environment in environments]
        self._outside: Reach = tuple((span, EVERYTHING) for span in without([egress.ALL_ADDRESSES], [supernet]))
        self._policies = policies
        self._bits: dict[Peers, int] = {}
        self._incoming = [self._lets(policy.ingress) for policy in policies]
        self._outgoing = [self._lets(policy.egress) for policy in policies]
        self._classes = self._sorted_out()
        self._let: dict[tuple[bool, tuple[int, ...], int], Traffic] = {}
        self._steps: dict[int, int] = {}
        self._passages: list[Passage] = []
        self._counts: dict[int, int] = {}

    def judgement(self) -> Judgement:
        confined: set[int] = set()
        shielded: set[int] = set()
        targets: dict[tuple[int, Reach], list[int]] = {}
        sources: dict[tuple[int, Reach], list[int]] = {}
        outward, inward = cache(self._outward), cache(self._inward)
        for one in self._classes:
            members = [self._addresses[place] for place in one.members]
            is_confined = bool(one.outgoing) or one.egress != egress.ALLOW
            shielded.update(members if one.incoming else ())
            confined.update(members if is_confined else ())
            if one.uid in self._closed:
                continue
            if one.incoming:
                reach = self._from_environments(one)
                if one.is_shared:
                    reach = tuple(sorted(reach + inward(one.uid, one.incoming)))
                targets.setdefault((one.uid, reach), []).extend(one.members)
            if is_confined:
                sources.setdefault((one.uid, outward(one.uid, one.outgoing, one.egress)), []).extend(one.members)
        for (uid, reach), places in targets.items():
            for span in self._spans(places):
                self._pass(uid, [Passage(peers, span, *box) for peers, traffic in reach for box in traffic])
        for (uid, reach), places in sources.items():
            for span in self._spans(places):
                self._pass(uid, [Passage(span, peers, *box) for peers, traffic in reach for box in traffic])
        return Judgement(frozenset(self._passages), frozenset(confined), frozenset(shielded))

    def _lets(self, rules: Iterable[Rule] | None) -> list[tuple[int, Traffic]]:
        """Rules as bits of the peers that they are for, and what they let. Everybody has the first bit."""
        lets = []
        for rule in rules or ():
            mask = _EVERYBODY if rule.is_for_all else 0
            for peers in rule.peers:
                mask |= self._bits.setdefault(peers, _EVERYBODY << len(self._bits) + 1)
            lets.append((mask, rule.traffic))
        return lets

    def _sorted_out(self) -> list[_Class]:
        classes: dict[tuple[object, ...], _Class] = {}
        of_user: dict[int, list[tuple[int, Policy]]] = {}
        for number, policy in enumerate(self._policies):
            of_user.setdefault(policy.uid, []).append((number, policy))
        for place, environment in enumerate(self._environments):
            selecting = [(n, p) for n, p in of_user.get(environment.uid, ()) if p.selects(environment)]
            incoming = tuple(n for n, p in selecting if p.ingress is not None)
            outgoing = tuple(n for n, p in selecting if p.egress is not None)
            known = _EVERYBODY | sum(bit for peers, bit in self._bits.items() if peers.match(environment))
            key = (environment.uid, incoming, outgoing, known, environment.egress, environment.share == "lan")
            if key not in classes:
                classes[key] = _Class(*key)
            classes[key].members.append(place)
        return list(classes.values())

    def _from_environments(self, target: _Class) -> Reach:
        """Who of the environments reaches these, and how."""
        by_traffic: dict[Traffic, list[int]] = {}
        for source in self._classes:
            traffic = self._traffic(target, source, is_incoming=True)
            if traffic and source.outgoing:
                others = self._traffic(source, target, is_incoming=False)
                self._step(target.uid, len(traffic))
                self._step(source.uid, len(others))
                traffic = common(traffic, others)
            if traffic:
                by_traffic.setdefault(traffic, []).extend(source.members)
        found = sorted((span, traffic) for traffic, places in by_traffic.items() for span in self._spans(places))
        _require_few(found, target.uid)
        return tuple(found)

    def _traffic(self, one: _Class, peer: _Class, *, is_incoming: bool) -> Traffic:
        """What the policies that select one class let with another. All that are alike have the same."""
        if one.uid in self._closed:
            return NOTHING
        numbers = one.incoming if is_incoming else one.outgoing
        key = (is_incoming, numbers, peer.known)
        if key not in self._let:
            lets = self._incoming if is_incoming else self._outgoing
            self._step(one.uid, sum(len(lets[number]) for number in numbers))
            self._let[key] = united(traffic for number in numbers for mask, traffic in lets[number]
                                    if mask & peer.known)
        return self._let[key]

    def _outward(self, uid: int, numbers: tuple[int, ...], field_of: str) -> Reach:
        allowed = common_reach(egress.reach(field_of), self._outside)
        if not numbers:
            return allowed
        return common_reach(allowed, self._outside_of(uid, [self._policies[n].egress for n in numbers]))

    def _inward(self, uid: int, numbers: tuple[int, ...]) -> Reach:
        return self._outside_of(uid, [self._policies[n].ingress for n in numbers])

    def _outside_of(self, uid: int, rules: Iterable[tuple[Rule, ...] | None]) -> Reach:
        some = tuple(rule for those in rules for rule in those or () if rule.is_for_all or rule.blocks)
        self._step(uid, _STEPS_OF_PART * sum(rule.parts for rule in some))
        return _outside_of(some, self._outside, uid)

    def _step(self, uid: int, count: int) -> None:
        self._steps[uid] = self._steps.get(uid, 0) + count
        if self._steps[uid] > MOST_STEPS_EACH:
            raise PoliciesExhausted("the policies of one user take the host too long to judge",
                                    hint="Name fewer peers, ports and blocks, or select fewer environments.", uid=uid)

    def _spans(self, places: list[int]) -> list[Span]:
        """Addresses of environments, as few spans with no other environment's in them."""
        found: list[list[int]] = []
        for place in sorted(places):
            slot = self._environments[place].slot.index
            if found and self._environments[found[-1][1]].slot.index + 1 == slot:
                found[-1][1] = place
            else:
                found.append([place, place])
        return [(self._addresses[first], self._addresses[last]) for first, last in found]

    def _pass(self, uid: int, passages: list[Passage]) -> None:
        self._passages += passages
        self._counts[uid] = self._counts.get(uid, 0) + len(passages)
        if self._counts[uid] > MOST_PASSAGES_EACH or len(self._passages) > MOST_PASSAGES:
            most = uid if self._counts[uid] > MOST_PASSAGES_EACH else max(self._counts, key=lambda u: self._counts[u])
            raise _too_many(most)


# Most of the work, and the same each time while the rules are. Not by policies, whose documents would be kept.
@lru_cache(maxsize=128)
def _outside_of(rules: tuple[Rule, ...], outside: Reach, uid: int) -> Reach:
    """What these rules of a user's together let from outside, or to it."""
    reach = reach_of((span, rule.traffic) for rule in rules
                     for span in ([egress.ALL_ADDRESSES] if rule.is_for_all else rule.blocks))
    _require_few(reach, uid)
    return common_reach(reach, outside)


def _require_few(reach: Sequence[tuple[Span, Traffic]], uid: int) -> None:
    """Raise PoliciesExhausted for what could never be held: to keep it, and to go on with it, costs much too."""
    if sum(len(traffic) for _, traffic in reach) > MOST_PASSAGES_EACH:
        raise _too_many(uid)


def _too_many(uid: int) -> PoliciesExhausted:
    return PoliciesExhausted("the policies come to more passages than the host keeps: at most"
                             f" {MOST_PASSAGES_EACH} of one user, and {MOST_PASSAGES} of all",
                             hint="Name fewer ports and blocks, or select fewer environments.", uid=uid)


def _address(environment: Environment) -> int:
    return int(ipaddress.IPv4Address(environment.slot.address))
