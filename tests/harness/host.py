"""A disposable host: its own network, mounts, host name and IPC, its own /run, users and resolv.conf.

The machine's network is never touched, and nothing is mounted or made on it but two cgroups. All of it goes when the
host is closed, and also when the test's process is killed: the process that holds the namespaces cleans up at the end
of its standard input.
"""

from __future__ import annotations

import itertools
import os
import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.harness import cgroups
from tests.harness.snapshot import RUN_ID, RUN_VARIABLE
from tests.harness.users import HOMES, ROOT, USERS, User, group_lines, passwd_lines

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SCRIPT = Path(__file__).with_name("host.sh")
# Where a host has the package ``tests``, for whoever cannot enter the checkout.
CODE = "/run/harness/code"
_START_SECONDS = 10.0
_CLOSE_SECONDS = 20.0
_numbers = itertools.count(1)


def tool(name: str) -> str:
    """The absolute path of a system tool. Raises LookupError where it is not installed."""
    found = shutil.which(name, path=PATH)
    if found is None:
        raise LookupError(f"{name} is not installed; scripts/setup --test installs what tests use")
    return found


def as_user(user: User | str | None) -> User:
    """A user by name; None is root."""
    if user is None or user == ROOT.name:
        return ROOT
    return user if isinstance(user, User) else USERS[user]


