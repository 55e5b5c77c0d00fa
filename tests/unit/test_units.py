"""What the systemd units and the daemon must agree on, and what systemd itself says of them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from netnsd.daemon import config, main
from netnsd.daemon.node import API_SOCKET, ATTACH_SOCKET, LAUNCHER_SOCKET
from netnsd.errors import LauncherUnavailable
from netnsd.kernel import processes as processes_module
from netnsd.kernel.processes import LauncherProcesses

UNITS = Path(__file__).parents[2] / "systemd"


def lines(unit: str) -> list[tuple[str, str]]:
    """The assignments of a unit, in order; a line that ends with a backslash goes on."""
    text = (UNITS / unit).read_text(encoding="utf-8").replace("\\\n", " ")
    return [(key, value) for key, _, value in
            (line.partition("=") for line in text.splitlines() if not line.startswith(("#", "[")) and "=" in line)]


def values(unit: str, key: str) -> list[str]:
    return [word for name, value in lines(unit) if name == key for word in value.split()]


def test_daemon_leaves_the_launcher_and_its_socket_to_their_units() -> None:
    assert "--external-launcher" in values("netnsd.service", "ExecStart")


def test_options_of_the_daemons_unit_exist() -> None:
    given = {word for word in values("netnsd.service", "ExecStart") if word.startswith("--")}
    assert given <= {option for parameter in main.serve.params for option in parameter.opts}


def test_groups_are_made_below_the_unit_that_keeps_and_ends_servers() -> None:
    settings = dict(word.split("=", 1) for word in values("netnsd.service", "Environment"))
    cgroup = config.load(Path(os.devnull), settings).daemon.cgroup
    parts = cgroup.split("/")
    # Not the unit's own group, which the daemon would remove when it stops with nothing left.
    assert (parts[:2], len(parts)) == (["system.slice", "netnsd-environments.service"], 3)
    assert "netnsd-environments.service" in values("netnsd.service", "Requires")
    assert "netnsd-environments.service" in values("netnsd.service", "After")
    unit = dict(lines("netnsd-environments.service"))
    assert (unit["Delegate"], unit["KillMode"]) == ("yes", "control-group")


def test_what_keeps_the_group_does_not_live_in_the_group_itself() -> None:
    command = dict(lines("netnsd-environments.service"))["ExecStart"]
    moved = re.search(r"mkdir -p (\S+) && echo 0 >(\S+)/cgroup\.procs", command)
    assert moved is not None
    assert moved[1] == moved[2] != values("netnsd.service", "Environment")[0].rpartition("/")[2]


@pytest.mark.parametrize(("unit", "key", "name"), [
    ("netnsd.socket", "ListenStream", API_SOCKET), ("netnsd-attach.socket", "ListenStream", ATTACH_SOCKET),
    ("netnsd-launcher.socket", "ListenSequentialPacket", LAUNCHER_SOCKET)])
def test_sockets_are_where_daemon_and_clients_look_for_them(unit: str, key: str, name: str) -> None:
    assert values(unit, key) == [f"/run/netnsd/{name}"]
    if unit != "netnsd-launcher.socket":
        assert values(unit, "FileDescriptorName") == [name]


needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze: scripts/setup --test brings it")


@needs_systemd_analyze
def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        text = unit.read_text(encoding="utf-8").replace("ExecStart=netnsd ", f"ExecStart={sys.prefix}/bin/netnsd ")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    units = sorted(map(str, tmp_path.iterdir()))
    runtime = tmp_path / "runtime"  # as a user's manager, it leaves its traces there and none below /run
    runtime.mkdir()
    done = subprocess.run(["systemd-analyze", "--user", "verify", *units], capture_output=True, text=True, timeout=30,
                          check=False, env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)})
    # What is said of the machine's own units is not about ours.
    assert [line for line in done.stderr.splitlines() if "netnsd" in line] == []


# -- the daemon's sandbox ---------------------------------------------------------------------------------------

MOST_EXPOSED = 5.0


def comments(unit: str) -> str:
    return "\n".join(line for line in (UNITS / unit).read_text(encoding="utf-8").splitlines() if line.startswith("#"))


def exposure(unit: str, *arguments: str) -> str:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", *arguments, str(UNITS / unit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True,
                          env={**os.environ, "SYSTEMD_COLORS": "0"}).stdout


@needs_systemd_analyze
def test_exposure_of_the_daemon_is_bounded() -> None:
    found = re.search(r"Overall exposure level for netnsd.service: ([0-9.]+) ", exposure("netnsd.service"))
    assert found is not None
    assert 0 < float(found[1]) <= MOST_EXPOSED


@needs_systemd_analyze
def test_every_option_that_the_daemons_unit_does_not_set_is_justified_in_it() -> None:
    rows = json.loads(exposure("netnsd.service", "--json=short"))
    missing = [row["name"] for row in rows if row["set"] is False]
    assert len(missing) > 10  # there is no private mount namespace
    said = comments("netnsd.service")
    assert [name for name in missing if not is_justified(name, said)] == []


def is_justified(name: str, said: str) -> bool:
    """Whether a comment names the option, or those of its values that the unit leaves on."""
    option, _, value = name.partition("=~")
    if not value:  # RootDirectory=/RootImage=
        return any(part in said for part in re.findall(r"\w+=", name))
    kept = set(values("netnsd.service", option))
    prefix, _, alternatives = value.partition("(")
    patterns = [prefix + one for one in alternatives.rstrip(")").split("|")]
    found = {word for word in kept for pattern in patterns if fnmatch.fnmatchcase(word, pattern)}
    return bool(found) and all(re.search(rf"(?m)^#   (?:.*, )?{word}\b.*  \S", said) for word in found)


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["PrivateTmp=", "CapabilityBoundingSet=~CAP_KILL", "SystemCallFilter=~@mount",
                                  "RestrictAddressFamilies=~AF_(INET|INET6)"])
def test_an_option_without_a_reason_is_noticed(name: str) -> None:
    said = comments("netnsd.service")
    assert is_justified(name, said)
    silent = [line for line in said.splitlines() if not re.search(r"PrivateTmp|CAP_KILL|@mount|AF_INET", line)]
    assert not is_justified(name, "\n".join(silent))


def test_no_unit_of_ours_has_a_private_mount_namespace() -> None:
    # systemd.exec(5): each of these implies one.
    private = re.compile(r"Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|ProcSubset|"
                         r"Private(Tmp|Devices|Mounts|IPC|Users)|\w*Paths|Bind\w*Paths|Root\w+|TemporaryFileSystem|"
                         r"DynamicUser|MountFlags|MountAPIVFS|LoadCredential|NoExecPaths|ExtensionImages|LogNamespace")
    for unit in UNITS.glob("*.service"):
        assert [key for key, _ in lines(unit.name) if private.fullmatch(key)] == []


# -- the launcher's socket --------------------------------------------------------------------------------------


async def test_launcher_of_systemd_is_not_started_where_none_answers(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes_module, "START_SECONDS", 0.1)
    processes = LauncherProcesses(str(tmp_path / "l.sock"), str(tmp_path), [], starts=False)
    async with trio.open_nursery() as nursery:
        with pytest.raises(LauncherUnavailable):
            await nursery.start(processes.run)
    assert os.listdir(tmp_path) == []


def test_socket_of_systemds_launcher_stays_when_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "l.sock"
    path.touch()
    LauncherProcesses(str(path), str(tmp_path), [], starts=False).retire()
    assert path.exists()
    LauncherProcesses(str(path), str(tmp_path), []).retire()
    assert not path.exists()
