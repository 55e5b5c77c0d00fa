"""``netnsctl events`` as it is typed, asked, and printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon, Problem

EVENT = {"seq": 7, "time": "2026-01-01T00:00:00Z", "kind": "ended", "environment": "i", "name": "web",
         "details": {"service": "main", "exit_code": 3, "pid": None}}
AUDIT = {"seq": 8, "time": "2026-01-01T00:00:00Z", "kind": "audit", "environment": "", "name": "",
         "details": {"uid": 1001, "user": "alice", "how": "unix", "method": "DELETE", "owner": None,
                     "route": "/v1/environments/{ref}", "ref": "web.bob", "code": "not_found"}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        started.answers["GET", "/v1/events"] = _lines(EVENT, {**EVENT, "seq": 8, "name": "db"})
        started.answers["GET", "/v1/audit"] = _lines(AUDIT)
        yield started


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def _lines(*events: Any) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


@pytest.mark.parametrize(("args", "target"), [
    ((), "/v1/events?follow=0"), (("-f",), "/v1/events"), (("--after", "5"), "/v1/events?after=5&follow=0"),
    (("--audit", "-f", "--after", "0"), "/v1/audit?after=0"), (("--audit",), "/v1/audit?follow=0")])
def test_what_is_typed_is_what_is_asked(daemon: FakeDaemon, args: tuple[str, ...], target: str) -> None:
    assert run("events", *args).exit_code == (3 if "-f" in args else 0)
    assert daemon.requests[-1].target == target


def test_a_stream_that_ends_though_it_has_no_end_is_told_and_where_to_go_on(daemon: FakeDaemon) -> None:
    done = run("events", "-f")
    assert done.exit_code == 3
    assert "--after 8" in done.stderr
    daemon.answers["GET", "/v1/events"] = b""
    assert "--after 5" in run("events", "-f", "--after", "5").stderr


def test_events_are_lines_for_people_and_objects_for_programs(daemon: FakeDaemon) -> None:
    first, second = run("events").stdout.splitlines()
    assert first.split() == ["7", "2026-01-01T00:00:00Z", "ended", "web", "service=main", "exit_code=3"]
    assert "db" in second
    assert [json.loads(line)["name"] for line in run("events", "-o", "json").stdout.splitlines()] == ["web", "db"]
    assert [event["seq"] for event in yaml.safe_load_all(run("events", "-o", "yaml").stdout)] == [7, 8]
    assert run("events", "-o", "name").stdout == "web\ndb\n"


def test_the_trail_says_who_did_what_to_what_and_what_came_of_it(daemon: FakeDaemon) -> None:
    assert run("events", "--audit").stdout.split(maxsplit=2)[2] == (
        "alice (1001, unix)  DELETE /v1/environments/{ref}  web.bob: not_found\n")


def test_who_may_not_read_the_trail_is_told(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/audit"] = Problem(403, "forbidden", "only an admin may do that")
    assert run("events", "--audit").exit_code == 7


def test_words_of_others_do_nothing_to_the_terminal(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/events"] = _lines({**EVENT, "name": "\x1b[31m", "details": {"reason": "a\nb\x1b"}})
    for output in ("table", "name"):
        assert "\x1b" not in (said := run("events", "-o", output).stdout)
        assert said.count("\n") == 1


@pytest.mark.parametrize("answer", [b"[]\n", b"{}\n", b"x\n", b'{"seq": "7"}\n', _lines({**EVENT, "details": None})])
def test_what_is_no_event_is_a_bad_answer(daemon: FakeDaemon, answer: bytes) -> None:
    daemon.answers["GET", "/v1/events"] = answer
    result = run("events")
    assert (result.exit_code, "cannot read the answer" in result.stderr) == (3, True)
