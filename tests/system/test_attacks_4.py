"""What a hostile user does as a client of the daemon, and to what all share: connections, keys, tracking, the loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from netnsd.api.routes import ROUTES, Permission
from tests.harness import ALICE, BOB, CAROL, Daemon, HostNamespace, User, wait_until
from tests.harness.daemon import program
from tests.harness.host import tool
from tests.harness.snapshot import open_descriptors
from tests.system.api import Api
from tests.system.clients import PYTHON, ask, inside

_FLOWS = 256
_MOST = 64


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A host with a network outside."""
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    """A daemon with small bounds."""
    with Daemon(shared_host, config={"network": {"flows": _FLOWS},
                                     "daemon": {"connections_per_user": _MOST}}) as started:
        yield started


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Daemon:
    return tidy_daemon


# -- authority ------------------------------------------------------------------------------------------------------


def test_what_is_anothers_is_answered_as_what_is_nobodys_on_every_route(daemon: Daemon) -> None:
    bobs = daemon.create_json("web", "sleep", "1000", user=BOB, ports=[3000])
    template = Api(daemon, BOB).good("POST", "/v1/templates", {"name": "web", "specification": {"command": ["true"]}})
    alice = Api(daemon, ALICE)
    for route in ROUTES:
        if "{ref}" not in route.path:
            continue
        known = template["id"] if "templates" in route.path else bobs["id"]
        for ref in (known, "web", "web.bob"):
            nothing = "x" * len(ref)
            answers = [alice.text(route.method, route.path.format(ref=name)) for name in (ref, nothing)]
            assert answers[0][0] == 404, (route.method, route.path, ref)
            assert (answers[0][0], answers[0][1].replace(ref, nothing)) == answers[1]
    for ref in (bobs["id"], "web.bob"):
        nothing = "x" * len(ref)
        said = [daemon.ctl("exec", name, "-o", "json", "--", "true", user=ALICE).stderr for name in (ref, nothing)]
        assert said[0].replace(ref, nothing) == said[1]
        assert "not_found" in said[1]
    assert Api(daemon, BOB).good("GET", "/v1/environments/web")["services"][0]["state"] == "running"
    for route in ROUTES:
        if route.permission is Permission.ADMIN:
            assert alice.ask(route.method, route.path)[0] == 403
    Api(daemon, BOB).good("DELETE", "/v1/templates/web")


def test_who_changed_what_is_told_to_admins_and_in_the_log_and_to_nobody_else(daemon: Daemon) -> None:
    daemon.create_json("web", "sleep", "1000", user=ALICE, options=("--env", "TOKEN=hush-hush"))
    inside(daemon, "web", "true", "hush-hush", user=ALICE)
    daemon.ctl("stop", "web.alice", "--grace", "0", user=CAROL, check=True)
    assert daemon.ctl("rm", "web.alice", user=BOB).returncode == 4
    told = [json.loads(line) for line in daemon.ctl("events", "--audit", "-o", "json", user=CAROL, check=True
                                                    ).stdout.splitlines()][-4:]
    assert [(e["details"]["user"], e["details"]["method"], e["name"], e["details"]["code"]) for e in told] == [
        ("alice", "POST", "web", "ok"), ("alice", "EXEC", "web", "ok"), ("carol", "POST", "web", "ok"),
        ("bob", "DELETE", "web.alice", "not_found")]
    assert daemon.ctl("events", "--audit", user=ALICE).returncode == 7
    lines = [json.loads(line) for line in daemon.log().splitlines() if '"audit"' in line]
    assert [(line["user"], line["method"], line["code"]) for line in lines][-5:-1] == [
        (e["details"]["user"], e["details"]["method"], e["details"]["code"]) for e in told]
    assert (lines[-1]["user"], lines[-1]["route"], lines[-1]["code"]) == ("alice", "/v1/audit", "forbidden")
    assert "hush-hush" not in daemon.log()


_FORGED = """
import errno, os, socket, struct, sys
own = os.getpid(), os.getuid(), os.getgid()
for claimed in ((own[0], 0, 0), (int(sys.argv[2]), *own[1:]), (0, 0, 0), own):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(sys.argv[1])
        credentials = [(socket.SOL_SOCKET, 2, struct.pack("iii", *claimed))]  # SCM_CREDENTIALS
        try:
            client.sendmsg([b"GET /v1/environments?all=1 HTTP/1.0\\r\\n\\r\\n"], credentials)
            print(b"".join(iter(lambda: client.recv(65536), b"")).decode().rpartition("\\r\\n")[2])
        except OSError as error:
            print(errno.errorcode[error.errno])
"""


