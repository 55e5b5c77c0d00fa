"""``netnsctl token``: what is asked for, and that a token is shown once, where it is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from netnsd import wire
from netnsd.client import tokens
from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon

TOKEN = "netnsd_0123456789ab_" + "5" * 64


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


def test_a_token_is_created_as_asked_and_shown(daemon: FakeDaemon) -> None:
    shown = run("token", "create", "ci")
    assert (shown.exit_code, shown.stdout.splitlines()[-1]) == (0, TOKEN)
    assert daemon.requests[-1].body == {"name": "ci", "scope": "read"}
    run("token", "create", "ci", "--scope", "write", "--expires", "30d", "--user", "alice")
    body = daemon.requests[-1].body
    assert body == {"name": "ci", "scope": "write", "expires_seconds": 30 * 86400, "user": "alice"}
    assert body.keys() <= set(wire.TokenRequest.__struct_fields__)
    assert json.loads(run("token", "create", "ci", "-o", "json").stdout)["token"] == TOKEN
    assert run("token", "create", "ci", "-o", "name").stdout == "ci\n"


def test_tokens_are_listed_without_themselves(daemon: FakeDaemon) -> None:
    run("token", "create", "ci", "--scope", "write")
    run("token", "create", "old", "--expires", "1s")
    shown = run("token", "ls", "--all").stdout
    assert daemon.requests[-1].target == "/v1/tokens?all=1"
    assert [line.split()[:4] for line in shown.splitlines()] == [
        ["NAME", "SCOPE", "OWNER", "EXPIRES"], ["ci", "write", "me", "never"], ["old", "read", "me", "expired"]]
    assert "555" not in shown + run("token", "ls", "-o", "yaml").stdout
    assert daemon.requests[-1].target == "/v1/tokens?all=0"


def test_revoking_goes_on_after_one_that_is_not_there(daemon: FakeDaemon) -> None:
    run("token", "create", "ci")
    done = run("token", "revoke", "none", "ci", "a/b")
    assert (done.exit_code, done.stdout) == (4, "revoked ci\n")
    assert daemon.tokens == {}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("12h", 43200), ("30d", 2592000)])
def test_durations(text: str, seconds: int) -> None:
    assert tokens.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "0d", "-1d", "1.5h", "30 d", "30D", "1w", "٣d", "1d1h", "9999999999s"])
def test_what_is_no_duration_is_named(daemon: FakeDaemon, text: str) -> None:
    with pytest.raises(click.BadParameter):
        tokens.parse_duration(text)
    before = len(daemon.requests)
    assert run("token", "create", "ci", "--expires", text).exit_code == 2
    assert len(daemon.requests) == before


def test_scopes_are_the_apis() -> None:
    assert wire.Scope.__args__ == tokens.SCOPES  # type: ignore[attr-defined]
