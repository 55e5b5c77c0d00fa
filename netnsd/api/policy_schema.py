"""NetworkPolicy documents as JSON schema: for the OpenAPI document alone, as ``constraints`` is.

What ``core.policy_documents`` demands. No schema can say that a name is not given twice, that ``endPort`` is not less
than ``port``, that what ``except`` has is within ``cidr``, nor how many documents lists have together.
"""

from __future__ import annotations

from typing import Any, get_args

from netnsd.core import specification as spec
from netnsd.core.policy import Operator
from netnsd.core.policy_documents import API_VERSION, KIND, MOST_DOCUMENTS, NAME_CHARACTERS
from netnsd.core.traffic import PROTOCOLS

LABEL_KEY = "[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?"
LABEL_VALUE = f"[^{spec.UNPRINTABLE}]{{0,{spec.LABEL_VALUE_CHARACTERS}}}"
NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_NETWORK = {"type": "string", "pattern": rf"^{_OCTET}(\.{_OCTET}){{3}}/(0?[0-9]|[12][0-9]|3[0-2])$"}
_VALUE = {"type": "string", "pattern": f"^{LABEL_VALUE}$"}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_PROTOCOL = {"enum": [*map(str.upper, PROTOCOLS), None]}
_NULL = {"type": "null"}
_TEXTS = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}


def _of(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Null is as good as absent."""
    return {"anyOf": [schema, _NULL]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["array", "null"], "items": items}


def _object(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """What has these fields, and no others."""
    return {"type": "object", "properties": required | optional, "required": sorted(required),
            "additionalProperties": False}


def _requirement(operators: list[str], values: dict[str, Any], *, is_needed: bool) -> dict[str, Any]:
    fields = {"key": {"type": "string", "pattern": f"^{LABEL_KEY}$"}, "operator": {"enum": operators}}
    given = {"values": values}
    return _object(fields | (given if is_needed else {}), {} if is_needed else given)


def _rule(peers: str) -> dict[str, Any]:
    return _object({}, {"ports": _list(_of("PolicyPort")), peers: _list(_of("PolicyPeer"))})


_MEMBERS = {"matchLabels": {"type": ["object", "null"], "propertyNames": {"pattern": f"^{LABEL_KEY}$"},
                            "additionalProperties": _VALUE},
            "matchExpressions": _list(_of("LabelRequirement"))}
_TYPE = {"apiVersion": {"const": API_VERSION}, "kind": {"const": KIND}}
_FIELDS = {"metadata": _object({"name": {"type": "string", "pattern": f"^{NAME}$", "maxLength": NAME_CHARACTERS}},
                               {"namespace": {"type": ["string", "null"], "description": "A user: one's own."},
                                "labels": _TEXTS, "annotations": _TEXTS})}
_SPEC = {"spec": _or_null(_of("NetworkPolicySpec"))}
_OF_LIST = {"metadata": _or_null(_object({}, {"resourceVersion": {"enum": ["", None]}}))}
_WITH_VALUES = [one for one in get_args(Operator) if one.endswith("In")]
_BARE = [one for one in get_args(Operator) if one not in _WITH_VALUES]

COMPONENTS: dict[str, dict[str, Any]] = {
    "LabelRequirement": {"anyOf": [
        _requirement(_WITH_VALUES, {"type": "array", "items": _VALUE, "minItems": 1}, is_needed=True),
        _requirement(_BARE, {"type": ["array", "null"], "maxItems": 0}, is_needed=False)]},
    "LabelSelector": _object({}, _MEMBERS),
    "PolicyPort": {"anyOf": [
        _object({"port": _PORT}, {"protocol": _PROTOCOL, "endPort": {**_PORT, "type": ["integer", "null"]}}),
        _object({}, {"protocol": _PROTOCOL, "port": _NULL, "endPort": _NULL})]},
    "PolicyPeer": {"anyOf": [
        _object({"podSelector": _of("LabelSelector")},
                {"namespaceSelector": _or_null(_of("LabelSelector")), "ipBlock": _NULL}),
        _object({"namespaceSelector": _of("LabelSelector")},
                {"podSelector": _or_null(_of("LabelSelector")), "ipBlock": _NULL}),
        _object({"ipBlock": _object({"cidr": _NETWORK}, {"except": _list(_NETWORK)})},
                {"podSelector": _NULL, "namespaceSelector": _NULL})]},
    "IngressRule": _rule("from"),
    "EgressRule": _rule("to"),
    "NetworkPolicySpec": _object({}, {
        "podSelector": _or_null(_of("LabelSelector")), "policyTypes": _list({"enum": ["Ingress", "Egress"]}),
        "ingress": _list(_of("IngressRule")), "egress": _list(_of("EgressRule"))}),
    "NetworkPolicy": _object(_TYPE | _FIELDS, _SPEC),
    "NetworkPolicies": {"anyOf": [
        _object({"apiVersion": {"const": "v1"}, "kind": {"const": "List"}},
                {"items": _list(_of("NetworkPolicy")), **_OF_LIST}),
        _object({"apiVersion": {"const": API_VERSION}, "kind": {"const": f"{KIND}List"}},
                {"items": _list(_object(_FIELDS, _TYPE | _SPEC)), **_OF_LIST})]},
}
DOCUMENTS = {"items": {"anyOf": [_of("NetworkPolicy"), _of("NetworkPolicies")]}, "maxItems": MOST_DOCUMENTS}
