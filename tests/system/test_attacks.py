"""What a hostile user's servers do to netnsd and to other users: by their logs, keys, names, and processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import ALICE, BOB, MALLORY, Daemon, HostNamespace, User, cgroups, wait_until
from tests.harness.daemon import program
from tests.system.clients import PYTHON, Environment, inside, is_gone, main_of, nothing_left

LOG_BYTES = 65536

# What a server may do with the file that its stdout is, as JSON. What it writes by name is in the log as well.
_ON_ITS_LOG = """
import errno, fcntl, json, os
said = {}
def attempt(name, step):
    try:
        step()
        said[name] = "done"
    except OSError as error:
        said[name] = errno.errorcode[error.errno]
def write(path):
    with open(path, "a") as log:
        log.write(f"by {path}\\n")
def lease(kind):
    fcntl.fcntl(os.open("/proc/self/fd/1", os.O_RDWR), fcntl.F_SETLEASE, kind)
for path in ("/proc/self/fd/1", "/dev/stdout", "/dev/stderr"):
    attempt(path, lambda: write(path))
attempt("chmod", lambda: os.chmod("/proc/self/fd/1", 0o755))
attempt("chown", lambda: os.chown("/proc/self/fd/1", os.getuid(), -1))
attempt("read lease", lambda: lease(fcntl.F_RDLCK))
attempt("write lease", lambda: lease(fcntl.F_WRLCK))
attempt("execute", lambda: os.execv("/proc/self/fd/1", ["log"]))
print(json.dumps(said), flush=True)
"""
# Ends with the code 7 when the file ``go`` is there.
_UNTIL_GO = "until [ -e go ]; do sleep 0.02; done; exit 7"


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    """A daemon that keeps little of each log."""
    with Daemon(shared_host, config={"services": {"log_bytes": LOG_BYTES}}) as started:
        yield started


def _log_path(daemon: Daemon, environment: Environment) -> str:
    return f"{daemon.state_dir}/logs/{environment['id']}/main.log"


def _log(daemon: Daemon, environment: Environment) -> os.stat_result:
    return os.stat(daemon.host.path(_log_path(daemon, environment)))


def _taken(daemon: Daemon, environment: Environment) -> int:
    return _log(daemon, environment).st_blocks * 512


def _said(daemon: Daemon, name: str, user: User) -> str:
    return daemon.ctl("logs", name, user=user, check=True).stdout


def _await_exit(daemon: Daemon, name: str, user: User) -> int:
    return daemon.ctl("wait", name, "--for", "exit", "--timeout", "5", user=user).returncode


def _post(daemon: Daemon, body: dict[str, Any], user: User) -> tuple[int, dict[str, Any]]:
    """Create by the API, past whatever netnsctl checks."""
    done = daemon.host.run(["curl", "-sS", "--max-time", "10", "--unix-socket", daemon.socket, "--data-binary", "@-",
                            "-H", "Content-Type: application/json", "-w", "\n%{http_code}",
                            "http://localhost/v1/environments"], user=user, check=True, stdin=json.dumps(body))
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


def _error(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
    return error


# -- logs -------------------------------------------------------------------------------------------------------


def test_a_server_writes_to_its_log_by_name_and_can_do_nothing_else_to_it(tidy_daemon: Daemon) -> None:
    web = tidy_daemon.create_json("web", PYTHON, "-c", _ON_ITS_LOG, user=ALICE)
    assert _await_exit(tidy_daemon, "web", ALICE) == 0
    *written, about = _said(tidy_daemon, "web", ALICE).splitlines()
    names = ["/proc/self/fd/1", "/dev/stdout", "/dev/stderr"]
    assert written == [f"by {name}" for name in names]
    assert json.loads(about) == {**dict.fromkeys(names, "done"), "chmod": "EPERM", "chown": "EPERM",
                                 "read lease": "EACCES", "write lease": "EACCES", "execute": "EACCES"}
    log = _log(tidy_daemon, web)
    assert (log.st_uid, log.st_gid, log.st_mode & 0o7707) == (0, 0, 0o600)


def test_a_log_is_read_by_its_user_and_by_nobody_else_whoever_knows_its_path(tidy_daemon: Daemon) -> None:
    web = tidy_daemon.create_json("web", "echo", "hush", user=ALICE)
    assert _await_exit(tidy_daemon, "web", ALICE) == 0
    # From inside its directory, which root enters: no directory above it is what keeps others out.
    directory = os.path.dirname(_log_path(tidy_daemon, web))

    def reads(user: User) -> str:
        return tidy_daemon.host.run(["cat", "main.log"], user=user, cwd=directory).stdout

    assert [reads(user) for user in (ALICE, BOB, MALLORY)] == ["hush\n", "", ""]
    by_path = tidy_daemon.host.run(["cat", _log_path(tidy_daemon, web)], user=MALLORY, cwd="/")
    assert "Permission denied" in by_path.stderr


def test_logs_are_capped_although_one_cannot_be_opened(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    flood = "until [ -e flood ]; do sleep 0.02; done; head -c 3000000 /dev/zero; exec sleep 1000"
    host.path(f"{ALICE.home}/flood").unlink(missing_ok=True)
    loud = tidy_daemon.create_json("loud", "sh", "-c", flood, user=ALICE)
    other = tidy_daemon.create_json("other", "true", user=ALICE)
    runners = []
    for directory in (os.path.dirname(_log_path(tidy_daemon, e)) for e in (loud, other)):
        # A program that runs cannot be opened for writing, and is larger than a log may be.
        busy = f"{directory}/busy.log"
        host.run(["cp", os.path.realpath(PYTHON), busy], check=True)
        runners.append(host.popen([busy, "-c", "print('runs', flush=True); import time; time.sleep(1000)"]))
        assert runners[-1].stdout is not None
        assert runners[-1].stdout.readline() == b"runs\n"
    host.write(f"{ALICE.home}/flood", "", user=ALICE)
    wait_until(lambda: _log(tidy_daemon, loud).st_size == 3_000_000, what="the flood")
    wait_until(lambda: _taken(tidy_daemon, loud) <= LOG_BYTES, seconds=10, what="the bound")
    for runner in runners:
        runner.kill()


def test_disk_that_a_server_reserves_behind_its_logs_end_is_given_back(tidy_daemon: Daemon) -> None:
    code = "echo kept; fallocate --keep-size --length 8M /proc/self/fd/1 && touch reserved; exec sleep 1000"
    web = tidy_daemon.create_json("web", "sh", "-c", code, user=ALICE)
    wait_until(tidy_daemon.host.path(f"{ALICE.home}/reserved").exists, what="the reservation")
    wait_until(lambda: _taken(tidy_daemon, web) <= LOG_BYTES, seconds=10, what="the bound")
    assert _said(tidy_daemon, "web", ALICE) == "kept\n"


_TAILS = """
import http.client, socket, sys, threading, time
path, count = sys.argv[1], int(sys.argv[2])
took = [99.0] * count
def tail(number):
    began = time.monotonic()
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(20)
    connection.sock.connect(path)
    connection.request("GET", "/v1/environments/web/logs?tail=5")
    answer = connection.getresponse()
    while answer.read(1 << 16): pass
    took[number] = time.monotonic() - began
