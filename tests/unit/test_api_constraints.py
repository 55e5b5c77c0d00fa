"""The OpenAPI document allows what the daemon takes, and nothing else."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netnsd import wire
from netnsd.api import constraints, json_body, openapi
from netnsd.core import specification
from netnsd.core.registry import Blueprint, Settings
from netnsd.core.templates import _check_bare
from netnsd.errors import NetnsdError
from tests.fakes.world import ALICE

RANGE = (20000, 29999)
SETTINGS = Settings(RANGE, allow_setuid=True, boot_id="boot")
COMPONENTS = openapi.document(RANGE)["components"]


@functools.cache
def validator(kind: str) -> Any:
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{kind}", "components": COMPONENTS})


def allowed(kind: str, value: Any) -> bool:
    return bool(validator(kind).is_valid(value))


def taken(value: Any) -> bool:
    """Whether the daemon takes it, as far as it can be told without a look at what there is."""
    try:
        request = json_body.parse(json.dumps(value).encode(), wire.CreateRequest)
        if request.count is not None:
            specification.check_count(request.count)
        if request.template is not None:
            _check_bare(request)
            specification.check_labels(request.labels)
        else:
            Blueprint.of(request, ALICE, SETTINGS)
    except NetnsdError:
        return False
    return True


def near(*bounds: float) -> st.SearchStrategy[Any]:
    return st.sampled_from([number for bound in bounds for number in (bound - 1, bound, bound + 1)])


TEXT = st.sampled_from(["", "a", "web", "-a", "a-", "a" * 63, "a" * 64, "A", "a.b", "/", "/srv", "srv", "a\0", "\0",
                        "a=b", "a/b", "k" * 128, "k" * 129, "v" * 256, "v" * 257, " ", "\n", "a\n", "\x1b", "\x7f",
                        "\xa0", "ü", "\u202e", "\ufeff", "\U0001f600", "owner", "allow", "nofile", "host"])
PORTS = near(0, 1, 65535, 20000, 29999)
COMMANDS = st.none() | st.lists(TEXT, max_size=2)
TEXTS = st.dictionaries(TEXT, TEXT, max_size=2)
LIMITS = st.dictionaries(st.sampled_from(["nofile", "NOFILE", "core", "", "pids"]), near(-1, 0, 2**63 - 1), max_size=2)
HEALTH = st.none() | st.fixed_dictionaries({}, optional={
    "tcp": st.none() | PORTS, "port": st.none() | PORTS, "http": st.none() | TEXT, "command": COMMANDS,
    "interval_seconds": near(1, 86400), "timeout_seconds": near(0, 3600) | st.just(0.1), "retries": near(1, 1000),
    "start_period_seconds": near(0, 86400), "unknown": st.just(1)})
SERVICE = st.fixed_dictionaries({}, optional={
    "name": TEXT, "command": st.lists(TEXT, max_size=2), "env": TEXTS, "cwd": st.none() | TEXT, "health": HEALTH,
    "setuid": st.none() | st.booleans(), "restart": st.sampled_from([None, "no", "always", "x"])})
PORT = st.fixed_dictionaries({}, optional={"port": PORTS, "protocol": st.sampled_from(["tcp", "udp", "sctp"]),
                                           "publish": st.none() | PORTS})
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.none() | TEXT, "count": st.none() | near(1, 500) | st.sampled_from([2.0, 2.5, True, "2"]),
    "template": st.none() | st.just("web"), "command": COMMANDS, "services": st.none() | st.lists(SERVICE, max_size=1),
    "ports": st.lists(PORT, max_size=1), "env": TEXTS, "cwd": st.none() | TEXT, "labels": TEXTS,
    "share": TEXT | st.sampled_from([
        "lan", "user:a", "user:a,group:b", "user:", "users:a", "user:a,", "user:a b", "user:a:b", "user:" + "a" * 65,
        "user:\x01", ",".join(["user:a"] * 64), ",".join(["user:a"] * 65)]),
    "egress": TEXT, "umask": near(0, 0o777) | st.just(18.0), "limits": LIMITS,
    "restart": st.sampled_from(["no", "always", "on-failure", "never", None]), "health": HEALTH,
    "resources": st.none() | st.fixed_dictionaries({}, optional={
        name: st.none() | near(least, most) for name, (least, most, _) in specification.RESOURCES.items()}),
    "replace": st.booleans(), "unknown": st.just(0)}


ONE = st.one_of(*(st.fixed_dictionaries({name: values}) for name, values in FIELDS.items()))
MANY = st.sets(st.sampled_from(sorted(FIELDS)), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names}))
OF_A_COMMAND = st.fixed_dictionaries({"command": st.just(["x"]), "health": HEALTH})


@given(ONE | MANY | OF_A_COMMAND)
@example({"labels": {"k": "v" * 256}})
@example({"labels": {"k": "v" * 257}})
@example({"labels": {"k": "\u202e"}})
@example({"health": {"tcp": 1}})
@example({"command": ["x"], "services": []})
@example({"command": ["x"], "health": {"http": "/"}})
@example({"command": ["x"], "health": {"tcp": 1, "port": 1}})
@example({"command": ["x"], "health": {"http": "/", "port": 1}})
@example({"template": "web", "umask": 17})
@example({"template": "web", "umask": 18, "ports": [], "labels": {"a": "b"}})
@example({"labels": {f"k{n}": "" for n in range(specification.MAX_LABELS)}})
@example({"labels": {f"k{n}": "" for n in range(specification.MAX_LABELS + 1)}})
@example({"ports": [{"port": n + 1} for n in range(specification.MAX_PORTS)]})
@example({"ports": [{"port": n + 1} for n in range(specification.MAX_PORTS + 1)]})
@example({"services": [{"name": f"s{n}", "command": ["x"]} for n in range(specification.MAX_SERVICES)]})
@example({"services": [{"name": f"s{n}", "command": ["x"]} for n in range(specification.MAX_SERVICES + 1)]})
@example({"umask": 512})
@example({"cwd": "srv"})
@example({"limits": {"pids": 1}})
@example({"cwd": "/srv", "services": [{"command": ["x"], "cwd": ""}]})
@settings(max_examples=500)
def test_the_document_allows_what_is_taken(value: dict[str, Any]) -> None:
    assert allowed("CreateRequest", value) == taken(value), value


@pytest.mark.parametrize("kind", constraints.EXAMPLES, ids=lambda kind: kind.__name__)
def test_examples_are_good(kind: Any) -> None:
    value = constraints.EXAMPLES[kind]
    assert allowed(kind.__name__, value)
    json_body.parse(json.dumps(value).encode(), kind)
    assert kind is not wire.CreateRequest or taken(value)


def test_each_error_is_of_one_status() -> None:
    codes = [code for response in COMPONENTS["responses"].values()
             for code in response["content"]["application/json"]["schema"]["allOf"][1][
                 "properties"]["error"]["properties"]["code"]["enum"]]
    assert len(codes) == len(set(codes))
    assert {"internal", "not_found", "invalid_name"} <= set(codes)
    assert not {"config_error", "daemon_unreachable"} & set(codes)
