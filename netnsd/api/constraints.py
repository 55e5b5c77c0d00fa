"""What core's checks demand of a request, as JSON schema: for the OpenAPI document alone.

Core refuses with an error that says what is wrong, and a schema could only say that something is. So these are
annotations, not validation; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from netnsd import wire
from netnsd.api import policy_schema
from netnsd.api.routes import MOST_SEQ, MOST_TAIL, MOST_WAIT_SECONDS
from netnsd.core import quotas
from netnsd.core import specification as spec
from netnsd.core.once import MOST_CHARACTERS
from netnsd.core.pool import MOST_SLOTS
from netnsd.core.templates import MOST_WARM
from netnsd.core.tokens import MOST_SECONDS

NAME = {"pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
_KEY, _VALUE = policy_schema.LABEL_KEY, policy_schema.LABEL_VALUE
_PART = {"type": "string", "pattern": f"^{_VALUE.replace('{0,', '{1,')}$"}
LABEL = {"pattern": f"^{_KEY}={_VALUE}$"}
# Of an environment or a template: NAME, NAME.USER or an id, which has the shape of a name.
_OF_USER = r"(\.[^/\u0000-\u0020%?#.]{1,32})?"
REF = {"pattern": f"^[a-z0-9]([a-z0-9-]{{0,61}}[a-z0-9])?{_OF_USER}$"}
POLICY_REF = {"pattern": f"^{policy_schema.NAME}{_OF_USER}$"}
# An Idempotency-Key, with or without quotes.
KEY = {"type": "string", "maxLength": MOST_CHARACTERS, "pattern": "^[!-~]([ -~]*[!-~])?$", "not": {"const": '""'}}
_FLAG = {"type": "string", "enum": ["0", "1"]}
QUERY: dict[str, dict[str, Any]] = {
    "all": _FLAG, "everything": _FLAG, "wait": _FLAG, "follow": _FLAG,
    "label": {"type": "array", "items": {"type": "string", **LABEL}, "maxItems": spec.MAX_LABELS},
    "ref": {"type": "array", "items": {"type": "string"}},  # each that is none is told beside what was removed
    "for": {"type": "string", "enum": ["ready", "exit", "gone"]},
    "timeout": {"type": "number", "minimum": 0, "maximum": MOST_WAIT_SECONDS},
    "service": {"type": "string", **NAME},
    "dev_id": _PART, "project": _PART, "id": {"type": "string", **NAME},
    "tail": {"type": "integer", "minimum": 0, "maximum": MOST_TAIL},
    "after": {"type": "integer", "minimum": 0, "maximum": MOST_SEQ},
}
_NO_NUL = {"pattern": "^[^\\u0000]*$"}
_PORT = {"minimum": 1, "maximum": 65535}
_COMMAND = {"minItems": 1, "prefixItems": [{"type": "string", "pattern": "^[^\\u0000]+$"}],
            "items": {"type": "string", **_NO_NUL}}
_VARIABLES = {"propertyNames": {"pattern": "^[^=\\u0000]+$"}, "additionalProperties": {"type": "string", **_NO_NUL}}
_DIRECTORY = {"pattern": "^/[^\\u0000]*$"}
_UMASK = {"minimum": 0, "maximum": 0o777}
_LIMITS = {"propertyNames": {"enum": sorted(spec.LIMITS)},
           "additionalProperties": {"type": "integer", "minimum": -1, "maximum": (1 << 63) - 1}}


def _between(least: float, most: float) -> dict[str, Any]:
    return {"minimum": least, "maximum": most}


_LABELS = {"maxProperties": spec.MAX_LABELS, "propertyNames": {"pattern": f"^{_KEY}$"}}
_SHARE = {"pattern": f"^(owner|host|lan|{spec.GUEST}(,{spec.GUEST}){{0,{spec.MAX_SHARES - 1}}})$"}
# Roughly: what is a network, and whether ports are in order, core alone knows.
_EGRESS = {"pattern": "^(allow|deny|[0-9][0-9a-z./:,-]*)$"}
_SPECIFICATION: dict[str, dict[str, Any]] = {
    "command": _COMMAND, "services": {"maxItems": spec.MAX_SERVICES}, "ports": {"maxItems": spec.MAX_PORTS},
    "env": _VARIABLES, "cwd": _DIRECTORY, "umask": _UMASK, "limits": _LIMITS,
    "labels": {**_LABELS, "additionalProperties": {"type": "string", "pattern": f"^{_VALUE}$"}},
    "share": _SHARE, "egress": _EGRESS,
}
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "PortRequest": {"port": _PORT},
    "HealthCheck": {"tcp": _PORT, "port": _PORT, "command": _COMMAND, "http": {"pattern": "^/[!-~]{0,1023}$"},
                    **{name: _between(*bounds) for name, bounds in spec.HEALTH_RANGES.items()}},
    "Resources": {name: _between(least, most) for name, (least, most, _) in spec.RESOURCES.items()},
    "PolicyRequest": {"policies": policy_schema.DOCUMENTS},
    "QuotaRequest": {name: _between(0, quotas.MOST) for name in quotas.LIMITS},
    "ServiceRequest": {"name": NAME, "command": _COMMAND, "env": _VARIABLES, "cwd": _DIRECTORY},
    "Specification": _SPECIFICATION,
    "CreateRequest": {**_SPECIFICATION, "name": NAME, "count": _between(1, spec.MAX_COUNT), "template": NAME},
    "ChangeRequest": {"share": _SHARE, "egress": _EGRESS, "labels": {
        **_LABELS,
        "additionalProperties": {"anyOf": [{"type": "string", "pattern": f"^{_VALUE}$"}, {"type": "null"}]}}},
    "TemplateRequest": {"name": NAME, "warm": _between(0, MOST_WARM)},
    "TokenRequest": {"name": NAME, "expires_seconds": _between(1, MOST_SECONDS)},
    "ProjectRequest": {"dev_id": _PART, "project": _PART},
    "ProjectReference": {"dev_id": _PART, "project": _PART, "id": NAME},
    "PoolRequest": {"size": _between(0, MOST_SLOTS)},
    "StopRequest": {"grace_seconds": _between(0, 3600)},
}
NEVER_EMPTY = (wire.ProjectReference,)  # though it can do without each of its fields
EXAMPLES: dict[Any, dict[str, Any]] = {
    wire.CreateRequest: {"name": "web", "command": ["sleep", "1000"], "ports": [{"port": 3000}], "cwd": "/",
                         "labels": {"team": "shop"}, "health": {"tcp": 3000}, "restart": "on-failure"},
    wire.TemplateRequest: {"name": "shop", "warm": 1, "specification": {
        "services": [{"name": "db", "command": ["sleep", "1000"]}]}},
    wire.PolicyRequest: {"policies": [{
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "from-shop"},
        "spec": {"podSelector": {"matchLabels": {"team": "shop"}}, "ingress": [{
            "from": [{"podSelector": {}}, {"ipBlock": {"cidr": "10.1.0.0/16", "except": ["10.1.2.0/24"]}}],
            "ports": [{"port": 3000}, {"protocol": "UDP", "port": 4000, "endPort": 4100}]}]}}]},
    wire.PoolRequest: {"size": 2},
    wire.StopRequest: {"grace_seconds": 1.5},
}


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _both(one: str, other: str) -> dict[str, Any]:
    return {"required": [one, other], "properties": {name: {"not": {"type": "null"}} for name in (one, other)}}


_COMMAND_OR_SERVICES = {"not": _both("command", "services")}
_HEALTH_OF_COMMAND = {"anyOf": [{"not": _given("health")}, _given("command")]}
# Between fields. What no schema can say is left out: that ports and services are not given twice.
RULES: dict[str, list[dict[str, Any]]] = {
    "HealthCheck": [{"oneOf": [_given("tcp"), _given("http"), _given("command")]},
                    {"anyOf": [_both("http", "port"), {"not": {"anyOf": [_given("http"), _given("port")]}}]}],
    "Specification": [_COMMAND_OR_SERVICES, _HEALTH_OF_COMMAND],
    "CreateRequest": [_COMMAND_OR_SERVICES, _HEALTH_OF_COMMAND],
    "ProjectReference": [{"oneOf": [_given("id"), _both("dev_id", "project")]},
                         {"not": _both("id", "dev_id")}, {"not": _both("id", "project")}],
}


def apply(components: dict[str, Any], published: tuple[int, int]) -> None:
    """Add them to msgspec's schemas by type. ``published``: the range of host ports, inclusive."""
    fields = {**FIELDS, "PortRequest": {**FIELDS["PortRequest"], "publish": _between(*published)}}
    for kind, known in fields.items():
        for name, constraint in known.items():
            schema = components[kind]["properties"][name]
            for branch in schema.get("anyOf", [schema]):  # null beside it
                if branch.get("type") != "null":
                    branch.update(constraint)
    components.update(policy_schema.COMPONENTS)
    for kind, rules in RULES.items():
        components[kind]["allOf"] = list(rules)
    # A template has all of it, but for labels.
    bare = {name: {"const": schema["default"]} for name, schema in components["Specification"]["properties"].items()
            if name != "labels"}
    components["CreateRequest"]["allOf"].append({"anyOf": [{"not": _given("template")}, {"properties": bare}]})
