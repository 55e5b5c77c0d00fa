"""Others take parts of environments away: the daemon gives them back, and servers and their connections go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, wait_until
from tests.system.clients import Conversation, Environment, ask, echo_server, is_gone, main_of, nothing_left, published


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Daemon:
    """The module's."""
    return tidy_daemon


def _echoing(daemon: Daemon, name: str = "web") -> Environment:
    return daemon.create_json(name, *echo_server("alice", 3000), user=ALICE, ports=[3000], wait=True)


def _run(host: HostNamespace, *commands: str) -> None:
    host.run(["sh", "-ec", "; ".join(commands)], check=True)


def _link_of(daemon: Daemon, environment: Environment) -> str:
    """The host's end of an environment's link, by the order of addresses."""
    third, fourth = map(int, environment["address"].split(".")[2:])
    return f"nd{250 * third + fourth - 2}"


def _events(daemon: Daemon, kind: str) -> list[str]:
    return [line for line in daemon.log().splitlines() if f'"event":"{kind}"' in line]


LOSSES: dict[str, list[str]] = {
    "link": ["ip link delete {link}"],
    "link is down": ["ip link set {link} down"],
    "link left the bridge": ["ip link set {link} nomaster"],
    "name": ["ip netns delete web"],
    "pin": ["umount {run}/slots/{slot}"],
    "pin and its file": ["umount {run}/slots/{slot}", "rm {run}/slots/{slot}"],
    "all pins": ["umount -l {run}/slots", "rm -rf {run}/slots"],
    "link and name": ["ip link delete {link}", "ip netns delete web"],
    "bridge": ["ip link delete ndbr0"],
    "bridge is down": ["ip link set ndbr0 down"],
    "bridge's address": ["ip address flush dev ndbr0"],
    "neighbours": ["ip link set {link} down", "ip neighbour flush all nud permanent"],
    "sysctls": ["sysctl -qw net.ipv4.conf.ndbr0.route_localnet=0", "sysctl -qw net.ipv4.conf.ndbr0.forwarding=0"],
    "everything but the pin": ["ip link delete ndbr0", "ip link delete {link}", "ip netns delete web"],
}
# The daemon hears of these by itself; of the others it learns at its next look.
HEARD = frozenset({"link", "name", "link and name", "bridge", "everything but the pin"})


def _lose(daemon: Daemon, environment: Environment, loss: str) -> None:
    link = _link_of(daemon, environment)
    _run(daemon.host, *(step.format(link=link, slot=link[2:], run=daemon.runtime_dir) for step in LOSSES[loss]))


def _is_whole(daemon: Daemon, environment: Environment) -> bool:
    return bool(ask(daemon.host, "tcp", "127.0.0.1", published(environment), user=ALICE, seconds=0.5)
                == "alice heard hello") and daemon.host.run(["ip", "netns", "exec", "web", "true"]).returncode == 0