def test_credentials_that_a_client_sends_are_refused_by_the_kernel_and_asked_by_nobody(daemon: Daemon) -> None:
    daemon.create_json("bobs", user=BOB)
    daemon.create_json("mine", user=ALICE)
    said = daemon.host.run([PYTHON, "-c", _FORGED, daemon.socket, str(daemon.pid)], user=ALICE, check=True
                           ).stdout.splitlines()
    assert said[:3] == ["EPERM"] * 3
    assert [e["name"] for e in json.loads(said[3])["environments"]] == ["mine"]


@pytest.mark.parametrize("header", ["Origin: http://evil.example", "Host: evil.example", "Sec-Fetch-Site: cross-site",
                                    "Referer: http://localhost:20000/"])
def test_what_a_web_page_has_a_browser_send_changes_nothing(daemon: Daemon, header: str) -> None:
    said = daemon.host.run([tool("curl"), "-sS", "--unix-socket", daemon.socket, "-H", header, "-H",
                            "Content-Type: text/plain", "-d", '{"name": "web"}', "http://localhost/v1/environments"],
                           user=ALICE, check=True).stdout
    assert json.loads(said)["error"]["code"] == "foreign_request"
    assert Api(daemon, ALICE).names() == []


# -- keys -----------------------------------------------------------------------------------------------------------


def _keyed(daemon: Daemon, user: User, body: object, key: str = "replayed") -> tuple[int, dict[str, object]]:
    done = daemon.host.run([tool("curl"), "-sS", "--unix-socket", daemon.socket, "-H", f"Idempotency-Key: {key}",
                            "-H", "Content-Type: application/json", "-d", json.dumps(body), "-w", "\n%{http_code}",
                            "http://localhost/v1/environments"], user=user, check=True)
    text, _, status = done.stdout.rpartition("\n")
    answer: dict[str, object] = json.loads(text)
    return int(status), answer


def test_a_key_that_another_user_sends_again_tells_him_nothing_and_gives_him_his_own(daemon: Daemon) -> None:
    body = {"name": "web", "command": ["sleep", "1000"], "cwd": "/"}
    status, first = _keyed(daemon, ALICE, body)
    assert status == 201
    for other in (BOB, CAROL):
        status, theirs = _keyed(daemon, other, body)
        assert (status, theirs["owner"]) == (201, {"uid": other.uid, "user": other.name})
        assert theirs["id"] != first["id"]
    daemon.kill()
    daemon.start()
    status, again = _keyed(daemon, ALICE, body)
    assert (status, again["id"], again["services"]) == (201, first["id"], first["services"])
    assert _keyed(daemon, ALICE, {**body, "command": ["id"]})[0] == 422


def test_creations_whose_daemon_is_killed_under_them_are_made_once_each(daemon: Daemon) -> None:
    names = [f"web{number}" for number in range(12)]
    clients: list[subprocess.Popen[bytes]] = []

    def begin(some: list[str]) -> None:
        clients.extend(daemon.host.popen([program("netnsctl"), "create", name, "-o", "name", "--", "sleep", "1000"],
                                         user=ALICE, env={"NETNSD_SOCKET": daemon.socket}) for name in some)

    def connected() -> int:
        """How many have a connection, or had one, if not more: the daemon's ends are named as its socket is."""
        sockets = daemon.host.run(["cat", "/proc/net/unix"], check=True).stdout.splitlines()
        return sum(daemon.socket in line for line in sockets) - 1 + sum(c.poll() is not None for c in clients)

    logged = len(daemon.log())
    begin(names[:6])
    wait_until(lambda: '"created"' in daemon.log()[logged:], what="the first of them")
    os.kill(daemon.pid, signal.SIGSTOP)  # in the middle of what it does
    try:
        begin(names[6:])
        wait_until(lambda: connected() >= len(names), seconds=20, what="all connections")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        daemon.kill()
        daemon.start()
    said = {name: client.communicate(timeout=40)[0].decode() for name, client in zip(names, clients, strict=True)}
    made = [name for name, client in zip(names, clients, strict=True) if client.returncode == 0]
    assert {said[name] for name in made} == {f"{name}\n" for name in made}
    # One that had no connection yet when the daemon was gone is told so at once.
    assert all("nothing listens" in text for name, text in said.items() if name not in made), said
    assert len(made) > len(names) // 2, said
    assert sorted(Api(daemon, ALICE).names()) == sorted(made)


