"""Daemon and launcher die and come back: what serves goes on, what was half-made is gone, what is others' stays."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import socket
import struct
import termios
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, wait_until
from tests.harness.daemon import program
from tests.harness.host import tool
from tests.system.clients import (
    PYTHON,
    Conversation,
    Environment,
    ask,
    echo_server,
    is_gone,
    main_of,
    nothing_left,
    published,
)

USERS = (ALICE, BOB)
# Ends with a code of its own as soon as the file ``go`` is there.
ENDS_WHEN_TOLD = ("sh", "-c", "until [ -e go ]; do sleep 0.02; done; exit 7")


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One that made an environment before: what it makes once is there."""
    with Daemon(host) as started:
        started.create_json("first", "sleep", "1000", user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started


def _echoing(daemon: Daemon, user: User, name: str = "web") -> Environment:
    return daemon.create_json(name, *echo_server(str(user), 3000), user=user, ports=[3000], wait=True)


def _shown(daemon: Daemon, user: User, name: str = "web") -> Environment:
    environment: Environment = daemon.ctl_json("show", name, user=user)
    return environment


def _tell(daemon: Daemon, user: User) -> None:
    daemon.host.write(f"{user.home}/go", "", user=user)


def _change_state(daemon: Daemon, statement: str, *values: str) -> None:
    """Write into the state file of a daemon that does not run."""
    program = ("import sqlite3, sys\nwith sqlite3.connect(sys.argv[1]) as state:\n"
               "    state.execute('PRAGMA foreign_keys = ON')\n"
               "    assert state.execute(sys.argv[2], sys.argv[3:]).rowcount == 1\n")
    daemon.host.run([PYTHON, "-c", program, f"{daemon.state_dir}/netnsd.db", statement, *values], check=True)


def _told(daemon: Daemon, code: int) -> int | None:
    """The code of a process that nobody waited for who would tell us: from Linux 6.15 on the kernel does."""
    features = daemon.ctl_json("info")["features"]
    assert features["pidfd_exit_info"] == (tuple(map(int, platform.release().split(".")[:2])) >= (6, 15))
    return code if features["pidfd_exit_info"] else None


def _launcher(daemon: Daemon) -> int:
    (pid,) = daemon.launcher_pids()
    return pid


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_servers_and_their_connections_outlive_the_daemon(daemon: Daemon, end: str) -> None:
    before = {user: _echoing(daemon, user) for user in USERS}
    launcher = _launcher(daemon)
    with ExitStack() as stack:
        lines = {user: stack.enter_context(Conversation(daemon.host, "127.0.0.1", published(before[user]), user=user))
                 for user in USERS}
        for moment in ("before", "while it is down", "after"):
            if moment == "while it is down":
                daemon.kill() if end == "kill" else daemon.stop()
            elif moment == "after":
                daemon.start()
            for user, line in lines.items():
                assert line.say(moment) == f"{user} heard {moment}"
                assert ask(daemon.host, "tcp", "127.0.0.1", published(before[user]), user=user) == f"{user} heard hello"
    assert {user: _shown(daemon, user) for user in USERS} == before
    assert _launcher(daemon) == launcher
    assert ask(daemon.host, "tcp", "127.0.0.1", published(before[ALICE]), user=BOB) == "ECONNREFUSED"


def test_environment_that_was_adopted_is_removed_whole(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        for user in USERS:
            _echoing(daemon, user)
        daemon.kill()
        daemon.start()
        for user in USERS:
            daemon.ctl("rm", "web", user=user, check=True)


def test_adopted_environment_keeps_its_port_number_and_address_to_itself(daemon: Daemon) -> None:
    web = _echoing(daemon, ALICE)
    daemon.kill()
    daemon.start()
    other = _echoing(daemon, BOB)
    assert (published(other), other["address"]) != (published(web), web["address"])
    done = daemon.ctl("create", "more", "--port", f"{published(web)}:3000", user=BOB)
    assert done.returncode == 5, "its number is given to nobody else"


@pytest.mark.parametrize(("how", "code"), [("exits", 7), ("is killed", 128 + signal.SIGKILL)])
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_exit_code_of_a_server_that_ended_while_the_daemon_was_down_is_known(
        daemon: Daemon, end: str, how: str, code: int) -> None:
    pid = main_of(daemon.create_json("web", *ENDS_WHEN_TOLD, user=ALICE))["pid"]
    daemon.kill() if end == "kill" else daemon.stop()
    _tell(daemon, ALICE) if how == "exits" else os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid), what="the server's end")
    daemon.start()
    web = _shown(daemon, ALICE)
    assert (web["state"], main_of(web)["state"], main_of(web)["exit_code"]) == ("stopped", "exited", code)
    assert daemon.ctl("wait", "web", "--for", "exit", user=ALICE).returncode == code


