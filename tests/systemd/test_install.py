"""scripts/install and scripts/uninstall on a host where nothing of netnsd's is, and that nothing of it is left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, CAROL, MALLORY, Container, wait_until
from tests.harness.container import INSIDE_CHECKOUT
from tests.systemd.lines import Server

# pip takes long on a busy machine.
pytestmark = pytest.mark.timeout(240)

UNITS = ["netnsd.socket", "netnsd-attach.socket", "netnsd-launcher.socket", "netnsd.service",
         "netnsd-launcher.service", "netnsd-environments.service"]
# What other programs write at any time, and what Debian's own tools keep beside the files that they change.
OTHERS = re.compile(r"/var/(log|lib/systemd|lib/private|tmp|cache)\b|/run/|/root\b|/etc/(\.pwd\.lock|\w+-|\w+\.lock)$")
NEWER = "/srv/newer"


@pytest.fixture
def host(bare: Container) -> Iterator[Container]:
    """A container in which nothing of netnsd's is before the test, and is made to be so after it."""
    yield bare
    uninstall(bare, "--purge")


def inventory(host: Container) -> dict[str, Any]:
    """What is on a host: files that were written, groups, and what the kernel has."""
    def said(*command: str) -> list[str]:
        return sorted(host.run(command, check=True).stdout.splitlines())

    groups = host.path("/sys/fs/cgroup")
    return {
        "files": {f"{path} {content}" for path, content in host.written().items() if not OTHERS.match(path)},
        "run": set(said("find", "/run", "/tmp", "-maxdepth", "3", "-not", "-path", "/run/systemd/*",
                        "-not", "-path", "/run/log/*", "-not", "-path", "/run/credentials/*")),
        "groups": said("cat", "/etc/group"), "gshadow": said("cat", "/etc/gshadow"),
        "links": said("ip", "-br", "link"), "addresses": said("ip", "-br", "address"),
        "routes": said("ip", "route", "show", "table", "all"), "rules": said("nft", "list", "ruleset"),
        "mounts": said("sh", "-c", "cut -d ' ' -f 5 /proc/self/mountinfo | grep -v ^/run/credentials"),
        "forwarding": said("sh", "-c", "grep . /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv4/ip_forward"),
        "cgroups": sorted(str(path.relative_to(groups)) for path in groups.rglob("*netnsd*")),
        "processes": said("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -ao 'netnsd[-a-z]*' || :"),
        "units": said("systemctl", "list-units", "--all", "--plain", "--no-legend", "netnsd*"),
        "unit files": said("sh", "-c", "systemctl list-unit-files --no-legend 'netnsd*' || :"),  # 1 where there is none
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """By kind, what came and what went."""
    return {kind: (sorted(set(after[kind]) - set(before[kind])), sorted(set(before[kind]) - set(after[kind])))
            for kind in before if set(after[kind]) != set(before[kind])}


def state_of(host: Container) -> dict[str, Any]:
    """What a second installation must not touch."""
    paths = [path for path in host.written() if path.startswith(("/opt/netnsd", "/usr/local/bin", "/etc/systemd"))]
    return {"files": {path: host.path(path).lstat().st_mtime_ns for path in paths if "__pycache__" not in path},
            "pids": [host.property(unit, "MainPID") for unit in UNITS if unit.endswith("service")],
            "since": [host.property(unit, "ActiveEnterTimestampMonotonic") for unit in UNITS]}


def uninstall(host: Container, *options: str) -> None:
    host.run([f"{INSIDE_CHECKOUT}/scripts/uninstall", *options], check=True, timeout=60)


def enrol(host: Container, *users: str) -> None:
    for user in users:
        host.run(["usermod", "-aG", "netnsd", user], check=True)


def test_users_can_use_what_is_installed_and_upgraded_and_nothing_is_left_of_it(host: Container, kept: Path) -> None:
    before = inventory(host)
    host.install_quickly(kept)
    assert host.systemctl("is-active", *UNITS).split() == ["active"] * len(UNITS)
    enrol(host, "alice", "bob")
    server = Server.started(host, "web", ALICE)
    host.ctl("create", "web", user=BOB)
    host.ctl("template", "add", "kept", "--warm", "1", "--", "sleep", "600", user=BOB)
    refused = host.ctl("ls", user=MALLORY, check=False)
    assert (refused.returncode, "group" in refused.stderr) == (7, True)

    with server.line():
        state = state_of(host)
        host.install()
        assert state_of(host) == state
        identity = server.identity()
        host.install(newer(host))
        assert server.identity() == identity
    assert server.answers()
    check_that_the_newer_runs(host)

    uninstall(host)
    left = changed(before, wait_settled(host, before, {"files", "groups", "gshadow"}))
    assert set(left) == {"files", "groups", "gshadow"}
    assert {line.split(":")[0] for line in left["groups"][0]} == {"netnsd", "netnsd-admin"}
    assert {file.split()[0] for file in left["files"][0]} == {
        "/etc/group", "/etc/gshadow", "/var/lib/netnsd", "/var/lib/netnsd/netnsd.db", "/var/lib/netnsd/lock"}

    uninstall(host, "--purge")
    assert changed(before, wait_settled(host, before, set())) == {}


def newer(host: Container) -> str:
    """A checkout of a later version, of which also a socket's and the servers' unit are others."""
    parts = "netnsd scripts systemd pyproject.toml README.md LICENSE"
    host.run(["sh", "-c", f"mkdir {NEWER} && cd {INSIDE_CHECKOUT} && cp -R {parts} {NEWER}"], check=True)
    version = host.path(f"{NEWER}/netnsd/__init__.py")
    version.write_text(re.sub(r'(__version__ = ").*"', r'\g<1>77.0"', version.read_text()))
    for unit in ("netnsd.socket", "netnsd-environments.service"):
        file = host.path(f"{NEWER}/systemd/{unit}")
        file.write_text(file.read_text() + "# newer\n")
    return NEWER


def check_that_the_newer_runs(host: Container) -> None:
    assert host.ctl_json("info")["version"] == "77.0"
    releases = sorted(path.name for path in host.path("/opt/netnsd").iterdir())
    assert (len(releases), releases[0][:5], releases[1]) == (2, "77.0-", "current")
    for unit in ("netnsd.service", "netnsd-launcher.service"):
        program = host.run(["cat", f"/proc/{host.property(unit, 'MainPID')}/cmdline"], check=True).stdout
        assert f"/opt/netnsd/{releases[0]}/" in program
    for unit in ("netnsd.socket", "netnsd-environments.service"):
        assert host.path(f"/etc/systemd/system/{unit}").read_text().endswith("# newer\n")
    host.run(["rm", "-r", NEWER], check=True)


def wait_settled(host: Container, before: dict[str, Any], expected: set[str]) -> dict[str, Any]:
    """The inventory, where only ``expected`` kinds changed; the kernel destroys namespaces a little later."""
    def look() -> dict[str, Any]:
        now = inventory(host)
        return now if set(changed(before, now)) <= expected else {}

    try:
        return wait_until(look, seconds=5, what="nothing left")
    except AssertionError:
        return inventory(host)


def test_an_installation_by_hand_is_taken_over_and_templates_outlive_their_daemon(
        host: Container, kept: Path) -> None:
    host.run(["sh", "-c", "mkdir -p /opt/netnsd/bin && touch /opt/netnsd/pyvenv.cfg"], check=True)
    host.run(["ln", "-s", "/opt/netnsd/bin/netnsd", "/opt/netnsd/bin/netnsctl", "/usr/local/bin/"], check=True)
    host.install_quickly(kept)
    assert sorted(path.name for path in host.path("/opt/netnsd").iterdir())[1:] == ["current"]
    enrol(host, "alice")
    host.ctl("template", "add", "kept", "--", "true", user=ALICE)
    host.ctl("create", "web", user=ALICE)
    # Whoever ended the daemon like that, it took nothing away.
    host.systemctl("kill", "--signal", "KILL", "netnsd.service")
    uninstall(host)
    assert host.run(["ip", "netns", "list"], check=True).stdout == ""
    host.install_quickly(kept)
    assert host.ctl("template", "ls", "-o", "name", user=ALICE).stdout.split() == ["kept"]
    assert host.ctl("ls", "-o", "name", user=ALICE).stdout == ""


def test_somebody_elses_program_is_not_replaced_and_nothing_is_changed(host: Container) -> None:
    host.run(["sh", "-c", "echo mine >/usr/local/bin/netnsctl"], check=True)
    before = inventory(host)
    refused = host.run([f"{INSIDE_CHECKOUT}/scripts/install"])
    assert (refused.returncode, "/usr/local/bin/netnsctl" in refused.stderr) == (1, True)
    assert changed(before, inventory(host)) == {}
    uninstall(host, "--purge")
    assert host.path("/usr/local/bin/netnsctl").read_text() == "mine\n"
    host.path("/usr/local/bin/netnsctl").unlink()


def test_an_installation_without_what_it_needs_leaves_no_half_of_one(host: Container) -> None:
    failed = host.run([f"{INSIDE_CHECKOUT}/scripts/install"], env={"PIP_NO_INDEX": "1"}, timeout=60)
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr
    assert not [path for path in host.written() if path.startswith(("/opt/netnsd/", "/etc/systemd/system/netnsd"))]


@pytest.mark.parametrize("script", ["install", "uninstall"])
def test_only_root_may(host: Container, script: str) -> None:
    refused = host.run([f"{INSIDE_CHECKOUT}/scripts/{script}"], user=CAROL)
    assert (refused.returncode, "needs root" in refused.stderr) == (1, True)
