"""What an environment of root sends, with every right inside: its own address and MAC, or it ends at its port.

Its processes may forge any frame. What arrives is looked at behind the port: on the bridge, outside, and at a victim.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.harness import ALICE, ROOT, Daemon, HostNamespace, wait_until
from tests.system.clients import PYTHON, Environment, ask, echo_server, published

BRIDGE = "ndbr0"
GATEWAY = "10.203.0.1"
# Sends frames, in hexadecimal, as they are.
_SEND = """
import socket, sys, time
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
    sender.bind(("eth0", 0))
    for frame in sys.argv[1:]:
        for _ in range(3):
            sender.send(bytes.fromhex(frame))
"""
# Tells each frame that arrives at an interface, until its standard input ends.
_SNIFF = """
import select, socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer:
    sniffer.bind((sys.argv[1], 3))
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([sniffer, sys.stdin], [], [])
        if sniffer in readable:
            frame, address = sniffer.recvfrom(65536)
            if address[2] != socket.PACKET_OUTGOING:
                print(frame.hex(), flush=True)
        elif sys.stdin in readable:
            break
"""
_HEAR = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], int(sys.argv[2])))
    server.settimeout(10)
    print("ready", flush=True)
    while True:
        text, peer = server.recvfrom(4096)
        print(peer[0], text.decode(), flush=True)
        if text == b"own":
            break
"""


def _mac(address: str, side: int = 0) -> bytes:
    return bytes([0x02, 0x4E | side]) + ipaddress.ip_address(address).packed


def _checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i:i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _ipv4(source: str, target: str, text: bytes, port: int = 5555) -> bytes:
    udp = (4444).to_bytes(2, "big") + port.to_bytes(2, "big") + (8 + len(text)).to_bytes(2, "big") + b"\0\0" + text
    head = (b"\x45\0" + (20 + len(udp)).to_bytes(2, "big") + b"\0\0\0\0\x40\x11\0\0"
            + ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed)
    return head[:10] + _checksum(head).to_bytes(2, "big") + head[12:] + udp


def _frame(source: bytes, target: bytes, kind: int, body: bytes) -> bytes:
    return target + source + kind.to_bytes(2, "big") + body


def _arp(sender_mac: bytes, sender: str, target: str, *, operation: int = 2) -> bytes:
    return (b"\0\1\x08\0\6\4" + operation.to_bytes(2, "big") + sender_mac + ipaddress.ip_address(sender).packed
            + b"\xff" * 6 + ipaddress.ip_address(target).packed)


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A host with an uplink, in place of the one that has none."""
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture
def victim(tidy_daemon: Daemon) -> Environment:
    return tidy_daemon.create_json("victim", *echo_server("victim", 3000), user=ALICE, ports=[3000], wait=True)


@pytest.fixture
def evil(tidy_daemon: Daemon) -> Environment:
    """Root's, on the same bridge: its commands have all rights inside."""
    return tidy_daemon.create_json("evil", "sleep", "1000")


