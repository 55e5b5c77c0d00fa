"""Many at once, and a daemon that has too much to do."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from netnsd.client import transport
from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon, Problem


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client paused, which takes no time here."""
    made: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("netnsd.client.transport.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    return made


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


# -- create -----------------------------------------------------------------------------------------------------


def test_many_are_created_by_one_request_and_shown_as_a_list(daemon: FakeDaemon) -> None:
    result = run("create", "w", "--count", "3", "-p", "3000", "--", "true")
    assert result.exit_code == 0
    assert daemon.requests[-1].body["count"] == 3
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["NAME", "w-1", "w-2", "w-3"]
    assert run("create", "x", "--count", "2", "-o", "name").stdout == "x-1\nx-2\n"
    assert [e["name"] for e in json.loads(run("create", "y", "--count", "1", "-o", "json").stdout)] == ["y-1"]
    assert len(daemon.requests) == 3


def test_many_are_waited_for_each_by_its_id(daemon: FakeDaemon) -> None:
    assert run("create", "w", "--count", "2", "--wait", "--timeout", "5").exit_code == 0
    waits = daemon.requests[-2:]
    assert [request.path.split("/")[3] for request in waits] == list(daemon.environments)
    assert dict(waits[0].query) == {"for": "ready", "timeout": "5"}
    assert 0 < float(dict(waits[1].query)["timeout"]) <= 5


def test_one_of_many_that_does_not_get_ready_is_named(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/environments/00000000-0000-4000-8000-000000000001/wait"] = Problem(
        504, "wait_timeout", "3000 has no listener")
    result = run("create", "w", "--count", "3", "--wait")
    assert result.exit_code == 6
    assert "`netnsctl logs w-2`" in result.stderr


def test_a_daemon_that_answers_one_for_many_is_told(daemon: FakeDaemon) -> None:
    daemon.answers["POST", "/v1/environments"] = daemon.add("w")
    result = run("create", "w", "--count", "2")
    assert (result.exit_code, "not a list of environments" in result.stderr) == (3, True)


def test_creation_of_a_template_sends_its_name_and_labels_alone(daemon: FakeDaemon) -> None:
    run("template", "add", "shop", "--", "true")
    assert run("create", "web", "--template", "shop", "-l", "a=b", "--replace").exit_code == 0
    assert daemon.requests[-1].body == {"name": "web", "template": "shop", "labels": {"a": "b"}, "replace": True}
    run("create", "w", "--template", "shop", "--count", "2")
    assert daemon.requests[-1].body == {"name": "w", "template": "shop", "labels": {}, "replace": False, "count": 2}
    assert run("create", "db", "--template", "nope").exit_code == 4
    assert run("create", "db", "--template", os.fsdecode(b"\xff")).exit_code == 4


@pytest.mark.parametrize("args", [
    ["-p", "3000"], ["-e", "A=1"], ["--clean-env"], ["--cwd", "/"], ["--setuid"], ["--", "true"]])
def test_a_template_leaves_nothing_to_say_but_labels(daemon: FakeDaemon, args: list[str]) -> None:
    result = run("create", "web", "--template", "shop", *args)
    assert result.exit_code == 2
    assert "the template says it all" in result.stderr
    assert daemon.requests == []


@pytest.mark.parametrize("count", ["0", "-1", "x", ""])
def test_a_count_is_a_number_from_one(daemon: FakeDaemon, count: str) -> None:
    assert run("create", "web", "--count", count).exit_code == 2
    assert daemon.requests == []


def test_an_overloaded_daemon_is_asked_again_when_it_says(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.overloaded, daemon.retry_after = 3, "2"
    result = run("create", "web")
    assert (result.exit_code, result.stderr) == (0, "")
    assert pauses == [2, 2, 2]
    assert len(daemon.requests) == 4


def test_an_overloaded_daemon_is_not_asked_without_a_pause(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.overloaded = 2
    assert run("create", "web").exit_code == 0
    assert len(pauses) == 2
    assert min(pauses) >= 0.1


def test_patience_with_an_overloaded_daemon_ends(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.overloaded, daemon.retry_after = 1000, "7"
    result = run("create", "web")
    assert result.exit_code == 3
    assert result.stderr.startswith("netnsctl: 64 creations of yours wait already")
    assert sum(pauses) == 28


@pytest.mark.parametrize("after", [None, "31", "soon", "-1", "9" * 400, "Fri, 01 Jan 2027 00:00:00 GMT"])
def test_an_overloaded_daemon_that_names_no_near_time_is_not_asked_again(
    daemon: FakeDaemon, pauses: list[float], after: str | None,
) -> None:
    daemon.overloaded, daemon.retry_after = 1, after
    assert run("create", "web").exit_code == 3
    assert pauses == []


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 201 X\r\nnetnsd-version: 0.1.0\r\nContent-Length: 100\r\n\r\n{"],
                         ids=["no answer", "half an answer"])
def test_a_lost_answer_is_asked_for_again_under_the_same_key(
        daemon: FakeDaemon, pauses: list[float], part: bytes) -> None:
    daemon.lost = [part, part]
    result = run("create", "web")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(pauses) == 2
    keys = {request.headers["idempotency-key"] for request in daemon.requests}
    assert len(daemon.requests) == 3
    assert len(keys) == 1
    run("create", "other")
    assert daemon.requests[-1].headers["idempotency-key"] not in keys


def test_patience_with_a_daemon_that_goes_away_ends(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.lost = [b""] * 1000
    result = run("create", "web")
    assert (result.exit_code, "it may be restarting" in result.stderr) == (3, True)
    assert 29 < sum(pauses) <= 30


def test_a_daemon_that_is_away_for_a_moment_is_found_again(
        daemon: FakeDaemon, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.lost = [b""]
    refusals = [errno.ENOENT, errno.ECONNREFUSED]
    connect = transport.connect

    def refusing(path: str) -> socket.socket:
        if refusals and not daemon.lost:
            transport._refused(path, OSError(refusals.pop(), ""))
        return connect(path)

    monkeypatch.setattr(transport, "connect", refusing)
    assert run("create", "web").exit_code == 0
    assert len(pauses) == 3


def test_a_daemon_that_is_not_there_is_not_waited_for(pauses: list[float], tmp_path: Path) -> None:
    assert run("create", "web", "--socket", str(tmp_path / "none")).exit_code == 3
    assert pauses == []


def test_a_daemon_that_is_stopping_is_asked_again(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.answers["POST", "/v1/environments"] = Problem(503, "shutting_down", "the daemon is stopping")
    assert run("create", "web").exit_code == 3
    assert len({request.headers["idempotency-key"] for request in daemon.requests}) == 1
    assert len(pauses) > 10


@pytest.mark.parametrize("args", [("stop", "web"), ("rm", "web"), ("ls",)])
def test_what_has_no_key_is_asked_once(daemon: FakeDaemon, pauses: list[float], args: tuple[str, ...]) -> None:
    daemon.add("web")
    daemon.lost = [b""]
    daemon.raw_answer = b"" if args == ("ls",) else None
    assert run(*args).exit_code == 3
    assert len(daemon.requests) == 1
    assert "idempotency-key" not in daemon.requests[0].headers


def test_other_failures_are_not_tried_again(daemon: FakeDaemon, pauses: list[float]) -> None:
    daemon.answers["POST", "/v1/environments"] = Problem(503, "ports_exhausted", "no port is free")
    assert run("create", "web").exit_code == 3
    assert pauses == []
    assert len(daemon.requests) == 1


# -- rm ---------------------------------------------------------------------------------------------------------


def test_several_are_removed_by_one_request(daemon: FakeDaemon) -> None:
    daemon.add("web")
    daemon.add("db")
    assert run("rm", "db", "web", "db").stdout == "removed db\nremoved web\n"
    assert [(r.method, r.target) for r in daemon.requests] == [("DELETE", "/v1/environments?ref=db&ref=web")]


def test_failures_are_told_in_the_order_of_the_command_line(daemon: FakeDaemon) -> None:
    refs = {"stuck": ("kernel_error", "busy"), "none": ("not_found", "no environment")}
    daemon.answers["DELETE", "/v1/environments"] = {"removed": ["web"], "failed": [
        {"ref": ref, "error": {"code": refs[ref][0], "message": refs[ref][1], "hint": "", "details": {}}}
        for ref in ("none", "stuck")]}
    result = run("rm", "stuck", "web", "none", "..")
    assert result.stdout == "removed web\n"
    assert result.stderr.splitlines()[0] == "netnsctl: busy"
    assert result.stderr.splitlines()[1] == "netnsctl: no environment"
    assert "no environment '..'" in result.stderr
    assert result.exit_code == 1


def test_removal_without_waiting_says_that_it_goes_on(daemon: FakeDaemon) -> None:
    daemon.add("web")
    result = run("rm", "web", "nope", "--no-wait")
    assert result.stdout == "removing web\n"
    assert result.exit_code == 4
    assert ("wait", "0") in daemon.requests[-1].query


def test_all_are_removed_by_id_in_requests_that_the_daemon_reads(daemon: FakeDaemon) -> None:
    ids = [daemon.add(f"e{number}")["id"] for number in range(2000)]
    names = run("rm", "--all", "-o", "name").stdout.split()
    assert names == [f"e{number}" for number in range(2000)]
    removals = [request for request in daemon.requests if request.method == "DELETE"]
    assert 1 < len(removals) <= 12
    assert sorted(value for request in removals for _, value in request.query) == sorted(ids)


def test_all_that_have_gone_meanwhile_are_removed(daemon: FakeDaemon) -> None:
    environment = daemon.add("web")
    daemon.answers["DELETE", "/v1/environments"] = {"removed": [], "failed": [
        {"ref": environment["id"], "error": {"code": "not_found", "message": "gone", "hint": "", "details": {}}}]}
    result = run("rm", "--all")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "removed web\n", "")


def test_what_befalls_the_whole_request_is_told_once(daemon: FakeDaemon) -> None:
    daemon.answers["DELETE", "/v1/environments"] = Problem(503, "shutting_down", "the daemon is stopping")
    result = run("rm", "a", "b", "c")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "", "netnsctl: the daemon is stopping\n")


@pytest.mark.parametrize("answer", [{}, {"failed": None}, {"failed": [1]}, {"failed": [{"ref": "a"}]},
                                    {"failed": [{"error": {"code": "not_found"}}]}])
def test_an_answer_that_is_no_removal_is_told(daemon: FakeDaemon, answer: dict[str, Any]) -> None:
    daemon.answers["DELETE", "/v1/environments"] = answer or {"removed": []}
    result = run("rm", "a")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "cannot read the answer" in result.stderr
