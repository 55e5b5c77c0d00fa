"""The host is started anew: who has a restart policy is there again, with id, address and ports; the others end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from typing import Any

from tests.harness import ALICE, BOB, Daemon, HostNamespace, cgroups, wait_until
from tests.system.api import Api
from tests.system.clients import ask, echo_server, main_of, published


def _reboot(daemon: Daemon, before: Callable[[], None] = lambda: None) -> None:
    """Kill everything, take away all that a kernel forgets and what lies on its tmpfs, and have another boot id.

    ``before`` is called before the daemon starts.
    """
    host = daemon.host
    daemon.kill()
    for pid in daemon.launcher_pids():
        os.kill(pid, signal.SIGKILL)
    cgroups.kill(daemon.cgroup)
    wait_until(lambda: not daemon.launcher_pids() and cgroups.remove(daemon.cgroup), what="the end of all processes")
    boot_id = host.write(f"{daemon.base}/boot_id-{uuid.uuid4()}", f"{uuid.uuid4()}\n")
    host.run(["sh", "-ec", (
        "ip -all netns delete; nft flush ruleset;"
        "for link in $(ip -o link | sed -n 's/^[0-9]*: \\(nd[^:@]*\\).*/\\1/p'); do ip link delete $link; done;"
        f"umount {daemon.runtime_dir}/slots/* || :; umount {daemon.runtime_dir}/slots; umount /run/netns;"
        f"rm -rf {daemon.runtime_dir} /run/netns; mount --bind {boot_id} /proc/sys/kernel/random/boot_id")], check=True)
    before()
    daemon.start()


def _shown(daemon: Daemon, name: str, **options: Any) -> dict[str, Any]:
    shown: dict[str, Any] = daemon.ctl_json("show", name, user=ALICE, **options)
    return shown


def _lasting(environment: dict[str, Any]) -> dict[str, Any]:
    """What a reboot does not change."""
    return {key: value for key, value in environment.items() if key != "services"}


def test_environments_with_a_restart_policy_come_back_and_the_others_end_with_an_event(host: HostNamespace) -> None:
    with Daemon(host) as daemon:
        alice = Api(daemon, ALICE)
        daemon.create_json("first", "sleep", "1000", user=ALICE)
        daemon.ctl("rm", "first", user=ALICE, check=True)
        kept = {policy: alice.create(policy, command=echo_server(policy, 3000), ports=[{"port": 3000}],
                                     restart=policy, labels={"team": "shop"})
                for policy in ("always", "on-failure")}
        stopped = alice.create("stopped", restart="always", ports=[{"port": 53, "protocol": "udp"}])
        daemon.ctl("stop", "stopped", user=ALICE, check=True)
        daemon.create_json("once", *echo_server("once", 3000), user=ALICE, ports=[3000])
        daemon.create_json("bare", user=BOB, ports=[8080])
        _reboot(daemon)
        assert {e["name"] for e in daemon.ctl_json("ls", user=ALICE)} == {"always", "on-failure", "stopped"}
        assert daemon.ctl_json("ls", user=BOB) == []
        for policy, before in kept.items():
            daemon.ctl("wait", policy, "--timeout", "10", user=ALICE, check=True)
            after = _shown(daemon, policy)
            assert _lasting(after) == _lasting(before)
            assert (main_of(after)["state"], after["state"]) == ("running", "running")
            assert main_of(after)["pid"] != main_of(before)["pid"]
            assert ask(host, "tcp", "127.0.0.1", published(before), user=ALICE) == f"{policy} heard hello"
            assert ask(host, "tcp", before["address"], 3000, user=ALICE) == f"{policy} heard hello"
            assert ask(host, "tcp", "127.0.0.1", published(before), user=BOB) == "ECONNREFUSED"
        again = _shown(daemon, "stopped")
        assert (_lasting(again), again["state"]) == ({**_lasting(stopped), "state": "stopped"}, "stopped")
        daemon.ctl("start", "stopped", user=ALICE, check=True)
        events = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
        told = {kind: {e["name"] for e in events if e["event"] == kind} for kind in ("lost", "remade")}
        assert told == {"lost": {"once", "bare"}, "remade": {"always", "on-failure", "stopped"}}
        assert daemon.ctl_json("doctor")["differences"] == []
        # Once more, killed while it makes them again: the next start does it whole.
        pid = main_of(_shown(daemon, "always"))["pid"]
        daemon.kill()
        daemon.start()
        assert main_of(_shown(daemon, "always"))["pid"] == pid, "the same boot: nothing is interrupted"
        for name in ("always", "on-failure", "stopped"):
            daemon.ctl("rm", name, user=ALICE, check=True)
        assert daemon.ctl_json("doctor")["differences"] == []
        assert daemon.stop() == 0
        assert "nd" not in host.run(["ip", "-br", "link"], check=True).stdout.replace("uplink", "")


def test_a_port_that_is_taken_after_the_reboot_stays_whose_it_is(host: HostNamespace) -> None:
    with Daemon(host) as daemon:
        for name, port in (("web", 20000), ("db", 20001)):
            Api(daemon, ALICE).create(name, command=echo_server(name, 3000), restart="always",
                                      ports=[{"port": 3000, "publish": port}])

        def before() -> None:
            servers.append(host.popen(echo_server("theirs", 20000)))
            wait_until(lambda: ask(host, "tcp", "127.0.0.1", 20000) == "theirs heard hello", what="the host's server")

        servers: list[subprocess.Popen[bytes]] = []
        try:
            _reboot(daemon, before)
            assert [e["name"] for e in daemon.ctl_json("ls", user=ALICE)] == ["db"]
            for user in (None, ALICE, BOB):
                assert ask(host, "tcp", "127.0.0.1", 20000, user=user) == "theirs heard hello"
            assert [line for line in daemon.log().splitlines() if '"lost"' in line and "20000/tcp" in line]
            assert daemon.ctl_json("doctor")["differences"] == []
        finally:
            for server in servers:
                server.kill()
                server.wait()


def test_where_its_name_is_taken_after_the_reboot_an_environment_has_another(host: HostNamespace) -> None:
    with Daemon(host) as daemon:
        for name in ("web", "db"):
            Api(daemon, ALICE).create(name, restart="always")
        daemon.kill()
        host.run(["sh", "-ec", "ip netns delete web; ip netns add web"], check=True)
        theirs = os.stat(host.path("/run/netns/web")).st_ino
        boot_id = host.write(f"{daemon.base}/boot_id", f"{uuid.uuid4()}\n")
        host.run(["mount", "--bind", boot_id, "/proc/sys/kernel/random/boot_id"], check=True)
        daemon.start()
        found = {e["name"]: e["netns"] for e in daemon.ctl_json("ls", user=ALICE)}
        assert found == {"web": "/run/netns/web.alice", "db": "/run/netns/db"}
        for name in found:
            daemon.ctl("wait", name, "--timeout", "10", user=ALICE, check=True)
        assert os.stat(host.path("/run/netns/web")).st_ino == theirs
        assert daemon.ctl_json("doctor")["differences"] == []