def _run(daemon: Daemon, *command: str) -> str:
    done: subprocess.CompletedProcess[str] = daemon.ctl("exec", "evil", "--", *command, check=True)
    return done.stdout


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def _line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_only_its_own_leaves_its_port(tidy_daemon: Daemon, victim: Environment, evil: Environment) -> None:
    own, others, bridge = _mac(evil["address"]), _mac(victim["address"]), _mac(GATEWAY)
    everybody, me, it = b"\xff" * 6, evil["address"], victim["address"]
    forged = {
        "another's address": _frame(own, bridge, 0x0800, _ipv4(it, "198.51.100.1", b"forged")),
        "another's address and MAC": _frame(others, bridge, 0x0800, _ipv4(it, "198.51.100.1", b"forged")),
        "another's MAC": _frame(others, bridge, 0x0800, _ipv4(me, "198.51.100.1", b"forged")),
        "the bridge's MAC": _frame(bridge, everybody, 0x0800, _ipv4(me, "198.51.100.1", b"forged")),
        "its port's MAC": _frame(_mac(me, 1), bridge, 0x0800, _ipv4(me, "198.51.100.1", b"forged")),
        "the gateway's address": _frame(own, bridge, 0x0800, _ipv4(GATEWAY, it, b"forged", 3000)),
        "the host's loopback as source": _frame(own, bridge, 0x0800, _ipv4("127.0.0.1", GATEWAY, b"forged")),
        "no address": _frame(own, everybody, 0x0800, _ipv4("0.0.0.0", "255.255.255.255", b"forged", 67)),
        "an address outside": _frame(own, bridge, 0x0800, _ipv4("198.51.100.7", "198.51.100.1", b"forged")),
        "an answer for the victim": _frame(own, everybody, 0x0806, _arp(own, it, GATEWAY)),
        "an answer for the gateway": _frame(own, everybody, 0x0806, _arp(own, GATEWAY, it)),
        "a question as the victim": _frame(own, everybody, 0x0806, _arp(own, it, GATEWAY, operation=1)),
        "the victim's MAC as its own": _frame(own, everybody, 0x0806, _arp(others, me, GATEWAY)),
        "a router's advertisement": _frame(own, bytes.fromhex("333300000001"), 0x86DD, bytes.fromhex(
            "6000000000083aff" "fe80000000000000004efffe0acb0004"
            "ff020000000000000000000000000001" "8600000040000708")),
        "a tag of a VLAN": _frame(own, bridge, 0x8100, b"\0\5\x08\0" + _ipv4(me, "198.51.100.1", b"forged")),
        "another protocol": _frame(own, everybody, 0x88CC, b"forged"),
    }
    control = _frame(own, bridge, 0x0800, _ipv4(me, "198.51.100.1", b"own"))
    with tidy_daemon.host.popen([PYTHON, "-c", _SNIFF, BRIDGE], stdin=subprocess.PIPE) as sniffer:
        assert _line(sniffer) == "ready"
        _run(tidy_daemon, PYTHON, "-c", _SEND, *(frame.hex() for frame in forged.values()), control.hex())
        seen: list[str] = []
        while not seen or not seen[-1].startswith(control.hex()):
            seen.append(_line(sniffer))
        assert sniffer.stdin is not None
        sniffer.stdin.close()
        sniffer.wait(10)
    assert {name for name, frame in forged.items() if any(one.startswith(frame.hex()) for one in seen)} == set()
    assert ask(tidy_daemon.host, "tcp", victim["address"], 3000, user=ALICE) == "victim heard hello"


def test_nobody_hears_it_as_another(tidy_daemon: Daemon, victim: Environment, evil: Environment) -> None:
    """By its routes this time, and heard outside as itself, and on the host's loopback not at all."""
    host = tidy_daemon.host
    assert host.outside is not None
    own, bridge = _mac(evil["address"]), _mac(GATEWAY)
    with (host.outside.popen([PYTHON, "-c", _HEAR, HostNamespace.OUTSIDE_ADDRESS, "5555"]) as outside,
          host.popen([PYTHON, "-c", _HEAR, "127.0.0.1", "5556"]) as loopback):
        assert (_line(outside), _line(loopback)) == ("ready", "ready")
        frames = [_frame(own, bridge, 0x0800, _ipv4(victim["address"], HostNamespace.OUTSIDE_ADDRESS, b"forged")),
                  _frame(own, bridge, 0x0800, _ipv4(evil["address"], "127.0.0.1", b"forged", 5556)),
                  _frame(own, bridge, 0x0800, _ipv4("127.0.0.1", "127.0.0.1", b"forged", 5556)),
                  _frame(own, bridge, 0x0800, _ipv4(evil["address"], GATEWAY, b"forged", 5556)),
                  _frame(own, bridge, 0x0800, _ipv4(evil["address"], HostNamespace.ADDRESS, b"forged", 5556)),
                  _frame(own, bridge, 0x0800, _ipv4(evil["address"], HostNamespace.OUTSIDE_ADDRESS, b"own"))]
        _run(tidy_daemon, PYTHON, "-c", _SEND, *(frame.hex() for frame in frames))
        assert _line(outside) == f"{HostNamespace.ADDRESS} own"
        assert ask(host, "udp", "127.0.0.1", 5556, seconds=0.1) == "TIMEOUT"  # it hears, and does not answer
        assert _line(loopback) == "127.0.0.1 hello"
        loopback.kill()
        loopback.wait(10)