# -- the loop, and what holds it up ---------------------------------------------------------------------------------

# Asks for the health until stdin ends; then how often, and the longest time of one answer in seconds.
_PROBER = """
import http.client, select, socket, sys, time
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(sys.argv[1])
connection, longest, count = Connection("localhost"), 0.0, 0
print("begin", flush=True)
while not select.select([0], [], [], 0.002)[0]:
    began = time.monotonic()
    connection.request("GET", "/v1/environments")
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    answer.read()
    longest, count = max(longest, time.monotonic() - began), count + 1
print(count, longest)
"""


@contextmanager
def _others_are_served(daemon: Daemon, what: str) -> Iterator[None]:
    """Bob asks all the while, and is answered; how long he waited at most is told."""
    prober = daemon.host.popen([PYTHON, "-c", _PROBER, daemon.socket], user=BOB, stdin=subprocess.PIPE)
    assert prober.stdin is not None
    assert prober.stdout is not None
    assert prober.stdout.readline() == b"begin\n"
    try:
        yield
    finally:
        prober.stdin.close()
        said = prober.stdout.read().decode()
    assert prober.wait(timeout=10) == 0, said
    count, longest = said.split()
    print(f"{what}: {count} answers to somebody else, the slowest after {float(longest) * 1000:.0f} ms")
    assert int(count) > 10
    assert float(longest) < 5


# Opens so many connections, says whatever part of a request, and keeps them; how many were taken, refused, and closed.
_CROWD = """
import os, resource, select, socket, sys, time
count = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
parts = (b"", b"GET /v1/env",
         b"POST /v1/environments HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 1000\\r\\n\\r\\n{",
         b"GET /openapi.json HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n" * 40)
kept, told = [], []
for number in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    client.settimeout(20)
    try:
        client.send(parts[number % 4])
    except OSError:
        pass
    kept.append(client)
poll = select.poll()
deadline = time.monotonic() + 20
refused = set()
for client in kept:
    poll.register(client, select.POLLIN | select.POLLRDHUP)
by_fd = {client.fileno(): client for client in kept}
while len(refused) < count - int(sys.argv[3]) and time.monotonic() < deadline:
    for fd, event in poll.poll(100):
        if event & (select.POLLRDHUP | select.POLLHUP):
            try:
                told.append(b"too_many_connections" in by_fd[fd].recv(4096))
            except OSError:
                pass
            refused.add(fd)
            poll.unregister(fd)
        elif fd not in refused:
            poll.modify(fd, select.POLLRDHUP)
print(len(kept), len(refused), any(told), flush=True)
sys.stdin.read()
"""


def test_nine_thousand_connections_of_one_user_cost_others_nothing(daemon: Daemon) -> None:
    before = len(open_descriptors(daemon.pid))
    with _others_are_served(daemon, "9000 connections"):
        crowd = daemon.host.popen([PYTHON, "-c", _CROWD, daemon.socket, "9000", str(_MOST)], user=ALICE,
                                  stdin=subprocess.PIPE)
        assert crowd.stdout is not None
        assert crowd.stdin is not None
        made, refused, told = crowd.stdout.readline().decode().split()
        held = len(open_descriptors(daemon.pid)) - before
        time.sleep(0.2)  # what is half sent or not read is held meanwhile
    assert (int(made), int(refused) >= 9000 - _MOST, told) == (9000, True, "True")
    assert held <= _MOST + 8
    crowd.stdin.close()
    assert crowd.wait(timeout=10) == 0
    wait_until(lambda: daemon.ctl("ls", user=ALICE).returncode == 0, what="a place")
    wait_until(lambda: len(open_descriptors(daemon.pid)) <= before + 2, what="the end of all connections")


