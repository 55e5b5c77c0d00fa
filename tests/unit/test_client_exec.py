from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner

from netnsd.client.app import cli
from tests.unit.fake_daemon import DEADLINE_SECONDS, FakeDaemon

CLIENT = [sys.executable, "-m", "netnsd.client"]
PYTHON = sys.executable


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as started:
        monkeypatch.setenv("NETNSD_SOCKET", started.socket_path)
        yield started


def run(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CLIENT, "exec", *args], capture_output=True, timeout=DEADLINE_SECONDS, check=False,
                          **kwargs)


class Screen:
    """A client on a terminal of its own, as a user has it."""

    def __init__(self, *args: str, rows: int = 30, columns: int = 99) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (rows, columns))
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.client = subprocess.Popen(
            [*CLIENT, "exec", *args], stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            # One system call between fork and exec, and no lock.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # noqa: PLW1509

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.client.poll() is None:
            self.client.kill()
        self.client.wait(DEADLINE_SECONDS)
        os.close(self.master)
        if self.slave >= 0:
            os.close(self.slave)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, text: bytes) -> None:
        until = time.monotonic() + DEADLINE_SECONDS
        while text not in self.seen:
            left = until - time.monotonic()
            assert left > 0, f"{text!r} did not come, but {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536)

    def end(self) -> int:
        until = time.monotonic() + DEADLINE_SECONDS
        while (code := self.client.poll()) is None:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.01)[0]:
                self.seen += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        return code


def test_stdin_stdout_stderr_and_exit_code_are_the_commands_own(daemon: FakeDaemon, tmp_path: Path) -> None:
    done = run("web", "--", "sh", "-c", "cat; echo out; echo err >&2; exit 42", input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"in\nout\n", b"err\n")
    with (tmp_path / "out").open("wb") as file:
        # The very same open file, not a copy of what is written.
        subprocess.run([*CLIENT, "exec", "web", "--", "sh", "-c", "echo to a file"], stdout=file, check=True,
                       timeout=DEADLINE_SECONDS)
        assert file.tell() == os.path.getsize(file.name) > 0


def test_request_carries_the_callers_circumstances(daemon: FakeDaemon, tmp_path: Path) -> None:
    from netnsd.wire import ExecRequest

    run("-e", "A=1", "--cwd", str(tmp_path), "--setuid", "web", "true", "-x", "--", "y")
    request = daemon.attach_requests[-1]
    assert request["command"] == ["true", "-x", "--", "y"]
    assert request["env"]["A"] == "1"
    assert request["env"]["PATH"] == os.environ["PATH"]
    assert (request["ref"], request["cwd"], request["tty"], request["setuid"]) == ("web", str(tmp_path), False, True)
    assert request["limits"]["nofile"]
    assert request.keys() <= set(ExecRequest.__struct_fields__)
    run("web", "--clean-env", "--", "/bin/true")
    assert daemon.attach_requests[-1]["env"] == {}


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("exit 125", 125)])
def test_exit_codes_pass_through(daemon: FakeDaemon, script: str, code: int) -> None:
    assert run("web", "--", "sh", "-c", script).returncode == code


@pytest.mark.parametrize(("answer", "code"), [
    ({"code": "launch_failed", "message": "m", "hint": "", "details": {"stage": "exec", "errno": "ENOENT"}}, 127),
    ({"code": "launch_failed", "message": "m", "hint": "", "details": {"stage": "exec", "errno": "EACCES"}}, 126),
    ({"code": "launch_failed", "message": "m", "hint": "", "details": {"stage": "chdir", "errno": "ENOENT"}}, 125),
    ({"code": "not_found", "message": "m", "hint": "", "details": {}}, 125),
    ({"code": "forbidden", "message": "m", "hint": "", "details": {}}, 125)])
def test_failures_before_the_command_have_codes_of_their_own(
    daemon: FakeDaemon, answer: dict[str, Any], code: int,
) -> None:
    daemon.attach_answer = {"error": answer}
    done = run("web", "--", "x")
    assert (done.returncode, done.stderr) == (code, b"netnsctl: m\n")


def test_command_that_does_not_exist_is_127_after_the_descriptors_went(daemon: FakeDaemon) -> None:
    assert run("web", "--", "/nonexistent/x").returncode == 127
    assert run("web", "--", "/etc/passwd").returncode == 126


@pytest.mark.parametrize("args", [["web"], ["web", "--"], [], ["--bogus", "web", "--", "x"], ["-e", "bad", "web", "x"],
                                  ["a/b", "x"]])
