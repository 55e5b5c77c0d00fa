"""Who reaches whom: an environment, its owner, other users, other environments, the host, and the network outside."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ALICE, BOB, CAROL, MALLORY, ROOT, Daemon, HostNamespace, wait_until
from tests.harness.host import Place
from tests.system.clients import PYTHON, Environment, ask, echo_server, inside, main_of, pings, published

BRIDGE_ADDRESS = "10.203.0.1"
SUPERNET = "10.203.0.0/16"
REFUSED = {"ECONNREFUSED", "EHOSTUNREACH", "EACCES", "EPERM"}
# TCP is reset at once; the kernel sends about one ICMP error a second to a peer, so that UDP may meet silence.
FIREWALLED = {"tcp": {"ECONNREFUSED"}, "udp": REFUSED | {"TIMEOUT"}}
# As ``clients.ask``, but out of eth0 whatever the address: any user may bind to a device.
_BY_DEVICE = """
import errno, socket, sys
address, port, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(0.3)
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind((source, 0))
        client.sendto(b"hello", (address, port))
        print("sent")
        print(client.recv(4096).decode())
    except OSError as error:
        print(errno.errorcode.get(error.errno, "TIMEOUT") if error.errno else "TIMEOUT")
"""
_HEARING = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
while True:
    text, peer = server.recvfrom(4096)
    server.sendto(b"host heard", peer)
    print(peer[0], flush=True)
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
    """Alice's, with a loopback server on 3000, TCP and UDP, both published."""
    return tidy_daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000, "3000/udp"], wait=True)


@pytest.fixture
def other(tidy_daemon: Daemon) -> Environment:
    """Bob's, on all addresses, at the same ports."""
    return tidy_daemon.create_json("other", *echo_server("other", 3000, "0.0.0.0"), user=BOB,
                                   ports=[3000, "3000/udp"], wait=True)


def _network_of(host: HostNamespace, environment: Environment) -> Place:
    """The environment's network, with the host's files."""
    return Place(host.host_pid, main_of(environment)["pid"], host.cgroup)


def _udp(environment: Environment) -> int:
    return next(int(p["published"]) for p in environment["ports"] if p["protocol"] == "udp")


def _tcp(environment: Environment) -> int:
    return next(int(p["published"]) for p in environment["ports"] if p["protocol"] == "tcp")


def _set(host: HostNamespace, name: str, value: int) -> None:
    host.run(["sysctl", "-qw", f"{name}={value}"], check=True)


# -- what is there ----------------------------------------------------------------------------------------------


def test_an_environment_is_an_ordinary_named_namespace_with_one_address_and_one_way_out(
        host: HostNamespace, web: Environment) -> None:
    assert "web" in [line.split()[0] for line in host.run(["ip", "netns", "list"]).stdout.splitlines()]

    def look(*arguments: str) -> list[dict[str, object]]:
        listing: list[dict[str, object]] = json.loads(
            host.run(["ip", "netns", "exec", "web", "ip", "-j", *arguments], check=True).stdout or "[]")
        return listing

    links = {str(link["ifname"]): link for link in look("-d", "address")}
    assert set(links) == {"lo", "eth0"}
    assert all("UP" in str(link["flags"]) for link in links.values())
    addresses = {name: [(a["local"], a["prefixlen"]) for a in link["addr_info"]]  # type: ignore[attr-defined]
                 for name, link in links.items()}
    assert addresses == {"lo": [("127.0.0.1", 8)], "eth0": [(web["address"], 32)]}, "and no IPv6"
    assert look("route") == [{"dst": "default", "gateway": BRIDGE_ADDRESS, "dev": "eth0", "protocol": "static",
                              "flags": ["onlink"]}]


def test_every_port_of_the_bridge_is_isolated(host: HostNamespace, web: Environment, other: Environment) -> None:
    ports = json.loads(host.run(["ip", "-d", "-j", "link", "show", "master", "ndbr0"], check=True).stdout)
    assert [port["linkinfo"]["info_slave_data"]["isolated"] for port in ports] == [True, True]


def test_not_even_root_inside_reaches_a_neighbour_past_the_hosts_rules(
        host: HostNamespace, web: Environment, other: Environment) -> None:
    place = _network_of(host, web)
    place.run(["ip", "route", "add", f"{other['address']}/32", "dev", "eth0"], check=True)
    assert not pings(place, other["address"], seconds=0.4)
    assert ask(place, "tcp", other["address"], 3000, seconds=0.3) in {"TIMEOUT", "EHOSTUNREACH"}


