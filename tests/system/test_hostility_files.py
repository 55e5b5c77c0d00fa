"""Others take the daemon's files away, or change the host's: what is told, put back, and never lost."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, wait_until
from tests.harness.daemon import program
from tests.system.api import COMMAND, Api
from tests.system.clients import Environment, ask, echo_server, inside, is_gone, main_of, nothing_left, published

SECONDS = 5.0
WHOLE = "/whole directory/"


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One that made an environment before: what it makes once is there."""
    with Daemon(host) as started:
        started.create_json("first", *COMMAND, user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started


def _echoing(daemon: Daemon, user: User, name: str = "web") -> Environment:
    return daemon.create_json(name, *echo_server(str(user), 3000), user=user, ports=[3000], wait=True)


def _remove(daemon: Daemon, directory: str, name: str) -> None:
    path = directory if name == WHOLE else f"{directory}/{name}"
    daemon.host.run(["rm", "-r", path], check=True)


# -- the state directory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "end"), [
    (WHOLE, "kill"), (WHOLE, "stop"), ("netnsd.db", "kill"), ("netnsd.db-wal", "kill"), ("lock", "kill")])
def test_state_that_is_removed_under_the_daemon_is_put_back_and_environments_survive_its_restart(
        daemon: Daemon, name: str, end: str) -> None:
    with nothing_left(daemon.host):
        before = [_echoing(daemon, ALICE), daemon.create_json("bare", user=ALICE)]
        _remove(daemon, daemon.state_dir, name)
        more = daemon.create_json("more", *COMMAND, user=ALICE)  # whatever is there now
        if end == "kill":
            wait_until(lambda: '"state_restored"' in daemon.log(), seconds=SECONDS, what="the event")
            daemon.kill()
        else:
            assert daemon.stop() == 0
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == [*before, more]
        assert ask(daemon.host, "tcp", "127.0.0.1", published(before[0]), user=ALICE) == "alice heard hello"
        for environment in (*before, more):
            daemon.ctl("rm", environment["id"], user=ALICE, check=True)


def test_state_that_is_removed_while_the_daemon_is_down_takes_the_environments_along(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        web = _echoing(daemon, ALICE)
        daemon.kill()
        _remove(daemon, daemon.state_dir, WHOLE)
        daemon.start()
        assert daemon.ctl_json("ls", user=ALICE) == []
        assert is_gone(main_of(web)["pid"]), "what nobody knows of cannot be its owner's"


@pytest.mark.parametrize("name", ["logs", WHOLE])
def test_log_directories_that_are_removed_cost_what_was_logged_and_nothing_else(daemon: Daemon, name: str) -> None:
    web = daemon.create_json("web", "sh", "-c", "echo old; exec sleep 1000", user=ALICE)
    wait_until(lambda: daemon.ctl("logs", "web", user=ALICE).stdout == "old\n", what="a line")
    _remove(daemon, daemon.state_dir, name)
    wait_until(lambda: name == "logs" or '"state_restored"' in daemon.log(), seconds=SECONDS, what="the event")
    said = daemon.ctl("logs", "web", user=ALICE)
    assert (said.returncode, said.stdout) == (0, "")
    assert not is_gone(main_of(web)["pid"])
    daemon.ctl("restart", "web", user=ALICE, check=True)
    wait_until(lambda: daemon.ctl("logs", "web", user=ALICE).stdout == "old\n", what="a line of the restarted server")
    _remove(daemon, daemon.state_dir, "logs")
    daemon.create_json("other", "sh", "-c", "echo new; exec sleep 1000", user=ALICE)
    wait_until(lambda: daemon.ctl("logs", "other", user=ALICE).stdout == "new\n", what="a line of a new server")
    log = daemon.host.path(f"{daemon.state_dir}/logs")
    assert stat.S_IMODE(log.stat().st_mode) == 0o711, "users may enter it and not list it, as before"
    daemon.restart()
    assert [e["state"] for e in daemon.ctl_json("ls", user=ALICE)] == ["running", "running"]


# -- the runtime directory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["netnsd.sock", "attach.sock"])
def test_a_socket_that_is_removed_is_made_anew_with_its_owner_and_mode(daemon: Daemon, name: str) -> None:
    daemon.create_json("web", *COMMAND, user=ALICE)
    path = daemon.host.path(f"{daemon.runtime_dir}/{name}")
    before = path.stat()
    path.unlink()
    wait_until(path.exists, seconds=SECONDS, what="a new socket")
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert inside(daemon, "web", "echo", "hi", user=ALICE) == "hi"
    assert daemon.ctl("ls", user="mallory").returncode == 7, "not in its group"
    assert daemon.stop() == 0
    assert not path.exists()


def test_requests_under_way_do_not_notice_that_the_socket_is_gone(daemon: Daemon) -> None:
    daemon.create_json("web", "sh", "-c", "echo one; until [ -e go ]; do sleep 0.02; done; echo two", user=ALICE)
    follower = daemon.host.popen([program("netnsctl"), "logs", "web", "--follow"], user=ALICE,
                                 env={"NETNSD_SOCKET": daemon.socket})
    assert follower.stdout is not None
    assert follower.stdout.readline() == b"one\n"
    path = daemon.host.path(daemon.socket)
    path.unlink()
    wait_until(path.exists, seconds=SECONDS, what="a new socket")
    daemon.host.write(f"{ALICE.home}/go", "", user=ALICE)
    assert follower.communicate(timeout=10)[0] == b"two\n"


def test_the_launchers_socket_that_is_removed_is_made_anew_and_the_next_daemon_finds_it(daemon: Daemon) -> None:
    daemon.create_json("web", "sh", "-c", "until [ -e go ]; do sleep 0.02; done; exit 7", user=ALICE)
    [launcher] = daemon.launcher_pids()
    path = daemon.host.path(f"{daemon.runtime_dir}/launcher.sock")
    path.unlink()
    wait_until(path.exists, seconds=SECONDS, what="a new socket")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    daemon.kill()
    daemon.start()
    assert daemon.launcher_pids() == [launcher]
    daemon.host.write(f"{ALICE.home}/go", "", user=ALICE)
    assert daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE).returncode == 7
    daemon.ctl("rm", "web", user=ALICE, check=True)
    assert daemon.stop() == 0
    assert not path.exists()


