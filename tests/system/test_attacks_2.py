"""What a hostile user does by network and by connections: to others' servers, and to the daemon that all share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.harness import ALICE, BOB, MALLORY, Daemon, HostNamespace, User, wait_until
from tests.harness.daemon import program
from tests.harness.snapshot import open_descriptors
from tests.system.clients import PYTHON, Environment, ask, inside

# A connection to the daemon, for the programs below: ``Connection(PATH)``.
_CONNECTION = """
import array, http.client, json, os, select, socket, sys, threading, time
class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self.path)
    def ask(self, method, target, body=None):
        self.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        answer = self.getresponse()
        return answer.status, json.loads(answer.read())
"""
_MOST = 4


@pytest.fixture(scope="module")
def small_daemon() -> Iterator[Daemon]:
    """A daemon that lets a user have few connections; alice has ``lab`` there."""
    with HostNamespace() as host, Daemon(host, config={"daemon": {"connections_per_user": _MOST}}) as started:
        started.create_json("lab", user=ALICE)
        yield started


def _program(text: str, *arguments: str) -> list[str]:
    return [PYTHON, "-c", _CONNECTION + text, *arguments]


def _error_code(done: subprocess.CompletedProcess[str]) -> str:
    code: str = json.loads(done.stderr.splitlines()[-1])["error"]["code"]
    return code


# -- packets past the rules ---------------------------------------------------------------------------------------

# Says what it hears, and answers.
_LISTENER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
server.bind((sys.argv[1], int(sys.argv[2])))
while True:
    text, peer = server.recvfrom(4096)
    print(text.decode(), flush=True)
    server.sendto(b"heard " + text, peer)
"""
_BY_DEVICE = """
import errno, socket, sys
for device in sys.argv[3].split(","):
    for address in sys.argv[1].split(","):
        for port in sys.argv[2].split(","):
            for source in ("", "127.0.0.1"):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
                    try:
                        client.bind((source, 0))
                        for _ in range(3):
                            client.sendto(f"evil {device} {address}:{port} {source}".encode(), (address, int(port)))
                    except OSError as error:
                        print(device, address, errno.errorcode[error.errno])
print("tried")
"""


