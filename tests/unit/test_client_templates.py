from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from netnsd import wire
from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon, Problem


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


# -- template ---------------------------------------------------------------------------------------------------


def test_a_template_is_what_create_would_have_sent(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "x")
    args = ["-p", "20007:3000", "--env", "A=1", "--cwd", "/srv", "-l", "team=shop", "--setuid", "npm", "run", "-x"]
    assert run("create", "shop", *args).exit_code == 0
    created = daemon.requests[-1].body
    assert run("template", "add", "shop", "--warm", "2", *args).exit_code == 0
    body = daemon.requests[-1].body
    assert body["specification"] == {k: v for k, v in created.items() if k not in ("name", "replace")}
    assert body["specification"]["command"] == ["npm", "run", "-x"]
    assert (body["name"], body["warm"], body["replace"]) == ("shop", 2, False)


def test_a_template_sends_only_fields_that_the_daemon_takes(daemon: FakeDaemon) -> None:
    run("template", "add", "shop", "--replace", "--", "true")
    body = daemon.requests[-1].body
    assert body["replace"] is True
    assert body.keys() <= set(wire.TemplateRequest.__struct_fields__)
    assert body["specification"].keys() <= set(wire.Specification.__struct_fields__)
    run("template", "add", "lab", "--clean-env")
    assert daemon.requests[-1].body["specification"] == {"ports": [], "labels": {}, "setuid": False, "env": {}}


def test_templates_are_listed(daemon: FakeDaemon) -> None:
    run("template", "add", "shop", "-p", "3000", "-p", "5353:53/udp", "--warm", "2", "--", "npm", "run", "dev server")
    run("template", "add", "lab")
    lines = run("template", "ls").stdout.splitlines()
    assert lines[0].split() == ["NAME", "WARM", "PORTS", "SERVICES", "AGE"]
    assert "0 of 2" in lines[1]
    assert "3000, 5353:53/udp" in lines[1]
    assert "main: npm run 'dev server'" in lines[1]
    assert lines[2].split()[:4] == ["lab", "-", "-", "-"]
    assert run("template", "ls", "-o", "name").stdout == "shop\nlab\n"
    listed = json.loads(run("template", "-o", "json", "ls").stdout)
    assert listed == list(daemon.templates.values()) == yaml.safe_load(run("-o", "yaml", "template", "ls").stdout)


def test_a_template_is_shown_with_why_it_is_not_warm(daemon: FakeDaemon) -> None:
    added = run("template", "add", "shop", "-l", "team=shop", "--warm", "2", "--", "true").stdout
    shown = run("template", "show", "shop").stdout
    assert added == shown
    for part in ("0 of 2 (no room)", "main: true", "team=shop", "me", "00000000-0000-4000-8000-0000000000ff"):
        assert part in shown
    assert json.loads(run("template", "show", "shop", "-o", "json").stdout) == daemon.templates["shop"]
    assert run("template", "show", "nope").exit_code == 4


def test_templates_are_removed_and_the_first_error_is_the_code(daemon: FakeDaemon) -> None:
    run("template", "add", "shop")
    run("template", "add", "lab")
    result = run("template", "rm", "shop", "nope", "a/b", "lab", "shop")
    assert result.stdout == "removed shop\nremoved lab\n"
    assert "there is no template 'nope'" in result.stderr
    assert "`netnsctl template ls` lists your templates" in result.stderr
    assert result.exit_code == 4
    assert daemon.templates == {}
    assert run("template", "rm").exit_code == 2


def test_a_template_of_an_existing_name_is_a_conflict(daemon: FakeDaemon) -> None:
    run("template", "add", "shop")
    assert run("template", "add", "shop").exit_code == 5
    assert run("template", "add", "shop", "--replace").exit_code == 0


def test_other_peoples_words_cannot_steer_the_terminal(daemon: FakeDaemon) -> None:
    run("template", "add", "shop", "--", "x\033]0;owned\a")
    daemon.templates["shop"]["reason"] = "\033[2J"
    daemon.pool["reason"] = "\033[2J"
    for args in (["template", "ls"], ["template", "show", "shop"], ["pool", "ls"]):
        assert run(*args).stdout.replace("\n", "").isprintable()


@pytest.mark.parametrize("answer", [{"templates": None}, {"templates": [1]}, {"templates": [{"name": "x"}]}])
def test_answers_that_are_no_templates_are_told(daemon: FakeDaemon, answer: dict[str, Any]) -> None:
    daemon.answers["GET", "/v1/templates"] = answer
    assert run("template", "ls").exit_code == 3


# -- pool -------------------------------------------------------------------------------------------------------


def test_pools_are_listed_with_why_they_are_not_full(daemon: FakeDaemon) -> None:
    daemon.pool["reason"] = "the supernet is full"
    lines = run("pool", "ls").stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "TARGET", "READY", "CLAIMED", "MISSED"]
    assert lines[1].split() == ["slots", "8", "8", "7", "3", "1"]
    assert lines[2] == "slots: the supernet is full"
    assert json.loads(run("pool", "ls", "-o", "json").stdout) == [daemon.pool]
    assert run("pool", "ls", "-o", "name").stdout == "slots\n"


def test_a_pool_is_resized_and_drained(daemon: FakeDaemon) -> None:
    result = run("pool", "resize", "32", "-o", "json")
    assert json.loads(result.stdout)["size"] == 32
    assert (daemon.requests[-1].method, daemon.requests[-1].path) == ("PATCH", "/v1/pools/slots")
    assert daemon.requests[-1].body == {"size": 32}
    assert run("pool", "drain").exit_code == 0
    assert daemon.requests[-1].body == {"size": 0}
    assert run("pool", "resize", "-1").exit_code == 2
    daemon.answers["PATCH", "/v1/pools/slots"] = Problem(403, "forbidden", "only an admin may do that")
    assert run("pool", "drain").exit_code == 7


def test_answers_that_are_no_pools_are_told(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/pools"] = {"pools": None}
    assert run("pool", "ls").exit_code == 3
    daemon.answers["GET", "/v1/pools"] = {"pools": [{}]}
    assert run("pool", "ls").exit_code == 3


# -- both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["template", "pool"])
def test_a_noun_alone_shows_its_verbs(group: str) -> None:
    result = run(group)
    assert result.exit_code == 2
    assert "Commands:" in result.output
    result = run(group, "nope")
    assert result.exit_code == 2
    assert f"`netnsctl {group} --help`" in result.stderr


def test_completion_knows_templates_and_their_verbs(daemon: FakeDaemon) -> None:
    run("template", "add", "shop")
    run("template", "add", "lab")

    def complete(*words: str) -> set[str]:
        env = {"_NETNSCTL_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("netnsctl", *words)),
               "COMP_CWORD": str(len(words))}
        return {line.partition(",")[2] for line in run(env=os.environ | env).stdout.splitlines() if line}

    assert complete("template", "r") == {"rm"}
    assert complete("template", "show", "s") == {"shop"}
    assert complete("template", "rm", "shop", "l") == {"lab"}
    assert complete("create", "web", "--template", "s") == {"shop"}
    assert complete("pool", "d") == {"drain"}
