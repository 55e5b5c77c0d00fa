"""Who else reaches an environment: users, groups, the host, the network outside; and only its declared ports.

Alice's environment is shared, Bob is in no group of hers, Mallory may not even call netnsctl.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness import ALICE, BOB, CAROL, MALLORY, ROOT, Daemon, HostNamespace, User, wait_until
from tests.system.clients import PYTHON, Environment, ask, echo_server, pings, published

USERS = (ROOT, ALICE, BOB, CAROL, MALLORY)
UPLINK = HostNamespace.ADDRESS
SHARES = {
    "owner": {ROOT, ALICE}, "host": set(USERS), "lan": set(USERS), "user:bob": {ROOT, ALICE, BOB},
    "group:netnsd-admin": {ROOT, ALICE, CAROL}, "user:mallory,group:netnsd": {ROOT, ALICE, BOB, CAROL, MALLORY},
    "group:bob": {ROOT, ALICE, BOB},
}
# Sends datagram after datagram on one socket, so that all of them are of one flow; says how each went.
_TALK = """
import socket, sys
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as client:
    client.settimeout(2)
    client.connect((address, port))
    for line in sys.stdin:
        try:
            client.send(b"hello")
            print(client.recv(4096).decode() or "closed", flush=True)
        except OSError as error:
            print(type(error).__name__, flush=True)
"""
# What `ssh -L` does, and an editor's tunnel: takes connections at a port of the host, and makes others as its user.
_FORWARD = """
import socket, sys, threading
def carry(source, target):
    while data := source.recv(4096):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    here, there = listener.accept()[0], socket.create_connection((sys.argv[1], int(sys.argv[2])))
    for pair in ((here, there), (there, here)):
        threading.Thread(target=carry, args=pair, daemon=True).start()
"""
# Tells from where each connection comes, at 3000 of every address and at 3001 of loopback.
_PEERS = """
import socket, threading
def serve(address, port):
    server = socket.create_server((address, port))
    while True:
        connection, peer = server.accept()
        connection.recv(100)
        connection.sendall(peer[0].encode())
        connection.close()
threading.Thread(target=serve, args=("127.0.0.1", 3001), daemon=True).start()
serve("0.0.0.0", 3000)
"""


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A host with an uplink, in place of the one that has none."""
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture
def host(tidy_daemon: Daemon) -> HostNamespace:
    return tidy_daemon.host


@pytest.fixture
def web(tidy_daemon: Daemon) -> Environment:
    """Alice's, on loopback, at 3000 (published, TCP and UDP) and 9229 (not declared)."""
    command = ["sh", "-c", '"$@" 9229 & exec "$@" 3000', "sh", *echo_server("web", 0)[:-1]]
    return tidy_daemon.create_json("web", *command, user=ALICE, ports=[3000, "3000/udp"], wait=True)


def _may(host: HostNamespace, kind: str, address: str, port: int, user: User) -> bool:
    return ask(host, kind, address, port, user=user, seconds=0.3) == "web heard hello"


def _reached(host: HostNamespace, web: Environment) -> set[User]:
    """Who reaches it, by every way that leads to a declared port. All ways agree, or the test fails."""
    udp = next(int(p["published"]) for p in web["ports"] if p["protocol"] == "udp")
    ways = [("tcp", web["address"], 3000), ("udp", web["address"], 3000), ("tcp", "127.0.0.1", published(web)),
            ("udp", "127.0.0.1", udp)]
    table = {user: [_may(host, *way, user) for way in ways] for user in USERS}
    for user, row in table.items():
        print(f"{web['share']:28} {user.name:8} {' '.join('yes' if may else 'no ' for may in row)}")
        assert len(set(row)) == 1, table
    return {user for user, row in table.items() if row[0]}


@pytest.mark.parametrize("share", SHARES)
def test_who_reaches_a_shared_environment(tidy_daemon: Daemon, host: HostNamespace, share: str) -> None:
    web = tidy_daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000, "3000/udp"], wait=True,
                                  options=["--share", share])
    assert web["share"] == share
    assert _reached(host, web) == SHARES[share]


