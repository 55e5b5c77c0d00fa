from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.client.arguments import (
    check_command,
    check_name,
    inherited_variables,
    parse_labels,
    parse_ports,
    parse_variables,
    soft_limits,
)
from netnsd.errors import InvalidCommand, InvalidLabel, InvalidName, InvalidPort, InvalidVariable

NOT_UTF8 = os.fsdecode(b"\xff")


@given(st.integers(1, 65535), st.integers(1, 65535), st.sampled_from(["", "/tcp", "/udp"]))
def test_ports_are_read_as_written(port: int, publish: int, protocol: str) -> None:
    expected = {"port": port, "protocol": protocol[1:] or "tcp"}
    assert parse_ports([f"{port}{protocol}"]) == [expected]
    assert parse_ports([f"{publish}:{port}{protocol}"]) == [expected | {"publish": publish}]


@pytest.mark.parametrize("text", [
    "", "0", "65536", "-1", "+1", " 1", "1 ", "1.0", "x", "٣", "1e3", "9" * 5000, ":3000", "3000:", "0:3000", "65536:1",
    "1:2:3", "3000/", "3000/sctp", "3000/TCP", "/udp", "1/udp/tcp", "0x10", "1_0", NOT_UTF8])
def test_malformed_ports_are_refused(text: str) -> None:
    with pytest.raises(InvalidPort) as caught:
        parse_ports([text])
    assert caught.value.hint


@pytest.mark.parametrize("texts", [["1", "1"], ["1", "1/tcp"], ["5:1", "5:2"]])
def test_port_asked_for_twice_is_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidPort):
        parse_ports(texts)


def test_same_number_of_two_protocols_is_two_ports() -> None:
    assert len(parse_ports(["53", "53/udp", "5:1", "5:1/udp"])) == 4


@pytest.mark.parametrize("text", ["", "k", "=v", "k k=v", "k\n=v", "ä=v", "k=\n", f"k={NOT_UTF8}"])
def test_malformed_labels_are_refused(text: str) -> None:
    with pytest.raises(InvalidLabel):
        parse_labels([text])


def test_labels_keep_what_follows_the_first_equals_sign() -> None:
    assert parse_labels(["a/b.c-d_E=x=ä y", "k="]) == {"a/b.c-d_E": "x=ä y", "k": ""}


@pytest.mark.parametrize("text", ["", "K", "=v", "K=\0", "K\0=v", f"K={NOT_UTF8}", f"{NOT_UTF8}=v"])
def test_malformed_variables_are_refused(text: str) -> None:
    with pytest.raises(InvalidVariable):
        parse_variables([text])


def test_variables_may_hold_anything_else() -> None:
    assert parse_variables(["K=a=b\n", "BASH_FUNC_x%%=() { :; }", "E="]) == {
        "K": "a=b\n", "BASH_FUNC_x%%": "() { :; }", "E": ""}


def test_inherited_variables_that_cannot_travel_are_named() -> None:
    told: list[str] = []
    assert inherited_variables([("A", "1"), ("B", NOT_UTF8), (NOT_UTF8, "x"), ("", "y")], told.append) == {"A": "1"}
    assert len(told) == 1
    assert "B" in told[0]


def test_arguments_and_names_that_are_not_utf8_are_refused() -> None:
    assert check_command(["a", "ä"]) == ["a", "ä"]
    with pytest.raises(InvalidCommand):
        check_command(["a", NOT_UTF8])
    with pytest.raises(InvalidName):
        check_name(NOT_UTF8)


def test_soft_limits_are_numbers_under_lower_case_names() -> None:
    limits = soft_limits()
    assert "ofile" not in limits
    assert all(name.islower() and value >= -1 for name, value in limits.items())
