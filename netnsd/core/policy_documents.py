"""From NetworkPolicy documents to policies: every field is understood, or refused by its name. Pure.

What is asked of a document is what upstream's server asks (pkg/apis/networking/validation and defaults.go), and what it
accepts and environments cannot keep is refused here: other than IPv4, and ports by name. Null is as good as absent, as
upstream's decoder has it, but in a list, where a rule that is null would let everything.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast, get_args

from netnsd.core.judgement import ANY_PORT, Span
from netnsd.core.policy import Operator, Peers, Policy, Requirement, Rule, Selector
from netnsd.core.specification import LABEL_KEY, LABEL_VALUE
from netnsd.core.traffic import EVERYTHING, PROTOCOLS, Traffic, of_protocol, united, without
from netnsd.errors import InvalidPolicy

API_VERSION, KIND = "networking.k8s.io/v1", "NetworkPolicy"
MOST_DOCUMENTS = 256
# A DNS subdomain, as every object's name: k8s.io/apimachinery pkg/util/validation.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*\Z")
NAME_CHARACTERS = 253
_CIDR = re.compile(r"[0-9.]+/[0-9]{1,2}\Z")
_LISTS = {"List": "v1", "NetworkPolicyList": API_VERSION}


def documents_of(given: Sequence[Any]) -> list[dict[str, Any]]:
    """The documents, and those that lists among them hold. Raises InvalidPolicy."""
    found: list[dict[str, Any]] = []
    for number, one in enumerate(given):
        place = _Place(f"document {number + 1}")
        tree = place.mapping(one)
        kind = tree.get("kind")
        if not isinstance(kind, str) or kind not in _LISTS:
            found.append(tree)
            continue
        place.known(tree, {"apiVersion", "kind", "metadata", "items"})
        if tree.get("apiVersion") != _LISTS[kind]:
            place.at("apiVersion").wrong(f"is not {_LISTS[kind]}")
        metadata = place.at("metadata").mapping(_given(tree, "metadata", {}))
        place.at("metadata").known(metadata, {"resourceVersion"})  # kubectl writes an empty one
        if metadata.get("resourceVersion") not in (None, ""):
            place.at("metadata.resourceVersion").wrong("is the cluster's: leave it out")
        for _, item in place.items(tree, "items"):
            typed = {"apiVersion": API_VERSION, "kind": KIND} if kind != "List" and isinstance(item, dict) else {}
            found.append(typed | item if typed else item)
    if len(found) > MOST_DOCUMENTS:
        raise InvalidPolicy(f"{len(found)} documents are more than {MOST_DOCUMENTS}", hint="Send fewer at once.")
    return found


def name_and_namespace(document: Any) -> tuple[str, str | None]:
    """What a document is called, and the user that it names. Raises InvalidPolicy."""
    place = _Place("document")
    tree = place.mapping(document)
    metadata = place.at("metadata").mapping(_given(tree, "metadata", {}))
    name = metadata.get("name")
    if not isinstance(name, str) or len(name) > NAME_CHARACTERS or not _NAME.match(name):
        place.at("metadata.name").wrong("is not a name: a-z, 0-9, '-' and '.', with a letter or digit at both ends")
    namespace = metadata.get("namespace")
    if namespace is not None and not isinstance(namespace, str):
        place.at("metadata.namespace").wrong("is not a string")
    return name, namespace or None


def policy_of(document: Any, uid: int, user: str, created_at: str) -> Policy:
    """What a document means as that user's. Raises InvalidPolicy, which names the field."""
    name, _ = name_and_namespace(document)
    place = _Place(f"policy {name!r}")
    tree = place.mapping(document)
    place.known(tree, {"apiVersion", "kind", "metadata", "spec"})
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if tree.get(field) != wanted:
            place.at(field).wrong(f"is not {wanted}")
    _check_metadata(place.at("metadata"), tree["metadata"])
    at = place.at("spec")
    spec = at.mapping(_given(tree, "spec", {}))
    at.known(spec, {"podSelector", "policyTypes", "ingress", "egress"})
    ingress = [_rule(at.at("ingress", n), rule, "from", uid) for n, rule in at.items(spec, "ingress")]
    egress = [_rule(at.at("egress", n), rule, "to", uid) for n, rule in at.items(spec, "egress")]
    types = _types(at, spec) or ({"Ingress", "Egress"} if egress else {"Ingress"})
    return Policy(uid, user, name, _selector(at.at("podSelector"), _given(spec, "podSelector", {})),
                  tuple(ingress) if "Ingress" in types else None, tuple(egress) if "Egress" in types else None,
                  tree, created_at)


