"""NetworkPolicy on the real kernel: every ordered pair of environments is tried, and goes as documents say."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, wait_until
from tests.policies.oracle import World
from tests.policies.worlds import document
from tests.system.probing import KINDS, PROBES, Party, server, table

SUPERNET = "10.203.0.0/16"
# Two bridges of six ports: neighbours, and who is behind another bridge. Users take turns.
MEMBERS: tuple[tuple[str, User, dict[str, str]], ...] = (
    ("web", ALICE, {"app": "web", "tier": "front"}), ("till", BOB, {"app": "web"}),
    ("api", ALICE, {"app": "api"}), ("desk", BOB, {"app": "api", "tier": "back"}),
    ("db", ALICE, {"app": "db", "tier": "back"}), ("bank", BOB, {}),
    ("job", ALICE, {}), ("lab", ALICE, {"app": "db", "tier": "front"}))
Documents = list[tuple[str, dict[str, Any]]]


def user(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def app(name: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": {"app": name}}}


SETS: dict[str, Documents] = {
    "none": [],
    "all of Alice's talk": [("alice", document("all", {"ingress": [{"from": [{"podSelector": {}}]}]}))],
    "to a database from its web server, at a port": [("alice", document("db", {
        **app("db"), "ingress": [{"from": [app("web")], "ports": [{"port": 443}]}]}))],
    "another user's, ranges and UDP": [
        ("alice", document("api", {**app("api"), "ingress": [
            {"from": [user("bob")], "ports": [{"port": 80, "endPort": 81}]},
            {"from": [{**user("bob"), **app("web")}], "ports": [{"protocol": "UDP"}]}]})),
        ("bob", document("mine", {"ingress": [{"from": [app("web")]}]}))],
    "everybody, but who may not go": [
        ("alice", document("open", {"ingress": [{}]})), ("bob", document("open", {"ingress": [{"from": []}]})),
        ("bob", document("stay", {"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
                                  "policyTypes": ["Egress"],
                                  "egress": [{"to": [app("web"), user("alice")], "ports": [{"port": 80}]}]}))],
    "egress by default, and a deny that others add to": [
        ("alice", document("deny", {"policyTypes": ["Ingress", "Egress"]})),
        ("alice", document("let", {"podSelector": {"matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["front", "back"]}]},
            "ingress": [{"ports": [{"port": 80}, {"port": 81, "protocol": "UDP"}]}],
            "egress": [{"to": [{"podSelector": {"matchExpressions": [{"key": "tier", "operator": "Exists"}]}}]}]})),
        ("bob", document("open", {"ingress": [{"from": [{"namespaceSelector": {}}]}]}))],
    "not in, does not exist": [
        ("alice", document("few", {"podSelector": {"matchExpressions": [
            {"key": "app", "operator": "NotIn", "values": ["web", "api"]}]},
            "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchExpressions": [
                {"key": "tier", "operator": "DoesNotExist"}]}}]}]}))],
    "addresses are nobody's inside": [
        ("alice", document("block", {"ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]})),
        ("bob", document("block", {"ingress": [{}], "egress": [{"to": [{"ipBlock": {"cidr": SUPERNET}}]}]}))],
}


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    with Daemon(shared_host, config={"network": {"bridge_ports": 6}, "pool": {"size": 0}}) as started:
        yield started


@pytest.fixture(scope="module")
def party(shared_daemon: Daemon) -> Iterator[Party]:
    environments = [
        shared_daemon.create_json(name, *server(name), user=owner, options=[
            part for key, value in labels.items() for part in ("--label", f"{key}={value}")])
        for name, owner, labels in MEMBERS]
    assert {e["address"].rsplit(".", 1)[0] + ("a" if int(e["address"].rsplit(".", 1)[1]) < 16 else "b")
            for e in environments} == {"10.203.0a", "10.203.0b"}, "on two bridges"
    for environment in environments:
        wait_until(lambda e=environment: "ready" in shared_daemon.ctl(  # type: ignore[misc]
            "logs", e["id"], check=True).stdout, what="a server")
    made = Party(shared_daemon.host, environments)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_policies(shared_daemon: Daemon) -> Iterator[None]:
    yield
    for owner in (ALICE, BOB):
        names = shared_daemon.ctl("policy", "ls", "-o", "name", user=owner, check=True).stdout.split()
        if names:
            shared_daemon.ctl("policy", "rm", *names, user=owner, check=True)


def apply(daemon: Daemon, documents: Documents) -> None:
    for owner in (ALICE, BOB):
        mine = [one for name, one in documents if name == owner.name]
        if mine:
            daemon.ctl("policy", "apply", "-f", "-", user=owner, check=True, stdin=json.dumps(
                {"apiVersion": "v1", "kind": "List", "items": mine}))


def compare(party: Party, documents: Documents) -> None:
    """Try everything, print it, and compare it with what the oracle says."""
    world = World(tuple(party.pods.values()), tuple(documents), SUPERNET)
    reached, names = party.reached(), list(party.pods)
    print(table(names, names, reached))
    expected = {(a, b): {probe for probe in PROBES if world.lets(party.pods[a], party.pods[b], *probe)}
                for a in names for b in names if a != b}
    wrong = [f"{a} -> {b} {KINDS[protocol]} {port} "
             f"{'came through' if (protocol, port) in reached[a, b] else 'did not come through'}"
             for (a, b), want in expected.items() for protocol, port in sorted(want ^ reached[a, b])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SETS)
def test_every_pair_goes_as_the_documents_say(shared_daemon: Daemon, party: Party, name: str) -> None:
    print(f"\n{name}:")
    apply(shared_daemon, SETS[name])
    compare(party, SETS[name])


@pytest.mark.parametrize("filtered", [0, 1], ids=["bridge-nf=0", "bridge-nf=1"])
@pytest.mark.parametrize("forwards", [0, 1], ids=["ip_forward=0", "ip_forward=1"])
def test_it_is_the_same_whatever_the_host_forwards_and_filters(
        shared_daemon: Daemon, party: Party, forwards: int, filtered: int) -> None:
    host = shared_daemon.host
    before = host.run(["sysctl", "-n", "net.ipv4.ip_forward"], check=True).stdout.strip()
    documents = SETS["another user's, ranges and UDP"]
    apply(shared_daemon, documents)
    try:
        _set(shared_daemon, forwards, filtered)
        print(f"\nip_forward={forwards}, bridge-nf-call-iptables={filtered}:")
        compare(party, documents)
    finally:
        _set(shared_daemon, int(before), 0)


def _set(daemon: Daemon, forwards: int, filtered: int) -> None:
    """Whoever sets ip_forward sets it for every interface; the daemon's next check mends that."""
    daemon.host.run(["sysctl", "-qw", f"net.ipv4.ip_forward={forwards}",
                     f"net.bridge.bridge-nf-call-iptables={filtered}"], check=True)
    os.kill(daemon.pid, signal.SIGHUP)
    names = [f"net.ipv4.conf.{bridge}.forwarding" for bridge in ("ndbr0", "ndbr1")]
    wait_until(lambda: daemon.host.run(["sysctl", "-n", *names], check=True).stdout.split() == ["1", "1"],
               what="forwarding")
