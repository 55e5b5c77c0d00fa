"""Ways past the rules that say who reaches whom: packets of odd shape, and connections of before."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, wait_until
from tests.policies.worlds import document
from tests.system.clients import PYTHON, echo_server, published
from tests.system.probing import network_of

OUTSIDE = HostNamespace.OUTSIDE_ADDRESS
# Hears packets of a protocol of IP, or of all at an interface; tells what is in each, till it is ended.
_HEAR = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_RAW, int(sys.argv[1])) as one:
    print("ready", flush=True)
    while True:
        packet, peer = one.recvfrom(65536)
        print(peer[0], packet[20:].hex(), flush=True)
"""
_SAY = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_RAW, int(sys.argv[1])) as one:
    for text in sys.argv[3:]:
        try:
            one.sendto(bytes.fromhex(text), (sys.argv[2], 0))
        except OSError as error:
            print(error)
"""
_EXPERIMENTAL = 253  # RFC 3692


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture
def host(tidy_daemon: Daemon) -> HostNamespace:
    return tidy_daemon.host


def line(process: subprocess.Popen[bytes], seconds: float = 5.0) -> str:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return ""
    return process.stdout.readline().decode().strip()


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def test_what_is_too_short_to_have_ports_is_bound_by_egress_too(tidy_daemon: Daemon, host: HostNamespace) -> None:
    """A packet of an environment of root's, whose processes may send whatever they like."""
    assert host.outside is not None
    with ended(host.outside.popen([PYTHON, "-c", _HEAR, str(_EXPERIMENTAL)])) as ear:
        assert line(ear) == "ready"
        tidy_daemon.create_json("free", "sleep", "1000")
        tidy_daemon.create_json("shut", "sleep", "1000", options=["--egress", "deny"])
        for name, texts in (("shut", ["5e", "5e5e5e", "5e5e5e5e5e"]), ("free", ["aa"])):
            done = tidy_daemon.ctl("exec", name, "--", PYTHON, "-c", _SAY, str(_EXPERIMENTAL), OUTSIDE, *texts,
                                   check=True)
            print(done.stdout)
        assert line(ear).split()[1:] == ["aa"]


# Answers whoever asks, and goes on telling him, many times.
_TELL = """
import socket, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("0.0.0.0", 3000))
text, peer = one.recvfrom(100)
print("asked", flush=True)
for number in range(1000):
    try:
        one.sendto(str(number).encode(), peer)
    except OSError:
        pass
    time.sleep(0.02)
"""
# Asks once, and tells what comes.
_LISTEN = """
import socket, sys
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.connect((sys.argv[1], int(sys.argv[2])))
one.send(b"hello")
while True:
    print(one.recv(100).decode(), flush=True)
"""


def silent(process: subprocess.Popen[bytes]) -> bool:
    """Whether nothing comes any more; what was on its way is read."""
    return any(not line(process, 0.3) for _ in range(20))


def test_who_is_asked_no_more_tells_the_outside_no_more(tidy_daemon: Daemon, host: HostNamespace) -> None:
    assert host.outside is not None
    web = tidy_daemon.create_json("web", PYTHON, "-c", _TELL, user=ALICE, ports=["3000/udp"], wait=False,
                                  options=["--share", "lan"])
    with ended(host.outside.popen([PYTHON, "-c", _LISTEN, HostNamespace.ADDRESS, str(published(web))])) as peer:
        assert line(peer)
        tidy_daemon.ctl("share", "web", "owner", user=ALICE, check=True)
        assert silent(peer)


def test_an_environment_answers_no_more_when_policies_forbid_the_question(tidy_daemon: Daemon,
                                                                          host: HostNamespace) -> None:
    asker = tidy_daemon.create_json("asker", "sleep", "1000", user=ALICE)
    web = tidy_daemon.create_json("web", PYTHON, "-c", _TELL, user=ALICE)
    tidy_daemon.ctl("policy", "apply", "-f", "-", user=ALICE, check=True,
                    stdin=json.dumps(document("open", {"ingress": [{}]})))
    with ended(network_of(host, asker).popen([PYTHON, "-c", _LISTEN, web["address"], "3000"], user=ALICE)) as peer:
        assert line(peer)
        tidy_daemon.ctl("policy", "rm", "open", user=ALICE, check=True)
        assert silent(peer)


