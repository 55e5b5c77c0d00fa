"""From a command of an environment to what the launcher is told."""

from __future__ import annotations

from collections.abc import Callable

from netnsd.core.environment import Command, Environment
from netnsd.core.interfaces import Adapters, Launch


class Launching:
    """Makes launches.

    Args:
        hard_limits: what no command's limits may exceed.
        limited: is told of each environment whose limits hold now.
    """

    def __init__(self, adapters: Adapters, hard_limits: dict[str, int],
                 limited: Callable[[Environment], None]) -> None:
        self._a = adapters
        self._hard_limits = hard_limits
        self._limited = limited

    def launch_of(self, environment: Environment, command: Command, group: str, launch_id: str,
                  log_fd: int | None = None) -> Launch:
        """What the launcher is told to start ``command`` in ``environment``, whose ``group`` is there.

        Raises KernelError, StoreError and LimitUnavailable where its files or its limits cannot be had.
        """
        hosts, resolv = self._a.files.furnish(environment)
        joins = self._a.cgroups.limit(environment.slot.cgroup, environment.resources)
        self._limited(environment)
        return Launch(
            launch_id=launch_id, netns=environment.netns_path, cgroup=group, hostname=environment.name,
            argv=command.argv, env={**conveniences(environment), **command.env, **facts(environment)},
            cwd=command.cwd, uid=command.uid, gid=command.gid, groups=command.groups, umask=command.umask,
            limits=command.limits, hard_limits=self._hard_limits, setuid=command.setuid, hosts_file=hosts,
            resolv_file=resolv, log_fd=log_fd, joins=joins)


def conveniences(environment: Environment) -> dict[str, str]:
    """Variables that many servers read; the client's own values win."""
    variables = {"HOST": "0.0.0.0"}  # inside the namespace, where only the owner reaches it
    tcp = [p for p in environment.ports if p.protocol == "tcp"]
    if tcp:
        variables["PORT"] = str(tcp[0].port)
    return variables


def facts(environment: Environment) -> dict[str, str]:
    """Variables that say what the environment is."""
    variables = {"NETNSD_NAME": environment.name, "NETNSD_ID": environment.id, "NETNSD_IP": environment.slot.address}
    tcp = [p for p in environment.ports if p.protocol == "tcp"]
    if tcp:
        variables["NETNSD_URL"] = f"http://localhost:{tcp[0].published}/"
    return variables
