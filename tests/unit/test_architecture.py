"""The rooms of the architecture, as import-linter's contracts, and what those cannot say."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest

CHECKOUT = Path(__file__).parents[2]
# What the launcher consists of, beside the standard library: libc and the private modules next to it.
LAUNCHER_PART = re.compile(r"netnsd\.kernel\.(launcher|libc|_\w+)")
# Reached through netnsd.kernel's own package, which must stay free of imports.
PACKAGES = {"netnsd", "netnsd.kernel"}


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("netnsd", include_external_packages=True, cache_dir=None)


def reached_from(module: str) -> set[str]:
    """Everything that importing ``module`` imports, itself included."""
    found: set[str] = set()
    todo = {module}
    while todo:
        current = todo.pop()
        found.add(current)
        todo |= graph().find_modules_directly_imported_by(current) - found
        # Importing a.b.c runs a and a.b first.
        parent = current.rpartition(".")[0]
        if parent and parent not in found:
            todo.add(parent)
    return found


def test_contracts_hold() -> None:
    lint = Path(sys.prefix) / "bin" / "lint-imports"
    done = subprocess.run([lint, "--no-cache", "--config", CHECKOUT / "pyproject.toml"], cwd=CHECKOUT,
                          capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_launcher_is_standard_library_only() -> None:
    reached = reached_from("netnsd.kernel.launcher")
    strangers = {name for name in reached - PACKAGES if name.partition(".")[0] not in sys.stdlib_module_names
                 and not LAUNCHER_PART.fullmatch(name)}
    assert strangers == set()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_above_the_launcher_import_nothing(package: str) -> None:
    assert graph().find_modules_directly_imported_by(package) == set()


def test_client_starts_without_what_the_daemon_needs() -> None:
    # What really happens at a start, beside what the import graph says.
    program = ("import sys, netnsd.client.cli\n"
               "print(*sorted(set(sys.modules) & {'trio', 'pyroute2', 'msgspec', 'structlog', 'asyncio', 'yaml'}))\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == ""


# systemd.exec(5): each of these gives a unit a mount namespace of its own, where pinned namespaces are invisible to
# the host and die with the unit.
MOUNT_NAMESPACE = {
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories", "ExtensionImages",
    "InaccessiblePaths", "MountAPIVFS", "MountFlags", "MountImages", "NoExecPaths", "PrivateDevices", "PrivateIPC",
    "PrivateMounts", "PrivateTmp", "ProcSubset", "ProtectControlGroups", "ProtectHome", "ProtectKernelLogs",
    "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths",
    "RootDirectory", "RootImage", "TemporaryFileSystem",
}
# Kept by every descendant: users' servers.
INHERITED = {
    "AmbientCapabilities", "CapabilityBoundingSet", "LockPersonality", "MemoryDenyWriteExecute", "NoNewPrivileges",
    "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "SecureBits",
    "SystemCallArchitectures", "SystemCallFilter",
}


def settings(unit: str) -> dict[str, str]:
    lines = (CHECKOUT / "systemd" / unit).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("unit", ["netnsd.service", "netnsd-launcher.service"])
def test_units_stay_in_the_hosts_mount_namespace(unit: str) -> None:
    assert settings(unit).keys() & MOUNT_NAMESPACE == set()


def test_launchers_unit_puts_nothing_on_users_servers() -> None:
    unit = settings("netnsd-launcher.service")
    assert unit.keys() & INHERITED == set()
    assert unit["KillMode"] == "process"
    assert "Delegate" not in unit


def test_daemons_unit_is_notified_watched_and_keeps_its_directories() -> None:
    unit = settings("netnsd.service")
    assert (unit["Type"], unit["RuntimeDirectoryPreserve"], unit["StateDirectory"]) == ("notify", "yes", "netnsd")
    assert int(unit["WatchdogSec"]) > 0
    assert "Delegate" not in unit