def test_end_of_an_adopted_server_is_noticed_with_its_exit_code(daemon: Daemon) -> None:
    daemon.create_json("web", *ENDS_WHEN_TOLD, user=ALICE)
    daemon.kill()
    daemon.start()
    _tell(daemon, ALICE)
    assert daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE).returncode == 7


def test_launchers_death_leaves_daemon_and_servers_and_where_the_kernel_tells_their_exit_codes(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        web = _echoing(daemon, ALICE)
        daemon.create_json("ends", *ENDS_WHEN_TOLD, user=ALICE)
        old = _launcher(daemon)
        with Conversation(daemon.host, "127.0.0.1", published(web), user=ALICE) as line:
            assert line.say("one") == "alice heard one"
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: [pid for pid in daemon.launcher_pids() if pid != old], what="a new launcher")
            assert line.say("two") == "alice heard two"
            assert _echoing(daemon, BOB)["state"] == "running"
            assert daemon.ctl("exec", "web", "--", "echo", "hi", user=ALICE, check=True).stdout == "hi\n"
            assert _shown(daemon, ALICE) == web
            assert line.say("three") == "alice heard three"
        _tell(daemon, ALICE)
        daemon.ctl("wait", "ends", "--for", "exit", "--timeout", "5", user=ALICE)
        ended = main_of(_shown(daemon, ALICE, "ends"))
        assert (ended["state"], ended["pid"], ended["exit_code"]) == ("exited", None, _told(daemon, 7))
        assert daemon.ctl_json("stop", "web", user=ALICE)["state"] == "stopped"
        wait_until(lambda: main_of(_shown(daemon, ALICE))["exit_code"] == _told(daemon, 128 + signal.SIGTERM),
                   what="the code, once process 1 has reaped it")
        assert is_gone(main_of(web)["pid"])
        assert daemon.process is not None
        assert daemon.process.poll() is None, "the daemon is still the first one"
        for ref in ("web", "ends"):
            daemon.ctl("rm", ref, user=ALICE, check=True)
        daemon.ctl("rm", "web", user=BOB, check=True)


def test_death_of_daemon_and_launcher_together_leaves_servers_that_a_new_pair_takes_over(daemon: Daemon) -> None:
    web = _echoing(daemon, ALICE)
    daemon.create_json("ends", *ENDS_WHEN_TOLD, user=ALICE)
    launcher = _launcher(daemon)
    daemon.kill()
    os.kill(launcher, signal.SIGKILL)
    wait_until(lambda: is_gone(launcher), what="the launcher's end")
    daemon.start()
    assert _shown(daemon, ALICE) == web
    assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    _tell(daemon, ALICE)
    daemon.ctl("wait", "ends", "--for", "exit", "--timeout", "5", user=ALICE)
    ended = main_of(_shown(daemon, ALICE, "ends"))
    assert (ended["state"], ended["exit_code"]) == ("exited", _told(daemon, 7))