def test_others_reach_declared_ports_only(tidy_daemon: Daemon, host: HostNamespace, web: Environment) -> None:
    for share in ("host", "lan", "user:bob"):
        tidy_daemon.ctl("share", "web", share, user=ALICE, check=True)
        assert _may(host, "tcp", web["address"], 3000, BOB)
        for kind in ("tcp", "udp"):
            assert not _may(host, kind, web["address"], 9229, BOB)
        assert _may(host, "tcp", web["address"], 9229, ALICE)
        assert not pings(host, web["address"], user=BOB)
        assert pings(host, web["address"], user=ALICE)


def test_a_tunnel_of_the_owners_leads_in_and_one_of_anybody_else_does_not(host: HostNamespace,
                                                                           web: Environment) -> None:
    for user, leads in ((ALICE, True), (BOB, False)):
        with host.popen([PYTHON, "-c", _FORWARD, web["address"], "3000"], user=user,
                        stderr=subprocess.DEVNULL) as tunnel:
            assert tunnel.stdout is not None
            port = int(tunnel.stdout.readline())
            assert _may(host, "tcp", "127.0.0.1", port, MALLORY) is leads
            tunnel.kill()
            tunnel.wait(10)


def test_a_change_acts_at_once_and_cuts_who_is_out(tidy_daemon: Daemon, host: HostNamespace, web: Environment) -> None:
    def talk(kind: str) -> subprocess.Popen[bytes]:
        return host.popen([PYTHON, "-c", _TALK, kind, web["address"], "3000"], user=BOB,
                          stdin=subprocess.PIPE)

    def says(talker: subprocess.Popen[bytes]) -> str:
        assert talker.stdin is not None
        assert talker.stdout is not None
        talker.stdin.write(b"go\n")
        talker.stdin.flush()
        return talker.stdout.readline().decode().strip()

    shown = json.loads(tidy_daemon.ctl("share", "web", "user:bob", "-o", "json", user=ALICE, check=True).stdout)
    assert (shown["share"], [p["listen"] for p in shown["ports"]]) == ("user:bob", ["127.0.0.1"] * 2)
    with talk("tcp") as tcp, talk("udp") as udp:
        assert {says(tcp), says(udp)} == {"web heard hello"}
        tidy_daemon.ctl("share", "web", "owner", user=ALICE, check=True)
        assert "web heard hello" not in {says(tcp), says(udp)}
        assert not _may(host, "tcp", web["address"], 3000, BOB)
        tidy_daemon.ctl("share", "web", "group:bob", user=ALICE, check=True)
        assert _may(host, "tcp", web["address"], 3000, BOB)
        for talker in (tcp, udp):
            assert talker.stdin is not None
            talker.stdin.close()
            talker.wait(10)


def test_a_share_lives_through_a_restart_of_the_daemon(tidy_daemon: Daemon, host: HostNamespace,
                                                       web: Environment) -> None:
    tidy_daemon.ctl("share", "web", "user:bob", user=ALICE, check=True)
    tidy_daemon.kill()
    tidy_daemon.start()
    assert _reached(host, {**web, "share": "user:bob"}) == {ROOT, ALICE, BOB}


def test_a_group_is_looked_up_again(tidy_daemon: Daemon, host: HostNamespace, web: Environment) -> None:
    tidy_daemon.ctl("share", "web", "group:netnsdtest", user=ALICE, check=True)
    assert not _may(host, "tcp", web["address"], 3000, BOB)
    before = host.run(["cat", "/etc/group"], check=True).stdout
    after = re.sub("^netnsdtest:.*", r"\g<0>,bob", before, flags=re.MULTILINE)
    host.run(["tee", "/etc/group"], stdin=after, check=True)
    try:
        os.kill(tidy_daemon.pid, signal.SIGHUP)
        wait_until(lambda: _may(host, "tcp", web["address"], 3000, BOB), what="the new member is let in")
    finally:
        host.run(["tee", "/etc/group"], stdin=before, check=True)
    os.kill(tidy_daemon.pid, signal.SIGHUP)
    wait_until(lambda: not _may(host, "tcp", web["address"], 3000, BOB), what="who left the group is out")


