"""netnsd's units under systemd: what is restarted, stopped, killed and hung, and what servers notice of it: nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
import trustme

from tests.harness import ALICE, BOB, Container, wait_until
from tests.systemd.lines import Server, messages

# The first of them waits for pip, on a busy machine.
pytestmark = pytest.mark.timeout(120)

DAEMON, LAUNCHER, ENVIRONMENTS = "netnsd.service", "netnsd-launcher.service", "netnsd-environments.service"

# Makes a loop hang for good: a signal's handler runs in the loop's own thread, and never returns.
HANG = """
import signal, time
def hang(*_):
    while True:
        time.sleep(1)
signal.signal(signal.SIGUSR1, hang)
"""


@pytest.fixture(scope="module")
def server(container: Container) -> Server:
    """Alice's; whatever happens to it, each test finds it serving."""
    return Server.started(container, "web", ALICE)


@pytest.fixture
def daemon(container: Container) -> Iterator[Container]:
    """Leaves the daemon running, without drop-ins, however the test ended."""
    yield container
    container.remove_drop_in(DAEMON)
    container.systemctl("reset-failed", "netnsd*", check=False)
    container.systemctl("start", DAEMON)


def active(container: Container, unit: str) -> str:
    return container.property(unit, "ActiveState")


def pid(container: Container, unit: str) -> int:
    return int(container.property(unit, "MainPID"))


def await_another(container: Container, unit: str, before: int) -> None:
    wait_until(lambda: pid(container, unit) not in (0, before) and active(container, unit) == "active", seconds=15,
               what=f"another {unit}")


# -- start, stop, journal ---------------------------------------------------------------------------------------


def test_start_returns_when_the_daemon_is_ready(daemon: Container) -> None:
    daemon.systemctl("restart", DAEMON)
    assert active(daemon, DAEMON) == "active"
    order = [entry["MESSAGE"] for entry in daemon.journal(DAEMON)]
    ready = max(number for number, message in enumerate(order) if '"event":"ready"' in message)
    started = max(number for number, message in enumerate(order) if message.startswith("Started netnsd.service"))
    starting = max(number for number, message in enumerate(order) if message.startswith("Starting netnsd.service"))
    # What the daemon logs and what systemd logs reach the journal on two ways, and are in order in each only.
    assert starting < started
    assert starting < ready
    assert int(daemon.property(DAEMON, "WatchdogTimestampMonotonic")) > 0
    assert daemon.ctl_json("info")["pid"] == pid(daemon, DAEMON)


def test_start_fails_when_the_daemon_does_not_say_that_it_is_ready(daemon: Container) -> None:
    daemon.drop_in(DAEMON, "[Service]\nTimeoutStartSec=1\nExecStart=\nExecStart=sleep 60\nRestart=no\n")
    daemon.systemctl("restart", DAEMON, check=False)
    assert (active(daemon, DAEMON), daemon.property(DAEMON, "Result")) == ("failed", "timeout")


def test_all_units_are_enabled_and_run_without_a_complaint(daemon: Container) -> None:
    enabled = ["netnsd.socket", "netnsd-attach.socket", "netnsd-launcher.socket", DAEMON, LAUNCHER]
    assert daemon.systemctl("is-enabled", *enabled).split() == ["enabled"] * 5
    assert daemon.systemctl("is-active", *enabled, ENVIRONMENTS).split() == ["active"] * 6
    assert daemon.systemctl("is-system-running", check=False).strip() == "running"


def test_systemd_has_nothing_to_say_against_the_installed_units(daemon: Container) -> None:
    units = [path.name for path in daemon.path("/etc/systemd/system").glob("netnsd*") if path.is_file()]
    done = daemon.run(["systemd-analyze", "verify", *units])
    assert (len(units), done.returncode, done.stdout, done.stderr) == (6, 0, "", "")


