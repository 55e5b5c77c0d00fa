"""How servers are kept running, looked after and bounded, as users type it and as they see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from netnsd import wire
from netnsd.client import quick
from netnsd.client.app import cli
from netnsd.client.arguments import RESTART_POLICIES, parse_health
from netnsd.core import specification
from netnsd.errors import InvalidPort, InvalidRequest
from tests.unit.fake_daemon import FakeDaemon


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


ALL = ("--restart", "on-failure", "--health", "http:3000/healthz", "--health-interval", "2.5", "--health-timeout", "1",
       "--health-retries", "4", "--health-start-period", "0", "--pids", "200", "--memory", "1.5G", "--cpus", "0.5",
       "--bandwidth", "100M")


@pytest.mark.parametrize("by", ["click", "quick"])
def test_what_is_typed_is_what_the_daemon_takes(daemon: FakeDaemon, by: str) -> None:
    args = ("create", "web", *ALL, "--", "./server")
    assert (run(*args).exit_code if by == "click" else quick.run(list(args))) == 0
    body = daemon.requests[-1].body
    request = msgspec.convert(body, wire.CreateRequest)
    assert request.restart == "on-failure"
    assert request.resources == wire.Resources(memory=3 << 29, cpu=0.5, pids=200, bandwidth=100_000_000)
    assert request.health == wire.HealthCheck(http="/healthz", port=3000, interval_seconds=2.5, timeout_seconds=1,
                                              retries=4, start_period_seconds=0)


def test_what_is_not_typed_is_not_sent(daemon: FakeDaemon) -> None:
    run("create", "web", "--", "./server")
    assert {"restart", "health", "resources"}.isdisjoint(daemon.requests[-1].body)
    run("create", "web2", "--health", "tcp:80", "--", "./server")
    assert daemon.requests[-1].body["health"] == {"tcp": 80}


@pytest.mark.parametrize(("text", "check"), [
    ("tcp:3000", {"tcp": 3000}), ("http:3000", {"http": "/", "port": 3000}), ("http:1/", {"http": "/", "port": 1}),
    ("http:8080/a/b?c=d:e", {"http": "/a/b?c=d:e", "port": 8080}),
    ("cmd:./check -x | grep ok", {"command": ["sh", "-c", "./check -x | grep ok"]}),
    ("cmd:a:b/c", {"command": ["sh", "-c", "a:b/c"]})])
def test_checks_are_read(text: str, check: dict[str, Any]) -> None:
    assert parse_health(text, retries=None) == check
    assert specification.check_health(msgspec.convert(check, wire.HealthCheck))


@pytest.mark.parametrize(("text", "kind"), [
    ("", InvalidRequest), ("3000", InvalidRequest), ("tcp", InvalidRequest), ("tcp:", InvalidRequest),
    ("cmd:", InvalidRequest), ("udp:53", InvalidRequest), ("http:", InvalidRequest), ("cmd:\udcff", InvalidRequest),
    ("tcp:x", InvalidPort), ("tcp:0", InvalidPort), ("tcp:65536", InvalidPort), ("http:/x", InvalidPort),
    ("http:x/", InvalidPort)])
def test_checks_that_cannot_be_are_told(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        parse_health(text)


@pytest.mark.parametrize(("args", "said"), [
    (("create", "web", "--restart", "always"), "--restart is about a server"),
    (("create", "web", "--health", "tcp:1"), "--health is about a server"),
    (("create", "web", "--health-retries", "2", "--", "x"), "--health-retries says how --health is done"),
    (("create", "web", "--restart", "always", "--health-timeout", "2", "--", "x"), "--health-timeout says"),
    (("create", "web", "--template", "t", "--restart", "always"), "leave out --restart"),
    (("create", "web", "--template", "t", "--pids", "3"), "leave out --pids"),
    (("create", "web", "--restart", "sometimes", "--", "x"), "'sometimes' is not one of"),
    (("create", "web", "--pids", "0", "--", "x"), "--pids"),
    (("template", "add", "t", "--health", "tcp:1"), "--health is about a server"),
    (("template", "add", "t", "--health-interval", "3", "--", "x"), "says how --health is done")])
def test_what_makes_no_sense_is_wrong_usage(daemon: FakeDaemon, args: tuple[str, ...], said: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert said in done.stderr
    assert daemon.requests == []


def test_policies_are_those_of_the_daemon() -> None:
    assert set(RESTART_POLICIES) == set(wire.RestartPolicy.__args__)  # type: ignore[attr-defined]


def service(**fields: Any) -> dict[str, Any]:
    return {"name": "main", "command": ["./server"], "pid": 4711, "state": "running", "exit_code": None,
            "restart": "no", "restarts": 0, "health": None} | fields


@pytest.mark.parametrize(("fields", "listed", "shown"), [
    ({}, "main: running", "main: running (pid 4711): ./server"),
    ({"health": "healthy"}, "main: running (healthy)", "main: running (healthy) (pid 4711): ./server"),
    ({"restart": "always", "restarts": 3, "health": "starting"}, "main: running (starting)",
     "main: running (starting) (pid 4711, restart always, restarted 3 times): ./server"),
    ({"state": "restarting", "exit_code": 7, "pid": None, "restart": "on-failure"}, "main: restarting 7",
     "main: restarting 7 (restart on-failure): ./server")])
def test_states_are_seen(daemon: FakeDaemon, fields: dict[str, Any], listed: str, shown: str) -> None:
    daemon.add("web", services=[service(**fields)], resources={"pids": 64})
    assert listed in run("ls").stdout
    details = run("show", "web").stdout
    assert shown in details
    assert "pids 64" in details


def test_an_older_daemons_answer_is_shown(daemon: FakeDaemon) -> None:
    old = {key: value for key, value in service().items() if key not in ("restart", "restarts", "health")}
    daemon.add("web", services=[old])
    assert "main: running (pid 4711): ./server" in run("show", "web").stdout
