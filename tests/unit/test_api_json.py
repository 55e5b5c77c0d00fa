"""Bodies mean one thing only, or are refused, whatever is in them."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netnsd import wire
from netnsd.api import json_body
from netnsd.api.app import BODY_BYTES
from netnsd.errors import BadJson, InvalidRequest, NetnsdError

DEEP = 10_000

BAD_JSON = {
    "not JSON": b"hello",
    "nothing but a space": b" ",
    "cut off": b'{"name": "we',
    "two values": b"{} {}",
    "trailing comma": b'{"name": "web",}',
    "single quotes": b"{'name': 'web'}",
    "a key twice": b'{"name": "web", "name": "db"}',
    "a key twice, one escaped": b'{"name": "web", "n\\u0061me": "db"}',
    "a key twice, below": b'{"ports": [{"port": 1, "port": 2}]}',
    "NaN": b'{"umask": NaN}',
    "Infinity": b'{"umask": Infinity}',
    "minus Infinity": b'{"umask": -Infinity}',
    "deep arrays": b"[" * DEEP + b"]" * DEEP,
    "deep arrays that end": b"[" * DEEP,
    "deep objects": b'{"env":' * DEEP + b"1" + b"}" * DEEP,
    "deep below a field": b'{"labels": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "not UTF-8": b'{"name": "\xff"}',
    "a surrogate in UTF-8": b'{"name": "\xed\xa0\x80"}',
    "a lone surrogate": b'{"name": "\\ud800"}',
    "a lone surrogate as key": b'{"env": {"\\udfff": "1"}}',
    "surrogates in the wrong order": b'{"name": "\\udc00\\ud800"}',
    "a control character": b'{"name": "a\nb"}',
    "a number of thousands of digits": b'{"umask": ' + b"9" * 5000 + b"}",
}

INVALID = {
    "an array": b"[]",
    "null": b"null",
    "a string": b'"web"',
    "an unknown field": b'{"nmae": "web"}',
    "an unknown field below": b'{"ports": [{"port": 1, "host": 2}]}',
    "a number for a string": b'{"name": 1}',
    "a string for a number": b'{"umask": "18"}',
    "a fraction for a number": b'{"umask": 18.5}',
    "true for a number": b'{"umask": true}',
    "1 for true": b'{"setuid": 1}',
    "null for a list": b'{"ports": null}',
    "a missing field": b'{"ports": [{}]}',
    "an unknown protocol": b'{"ports": [{"port": 1, "protocol": "sctp"}]}',
    "a share that is no text": b'{"share": ["lan"]}',
    "a number as a variable": b'{"env": {"A": 1}}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_what_is_not_json_is_bad_json(name: str) -> None:
    with pytest.raises(BadJson):
        json_body.parse(BAD_JSON[name], wire.CreateRequest)


@pytest.mark.parametrize("name", INVALID)
def test_what_does_not_fit_is_invalid(name: str) -> None:
    with pytest.raises(InvalidRequest):
        json_body.parse(INVALID[name], wire.CreateRequest)


def test_an_empty_body_is_an_empty_object() -> None:
    assert json_body.parse(b"", wire.CreateRequest) == wire.CreateRequest()


def test_pairs_of_surrogates_and_escapes_are_characters() -> None:
    parsed = json_body.parse(b'{"env": {"A": "\\ud83d\\ude00 \\u00e9"}}', wire.CreateRequest)
    assert parsed.env == {"A": "\U0001f600 é"}


def test_a_backslash_before_a_u_that_is_no_escape_is_kept() -> None:
    assert json_body.parse(b'{"env": {"A": "\\\\ud800"}}', wire.CreateRequest).env == {"A": "\\ud800"}


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30, 10**4000])
def test_huge_integers_are_taken_or_refused_and_never_a_fault(number: int) -> None:
    for body in (b'{"umask": %d}' % number, b'{"limits": {"nofile": %d}}' % number,
                 b'{"ports": [{"port": %d}]}' % number):
        try:
            json_body.parse(body, wire.CreateRequest)
        except NetnsdError as error:
            assert error.status in (400, 422)  # noqa: PT017


def test_many_values_are_read_within_bounds() -> None:
    body = b"[" + b"{}," * (BODY_BYTES // 3 - 1) + b"{}]"
    with pytest.raises(InvalidRequest):
        json_body.parse(body, wire.CreateRequest)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    with contextlib.suppress(BadJson, InvalidRequest):
        json_body.parse(body, wire.CreateRequest)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                max_size=3)),
       st.sampled_from(["name", "command", "ports", "env", "labels", "limits", "services", "umask"]))
def test_any_value_of_any_field_is_parsed_or_refused(value: object, name: str) -> None:
    with contextlib.suppress(BadJson, InvalidRequest):
        json_body.parse(json.dumps({name: value}).encode(), wire.CreateRequest)


async def test_others_have_a_turn_between_two_large_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    large = trio.Lock()

    def parse(body: bytes, _kind: object) -> None:
        order.append("large" if len(body) > 1000 else "small")

    async def other() -> None:
        for _ in range(20):
            order.append("other")
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(json_body, "parse", parse)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(json_body.parse_in_turn, b" " * 100_000, wire.CreateRequest, large)
        nursery.start_soon(other)
        nursery.start_soon(json_body.parse_in_turn, b"{}", wire.CreateRequest, large)
    assert sorted(order) == ["large"] * 5 + ["other"] * 20 + ["small"]
    # In a round of the loop tasks run in any order, so two may meet: the last of one round and the first of the next.
    runs = [len(list(run)) for kind, run in itertools.groupby(order) if kind == "large"]
    assert max(runs) <= 2
