"""Servers are kept running, looked after and bounded: real ones, of real users, over deaths of the daemon."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, cgroups, wait_until
from tests.system.clients import PYTHON, Environment, ask, echo_server, is_gone, main_of, nothing_left, published

# Says in the file ``starts`` that it was started, and ends with what the file ``code`` says as soon as that is there.
COUNTS = ("sh", "-c", "echo $$ >>starts; until [ -e code ]; do sleep 0.02; done; read c <code; rm code; exit $c")
# Puts itself in the background, as daemons do, and ends when the file ``end`` is there.
DAEMON = ("sh", "-c", "echo $$ >>starts; rm -f end; (setsid sh -c 'until [ -e end ]; do sleep 0.02; done' &)")


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One that made an environment before: what it makes once is there."""
    with Daemon(host) as started:
        started.create_json("first", "sleep", "1000", user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started


def _create(daemon: Daemon, *options: str, command: tuple[str, ...] = COUNTS, user: User = ALICE, name: str = "web",
            **more: Any) -> Environment:
    return daemon.create_json(name, *command, user=user, options=options, **more)


def _main(daemon: Daemon, user: User = ALICE, name: str = "web") -> dict[str, Any]:
    return main_of(daemon.ctl_json("show", name, user=user))


def _write(daemon: Daemon, name: str, text: str = "", user: User = ALICE) -> None:
    """All at once: who looks for it finds it whole."""
    daemon.host.write(f"{user.home}/{name}.new", text, user=user)
    daemon.host.run(["mv", f"{user.home}/{name}.new", f"{user.home}/{name}"], user=user, check=True)


def _starts(daemon: Daemon, user: User = ALICE) -> int:
    path = daemon.host.path(f"{user.home}/starts")
    return len(path.read_text().splitlines()) if path.exists() else 0


def _events(daemon: Daemon) -> list[tuple[str, dict[str, Any]]]:
    """What the log of all of its runs says of services."""
    found = []
    for line in daemon.log().splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            found.append((event["event"], event))
    return found


# -- restarts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "code", "again"), [("no", 7, False), ("on-failure", 7, True),
                                                       ("on-failure", 0, False), ("always", 0, True)])
def test_a_server_that_ended_is_started_again_as_its_policy_says(daemon: Daemon, policy: str, code: int,
                                                                 again: bool) -> None:
    with nothing_left(daemon.host):
        _create(daemon, "--restart", policy)
        first = _main(daemon)
        _write(daemon, "code", f"{code}\n")
        if again:
            wait_until(lambda: _main(daemon)["restarts"] == 1 and _main(daemon)["state"] == "running", what="a start")
            assert _main(daemon)["pid"] != first["pid"]
            assert _starts(daemon) == 2
        else:
            assert daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE).returncode == code
            time.sleep(0.5)  # several first pauses  # nothing may happen
            assert (_main(daemon)["state"], _starts(daemon)) == ("exited", 1)
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_a_server_is_reached_again_at_its_own_port_after_a_kill(daemon: Daemon) -> None:
    web = _create(daemon, "--restart", "on-failure", command=tuple(echo_server("alice", 3000)), ports=[3000], wait=True)
    os.kill(main_of(web)["pid"], signal.SIGKILL)
    wait_until(lambda: ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello",
               seconds=10, what="an answer")
    shown = daemon.ctl_json("show", "web", user=ALICE)
    assert (shown["address"], shown["ports"], main_of(shown)["restarts"]) == (web["address"], web["ports"], 1)
    assert "restarted 1 times" in daemon.ctl("show", "web", user=ALICE).stdout