def test_own_failures_are_125(daemon: FakeDaemon, args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 125
    assert done.stderr.startswith(b"netnsctl: ")


def test_no_daemon_and_a_lost_command_are_125(daemon: FakeDaemon, tmp_path: Path) -> None:
    done = run("--socket", str(tmp_path / "sub" / "netnsd.sock"), "web", "x")
    assert done.returncode == 125
    assert b"no netnsd at" in done.stderr
    daemon.attach_dies = True
    done = run("web", "x")
    assert done.returncode == 125
    assert b"how it ended is not known" in done.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), termios.error(5, "Input/output error")])
def test_host_without_a_pty_is_one_clear_line(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, error: Exception,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(os, "openpty", fail)
    before = signal.getsignal(signal.SIGINT)
    result = CliRunner().invoke(cli, ["exec", "-t", "web", "--", "true"], catch_exceptions=False)
    assert result.exit_code == 125
    assert result.stderr.startswith(f"netnsctl: exec: {error.args[1]}\n  hint: ")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("frame", [{"ready": False}, {"exit": "x"}, {}])
def test_frames_of_something_else_are_a_bad_answer(daemon: FakeDaemon, frame: dict[str, Any]) -> None:
    daemon.attach_answer = frame
    done = run("web", "x")
    assert done.returncode == 125
    assert b"is not a netnsd" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_go_to_the_command(daemon: FakeDaemon, number: signal.Signals) -> None:
    script = (f"import signal, sys\nsignal.signal({int(number)}, lambda *_: sys.exit(7))\nprint('up', flush=True)\n"
              "signal.pause()")
    with subprocess.Popen([*CLIENT, "exec", "web", "--", PYTHON, "-c", script], stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"up\n"
        client.send_signal(number)
        assert client.wait(DEADLINE_SECONDS) == 7
    assert daemon.signals[0] == number


def test_ignored_signals_stay_ignored(daemon: FakeDaemon) -> None:
    with subprocess.Popen(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *CLIENT, "exec", "web", "--", "sh", "-c",
                           "echo up; read x; echo $x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"up\n"
        client.send_signal(signal.SIGHUP)
        assert client.communicate(b"on\n", timeout=DEADLINE_SECONDS)[0] == b"on\n"
        assert client.returncode == 0
    assert daemon.signals == []


def test_command_ends_when_the_client_is_killed(daemon: FakeDaemon) -> None:
    with subprocess.Popen([*CLIENT, "exec", "web", "--", "sh", "-c", "echo up; exec sleep 60"],
                          stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"up\n"
        client.kill()
    assert daemon.children_ended.wait(DEADLINE_SECONDS)


def test_closed_stdin_is_an_empty_one(daemon: FakeDaemon) -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *CLIENT, "exec", "web", "--", "cat"], capture_output=True,
                          timeout=DEADLINE_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_terminal_is_the_commands_with_size_and_ctty(daemon: FakeDaemon) -> None:
    script = "stty size; tty; test -t 0 -a -t 1 -a -t 2 && echo all; echo ctty >/dev/tty; exit 5"
    with Screen("web", "--", "sh", "-c", script) as screen:
        assert screen.end() == 5
        assert b"30 99\r\n" in screen.seen
        assert b"all\r\nctty\r\n" in screen.seen
        assert os.ttyname(screen.slave).encode() not in screen.seen
        assert termios.tcgetattr(screen.slave) == screen.before
    assert daemon.attach_requests[-1]["tty"] is True


def test_keys_reach_the_command_and_interrupt_is_its_own(daemon: FakeDaemon) -> None:
    script = "trap 'echo caught; exit 3' INT; echo up; while read x; do echo =$x=; done"
    with Screen("web", "--", "sh", "-c", script) as s:
        s.expect(b"up\r\n")
        s.type(b"hello\r")
        s.expect(b"=hello=")
        s.type(b"\x03")
        assert s.end() == 3
        assert b"caught" in s.seen
    # As a key, not as a signal of ours.
    assert daemon.signals == []


def test_end_of_file_is_a_key_too(daemon: FakeDaemon) -> None:
    with Screen("web", "--", "sh", "-c", "echo up; cat; exit 4") as screen:
        screen.expect(b"up\r\n")
        screen.type(b"\x04")
        assert screen.end() == 4


def test_new_window_size_reaches_the_command(daemon: FakeDaemon) -> None:
    script = ("import os, signal\n"
              "signal.signal(signal.SIGWINCH, lambda *_: print(os.get_terminal_size(0), flush=True))\n"
              "print('up', flush=True)\nwhile True: signal.pause()")
    with Screen("web", "--", PYTHON, "-c", script) as screen:
        screen.expect(b"up\r\n")
        termios.tcsetwinsize(screen.slave, (11, 22))
        screen.expect(b"columns=22, lines=11")
        screen.client.terminate()
        assert screen.end() == 143
        assert termios.tcgetattr(screen.slave) == screen.before
    assert daemon.signals == [signal.SIGTERM]


def test_terminal_is_set_back_when_the_connection_is_lost(daemon: FakeDaemon) -> None:
    daemon.attach_dies = True
    with Screen("web", "--", "sh") as screen:
        assert screen.end() == 125
        assert termios.tcgetattr(screen.slave) == screen.before
        assert b"how it ended is not known" in screen.seen


def test_all_output_comes_before_the_end(daemon: FakeDaemon) -> None:
    with Screen("web", "--", "sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo END") as screen:
        assert screen.end() == 0
        assert screen.seen.count(b"x") == 300000
        assert b"END" in screen.seen


def test_output_that_waits_when_the_command_has_ended_is_shown(daemon: FakeDaemon, tmp_path: Path) -> None:
    # A pty holds about 12 KB, and one read of it returns 4 KB at most.
    script = f"echo up; until test -e {tmp_path}/go; do sleep 0.01; done; head -c 8000 /dev/zero | tr '\\0' x"
    with Screen("web", "--", "sh", "-c", script) as screen:
        screen.expect(b"up\r\n")
        screen.client.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, screen.client.pid, os.WSTOPPED | os.WNOWAIT)
        (tmp_path / "go").touch()
        # The exit code is there before the client has read a byte of the output.
        assert daemon.children_ended.wait(DEADLINE_SECONDS)
        screen.client.send_signal(signal.SIGCONT)
        assert screen.end() == 0
        assert screen.seen.count(b"x") == 8000


def test_much_input_and_output_at_once_do_not_block_each_other(daemon: FakeDaemon) -> None:
    script = "stty raw -echo; echo up; head -c 200000 | tee /dev/stderr"
    with subprocess.Popen([*CLIENT, "exec", "-t", "web", "--", "sh", "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"up\n"
        output, _ = client.communicate(b"y" * 200_000, timeout=DEADLINE_SECONDS)
        assert output.count(b"y") == 400_000
        assert client.returncode == 0


def test_no_tty_option_gives_the_terminal_itself(daemon: FakeDaemon) -> None:
    with Screen("-T", "web", "--", "sh", "-c", "tty; exit 0") as screen:
        name = os.ttyname(screen.slave).encode()
        assert screen.end() == 0
        assert name in screen.seen
    assert daemon.attach_requests[-1]["tty"] is False


def test_tty_can_be_asked_for_without_one(daemon: FakeDaemon) -> None:
    done = run("-it", "web", "--", "sh", "-c", "test -t 0 && test -t 1 && cat && echo done", input=b"line\n")
    assert done.returncode == 0
    assert b"done\r\n" in done.stdout
    assert b"line" in done.stdout


def test_continued_client_takes_every_key_again(daemon: FakeDaemon) -> None:
    with Screen("web", "--", "sh", "-c", "echo up; read x; echo =$x=") as screen:
        screen.expect(b"up\r\n")
        raw = termios.tcgetattr(screen.slave)
        assert raw != screen.before
        # What a shell does with the terminal of a job that was stopped and is continued.
        screen.client.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, screen.client.pid, os.WSTOPPED | os.WNOWAIT)
        termios.tcsetattr(screen.slave, termios.TCSANOW, screen.before)
        screen.client.send_signal(signal.SIGCONT)
        until = time.monotonic() + DEADLINE_SECONDS
        while termios.tcgetattr(screen.slave) != raw:
            assert time.monotonic() < until
            time.sleep(0.005)
        screen.type(b"on\r")
        assert screen.end() == 0
        assert b"=on=" in screen.seen
        assert termios.tcgetattr(screen.slave) == screen.before


def test_interrupt_before_the_command_is_ours(daemon: FakeDaemon, tmp_path: Path) -> None:
    import socket

    directory = tmp_path / "mute"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(directory / "attach.sock"))
        mute.listen()
        with subprocess.Popen([*CLIENT, "exec", "--socket", str(directory / "netnsd.sock"), "web", "x"],
                              stderr=subprocess.PIPE) as client:
            connection, _ = mute.accept()
            with connection:
                connection.recv(65536)
                client.send_signal(signal.SIGINT)
                assert client.communicate(timeout=DEADLINE_SECONDS)[1] == b""
                assert client.returncode == 130