@pytest.mark.parametrize("state", ["creating", "removing"])
def test_environment_that_was_half_made_or_half_removed_is_gone_after_the_start(daemon: Daemon, state: str) -> None:
    with nothing_left(daemon.host):
        web = _echoing(daemon, ALICE)
        other = _echoing(daemon, BOB)
        daemon.kill()
        _change_state(daemon, "UPDATE environments SET state = ? WHERE id = ?", state, web["id"])
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == []
        assert is_gone(main_of(web)["pid"])
        assert _shown(daemon, BOB) == other
        daemon.create_json("again", user=ALICE, options=["--port", f"{published(web)}:3000"])  # its number is free
        daemon.ctl("rm", "again", user=ALICE, check=True)
        daemon.ctl("rm", "web", user=BOB, check=True)


def test_daemon_killed_while_the_launcher_starts_a_server_undoes_the_creation(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        launcher = _launcher(daemon)
        os.kill(launcher, signal.SIGSTOP)
        # Not netnsctl, which asks again.
        wanted = json.dumps({"name": "web", "ports": [{"port": 3000}], "command": echo_server("alice", 3000)})
        client = daemon.host.popen([tool("curl"), "-sS", "--unix-socket", daemon.socket, "-d", wanted,
                                    "http://localhost/v1/environments"], user=ALICE)
        wait_until(lambda: daemon.host.path("/run/netns/web").exists() and any(
            name.startswith("nd") for name in os.listdir(daemon.host.daemon_cgroup)), what="the half-made environment")
        assert daemon.ctl_json("ls", user=ALICE)[0]["state"] == "creating"
        daemon.kill()
        assert client.wait(timeout=5) == 52  # an empty answer: curl(1)
        os.kill(launcher, signal.SIGCONT)
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == []
        assert _launcher(daemon) == launcher
        _echoing(daemon, ALICE)
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_what_no_row_tells_of_is_removed_at_the_start(daemon: Daemon) -> None:
    host = daemon.host
    with nothing_left(host):
        web = _echoing(daemon, ALICE)
        kept = _echoing(daemon, BOB)
        daemon.kill()
        _change_state(daemon, "DELETE FROM environments WHERE id = ?", web["id"])
        planted = f"{host.daemon_cgroup}/nd77/s-main"
        plant = f"mkdir -p {planted}; echo 0 >{planted}/cgroup.procs; setsid -f sleep 1000 >/dev/null 2>&1"
        host.run(["sh", "-ec", plant], check=True)
        for directory in (f"{daemon.runtime_dir}/env", f"{daemon.state_dir}/logs"):
            made = host.directory(f"{directory}/{uuid.uuid4()}")
            host.write(f"{made}/main.log", "left\n")
        host.write(f"{daemon.runtime_dir}/slots/88", "")  # a pin whose mount did not come about
        daemon.start()
        assert is_gone(main_of(web)["pid"])
        assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "ECONNREFUSED"
        assert _shown(daemon, BOB) == kept
        assert ask(host, "tcp", "127.0.0.1", published(kept), user=BOB) == "bob heard hello"
        daemon.ctl("rm", "web", user=BOB, check=True)


def test_a_bridge_that_was_half_made_is_made_anew_and_one_of_others_is_let_be(daemon: Daemon) -> None:
    host = daemon.host
    daemon.restart()  # without environments there is no bridge
    daemon.kill()
    # What is there between the first and the last step; the index is ours, not the name alone.
    host.run(["ip", "link", "add", "ndbr0", "index", "1000000", "type", "bridge"], check=True)
    host.run(["ip", "link", "add", "ndbr-other", "type", "bridge"], check=True)
    daemon.start()
    web = _echoing(daemon, ALICE)
    assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    daemon.kill()
    # The address is the last step but the settings.
    host.run(["sysctl", "-qw", "net.ipv4.conf.ndbr0.route_localnet=0", "net.ipv4.conf.ndbr0.forwarding=0"], check=True)
    daemon.start()
    assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    assert host.run(["sysctl", "-n", "net.ipv4.conf.ndbr0.forwarding"]).stdout == "1\n"
    daemon.ctl("rm", "web", user=ALICE, check=True)
    assert daemon.stop() == 0
    assert "ndbr-other" in host.run(["ip", "-br", "link"]).stdout
    assert "ndbr0" not in host.run(["ip", "-br", "link"]).stdout


def test_namespaces_links_and_tables_of_others_are_untouched_whatever_happens(daemon: Daemon) -> None:
    host = daemon.host
    host.run(["sh", "-ec", "ip netns add web; ip netns add plain; ip link add nd99 type veth peer name peer99"],
             check=True)
    host.run(["sh", "-ec", "nft add table ip mine; nft add table inet netnsd"], check=True)
    lodger = host.popen(["ip", "netns", "exec", "web", "sleep", "1000"])

    def foreign() -> list[object]:
        return [os.stat(host.path(f"/run/netns/{name}")).st_ino for name in ("web", "plain")] + [
            lodger.poll(), host.run(["nft", "list", "tables"]).stdout.count("mine"),
            host.run(["nft", "list", "tables"]).stdout.count("inet netnsd"),
            host.run(["ip", "link", "show", "nd99"], check=True).stdout.count("nd99")]

    before = foreign()
    with nothing_left(host):
        web = _echoing(daemon, ALICE)
        assert web["netns"] == "/run/netns/web.alice", "the name was taken"
        half = _echoing(daemon, ALICE, "half")
        assert half["netns"] == "/run/netns/half"
        renamed = _echoing(daemon, ALICE, "renamed")
        daemon.kill()
        # Our names are somebody else's now.
        for name in ("half", "renamed"):
            host.run(["sh", "-ec", f"ip netns delete {name}; ip netns add {name}"], check=True)
        _change_state(daemon, "UPDATE environments SET state = 'creating' WHERE id = ?", half["id"])
        taken = [os.stat(host.path(f"/run/netns/{name}")).st_ino for name in ("half", "renamed")]
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == [web, {**renamed, "netns": "/run/netns/renamed.alice"}]
        assert [os.stat(host.path(f"/run/netns/{name}")).st_ino for name in ("half", "renamed")] == taken
        for name in ("half", "renamed"):
            host.run(["ip", "netns", "delete", name], check=True)
        daemon.ctl("rm", "web", "renamed", user=ALICE, check=True)
    assert daemon.stop() == 0
    assert foreign() == before


def test_a_command_that_a_user_runs_outlives_the_daemon(daemon: Daemon) -> None:
    daemon.create_json("web", user=ALICE)
    command = daemon.host.popen([program("netnsctl"), "exec", "web", "--", *ENDS_WHEN_TOLD],
                                user=ALICE, env={"NETNSD_SOCKET": daemon.socket})
    wait_until(lambda: len(daemon.launcher_pids()) >= 2, what="the command's monitor")
    daemon.kill()
    _tell(daemon, ALICE)
    assert command.wait(timeout=5) == 7
    daemon.start()
    assert _shown(daemon, ALICE)["state"] == "running"


def test_sigterm_ends_the_daemon_within_its_grace_time_whoever_is_attached(host: HostNamespace) -> None:
    grace_seconds = 1.0
    with Daemon(host, config={"daemon": {"grace_seconds": 1}}) as daemon, ExitStack() as stack:
        web = daemon.create_json("web", "sh", "-c", "yes | head -c 8000000; exec sleep 1000", user=ALICE)
        readers = [stack.enter_context(_Silent(daemon, path)) for path in (
            f"/v1/environments/{web['id']}/logs?follow=1", "/v1/events", f"/v1/environments/{web['id']}/wait?for=gone")]
        wait_until(lambda: readers[0].waiting_bytes > 100_000, what="a full socket")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < grace_seconds + 2.5
        assert not is_gone(main_of(web)["pid"])
        daemon.start()
        assert main_of(daemon.ctl_json("show", "web", user=ALICE))["pid"] == main_of(web)["pid"]


class _Silent:
    """A client that asks and never reads."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(daemon.host.path(daemon.socket)))
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    @property
    def waiting_bytes(self) -> int:
        answer = fcntl.ioctl(self._socket, termios.FIONREAD, b"\0" * 4)
        return int(struct.unpack("i", answer)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