class _Place:
    """A field, by its path; tells what is wrong with what is there."""

    def __init__(self, what: str, path: str = "") -> None:
        self._what, self._path = what, path

    def at(self, field: str, number: int | None = None) -> _Place:
        """A field below it, or one of a list's."""
        dot = "." if self._path else ""
        return _Place(self._what, f"{self._path}{dot}{field}" + ("" if number is None else f"[{number}]"))

    def wrong(self, why: str, hint: str = "") -> NoReturn:
        """Refuse it."""
        where = f"{self._what}: {self._path}" if self._path else self._what
        raise InvalidPolicy(f"{where} {why}", field=self._path,
                            hint=hint or "Fields are those of NetworkPolicy in networking.k8s.io/v1.")

    def mapping(self, value: Any) -> dict[str, Any]:
        """It, where it is an object."""
        if not isinstance(value, dict):
            self.wrong("is not an object")
        return cast("dict[str, Any]", value)

    def sequence(self, value: Any) -> list[Any]:
        """It, where it is a list, none of which is null."""
        if not isinstance(value, list):
            self.wrong("is not a list")
        for number, one in enumerate(value):
            if one is None:
                _Place(self._what, f"{self._path}[{number}]").wrong("is null", hint="Write {} where it is to be empty.")
        return value

    def items(self, tree: Mapping[str, Any], field: str) -> list[tuple[int, Any]]:
        """What the list in a field has, with its numbers; nothing where it is absent."""
        return list(enumerate(self.at(field).sequence(_given(tree, field, []))))

    def known(self, tree: Mapping[str, Any], fields: set[str]) -> None:
        """Refuse every other field."""
        for field in tree:
            if field not in fields:
                self.at(str(field)[:80]).wrong("is not a field that is understood here")


def _given(tree: Mapping[str, Any], field: str, default: Any) -> Any:
    value = tree.get(field)
    return default if value is None else value


def _check_metadata(place: _Place, metadata: dict[str, Any]) -> None:
    place.known(metadata, {"name", "namespace", "labels", "annotations"})
    for field in ("labels", "annotations"):
        for key, value in place.at(field).mapping(_given(metadata, field, {})).items():
            if not isinstance(value, str):
                place.at(field).wrong(f"has {str(key)[:80]!r}, which is not a string", hint="Quote it.")


def _types(place: _Place, spec: Mapping[str, Any]) -> set[str]:
    types: set[str] = set()
    for number, kind in place.items(spec, "policyTypes"):
        if kind not in ("Ingress", "Egress"):
            place.at("policyTypes", number).wrong("is not Ingress or Egress")
        types.add(kind)
    return types


def _selector(place: _Place, value: Any) -> Selector:
    tree = place.mapping(value)
    place.known(tree, {"matchLabels", "matchExpressions"})
    found = []
    for key, wanted in place.at("matchLabels").mapping(_given(tree, "matchLabels", {})).items():
        at = place.at(f"matchLabels[{str(key)[:80]!r}]")
        found.append(Requirement(_key(at, key), "In", frozenset({_value(at, wanted)})))
    for number, expression in place.items(tree, "matchExpressions"):
        found.append(_requirement(place.at("matchExpressions", number), expression))
    return Selector(tuple(found))


def _requirement(place: _Place, value: Any) -> Requirement:
    tree = place.mapping(value)
    place.known(tree, {"key", "operator", "values"})
    operator = tree.get("operator")
    if operator not in get_args(Operator):
        place.at("operator").wrong("is not In, NotIn, Exists or DoesNotExist")
    values = frozenset(_value(place.at("values", number), one) for number, one in place.items(tree, "values"))
    if operator in ("In", "NotIn") and not values:
        place.at("values").wrong(f"is needed with {operator}")
    if operator in ("Exists", "DoesNotExist") and values:
        place.at("values").wrong(f"may not be given with {operator}")
    return Requirement(_key(place.at("key"), tree.get("key")), cast("Operator", operator), values)


