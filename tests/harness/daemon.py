"""netnsd on a disposable host: started, killed, restarted, asked."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from tests.harness import cgroups
from tests.harness.host import HostNamespace
from tests.harness.users import User
from tests.harness.waiting import wait_until

Section = Mapping[str, str | int | bool | Sequence[str]]
_START_SECONDS = 10.0
_STOP_SECONDS = 15.0


class Daemon:
    """``netnsd serve`` with directories, socket and cgroup of its own.

    ``config`` has sections of netnsd.toml, which override the harness's. Not started: use it as a context, or call
    ``start``. The end of the context stops the daemon and kills the launcher and all servers; environments' namespaces
    go with the host.
    """

    def __init__(self, host: HostNamespace, *, config: Mapping[str, Section] | None = None, name: str = "d",
                 env: Mapping[str, str] | None = None) -> None:
        self.host = host
        self.base = host.directory(f"/run/test/{name}")
        self.runtime_dir = f"{self.base}/run"
        self.state_dir = f"{self.base}/state"
        self.socket = f"{self.runtime_dir}/netnsd.sock"
        self.cgroup = host.daemon_cgroup
        self.config_file = f"{self.base}/netnsd.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self._env = dict(env or {})
        self.configure(config or {})

    def configure(self, config: Mapping[str, Section]) -> None:
        """Write netnsd.toml, the harness's own settings included; the next start reads it."""
        sections: dict[str, dict[str, Any]] = {
            "daemon": {"cgroup": self.host.daemon_cgroup_name, "socket_group": "netnsd"},
            # What fills behind the scenes would be met by tests that compare before and after.
            "pool": {"size": 0}}
        for section, values in config.items():
            sections.setdefault(section, {}).update(values)
        # JSON's strings, integers, booleans and lists of them are TOML's.
        self.host.write(self.config_file, "".join(
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            for section, values in sections.items()))

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self.process is not None, "the daemon was not started"
        return self.process.pid

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [program("netnsd"), "serve", "--config", self.config_file, "--runtime-dir", self.runtime_dir,
                "--state-dir", self.state_dir]

    def start(self) -> Self:
        """Start it and return when it says READY. Raises AssertionError with its log where it does not."""
        notify = f"{self.base}/notify"
        path = self.host.path(notify)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, open(self.host.path(self.log_file),
                                                                                "ab") as log:
            receiver.bind(str(path))
            self.process = self._spawn({"NOTIFY_SOCKET": notify, **self._env}, log)
            self._await_ready(receiver)
        return self

    def stop(self, *, seconds: float = _STOP_SECONDS) -> int:
        """SIGTERM; returns the exit code. Raises subprocess.TimeoutExpired where it does not end in time."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=5)

    def restart(self) -> None:
        """Stop it in peace, and start it again."""
        assert self.stop() == 0, f"the daemon did not end well:\n{self.log()}"
        self.start()

    @property
    def log_file(self) -> str:
        """Where its stdout and stderr go, over all of its starts."""
        return f"{self.base}/log"

    def log(self) -> str:
        """What it logged so far."""
        path = self.host.path(self.log_file)
        return path.read_text(errors="replace") if path.exists() else ""

    def launcher_pids(self) -> list[int]:
        """The host's processes that name our runtime directory and are not the daemon: the launcher, and its forks."""
        daemon = self.process.pid if self.process is not None else 0
        return [pid for pid in self.host.processes() if pid != daemon and self.runtime_dir in _command_line(pid)]

    def ctl(self, *arguments: str, user: User | str | None = None, check: bool = False,
            env: Mapping[str, str] | None = None, cwd: str | None = None, timeout: float = 30.0,
            stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run netnsctl as ``user`` (root by default), as HostNamespace.run does."""
        return self.host.run([program("netnsctl"), *arguments], user=user, check=check, cwd=cwd, timeout=timeout,
                             env={"NETNSD_SOCKET": self.socket, **(env or {})}, stdin=stdin)

    def ctl_json(self, *arguments: str, user: User | str | None = None, **options: Any) -> Any:
        """Run netnsctl with ``-o json``, which must succeed; returns what it printed. Put no ``--`` in: see create."""
        return json.loads(self.ctl(*arguments, "-o", "json", user=user, check=True, **options).stdout)

    def create_json(self, name: str, *command: str, user: User | str | None = None, ports: Sequence[int | str] = (),
                    wait: bool = False, options: Sequence[str] = (), **run: Any) -> dict[str, Any]:
        """``netnsctl create``, which must succeed; returns the environment."""
        arguments = [part for port in ports for part in ("--port", str(port))] + (["--wait"] if wait else [])
        tail = ["--", *command] if command else []
        done = self.ctl("create", name, *arguments, *options, "-o", "json", *tail, user=user, check=True, **run)
        environment: dict[str, Any] = json.loads(done.stdout)
        return environment

    def close(self) -> None:
        """End the daemon, the launcher and every server. The host stays."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"SIGTERM did not end the daemon in {_STOP_SECONDS} s:\n{self.log()}") from None
            finally:
                self._end_the_rest()
        else:
            self._end_the_rest()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._end_the_rest()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            sys.stderr.write(f"--- the daemon's log\n{self.log()}---\n")
        self.close()

    def _spawn(self, env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return self.host.popen(self.command, env=env, stdout=log, stderr=log)

    def _end_the_rest(self) -> None:
        for pid in self.launcher_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cgroups.kill(self.cgroup)
        limits = cgroups.limits_of(self.host.daemon_cgroup_name)
        wait_until(lambda: not self.launcher_pids() and all(map(cgroups.remove, (self.cgroup, *limits))),
                   what="the end of all servers")

    def _await_ready(self, receiver: socket.socket) -> None:
        assert self.process is not None
        deadline = time.monotonic() + _START_SECONDS
        with _pidfd(self.process.pid) as ended:
            messages = receiver.fileno()
            while True:
                readable, _, _ = select.select([messages, ended], [], [], max(0.0, deadline - time.monotonic()))
                if messages in readable and b"READY=1" in receiver.recv(4096).split(b"\n"):
                    return
                if ended in readable:
                    raise AssertionError(f"the daemon ended with {self.process.wait()} at its start:\n{self.log()}")
                if not readable:
                    self.kill()
                    raise AssertionError(f"the daemon was not ready after {_START_SECONDS} s:\n{self.log()}")


def program(name: str) -> str:
    """A command of the virtual environment that the tests run in; any user can execute it."""
    return f"{sys.prefix}/bin/{name}"


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
