"""What policies come to: compared, packet by packet, with an oracle that reads the documents as they are written."""

from __future__ import annotations

import ipaddress
import sys
from itertools import combinations, pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netnsd.core import judging
from netnsd.core.environment import Environment
from netnsd.core.judgement import Judgement, Passage, Span
from netnsd.core.policy import concerning
from netnsd.core.traffic import EVERYTHING, Traffic, common, without
from netnsd.errors import PoliciesExhausted
from tests.policies import worlds
from tests.policies.oracle import ICMP, SCTP, TCP, UDP, Pod
from tests.policies.worlds import SUPERNET, document, environment, pod, policies, world

PROTOCOLS = (TCP, UDP, SCTP, ICMP)


def number(address: str) -> int:
    return int(ipaddress.ip_address(address))


def judged(environments: list[Environment], documents: list[tuple[str, dict[str, object]]]) -> Judgement:
    return judging.judge(policies(documents), environments, SUPERNET)


def passes(judgement: Judgement, source: Pod | str, target: Pod | str, protocol: int, port: int) -> bool:
    """What the firewall makes of it, as ``Judgement`` says."""
    first, second = (number(one.address if isinstance(one, Pod) else one) for one in (source, target))
    if not isinstance(target, Pod) and first not in judgement.confined:
        return True
    if isinstance(target, Pod) and not isinstance(source, Pod) and target.share != "lan":
        return False
    if isinstance(target, Pod) and not isinstance(source, Pod) and second not in judgement.shielded:
        return True
    return any(p.sources[0] <= first <= p.sources[1] and p.targets[0] <= second <= p.targets[1]
               and p.protocols[0] <= protocol <= p.protocols[1] and p.ports[0] <= port <= p.ports[1]
               for p in judgement.passages)


def meet(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) <= min(one[1], other[1])


@settings(max_examples=75, deadline=None)
@given(worlds.environments, worlds.documents)
def test_every_packet_goes_as_the_documents_say(
        environments: list[Environment], documents: list[tuple[str, dict[str, object]]]) -> None:
    truth, judgement = world(environments, documents), judged(environments, documents)
    ends: list[Pod | str] = [*truth.pods, *worlds.ADDRESSES]
    for source, target in product(ends, ends):
        if source is target or not (isinstance(source, Pod) or isinstance(target, Pod)):
            continue
        for protocol, port in product(PROTOCOLS, worlds.PORTS):
            assert (passes(judgement, source, target, protocol, port)
                    == truth.lets(source, target, protocol, port)), (source, target, protocol, port)


@settings(max_examples=50, deadline=None)
@given(worlds.environments, worlds.documents)
def test_passages_do_not_overlap_and_hold_nobodys_slot(
        environments: list[Environment], documents: list[tuple[str, dict[str, object]]]) -> None:
    judgement = judged(environments, documents)
    for one, other in combinations(judgement.passages, 2):
        assert not (meet(one.sources, other.sources) and meet(one.targets, other.targets)
                    and meet(one.protocols, other.protocols) and meet(one.ports, other.ports)), (one, other)
    free = {number(worlds.PLAN.slot(index).address) for index in range(20)} - {
        number(e.slot.address) for e in environments}
    for passage in judgement.passages:
        assert not any(low <= address <= high for low, high in (passage.sources, passage.targets) for address in free)


@settings(max_examples=50, deadline=None)
@given(worlds.environments, worlds.documents)
def test_who_does_not_concern_any_policy_changes_nothing_by_coming(
        environments: list[Environment], documents: list[tuple[str, dict[str, object]]]) -> None:
    if environments and not concerning(policies(documents), environments[0]):
        with_it, without = judged(environments, documents), judged(environments[1:], documents)
        # A span may go over a slot that is free, or not; who is in it decides.
        assert (with_it.confined, with_it.shielded) == (without.confined, without.shielded)
        address = number(environments[0].slot.address)
        assert not any(low <= address <= high for p in with_it.passages for low, high in (p.sources, p.targets))


def test_five_hundred_that_all_may_talk_are_few_boxes() -> None:
    environments = [environment(index, "alice") for index in range(500)]
    judgement = judged(environments, [("alice", document("all", {"ingress": [{"from": [{"podSelector": {}}]}]}))])
    whole = (number(environments[0].slot.address), number(environments[-1].slot.address))
    assert judgement.passages == {Passage(whole, whole)}, "one, over a hundred bridges"
    assert len(judgement.shielded) == 500
    assert judgement.confined == set()


def test_neighbours_of_another_user_part_a_span() -> None:
    environments = [environment(index, "bob" if index == 2 else "alice") for index in range(5)]
    judgement = judged(environments, [("alice", document("all", {"ingress": [{"from": [{"podSelector": {}}]}]}))])
    assert len(judgement.passages) == 4


