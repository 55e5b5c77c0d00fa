"""Policies and egress while things run: who is outside, what comes and goes, and traffic across a change."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, wait_until
from tests.policies.oracle import TCP, UDP, Pod, World
from tests.policies.worlds import document
from tests.system.clients import PYTHON, Conversation, Environment, echo_server
from tests.system.probing import KINDS, PROBES, Party, Prober, network_of, pod_of, server, table

SUPERNET = "10.203.0.0/16"
OUTSIDE = {"gate": HostNamespace.OUTSIDE_ADDRESS, "near": "203.0.113.7", "far": "203.0.113.200", "alone": "192.0.2.1"}
SOURCES = ("gate", "near", "alone")
DECLARED = ((TCP, 80), (UDP, 80), (TCP, 443))
# Two closed loops with a friend, by UDP and TCP, and meanwhile everything that may reach a stranger; till stdin ends.
_FLOW = """
import json, select, socket, sys
friend, stranger = (sys.argv[1], 80), (sys.argv[2], 80)
kept = socket.create_connection(friend, timeout=3)
kept.recv(99)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.settimeout(1)
udp.connect(friend)
knock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
done, lost = {"udp": 0, "tcp": 0, "knocks": 0}, []
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for kind, one in (("udp", udp), ("tcp", kept)):
        text = str(done[kind]).encode()
        # Where passages are replaced a packet may be lost in that moment; TCP sends it again by itself.
        for left in (2, 1, 0) if kind == "udp" else (0,):
            try:
                one.send(text)
                while not one.recv(4096).endswith(text):
                    pass
                done[kind] += 1
                break
            except OSError as error:
                if not left:
                    lost.append([kind, done[kind], repr(error)])
    with socket.socket() as tcp:
        tcp.setblocking(False)
        tcp.connect_ex(stranger)
        try:
            knock.sendto(b"hello", stranger)
        except OSError:
            pass
    done["knocks"] += 1
print(json.dumps([done, lost]), flush=True)
"""
# Says hello to the outside from its first moment.
_HASTY = """
import socket, sys, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(100):
    try:
        one.sendto(sys.argv[2].encode(), (sys.argv[1], 81))
    except OSError:
        pass
    time.sleep(0.003)