def test_what_it_changes_inside_changes_nothing_for_others(tidy_daemon: Daemon, victim: Environment,
                                                           evil: Environment) -> None:
    host = tidy_daemon.host
    assert host.outside is not None

    def neighbours() -> list[str]:
        listed = json.loads(host.run(["ip", "-j", "neigh", "show", "dev", BRIDGE], check=True).stdout)
        return sorted(f"{n['dst']} {n['lladdr']} {n['state']}" for n in listed if n["state"] == ["PERMANENT"])

    def reaches(*options: str) -> bool:
        return json.loads(_run(tidy_daemon, PYTHON, "-c", (
            "import json, socket, sys\n"
            "s = socket.socket(); s.settimeout(0.5)\n"
            "s.bind((sys.argv[1], 0))\n"
            "print(json.dumps(s.connect_ex((sys.argv[2], int(sys.argv[3]))) == 0))"), *options)) is True

    before = neighbours()
    with _ended(host.outside.popen(echo_server("outside", 80, HostNamespace.OUTSIDE_ADDRESS))):
        goal = (HostNamespace.OUTSIDE_ADDRESS, "80")
        wait_until(lambda: reaches(evil["address"], *goal), what="the outside answers")
        _run(tidy_daemon, "ip", "address", "add", f"{victim['address']}/32", "dev", "eth0")
        assert not reaches(victim["address"], *goal)
        assert reaches(evil["address"], *goal)
        _run(tidy_daemon, "ip", "link", "set", "eth0", "address", _mac(victim["address"]).hex(":"))
        assert not reaches(victim["address"], *goal)
        assert not reaches(evil["address"], *goal)
        for _ in range(3):
            assert ask(host, "tcp", victim["address"], 3000, user=ALICE) == "victim heard hello"
            assert ask(host, "tcp", "127.0.0.1", published(victim), user=ROOT) == "victim heard hello"
        assert neighbours() == before
        _run(tidy_daemon, "ip", "link", "set", "eth0", "address", _mac(evil["address"]).hex(":"))
        assert reaches(evil["address"], *goal)
    for way in ((victim["address"], "3000"), (GATEWAY, str(published(victim))), ("127.0.0.1", str(published(victim)))):
        assert not reaches("0.0.0.0", *way)


def test_looking_for_neighbours_leaves_the_hosts_table_room(tidy_daemon: Daemon, evil: Environment) -> None:
    """Each address that is asked for and does not answer is an entry of the host's table, which ends at 1024."""
    host = tidy_daemon.host
    host.run(["ip", "address", "add", "198.18.0.1/16", "dev", "uplink0"], check=True)
    try:
        _run(tidy_daemon, PYTHON, "-c", (
            "import socket\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for n in range(3000):\n"
            "    try:\n"
            "        s.sendto(b'x', (f'198.18.{1 + n // 250}.{1 + n % 250}', 9))\n"
            "    except OSError: pass\n"))
        listed = json.loads(host.run(["ip", "-j", "neigh", "show", "dev", "uplink0"], check=True).stdout)
        looked_for = [n for n in listed if n["dst"].startswith("198.18.")]
        print(f"3000 addresses asked for at once: {len(looked_for)} entries")
        assert 0 < len(looked_for) < 100
    finally:
        host.run(["ip", "address", "del", "198.18.0.1/16", "dev", "uplink0"], check=True)
