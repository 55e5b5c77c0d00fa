"""Every error that can be answered has a code of its own, says when it comes, and fits HTTP and the shell."""

from __future__ import annotations

import http
import inspect
import json
import re

import pytest

from netnsd import errors
from netnsd.api import problems
from netnsd.errors import KernelError, NetnsdError

CLASSES = [value for value in vars(errors).values()
           if inspect.isclass(value) and issubclass(value, NetnsdError) and value is not NetnsdError]


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes) > 30


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_each_error_is_documented_and_well_formed(kind: type[NetnsdError]) -> None:
    assert "code" in vars(kind), "it has its parent's code"
    assert re.fullmatch(r"[a-z][a-z_]+[a-z]", kind.code)
    assert kind.__doc__ is not None
    assert kind.__doc__ != NetnsdError.__doc__
    assert kind.__doc__.strip().endswith(".")
    assert http.HTTPStatus(kind.status).value >= 400
    assert 1 <= kind.exit_code < 126
    assert not kind.__subclasses__() or all(child.__module__ != errors.__name__ for child in kind.__subclasses__())


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_each_error_is_answered_whole(kind: type[NetnsdError]) -> None:
    error = kind("what", hint="do", port=1)
    assert json.loads(problems.body_of(error)) == {
        "error": {"code": kind.code, "message": "what", "hint": "do", "details": {"port": 1}}}
    head, _, body = problems.response_of(error).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {kind.status} ".encode())
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Connection: close" in head


def test_kernel_error_names_stage_and_errno() -> None:
    error = KernelError.at("link", OSError(17, "whatever"))
    assert (error.message, error.details) == ("link: File exists", {"stage": "link", "errno": "EEXIST"})
    assert KernelError.at("link", OSError("odd")).details == {"stage": "link", "errno": "0"}
