"""`doctor` names every difference between state file and kernel; `prune` removes what is nobody's, and only that."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, CAROL, Daemon, User, wait_until
from tests.harness.host import HostNamespace
from tests.system.clients import PYTHON, ask, echo_server, is_gone, main_of, nothing_left, published


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Daemon:
    """The module's."""
    return tidy_daemon


def _differences(daemon: Daemon, user: User | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(daemon.ctl("doctor", "-o", "json", user=user).stdout)["differences"]
    return found


def _named(daemon: Daemon, user: User | None = None) -> set[tuple[str, str, str]]:
    return {(d["kind"], d["what"], d["subject"]) for d in _differences(daemon, user)}


def _run(host: HostNamespace, *commands: str) -> None:
    host.run(["sh", "-ec", "; ".join(commands)], check=True)


def _state(daemon: Daemon, statement: str, *values: str) -> None:
    program = ("import sqlite3, sys\nwith sqlite3.connect(sys.argv[1], timeout=5) as state:\n"
               "    state.execute('PRAGMA foreign_keys = ON')\n"
               "    assert state.execute(sys.argv[2], sys.argv[3:]).rowcount == 1\n")
    daemon.host.run([PYTHON, "-c", program, f"{daemon.state_dir}/netnsd.db", statement, *values], check=True)


def _plant_slot(daemon: Daemon, index: int) -> None:
    """What a daemon that was killed in the middle would leave, if no start cleared it."""
    pin = f"{daemon.runtime_dir}/slots/{index}"
    _run(daemon.host, f"touch {pin}", f"unshare --net=/run/test/ns{index} true 2>/dev/null || :",
         f"touch /run/test/ns{index}", f"unshare --net=/run/test/ns{index} true",
         f"mount --bind /run/test/ns{index} {pin}", f"umount /run/test/ns{index}", f"rm /run/test/ns{index}",
         f"ip link add nd{index} index {1_100_000 + index} type veth peer name eth0 netns {pin}",
         f"ip link set nd{index} up group {0x6e64} alias netnsd")


def test_nothing_is_told_of_a_host_on_which_all_is_well(daemon: Daemon) -> None:
    daemon.create_json("web", *echo_server("alice", 3000), user=ALICE, ports=[3000, "3000/udp"], wait=True)
    daemon.create_json("bare", user=BOB)
    for user in (None, ALICE, BOB):
        assert _differences(daemon, user) == []
    assert daemon.ctl("doctor", user=ALICE).returncode == 0
    assert daemon.ctl("prune").stdout == ""


def test_orphans_are_named_and_removed_and_what_is_not_marked_is_let_be(daemon: Daemon) -> None:
    host = daemon.host
    with nothing_left(host):
        web = daemon.create_json("web", *echo_server("alice", 3000), user=ALICE, ports=[3000], wait=True)
        _run(host, "ip netns add theirs", "ip link add nd99 type veth peer name peer99", "ip link add nd98 type bridge",
             "nft add table ip mine")
        _plant_slot(daemon, 77)
        group = f"{daemon.cgroup}/nd78/s-main"
        host.run(["sh", "-ec", f"mkdir -p {group}; echo 0 >{group}/cgroup.procs; setsid -f sleep 1000 >/dev/null 2>&1"],
                 check=True)
        ghost = str(uuid.uuid4())
        for directory in (f"{daemon.runtime_dir}/env", f"{daemon.state_dir}/logs"):
            host.write(f"{host.directory(f'{directory}/{ghost}')}/main.log", "left\n")
        host.write(f"{daemon.runtime_dir}/slots/79", "")  # a pin whose mount did not come about
        _run(host, "touch /run/netns/second", "mount --bind /run/netns/web /run/netns/second")
        expected = {("orphan", "netns", "nd77"), ("orphan", "netns", "nd79"), ("orphan", "cgroup", "nd78"),
                    ("orphan", "files", ghost), ("orphan", "name", "/run/netns/second")}
        assert _named(daemon) == expected
        assert daemon.ctl("doctor").returncode == 1
        assert "orphan   cgroup: a control group nd78 is nobody's" in daemon.ctl("doctor").stdout
        assert _named(daemon, CAROL) == expected, "she is an admin"
        assert _named(daemon, ALICE) == {("orphan", "name", "/run/netns/second")}, "the name of her own"
        assert _named(daemon, BOB) == set()

        refused = daemon.ctl("prune", user=ALICE)
        assert (refused.returncode, _named(daemon)) == (7, expected)

        done = daemon.ctl("prune", "-o", "json", user=CAROL, check=True)
        assert {(d["kind"], d["what"], d["subject"]) for d in json.loads(done.stdout)["removed"]} == expected
        assert _differences(daemon) == []
        assert daemon.ctl("doctor").returncode == 0
        # What is not ours, and what is somebody's, is as it was.
        _run(host, "ip netns exec theirs true", "ip link show nd99", "ip link show nd98", "nft list table ip mine")
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
        _run(host, "ip netns delete theirs", "ip link delete nd99", "ip link delete nd98", "nft delete table ip mine")
        daemon.ctl("rm", "web", user=ALICE, check=True)


def test_an_index_that_was_orphaned_can_be_used_after_a_prune(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        _plant_slot(daemon, 3)
        daemon.ctl("prune", check=True)
        for number in range(6):
            daemon.create_json(f"e{number}", user=ALICE)
        assert _differences(daemon) == []
        daemon.ctl("rm", "--all", "--yes", user=ALICE, check=True)


def test_rows_and_environments_that_have_no_counterpart_are_named(daemon: Daemon) -> None:
    web = daemon.create_json("web", user=ALICE)
    wait_until(lambda: _differences(daemon) == [], what="peace")
    row = ("INSERT INTO environments (id, name, uid, user, slot, netns, labels, share, state, created_at, boot_id)"
           " VALUES ('ghost', 'ghost', 61001, 'alice', 200, 'ghost', '{}', 'owner', 'ready', '', '')")
    _state(daemon, row)
    assert _named(daemon) == {("orphan", "row", "ghost")}
    daemon.ctl("prune", check=True)
    assert _named(daemon) == set()
    _state(daemon, "DELETE FROM environments WHERE id = ?", web["id"])
    assert _named(daemon) == {("missing", "row", web["id"])}
    assert _named(daemon, ALICE) == {("missing", "row", web["id"])}


def test_who_left_the_group_is_named_and_ends_with_the_environment(daemon: Daemon) -> None:
    host = daemon.host
    with nothing_left(host):
        web = daemon.create_json("web", "sleep", "1000", user=ALICE)
        lodger = host.popen(["ip", "netns", "exec", "web", "sleep", "987"])
        # A server that root moved away, as a session manager would.
        away = f"{host.cgroup}/away"
        _run(host, f"mkdir {away}", f"echo {main_of(web)['pid']} >{away}/cgroup.procs")
        strays = wait_until(lambda: [d for d in _differences(daemon, ALICE) if d["kind"] == "stray"], what="strays")
        assert {d["subject"] for d in strays} == {str(lodger.pid), str(main_of(web)["pid"])}
        assert all(d["environment"] == web["id"] for d in strays)
        told = daemon.ctl("doctor", user=ALICE).stdout
        assert f"sleep (pid {lodger.pid}, uid 0) is in the namespace of 'web'" in told
        assert _named(daemon, BOB) == set()
        daemon.ctl("rm", "web", user=ALICE, check=True)
        lodger.wait(timeout=5)
        wait_until(lambda: is_gone(main_of(web)["pid"]), what="the server's end")
        wait_until(lambda: not Path(away, "cgroup.procs").read_text(), what="an empty group")
        os.rmdir(away)


def test_what_the_firewall_lacks_or_has_too_much_is_named_or_put_right_before(daemon: Daemon) -> None:
    web = daemon.create_json("web", user=ALICE, ports=[3000])
    element = f"{{ {web['address']} . {ALICE.uid} }}"
    _run(daemon.host, f"nft delete element ip netnsd owners {element}",
         "nft add element ip netnsd owners { 10.203.0.99 . 5 }")
    daemon.ctl("prune", check=True)
    listing = daemon.host.run(["nft", "list", "set", "ip", "netnsd", "owners"], check=True).stdout
    assert (str(ALICE.uid) in listing, "10.203.0.99" in listing) == (True, False)
    assert _differences(daemon) == []


def test_settings_of_the_host_that_were_changed_are_named(daemon: Daemon) -> None:
    daemon.create_json("web", user=ALICE)
    setting = "/proc/sys/net/ipv4/conf/ndbr0/route_localnet"
    _run(daemon.host, f"echo 0 >{setting}")
    assert _named(daemon) == {("missing", "sysctl", setting)}
    assert daemon.ctl_json("prune")["removed"][0]["subject"] == setting
    assert _named(daemon) == set()