@pytest.mark.parametrize("size", [0, 3])
def test_who_comes_after_a_bridge_that_nobody_had_went_is_reached(
        make_daemon: Callable[..., Daemon], size: int) -> None:
    daemon = make_daemon(config={"pool": {"size": size, "most": size}})
    daemon.create_json("first", user=ALICE)
    daemon.ctl("rm", "first", user=ALICE, check=True)
    wait_until(lambda: daemon.ctl_json("info")["pool_ready"] == size, what="the pool")
    _run(daemon.host, "ip link delete ndbr0")
    # What is asked for in the very moment may fail.
    wait_until(lambda: daemon.ctl("create", "probe", user=ALICE).returncode == 0, seconds=5, what="a new bridge")
    wait_until(lambda: daemon.ctl_json("info")["pool_ready"] == size, what="the pool")
    assert _is_whole(daemon, _echoing(daemon))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_an_environment_loses_it_gets_back_and_nobody_notices(daemon: Daemon, loss: str) -> None:
    host = daemon.host
    with nothing_left(host):
        web, other = _echoing(daemon), daemon.create_json("other", *echo_server("bob", 3000), user=BOB, ports=[3000],
                                                          wait=True)
        with Conversation(host, "127.0.0.1", published(web), user=ALICE) as line:
            assert line.say("one") == "alice heard one"
            _lose(daemon, web, loss)
            if loss not in HEARD:
                os.kill(daemon.pid, signal.SIGHUP)
            wait_until(lambda: _is_whole(daemon, web), seconds=5, what=f"the end of the loss: {loss}")
            assert line.say("two") == "alice heard two", "the connection that was open goes on"
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        assert ask(host, "tcp", "127.0.0.1", published(other), user=BOB) == "bob heard hello"
        assert ask(host, "tcp", "127.0.0.1", published(web), user=BOB) == "ECONNREFUSED", "it is the owner's alone"
        assert daemon.ctl_json("doctor")["differences"] == []
        for user in (ALICE, BOB):
            daemon.ctl("rm", "--all", "--yes", user=user, check=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_lost_while_the_daemon_was_down_is_back_after_its_start(daemon: Daemon, loss: str) -> None:
    host = daemon.host
    with nothing_left(host):
        web = _echoing(daemon)
        with Conversation(host, "127.0.0.1", published(web), user=ALICE) as line:
            assert line.say("one") == "alice heard one"
            daemon.kill()
            _lose(daemon, web, loss)
            daemon.start()
            wait_until(lambda: _is_whole(daemon, web), seconds=5, what=f"the end of the loss: {loss}")
            assert line.say("two") == "alice heard two"
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        daemon.ctl("rm", "web", user=ALICE, check=True)


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
def test_an_environment_to_which_nothing_leads_any_more_ends_and_leaves_nothing(daemon: Daemon, is_up: bool) -> None:
    host = daemon.host
    with nothing_left(host):
        web = _echoing(daemon)
        told = len(_events(daemon, "lost"))
        if not is_up:
            daemon.kill()
        _run(host, f"umount {daemon.runtime_dir}/slots/{_link_of(daemon, web)[2:]}", "ip netns delete web")
        if not is_up:
            daemon.start()
        wait_until(lambda: daemon.ctl_json("ls", user=ALICE) == [], what="the environment's end")
        assert is_gone(main_of(web)["pid"])
        assert len(_events(daemon, "lost")) == told + 1
        assert daemon.ctl_json("doctor")["differences"] == []


@pytest.mark.parametrize("way", [
    "ip netns delete web; ip netns add web",
    "cd /run/netns; ip netns add other; mount --bind other web; umount other; rm other",
], ids=["made anew", "mounted on it"])
@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
def test_where_its_name_is_somebody_elses_now_an_environment_has_another(daemon: Daemon, way: str, is_up: bool) -> None:
    host = daemon.host
    with nothing_left(host):
        web = _echoing(daemon)
        if not is_up:
            daemon.kill()
        _run(host, way)
        theirs = os.stat(host.path("/run/netns/web")).st_ino
        if not is_up:
            daemon.start()
        os.kill(daemon.pid, signal.SIGHUP)
        after = {**web, "netns": "/run/netns/web.alice"}
        wait_until(lambda: daemon.ctl_json("show", "web", user=ALICE) == after, what="another name")
        wait_until(lambda: host.run(["ip", "netns", "exec", "web.alice", "true"]).returncode == 0, what="a namespace")
        assert os.stat(host.path("/run/netns/web")).st_ino == theirs
        assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
        assert daemon.ctl("exec", "web", "--", "echo", "hi", user=ALICE, check=True).stdout == "hi\n"
        assert daemon.ctl_json("doctor")["differences"] == []
        daemon.ctl("rm", "web", user=ALICE, check=True)
        assert os.stat(host.path("/run/netns/web")).st_ino == theirs
        _run(host, "ip netns delete web")


def test_another_supernet_is_refused_while_environments_run_and_nothing_is_changed(daemon: Daemon) -> None:
    web = _echoing(daemon)
    assert daemon.stop() == 0
    try:
        daemon.configure({"network": {"supernet": "10.204.0.0/16"}})
        done = daemon.host.run(daemon.command, timeout=10)
        assert done.returncode == 78
        assert "[network] supernet: 'web' runs at another address than 10.204." in done.stderr
        assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    finally:
        daemon.configure({})
        daemon.start()
    assert daemon.ctl_json("show", "web", user=ALICE) == web
    assert ask(daemon.host, "tcp", web["address"], 3000, user=ALICE) == "alice heard hello"
