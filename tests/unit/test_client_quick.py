"""The way without click reads what it takes exactly as click does, and leaves the rest to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netnsd.client import quick
from netnsd.client.app import cli
from netnsd.client.session import Session
from tests.unit.fake_daemon import FakeDaemon, Problem

WORDS = ["web", "-", "--", "", "-x", "--help", "-h", "--version", "ls", "create", "json", "nope", "a=b", "3000", "0",
         "7", "-1", "2.5", "nan", "-oname", "-qa", "-aq", "--output=yaml", "--label=", "--count=3", "--port=53/udp",
         "--wait=1", "-p53", "--all", "--unknown", "--cwd=", "٣", "1_0", " 3", "always", "tcp:3000",
         "--restart=on-failure", "--health=http:80/x", "--pids=7", "--health-retries=2", "--health-interval=2.5",
         "--memory=1G", "512m", "1.5G", "--cpus=0.5", "--cpus=0", "--bandwidth=10M", "--bandwidth=1T",
         "--memory=-1", "--memory=G"]
OPTIONS = sorted({name for known in quick.OPTIONS.values() for name in known} | {"-o", "--output", "--socket"})


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def read_by_click(args: list[str]) -> tuple[Any, ...]:
    """What click makes of a command line, up to running the verb. Raises what click raises."""
    session = Session()
    with cli.make_context("netnsctl", list(args), obj=session) as group:
        name, verb, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
        assert verb is not None
        with verb.make_context(name, rest, parent=group) as ctx:
            return name, dict(ctx.params), ctx.meta.get("netnsctl.command", []), session.output, session.socket


@given(st.sampled_from(["ls", "create"]), st.lists(st.sampled_from(OPTIONS), max_size=2),
       st.lists(st.sampled_from(WORDS + OPTIONS), max_size=7))
@example("create", [], ["web", "-p", "3000", "--label", "a=b", "npm", "run", "--", "--wait"])
@example("create", [], ["--count", "3", "web", "--wait", "--timeout", "2.5", "--", "-x"])
@example("create", ["--restart", "always"], ["web", "--health", "tcp:80", "--health-interval", "2", "--pids", "9", "x"])
@example("create", ["--restart", "sometimes"], ["web", "--", "x"])
@example("create", ["--pids", "0"], ["web", "--health-timeout", "1", "--", "x"])
@example("ls", ["-o"], ["json", "-l", "a=b", "-l", "c=d", "--output", "name", "-a", "--quiet"])
def test_it_reads_what_click_reads(verb: str, before: list[str], after: list[str]) -> None:
    for args in ([verb, *before, *after], [*before, *after[:len(before)], verb, *after[len(before):]]):
        session = Session()
        read = quick.parse(args, session)
        if read is not None:
            name, options, command = read
            assert (name, options, command, session.output, session.socket) == read_by_click(args)


@pytest.mark.parametrize("verb", sorted(quick.OPTIONS))
def test_it_knows_every_option_of_its_verbs(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    own = {name for param in command.params if isinstance(param, click.Option) and param.expose_value
           for name in param.opts}
    assert quick.OPTIONS[verb].keys() == own


@pytest.mark.parametrize("args", [
    [], ["ls", "web"], ["ls", "-h"], ["ls", "--version"], ["ls", "-o", "xml"], ["ls", "-o"], ["create"],
    ["create", "--", "true"], ["create", "web", "--timeout", "3"], ["create", "web", "--wait", "--timeout", "soon"],
    ["create", "web", "--count", "0"], ["create", "web", "--template", "t", "--", "true"], ["show", "web"]])
def test_all_else_is_left_to_click(args: list[str]) -> None:
    assert quick.run(args) is None


def test_completion_is_left_to_click(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_NETNSCTL_COMPLETE", "bash_complete")
    assert quick.run(["ls"]) is None


def test_it_lists_and_creates(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.run(["create", "web", "--label", "a=b", "-o", "name", "--", "true"]) == 0
    assert daemon.requests[-1].body["command"] == ["true"]
    assert quick.run(["create", "lab"]) == 0
    assert quick.run(["ls", "-q", "-l", "a=b"]) == 0
    assert capsys.readouterr().out == "web\nlab is running at 10.203.0.3\nweb\n"


def test_its_failures_are_as_clicks(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST", "/v1/environments"] = Problem(409, "name_taken", "you have it", "pass --replace.")
    assert quick.run(["create", "web"]) == 5
    assert quick.run(["ls", "--socket", "/nonexistent"]) == 3
    assert quick.run(["create", "web", "-p", "x", "-o", "json"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[:3] == ["netnsctl: you have it", "  hint: pass --replace.", "netnsctl: no netnsd at /nonexistent"]
    assert lines[-1].startswith('{"error": {"code": "invalid_port"')
    assert captured.out == ""


def test_interrupt_has_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("netnsd.client.overview.ls", interrupt)
    assert quick.run(["ls"]) == 130


@pytest.mark.parametrize("args", [["ls"], ["create", "lab"], ["create", "web", "-p", "3000", "--wait", "--", "true"]])
def test_click_is_not_imported(daemon: FakeDaemon, args: list[str]) -> None:
    code = "import sys, netnsd.client.cli as c; code = c.main(); print('click' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=30, check=True,
                          env=os.environ | {"NETNSD_SOCKET": daemon.socket_path})
    assert done.stdout.splitlines()[-1] == "False"
