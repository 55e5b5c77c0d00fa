"""Sizes and quotas as users type them and as they see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from netnsd import wire
from netnsd.client import render
from netnsd.client.app import cli
from netnsd.client.arguments import parse_processors, parse_rate, parse_size
from tests.unit.fake_daemon import FakeDaemon, Problem

QUOTA: dict[str, Any] = {
    "owner": {"uid": 1001, "user": "alice"}, "own": ["environments"],
    "limits": {"environments": 20, "ports": None, "memory": 8 << 30, "cpu": 1.5, "creations_per_minute": 0},
    "used": {"environments": 3, "ports": 4, "memory": 512 << 20, "cpu": 0.25}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


@pytest.mark.parametrize(("text", "size"), [
    ("1", 1), ("512M", 512 << 20), ("512m", 512 << 20), ("1.5G", 3 << 29), ("2k", 2048), ("1T", 1 << 40), ("0", None),
    ("-1", None), ("M", None), ("", None), ("1MB", None), ("1P", None), ("nan", None), ("inf", None), ("1e3", 1000),
    ("infG", None)])
def test_sizes_are_by_1024(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "rate"), [("100M", 100_000_000), ("1.5g", 1_500_000_000), ("64K", 64_000), ("9", 9),
                                            ("1T", None), ("0", None), ("fast", None)])
def test_rates_are_by_1000(text: str, rate: int | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(("text", "cores"), [("1.5", 1.5), ("0.01", 0.01), ("2", 2), ("0", None), ("-1", None),
                                             ("all", None), ("inf", None)])
def test_processors_are_a_number(text: str, cores: float | None) -> None:
    assert parse_processors(text) == cores


@pytest.mark.parametrize(("size", "shown"), [(512 << 20, "512M"), (3 << 29, "1.5G"), (1 << 40, "1T"), (1000, "1000"),
                                             (1 << 10, "1K"), (0, "0"), ((1 << 30) + 1, "1073741825")])
def test_sizes_are_shown_as_they_are_typed(size: int, shown: str) -> None:
    assert render.size(size) == shown
    assert not size or parse_size(shown) == size


def test_limits_are_shown() -> None:
    limits = {"memory": 512 << 20, "cpu": 1.5, "pids": None, "bandwidth": 100_000_000}
    assert render.limits(limits) == "memory 512M, cpu 1.5, bandwidth 100M"
    assert render.limits({}) == ""


@pytest.mark.parametrize("option", [("--memory", "lots"), ("--cpus", "0"), ("--bandwidth", "fast")])
def test_what_is_no_limit_is_wrong_usage(daemon: FakeDaemon, option: tuple[str, str]) -> None:
    done = run("create", "web", *option, "--", "true")
    assert done.exit_code == 2
    assert option[1] in done.stderr
    assert daemon.requests == []


def test_a_quota_is_set_as_it_is_said_and_no_more(daemon: FakeDaemon) -> None:
    daemon.answers["PUT", "/v1/quotas/alice"] = QUOTA
    done = run("quota", "set", "alice", "--environments", "20", "--memory", "8G", "--cpus", "1.5",
               "--ports", "unlimited", "--creations-per-minute", "0")
    assert done.exit_code == 0
    body = daemon.requests[-1].body
    assert body == {"environments": 20, "memory": 8 << 30, "cpu": 1.5, "ports": None, "creations_per_minute": 0}
    assert msgspec.convert(body, wire.QuotaRequest).ports is None
    run("quota", "set", "alice", "--ports", "3")
    assert daemon.requests[-1].body == {"ports": 3}
    rows = [line.split("   ") for line in done.stdout.splitlines()]
    assert [cell.strip() for cell in rows[1] if cell] == [
        "alice", "3 of 20", "4", "512M of 8G", "0.25 of 1.5", "0"]


@pytest.mark.parametrize("args", [(), ("--environments", "-1"), ("--environments", "1.5"), ("--memory", "lots"),
                                  ("--cpus", "0"), ("--ports", "none"), ("--creations-per-minute", "٣")])
def test_what_is_no_quota_is_wrong_usage(daemon: FakeDaemon, args: tuple[str, ...]) -> None:
    assert run("quota", "set", "alice", *args).exit_code == 2
    assert daemon.requests == []


def test_quotas_are_shown_and_reset(daemon: FakeDaemon) -> None:
    other = {**QUOTA, "owner": {"uid": 1002, "user": "bob"}}
    daemon.answers["GET", "/v1/quotas"] = {"quotas": [QUOTA, other]}
    daemon.answers["GET", "/v1/quotas/alice"] = QUOTA
    daemon.answers["DELETE", "/v1/quotas/alice"] = QUOTA
    assert run("quota", "show", "-o", "name").stdout == "alice\nbob\n"
    assert json.loads(run("quota", "show", "-o", "json").stdout) == [QUOTA, other]
    assert json.loads(run("quota", "show", "alice", "-o", "json").stdout) == QUOTA
    assert run("quota", "reset", "alice").exit_code == 0
    assert daemon.requests[-1].method == "DELETE"


def test_what_is_no_quota_is_a_bad_answer(daemon: FakeDaemon) -> None:
    answer: dict[str, Any]
    for answer in ({"quotas": 3}, {"quotas": [{}]}, {"quotas": [{**QUOTA, "used": {}}]}):
        daemon.answers["GET", "/v1/quotas"] = answer
        assert run("quota", "show").exit_code == 3


def test_who_creates_too_fast_asks_again_when_it_is_time(daemon: FakeDaemon) -> None:
    daemon.overload = Problem(429, "too_many_creations", "too many a minute")
    daemon.overloaded, daemon.retry_after = 2, "0"
    assert run("create", "web").exit_code == 0
    assert len(daemon.requests) == 3
    daemon.overloaded, daemon.retry_after = 1, "45"  # longer than anybody waits
    done = run("create", "more")
    assert (done.exit_code, done.stderr) == (3, "netnsctl: too many a minute\n")
    daemon.answers["POST", "/v1/environments"] = Problem(403, "quota_exceeded", "no more", "Remove some.")
    done = run("create", "web")
    assert (done.exit_code, done.stderr) == (7, "netnsctl: no more\n  hint: Remove some.\n")