def test_files_of_environments_that_are_removed_are_made_anew_at_the_next_start(daemon: Daemon) -> None:
    daemon.create_json("web", *COMMAND, user=ALICE)
    _remove(daemon, daemon.runtime_dir, "env")
    assert inside(daemon, "web", "grep", "-c", "web", "/etc/hosts", user=ALICE) == "1"
    daemon.create_json("other", *COMMAND, user=BOB)
    assert inside(daemon, "other", "grep", "-c", "other", "/etc/hosts", user=BOB) == "1"
    for user, name in ((ALICE, "web"), (BOB, "other")):
        daemon.ctl("rm", name, user=user, check=True)
    assert daemon.stop() == 0


# -- the host's own files ---------------------------------------------------------------------------------------


def test_running_servers_see_the_hosts_new_name_servers_and_names(daemon: Daemon) -> None:
    daemon.create_json("web", "sh", "-c", "while sleep 0.1; do cat /etc/resolv.conf /etc/hosts >now; mv now seen; done",
                       user=ALICE)
    api = Api(daemon, BOB)
    api.create("late")
    seen = daemon.host.path(f"{ALICE.home}/seen")
    wait_until(lambda: seen.exists() and "198.51.100.1" in seen.read_text(), what="the host's name server")
    names = "/run/test/hosts"
    daemon.host.write(names, "127.0.0.1 localhost\n198.51.100.9 build\n")
    daemon.host.run(["mount", "--bind", names, "/etc/hosts"], check=True)
    resolv = daemon.host.path("/run/harness/resolv.conf")  # mounted on /etc/resolv.conf
    resolv.write_text("nameserver 198.51.100.77\nsearch example.org\n")
    wait_until(lambda: "198.51.100.77" in seen.read_text() and "198.51.100.9 build" in seen.read_text(),
               seconds=SECONDS, what="the host's new name server and name")
    assert "198.51.100.1\n" not in seen.read_text()
    assert inside(daemon, "late", "cat", "/etc/resolv.conf", user=BOB).endswith("search example.org")
    resolv.write_text("nameserver 198.51.100.5\n")  # shorter: nothing of the longer one is left
    wait_until(lambda: seen.read_text().startswith("nameserver 198.51.100.5\n127.0.0.1\tlocalhost\n"), seconds=SECONDS,
               what="the shorter file")


def test_a_hosts_file_in_another_encoding_is_passed_on_as_it_is(daemon: Daemon) -> None:
    daemon.host.path("/run/test/hosts").write_bytes(b"198.51.100.9 build # M\xfcnchen\n")
    daemon.host.run(["mount", "--bind", "/run/test/hosts", "/etc/hosts"], check=True)
    web = daemon.create_json("web", *COMMAND, user=ALICE)
    own = daemon.host.path(f"{daemon.runtime_dir}/env/{web['id']}/hosts")
    assert b"M\xfcnchen\n" in own.read_bytes()