threads = [threading.Thread(target=tail, args=(n,)) for n in range(count)]
print("begin", flush=True)
for thread in threads: thread.start()
for thread in threads: thread.join()
print(max(took))
"""


@pytest.mark.parametrize("after", ["", "for i in 1 2 3; do echo line$i; done;"], ids=["hole-at-end", "lines"])
def test_a_log_that_its_server_made_vast_is_read_quickly_and_holds_up_nobody(tidy_daemon: Daemon, after: str) -> None:
    code = f"echo first; truncate --size {1 << 50} /proc/self/fd/1; {after} touch vast; exec sleep 1000"
    vast = tidy_daemon.host.path(f"{ALICE.home}/vast")
    vast.unlink(missing_ok=True)
    web = tidy_daemon.create_json("web", "sh", "-c", code, user=ALICE)
    wait_until(vast.exists, what="the vast log")
    assert _log(tidy_daemon, web).st_size >= 1 << 50
    began = time.monotonic()
    said = tidy_daemon.ctl("logs", "web", "--tail", "5", user=ALICE, check=True, timeout=10).stdout
    assert time.monotonic() - began < 2
    assert said.split() == [f"line{n}" for n in range(1, 4) if after], "fewer than were asked for"
    whole = tidy_daemon.ctl("logs", "web", user=ALICE, check=True, timeout=10).stdout.replace("\0", " ")
    assert whole.split() == ["first", *(f"line{n}" for n in range(1, 4) if after)]
    readers = tidy_daemon.host.popen([PYTHON, "-c", _TAILS, tidy_daemon.socket, "40"], user=ALICE)
    assert readers.stdout is not None
    assert readers.stdout.readline() == b"begin\n"
    for _ in range(5):
        began = time.monotonic()
        assert tidy_daemon.ctl("ls", user=BOB, timeout=10).returncode == 0
        assert time.monotonic() - began < 2
    assert readers.wait(timeout=20) == 0
    assert float(readers.stdout.read()) < 5


# -- keys -------------------------------------------------------------------------------------------------------

# add_key, keyctl by machine: asm/unistd.h. -3 is the session keyring (linux/keyctl.h).
_KEY_CALLS = {"x86_64": (248, 250), "aarch64": (217, 219), "riscv64": (217, 219)}
_KEYS = """
import ctypes, errno, os, sys
ADD_KEY, KEYCTL = {numbers}
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def add(name, text):
    key = call(ADD_KEY, b"user", name, text, len(text), -3)
    call(KEYCTL, 5, key, 0x3f3f3f3f)  # anybody who finds it may do anything with it