# -- between environments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [0, 1], ids=["bridge-nf=0", "bridge-nf=1"])
@pytest.mark.parametrize("forwards", [0, 1], ids=["ip_forward=0", "ip_forward=1"])
def test_environments_do_not_reach_each_other(tidy_daemon: Daemon, web: Environment, other: Environment,
                                              forwards: int, filtered: int) -> None:
    host = tidy_daemon.host
    before = host.run(["sysctl", "-n", "net.ipv4.ip_forward"]).stdout
    sibling = tidy_daemon.create_json("sibling", *echo_server("sibling", 3000), user=ALICE, ports=[3000], wait=True)
    try:
        _set(host, "net.ipv4.ip_forward", forwards)
        _set(host, "net.bridge.bridge-nf-call-iptables", filtered)
        for source, user in ((web, ALICE), (other, BOB)):
            place = _network_of(host, source)
            for target in (web, other, sibling):
                if target is source:
                    continue
                ways = [("tcp", target["address"], 3000), ("udp", target["address"], 3000)]
                ways += [("tcp", address, _tcp(target)) for address in (BRIDGE_ADDRESS, HostNamespace.ADDRESS)]
                for kind, address, port in ways:
                    answer = ask(place, kind, address, port, user=user, seconds=0.2)
                    # Where nothing is forwarded, packets to a neighbour end before the rules.
                    fine = FIREWALLED[kind] if forwards else REFUSED | {"TIMEOUT"}
                    assert answer in fine, (kind, address, port)
                assert not pings(place, target["address"], user=user, seconds=0.4)
        for target, user in ((web, ALICE), (other, BOB), (sibling, ALICE)):
            name = target["name"]
            assert ask(host, "tcp", target["address"], 3000, user=user) == f"{name} heard hello"
            assert ask(host, "tcp", "127.0.0.1", _tcp(target), user=user) == f"{name} heard hello"
    finally:
        _set(host, "net.bridge.bridge-nf-call-iptables", 0)
        _set(host, "net.ipv4.ip_forward", int(before))
        for interface in ("ndbr0", "uplink0"):  # ip_forward resets these
            _set(host, f"net.ipv4.conf.{interface}.forwarding", 1)


# -- the network outside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [0, 1], ids=["bridge-nf=0", "bridge-nf=1"])
def test_an_environment_reaches_the_network_outside_as_the_host(
        tidy_daemon: Daemon, host: HostNamespace, web: Environment, filtered: int) -> None:
    outside = host.outside
    assert outside is not None
    server = outside.popen([PYTHON, "-c", _HEARING, HostNamespace.OUTSIDE_ADDRESS, "7000"], cwd="/")
    echo = outside.popen(echo_server("outside", 7001, "0.0.0.0"), cwd="/")
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    wait_until(lambda: ask(host, "tcp", HostNamespace.OUTSIDE_ADDRESS, 7001) == "outside heard hello", what="outside")
    _set(host, "net.bridge.bridge-nf-call-iptables", filtered)
    try:
        place = _network_of(host, web)
        assert ask(place, "tcp", HostNamespace.OUTSIDE_ADDRESS, 7001, user=ALICE) == "outside heard hello"
        assert ask(place, "udp", HostNamespace.OUTSIDE_ADDRESS, 7000, user=ALICE) == "host heard"
        assert server.stdout.readline() == f"{HostNamespace.ADDRESS}\n".encode()
        assert pings(place, HostNamespace.OUTSIDE_ADDRESS, user=ALICE)
        assert inside(tidy_daemon, "web", "ping", "-c1", "-W3", HostNamespace.OUTSIDE_ADDRESS, user=ALICE)
    finally:
        _set(host, "net.bridge.bridge-nf-call-iptables", 0)
        for process in (server, echo):
            process.kill()


def test_forwarding_that_was_switched_off_for_all_is_switched_on_again(
        tidy_daemon: Daemon, host: HostNamespace, web: Environment) -> None:
    """The kernel takes a 0 in ip_forward for every interface."""
    place = _network_of(host, web)
    assert pings(place, HostNamespace.OUTSIDE_ADDRESS, user=ALICE)
    _set(host, "net.ipv4.ip_forward", 1)
    _set(host, "net.ipv4.ip_forward", 0)
    assert not pings(place, HostNamespace.OUTSIDE_ADDRESS, user=ALICE)
    os.kill(tidy_daemon.pid, signal.SIGHUP)
    wait_until(lambda: pings(place, HostNamespace.OUTSIDE_ADDRESS, user=ALICE), what="forwarding")


