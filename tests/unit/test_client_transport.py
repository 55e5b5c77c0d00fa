from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from netnsd import errors
from netnsd.client.app import cli
from netnsd.client.transport import error_from, quote
from tests.unit.fake_daemon import FakeDaemon, Problem

HEAD = b"HTTP/1.1 200 OK\r\nNetnsd-Version: 0.1.0\r\n"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def test_requests_say_who_asks(daemon: FakeDaemon) -> None:
    run("ls")
    assert daemon.requests[-1].headers["user-agent"] == "netnsctl/0.1.0"
    assert daemon.requests[-1].headers["host"] == "localhost"


def test_no_socket_is_one_clear_line(tmp_path: Path) -> None:
    result = run("ls", "--socket", str(tmp_path / "none"))
    assert result.exit_code == 3
    assert result.stderr.startswith(f"netnsctl: no netnsd at {tmp_path}/none\n  hint: ")
    assert result.stdout == ""


def test_stale_socket_long_path_and_nul_are_clear(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    result = run("ls", "--socket", str(tmp_path / "stale"))
    assert (result.exit_code, "nothing listens" in result.stderr) == (3, True)
    assert "path too long" in run("ls", "--socket", "/x" * 100).stderr
    assert run("ls", "--socket", "/a\0b").exit_code == 3


def test_socket_of_a_group_that_the_caller_is_not_in_is_forbidden(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = run("ls")
    assert result.exit_code == 7
    assert f"you may not open {daemon.socket_path}" in result.stderr
    assert "hint: " in result.stderr


@pytest.mark.parametrize("kind", errors.NetnsdError.__subclasses__(), ids=lambda kind: kind.code)
def test_every_code_has_its_exit_code(daemon: FakeDaemon, kind: type[errors.NetnsdError]) -> None:
    daemon.answers["GET", "/v1/environments/web"] = Problem(kind.status, kind.code, "it failed", "do this", {"a": 1})
    result = run("show", "web")
    assert result.exit_code == kind.exit_code
    assert result.stderr == "netnsctl: it failed\n  hint: do this\n"
    result = run("show", "web", "-o", "json")
    assert json.loads(result.stderr) == {"error": {"code": kind.code, "message": "it failed", "hint": "do this",
                                                   "details": {"a": 1}}}


def test_unknown_code_of_a_newer_daemon_is_kept() -> None:
    error = error_from({"error": {"code": "brand_new", "message": "m"}})
    assert error is not None
    assert (error.code, error.exit_code, error.hint) == ("brand_new", errors.EXIT_FAILURE, "")
    assert error_from({"error": "text"}) is None
    assert error_from([1]) is None


def test_details_named_like_arguments_do_no_harm() -> None:
    error = error_from({"error": {"code": "forbidden", "message": "m", "hint": "h", "details": {"hint": 1, "self": 2}}})
    assert isinstance(error, errors.Forbidden)
    assert error.details == {"hint": 1, "self": 2}


def test_other_minor_version_is_a_warning_once(daemon: FakeDaemon) -> None:
    daemon.version = "0.2.0"
    result = run("create", "web", "--wait")
    assert result.exit_code == 0
    assert result.stderr.count("netnsctl 0.1.0 talks to netnsd 0.2.0") == 1
    daemon.version = "0.1.9"
    assert run("ls").stderr == ""


def test_warnings_are_json_lines_where_the_output_is_json(daemon: FakeDaemon) -> None:
    daemon.version = "0.2.0"
    lines = run("show", "nope", "-o", "json").stderr.splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["warning", "error"]


@pytest.mark.parametrize("answer", [b"not json", b"[", b"{}", b'{"environments": [{}]}', b'{"environments": 1}',
                                    b"[" * 100_000, b'"x"', b"\xff"])
def test_answer_that_cannot_be_read_names_both_versions(daemon: FakeDaemon, answer: bytes) -> None:
    daemon.version = "0.3.1"
    daemon.answers["GET", "/v1/environments"] = answer
    result = run("ls")
    assert result.exit_code == 3
    assert "netnsctl 0.1.0 cannot read the answer of netnsd 0.3.1" in result.stderr


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"SSH-2.0-OpenSSH\r\n", b"\r\n\r\n", b"x" * 100_000,
    b"HTTP/1.1 xx\r\nNetnsd-Version: 0.1.0\r\n\r\n"], ids=["http", "ssh", "empty", "long", "status"])
def test_what_is_not_a_netnsd_is_called_so(daemon: FakeDaemon, answer: bytes) -> None:
    daemon.raw_answer = answer
    result = run("ls")
    assert result.exit_code == 3
    assert "is not a netnsd" in result.stderr


@pytest.mark.parametrize("answer", [
    b"", HEAD + b"Content-Length: 100\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["nothing", "short", "chunk"])
def test_daemon_that_goes_away_is_unreachable(daemon: FakeDaemon, answer: bytes) -> None:
    daemon.raw_answer = answer
    result = run("ls")
    assert result.exit_code == 3
    assert "hint: it may be restarting; try again." in result.stderr


@pytest.mark.parametrize("answer", [
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", HEAD + b"Content-Length: -1\r\n\r\n"])
def test_malformed_framing_is_a_bad_answer(daemon: FakeDaemon, answer: bytes) -> None:
    daemon.raw_answer = answer
    assert run("ls").exit_code == 3
    assert "cannot read the answer" in run("ls").stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_are_joined_wherever_packets_are_cut(tmp_path: Path, size: int) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\na\r\n\r\n1;x=y\r\n\n\r\n0\r\nTrailer: 1\r\n\r\n"
    client = subprocess.Popen([sys.executable, "-m", "netnsd.client", "logs", "web", "--socket", str(tmp_path / "s")],
                              stdout=subprocess.PIPE)
    with client, listener:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            # The client may leave at the last chunk, and not wait for what follows it.
            with suppress(BrokenPipeError):
                for at in range(0, len(answer), size):
                    connection.send(answer[at:at + size])
            assert client.communicate(timeout=20)[0] == b"a\r\n\n"


def test_refusal_of_a_body_that_was_not_read_is_shown(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    body = json.dumps({"error": {"code": "body_too_large", "message": "too large", "hint": "", "details": {}}}).encode()
    env = os.environ | {f"BIG{i}": "x" * 100_000 for i in range(8)}
    client = subprocess.Popen([sys.executable, "-m", "netnsd.client", "create", "web", "--socket", str(tmp_path / "s"),
                               "true"], stderr=subprocess.PIPE, env=env)
    with client, listener:
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 413 X\r\nNetnsd-Version: 0.1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.close()
        assert client.communicate(timeout=20)[1] == b"netnsctl: too large\n"
        assert client.returncode == 2


def test_quote_leaves_no_byte_with_a_meaning() -> None:
    assert quote("a-Z_0.9~") == "a-Z_0.9~"
    assert quote("a b/ä?&=#%") == "a%20b%2F%C3%A4%3F%26%3D%23%25"


def test_wrong_usage_is_json_when_json_was_asked_for(daemon: FakeDaemon) -> None:
    result = run("ls", "--bogus", "-o", "json")
    assert result.exit_code == 2
    assert json.loads(result.stderr)["error"]["code"] == "invalid_request"
    assert run("exec", "web", "--bogus", "--", "x", "-o", "json").stderr.startswith("netnsctl: No such option")