def test_more_passages_than_a_user_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [environment(index, "alice" if index % 2 else "bob") for index in range(20)]
    documents = [("alice", document("all", {"ingress": [{"from": [{"podSelector": {}}]}]}))]
    assert len(judged(environments, documents).passages) == 100
    for name in ("MOST_PASSAGES_EACH", "MOST_PASSAGES"):
        with monkeypatch.context() as bound:
            bound.setattr(judging, name, 100)
            judged(environments, documents)
            bound.setattr(judging, name, 99)
            with pytest.raises(PoliciesExhausted):
                judged(environments, documents)


def test_whose_policies_are_closed_lets_nothing_that_they_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [environment(index, ("alice", "bob")[index % 2], share="lan") for index in range(6)]
    documents = [(user, document("all", {"ingress": [{}], "egress": [{}]})) for user in ("alice", "bob")]
    judgement = judging.judge(policies(documents), environments, SUPERNET, frozenset({worlds.USERS["alice"]}))
    ends: list[Pod | str] = [*map(pod, environments), "192.0.2.1"]
    for source, target in product(ends, ends):
        if source is not target:
            is_hers = any(isinstance(end, Pod) and end.user == "alice" for end in (source, target))
            assert passes(judgement, source, target, TCP, 80) is not is_hers
    monkeypatch.setattr(judging, "MOST_PASSAGES", 3)
    with pytest.raises(PoliciesExhausted) as caught:
        judging.judge(policies([documents[0], *documents, documents[1]]), environments, SUPERNET)
    assert caught.value.details["uid"] in worlds.USERS.values()


MANY = [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"n": str(number)}}}],
         "ports": [{"port": 2 * number + 1}]} for number in range(30)]


@pytest.mark.parametrize("spec", [
    {"ingress": MANY}, {"ingress": [{}], "egress": [{"to": rule["from"], "ports": rule["ports"]} for rule in MANY]},
    {"ingress": [{"ports": rule["ports"]} for rule in MANY], "egress": [{"ports": rule["ports"]} for rule in MANY]},
    {"egress": [{"to": [{"ipBlock": {"cidr": f"10.{number}.0.0/16"}}]} for number in range(30)]}])
def test_who_takes_too_long_to_judge_is_refused_and_once_closed_takes_no_time(
        monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]) -> None:
    """Nobody's creation and removal waits for long, however few passages another's policies come to."""
    environments = [environment(index, ("alice", "bob")[index % 2], labels={"n": str(index)}) for index in range(8)]
    documents = [("alice", document("slow", spec)), ("bob", document("open", {"ingress": [{}]}))]
    judged(environments, documents)
    monkeypatch.setattr(judging, "MOST_STEPS_EACH", 100)
    with pytest.raises(PoliciesExhausted) as caught:
        judged(environments, documents)
    assert caught.value.details["uid"] == worlds.USERS["alice"]
    closed = judging.judge(policies(documents), environments, SUPERNET, frozenset({worlds.USERS["alice"]}))
    assert {passage.targets[0] for passage in closed.passages} <= {number(e.slot.address) for e in environments[1::2]}


def test_what_could_never_be_held_is_refused_before_it_is_whole() -> None:
    """512 holes with other ports each are 262 144 boxes, and as many for each environment with other labels."""
    spec = {"egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": [f"{n >> 1}.{n % 2 * 128}.0.0/16"]}}],
                        "ports": [{"port": 2 * n + 1}]} for n in range(500)]}
    with pytest.raises(PoliciesExhausted):
        judging._outside_of(policies([("alice", document("holes", spec))])[0].egress or (),
                            (((0, (1 << 32) - 1), EVERYTHING),), 1001)


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda one: (one[0], sum(one))), max_size=8)


@given(spans, spans)
def test_holes_are_cut_out(some: list[Span], holes: list[Span]) -> None:
    left = without(some, holes)
    numbers = {n for first, last in some for n in range(first, last + 1)} - {
        n for first, last in holes for n in range(first, last + 1)}
    assert [n for first, last in left for n in range(first, last + 1)] == sorted(numbers)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(left))


traffics = st.tuples(spans, spans).map(lambda pair: tuple(
    (protocols, span) for protocols, some in zip(((6, 6), (17, 17)), pair, strict=True) for span in without(some, [])))


@given(traffics, traffics)
def test_common_traffic_is_in_both(one: Traffic, other: Traffic) -> None:
    def members(traffic: Traffic) -> set[tuple[int, int]]:
        return {(protocols[0], n) for protocols, (first, last) in traffic for n in range(first, last + 1)}

    found = common(one, other)
    assert members(found) == members(one) & members(other)
    assert list(found) == sorted(found)


def test_many_holes_are_cut_in_steps_that_grow_with_them_alone() -> None:
    """Half a megabyte of them took minutes, in the loop that serves everybody."""
    steps = 0

    def count(_frame: object, event: str, _argument: object) -> Any:
        nonlocal steps
        steps += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        left = without([(0, 1 << 20)], [(4 * n, 4 * n + 1) for n in range(1, 1001)])
    finally:
        sys.settrace(before)
    assert len(left) == 1001
    assert steps < 50_000
