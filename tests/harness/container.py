"""A host with systemd as its first process: systemd-nspawn, over the machine's own files.

It has processes, network, mounts, cgroup and /run of its own, and what it writes is in memory. Limits do not bite where
the machine's cgroup v2 has no controllers. All of it goes when it is closed, and when the test's process is killed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import select
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import cgroups
from tests.harness.host import PATH, Place, as_user, tool
from tests.harness.snapshot import RUN_ID, RUN_VARIABLE
from tests.harness.users import USERS, User, group_lines, passwd_lines

CHECKOUT = Path(__file__).parents[2]
# Where the container sees them.
INSIDE_CHECKOUT, INSIDE_WHEELS = "/srv/checkout", "/srv/wheels"
_SCRIPT = Path(__file__).with_name("container.sh")
_BOOT_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_numbers = itertools.count(1)


class Container(Place):
    """A booted container without netnsd. Needs root and systemd-container. Use it as a context, or close it.

    The users of the harness are there, in no group of netnsd's: these come with the installation.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        name = f"netnsd-host-{RUN_ID}-c{number}"
        group = f"{cgroups.cgroup2_mount()}/{name}"
        self._console = ""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f"\0{name}")
            self._holder = self._hold(name)
            try:
                leader = self._await_boot(notify)
            except BaseException:
                self.close()
                raise
        super().__init__(leader, leader, f"{group}/payload")
        self.run(["mkdir", "-p", "/sys/fs/cgroup/harness"], check=True)
        for user in USERS.values():
            self.run(["install", "-d", "-m", "750", "-o", str(user.uid), "-g", str(user.gid), user.home], check=True)

    def path(self, inside: str) -> Path:
        """How the test's own process names ``inside``, an absolute path in the container."""
        return Path(f"/proc/{self.host_pid}/root{inside}")

    def written(self) -> dict[str, str]:
        """All that is not as on the machine, below no mount of its own: absolute paths, and what is there."""
        top = f"/proc/{self._holder.pid}/root/run/c/upper"
        paths = [f"{directory}/{name}".removeprefix(top)
                 for directory, directories, files in os.walk(top) for name in (*directories, *files)]
        found = {path: _content(top + path) for path in paths}
        return {path: content for path, content in found.items() if content != _content(path)}

    def systemctl(self, *arguments: str, check: bool = True, timeout: float = 30.0) -> str:
        """Run systemctl; what it printed on stdout."""
        return self.run([tool("systemctl"), *arguments], check=check, timeout=timeout).stdout

    def property(self, unit: str, name: str) -> str:
        """One property of a unit, such as MainPID."""
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def journal(self, unit: str, *arguments: str) -> list[dict[str, Any]]:
        """What the journal has of a unit, oldest first."""
        done = self.run([tool("journalctl"), "--unit", unit, "--output", "json", "--no-pager", *arguments], check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def install(self, checkout: str = INSIDE_CHECKOUT) -> subprocess.CompletedProcess[str]:
        """Run a checkout's scripts/install, with the wheels that scripts/setup kept; it has no network."""
        return self.run([f"{checkout}/scripts/install"], check=True, timeout=90,
                        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": INSIDE_WHEELS})

    def install_quickly(self, kept: Path) -> None:
        """The same, but the virtual environment, which takes most of it, is made once and copied from ``kept`` then."""
        prefix = self.path("/opt/netnsd")
        made = list(kept.iterdir())
        if made:
            self.run(["mkdir", "-p", "/opt/netnsd"], check=True)
            _copy(made[0], prefix)
        self.install()
        if not made:
            _copy(prefix / (prefix / "current").readlink().name, kept)

    def ctl(self, *arguments: str, user: User | str | None = None, check: bool = True,
            timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run the installed netnsctl as ``user`` (root by default)."""
        return self.run(["netnsctl", *arguments], user=user, check=check, timeout=timeout)

    def ctl_json(self, *arguments: str, user: User | str | None = None) -> Any:
        """The same with ``-o json``; what it printed. Put no ``--`` in."""
        return json.loads(self.ctl(*arguments, "-o", "json", user=user).stdout)

    def drop_in(self, unit: str, text: str) -> None:
        """Write a drop-in for a unit, in place of the one before, and have systemd read it."""
        directory = self.path(f"/run/systemd/system/{unit}.d")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "test.conf").write_text(text, encoding="utf-8")
        self.systemctl("daemon-reload")

    def remove_drop_in(self, unit: str) -> None:
        """Undo ``drop_in``."""
        self.path(f"/run/systemd/system/{unit}.d/test.conf").unlink(missing_ok=True)
        self.systemctl("daemon-reload")

    def close(self) -> None:
        """End everything in the container, and the container. Raises AssertionError where anything resists."""
        holder = self._holder
        if holder.returncode is not None:
            return
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.close()
        try:
            holder.wait(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
        self._console += holder.stdout.read()
        holder.stdout.close()
        if hasattr(self, "_started"):
            self.reap()
        assert holder.returncode == 0, f"the container did not end well ({holder.returncode}): {self._console}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _entry(self, command: Sequence[str], user: User | str | None, cwd: str | None) -> list[str]:
        """As on a disposable host, and with the container's processes: nsenter forks, and the pid is nsenter's."""
        who = as_user(user)
        change = [tool("setpriv"), f"--reuid={who.uid}", f"--regid={who.gid}", "--init-groups"] if who.uid else []
        script = 'echo 0 >/sys/fs/cgroup/harness/cgroup.procs; cd "$1" && shift && exec "$@"'
        return [tool("nsenter"), "--all", "-t", str(self.host_pid), "/bin/sh", "-c", script, "sh",
                cwd or (who.home if who.uid else "/"), *change, *command]

    def _hold(self, name: str) -> subprocess.Popen[str]:
        environment: Mapping[str, str] = {
            "PATH": PATH, "CGROUP": name, "NOTIFY_SOCKET": f"@{name}", "MACHINE_ID": uuid.uuid4().hex,
            "PASSWD_LINES": passwd_lines(),
            "GROUP_LINES": "".join(f"{line}\n" for line in group_lines().splitlines()
                                   if not line.startswith(("netnsd:", "netnsd-admin:"))),
            "CHECKOUT": str(CHECKOUT), "WHEELS": f"{sys.prefix}/wheels", RUN_VARIABLE: RUN_ID,
        }
        # A session of its own, so that ^C in the terminal leaves it time to clean up.
        return subprocess.Popen([tool("unshare"), "--mount", "--propagation", "private", "/bin/sh", str(_SCRIPT)],
                                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, cwd="/")

    def _await_boot(self, notify: socket.socket) -> int:
        """The pid of its init, once it has booted. Raises AssertionError with what its console shows."""
        assert self._holder.stdout is not None
        leader = 0
        deadline = time.monotonic() + _BOOT_SECONDS
        while True:
            sources = [notify.fileno(), self._holder.stdout.fileno()]
            readable, _, _ = select.select(sources, [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise AssertionError(f"the container has not booted after {_BOOT_SECONDS} s:\n{self._console}")
            if notify.fileno() in readable:
                lines = notify.recv(4096).decode().splitlines()
                leader = next((int(line.partition("=")[2]) for line in lines
                               if line.startswith("X_NSPAWN_LEADER_PID=")), leader)
                if "READY=1" in lines:
                    return leader
            elif not (part := os.read(self._holder.stdout.fileno(), 65536)):
                raise AssertionError(f"the container ended at its start:\n{self._console}")
            else:
                self._console += part.decode(errors="replace")




def _copy(source: Path, target: Path) -> None:
    """Copy a directory with its name into another."""
    subprocess.run(["cp", "-a", "--", str(source), str(target)], check=True, timeout=60)


def _content(path: str) -> str:
    """What is at a path, so that two can be compared. An overlay has a device 0:0 for what was removed."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return f"link to {os.readlink(path)}"
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # not there, on the machine
        return ""
    return "" if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0 else f"{stat.S_IFMT(status.st_mode):o}"