def test_the_network_outside_reaches_no_environment(host: HostNamespace, web: Environment) -> None:
    outside = host.outside
    assert outside is not None
    outside.run(["ip", "route", "replace", SUPERNET, "via", HostNamespace.ADDRESS], check=True)
    outside.run(["ip", "route", "replace", f"{web['address']}/32", "via", HostNamespace.ADDRESS], check=True)
    for kind, port in (("tcp", 3000), ("udp", 3000)):
        assert ask(outside, kind, web["address"], port, seconds=0.3) in REFUSED | {"TIMEOUT"}
    assert not pings(outside, web["address"], seconds=0.4)
    for kind, port in (("tcp", _tcp(web)), ("udp", _udp(web))):
        assert ask(outside, kind, HostNamespace.ADDRESS, port) == "ECONNREFUSED", "published on loopback only"


# -- the host's own services ------------------------------------------------------------------------------------


def test_the_hosts_own_services_are_refused_from_inside(host: HostNamespace, web: Environment) -> None:
    servers = [host.popen(echo_server("host", port, address), cwd="/")
               for port, address in ((9000, "127.0.0.1"), (9001, "0.0.0.0"))]
    for port in (9000, 9001):
        wait_until(lambda port=port: ask(host, "tcp", "127.0.0.1", port) == "host heard hello",  # type: ignore[misc]
                   what="the host's server")
    place = _network_of(host, web)
    for kind in ("tcp", "udp"):
        for address in (BRIDGE_ADDRESS, HostNamespace.ADDRESS):
            for port in (9000, 9001):
                answer = ask(place, kind, address, port, user=ALICE, seconds=0.2)
                assert answer in FIREWALLED[kind], (kind, address, port)
        assert ask(place, kind, "127.0.0.1", 9000, user=ALICE) == "ECONNREFUSED", "its loopback is its own"
    assert pings(place, BRIDGE_ADDRESS, user=ALICE)
    for server in servers:
        server.kill()


@pytest.mark.parametrize("source", ["", "127.9.9.9"])
@pytest.mark.parametrize("address", ["127.0.0.1", BRIDGE_ADDRESS])
def test_packets_to_or_from_loopback_addresses_never_arrive_at_the_host(
        host: HostNamespace, web: Environment, address: str, source: str) -> None:
    server = host.popen([PYTHON, "-c", _HEARING, address, "9002"], cwd="/")
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        said = _network_of(host, web).run([PYTHON, "-c", _BY_DEVICE, address, "9002", source], user=ALICE, cwd="/")
        sent, *answer = said.stdout.split("\n")
        assert sent == "sent", "the kernel lets it out, so that the host's rules are what stops it"
        assert "heard" not in "".join(answer)
        assert ask(host, "udp", address, 9002) == "host heard"
        assert server.stdout.readline().decode().strip() == address, "the host's own is the first that arrived"
    finally:
        server.kill()


# -- users ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [ALICE, ROOT], ids=str)
def test_owner_and_root_reach_an_environment_by_port_and_by_address(
        host: HostNamespace, web: Environment, user: object) -> None:
    who = str(user)
    for kind, port in (("tcp", _tcp(web)), ("udp", _udp(web))):
        assert ask(host, kind, "127.0.0.1", port, user=who) == "web heard hello"
        assert ask(host, kind, web["address"], 3000, user=who) == "web heard hello"
    assert pings(host, web["address"], user=who)


@pytest.mark.parametrize("user", [BOB, MALLORY, CAROL], ids=str)
def test_other_users_are_refused_by_port_and_by_address(
        host: HostNamespace, web: Environment, user: object) -> None:
    who = str(user)
    for kind, port in (("tcp", _tcp(web)), ("udp", _udp(web))):
        assert ask(host, kind, "127.0.0.1", port, user=who) in REFUSED
        assert ask(host, kind, web["address"], 3000, user=who) in REFUSED
    assert not pings(host, web["address"], user=who, seconds=0.4)


def test_any_user_of_the_host_reaches_the_hosts_own_server_at_the_bridges_address(
        host: HostNamespace, web: Environment) -> None:
    server = host.popen(echo_server("host", 9003, BRIDGE_ADDRESS), cwd="/")
    try:
        wait_until(lambda: ask(host, "tcp", BRIDGE_ADDRESS, 9003) == "host heard hello", what="the host's server")
        for user in (ALICE, BOB, MALLORY):
            for kind in ("tcp", "udp"):
                assert ask(host, kind, BRIDGE_ADDRESS, 9003, user=user) == "host heard hello"
    finally:
        server.kill()