def test_journal_has_the_daemons_lines_as_objects(daemon: Container) -> None:
    daemon.ctl("create", "noted", user=BOB)
    daemon.ctl("rm", "noted", user=BOB)
    kinds = [(line["event"], line["level"], line["uid"]) for line in messages(daemon, DAEMON)
             if line.get("name") == "noted"]
    assert kinds == [(event, "info", BOB.uid) for event in ("created", "audit", "removed", "audit")]
    assert all("timestamp" in line for line in messages(daemon, DAEMON))


def test_stop_ends_the_daemon_and_no_server(daemon: Container, server: Server) -> None:
    identity = server.identity()
    with server.line():
        daemon.systemctl("stop", DAEMON)
        assert (active(daemon, DAEMON), daemon.property(DAEMON, "Result")) == ("inactive", "success")
        assert daemon.run(["ps", "-o", "comm=", "-p", str(identity[3])]).stdout.strip() == "python3"
        assert daemon.systemctl("is-active", "netnsd.socket", LAUNCHER, ENVIRONMENTS).split() == ["active"] * 3
        daemon.systemctl("start", DAEMON)
    assert server.identity() == identity


@pytest.mark.parametrize("command", [("ls",), ("exec", "web", "--", "true")], ids=["api", "attach"])
def test_a_client_starts_the_daemon_and_is_answered(daemon: Container, server: Server, command: tuple[str]) -> None:
    daemon.systemctl("stop", DAEMON)
    done = daemon.ctl(*command, user=ALICE)
    assert done.returncode == 0
    assert active(daemon, DAEMON) == "active"


