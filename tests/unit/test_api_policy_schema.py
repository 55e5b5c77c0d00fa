"""The OpenAPI document allows the NetworkPolicy documents that the daemon takes, keys and quotas too, and no others."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any, cast

import jsonschema_rs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netnsd import wire
from netnsd.api import constraints, json_body, openapi
from netnsd.core import quotas
from netnsd.core.once import Mark
from netnsd.core.policy_documents import API_VERSION, KIND, MOST_DOCUMENTS, documents_of, name_and_namespace, policy_of
from netnsd.errors import NetnsdError

COMPONENTS = openapi.document((20000, 29999))["components"]


@functools.cache
def validator(kind: str) -> Any:
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{kind}", "components": COMPONENTS})


def allowed(kind: str, value: Any) -> bool:
    return bool(validator(kind).is_valid(value))


class Forgetful:
    """A store that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: contextlib.nullcontext()


def taken(documents: Any) -> bool:
    """Whether these documents are, as far as it can be told without a look at what there is."""
    try:
        request = json_body.parse(json.dumps({"policies": documents}).encode(), wire.PolicyRequest)
        for document in documents_of(request.policies):
            name_and_namespace(document)
            policy_of(document, 1001, "alice", "2030-01-01T00:00:00.000000Z")
    except NetnsdError:
        return False
    return True


ODD: st.SearchStrategy[Any] = st.sampled_from([None, 0, 1, True, "", "x", [], {}, [None], [{}], {"x": 1}, 1.5, -1])
_NAMES = ["a", "a.b", "a-b", "a..b", "-a", "a-", "A", "a" * 253, "a" * 254, ".", "a.", "a\n", "a_b", "ü"]
_TEXT = ["a", "team", "a/b", "k" * 128, "k" * 129, "v" * 256, "v" * 257, "-a", "\0", "\n", "a\n", "\u202e", "\ufeff",
         "ü"]
TEXT = st.sampled_from(_TEXT)
NUMBERS = st.sampled_from([0, 1, 2, 65535, 65536, 80.0, 1.5, "80", True])
NETWORKS = st.sampled_from([
    "10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "10.0.0.1/32", "10.0.0.1/8", "10.0.0.0/08", "10.0.0.0/33", "10.0.0.0",
    "010.0.0.0/8", "256.0.0.0/8", "255.249.199.99/31", "1.2.3/8", "::/0", "a/8", "10.0.0.0/8\n", "10.0.0.0/-1", 10])