def test_a_socket_bound_to_a_device_reaches_nobody_elses_servers(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    environments: dict[int, Environment] = {}
    for port, address in ((3000, "0.0.0.0"), (3001, "127.0.0.1")):
        environments[port] = tidy_daemon.create_json(
            f"udp{port}", PYTHON, "-c", _LISTENER, address, str(port), user=ALICE, ports=[f"{port}/udp"], wait=True)
    links = json.loads(host.run(["ip", "-j", "link", "show", "master", "ndbr0"], check=True).stdout)
    devices = ["ndbr0", *(link["ifname"] for link in links)]
    assert len(devices) == 3
    targets = ["255.255.255.255", "224.0.0.1", "127.0.0.5", "127.0.0.1", "10.203.255.255",
               *(e["address"] for e in environments.values())]
    ports = [str(port) for port in environments] + [str(e["ports"][0]["published"]) for e in environments.values()]
    for _ in range(2):  # the second time, neighbours' addresses may be known
        said = host.run([PYTHON, "-c", _BY_DEVICE, ",".join(targets), ",".join(ports), ",".join(devices)],
                        user=MALLORY, cwd="/", check=True, timeout=30).stdout
        assert said.endswith("tried\n")
    # Root's own are let out. An environment takes nothing for its loopback from the network, whoever sent it.
    host.run([PYTHON, "-c", _BY_DEVICE, "127.0.0.5,127.0.0.1", "3000,3001", ",".join(devices)], check=True)
    for port, environment in environments.items():
        for address, number in ((environment["address"], port), ("127.0.0.1", environment["ports"][0]["published"])):
            assert ask(host, "udp", address, number, user=ALICE) == "heard hello"
        # The owner's own came last, so that whatever was sent before it would be told before it.
        heard = tidy_daemon.ctl("logs", environment["name"], user=ALICE, check=True).stdout
        assert heard.splitlines() == ["hello", "hello"]


# -- creations while the rules are looked at ----------------------------------------------------------------------

# Creates environments, in so many threads, and pings each in the moments after its creation: who was refused, who never
# answered.
_MAKERS = """
path, user, threads, each = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
made, refused, silent = [], [], []
def make(number):
    connection = Connection(path)
    for turn in range(each):
        body = {"name": f"{user}{number}-{turn}", "ports": [{"port": 3000}], "cwd": "/"}
        status, environment = connection.ask("POST", "/v1/environments", json.dumps(body))
        made.append(environment)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as pinger:
            pinger.settimeout(0.5)
            answers = 0
            for _ in range(25):
                try:
                    pinger.sendto(bytes((8, 0, 0, 0, 0, 0, 0, 1)), (environment["address"], 0))
                    answers += bool(pinger.recv(64))
                except TimeoutError:  # one packet may be lost while a link comes up
                    pass
                except OSError as error:
                    refused.append([environment["name"], repr(error)])
                time.sleep(0.002)
            if not answers:
                silent.append(environment["name"])
makers = [threading.Thread(target=make, args=(n,)) for n in range(threads)]
for maker in makers: maker.start()
for maker in makers: maker.join()
json.dump([made, refused, silent], sys.stdout)
"""


def _make_many(daemon: Daemon, user: User, threads: int, each: int) -> list[Any]:
    done = daemon.host.run(_program(_MAKERS, daemon.socket, user.name, str(threads), str(each)), user=user, check=True,
                           timeout=40)
    answer: list[Any] = json.loads(done.stdout)
    return answer


def _elements(host: HostNamespace, kind: str, name: str) -> list[Any]:
    listing = json.loads(host.run(["nft", "-j", "list", kind, "ip", "netnsd", name], check=True).stdout)
    return [element for row in listing["nftables"] for element in row.get(kind, {}).get("elem", [])]


def test_environments_made_while_the_rules_are_checked_keep_their_elements_and_are_reached(
        tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    host.run(["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"], check=True)
    with ThreadPoolExecutor(2) as pool:
        running = {user: pool.submit(_make_many, tidy_daemon, user, 4, 4) for user in (ALICE, BOB)}
        deadline = time.monotonic() + 40
        while not all(future.done() for future in running.values()) and time.monotonic() < deadline:
            os.kill(tidy_daemon.pid, signal.SIGHUP)
            time.sleep(0.02)  # a check takes a while, and none is left out
        done = {user: future.result() for user, future in running.items()}
    assert [(refused, silent) for _, refused, silent in done.values()] == [([], [])] * 2
    owned = [(user, environment) for user, (made, *_) in done.items() for environment in made]
    assert len(owned) == 32
    owners = [(environment["address"], user.uid) for user, environment in owned]
    published = [(environment["ports"][0]["published"], environment["address"]) for _, environment in owned]
    assert sorted((e["concat"][0], int(e["concat"][1])) for e in _elements(host, "set", "owners")) == sorted(owners)
    assert sorted((k["concat"][1], v["concat"][0])
                  for k, v in _elements(host, "map", "published")) == sorted(published)


# -- connections ------------------------------------------------------------------------------------------------


def test_sessions_count_as_their_users_connections_until_they_end(small_daemon: Daemon) -> None:
    sessions: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        session = small_daemon.host.popen(
            [program("netnsctl"), "exec", "lab", "--", "cat"], user=ALICE, env={"NETNSD_SOCKET": small_daemon.socket},
            stdin=subprocess.PIPE)
        sessions.append(session)
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(b"there\n")
        session.stdin.flush()
        assert session.stdout.readline() == b"there\n"

    def end() -> None:
        session = sessions.pop()
        assert session.stdin is not None
        session.stdin.close()
        assert session.wait(timeout=5) == 0

    def execute() -> subprocess.CompletedProcess[str]:
        return small_daemon.ctl("exec", "lab", "-o", "json", "--", "true", user=ALICE)

    for _ in range(_MOST):
        begin()
    one_too_many = execute()
    assert one_too_many.returncode == 125
    assert _error_code(one_too_many) == "too_many_connections"
    assert _error_code(small_daemon.ctl("ls", "-o", "json", user=ALICE)) == "too_many_connections"
    assert small_daemon.ctl("ls", user=BOB).returncode == 0
    end()
    wait_until(lambda: execute().returncode == 0, what="a place for a session")
    sessions[-1].kill()  # a client that dies frees its place, too
    sessions.pop().wait(timeout=5)
    while sessions:
        end()
    wait_until(lambda: small_daemon.ctl("ls", user=ALICE).returncode == 0, what="places")
    for _ in range(_MOST):
        begin()
    while sessions:
        end()


# The health is asked first, so that the daemon has the connection. Leaves without an answer.
_ABANDONING = """
path, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    deadline = time.monotonic() + 3
    while True:
        connection = Connection(path)
        try:
            status, _ = connection.ask("GET", "/v1/health")
        except (OSError, http.client.HTTPException) as error:
            status = repr(error)
        if status == 200:
            break
        connection.close()
        if time.monotonic() > deadline:
            sys.exit(f"no place for number {number}: {status}")
        time.sleep(0.01)
    connection.request("GET", "/v1/environments/lab/wait?for=gone&timeout=86400")
    connection.close()
print("left")
"""


def test_waits_whose_clients_leave_end_at_once(small_daemon: Daemon) -> None:
    before = len(open_descriptors(small_daemon.pid))
    done = small_daemon.host.run(_program(_ABANDONING, small_daemon.socket, "100"), user=ALICE, timeout=30)
    assert (done.stdout, done.stderr) == ("left\n", "")
    for _ in range(_MOST + 1):
        wait_until(lambda: small_daemon.ctl("ls", user=ALICE).returncode == 0, seconds=3, what="a connection")
    wait_until(lambda: len(open_descriptors(small_daemon.pid)) <= before, what="the end of their connections")


# Health, again and again until stdin ends; then the longest time of one answer in seconds.
_HEALTH = """
connection, longest, count = Connection(sys.argv[1]), 0.0, 0
print("begin", flush=True)
while not select.select([0], [], [], 0)[0]:
    began = time.monotonic()
    assert connection.ask("GET", "/v1/health")[0] == 200
    longest, count = max(longest, time.monotonic() - began), count + 1
print(longest, count)
"""
_HEAVY = """
path, count = sys.argv[1], int(sys.argv[2])
labels = ",".join(f'"k{n:06d}":"v"' for n in range(36000))
body = ('{"name":"x","labels":{' + labels + "}}").encode()
assert 480_000 < len(body) < 1 << 19, len(body)
connections = [Connection(path) for _ in range(count)]
for connection in connections:
    connection.connect()
    connection.sock.sendall(b"POST /v1/environments HTTP/1.1\\r\\nHost: localhost\\r\\n"
        b"Content-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body[:-1])
for connection in connections:  # all bodies are complete at the same moment
    connection.sock.sendall(body[-1:])
print(*sorted({connection.sock.recv(4096).split()[1].decode() for connection in connections}))
"""


def test_many_large_bodies_at_once_do_not_hold_up_other_users(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    prober = host.popen(_program(_HEALTH, tidy_daemon.socket), user=BOB, stdin=subprocess.PIPE)
    assert prober.stdin is not None
    assert prober.stdout is not None
    assert prober.stdout.readline() == b"begin\n"
    statuses = host.run(_program(_HEAVY, tidy_daemon.socket, "120"), user=ALICE, check=True, timeout=40).stdout.split()
    prober.stdin.close()
    assert prober.wait(timeout=5) == 0
    longest, count = prober.stdout.read().split()
    assert all(status in {"400", "413", "422"} for status in statuses), statuses
    assert int(count) > 10
    assert float(longest) < 5  # no figure of speed: all at once they took many times longer


# A request with a pipe's end beside it, or one right behind it; the connection stays open. Then whether somebody has
# the pipe's end.
_SMUGGLE = """
path, when = sys.argv[1], sys.argv[2]
request = json.dumps({"ref": "lab", "command": ["sleep", "3"], "cwd": "/"}).encode()
data = len(request).to_bytes(4, "big") + request
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
reading, writing = os.pipe()
smuggled = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing] * 3))]
try:
    if when == "beside":
        connection.sendmsg([data], smuggled)
    else:
        connection.sendmsg([data[:-1]])
        connection.sendmsg([data[-1:]], smuggled)
    print("sent")
except OSError as error:
    print(error.strerror)
os.close(writing)
print("free" if select.select([reading], [], [], 5)[0] and not os.read(reading, 1) else "kept")
"""


@pytest.mark.parametrize("when", ["beside", "behind"])
def test_descriptors_sent_to_attach_before_they_are_asked_for_are_kept_by_nobody(
        tidy_daemon: Daemon, when: str) -> None:
    tidy_daemon.create_json("lab", user=ALICE)
    (launcher,) = tidy_daemon.launcher_pids()

    def open_now() -> tuple[list[str], list[str]]:
        return open_descriptors(tidy_daemon.pid), open_descriptors(launcher)

    assert inside(tidy_daemon, "lab", "echo", "works", user=ALICE) == "works"
    wait_until(lambda: tidy_daemon.launcher_pids() == [launcher], what="the end of all monitors")
    before = open_now()
    attach = f"{tidy_daemon.runtime_dir}/attach.sock"
    said = tidy_daemon.host.run(_program(_SMUGGLE, attach, when), user=ALICE, check=True).stdout.splitlines()
    assert said[1] == "free", said
    wait_until(lambda: open_now() == before, what="all descriptors closed")
    assert inside(tidy_daemon, "lab", "echo", "works", user=ALICE) == "works"