# A TCP socket whose close waits, as nobody reads what was sent, passed to a socket of the daemon's with some bytes,
# again and again; what became of them.
_LINGER = """
import array, collections, json, os, socket, struct, sys, time
server = socket.create_server(("127.0.0.1", 0))
kept, outcomes = [], collections.Counter()
def lingering():
    ours = socket.create_connection(server.getsockname())
    theirs, _ = server.accept()
    kept.append(theirs)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    ours.setblocking(False)
    try:
        while True:
            ours.send(b"x" * 65536)
    except BlockingIOError:
        return ours
body = json.dumps({"ref": "none", "command": ["x"]}).encode()
frames = {"netnsd.sock": b"GET /v1/health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n",
          "attach.sock": struct.pack(">I", len(body)) + body}
for name, data in frames.items():
    for part in (data, data[:5]):
        for _ in range(8):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(5)
            client.connect(os.path.join(sys.argv[1], name))
            smuggled = lingering()
            rights = array.array("i", [smuggled.fileno()] * 3)
            try:
                client.sendmsg([part], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                outcomes["sent"] += 1
                smuggled.close()  # the last is the daemon's, if anybody's
            except PermissionError:
                outcomes["refused"] += 1
                kept.append(smuggled)
            kept.append(client)
try:
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(os.path.join(sys.argv[1], "launcher.sock"))
except PermissionError:
    outcomes["the launcher's is closed"] += 1
print(dict(outcomes), flush=True)
time.sleep(0.5)
os._exit(0)
"""


def test_lingering_sockets_sent_to_every_socket_of_ours_hold_up_nobody(daemon: Daemon) -> None:
    daemon.create_json("web", user=ALICE)
    with _others_are_served(daemon, "lingering sockets"):
        said = daemon.host.run([PYTHON, "-c", _LINGER, daemon.runtime_dir], user=ALICE, check=True).stdout
        assert "the launcher's is closed" in said
        assert inside(daemon, "web", "echo", "works", user=ALICE) == "works"


# -- what the host tracks -------------------------------------------------------------------------------------------

# Begins as many flows as it can: UDP and pings with numbers of their own, to each address.
_FLOOD = """
import itertools, socket, struct, sys
sockets = []
def spread(kind, protocol, data, address):
    for number in range(1, 3000):
        try:
            client = socket.socket(socket.AF_INET, kind, protocol)
            client.setblocking(False)
            if protocol:
                client.bind(("0.0.0.0", 20000 + number))  # an echo's identifier
                client.sendto(data, (address, 0))
            else:
                client.sendto(data, (address, number))
            client.close()
        except OSError:
            client.close()
for address in sys.argv[1:]:
    spread(socket.SOCK_DGRAM, 0, b"x", address)
    spread(socket.SOCK_DGRAM, socket.IPPROTO_ICMP, struct.pack("!BBHHH", 8, 0, 0, 0, 1), address)
print("done")
"""


def _tracked(host: HostNamespace) -> int:
    return int(host.run(["cat", "/proc/sys/net/netfilter/nf_conntrack_count"], check=True).stdout)


def test_an_environment_fills_no_more_of_what_the_host_tracks_than_its_share(daemon: Daemon) -> None:
    host = daemon.host
    # Addresses: of the network outside, of the bridge, of the host's uplink, of another environment.
    daemon.create_json("flood", user=ALICE)
    other = daemon.create_json("other", user=BOB)
    [default] = json.loads(host.run(["ip", "-j", "route", "show", "default"], check=True).stdout)
    gateway = default["gateway"]
    [link] = json.loads(host.run(["ip", "-j", "-4", "address", "show", default["dev"]], check=True).stdout)
    uplink = link["addr_info"][0]["local"]
    before = _tracked(host)
    assert inside(daemon, "flood", PYTHON, "-c", _FLOOD, gateway, "10.203.0.1", uplink, other["address"], user=ALICE,
                  timeout=30) == "done"
    assert _tracked(host) - before <= _FLOWS + 16
    assert _tracked(host) - before >= _FLOWS // 2, "nothing was tracked, so that this shows nothing"
    # Others still begin what they like.
    assert inside(daemon, "other", "ping", "-c1", "-W2", gateway, user=BOB)
    assert ask(host, "tcp", "127.0.0.1", 1, user=BOB) == "ECONNREFUSED"