def test_what_fails_at_once_is_restarting_and_can_be_stopped_and_removed(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        _create(daemon, "--restart", "on-failure", command=("sh", "-c", "echo $$ >>starts; exit 3"))
        wait_until(lambda: _main(daemon)["restarts"] >= 3, what="three tries")
        service = wait_until(lambda: (s := _main(daemon))["state"] == "restarting" and s, what="a pause")
        assert (service["exit_code"], service["pid"]) == (3, None)
        assert daemon.ctl_json("ls", user=ALICE)[0]["state"] == "running"
        assert "main: restarting 3" in daemon.ctl("ls", user=ALICE).stdout
        done = daemon.ctl("wait", "web", "--timeout", "0.2", user=ALICE)
        assert done.returncode == 6
        assert "restarting after exit code 3" in done.stderr
        assert main_of(daemon.ctl_json("stop", "web", user=ALICE))["state"] == "stopped"
        starts = _starts(daemon)
        assert starts < 12, "pauses grow"
        time.sleep(1)  # nothing may happen
        assert _starts(daemon) == starts
        daemon.ctl("start", "web", user=ALICE, check=True)
        wait_until(lambda: _starts(daemon) >= starts + 2, what="a restart after a start by hand")
        began = time.monotonic()
        daemon.ctl("rm", "web", user=ALICE, check=True)
        assert time.monotonic() - began < 5
        starts = _starts(daemon)
        time.sleep(1)  # nothing may happen
        assert _starts(daemon) == starts


def test_a_restart_of_the_daemon_goes_on_with_what_ended_meanwhile_and_what_was_in_its_pause(daemon: Daemon) -> None:
    _create(daemon, "--restart", "on-failure")
    _create(daemon, "--restart", "always", command=("sh", "-c", "echo $$ >>starts; exit 3"), user=BOB, name="fails")
    wait_until(lambda: _main(daemon, BOB, "fails")["restarts"] >= 4, what="some tries")
    wait_until(lambda: _main(daemon, BOB, "fails")["state"] == "restarting", what="a pause")
    daemon.kill()
    tries = _starts(daemon, BOB)
    pid = int(daemon.host.path(f"{ALICE.home}/starts").read_text().split()[-1])
    _write(daemon, "code", "7\n")
    wait_until(lambda: is_gone(pid), what="its end")
    daemon.start()
    wait_until(lambda: _starts(daemon) == 2 and _main(daemon)["state"] == "running", what="a start of what had ended")
    assert _main(daemon)["restarts"] == 1
    wait_until(lambda: _starts(daemon, BOB) > tries, seconds=10, what="the start after the pause")
    assert _main(daemon, BOB, "fails")["restarts"] >= 5
    ended = [event for kind, event in _events(daemon) if kind == "ended" and event["name"] == "web"]
    assert [event["exit_code"] for event in ended] == [7]


def test_a_server_that_daemonised_itself_is_started_again_when_nothing_of_it_runs(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        _create(daemon, "--restart", "always", command=DAEMON)
        wait_until(lambda: _main(daemon)["exit_code"] == 0, what="the end of the first process")
        time.sleep(0.5)  # nothing may happen
        assert (_main(daemon)["state"], _starts(daemon)) == ("running", 1)
        _write(daemon, "end")
        wait_until(lambda: _starts(daemon) == 2, what="a start")
        wait_until(lambda: _main(daemon)["state"] == "running" and _main(daemon)["exit_code"] == 0, what="it to settle")
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_a_launchers_death_does_not_end_restarts(daemon: Daemon) -> None:
    _create(daemon, "--restart", "on-failure")
    (launcher,) = daemon.launcher_pids()
    os.kill(launcher, signal.SIGKILL)
    wait_until(lambda: launcher not in daemon.launcher_pids() and daemon.launcher_pids(), what="a new launcher")
    _write(daemon, "code", "7\n")
    wait_until(lambda: _starts(daemon) == 2 and _main(daemon)["state"] == "running", seconds=15, what="a start")
    assert _main(daemon)["restarts"] == 1


# -- health -----------------------------------------------------------------------------------------------------

# Listens on loopback at once, and answers with the status in the file ``status``.
STATUS = """
import http.server, pathlib
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = int(pathlib.Path("status").read_text()) if self.path == "/healthz" else 404
        self.send_response(status)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", 3000), Handler).serve_forever()
"""
QUICK = ("--health-interval", "1", "--health-retries", "2")


def test_http_is_looked_at_behind_loopback_and_wait_waits_for_it(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        _write(daemon, "status", "503")
        web = _create(daemon, "--health", "http:3000/healthz", "--health-start-period", "2", *QUICK,
                      command=(PYTHON, "-c", STATUS), ports=[3000])
        assert main_of(web)["health"] == "starting"
        wait_until(lambda: _main(daemon)["health"] == "unhealthy", seconds=15, what="two failures after its start")
        assert "main: running (unhealthy)" in daemon.ctl("ls", user=ALICE).stdout
        assert 'netnsd_service_health{state="unhealthy"} 1.0' in daemon.host.run(
            ["curl", "-s", "--unix-socket", daemon.socket, "http://localhost/metrics"]).stdout
        done = daemon.ctl("wait", "web", "--timeout", "0.3", user=ALICE)
        assert done.returncode == 6
        assert "unhealthy" in done.stderr
        _write(daemon, "status", "302")
        daemon.ctl("wait", "web", "--timeout", "10", user=ALICE, check=True)
        assert _main(daemon)["health"] == "healthy"
        kinds = [kind for kind, _ in _events(daemon) if kind.endswith("healthy")]
        assert kinds == ["unhealthy", "healthy"]
        assert [event["reason"] for kind, event in _events(daemon) if kind == "unhealthy"] == ["HTTP status 503"]
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_checks_go_on_when_the_daemon_was_killed(daemon: Daemon) -> None:
    web = _create(daemon, "--health", "tcp:3000", *QUICK, command=tuple(echo_server("alice", 3000)), wait=True)
    assert main_of(web)["health"] == "healthy"
    daemon.kill()
    daemon.start()
    assert daemon.ctl_json("show", "web", user=ALICE) == web
    os.kill(main_of(web)["pid"], signal.SIGSTOP)  # its port accepts still: that is what tcp looks at
    time.sleep(2.5)  # two looks  # nothing may happen
    assert _main(daemon)["health"] == "healthy"
    os.kill(main_of(web)["pid"], signal.SIGKILL)
    wait_until(lambda: _main(daemon)["state"] == "exited", what="its end")
    assert _main(daemon)["health"] is None


def test_a_command_looks_from_inside_as_its_user_and_leaves_nothing(daemon: Daemon) -> None:
    check = "id -u >who; cat /proc/self/cgroup >where; (sleep 1000 &); test -e good"
    with nothing_left(daemon.host):
        web = _create(daemon, "--health", f"cmd:{check}", *QUICK, "--health-start-period", "0",
                      command=("sleep", "1000"))
        wait_until(lambda: _main(daemon)["health"] == "unhealthy", seconds=10, what="two failures")
        _write(daemon, "good")
        wait_until(lambda: _main(daemon)["health"] == "healthy", seconds=10, what="a success")
        home = daemon.host.path(ALICE.home)
        assert (home / "who").read_text() == f"{ALICE.uid}\n"
        assert "/h-main" in (home / "where").read_text()
        group = next(path for path, _, _ in os.walk(daemon.host.daemon_cgroup) if path.endswith("/s-main"))
        wait_until(lambda: cgroups.members(os.path.dirname(group)) == [main_of(web)["pid"]], what="the end of a check")
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_a_check_that_hangs_is_ended_and_does_not_keep_others_waiting(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        _create(daemon, "--health", "cmd:sleep 1000", "--health-timeout", "0.5", "--health-start-period", "0", *QUICK,
                command=("sleep", "1000"))
        wait_until(lambda: _main(daemon)["health"] == "unhealthy", seconds=10, what="two that came too late")
        began = time.monotonic()
        daemon.ctl("restart", "web", "--grace", "0", user=ALICE, check=True)
        daemon.ctl("rm", "web", user=ALICE, check=True)
        assert time.monotonic() - began < 5
        assert [event["reason"] for kind, event in _events(daemon) if kind == "unhealthy"][:1] == [
            "no answer within 0.5 s"]


# -- limits -----------------------------------------------------------------------------------------------------

# Doubles as long as it can, in the background too.
BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except BlockingIOError:
        time.sleep(0.01)
"""


def _limits(daemon: Daemon) -> list[str]:
    return [path for group in cgroups.limits_of(daemon.host.daemon_cgroup_name) for path, _, _ in os.walk(group)]


def test_a_fork_bomb_is_contained_and_removed(daemon: Daemon) -> None:
    host = daemon.host
    with nothing_left(host):
        neighbour = _create(daemon, command=tuple(echo_server("bob", 3000)), user=BOB, ports=[3000], wait=True)
        web = _create(daemon, "--pids", "60", command=(PYTHON, "-c", BOMB))
        assert web["resources"]["pids"] == 60
        (group,) = (path for path, _, _ in os.walk(host.daemon_cgroup)
                    if path.endswith("/s-main") and main_of(web)["pid"] in cgroups.members(path))
        wait_until(lambda: len(cgroups.members(group)) >= 55, seconds=10, what="the bomb")
        for _ in range(20):
            assert len(cgroups.members(os.path.dirname(group))) <= 60
            time.sleep(0.02)
        assert ask(host, "tcp", "127.0.0.1", published(neighbour), user=BOB) == "bob heard hello"
        began = time.monotonic()
        daemon.ctl("rm", "web", user=ALICE, check=True)
        assert time.monotonic() - began < 10
        assert not any("nd" in os.path.basename(path) for path in _limits(daemon))
        daemon.ctl("rm", "web", user=BOB, check=True)


def test_what_a_daemon_that_was_killed_left_of_a_bomb_is_removed_at_its_start(daemon: Daemon) -> None:
    host = daemon.host
    with nothing_left(host):
        _create(daemon, "--pids", "60", command=(PYTHON, "-c", BOMB))
        daemon.kill()
        program = ("import sqlite3, sys\nwith sqlite3.connect(sys.argv[1]) as state:\n"
                   "    state.execute('PRAGMA foreign_keys = ON')\n    state.execute('DELETE FROM environments')\n")
        host.run([PYTHON, "-c", program, f"{daemon.state_dir}/netnsd.db"], check=True)
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == []
        assert not any(os.path.basename(path).startswith("nd") for path in _limits(daemon))


def test_all_commands_of_a_limited_environment_are_counted_also_after_a_restart_of_the_daemon(daemon: Daemon) -> None:
    _create(daemon, "--pids", "8", command=("sleep", "1000"))
    daemon.kill()
    daemon.start()
    script = "i=0; while [ $i -lt 20 ]; do sleep 5 & i=$((i+1)); done; jobs -p | wc -l"
    done = daemon.ctl("exec", "web", "--", "bash", "-c", script, user=ALICE)
    assert "Resource temporarily unavailable" in done.stderr
    daemon.ctl("restart", "web", "--grace", "0", user=ALICE, check=True)
    with nothing_left(daemon.host):
        pass
    assert _main(daemon)["state"] == "running"
    pid = _main(daemon)["pid"]
    groups = daemon.host.run(["cat", f"/proc/{pid}/cgroup"]).stdout
    assert any(line.split(":")[1] in ("pids", "") and line.rpartition("/")[2].strip().startswith(("nd", "s-"))
               for line in groups.splitlines())
    assert daemon.host.daemon_cgroup_name in groups