def find(name):
    try:
        key = call(KEYCTL, 10, -3, b"user", name, 0)
        room = ctypes.create_string_buffer(64)
        size = call(KEYCTL, 11, key, room, 64)
        return room.raw[:size].decode()
    except OSError as error:
        return errno.errorcode[error.errno]
"""
_WITH_KEY = """
call(KEYCTL, 1, 0)
add(b'secret', b'hush')
assert find(b'secret') == 'hush'
os.execv(sys.argv[1], sys.argv[1:])
"""
_MORE_KEYS = """
import time
while not os.path.exists("fill"):
    time.sleep(0.02)
number = 0
while True:
    try:
        add(b"more%d" % number, b"x")
        number += 1
    except OSError as error:
        assert error.errno == errno.EDQUOT
        break
print("full", flush=True)
time.sleep(1000)
"""
_LOOK = "print(find(b'secret'), find(b'shared'), flush=True)\n"


class _DaemonWithKey(Daemon):
    """Started by somebody whose session keyring holds a key."""

    @property
    def command(self) -> list[str]:
        return [PYTHON, "-c", _key_program(_WITH_KEY), *super().command]


def _key_program(rest: str) -> str:
    return _KEYS.replace("{numbers}", repr(_KEY_CALLS[platform.machine()])) + rest


@pytest.mark.skipif(platform.machine() not in _KEY_CALLS, reason="the system calls' numbers are not known here")
def test_commands_share_no_session_keyring_with_the_daemons_starter_or_with_each_other(host: HostNamespace) -> None:
    with _DaemonWithKey(host) as daemon:
        leaves = _key_program("add(b'shared', b'told')\n" + _LOOK + _MORE_KEYS)
        daemon.create_json("leaves", PYTHON, "-c", leaves, user=ALICE)
        wait_until(lambda: "\n" in _said(daemon, "leaves", ALICE), what="the key")
        hidden, own = _said(daemon, "leaves", ALICE).split()
        assert (hidden, own) == ("ENOKEY", "told")
        for user in (ALICE, BOB):
            daemon.create_json("looks", PYTHON, "-c", _key_program(_LOOK), user=user)
            assert _await_exit(daemon, "looks", user) == 0
            assert _said(daemon, "looks", user).split() == ["ENOKEY", "ENOKEY"]
            assert inside(daemon, "looks", PYTHON, "-c", _key_program(_LOOK), user=user).split() == ["ENOKEY"] * 2
            daemon.ctl("rm", "looks", user=user, check=True)
        # Whose user has no room for a keyring shares one that is dead.
        daemon.host.write(f"{ALICE.home}/fill", "", user=ALICE)
        wait_until(lambda: "full\n" in _said(daemon, "leaves", ALICE), what="too many keys")
        daemon.create_json("looks", PYTHON, "-c", _key_program(_LOOK), user=ALICE)
        assert _await_exit(daemon, "looks", ALICE) == 0
        assert _said(daemon, "looks", ALICE).split() == ["EKEYREVOKED", "EKEYREVOKED"]


# -- names that nobody expects ------------------------------------------------------------------------------------

_LONG = "/" + "é" * 3000


@pytest.mark.parametrize(("command", "cwd", "stage", "errno"), [
    (["true"], _LONG, "chdir", "ENAMETOOLONG"),
    ([_LONG], "/", "exec", "ENAMETOOLONG"),
    ([_LONG[1:]], "/", "exec", "ENOENT"),
], ids=["cwd", "path", "name"])
def test_a_very_long_name_is_a_failed_launch_and_costs_the_launcher_nothing(
        tidy_daemon: Daemon, command: list[str], cwd: str, stage: str, errno: str) -> None:
    go = tidy_daemon.host.path(f"{BOB.home}/go")
    go.unlink(missing_ok=True)
    other = tidy_daemon.create_json("other", "sh", "-c", _UNTIL_GO, user=BOB)
    launchers = tidy_daemon.launcher_pids()
    logged = len(tidy_daemon.log())
    status, body = _post(tidy_daemon, {"name": "web", "command": command, "cwd": cwd,
                                       "env": {"PATH": "/usr/bin:/bin"}}, ALICE)
    assert (status >= 400, body["error"]["code"]) == (True, "launch_failed")
    assert body["error"]["details"] == {"stage": stage, "errno": errno}
    tidy_daemon.create_json("lab", user=ALICE)
    done = tidy_daemon.ctl("exec", "lab", "--cwd", cwd, "-o", "json", "--", *command, user=ALICE)
    assert done.returncode in (125, 126, 127)
    assert _error(done)["code"] == "launch_failed"
    assert _error(done)["details"] == {"stage": stage, "errno": errno}
    assert "launcher" not in tidy_daemon.log()[logged:]
    wait_until(lambda: tidy_daemon.launcher_pids() == launchers, what="the end of all monitors")
    assert not is_gone(main_of(other)["pid"])
    tidy_daemon.host.write(f"{BOB.home}/go", "", user=BOB)
    assert _await_exit(tidy_daemon, "other", BOB) == 7


def test_commands_that_may_gain_rights_do_not_choose_the_host_name_that_sudo_sees(tidy_daemon: Daemon) -> None:
    name = tidy_daemon.host.run(["hostname"], check=True).stdout.strip()
    for options, expected in (((), "web"), (("--setuid",), name)):
        tidy_daemon.create_json("web", "hostname", user=ALICE, options=options)
        assert _await_exit(tidy_daemon, "web", ALICE) == 0
        assert _said(tidy_daemon, "web", ALICE).strip() == expected
        assert inside(tidy_daemon, "web", "hostname", user=ALICE, flags=options) == expected
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True)


# -- removal against its owner's will -----------------------------------------------------------------------------

# Whoever executes a file waits until a write lease on it is given up: 45 s by default.
_HOLD_LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(1000)
"""