def test_a_configuration_that_cannot_be_is_not_tried_again(daemon: Container) -> None:
    file = daemon.path("/etc/netnsd/netnsd.toml")
    file.write_text("[daemon]\nno_such_key = 1\n")
    try:
        daemon.systemctl("restart", DAEMON, check=False)
        seen = [daemon.property(DAEMON, name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]
        assert seen == ["failed", "78", "0"]
        assert any("no_such_key" in entry["MESSAGE"] for entry in daemon.journal(DAEMON, "--lines", "10"))
    finally:
        file.unlink()


# -- restart and kill -------------------------------------------------------------------------------------------


def test_restart_of_the_daemon_drops_no_connection(daemon: Container, server: Server) -> None:
    identity, before = server.identity(), pid(daemon, DAEMON)
    with server.line():
        daemon.systemctl("restart", DAEMON)
        assert pid(daemon, DAEMON) != before
        assert server.identity() == identity


def test_clients_wait_while_the_daemon_restarts(daemon: Container, server: Server) -> None:
    script = "i=0; while [ $i -lt 10 ]; do netnsctl ls -q >/dev/null || exit 1; i=$((i+1)); done"
    asking = daemon.popen(["sh", "-c", script], user=ALICE)
    daemon.systemctl("restart", DAEMON)
    daemon.systemctl("restart", DAEMON)
    assert asking.stdout is not None
    assert asking.wait(timeout=30) == 0, asking.stdout.read().decode()


def test_a_killed_daemon_is_started_again_and_drops_no_connection(daemon: Container, server: Server) -> None:
    identity, before = server.identity(), pid(daemon, DAEMON)
    with server.line():
        daemon.systemctl("kill", "--signal", "KILL", DAEMON)
        await_another(daemon, DAEMON, before)
        assert server.identity() == identity
    assert server.answers()


def test_a_hung_loop_is_killed_and_started_again(daemon: Container, server: Server) -> None:
    identity = server.identity()
    daemon.path("/run/hang").mkdir()
    daemon.path("/run/hang/sitecustomize.py").write_text(HANG)
    daemon.drop_in(DAEMON, "[Service]\nWatchdogSec=1\nEnvironment=PYTHONPATH=/run/hang\n")
    daemon.systemctl("restart", DAEMON)
    restarts, before = int(daemon.property(DAEMON, "NRestarts")), pid(daemon, DAEMON)
    with server.line():
        daemon.run(["kill", "-USR1", str(before)], check=True)
        await_another(daemon, DAEMON, before)
        assert server.identity() == identity
    assert int(daemon.property(DAEMON, "NRestarts")) == restarts + 1
    said = [entry["MESSAGE"] for entry in daemon.journal(DAEMON)]
    assert any("Watchdog timeout" in message for message in said)


def test_a_loop_that_does_not_hang_is_left_alone(daemon: Container) -> None:
    daemon.drop_in(DAEMON, "[Service]\nWatchdogSec=1\n")
    daemon.systemctl("restart", DAEMON)
    before, since = pid(daemon, DAEMON), int(daemon.property(DAEMON, "WatchdogTimestampMonotonic"))
    wait_until(lambda: int(daemon.property(DAEMON, "WatchdogTimestampMonotonic")) > since + 2_500_000, seconds=10,
               what="two seconds and a half of watching")
    assert pid(daemon, DAEMON) == before


@pytest.mark.parametrize("how", [("restart",), ("kill", "--signal", "KILL")], ids=["restart", "kill"])
def test_the_launcher_ends_without_servers_or_the_daemon(daemon: Container, server: Server, how: tuple[str]) -> None:
    identity, before, launcher = server.identity(), pid(daemon, DAEMON), pid(daemon, LAUNCHER)
    with server.line():
        daemon.systemctl(*how, LAUNCHER)
        await_another(daemon, LAUNCHER, launcher)
        another = Server.started(daemon, "another", BOB)
        assert server.identity() == identity
    assert another.answers()
    another.remove()
    assert pid(daemon, DAEMON) == before


def test_a_running_command_outlives_the_launcher_and_the_daemon(daemon: Container, server: Server) -> None:
    command = ["sh", "-c", "echo begun; read line; echo $line; exit 7"]
    session = daemon.popen(["netnsctl", "exec", "-T", server.name, "--", *command], user=ALICE, stdin=subprocess.PIPE)
    assert session.stdin is not None
    assert session.stdout is not None
    assert session.stdout.readline() == b"begun\n"
    launcher = pid(daemon, LAUNCHER)
    daemon.systemctl("restart", LAUNCHER, DAEMON)
    assert pid(daemon, LAUNCHER) != launcher
    said, _ = session.communicate(b"ended\n", timeout=20)
    assert (said, session.returncode) == (b"ended\n", 7)


def test_reload_compares_and_mends_in_the_same_process(daemon: Container, server: Server) -> None:
    before = pid(daemon, DAEMON)
    setting = "/proc/sys/net/ipv4/conf/ndbr0/route_localnet"
    # Nobody is told of it: without a reload it would be found within a minute.
    daemon.run(["sh", "-c", f"echo 0 >{setting}"], check=True)
    daemon.systemctl("reload", DAEMON)
    wait_until(lambda: daemon.run(["cat", setting]).stdout == "1\n", seconds=15, what="the mending")
    assert pid(daemon, DAEMON) == before
    assert server.answers()


# -- the sandbox ------------------------------------------------------------------------------------------------


def test_the_sandbox_takes_away_nothing_that_the_kernel_offers(daemon: Container) -> None:
    script = "import json; from netnsd.kernel import host; print(json.dumps(host.features()))"
    outside = daemon.run(["/opt/netnsd/current/bin/python", "-c", script], check=True).stdout
    features = json.loads(outside)
    assert features.items() <= daemon.ctl_json("info")["features"].items()
    checks = {check["name"]: check["ok"] for check in daemon.ctl_json("doctor")["checks"]}
    # In a container there are no controllers of limits.
    assert {name for name, is_good in checks.items() if not is_good and not name.startswith("limit_")} <= {
        "other-firewalls"}


def test_servers_are_looked_at_from_the_sandbox(daemon: Container) -> None:
    command = ["python3", "-m", "http.server", "3000"]
    for check in ("tcp:3000", "http:3000/"):
        daemon.ctl("create", "hale", "--port", "3000", "--health", check, "--health-interval", "1", "--wait", "--",
                   *command, user=BOB)
        (service,) = daemon.ctl_json("show", "hale", user=BOB)["services"]
        assert service["health"] == "healthy"
        daemon.ctl("rm", "hale", user=BOB)


def test_the_api_listens_for_tcp_with_tls_from_the_sandbox(daemon: Container) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    directory = daemon.path("/etc/netnsd")
    written = {
        "cert.pem": "".join(blob.bytes().decode() for blob in issued.cert_chain_pems),
        "key.pem": issued.private_key_pem.bytes().decode(), "ca.pem": authority.cert_pem.bytes().decode(),
        "netnsd.toml": '[api]\nlisten = "0.0.0.0:7070"\ntls_certificate = "/etc/netnsd/cert.pem"\n'
                       'tls_key = "/etc/netnsd/key.pem"\n'}
    for name, text in written.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o644 if name == "ca.pem" else 0o600)
    try:
        daemon.systemctl("restart", DAEMON)
        token = daemon.ctl_json("token", "create", "ci", "--scope", "write", user=BOB)["token"]
        done = daemon.run(["curl", "-sS", "--cacert", "/etc/netnsd/ca.pem", "-H", f"Authorization: Bearer {token}",
                           "-d", '{"dev_id": "user123", "project": "p"}',
                           "https://127.0.0.1:7070/api/environments/start"], check=True)
        assert json.loads(done.stdout)["owner"]["user"] == "bob"
        daemon.ctl("rm", json.loads(done.stdout)["name"], user=BOB)
        daemon.ctl("token", "revoke", "ci", user=BOB)
    finally:
        for name in written:
            (directory / name).unlink()
        daemon.systemctl("restart", DAEMON)