class Place:
    """Somewhere that commands can run: the namespaces of two processes, and a cgroup that holds what runs.

    ``network_pid`` has the network namespace, ``host_pid`` all the others.
    """

    def __init__(self, host_pid: int, network_pid: int, cgroup: str) -> None:
        self.host_pid = host_pid
        self.network_pid = network_pid
        self.cgroup = cgroup
        self._started: list[subprocess.Popen[Any]] = []

    def run(self, command: Sequence[str], *, user: User | str | None = None, env: Mapping[str, str] | None = None,
            cwd: str | None = None, timeout: float = 20.0, check: bool = False,
            stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is captured as text.

        ``env`` is added to a small, fixed environment. ``cwd`` is entered as root. ``timeout`` is in seconds, after
        which the command is killed and subprocess.TimeoutExpired raised. With ``check`` a failure raises
        AssertionError that shows all of it.
        """
        done = subprocess.run(self._entry(command, user, cwd), env=self._environment(user, env), capture_output=True,
                              text=True, errors="replace", timeout=timeout, check=False, cwd="/",
                              **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}))
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(self, command: Sequence[str], *, user: User | str | None = None, env: Mapping[str, str] | None = None,
              cwd: str | None = None, stdin: int | IO[Any] | None = subprocess.DEVNULL,
              stdout: int | IO[Any] | None = subprocess.PIPE, stderr: int | IO[Any] | None = subprocess.STDOUT,
              pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start a command; the pid is the command's own. Ended and reaped with the host at the latest."""
        process = subprocess.Popen(self._entry(command, user, cwd), env=self._environment(user, env), stdin=stdin,
                                   stdout=stdout, stderr=stderr, pass_fds=pass_fds, start_new_session=True, cwd="/")
        self._started.append(process)
        return process

    def get(self, url: str, *, user: User | str | None = None, timeout: float = 5.0,
            headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Fetch ``url`` with curl as ``user``: HTTP status and body; status 0 and curl's message where none came."""
        options = [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
        done = self.run([tool("curl"), "-sS", "--noproxy", "*", "--max-time", str(timeout), *options,
                         "-w", "\n%{http_code}", url], user=user, timeout=timeout + 5)
        body, _, status = done.stdout.rpartition("\n")
        return (int(status), body) if done.returncode == 0 else (0, done.stderr.strip())

    def reap(self) -> None:
        """Close the pipes of what was started, and collect its exit codes; it has ended, or is about to."""
        for process in self._started:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            process.wait(timeout=5)
        self._started.clear()

    def _entry(self, command: Sequence[str], user: User | str | None, cwd: str | None) -> list[str]:
        who = as_user(user)
        change = [tool("setpriv"), f"--reuid={who.uid}", f"--regid={who.gid}", "--init-groups"] if who.uid else []
        # The shell joins the cgroup and enters the directory, both inside; everything then execs, so pids are true.
        script = 'echo 0 >"$0/cgroup.procs" && cd "$1" && shift && exec "$@"'
        directory = cwd or (who.home if who.uid else "/")
        return [tool("nsenter"), f"--net=/proc/{self.network_pid}/ns/net", "--mount", "--uts", "--ipc",
                "-t", str(self.host_pid), "/bin/sh", "-c", script, self.cgroup, directory, *change, *command]

    @staticmethod
    def _environment(user: User | str | None, env: Mapping[str, str] | None) -> dict[str, str]:
        who = as_user(user)
        return {"PATH": PATH, "HOME": who.home, "USER": who.name, "LOGNAME": who.name, "SHELL": "/bin/sh",
                "LANG": "C.UTF-8", RUN_VARIABLE: RUN_ID, **(env or {})}


class HostNamespace(Place):
    """A disposable host.

    ``/run`` is a tmpfs of its own, ``/run/test`` is for tests' files, and users have homes. With ``uplink`` the host
    has ``uplink0`` (198.51.100.2/24) and a default route to ``outside`` (198.51.100.1), a network beside it that
    knows no way to anything behind the host. Needs root. Owns its processes: close it, or use it as a context.
    """

    ADDRESS = "198.51.100.2"
    OUTSIDE_ADDRESS = "198.51.100.1"

    def __init__(self, *, uplink: bool = False) -> None:
        number = next(_numbers)
        mount = cgroups.cgroup2_mount()
        self.daemon_cgroup_name = f"netnsd-test-{RUN_ID}-{number}"
        self.daemon_cgroup = f"{mount}/{self.daemon_cgroup_name}"
        cgroup = f"{mount}/netnsd-host-{RUN_ID}-{number}"
        self._holder = self._hold(cgroup)
        super().__init__(self._holder.pid, self._holder.pid, cgroup)
        self.outside: Place | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            self._await_ready()
            if uplink:
                self._connect()
            undo.pop_all()

    def path(self, inside: str) -> Path:
        """How the test's own process names ``inside``, an absolute path on the host."""
        return Path(f"/proc/{self.host_pid}/root{inside}")

    def directory(self, inside: str, *, user: User | str | None = None, mode: int = 0o755) -> str:
        """Make a directory on the host, owned by ``user``; returns ``inside``."""
        who = as_user(user)
        path = self.path(inside)
        path.mkdir(parents=True)
        path.chmod(mode)
        os.chown(path, who.uid, who.gid)
        return inside

    def write(self, inside: str, text: str, *, user: User | str | None = None, mode: int = 0o644) -> str:
        """Write a file on the host, owned by ``user``; returns ``inside``."""
        who = as_user(user)
        path = self.path(inside)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        os.chown(path, who.uid, who.gid)
        return inside

    def processes(self) -> list[int]:
        """What lives on the host, environments' servers included."""
        return sorted(cgroups.members(self.cgroup) + cgroups.members(self.daemon_cgroup))

    def close(self) -> None:
        """End everything on the host, and the host. Raises AssertionError where anything resists; twice is fine."""
        holder = self._holder
        if holder.returncode is not None:
            return
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        holder.stdin.close()
        try:
            holder.wait(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
        complaint = holder.stderr.read()
        holder.stdout.close()
        holder.stderr.close()
        self.reap()
        if self.outside is not None:
            self.outside.reap()
        assert holder.returncode == 0, f"the host did not end well ({holder.returncode}): {complaint}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _hold(self, cgroup: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": PATH, "TESTS": str(_SCRIPT.parents[1]),
            "HARNESS_CGROUP": cgroup, "DAEMON_CGROUP": self.daemon_cgroup,
            "PASSWD_LINES": passwd_lines(), "GROUP_LINES": group_lines(), "RESOLV": "nameserver 198.51.100.1\n",
            "HOMES": " ".join(f"{u.uid}:{u.gid}:{HOMES}/{u.name}" for u in USERS.values()), RUN_VARIABLE: RUN_ID,
        }
        # A session of its own, so that ^C in the terminal leaves it time to clean up.
        return subprocess.Popen([tool("unshare"), "--net", "--mount", "--uts", "--ipc", "--propagation", "private",
                                 "/bin/sh", str(_SCRIPT)], env=environment, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                cwd="/")

    def _await_ready(self) -> None:
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        readable, _, _ = select.select([self._holder.stdout], [], [], _START_SECONDS)
        line = self._holder.stdout.readline() if readable else ""
        if line != "ready\n":
            self._holder.kill()
            self._holder.wait()
            complaint = self._holder.stderr.read()
            for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
                if pipe is not None:
                    pipe.close()
            cgroups.remove(self.cgroup)
            raise AssertionError(f"no disposable host could be made: {complaint or 'no answer'}")

    def _connect(self) -> None:
        keeper = self.popen([tool("unshare"), "--net", "/bin/sh", "-c", "echo ready; exec cat"],
                            stdin=subprocess.PIPE, cwd="/")
        assert keeper.stdout is not None
        readable, _, _ = select.select([keeper.stdout], [], [], _START_SECONDS)
        assert readable, "the network outside did not come up"
        assert keeper.stdout.readline() == b"ready\n", "the network outside did not come up"
        self.outside = Place(self.host_pid, keeper.pid, self.cgroup)
        self.run([tool("ip"), "-batch", "-"], check=True, cwd="/", stdin=(
            f"link add uplink0 type veth peer name outside0 netns {keeper.pid}\n"
            f"address add {self.ADDRESS}/24 dev uplink0\n"
            "link set uplink0 up\n"))
        self.outside.run([tool("ip"), "-batch", "-"], check=True, cwd="/", stdin=(
            f"link set lo up\naddress add {self.OUTSIDE_ADDRESS}/24 dev outside0\nlink set outside0 up\n"))
        self.run([tool("ip"), "route", "add", "default", "via", self.OUTSIDE_ADDRESS], check=True, cwd="/")