def test_an_environment_whose_launch_hangs_is_removed_at_once_and_leaves_nothing(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    script = host.write(f"{ALICE.home}/leased", "#!/bin/sh\nexec sleep 1000\n", user=ALICE, mode=0o755)
    with nothing_left(host):
        holder = host.popen([PYTHON, "-c", _HOLD_LEASE, script], user=ALICE)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        creating = host.popen([program("netnsctl"), "create", "web", "-p", "3000", "-o", "json", "--", script],
                              user=ALICE, env={"NETNSD_SOCKET": tidy_daemon.socket})
        wait_until(lambda: _child_of_service(tidy_daemon.cgroup), what="the child that hangs")
        assert [e["state"] for e in tidy_daemon.ctl_json("ls", user=ALICE)] == ["creating"]
        began = time.monotonic()
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True, timeout=30)
        assert time.monotonic() - began < 5
        assert creating.wait(timeout=5) != 0
        assert tidy_daemon.ctl_json("ls", user=ALICE) == []
        holder.kill()
        holder.wait(timeout=5)


def _child_of_service(group: str) -> list[int]:
    return [pid for directory, _, _ in os.walk(group) if directory.endswith("/s-main")
            for pid in cgroups.members(directory)]


# Forks for ever, each child in a session of its own and nobody's child, up to so many at a time.
_BOMB = """
import os, time
most = 200
counter = os.open("count", os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
while True:
    if os.fstat(counter).st_size < most:
        os.write(counter, b".")
        if os.fork() == 0:
            os.setsid()
            os.fork()
    else:
        time.sleep(0.01)
"""


def test_a_server_that_forks_as_fast_as_it_can_is_removed_whole(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    with nothing_left(host):
        web = tidy_daemon.create_json("web", PYTHON, "-c", _BOMB, user=ALICE)
        count = host.path(f"{ALICE.home}/count")
        wait_until(lambda: count.exists() and count.stat().st_size >= 20, what="a crowd that still grows")
        began = time.monotonic()
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True, timeout=30)
        assert time.monotonic() - began < 5
        assert is_gone(main_of(web)["pid"])