def test_namespaces_are_the_hosts_and_outlive_the_daemon(daemon: Container) -> None:
    daemon.ctl("create", "seen", user=BOB)
    look = ["ip", "netns", "exec", "seen", "ip", "-brief", "address", "show", "eth0"]
    address = daemon.ctl_json("show", "seen", user=BOB)["address"]
    assert address in daemon.run(look, check=True).stdout
    daemon.systemctl("stop", DAEMON)
    assert address in daemon.run(look, check=True).stdout
    daemon.ctl("rm", "seen", user=BOB)
    assert daemon.run(look).returncode != 0


def test_rules_are_restored_from_the_sandbox(daemon: Container, server: Server) -> None:
    daemon.run(["nft", "flush", "ruleset"], check=True)
    wait_until(lambda: "owners" in daemon.run(["nft", "list", "ruleset"]).stdout, what="the rules")
    assert server.answers()


# -- the servers' own unit --------------------------------------------------------------------------------------


def test_servers_live_in_their_own_unit(daemon: Container, server: Server) -> None:
    pids = daemon.run(["sh", "-c", f"cat /proc/{server.identity()[3]}/cgroup"], check=True).stdout
    assert f"/system.slice/{ENVIRONMENTS}/netnsd/" in pids
    assert "web" not in daemon.property(DAEMON, "ControlGroup")


@pytest.mark.parametrize("how", ["stop", "keeper"])
def test_the_end_of_the_servers_unit_ends_servers_and_the_daemon_copes(
        daemon: Container, server: Server, how: str) -> None:
    identity = server.identity()
    if how == "stop":
        daemon.systemctl("stop", ENVIRONMENTS)
        assert active(daemon, DAEMON) == "inactive"
    else:
        daemon.systemctl("kill", "--kill-whom", "main", "--signal", "KILL", ENVIRONMENTS)
    wait_until(lambda: daemon.run(["kill", "-0", str(identity[3])]).returncode != 0, seconds=15,
               what="the server's end")
    wait_until(lambda: server.shown()["state"] == "stopped", seconds=15, what="the daemon's notice of it")
    # It needs the unit, and is restarted with it.
    wait_until(lambda: daemon.systemctl("is-active", DAEMON, ENVIRONMENTS, check=False).split() == ["active"] * 2,
               seconds=15, what="the daemon and the unit")
    assert server.identity()[:3] == identity[:3]
    daemon.ctl("start", server.name, user=ALICE)
    daemon.ctl("wait", server.name, "--timeout", "10", user=ALICE)
    assert server.answers()


def test_nothing_of_all_this_was_an_error_of_the_daemons(daemon: Container, server: Server) -> None:
    assert [json.dumps(line) for line in messages(daemon, DAEMON) if line["level"] in ("error", "critical")] == []