def _key(place: _Place, key: Any) -> str:
    if not isinstance(key, str) or not LABEL_KEY.match(key):
        place.wrong("is not a label's key")
    return key


def _value(place: _Place, value: Any) -> str:
    if not isinstance(value, str):
        place.wrong("is not a string", hint="Quote it: a label's value is text.")
    if not LABEL_VALUE.match(value):
        place.wrong("is not a label's value")
    return value


def _rule(place: _Place, value: Any, direction: str, uid: int) -> Rule:
    tree = place.mapping(value)
    place.known(tree, {"ports", direction})
    ports = [_port(place.at("ports", number), port) for number, port in place.items(tree, "ports")]
    traffic = united(ports) if ports else EVERYTHING
    peers: list[Peers] = []
    blocks: list[Span] = []
    named = place.items(tree, direction)
    for number, peer in named:
        at = place.at(direction, number)
        fields = at.mapping(peer)
        at.known(fields, {"podSelector", "namespaceSelector", "ipBlock"})
        given = {field for field, what in fields.items() if what is not None}
        if not given:
            at.wrong("names nobody", hint=f"Leave {direction} out where everybody is meant.")
        if "ipBlock" in given:
            if len(given) > 1:
                at.at("ipBlock").wrong("may not be given with a selector")
            blocks += _block(at.at("ipBlock"), fields["ipBlock"])
            continue
        pods = _selector(at.at("podSelector"), _given(fields, "podSelector", {}))
        namespaces = _selector(at.at("namespaceSelector"), _given(fields, "namespaceSelector", {}))
        peers.append(Peers(None if "namespaceSelector" in given else uid, namespaces, pods))
    return Rule(traffic, tuple(peers), tuple(blocks), is_for_all=not named)


def _port(place: _Place, value: Any) -> Traffic:
    tree = place.mapping(value)
    place.known(tree, {"protocol", "port", "endPort"})
    protocol = _given(tree, "protocol", "TCP")
    if not isinstance(protocol, str) or protocol not in {name.upper() for name in PROTOCOLS}:
        place.at("protocol").wrong("is not TCP, UDP or SCTP")
    port, end = tree.get("port"), tree.get("endPort")
    if isinstance(port, str):
        place.at("port").wrong("is a name", hint="Environments have no named ports: give the number, without quotes.")
    for field, number in (("port", port), ("endPort", end)):
        if number is not None and (type(number) is not int or not 1 <= number <= ANY_PORT[1]):
            place.at(field).wrong("is not a number from 1 to 65535")
    if end is not None and port is None:
        place.at("endPort").wrong("is given without port")
    if end is not None and end < port:
        place.at("endPort").wrong("is less than port")
    return of_protocol(protocol.lower(), ANY_PORT if port is None else (port, port if end is None else end))


def _block(place: _Place, value: Any) -> list[Span]:
    tree = place.mapping(value)
    place.known(tree, {"cidr", "except"})
    network = _network(place.at("cidr"), tree.get("cidr"))
    holes = []
    for number, text in place.items(tree, "except"):
        hole = _network(place.at("except", number), text)
        if not hole.subnet_of(network) or hole == network:
            place.at("except", number).wrong("is not a strict subset of cidr")
        holes.append(_span(hole))
    return without([_span(network)], holes)


def _network(place: _Place, text: Any) -> ipaddress.IPv4Network:
    if isinstance(text, str) and ":" in text:
        place.wrong("is IPv6", hint="Environments have IPv4 alone: leave it out.")
    if not isinstance(text, str) or not _CIDR.match(text):
        place.wrong("is not an IPv4 network such as 10.1.0.0/16")
    try:
        return ipaddress.IPv4Network(text, strict=False)  # upstream takes bits of a host too, and does not look at them
    except ValueError:
        place.wrong("is not an IPv4 network such as 10.1.0.0/16")


def _span(network: ipaddress.IPv4Network) -> Span:
    return int(network.network_address), int(network.broadcast_address)