print("said", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    with HostNamespace(uplink=True) as made:
        assert made.outside is not None
        for address in OUTSIDE.values():
            if address != HostNamespace.OUTSIDE_ADDRESS:
                made.outside.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        yield made


@pytest.fixture(scope="module")
def outside(shared_host: HostNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Servers at every address outside, by their names: what they say is in files."""
    assert shared_host.outside is not None
    directory, processes = tmp_path_factory.mktemp("outside"), []
    files = {name: directory / name for name in OUTSIDE}
    for name, address in OUTSIDE.items():
        with files[name].open("wb") as file:
            processes.append(shared_host.outside.popen(server(name, address), cwd="/", stdout=file))
        wait_until(lambda name=name: "ready" in files[name].read_text(), what="a server")  # type: ignore[misc]
    yield files
    for process in processes:
        process.kill()


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Iterator[Daemon]:
    yield tidy_daemon
    for owner in (ALICE, BOB):
        names = tidy_daemon.ctl("policy", "ls", "-o", "name", user=owner, check=True).stdout.split()
        if names:
            tidy_daemon.ctl("policy", "rm", *names, user=owner, check=True)


def apply(daemon: Daemon, *documents: dict[str, Any], user: Any = ALICE) -> None:
    daemon.ctl("policy", "apply", "-f", "-", user=user, check=True,
               stdin="---\n".join(json.dumps(one) + "\n" for one in documents))


def create(daemon: Daemon, name: str, *, user: Any = ALICE, app: str | None = None, egress: str = "allow",
           share: str = "owner", declared: bool = False) -> Environment:
    made = daemon.create_json(
        name, *server(name), user=user, options=["--label", f"app={app or name}", "--egress", egress, "--share", share],
        ports=[80, "80/udp", 443] if declared else [])
    wait_until(lambda: "ready" in daemon.ctl("logs", made["id"], check=True).stdout, what="a server")
    return made


def block(cidr: str, *holes: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": cidr, "except": list(holes)}}


OUT: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "blocks": [document("out", {
        "podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["own"]}]},
        "policyTypes": ["Egress"],
        "egress": [{"to": [block("203.0.113.0/24", "203.0.113.128/25")]},
                   {"to": [block("0.0.0.0/0")], "ports": [{"port": 80, "endPort": 81}]}]}),
               document("in", {"ingress": [{"from": [block("203.0.113.0/24")], "ports": [{"port": 80}]},
                                           {"from": [block("192.0.2.0/24")], "ports": [{"protocol": "UDP"}]}]})],
    "nothing out, everything in": [document("out", {"policyTypes": ["Egress"]}), document("in", {"ingress": [{}]})],
    "everything out, nothing in": [document("both", {"policyTypes": ["Ingress", "Egress"], "egress": [{}]})],
    "environments alone": [document("both", {"ingress": [{"from": [{"podSelector": {}}]}],
                                             "egress": [{"to": [{"podSelector": {}}]}]})],
}


@pytest.fixture(scope="module")
def placed(shared_daemon: Daemon, outside: dict[str, Path]) -> Iterator[tuple[Party, dict[str, Environment]]]:
    made = [create(shared_daemon, "free", share="lan", declared=True), create(shared_daemon, "own"),
            create(shared_daemon, "shut", egress="deny", share="lan", declared=True),
            create(shared_daemon, "some", user=BOB,
                   egress="203.0.113.0/25,192.0.2.1:443/tcp,198.51.100.1:80-81,203.0.113.200/32/udp")]
    party = Party(shared_daemon.host, made)
    yield party, {environment["name"]: environment for environment in made}
    party.close()


@pytest.mark.parametrize("name", OUT)
def test_the_outside_is_reached_and_reaches_in_as_documents_and_egress_say(
        shared_daemon: Daemon, placed: tuple[Party, dict[str, Environment]], name: str) -> None:
    party, environments = placed
    documents = OUT[name]
    if documents:
        apply(shared_daemon, *documents)
    try:
        world = World(tuple(party.pods.values()), tuple(("alice", one) for one in documents), SUPERNET)
        reached = party.reached(others=OUTSIDE)
        print(f"\n{name}:\n{table(list(party.pods), [*party.pods, *OUTSIDE], reached)}")
        ends: dict[str, Pod | str] = {**party.pods, **OUTSIDE}
        expected = {(a, b): {probe for probe in PROBES if world.lets(party.pods[a], ends[b], *probe)}
                    for a in party.pods for b in ends if a != b}
        assert reached == expected
        came = _from_outside(shared_daemon.host, [environments["free"], environments["shut"]])
        print(table(SOURCES, ["free", "shut"], came))
        assert came == {(source, target): {probe for probe in DECLARED
                                           if world.lets(OUTSIDE[source], party.pods[target], *probe)}
                        for source in SOURCES for target in ("free", "shut")}
    finally:
        for one in documents:
            shared_daemon.ctl("policy", "rm", one["metadata"]["name"], user=ALICE, check=True)


def _from_outside(host: HostNamespace, targets: list[Environment]) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Who comes from outside to which declared port, by the host's address and the published port."""
    assert host.outside is not None
    asked = [(source, target["name"], (protocol, port), published["published"])
             for source in SOURCES for target in targets for protocol, port in DECLARED
             for published in target["ports"] if (published["protocol"], published["port"]) == (KINDS[protocol], port)]
    prober = Prober(host.outside)
    prober.begin([(KINDS[probe[0]], HostNamespace.ADDRESS, published, OUTSIDE[source])
                  for source, _, probe, published in asked], 0.4)
    answers = prober.end()
    prober.close()
    found: dict[tuple[str, str], set[tuple[int, int]]] = {(s, t["name"]): set() for s in SOURCES for t in targets}
    for (source, target, probe, _), answer in zip(asked, answers, strict=True):
        if answer is not None:
            assert answer == target
            found[source, target].add(probe)
    return found


# -- traffic across a change --------------------------------------------------------------------------------------


@contextmanager
def flow(host: HostNamespace, source: Environment, friend: Environment, stranger: Environment
         ) -> Iterator[Callable[[], tuple[dict[str, int], list[Any]]]]:
    place = network_of(host, source)
    process = place.popen([PYTHON, "-c", _FLOW, friend["address"], stranger["address"]], user=ALICE, cwd="/",
                          stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"

    def end() -> tuple[dict[str, int], list[Any]]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        done, lost = json.loads(process.stdout.readline())
        return done, lost

    yield end
    process.kill()
    place.reap()


def test_what_both_policies_let_goes_on_across_a_change_and_what_both_forbid_never_passes(daemon: Daemon) -> None:
    source, friend, stranger = create(daemon, "source"), create(daemon, "friend"), create(daemon, "stranger")
    narrow = document("friend", {"podSelector": {"matchLabels": {"app": "friend"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "source"}}}],
         "ports": [{"port": 80}, {"port": 80, "protocol": "UDP"}]}]})
    wide = document("friend", {"podSelector": {"matchLabels": {"app": "friend"}}, "ingress": [{}]})
    other = document("stranger", {"podSelector": {"matchLabels": {"app": "stranger"}}, "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}], "policyTypes": ["Ingress", "Egress"]})
    apply(daemon, narrow)
    with flow(daemon.host, source, friend, stranger) as end:
        for number in range(8):
            apply(daemon, wide, other) if number % 2 == 0 else apply(daemon, narrow)
            create(daemon, f"more-{number}", app="source" if number % 2 else "friend")
        daemon.ctl("policy", "rm", "stranger", user=ALICE, check=True)
        for end_daemon in (daemon.kill, daemon.stop):
            end_daemon()
            daemon.start()
        apply(daemon, wide)
        done, lost = end()
    print(f"\n{done} across 10 changes, a death and a restart of the daemon, lost: {lost}")
    assert lost == []
    assert min(done.values()) > 50
    assert "came" not in daemon.ctl("logs", "stranger", user=ALICE, check=True).stdout


def test_what_is_forbidden_now_is_cut_though_it_was_connected_before(daemon: Daemon) -> None:
    source = create(daemon, "source")
    target = daemon.create_json("target", *echo_server("target", 80, "0.0.0.0"), user=ALICE, ports=[80],
                                options=["--label", "app=target"], wait=True)
    apply(daemon, document("in", {"podSelector": {"matchLabels": {"app": "target"}}, "ingress": [{}]}))
    for change in (("label", "target", "app=other"), ("policy", "rm", "in")):
        place = network_of(daemon.host, source)
        with Conversation(place, target["address"], 80, user=ALICE) as talk:
            assert talk.say("one") == "target heard one"
            daemon.ctl(*change, user=ALICE, check=True)
            assert "target" not in talk.say("two")
        place.reap()
        daemon.ctl("label", "target", "app=target", user=ALICE, check=True)


# -- who comes and who goes ---------------------------------------------------------------------------------------


def test_nothing_leaves_a_new_environment_before_it_is_judged(daemon: Daemon, outside: dict[str, Path]) -> None:
    apply(daemon, document("out", {"podSelector": {"matchLabels": {"app": "shut"}}, "policyTypes": ["Egress"]}))
    before = outside["near"].stat().st_size
    for number in range(5):
        daemon.create_json(f"denied-{number}", PYTHON, "-c", _HASTY, OUTSIDE["near"], "x", user=ALICE,
                           options=["--egress", "deny"])
        daemon.create_json(f"shut-{number}", PYTHON, "-c", _HASTY, OUTSIDE["near"], "x", user=ALICE,
                           options=["--label", "app=shut"])
    for number in range(5):
        for name in (f"denied-{number}", f"shut-{number}"):
            wait_until(lambda name=name: "said" in daemon.ctl(  # type: ignore[misc]
                "logs", name, user=ALICE, check=True).stdout, what="all that it says")
    assert outside["near"].stat().st_size == before, "something came"
    daemon.create_json("free", PYTHON, "-c", _HASTY, OUTSIDE["near"], "x", user=ALICE)
    wait_until(lambda: "came udp 81" in outside["near"].read_bytes()[before:].decode(), what="what is not forbidden")


def test_who_gets_the_address_of_one_that_is_gone_gets_nothing_else(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(config={"network": {"supernet": "10.203.0.0/28", "bridge_ports": 6}, "pool": {"size": 0}})
    made = [create(daemon, f"one-{number}", app="friend") for number in range(6)]
    apply(daemon, document("all", {"ingress": [{"from": [{"podSelector": {}}]}]}))
    party = Party(daemon.host, made)
    assert all(reached == set(PROBES) for reached in party.reached().values())
    party.close()
    daemon.ctl("rm", "one-3", user=ALICE, check=True)
    heir = create(daemon, "heir", user=BOB)
    assert heir["address"] == made[3]["address"], "the only one that was free"
    party = Party(daemon.host, [*made[:3], heir, *made[4:]])
    reached = party.reached()
    party.close()
    assert {pair for pair, found in reached.items() if "heir" in pair and found} == set()
    assert all(found == set(PROBES) for pair, found in reached.items() if "heir" not in pair)


def test_policies_and_their_owners_are_apart(daemon: Daemon) -> None:
    web = create(daemon, "web", user=BOB)
    assert pod_of(web).user == "bob"
    refused = daemon.ctl("policy", "apply", "-f", "-", user=ALICE, stdin=json.dumps(
        document("open", {"ingress": [{}]}, namespace="bob")))
    assert refused.returncode == 7
    apply(daemon, document("open", {"ingress": [{}]}, namespace="bob"), user=None)
    assert daemon.ctl("policy", "show", "open", user=BOB, check=True).stdout.count("web") == 1
    assert daemon.ctl("policy", "show", "open", user=ALICE).returncode == 4
    again = daemon.ctl("policy", "show", "open", "-o", "yaml", user=BOB, check=True).stdout
    daemon.ctl("policy", "apply", "-f", "-", user=BOB, stdin=again, check=True)
    wrong = daemon.ctl("policy", "apply", "-f", "-", user=BOB, stdin="kind: NetworkPolicy\nkind: NetworkPolicy\n")
    assert wrong.returncode == 2
    assert "given twice" in wrong.stderr
