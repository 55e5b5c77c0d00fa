"""Every field of a NetworkPolicy is understood as upstream says, or refused by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from netnsd.core.policy import Peers, Requirement, Selector
from netnsd.core.policy_documents import MOST_DOCUMENTS, documents_of, name_and_namespace, policy_of
from netnsd.core.traffic import EVERYTHING
from netnsd.errors import InvalidPolicy
from tests.policies.worlds import document, environment

WHOLE: dict[str, Any] = document("whole", {
    "podSelector": {"matchLabels": {"app": "db"}, "matchExpressions": [
        {"key": "tier", "operator": "In", "values": ["a", "b"]}, {"key": "old", "operator": "DoesNotExist"}]},
    "policyTypes": ["Ingress", "Egress"],
    "ingress": [{"from": [{"podSelector": {}}, {"namespaceSelector": {}, "podSelector": {}},
                          {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                 "ports": [{"port": 80, "endPort": 90, "protocol": "TCP"}, {"protocol": "SCTP"}]}],
    "egress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 53, "protocol": "UDP"}]}]},
    namespace="alice", labels={"kept": "yes"}, annotations={"note": ""})


def changed(path: str, value: Any) -> dict[str, Any]:
    """The whole document with one field another; ``...`` takes it away."""
    made = copy.deepcopy(WHOLE)
    where: Any = made
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        where = where[part]
    if value is ...:
        del where[last]
    elif isinstance(where, list) and last == len(where):
        where.append(value)
    else:
        where[last] = value
    return made


def parsed(tree: Any) -> Any:
    return policy_of(tree, 1001, "alice", "now")


def test_a_document_means_what_it_says() -> None:
    policy = parsed(WHOLE)
    assert (policy.uid, policy.user, policy.name, policy.created_at) == (1001, "alice", "whole", "now")
    assert policy.document == WHOLE
    assert policy.pods.requirements == (
        Requirement("app", "In", frozenset({"db"})), Requirement("tier", "In", frozenset({"a", "b"})),
        Requirement("old", "DoesNotExist"))
    (rule,) = policy.ingress
    assert rule.peers == (Peers(1001, Selector(), Selector()), Peers(None, Selector(), Selector()))
    assert rule.blocks == ((10 << 24, (10 << 24) + 0xFFFF), ((10 << 24) + 0x20000, (11 << 24) - 1))
    assert rule.traffic == (((6, 6), (80, 90)), ((132, 132), (0, 65535)))
    assert not rule.is_for_all
    (rule,) = policy.egress
    assert rule.traffic == (((17, 17), (53, 53)),)
    assert policy.parts == 4 * 2 + 1 + 3


@pytest.mark.parametrize(("spec", "ingress", "egress"), [
    (None, 0, None), ({}, 0, None), ({"egress": []}, 0, None), ({"egress": [{}]}, 0, 1), ({"ingress": [{}]}, 1, None),
    ({"policyTypes": []}, 0, None), ({"policyTypes": None, "egress": [{}]}, 0, 1),
    ({"policyTypes": ["Egress"]}, None, 0), ({"policyTypes": ["Egress"], "ingress": [{}]}, None, 0),
    ({"policyTypes": ["Ingress"], "egress": [{}]}, 0, None), ({"policyTypes": ["Ingress", "Egress"]}, 0, 0),
    ({"ingress": None}, 0, None)])
def test_types_default_as_upstream_has_it(spec: Any, ingress: int | None, egress: int | None) -> None:
    tree = document("p", {}) | {"spec": spec}
    policy = parsed(tree)
    assert [None if rules is None else len(rules) for rules in (policy.ingress, policy.egress)] == [ingress, egress]


@pytest.mark.parametrize("rule", [{}, {"from": []}, {"from": None}, {"ports": []}, {"ports": None, "from": None}])
def test_what_is_empty_or_missing_in_a_rule_is_everybody_at_every_port(rule: dict[str, Any]) -> None:
    (found,) = parsed(document("p", {"ingress": [rule]})).ingress
    assert found.is_for_all
    assert found.traffic == EVERYTHING


@pytest.mark.parametrize("selector", [..., None, {}, {"matchLabels": {}}, {"matchExpressions": None}])
def test_an_empty_or_missing_selector_selects_all_of_its_user(selector: Any) -> None:
    policy = parsed(document("p", {} if selector is ... else {"podSelector": selector}))
    assert policy.selects(environment(0, "alice", {"any": "thing"}))
    assert not policy.selects(environment(0, "bob"))


@pytest.mark.parametrize(("path", "value", "field"), [
    ("apiVersion", "networking.k8s.io/v1beta1", "apiVersion"), ("apiVersion", "extensions/v1beta1", "apiVersion"),
    ("apiVersion", ..., "apiVersion"), ("kind", "CiliumNetworkPolicy", "kind"), ("kind", ..., "kind"),
    ("status", {}, "status"), ("spec", [], "spec"), ("spec/podselector", {}, "spec.podselector"),
    ("metadata/uid", "x", "metadata.uid"), ("metadata/generateName", "x", "metadata.generateName"),
    ("metadata/name", ..., "metadata.name"), ("metadata/name", "Web", "metadata.name"),
    ("metadata/name", "a/b", "metadata.name"), ("metadata/name", "x" * 254, "metadata.name"),
    ("metadata/name", "a..b", "metadata.name"), ("metadata/name", 7, "metadata.name"),
    ("metadata", None, "metadata.name"), ("metadata/namespace", 7, "metadata.namespace"),
    ("metadata/labels", {"a": True}, "metadata.labels"), ("metadata/annotations", ["a"], "metadata.annotations"),
    ("spec/policyTypes", ["ingress"], "spec.policyTypes[0]"), ("spec/policyTypes", "Ingress", "spec.policyTypes"),
    ("spec/podSelector/matchLabels/version", 1.0, "spec.podSelector.matchLabels['version']"),
    ("spec/podSelector/matchLabels/-", "x", "spec.podSelector.matchLabels['-']"),
    ("spec/podSelector/matchLabels/app", "x" * 257, "spec.podSelector.matchLabels['app']"),
    ("spec/podSelector/matchlabels", {}, "spec.podSelector.matchlabels"),
    ("spec/podSelector/matchExpressions/0/operator", "Gt", "spec.podSelector.matchExpressions[0].operator"),
    ("spec/podSelector/matchExpressions/0/operator", ["In"], "spec.podSelector.matchExpressions[0].operator"),
    ("spec/podSelector/matchExpressions/0/values", [], "spec.podSelector.matchExpressions[0].values"),
    ("spec/podSelector/matchExpressions/0/values/0", True, "spec.podSelector.matchExpressions[0].values[0]"),
    ("spec/podSelector/matchExpressions/1/values", ["x"], "spec.podSelector.matchExpressions[1].values"),
    ("spec/podSelector/matchExpressions/1/key", ..., "spec.podSelector.matchExpressions[1].key"),
    ("spec/podSelector/matchExpressions/1/keys", "x", "spec.podSelector.matchExpressions[1].keys"),
    ("spec/ingress", {}, "spec.ingress"), ("spec/ingress/0", None, "spec.ingress[0]"),
    ("spec/ingress/0/to", [], "spec.ingress[0].to"), ("spec/egress/0/from", [], "spec.egress[0].from"),
    ("spec/ingress/0/from/0", {}, "spec.ingress[0].from[0]"),
    ("spec/ingress/0/from/0", {"podSelector": None}, "spec.ingress[0].from[0]"),
    ("spec/ingress/0/from/0", None, "spec.ingress[0].from[0]"),
    ("spec/ingress/0/from/0/serviceAccount", {}, "spec.ingress[0].from[0].serviceAccount"),
    ("spec/ingress/0/from/2/podSelector", {}, "spec.ingress[0].from[2].ipBlock"),
    ("spec/ingress/0/from/2/ipBlock/cidr", "10.0.0.0", "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/cidr", "10.0.0.0/33", "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/cidr", "010.0.0.0/8", "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/cidr", "10.0.0.0/255.0.0.0", "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/cidr", "::/0", "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/cidr", ..., "spec.ingress[0].from[2].ipBlock.cidr"),
    ("spec/ingress/0/from/2/ipBlock/except", ["11.0.0.0/16"], "spec.ingress[0].from[2].ipBlock.except[0]"),
    ("spec/ingress/0/from/2/ipBlock/except", ["10.0.0.0/8"], "spec.ingress[0].from[2].ipBlock.except[0]"),
    ("spec/ingress/0/from/2/ipBlock/excepts", [], "spec.ingress[0].from[2].ipBlock.excepts"),
    ("spec/ingress/0/ports/0/port", "http", "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/port", "80", "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/port", 0, "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/port", 65536, "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/port", True, "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/port", 80.0, "spec.ingress[0].ports[0].port"),
    ("spec/ingress/0/ports/0/endPort", 79, "spec.ingress[0].ports[0].endPort"),
    ("spec/ingress/0/ports/0/endPort", 65536, "spec.ingress[0].ports[0].endPort"),
    ("spec/ingress/0/ports/0/port", ..., "spec.ingress[0].ports[0].endPort"),
    ("spec/ingress/0/ports/0/protocol", "tcp", "spec.ingress[0].ports[0].protocol"),
    ("spec/ingress/0/ports/0/protocol", "ICMP", "spec.ingress[0].ports[0].protocol"),
    ("spec/ingress/0/ports/0/protocol", 6, "spec.ingress[0].ports[0].protocol"),
    ("spec/ingress/0/ports/0/name", "http", "spec.ingress[0].ports[0].name")])
def test_what_cannot_be_is_refused_by_its_field(path: str, value: Any, field: str) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        parsed(changed(path, value))
    assert caught.value.details["field"] == field
    assert field in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("path", "value"), [
    ("metadata/name", "a.b-c.d"), ("metadata/name", "x" * 253), ("metadata/namespace", None),
    ("spec/ingress/0/from/2/ipBlock/cidr", "10.0.0.7/8"), ("spec/ingress/0/from/2/ipBlock/except", None),
    ("spec/ingress/0/ports/0/endPort", 80), ("spec/ingress/0/ports/0/endPort", None),
    ("spec/ingress/0/ports/0/port", 1), ("spec/ingress/0/ports/0/protocol", None),
    ("spec/policyTypes", ["Egress", "Egress"])])
def test_what_upstream_takes_is_taken(path: str, value: Any) -> None:
    assert parsed(changed(path, value)).parts


def test_lists_are_their_items() -> None:
    bare = {"metadata": {"name": "bare"}}
    given = [WHOLE, {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": ""}, "items": [WHOLE, WHOLE]},
             {"kind": "NetworkPolicyList", "apiVersion": "networking.k8s.io/v1", "items": [bare]}]
    assert documents_of(given) == [WHOLE, WHOLE, WHOLE, {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", **bare}]
    assert documents_of([{"kind": "List", "apiVersion": "v1", "items": None}]) == []


@pytest.mark.parametrize(("given", "field"), [
    ({"kind": "List", "apiVersion": "v2", "items": []}, "apiVersion"), ({"kind": "List", "items": []}, "apiVersion"),
    ({"kind": "List", "apiVersion": "v1", "items": {}}, "items"),
    ({"kind": "List", "apiVersion": "v1", "items": [None]}, "items[0]"),
    ({"kind": "List", "apiVersion": "v1", "status": {}}, "status"),
    ({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}}, "metadata.resourceVersion"),
    ("text", "")])
def test_a_list_that_is_none_is_refused(given: Any, field: str) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        documents_of([given])
    assert caught.value.details["field"] == field


def test_so_many_documents_at_once_and_no_more() -> None:
    assert len(documents_of([WHOLE] * MOST_DOCUMENTS)) == MOST_DOCUMENTS
    with pytest.raises(InvalidPolicy):
        documents_of([WHOLE] * (MOST_DOCUMENTS + 1))


def test_a_list_in_a_list_is_no_policy() -> None:
    inner = {"kind": "List", "apiVersion": "v1", "items": []}
    (found,) = documents_of([{"kind": "List", "apiVersion": "v1", "items": [inner]}])
    with pytest.raises(InvalidPolicy):
        name_and_namespace(found)


@pytest.mark.parametrize(("operator", "values", "matching"), [
    ("In", ["a"], ["a"]), ("NotIn", ["a"], ["b", None]), ("Exists", [], ["a", "b"]), ("DoesNotExist", [], [None])])
def test_operators_match_as_upstream(operator: str, values: list[str], matching: list[str | None]) -> None:
    expression = {"key": "k", "operator": operator} | ({"values": values} if values else {})
    policy = parsed(document("p", {"podSelector": {"matchExpressions": [expression]}}))
    assert [v for v in ("a", "b", None) if policy.selects(environment(0, "alice", {} if v is None else {"k": v}))
            ] == matching
