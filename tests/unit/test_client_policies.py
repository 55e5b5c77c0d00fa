"""``policy`` reads documents strictly, sends them as they are, and shows what there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from netnsd.client.app import cli
from netnsd.client.documents import read
from netnsd.errors import InvalidPolicy
from tests.unit.fake_daemon import FakeDaemon, Problem

DOCUMENT: dict[str, Any] = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web"},
                            "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}}
POLICY = {"name": "web", "owner": {"uid": 1, "user": "alice"}, "types": ["Ingress"], "selects": ["shop", "till"],
          "document": DOCUMENT, "created_at": "2020-01-01T00:00:00.000000Z"}
PATH = "/v1/policies"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        started.answers["POST", PATH] = started.answers["GET", PATH] = {"policies": [POLICY]}
        started.answers["GET", f"{PATH}/web"] = POLICY
        started.answers["DELETE", f"{PATH}/web"] = {}
        yield started


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


@pytest.mark.parametrize("text", [
    yaml.safe_dump(DOCUMENT), json.dumps(DOCUMENT), json.dumps(DOCUMENT, indent="\t"), f"--- \n{json.dumps(DOCUMENT)}",
    f"{json.dumps(DOCUMENT)}\n---\n", f"# one\n---\n{yaml.safe_dump(DOCUMENT)}---\n# nothing\n---\n"])
def test_a_file_is_sent_as_it_is(daemon: FakeDaemon, tmp_path: Path, text: str) -> None:
    (tmp_path / "policies").write_text(text)
    done = run("policy", "apply", "-f", str(tmp_path / "policies"))
    assert (done.exit_code, done.stdout) == (0, "applied web, for shop, till\n")
    assert daemon.requests[-1].body == {"policies": [DOCUMENT]}
    assert run("policy", "apply", "-f", "-", input=text).exit_code == 0
    assert daemon.requests[-1].body == {"policies": [DOCUMENT]}


def test_several_documents_and_lists_are_sent_together(daemon: FakeDaemon) -> None:
    listed = {"kind": "List", "apiVersion": "v1", "items": [DOCUMENT]}
    daemon.answers["POST", PATH] = {"policies": [POLICY, POLICY | {"name": "db", "selects": []}]}
    done = run("policy", "apply", "-f", "-", input=yaml.safe_dump_all([DOCUMENT, listed]))
    assert daemon.requests[-1].body == {"policies": [DOCUMENT, listed]}
    assert done.stdout.splitlines() == ["applied web, for shop, till", "applied db, for no environment yet"]


@pytest.mark.parametrize(("text", "why"), [
    ("", "no document"), ("# nothing\n", "no document"), ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
    ('{"a": 1, "a": 2}', "twice"), ("a: {b: 1, b: 2}", "'b' is given twice"), ("1: a", "line 1: the key '1'"),
    ("yes: a", "the key 'yes' is not a string"), ("a: &x 1\nb: *x\n", "line 2: aliases"),
    ("a: !!python/name:os.system", "could not determine a constructor"), ("a: [", "expected"),
    ("{", "not what it should be"), ("a: &x [*x]", "aliases"), ("<<: {a: 1}", "'<<' is not a string"),
    ("[" * 3000, "nested too deep"), ('{"a":' * 3000, "nested too deep"), ('"\\ud800"', "not what it should be")])
def test_what_means_two_things_or_none_is_refused(daemon: FakeDaemon, text: str, why: str) -> None:
    done = run("policy", "apply", "-f", "-", input=text)
    assert done.exit_code == 2
    assert why in done.stderr
    assert daemon.requests == []


def test_what_is_no_text_and_no_file_is_said(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(InvalidPolicy, match="UTF-8"):
        read(str(tmp_path / "bytes"))
    done = run("policy", "apply", "-f", str(tmp_path / "missing"))
    assert done.exit_code == 1
    assert "missing: No such file" in done.stderr


def test_dates_are_text_and_numbers_are_not() -> None:
    (found,) = _read("a: 2020-01-01\nb: 1.0\nc: on\n")
    assert found == {"a": "2020-01-01", "b": 1.0, "c": True}


def _read(text: str) -> list[Any]:
    import io
    import sys

    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        return read("-")
    finally:
        sys.stdin = before


def test_policies_are_listed_and_shown(daemon: FakeDaemon) -> None:
    lines = run("policy", "ls").stdout.splitlines()
    assert [line.split() for line in lines] == [["NAME", "LIMITS", "SELECTS", "AGE"],
                                                ["web", "Ingress", "shop,", "till", lines[1].split()[-1]]]
    assert run("policy", "ls", "--all").stdout.splitlines()[1].endswith("alice")
    assert daemon.requests[-1].query == [("all", "1")]
    assert run("policy", "ls", "-o", "name").stdout == "web\n"
    shown = run("policy", "show", "web").stdout
    for part in ("web", "alice", "shop, till", "podSelector: {}", "port: 80"):
        assert part in shown
    assert yaml.safe_load(run("policy", "show", "web", "-o", "yaml").stdout) == DOCUMENT
    assert json.loads(run("policy", "show", "web", "-o", "json").stdout) == DOCUMENT
    assert run("policy", "show", "a/b").exit_code == 4
    assert "`netnsctl policy ls` lists your policies." in run("policy", "show", "a/b").stderr


def test_policies_are_removed_and_the_first_error_is_the_code(daemon: FakeDaemon) -> None:
    daemon.answers["DELETE", f"{PATH}/nope"] = Problem(404, "not_found", "there is no policy 'nope'")
    done = run("policy", "rm", "web", "nope", "web")
    assert (done.exit_code, done.stdout) == (4, "removed web\n")


@pytest.mark.parametrize("answer", [{}, {"policies": {}}, {"policies": [{}]}, {"policies": [POLICY | {"types": [1]}]}])
def test_what_is_no_answer_is_not_shown(daemon: FakeDaemon, answer: dict[str, Any]) -> None:
    daemon.answers["GET", PATH] = answer
    assert run("policy", "ls").exit_code == 3


def test_egress_is_sent_with_a_creation_and_a_template(daemon: FakeDaemon) -> None:
    assert run("create", "job", "--egress", "10.0.0.0/8,deny", "--", "true").exit_code == 0
    assert daemon.requests[-1].body["egress"] == "10.0.0.0/8,deny", "what it may be is the daemon's to say"
    assert run("template", "add", "t", "--egress", "deny").exit_code == 0
    assert daemon.requests[-1].body["specification"]["egress"] == "deny"
    assert run("create", "job", "--template", "t", "--egress", "deny").exit_code == 2
