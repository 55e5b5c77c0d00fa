"""Environments and documents for tests: some at random, from few labels and few numbers, so that they meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from netnsd.core.addressing import Plan
from netnsd.core.environment import Environment
from netnsd.core.policy import Policy
from netnsd.core.policy_documents import policy_of
from tests.policies.oracle import Pod, World

USERS = {"alice": 1001, "bob": 1002, "carol": 1003}
PLAN = Plan("10.9.0.0/16", 5)  # bridges of five, so that most spans would go over their ends
SUPERNET = (int(PLAN.supernet.network_address), int(PLAN.supernet.broadcast_address))
KEYS, VALUES = ("app", "tier"), ("a", "b", "c")
# Every number that any document below names, and those beside them.
PORTS = (0, 1, 79, 80, 81, 89, 90, 91, 442, 443, 444, 65535)
ADDRESSES = ("192.0.2.1", "192.0.2.200", "198.51.100.7", "8.8.8.8", "10.8.255.255", "10.10.0.0", "0.0.0.0",
             "255.255.255.255")


def document(name: str, spec: Mapping[str, Any], **metadata: Any) -> dict[str, Any]:
    """A NetworkPolicy."""
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, **metadata},
            "spec": dict(spec)}


def environment(index: int, user: str, labels: Mapping[str, str] | None = None, **fields: Any) -> Environment:
    """One in a slot."""
    return Environment(id=f"id-{index}", name=f"e{index}", uid=USERS.get(user, 2000), user=user, slot=PLAN.slot(index),
                       netns=f"e{index}", labels=dict(labels or {}), created_at="", boot_id="",
                       **{"share": "owner", **fields})


def pod(kept: Environment) -> Pod:
    """The same for the oracle."""
    return Pod(kept.user, kept.slot.address, kept.labels, kept.egress, kept.share)


def world(environments: list[Environment], documents: list[tuple[str, dict[str, Any]]]) -> World:
    """The oracle's."""
    return World(tuple(map(pod, environments)), tuple(documents), str(PLAN.supernet))


def policies(documents: list[tuple[str, dict[str, Any]]]) -> list[Policy]:
    """netnsd's."""
    return [policy_of(one, USERS[user], user, "") for user, one in documents]


labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)
_expressions = st.one_of(
    st.builds(lambda key, operator, values: {"key": key, "operator": operator, "values": values},
              st.sampled_from(KEYS), st.sampled_from(("In", "NotIn")),
              st.lists(st.sampled_from(VALUES), min_size=1, max_size=2)),
    st.builds(lambda key, operator: {"key": key, "operator": operator},
              st.sampled_from(KEYS), st.sampled_from(("Exists", "DoesNotExist"))))
selectors = st.fixed_dictionaries({}, optional={
    "matchLabels": st.none() | labels, "matchExpressions": st.none() | st.lists(_expressions, max_size=2)})
_namespaces = st.one_of(
    st.just({}), st.just({"matchLabels": {"app": "a"}}),
    st.builds(lambda user: {"matchLabels": {"kubernetes.io/metadata.name": user}}, st.sampled_from(sorted(USERS))),
    st.builds(lambda user: {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn",
                                                  "values": [user]}]}, st.sampled_from(sorted(USERS))))
_blocks = st.sampled_from([
    {"cidr": "0.0.0.0/0"}, {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}, {"cidr": "10.0.0.0/8"},
    {"cidr": "10.9.0.0/16"}, {"cidr": "198.51.100.7/32", "except": None},
    {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "192.0.2.1/32"]}])
_peers = st.one_of(
    st.fixed_dictionaries({"podSelector": selectors}, optional={"namespaceSelector": _namespaces}),
    st.fixed_dictionaries({"namespaceSelector": _namespaces}), st.fixed_dictionaries({"ipBlock": _blocks}))
_protocols = st.sampled_from((None, "TCP", "UDP", "SCTP"))
_ports = st.one_of(
    st.builds(lambda protocol: {"protocol": protocol}, _protocols),
    st.builds(lambda protocol, port: {"protocol": protocol, "port": port}, _protocols, st.sampled_from((1, 80, 443))),
    st.just({"port": 80, "endPort": 90}), st.just({"port": 81, "endPort": 65535, "protocol": "UDP"}))


def _rules(direction: str) -> st.SearchStrategy[Any]:
    return st.none() | st.lists(st.fixed_dictionaries({}, optional={
        "ports": st.none() | st.lists(_ports, max_size=2), direction: st.none() | st.lists(_peers, max_size=2),
    }), max_size=2)


specs = st.fixed_dictionaries({"podSelector": selectors}, optional={
    "ingress": _rules("from"), "egress": _rules("to"),
    "policyTypes": st.lists(st.sampled_from(("Ingress", "Egress")), max_size=2)})
documents = st.lists(st.tuples(st.sampled_from(sorted(USERS)), st.builds(document, st.just("p"), specs)), max_size=5)
egresses = st.sampled_from(("allow", "allow", "deny", "192.0.2.0/24", "0.0.0.0/0:80-90/tcp,192.0.2.1:443",
                            "10.0.0.0/8/udp,8.8.8.8/32"))
environments = st.lists(
    st.tuples(st.integers(0, 17), st.sampled_from(sorted(USERS)), labels, egresses, st.sampled_from(("owner", "lan"))),
    max_size=8, unique_by=lambda found: found[0],
).map(lambda found: [environment(index, user, kept, egress=egress, share=share)
                     for index, user, kept, egress, share in found])