# Asks by UDP, and then says that the answer was too large: ICMP, with the answer's header.
_NARROW = """
import socket, struct, sys
target, port = sys.argv[1], int(sys.argv[2])
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.settimeout(5)
one.connect((target, port))
one.send(b"hello")
print(one.recv(100).decode())
me, own = one.getsockname()
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1400, 1, 0x4000, 64, 17, 0, *map(socket.inet_aton, (target, me)))
head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
body = struct.pack("!HHHH", port, own, 1380, 0)
error = struct.pack("!BBHHH", 3, 4, 0, 0, 800) + head + body
error = error[:2] + struct.pack("!H", checksum(error)) + error[4:]
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
    raw.sendto(error, (target, 0))
"""


def test_a_server_hears_of_a_narrow_link_to_who_it_is_shared_with(tidy_daemon: Daemon, host: HostNamespace) -> None:
    assert host.outside is not None
    web = tidy_daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=["3000/udp"], wait=True,
                                  options=["--share", "lan"])
    host.outside.run([PYTHON, "-c", _NARROW, HostNamespace.ADDRESS, str(published(web))], check=True)
    place = network_of(host, web)
    wait_until(lambda: "mtu 800" in place.run(["ip", "route", "get", OUTSIDE], check=True).stdout,
               what="the width of the way")


# Asks ADDRESS:PORT once from its own port 4444 by UDP, and tells all that comes there.
_ASKS_ONCE = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.bind(("", 4444))
    print("bound", flush=True)
    if sys.argv[1:]:
        one.sendto(b"hello", (sys.argv[1], int(sys.argv[2])))
    while True:
        print("heard", one.recv(100).decode(), flush=True)
"""
# Answers who has asked first, with each line of its input.
_ANSWERS_LATER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.bind((sys.argv[1], int(sys.argv[2])))
    _, peer = one.recvfrom(100)
    print("asked", flush=True)
    for text in sys.stdin:
        one.sendto(text.strip().encode(), peer)
        print("sent", flush=True)
"""


def test_who_has_an_address_next_hears_no_answers_to_who_had_it() -> None:
    few: dict[str, Any] = {"network": {"supernet": "10.205.0.0/29", "bridge_ports": 5}, "pool": {"size": 0}}
    with ExitStack() as stack:
        host = stack.enter_context(HostNamespace(uplink=True))
        daemon = stack.enter_context(Daemon(host, config=few))
        assert host.outside is not None
        outside = stack.enter_context(ended(host.outside.popen([PYTHON, "-c", _ANSWERS_LATER, OUTSIDE, "5556"],
                                                               stdin=subprocess.PIPE)))

        def answer(text: str) -> None:
            assert outside.stdin is not None
            outside.stdin.write(f"{text}\n".encode())
            outside.stdin.flush()
            assert line(outside) == "sent"

        def log(name: str, user: User) -> str:
            return str(daemon.ctl("logs", name, user=user, check=True).stdout)

        first = daemon.create_json("first", PYTHON, "-c", _ASKS_ONCE, OUTSIDE, "5556", user=ALICE)
        assert line(outside) == "asked"
        answer("one")
        wait_until(lambda: "heard one" in log("first", ALICE), what="who has asked hears the answer")
        daemon.ctl("rm", "first", user=ALICE, check=True)
        others = [daemon.create_json(f"other-{n}", PYTHON, "-c", _ASKS_ONCE, user=BOB) for n in range(5)]
        [next_one] = [other["name"] for other in others if other["address"] == first["address"]]
        wait_until(lambda: all("bound" in log(other["name"], BOB) for other in others), what="all listen")
        answer("two")
        # Its neighbour hears what is said to it meanwhile, and so would it.
        for other in others:
            daemon.ctl("exec", other["name"], "--", PYTHON, "-c", (
                "from socket import *\nsocket(AF_INET, SOCK_DGRAM).sendto(b'control', ('127.0.0.1', 4444))"),
                user=BOB, check=True)
        wait_until(lambda: all("heard control" in log(other["name"], BOB) for other in others), what="they hear")
        assert "two" not in log(next_one, BOB)