def fields(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of these, now and then of another kind or with a field that nobody knows."""
    plain = st.fixed_dictionaries({}, optional=known)
    whole = st.fixed_dictionaries(known)
    return st.one_of(plain, plain, whole, whole, st.fixed_dictionaries(
        {}, optional=dict.fromkeys([*known, "unknown"], ODD)))


def lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.lists(items, max_size=2)


REQUIREMENT = fields(key=TEXT, operator=st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist", "in"]),
                     values=lists(TEXT))
SELECTOR = fields(matchLabels=st.none() | st.dictionaries(TEXT, TEXT, max_size=2), matchExpressions=lists(REQUIREMENT))
PORT = fields(protocol=st.sampled_from(["TCP", "UDP", "SCTP", "tcp", "ICMP", None]), port=NUMBERS, endPort=NUMBERS)
BLOCK = fields(**{"cidr": NETWORKS, "except": lists(NETWORKS)})
PEER = st.one_of(fields(podSelector=SELECTOR), fields(namespaceSelector=SELECTOR), fields(ipBlock=BLOCK),
                 fields(podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=BLOCK))
SPEC = fields(podSelector=SELECTOR, policyTypes=lists(st.sampled_from(["Ingress", "Egress", "ingress"])),
              ingress=lists(fields(**{"from": lists(PEER), "ports": lists(PORT)})),
              egress=lists(fields(to=lists(PEER), ports=lists(PORT))))
METADATA = fields(name=st.sampled_from(_NAMES), namespace=st.sampled_from([None, "", "alice", 1]),
                  labels=st.dictionaries(TEXT, TEXT, max_size=1), annotations=st.dictionaries(TEXT, TEXT, max_size=1))
GOOD = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "a"}}
POLICY = st.one_of(SPEC.map(lambda spec: GOOD | {"spec": spec}), METADATA.map(lambda found: GOOD | {"metadata": found}),
                   fields(apiVersion=st.sampled_from([API_VERSION, "v1"]), kind=st.sampled_from([KIND, "Pod", "List"]),
                          metadata=st.just({"name": "a"}), spec=st.just({})))
LIST = fields(apiVersion=st.sampled_from([API_VERSION, "v1"]), kind=st.sampled_from(["List", "NetworkPolicyList"]),
              items=lists(st.one_of(POLICY, st.just({"metadata": {"name": "a"}}))),
              metadata=fields(resourceVersion=st.sampled_from(["", None, "1", 0])))
# One part each, within what is good, so that it is what decides.
ONE = st.one_of(
    REQUIREMENT.map(lambda one: {"podSelector": {"matchExpressions": [one]}}),
    SELECTOR.map(lambda one: {"podSelector": one}), PORT.map(lambda one: {"ingress": [{"ports": [one]}]}),
    BLOCK.map(lambda one: {"egress": [{"to": [{"ipBlock": one}]}]}),
    PEER.map(lambda one: {"ingress": [{"from": [one]}]}),
).map(lambda spec: GOOD | {"spec": spec})


def beyond_schemas(value: Any) -> bool:
    """Whether it has what no schema can say: an end before its port, a hole that is not in its network."""
    if isinstance(value, list):
        return any(map(beyond_schemas, value))
    if not isinstance(value, dict):
        return False
    port, end = value.get("port"), value.get("endPort")
    ends_early = isinstance(port, int | float) and isinstance(end, int | float) and end < port
    return ends_early or bool(value.get("except")) or any(map(beyond_schemas, value.values()))


@given(st.lists(st.one_of(ONE, ONE, POLICY, LIST), min_size=1, max_size=1))
@example([{"kind": []}])
@example([{"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": 0}}])
@example([{"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": [GOOD]}])
@example([{"apiVersion": API_VERSION, "kind": f"{KIND}List", "items": [{"metadata": {"name": "a"}}]}])
@example([{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "List"}]}])
@example([GOOD | {"spec": {"ingress": [{"from": [{}]}]}}])
@example([GOOD | {"spec": {"ingress": [{"from": [{"podSelector": {}, "namespaceSelector": None, "ipBlock": None}]}]}}])
@example([GOOD | {"spec": {"ingress": [{"from": [
    {"podSelector": None, "namespaceSelector": None, "ipBlock": {"cidr": "10.0.0.0/8"}}]}]}}])
@example([GOOD | {"spec": {"ingress": [{"ports": [{"endPort": 1}]}]}}])
@example([GOOD | {"spec": {"ingress": [{"ports": [{"port": 1, "endPort": 1}]}]}}])
@settings(max_examples=500)
def test_the_document_allows_the_policies_that_are_taken(documents: list[Any]) -> None:
    is_allowed = allowed("PolicyRequest", {"policies": documents})
    assert is_allowed == taken(documents) or (is_allowed and beyond_schemas(documents)), documents


def test_what_no_schema_can_say_is_refused_all_the_same() -> None:
    for spec in ({"ingress": [{"ports": [{"port": 2, "endPort": 1}]}]},
                 {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}]}]}):
        assert allowed("NetworkPolicy", GOOD | {"spec": spec})
        assert not taken([GOOD | {"spec": spec}])


def test_as_many_documents_are_allowed_as_are_taken() -> None:
    most = MOST_DOCUMENTS
    for count in (most, most + 1):
        documents = [GOOD | {"metadata": {"name": f"p{number}"}} for number in range(count)]
        assert allowed("PolicyRequest", {"policies": documents}) == taken(documents) == (count == most)


@given(st.one_of(st.text(st.characters(max_codepoint=0x17f), max_size=4), st.sampled_from(
    ['"', '""', '"""', '"a"', " a", "a ", "a b", "a" * 255, "a" * 256, "\x7f", "~", "!"])))
def test_the_document_allows_the_keys_that_are_taken(key: str) -> None:
    try:
        Mark.of(key.strip(" "), wire.CreateRequest())  # blanks around a header's value are not of it
        is_taken = key == key.strip(" ")
    except NetnsdError:
        is_taken = False
    assert jsonschema_rs.is_valid(constraints.KEY, key) == is_taken


AMOUNTS = st.sampled_from([None, -1, 0, 1, 1.5, quotas.MOST, quotas.MOST + 1, 2**70, "1", True])


@given(st.dictionaries(st.sampled_from([*quotas.LIMITS, "unknown"]), AMOUNTS, max_size=2))
@settings(max_examples=300)
def test_the_document_allows_the_quotas_that_are_taken(value: dict[str, Any]) -> None:
    try:
        request = json_body.parse(json.dumps(value).encode(), wire.QuotaRequest)
        quotas.Quotas(wire.QuotaLimits(), cast("Any", Forgetful())).put(1001, "alice", request)
        is_taken = True
    except NetnsdError:
        is_taken = False
    assert allowed("QuotaRequest", value) == is_taken
