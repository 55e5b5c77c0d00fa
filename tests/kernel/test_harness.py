"""The disposable host, and that a planted leak of each kind is seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness import (
    ALICE,
    BOB,
    MALLORY,
    Daemon,
    HostNamespace,
    Snapshot,
    cgroups,
    differences,
    settle,
    wait_until,
)
from tests.harness.host import tool

# -- the host ---------------------------------------------------------------------------------------------------


def test_host_has_a_network_of_its_own(host: HostNamespace) -> None:
    outside = os.readlink("/proc/self/ns/net")
    assert host.run(["readlink", "/proc/self/ns/net"]).stdout.strip() != outside
    assert host.run(["ip", "-br", "link"]).stdout.split()[0] == "lo"
    assert host.run(["ping", "-c1", "-W1", "127.0.0.1"]).returncode == 0


def test_commands_run_as_the_user_with_all_groups_and_a_home(host: HostNamespace) -> None:
    done = host.run(["sh", "-c", "id -un; id -G; pwd; echo $HOME; touch file"], user="alice", check=True)
    assert done.stdout.split("\n")[:4] == ["alice", "61001 61010 61020", ALICE.home, ALICE.home]
    assert (host.path(ALICE.home) / "file").stat().st_uid == ALICE.uid


def test_users_have_no_capabilities_and_cannot_read_each_other(host: HostNamespace) -> None:
    status = host.run(["cat", "/proc/self/status"], user=BOB).stdout
    assert "CapEff:\t0000000000000000" in status
    assert host.run(["ls", ALICE.home], user=BOB).returncode != 0
    assert host.run(["ls", ALICE.home], user=ALICE).returncode == 0


def test_group_memberships_differ_as_the_users_say(host: HostNamespace) -> None:
    assert "netnsd" in host.run(["id", "-Gn"], user=BOB).stdout.split()
    assert host.run(["id", "-Gn"], user=MALLORY).stdout.split() == ["mallory"]


def test_dev_null_can_be_written_by_users(host: HostNamespace) -> None:
    assert host.run(["sh", "-c", "echo x >/dev/null"], user="bob").returncode == 0


def test_environment_is_small_and_takes_additions(host: HostNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETNSD_SOCKET", "/nowhere")
    names = {line.split("=")[0] for line in host.run(["env"], user="bob", env={"A": "1"}).stdout.splitlines()}
    assert "A" in names
    assert not any(name.startswith("NETNSD") for name in names)


def test_a_command_that_takes_too_long_is_killed(host: HostNamespace) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "60"], timeout=0.1)
    assert host.processes() == []


def test_a_failed_command_shows_its_output_when_checked(host: HostNamespace) -> None:
    with pytest.raises(AssertionError, match=r"ended with 3\nout\nerr"):
        host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=True)


def test_popen_gives_the_commands_own_pid(host: HostNamespace) -> None:
    process = host.popen(["sh", "-c", "echo $$"], user="alice")
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid


def test_get_returns_status_and_body_or_the_reason(host: HostNamespace) -> None:
    host.popen([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory",
                host.directory("/run/test/www"), "8000"], user="alice", stdout=subprocess.DEVNULL)
    host.write("/run/test/www/page", "hello\n")
    wait_until(lambda: host.get("http://127.0.0.1:8000/page", user="bob") == (200, "hello\n"), what="the server")
    assert host.get("http://127.0.0.1:8000/none")[0] == 404
    status, reason = host.get("http://127.0.0.1:8001/")
    assert status == 0
    assert "8001" in reason


def test_uplink_leads_to_the_network_outside_and_not_further(routed_host: HostNamespace) -> None:
    assert routed_host.outside is not None
    assert routed_host.run(["ping", "-c1", "-W2", routed_host.OUTSIDE_ADDRESS]).returncode == 0
    assert routed_host.outside.run(["ping", "-c1", "-W2", routed_host.ADDRESS]).returncode == 0
    assert routed_host.outside.run(["ip", "route", "get", "10.203.0.2"]).returncode != 0


def test_named_namespaces_stay_on_the_host(host: HostNamespace) -> None:
    host.run(["ip", "netns", "add", "web"], check=True)
    assert host.run(["ip", "netns", "list"]).stdout.split() == ["web"]
    assert host.path("/run/netns/web").exists()
    assert not os.path.exists("/run/netns/web")


def test_closing_ends_what_daemonised_itself_and_what_moved_to_the_daemons_cgroup() -> None:
    before = Snapshot.of_machine()
    host = HostNamespace()
    host.run(["sh", "-c", "setsid -f sleep 1000 >/dev/null 2>&1"], user="alice", check=True)
    moved = f"{host.daemon_cgroup}/nd0/main"
    host.run(["sh", "-c", f"mkdir -p {moved} && echo 0 >{moved}/cgroup.procs && setsid -f sleep 1000 >/dev/null 2>&1"],
             check=True)
    wait_until(lambda: [len(cgroups.members(path)) for path in (host.cgroup, host.daemon_cgroup)] == [1, 1],
               what="one process in each group")
    host.close()
    host.close()
    assert settle(before, Snapshot.of_machine) == []


def test_a_host_cleans_up_when_the_test_process_is_killed() -> None:
    before = Snapshot.of_machine()
    program = ("from tests.harness import HostNamespace\nimport signal\nhost = HostNamespace()\n"
               "host.popen(['sleep', '1000'])\nprint(host.cgroup, host.host_pid, flush=True)\nsignal.pause()\n")
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout is not None
        cgroup, holder = child.stdout.readline().split()
        wait_until(lambda: cgroups.members(cgroup), what="the host's process")
        child.kill()
    wait_until(lambda: not os.path.exists(cgroup) and not os.path.exists(f"/proc/{holder}"), what="the host's end")
    assert settle(before, Snapshot.of_machine) == []


# -- snapshots --------------------------------------------------------------------------------------------------


def _link(host: HostNamespace) -> None:
    host.run(["ip", "link", "add", "leak0", "type", "veth", "peer", "name", "leak1"], check=True)


def _address(host: HostNamespace) -> None:
    host.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)


def _route(host: HostNamespace) -> None:
    host.run(["ip", "route", "add", "blackhole", "192.0.2.0/24"], check=True)


def _neighbour(host: HostNamespace) -> None:
    _link(host)
    host.run(["ip", "neighbour", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:01", "dev", "leak0", "nud", "permanent"],
             check=True)


def _table(host: HostNamespace) -> None:
    host.run(["nft", "add table inet leak"], check=True)


def _element(host: HostNamespace) -> None:
    host.run(["nft", "-f", "-"], check=True, stdin="add table inet leak\n"
             "add map inet leak ports { type inet_service : ipv4_addr; }\n"
             "add element inet leak ports { 20000 : 10.203.0.2 }\n")


def _mount(host: HostNamespace) -> None:
    host.run(["mount", "-t", "tmpfs", "leak", host.directory("/run/test/leak")], check=True)


def _namespace(host: HostNamespace) -> None:
    host.run(["ip", "netns", "add", "leak"], check=True)


def _cgroup(host: HostNamespace) -> None:
    host.run(["mkdir", host.daemon_cgroup], check=True)


def _process(host: HostNamespace) -> None:
    host.popen(["sleep", "1000"], stdout=subprocess.DEVNULL)


def _file(host: HostNamespace) -> None:
    host.write("/run/test/leak", "")


@pytest.mark.parametrize(("kind", "plant"), [
    ("links", _link), ("addresses", _address), ("routes", _route), ("neighbours", _neighbour), ("tables", _table),
    ("elements", _element), ("mounts", _mount), ("namespaces", _namespace), ("cgroups", _cgroup),
    ("processes", _process), ("files", _file)])
def test_snapshot_of_a_host_sees_a_planted_leak(host: HostNamespace, kind: str,
                                               plant: Callable[[HostNamespace], None]) -> None:
    before = Snapshot.of_host(host)
    assert settle(before, lambda: Snapshot.of_host(host), seconds=0) == []
    plant(host)
    wait_until(lambda: any(line.startswith(f"{kind}: came ") for line in
                           differences(before, Snapshot.of_host(host))), what=f"the leak among {kind}")


@contextmanager
def _leaked_process() -> Iterator[None]:
    process = subprocess.Popen(["sleep", "1000"])
    yield
    process.kill()
    process.wait()


@contextmanager
def _leaked_namespace() -> Iterator[None]:
    process = subprocess.Popen([tool("unshare"), "--net", "sleep", "1000"])
    wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
    yield
    process.kill()
    process.wait()


@contextmanager
def _leaked_cgroup() -> Iterator[None]:
    path = f"{cgroups.cgroup2_mount()}/netnsd-planted-{os.getpid()}"
    os.mkdir(path)
    yield
    os.rmdir(path)


@contextmanager
def _leaked_file() -> Iterator[None]:
    path = f"/run/netnsd-planted-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    yield
    os.unlink(path)


@pytest.mark.parametrize(("kind", "plant"), [
    ("processes", _leaked_process), ("namespaces", _leaked_namespace), ("cgroups", _leaked_cgroup),
    ("files", _leaked_file)])
def test_snapshot_of_the_machine_sees_a_planted_leak(kind: str, plant: Callable[[], Iterator[None]]) -> None:
    before = Snapshot.of_machine()
    with ExitStack() as stack:
        stack.enter_context(plant())  # type: ignore[arg-type]
        came = differences(before, Snapshot.of_machine())
    assert any(line.startswith(f"{kind}: came ") for line in came), came
    assert settle(before, Snapshot.of_machine, only_new=True) == []


def test_snapshot_of_the_machine_sees_a_link_a_table_and_a_mount_of_its_own_namespaces() -> None:
    # In a process that has namespaces of its own, since the machine's network is not ours to change.
    program = """