def test_who_is_not_there_cannot_be_shared_with(tidy_daemon: Daemon, web: Environment) -> None:
    for share in ("nobody", "user:nobody-of-that-name", "group:no-such-group", "user:", "host,user:bob", "user:a,:b"):
        for command in (["share", "web", share], ["create", "other", "--share", share]):
            refused = tidy_daemon.ctl(*command, user=ALICE)
            assert refused.returncode == 2, share
            assert "share" in refused.stderr
    assert [(e["name"], e["share"]) for e in tidy_daemon.ctl_json("ls", user=ALICE)] == [("web", "owner")]


def test_only_its_owner_and_admins_share_it(tidy_daemon: Daemon, web: Environment) -> None:
    assert tidy_daemon.ctl("share", web["id"], "user:bob", user=BOB).returncode == 4
    assert tidy_daemon.ctl("share", web["id"], "user:bob", user=CAROL).returncode == 0


def test_the_network_outside_reaches_what_is_shared_with_it(tidy_daemon: Daemon, host: HostNamespace,
                                                            web: Environment) -> None:
    assert host.outside is not None
    outside, port, other = host.outside, published(web), tidy_daemon.create_json("inside", "sleep", "1000", user=BOB)
    udp = next(int(p["published"]) for p in web["ports"] if p["protocol"] == "udp")

    def from_outside(kind: str, address: str, at: int) -> bool:
        return ask(outside, kind, address, at, seconds=0.3) == "web heard hello"

    for share, is_open in (("owner", False), ("host", False), ("lan", True), ("owner", False)):
        shown = json.loads(tidy_daemon.ctl("share", "web", share, "-o", "json", user=ALICE, check=True).stdout)
        assert [p["listen"] for p in shown["ports"]] == ["0.0.0.0" if is_open else "127.0.0.1"] * 2
        assert from_outside("tcp", UPLINK, port) is is_open
        assert from_outside("udp", UPLINK, udp) is is_open
        # The host's own users reach it by that address too, and neither the outside by the environment's, nor others
        # from inside.
        assert _may(host, "tcp", UPLINK, port, MALLORY) is is_open
        assert not from_outside("tcp", web["address"], 3000)
        assert not from_outside("tcp", web["address"], 9229)
        inside = tidy_daemon.ctl("exec", other["name"], "--", PYTHON, "-c", "import socket, sys\n"
                                 "s = socket.socket(); s.settimeout(0.5)\n"
                                 "print(s.connect_ex((sys.argv[1], int(sys.argv[2]))))", UPLINK, str(port), user=BOB)
        assert inside.stdout.strip() not in ("0", "")


def test_servers_do_not_take_guests_for_the_owner(tidy_daemon: Daemon, host: HostNamespace) -> None:
    """A server that listens on all addresses, or on loopback only, sees 127.0.0.1 for the owner and root alone."""
    db = tidy_daemon.create_json("db", PYTHON, "-c", _PEERS, user=ALICE, ports=[3000, 3001], wait=True,
                                 options=["--share", "lan"])
    first, second = (int(p["published"]) for p in db["ports"])
    for user in USERS:
        seen = {ask(host, "tcp", address, port, user=user) for address, port in (
            ("127.0.0.1", first), ("127.0.0.1", second), (db["address"], 3000), (db["address"], 3001))}
        assert seen == ({"127.0.0.1"} if user in (ROOT, ALICE) else {"10.203.0.0"}), user
    assert host.outside is not None
    outside = {ask(host.outside, "tcp", UPLINK, port) for port in (first, second)}
    assert len(outside) == 1
    assert not outside & {"127.0.0.1", "10.203.0.1", "10.203.0.0"}
