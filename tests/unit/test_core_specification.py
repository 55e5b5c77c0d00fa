"""What users may ask for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd import wire
from netnsd.core import specification
from netnsd.core.environment import Command
from netnsd.core.registry import Blueprint, Settings
from netnsd.errors import (
    Forbidden,
    InvalidCommand,
    InvalidLabel,
    InvalidName,
    InvalidPort,
    InvalidVariable,
    NetnsdError,
)
from tests.fakes.world import ALICE

RANGE = (20000, 20009)


@pytest.mark.parametrize("name", ["a", "0", "web", "a-b", "9a", "a--b", "xn--bcher-kva", "a" * 63])
def test_dns_labels_are_names(name: str) -> None:
    assert specification.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a\0", "\0", "a\n", "\n", "a b", " a", "A", "Web",
                                  "ö", "а", "１", "-", "-a", "a-", "a_b", "a.b", "a" * 64, "a" * 10_000, "%2e", "a\r",  # noqa: RUF001

                                  "\u202ea", "\ud800"])  # fmt: skip
def test_other_names_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        specification.check_name(name)
    assert caught.value.hint
    assert len(caught.value.message) < 600
    assert len(caught.value.details["name"]) <= 64


@given(st.text(max_size=80))
def test_names_are_labels_and_a_suggestion_is_one(name: str) -> None:
    try:
        checked = specification.check_name(name)
    except InvalidName as error:
        suggested = re.search(r": '(.*)' would do", error.hint)
        if suggested:
            assert specification.check_name(suggested[1])
    else:
        assert re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(?<!-)", checked)


@pytest.mark.parametrize(("port", "good"), [(-1, False), (0, False), (1, True), (65535, True), (65536, False),
                                            (10**30, False)])
def test_ports_are_from_1_to_65535(port: int, good: bool) -> None:
    if good:
        assert specification.check_ports([wire.PortRequest(port=port)], RANGE)[0].port == port
    else:
        with pytest.raises(InvalidPort):
            specification.check_ports([wire.PortRequest(port=port)], RANGE)


@pytest.mark.parametrize(("publish", "good"), [(19999, False), (20000, True), (20009, True), (20010, False),
                                               (0, False)])
def test_published_ports_are_in_the_range(publish: int, good: bool) -> None:
    wanted = [wire.PortRequest(port=80, publish=publish)]
    if good:
        specification.check_ports(wanted, RANGE)
    else:
        with pytest.raises(InvalidPort):
            specification.check_ports(wanted, RANGE)


def test_ports_are_asked_for_once_per_protocol() -> None:
    tcp, udp = wire.PortRequest(port=53), wire.PortRequest(port=53, protocol="udp")
    assert len(specification.check_ports([tcp, udp], RANGE)) == 2
    with pytest.raises(InvalidPort, match="twice"):
        specification.check_ports([tcp, tcp], RANGE)
    with pytest.raises(InvalidPort, match="twice"):
        specification.check_ports([wire.PortRequest(port=1, publish=20000), wire.PortRequest(port=2, publish=20000)],
                                  RANGE)


@pytest.mark.parametrize(("check", "most", "item", "error"), [
    (lambda items: specification.check_ports(items, RANGE), specification.MAX_PORTS,
     lambda n: wire.PortRequest(port=n + 1), InvalidPort),
    (lambda items: specification.check_labels(dict(items)), specification.MAX_LABELS, lambda n: (f"k{n}", ""),
     InvalidLabel),
    (lambda items: specification.check_services(wire.CreateRequest(services=items)), specification.MAX_SERVICES,
     lambda n: wire.ServiceRequest(name=f"s{n}", command=["x"]), InvalidCommand),
], ids=["ports", "labels", "services"])
def test_numbers_of_things_are_bounded(check: Any, most: int, item: Any, error: type[NetnsdError]) -> None:
    for count in (most - 1, most):
        assert len(check([item(n) for n in range(count)])) == count
    with pytest.raises(error):
        check([item(n) for n in range(most + 1)])


@pytest.mark.parametrize("labels", [{"a": ""}, {"a": "b c"}, {"team/x.y_z-1": "ü"}, {"a" * 128: "v"}, {"a": "v" * 256}])
def test_good_labels(labels: dict[str, str]) -> None:
    assert specification.check_labels(labels) == labels


@pytest.mark.parametrize("labels", [{"": "v"}, {"a b": "v"}, {"=": "v"}, {"-a": ""}, {"a-": ""}, {"a" * 129: "v"},
                                    {"ä": ""},
                                    {"a": "v" * 257}, {"a": "b\n"}, {"a": "\0"}, {"a": "\x1b[31m"}, {"a\n": ""}])
def test_bad_labels(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidLabel):
        specification.check_labels(labels)


@pytest.mark.parametrize("variables", [{"": "v"}, {"A=B": "v"}, {"A\0": "v"}, {"A": "v\0"}])
def test_bad_variables(variables: dict[str, str]) -> None:
    with pytest.raises(InvalidVariable):
        specification.check_variables(variables)


def command(**changes: Any) -> Command:
    fields: dict[str, Any] = {"argv": ["sh"], "env": {}, "cwd": "/", "umask": 0, "limits": {}, "setuid": False,
                              "actor": ALICE, "allow_setuid": False}
    return specification.command(**{**fields, **changes})


@pytest.mark.parametrize("changes", [
    {"argv": []}, {"argv": [""]}, {"argv": ["sh", "a\0"]}, {"cwd": "relative"}, {"cwd": ""}, {"cwd": "/a\0"},
    {"umask": -1}, {"umask": 0o1000}, {"limits": {"nofiles": 1}}, {"limits": {"nofile": -2}},
    {"limits": {"nofile": 1 << 63}}, {"limits": {"NOFILE": 1}},
], ids=str)
def test_bad_commands(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidCommand):
        command(**changes)


@pytest.mark.parametrize("changes", [{"umask": 0o777}, {"limits": {"nofile": -1}},
                                     {"limits": {"nofile": (1 << 63) - 1}},
                                     {"argv": ["sh", ""]}, {"argv": ["./x y"]}], ids=str)
def test_commands_at_their_limits(changes: dict[str, Any]) -> None:
    assert command(**changes)


def test_setuid_is_the_hosts_decision() -> None:
    with pytest.raises(Forbidden):
        command(setuid=True)
    assert command(setuid=True, allow_setuid=True).setuid


def test_command_is_the_callers_with_a_logins_variables() -> None:
    made = command(env={"HOME": "/elsewhere", "A": "1"}, cwd=None)
    assert (made.uid, made.gid, made.groups, made.cwd) == (ALICE.uid, ALICE.gid, ALICE.groups, ALICE.home)
    assert made.env["HOME"] == "/elsewhere"
    assert made.env["A"] == "1"
    assert (made.env["USER"], made.env["LOGNAME"], made.env["SHELL"]) == ("alice", "alice", "/bin/sh")


@pytest.mark.parametrize("fields", [
    {"command": ["x"], "services": [{"command": ["y"]}]}, {"command": []}, {"services": [{"name": "A",
                                                                                          "command": ["x"]}]},
    {"services": [{"command": ["x"]}, {"command": ["y"]}]}, {"services": [{"name": "..", "command": ["x"]}]},
])
def test_bad_services(fields: dict[str, Any]) -> None:
    services = fields.pop("services", None)
    wanted = wire.CreateRequest(**fields,
                                services=None if services is None else [wire.ServiceRequest(**s) for s in services])
    with pytest.raises((InvalidCommand, InvalidName)):
        Blueprint.of(wanted, ALICE, Settings(RANGE, True, ""))


def test_services_take_from_the_request_what_they_do_not_say() -> None:
    wanted = wire.CreateRequest(name="web", env={"A": "1", "B": "2"}, cwd="/srv", umask=0o27, limits={"nofile": 9},
                                services=[
        wire.ServiceRequest(name="one", command=["x"], env={"B": "3"}, cwd="/one", setuid=True),
        wire.ServiceRequest(name="two", command=["y"])])
    made = {name: s.command for name, s in Blueprint.of(wanted, ALICE, Settings(RANGE, True, "")).services.items()}
    assert (made["one"].env["A"], made["one"].env["B"], made["one"].cwd, made["one"].setuid) == ("1", "3", "/one", True)
    assert (made["two"].env["B"], made["two"].cwd, made["two"].setuid) == ("2", "/srv", False)
    assert {(c.umask, c.limits["nofile"]) for c in made.values()} == {(0o27, 9)}


def test_an_environment_without_a_name_gets_one() -> None:
    names = {Blueprint.of(wire.CreateRequest(), ALICE, Settings(RANGE, True, "")).name for _ in range(10)}
    assert len(names) == 10
    assert all(specification.check_name(name) for name in names)


@given(st.fixed_dictionaries({"name": st.none() | st.text(max_size=70), "cwd": st.none() | st.text(max_size=5),
                              "umask": st.integers(), "labels": st.dictionaries(st.text(max_size=4),
                                                                                st.text(max_size=4)),
                              "env": st.dictionaries(st.text(max_size=4), st.text(max_size=4)),
                              "command": st.none() | st.lists(st.text(max_size=4), max_size=3)}))
def test_any_request_is_a_blueprint_or_refused_with_422(fields: dict[str, Any]) -> None:
    try:
        made = Blueprint.of(wire.CreateRequest(**fields), ALICE, Settings(RANGE, True, ""))
    except NetnsdError as error:
        assert error.status == 422  # noqa: PT017
    else:
        assert dataclasses.is_dataclass(made)