import subprocess
from tests.harness import Snapshot, differences
before = Snapshot.of_machine()
for command in ("ip link add leak0 type bridge", "nft add table ip leak", "mount -n -t tmpfs leak /mnt"):
    subprocess.run(command.split(), check=True)
print(*differences(before, Snapshot.of_machine()), sep="\\n")
"""
    done = subprocess.run([tool("unshare"), "--net", "--mount", "--propagation", "private", sys.executable, "-c",
                           program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=20,
                          check=True)
    assert {"links: came leak0", "tables: came ip leak", "mounts: came /mnt tmpfs 1"} <= set(done.stdout.splitlines())


# -- the daemon's harness ---------------------------------------------------------------------------------------

_READY = """
import os, signal, socket, subprocess
subprocess.Popen(["sleep", "1000"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"STATUS=x\\nREADY=1\\n", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


class StandIn(Daemon):
    """A program that behaves as a daemon does towards who starts it."""

    program = _READY

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.program, self.runtime_dir]


def test_daemon_is_started_restarted_killed_and_ended_with_all_it_started(host: HostNamespace) -> None:
    before = Snapshot.of_host(host)
    with StandIn(host) as daemon:
        first = daemon.pid
        daemon.restart()
        assert daemon.pid != first
        daemon.kill()
        assert daemon.process is not None
        assert daemon.process.returncode == -signal.SIGKILL
        daemon.start()
    host.run(["true"], check=True)
    left = [line for line in settle(before, lambda: Snapshot.of_host(host), seconds=0.5)
            if "/run/test" not in line and "sleep" not in line]
    assert left == []


def test_daemon_that_ends_at_its_start_shows_its_log(host: HostNamespace) -> None:
    class Broken(StandIn):
        program = "import sys; print('the reason'); sys.exit(78)"

    with pytest.raises(AssertionError, match=r"ended with 78 at its start:\nthe reason"), Broken(host):
        pytest.fail("it started")


def test_daemons_configuration_is_toml_with_the_harness_own_settings(host: HostNamespace) -> None:
    import tomllib

    daemon = Daemon(host, config={"ports": {"range": "20000-20010"}, "daemon": {"socket_mode": "0666"},
                                  "gateway": {"listen": ["127.0.0.1:7080"]}})
    assert tomllib.loads(host.path(daemon.config_file).read_text()) == {
        "daemon": {"cgroup": host.daemon_cgroup_name, "socket_group": "netnsd", "socket_mode": "0666"},
        "pool": {"size": 0}, "ports": {"range": "20000-20010"}, "gateway": {"listen": ["127.0.0.1:7080"]}}
