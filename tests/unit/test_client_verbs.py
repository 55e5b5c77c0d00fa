from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from netnsd.client.app import cli
from tests.unit.fake_daemon import FakeDaemon, Problem

PORTS = [{"port": 3000, "protocol": "tcp", "published": 20007, "listen": "127.0.0.1"},
         {"port": 53, "protocol": "udp", "published": 20008, "listen": "127.0.0.1"}]
RUNNING = {"name": "main", "command": ["npm", "run", "dev server"], "pid": 12, "state": "running", "exit_code": None}
FAILED = {"name": "db", "command": ["postgres"], "pid": None, "state": "exited", "exit_code": 1}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False, **kwargs)


# -- create -----------------------------------------------------------------------------------------------------


def test_create_sends_what_running_it_here_would_have_found(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "ä b")
    # netnsd's own, which it sets anew in each environment.
    for name in ("PORT", "HOST", "NETNSD_NAME", "NETNSD_ID", "NETNSD_IP", "NETNSD_URL"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o027)
    try:
        result = run("create", "web", "--port", "3000", "-p", "53/udp", "--env", "A=1=2", "--label", "team=shop",
                     "--", "npm", "run", "--", "-x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.stderr
    body = daemon.requests[-1].body
    assert body["command"] == ["npm", "run", "--", "-x"]
    assert body["ports"] == [{"port": 3000, "protocol": "tcp"}, {"port": 53, "protocol": "udp"}]
    assert body["env"] == dict(os.environ) | {"A": "1=2"}
    assert body["env"]["MINE"] == "ä b"
    assert body["cwd"] == str(tmp_path)
    assert body["umask"] == 0o027
    assert body["labels"] == {"team": "shop"}
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert body["limits"]["nofile"] == (-1 if soft == resource.RLIM_INFINITY else soft)
    assert {"core", "nproc", "stack", "as", "cpu", "fsize", "data", "memlock"} <= body["limits"].keys()
    assert body["replace"] is False
    assert body["setuid"] is False


def test_create_sends_only_fields_that_the_daemon_takes(daemon: FakeDaemon) -> None:
    from netnsd.wire import CreateRequest

    run("create", "web", "--port", "20007:3000", "--setuid", "--replace", "--", "true")
    body = daemon.requests[-1].body
    assert body.keys() <= set(CreateRequest.__struct_fields__)
    assert body["setuid"] is True
    assert body["replace"] is True
    assert body["ports"] == [{"port": 3000, "protocol": "tcp", "publish": 20007}]


def test_create_with_clean_env_sends_only_given_variables(daemon: FakeDaemon) -> None:
    run("create", "web", "--clean-env", "-e", "A=1", "--", "true")
    assert daemon.requests[-1].body["env"] == {"A": "1"}


def test_create_without_command_sends_no_circumstances(daemon: FakeDaemon) -> None:
    assert run("create", "lab").exit_code == 0
    assert daemon.requests[-1].body == {"name": "lab", "ports": [], "labels": {}, "replace": False, "setuid": False,
                                        "env": {}}


def test_create_leaves_out_variables_that_are_not_utf8_and_says_so(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROKEN", os.fsdecode(b"\xff"))
    result = run("create", "web", "--", "true")
    assert result.exit_code == 0
    assert "BROKEN" not in daemon.requests[-1].body["env"]
    assert "warning: left out" in result.stderr
    assert "BROKEN" in result.stderr


def test_create_makes_cwd_absolute_and_tells_it_in_pwd(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    run("create", "web", "--cwd", "sub", "--", "true")
    body = daemon.requests[-1].body
    assert body["cwd"] == body["env"]["PWD"] == str(tmp_path / "sub")


def test_create_shows_name_state_address_and_urls(daemon: FakeDaemon) -> None:
    result = run("create", "web", "--port", "3000", "--port", "53/udp", "--", "true")
    assert result.stdout == ("web is running at 10.203.0.2\n  http://localhost:20000/ -> 3000\n"
                             "  localhost:20001/udp -> 53\n")


def test_create_prints_only_the_name_when_asked(daemon: FakeDaemon) -> None:
    assert run("create", "web", "-o", "name", "--", "true").stdout == "web\n"
    assert run("-o", "name", "create", "db").stdout == "db\n"


def test_create_options_end_where_the_command_begins(daemon: FakeDaemon) -> None:
    run("create", "web", "-p", "3000", "ls", "-l", "--port", "4")
    assert daemon.requests[-1].body["command"] == ["ls", "-l", "--port", "4"]
    assert len(daemon.requests[-1].body["ports"]) == 1


def test_create_with_wait_asks_for_readiness_and_shows_what_it_became(daemon: FakeDaemon) -> None:
    result = run("create", "web", "--wait", "--timeout", "2.5", "-o", "json", "--", "true")
    assert result.exit_code == 0
    assert dict(daemon.requests[-1].query) == {"for": "ready", "timeout": "2.5"}
    assert json.loads(result.stdout)["name"] == "web"


def test_create_with_wait_fails_with_the_reason_and_where_to_look(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/environments/00000000-0000-4000-8000-000000000000/wait"] = Problem(
        409, "wrong_state", "main ended with 1 before it listened")
    result = run("create", "web", "--wait", "--", "true")
    assert result.exit_code == 5
    assert result.stderr == ("netnsctl: main ended with 1 before it listened\n"
                             "  hint: `netnsctl logs web` shows what it said.\n")


def test_create_of_an_existing_name_is_a_conflict(daemon: FakeDaemon) -> None:
    daemon.add("web")
    result = run("create", "web")
    assert result.exit_code == 5
    assert result.stderr == "netnsctl: you have a 'web' already\n  hint: pass --replace.\n"
    assert run("create", "web", "--replace").exit_code == 0


# -- ls, show ---------------------------------------------------------------------------------------------------


def test_ls_lines_up_its_columns(daemon: FakeDaemon) -> None:
    daemon.add("web", ports=PORTS, services=[RUNNING, FAILED])
    daemon.add("a-long-name", state="stopped")
    lines = run("ls").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "ADDRESS", "PORTS", "SERVICES", "AGE"]
    assert lines[1].split("   ")[-2:] == ["main: running, db: exited 1", lines[1].split()[-1]]
    assert "20007->3000, 20008->53/udp" in lines[1]
    assert lines[1].split()[-1].endswith("d")
    assert lines[1].index("running") == lines[2].index("stopped") == lines[0].index("STATE")
    assert "\033" not in "".join(lines)


def test_ls_passes_labels_and_all_on(daemon: FakeDaemon) -> None:
    daemon.add("web", labels={"team": "a&b"})
    daemon.add("db")
    daemon.add("other", owner={"uid": os.getuid() + 1, "user": "bob"})
    assert run("ls", "-q").stdout == "web\ndb\n"
    assert run("ls", "-q", "-l", "team=a&b").stdout == "web\n"
    assert run("ls", "-a", "-o", "name").stdout == "web\ndb\nother.bob\n"
    assert run("ls", "-a").stdout.splitlines()[3].split()[-1] == "bob"


def test_ls_json_is_the_bare_list(daemon: FakeDaemon) -> None:
    environment = daemon.add("web", ports=PORTS, services=[RUNNING])
    for args in (["ls", "-o", "json"], ["-o", "json", "ls"], ["-o", "yaml", "ls", "-ojson"]):
        assert json.loads(run(*args).stdout) == [environment]
    assert yaml.safe_load(run("ls", "-o", "yaml").stdout) == [environment]


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(
    daemon: FakeDaemon, variables: dict[str, str], *, coloured: bool,
) -> None:
    import pty

    daemon.add("web", services=[FAILED])
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | variables
    subprocess.run([sys.executable, "-m", "netnsd.client", "ls"], stdout=slave, env=env, timeout=20, check=True)
    os.close(slave)
    shown = os.read(master, 65536)
    os.close(master)
    assert (b"\033[32mrunning\033[0m" in shown) is coloured
    assert (b"\033[31mdb: exited 1\033[0m" in shown) is coloured
    assert (b"\033" in shown) is coloured


def test_ls_of_nothing_is_a_header_an_empty_list_or_nothing(daemon: FakeDaemon) -> None:
    assert run("ls").stdout.startswith("NAME")
    assert json.loads(run("ls", "-o", "json").stdout) == []
    assert run("ls", "-q").stdout == ""


def test_show_has_all_that_is_known(daemon: FakeDaemon) -> None:
    environment = daemon.add("web", ports=PORTS, services=[RUNNING, FAILED], labels={"team": "shop"})
    shown = run("show", "web").stdout
    for part in ("http://localhost:20007/ -> 3000", "localhost:20008/udp -> 53", "npm run 'dev server'", "(pid 12)",
                 "db: exited 1", "team=shop", f"me ({os.getuid()})", "/run/netns/web", environment["id"]):
        assert part in shown
    assert json.loads(run("show", "web", "-o", "json").stdout) == environment
    assert run("show", environment["id"], "-o", "name").stdout == "web\n"


def test_other_peoples_words_cannot_steer_the_terminal(daemon: FakeDaemon) -> None:
    daemon.add("web", services=[RUNNING | {"command": ["x\033]0;owned\a", "\x9b31m"]}], labels={"k": "\033[2J"})
    for verb in ("ls", "show"):
        assert run(verb, *(["web"] if verb == "show" else [])).stdout.replace("\n", "").isprintable()
    daemon.answers["GET", "/v1/environments/web"] = Problem(404, "not_found", "no \033[2J", "none\r")
    assert run("show", "web").stderr.replace("\n", "").isprintable()


def test_refs_cannot_lead_to_another_route(daemon: FakeDaemon) -> None:
    for ref in ("", ".", "..", "a/b", "a\nb"):
        for verb in ("show", "rm", "start", "logs"):
            assert run(verb, "--", ref).exit_code == 4
    assert daemon.requests == []
    assert run("show", "web?x#%2F").exit_code == 4
    assert daemon.requests[-1].target == "/v1/environments/web%3Fx%23%252F"


# -- logs -------------------------------------------------------------------------------------------------------


def test_logs_are_written_as_they_are(daemon: FakeDaemon) -> None:
    daemon.add("web")
    daemon.log_pieces = [b"a\r\n", b"\xff\x00", b"x" * 100_000, b"\r", b"\n", b"end"]
    result = run("logs", "web", "--tail", "5", "--service", "db")
    assert result.stdout_bytes == b"".join(daemon.log_pieces)
    assert dict(daemon.requests[-1].query) == {"service": "db", "tail": "5"}


def test_logs_follow_prints_at_once_and_ends_quietly_on_interrupt(daemon: FakeDaemon) -> None:
    daemon.add("web")
    client = subprocess.Popen([sys.executable, "-m", "netnsd.client", "logs", "-f", "web"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    with client:
        assert client.stdout
        assert client.stdout.readline() == b"first\n"
        assert client.stdout.readline() == b"second\n"
        client.send_signal(signal.SIGINT)
        _, stderr = client.communicate(timeout=20)
    assert (client.returncode, stderr) == (130, b"")
    assert daemon.followers_gone.wait(20)


def test_logs_into_a_closed_pipe_end_quietly(daemon: FakeDaemon) -> None:
    daemon.add("web")
    daemon.log_pieces = [b"x" * 65536] * 64
    client = subprocess.Popen([sys.executable, "-m", "netnsd.client", "logs", "web"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    assert client.stdout
    client.stdout.read(10)
    client.stdout.close()
    assert client.stderr
    assert client.stderr.read() == b""
    assert client.wait(20) == 141
    client.stderr.close()


def test_listing_into_a_full_disk_is_one_line(daemon: FakeDaemon) -> None:
    with Path("/dev/full").open("wb") as full:
        client = subprocess.run([sys.executable, "-m", "netnsd.client", "ls"], stdout=full, stderr=subprocess.PIPE,
                                timeout=20, check=False)
    assert client.returncode == 1
    assert client.stderr == b"netnsctl: input or output failed: No space left on device\n"


# -- start, stop, restart, rm, wait -----------------------------------------------------------------------------


def test_start_stop_and_restart_change_and_show(daemon: FakeDaemon) -> None:
    daemon.add("web")
    assert "web is stopped" in run("stop", "web", "--grace", "0.5").stdout
    assert daemon.requests[-1].body == {"grace_seconds": 0.5}
    assert "web is running" in run("start", "web").stdout
    assert daemon.requests[-1].body == {}
    assert json.loads(run("restart", "web", "-o", "json").stdout)["name"] == "web"
    assert daemon.requests[-1].path == "/v1/environments/web/restart"
    assert daemon.requests[-1].body == {"grace_seconds": 10.0}


def test_rm_goes_on_after_an_error_and_fails_with_the_first(daemon: FakeDaemon) -> None:
    daemon.add("web")
    daemon.add("db")
    result = run("rm", "web", "nope", "db", "web")
    assert result.stdout == "removed web\nremoved db\n"
    assert "no environment 'nope'" in result.stderr
    assert result.exit_code == 4
    assert daemon.environments == {}


def test_rm_all_removes_own_ones_only(daemon: FakeDaemon) -> None:
    for i in range(40):
        daemon.add(f"e{i}", labels={"odd": str(i % 2)})
    daemon.add("theirs", owner={"uid": os.getuid() + 1, "user": "bob"})
    assert len(json.loads(run("rm", "--all", "-l", "odd=1", "-o", "json").stdout)["removed"]) == 20
    assert len(run("rm", "--all", "-o", "name").stdout.split()) == 20
    assert [e["name"] for e in daemon.environments.values()] == ["theirs"]
    assert run("rm", "--all").stdout == "nothing removed\n"


def test_rm_all_asks_on_a_terminal(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.add("web")
    monkeypatch.setattr("netnsd.client.removing._is_interactive", lambda: True)
    assert "nothing removed" in run("rm", "--all", input="n\n").stdout
    result = run("rm", "--all", input="")
    assert result.exit_code == 130
    assert len(daemon.environments) == 1
    result = run("rm", "--all", input="y\n")
    assert "Remove 1 environment (web)?" in result.stderr
    assert daemon.environments == {}
    daemon.add("web")
    assert "removed web" in run("rm", "--all", "--yes").stdout


@pytest.mark.parametrize("args", [[], ["--all", "web"], ["web", "-l", "a=b"]])
def test_rm_of_nothing_or_of_both_is_wrong_usage(daemon: FakeDaemon, args: list[str]) -> None:
    assert run("rm", *args).exit_code == 2
    assert daemon.requests == []


def test_wait_for_exit_ends_with_the_servers_own_code(daemon: FakeDaemon) -> None:
    daemon.add("tests", services=[FAILED, FAILED | {"name": "main", "exit_code": 42}])
    assert run("wait", "tests", "--for", "exit").exit_code == 42
    assert daemon.requests[-1].query == [("for", "exit")]
    daemon.add("db", services=[FAILED])
    assert run("wait", "db", "--for", "exit").exit_code == 1
    daemon.add("lost", services=[FAILED | {"exit_code": None}])
    result = run("wait", "lost", "--for", "exit")
    assert result.exit_code == 1
    assert "nobody knows" in result.stderr


def test_wait_for_gone_is_done_when_there_is_none(daemon: FakeDaemon) -> None:
    assert run("wait", "web", "--for", "gone").stdout == "web is gone\n"
    daemon.answers["GET", "/v1/environments/web/wait"] = Problem(404, "not_found", "no environment")
    assert run("wait", "web", "--for", "gone", "--timeout", "1").exit_code == 0
    assert run("wait", "web").exit_code == 4


def test_wait_that_takes_too_long_has_its_own_code(daemon: FakeDaemon) -> None:
    daemon.answers["GET", "/v1/environments/web/wait"] = Problem(504, "wait_timeout", "3000 has no listener")
    assert run("wait", "web", "--timeout", "1").exit_code == 6
    assert run("wait", "web").exit_code == 6
