"""Reading a JSON body that means one thing only."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
import trio

from netnsd.errors import BadJson, InvalidRequest

T = TypeVar("T")
_LARGE_BYTES = 32 << 10
_WHOLE = 2.0**64  # no field takes as much


def parse(body: bytes, kind: type[T]) -> T:
    """Decode ``body`` to ``kind``, an empty one as {}.

    Raises:
        BadJson: not JSON, a key twice, nesting too deep, NaN, a lone surrogate.
        InvalidRequest: a field unknown, missing, or of the wrong type.
    """
    try:
        tree = json.loads((body or b"{}").decode(), object_pairs_hook=_object, parse_constant=_constant,
                          parse_float=_number)
        if b"\\u" in body:
            json.dumps(tree, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise BadJson("the body is nested too deep", hint="Send one plain JSON object.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeError, and numbers of thousands of digits
        raise BadJson(f"the body is not JSON: {str(error)[:200]}", hint="Send one plain JSON object.") from error
    try:
        return msgspec.convert(tree, kind, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), hint="/openapi.json describes every field.") from error


async def parse_in_turn(body: bytes, kind: type[T], large: trio.Lock) -> T:
    """As ``parse``; of large bodies one at a time, so that many do not hold up the loop together."""
    if len(body) <= _LARGE_BYTES:
        return parse(body, kind)
    async with large:
        return parse(body, kind)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _number(text: str) -> float | int:
    """To JSON's schemas 3.0 is a whole number as good as 3."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < _WHOLE else number


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
