"""From a command of an environment to what the launcher is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from netnsd.core.environment import Command, Environment, Service
from netnsd.core.interfaces import Adapters, Launch
from netnsd.errors import LaunchFailed

if TYPE_CHECKING:
    from netnsd.core.actor import Actor


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


def as_now(service: Service, account: Actor) -> Service:
    """A service with those of its creator's groups only that a login would still give."""
    groups = {account.gid, *account.groups}
    command = replace(service.command, groups=tuple(g for g in service.command.groups if g in groups),
                      gid=service.command.gid if service.command.gid in groups else account.gid)
    return service.changed(command=command)


def started_again(environment: Environment, service: Service, account: Actor | None) -> Service:
    """A service as it may be started again; ``account``: who its owner's number is now.

    Raises LaunchFailed where it is nobody, or somebody else: numbers are given again, and whoever has this one now did
    not ask for that command. Who never had an account keeps no group but the first.
    """
    if account is None and environment.user == str(environment.uid):
        return service.changed(command=replace(service.command, groups=()))
    if account is None or account.user != environment.user:
        raise LaunchFailed(f"there is no user {environment.user!r} any more", stage="account", errno="ENOENT",
                           hint="Remove the environment; whoever has the number now can create it again.")
    return as_now(service, account)
