from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


def test_info_shows_every_field(daemon: FakeDaemon) -> None:
    result = run("info")
    assert result.exit_code == 0
    assert "Version    0.1.0" in result.stdout
    assert "passrights: yes" in result.stdout
    assert json.loads(run("info", "-o", "json").stdout)["features"] == {"passrights": True}


@pytest.mark.parametrize(("severity", "code"), [("error", 1), ("warning", 0)])
def test_doctor_fails_when_something_needed_is_missing(daemon: FakeDaemon, severity: str, code: int) -> None:
    daemon.answers["GET", "/v1/doctor"] = {"checks": [
        {"name": "nftables", "ok": False, "severity": severity, "message": "no libnftables", "hint": "apt install it"},
        {"name": "veth", "ok": True, "severity": "error", "message": "there", "hint": "hidden"}], "differences": []}
    result = run("doctor")
    assert result.exit_code == code
    assert "no libnftables" in result.stdout
    assert "hint: apt install it" in result.stdout
    assert "hidden" not in result.stdout
    assert run("doctor", "-o", "name").stdout == "nftables\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_NETNSCTL_COMPLETE" in result.stdout


def test_completion_knows_verbs_and_environments(daemon: FakeDaemon) -> None:
    daemon.add("web")
    daemon.add("worker")
    daemon.add("db")

    def complete(*words: str) -> set[str]:
        env = {"_NETNSCTL_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("netnsctl", *words)),
               "COMP_CWORD": str(len(words))}
        return {line.partition(",")[2] for line in run(env=env).stdout.splitlines() if line}

    assert {"restart", "rm"} == complete("r")
    assert {"web", "worker"} == complete("show", "w")
    assert {"web", "worker"} == complete("exec", "w")
    assert {"db"} == complete("rm", "web", "d")
    daemon.version = None
    assert complete("show", "w") == set()


def test_every_verb_has_help_with_an_example() -> None:
    for verb in cli.list_commands(click.Context(cli)):
        result = run(verb, "-h")
        assert result.exit_code == 0
        assert f"netnsctl {verb}" in result.stdout.partition("Examples:")[2] or verb == "completion"
        assert "--output" in result.stdout
        assert "--socket" in result.stdout
    assert "Commands:" in run("-h").stdout


def test_alone_it_prints_help() -> None:
    result = run()
    assert result.exit_code in (0, 2)
    assert "Commands:" in result.output


def test_version_is_told_without_a_daemon() -> None:
    assert run("--version").stdout == "netnsctl 0.1.0\n"
    assert run("ls", "--version").stdout == "netnsctl 0.1.0\n"


def test_socket_option_wins_before_and_after_the_verb(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETNSD_SOCKET", "/nonexistent")
    assert run("ls").exit_code == 3
    assert run("--socket", daemon.socket_path, "ls").exit_code == 0
    assert run("ls", "--socket", daemon.socket_path).exit_code == 0