def test_a_user_does_not_slip_in_on_the_source_port_of_the_owners_conversation(
        host: HostNamespace, web: Environment) -> None:
    program = ("import socket, sys\n"
               "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(3)\ns.bind(('', 45454))\n"
               "s.connect((sys.argv[1], 3000))\n"
               "try:\n    s.send(b'hi'); print(s.recv(99).decode())\nexcept OSError:\n    print('refused')\n")
    said = [host.run([PYTHON, "-c", program, web["address"]], user=user, check=True).stdout.strip()
            for user in (ALICE, BOB, ALICE)]
    assert said == ["web heard hi", "refused", "web heard hi"]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_an_environment_reaches_its_own_url_and_published_ports_from_inside(tidy_daemon: Daemon, address: str) -> None:
    environment = tidy_daemon.create_json("web", PYTHON, "-m", "http.server", "--bind", address, user=ALICE,
                                          ports=[8000], wait=True)
    code = "import os, urllib.request as r; print(os.environ['NETNSD_URL'], r.urlopen(os.environ['NETNSD_URL']).status)"
    said = inside(tidy_daemon, "web", PYTHON, "-c", code, user=ALICE)
    assert said == f"http://localhost:{published(environment)}/ 200"


# -- names, ports and ping inside -------------------------------------------------------------------------------


def test_names_inside_are_the_environments_own(tidy_daemon: Daemon, host: HostNamespace, web: Environment) -> None:
    def ask_inside(*command: str) -> str:
        return inside(tidy_daemon, "web", *command, user=ALICE)

    hosts = host.run(["cat", "/etc/hosts"]).stdout
    assert ask_inside("uname", "-n") == "web"
    lines = [line.split() for line in ask_inside("cat", "/etc/hosts").splitlines()]
    assert lines == [["127.0.0.1", "localhost"], [web["address"], "web"]]
    resolve = "import socket; print(*sorted({a[4][0] for n in ('localhost', 'web') for a in socket.getaddrinfo(n, 1)}))"
    assert ask_inside(PYTHON, "-c", resolve).split() == [web["address"], "127.0.0.1"]
    assert host.run(["cat", "/etc/hosts"]).stdout == hosts
    assert host.run(["uname", "-n"]).stdout.strip() != "web"


@pytest.mark.parametrize(("hosts_own", "uplinks", "seen"), [
    ("nameserver 198.51.100.1\n", "nameserver 198.51.100.7\n", "nameserver 198.51.100.1"),
    ("nameserver 127.0.0.53\noptions edns0\n", "nameserver 198.51.100.7\n", "nameserver 198.51.100.7"),
])
def test_name_servers_are_the_hosts_or_its_uplinks_where_the_hosts_is_a_stub(
        tidy_daemon: Daemon, host: HostNamespace, hosts_own: str, uplinks: str, seen: str) -> None:
    own = host.path("/run/harness/resolv.conf")  # mounted on /etc/resolv.conf
    before = own.read_text()
    directory = host.path("/run/systemd/resolve")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "resolv.conf").write_text(uplinks)
    own.write_text(hosts_own)
    try:
        tidy_daemon.create_json("names", "sleep", "1000", user=ALICE)
        assert inside(tidy_daemon, "names", "cat", "/etc/resolv.conf", user=ALICE) == seen
    finally:
        own.write_text(before)
        (directory / "resolv.conf").unlink()
    assert Path("/etc/resolv.conf").exists() == host.path("/etc/resolv.conf").exists()


def test_a_user_binds_any_port_and_pings_inside(tidy_daemon: Daemon, web: Environment) -> None:
    bind = "import socket; [socket.create_server(('', p)) for p in (1, 80, 443)]; print('bound')"
    assert inside(tidy_daemon, "web", PYTHON, "-c", bind, user=ALICE) == "bound"
    for address in ("127.0.0.1", web["address"], BRIDGE_ADDRESS):
        assert "1 received" in inside(tidy_daemon, "web", "ping", "-c1", "-W3", address, user=ALICE)


# -- the rules --------------------------------------------------------------------------------------------------


def test_rules_that_another_tool_flushed_are_put_back(host: HostNamespace, web: Environment) -> None:
    host.run(["nft", "flush", "ruleset"], check=True)
    wait_until(lambda: ask(host, "tcp", "127.0.0.1", _tcp(web), user=ALICE) == "web heard hello",
               what="the published port")
    assert ask(host, "tcp", web["address"], 3000, user=BOB) in REFUSED
