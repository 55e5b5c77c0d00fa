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
from netnsd.core.traffic import EVERYTHING, Reach, Traffic, common, common_reach, reach_of, united, without
from netnsd.errors import PoliciesExhausted

# The kernel's set takes many more, but any change of it takes a copy, 9 microseconds for each, and 27 where many are
# replaced; and meanwhile nothing can be wired.
MOST_PASSAGES = 32768
MOST_PASSAGES_EACH = 8192
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
                    reach = tuple(sorted(reach + inward(one.incoming)))
                targets.setdefault((one.uid, reach), []).extend(one.members)
            if is_confined:
                sources.setdefault((one.uid, outward(one.outgoing, one.egress)), []).extend(one.members)
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
            traffic = _let((self._incoming[number] for number in target.incoming), source)
            if traffic and source.outgoing:
                traffic = common(traffic, _let((self._outgoing[number] for number in source.outgoing), target))
            if traffic:
                by_traffic.setdefault(traffic, []).extend(source.members)
        return tuple(sorted((span, traffic) for traffic, places in by_traffic.items() for span in self._spans(places)))

    def _outward(self, policies: tuple[int, ...], field_of: str) -> Reach:
        allowed = common_reach(egress.reach(field_of), self._outside)
        if not policies:
            return allowed
        let = _outside_of(tuple(self._policies[n] for n in policies), self._outside, inward=False)
        return common_reach(allowed, let)

    def _inward(self, policies: tuple[int, ...]) -> Reach:
        return _outside_of(tuple(self._policies[n] for n in policies), self._outside, inward=True)

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
            raise PoliciesExhausted("the policies come to more passages than the host keeps: at most"
                                    f" {MOST_PASSAGES_EACH} of one user, and {MOST_PASSAGES} of all",
                                    hint="Name fewer ports and blocks, or select fewer environments.", uid=most)


@lru_cache(maxsize=4096)  # most of the work, and the same each time while a policy is
def _outside_of(policies: tuple[Policy, ...], outside: Reach, *, inward: bool) -> Reach:
    """What these policies together let from outside, or to it."""
    rules = [rule for policy in policies for rule in (policy.ingress if inward else policy.egress) or ()]
    reach = reach_of((span, rule.traffic) for rule in rules
                     for span in ([egress.ALL_ADDRESSES] if rule.is_for_all else rule.blocks))
    return common_reach(reach, outside)


def _let(lets: Iterable[list[tuple[int, Traffic]]], peer: _Class) -> Traffic:
    return united(traffic for some in lets for mask, traffic in some if mask & peer.known)


def _address(environment: Environment) -> int:
    return int(ipaddress.IPv4Address(environment.slot.address))
