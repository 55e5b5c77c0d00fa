"""One packet at a time, decided from the documents as they are written: what upstream's API says, and nothing else.

It shares no code with netnsd, and knows nothing of boxes: it follows the comments of k8s.io/api networking/v1/types.go
and what https://kubernetes.io/docs/concepts/services-networking/network-policies/ says, with netnsd's own rules beside.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TCP, UDP, SCTP, ICMP = 6, 17, 132, 1
_NUMBERS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """An environment, in the namespace of its user."""

    user: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    egress: str = "allow"
    share: str = "owner"


@dataclass(frozen=True)
class World:
    """All that there is. ``policies``: (user, document)."""

    pods: tuple[Pod, ...]
    policies: tuple[tuple[str, Document], ...]
    supernet: str = "10.9.0.0/16"

    def lets(self, source: Pod | str, target: Pod | str, protocol: int, port: int) -> bool:
        """Whether a connection may be made. Of source and target one at least is a pod; an address is outside."""
        if isinstance(source, Pod) and isinstance(target, Pod):
            return self._goes_out(source, target, protocol, port) and self._comes_in(source, target, protocol, port)
        if isinstance(source, Pod):
            assert isinstance(target, str)
            return (self._goes_out(source, target, protocol, port)
                    and _egress_allows(source.egress, target, protocol, port))
        assert isinstance(target, Pod)
        return target.share == "lan" and self._comes_in(source, target, protocol, port)

    def _goes_out(self, source: Pod, target: Pod | str, protocol: int, port: int) -> bool:
        applying = [(user, d) for user, d in self.policies if "Egress" in _types(d) and _applies(user, d, source)]
        if not applying:
            return True
        return any(self._rule_lets(user, rule, "to", target, protocol, port)
                   for user, d in applying for rule in d.get("spec", {}).get("egress") or [])

    def _comes_in(self, source: Pod | str, target: Pod, protocol: int, port: int) -> bool:
        applying = [(user, d) for user, d in self.policies if "Ingress" in _types(d) and _applies(user, d, target)]
        if not applying:
            # Between environments netnsd denies, where upstream leaves it to the cluster.
            return not isinstance(source, Pod)
        return any(self._rule_lets(user, rule, "from", source, protocol, port)
                   for user, d in applying for rule in d.get("spec", {}).get("ingress") or [])

    def _rule_lets(self, user: str, rule: Mapping[str, Any], direction: str, peer: Pod | str,  # noqa: PLR0917
                   protocol: int, port: int) -> bool:
        ports = rule.get("ports") or []
        if ports and not any(_port_is(p, protocol, port) for p in ports):
            return False
        peers = rule.get(direction) or []
        return not peers or any(self._peer_is(user, p, peer) for p in peers)

    def _peer_is(self, user: str, wanted: Mapping[str, Any], peer: Pod | str) -> bool:
        if wanted.get("ipBlock") is not None:
            if isinstance(peer, Pod):
                return False
            address = ipaddress.ip_address(peer)
            block = wanted["ipBlock"]
            return (address not in ipaddress.ip_network(self.supernet)
                    and address in ipaddress.ip_network(block["cidr"], strict=False)
                    and not any(address in ipaddress.ip_network(hole, strict=False)
                                for hole in block.get("except") or []))
        if not isinstance(peer, Pod):
            return False
        if wanted.get("namespaceSelector") is not None:
            namespace = {"kubernetes.io/metadata.name": peer.user}
            if not _selects(wanted["namespaceSelector"], namespace):
                return False
        elif peer.user != user:
            return False
        return wanted.get("podSelector") is None or _selects(wanted["podSelector"], peer.labels)


def _types(document: Document) -> list[str]:
    spec = document.get("spec") or {}
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def _applies(user: str, document: Document, pod: Pod) -> bool:
    return pod.user == user and _selects((document.get("spec") or {}).get("podSelector") or {}, pod.labels)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if key not in labels or labels[key] != value:
            return False
    return all(_expression_holds(expression, labels) for expression in selector.get("matchExpressions") or [])


def _expression_holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "In":
            return key in labels and labels[key] in values
        case "NotIn":
            return key not in labels or labels[key] not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise AssertionError(expression)


def _port_is(wanted: Mapping[str, Any], protocol: int, port: int) -> bool:
    if _NUMBERS[wanted.get("protocol") or "TCP"] != protocol:
        return False
    if wanted.get("port") is None:
        return True
    return bool(wanted["port"] <= port <= (wanted.get("endPort") or wanted["port"]))


def _egress_allows(egress: str, target: str, protocol: int, port: int) -> bool:
    if egress in ("allow", "deny"):
        return egress == "allow"
    return any(_entry_allows(entry, target, protocol, port) for entry in egress.split(","))


def _entry_allows(entry: str, target: str, protocol: int, port: int) -> bool:
    protocols = []
    head, slash, tail = entry.rpartition("/")
    if slash and tail.isalpha():
        entry, protocols = head, [_NUMBERS[tail.upper()]]
    network, colon, ports = entry.partition(":")
    if ipaddress.ip_address(target) not in ipaddress.ip_network(network):
        return False
    if not colon:
        return not protocols or protocol in protocols
    first, _, last = ports.partition("-")
    return protocol in (protocols or [TCP, UDP]) and int(first) <= port <= int(last or first)


def pairs(pods: Iterable[Pod]) -> list[tuple[Pod, Pod]]:
    """Every ordered pair of two."""
    found = list(pods)
    return [(one, other) for one in found for other in found if one is not other]
