"""A whole service on fakes, with the real state file."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from netnsd import wire
from netnsd.core.actor import Actor
from netnsd.core.addressing import Plan
from netnsd.core.environments import Environments
from netnsd.core.interfaces import Adapters
from netnsd.core.policies import Policies
from netnsd.core.pool import PoolSettings
from netnsd.core.projects import Projects
from netnsd.core.registry import Settings
from netnsd.core.templates import Templates
from netnsd.core.tokens import Tokens
from netnsd.store import SqliteStore
from tests.fakes.faults import Faults
from tests.fakes.files import FakeClock, FakeFiles
from tests.fakes.firewall import FakeFirewall
from tests.fakes.network import FakeNetwork
from tests.fakes.probes import FakeProbes
from tests.fakes.processes import FakeCgroups, FakeProcesses


def actor(uid: int, user: str, *, is_admin: bool = False) -> Actor:
    """Somebody who calls."""
    return Actor(uid=uid, gid=uid, groups=(uid, 100), user=user, home=f"/home/{user}", shell="/bin/sh",
                 is_admin=is_admin)


ALICE, BOB = actor(1001, "alice"), actor(1002, "bob")
CAROL, ROOT = actor(1003, "carol", is_admin=True), actor(0, "root", is_admin=True)


class World:
    """``environments`` on fakes. Nothing works before ``running`` is entered; that may be done again, as a restart.

    Args:
        directory: of the state file.
        published_range: inclusive.
    """

    def __init__(self, directory: Path, *, supernet: str = "10.9.0.0/24", bridge_ports: int = 29,
                 published_range: tuple[int, int] = (20000, 20009), allow_setuid: bool = True,
                 boot_id: str = "this boot", creations_waiting: int = 64,
                 pool: PoolSettings | None = None, quota: wire.QuotaLimits | None = None,
                 resources: wire.Resources | None = None) -> None:
        self.directory = directory
        self.plan = Plan(supernet, bridge_ports)
        self.settings = Settings(published_range, allow_setuid, boot_id, {}, creations_waiting, pool or PoolSettings(),
                                 quota or wire.QuotaLimits(), resources or wire.Resources())
        self.accounts = {user.uid: user for user in (ALICE, BOB, CAROL, ROOT)}
        self.groups: dict[str, tuple[int, ...]] = {}
        self.developers: dict[str, str] = {}
        self.faults = Faults()
        self.network, self.firewall, self.cgroups = FakeNetwork(), FakeFirewall(), FakeCgroups()
        self.processes, self.files, self.clock = FakeProcesses(self.cgroups), FakeFiles(), FakeClock()
        self.probes = FakeProbes(self.network, self.plan)
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.store: SqliteStore
        self.environments: Environments
        self.templates: Templates
        self.tokens: Tokens
        self.projects: Projects
        self.policies: Policies

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Environments]:
        """One run of the daemon; its end is that of a daemon that was killed: nothing is tidied."""
        self.store = SqliteStore(self.directory, self.plan)
        try:
            wrap = self.faults.wrap
            adapters = Adapters(
                wrap(self.network, "network"), wrap(self.firewall, "firewall"), wrap(self.processes, "processes"),
                wrap(self.cgroups, "cgroups"), wrap(self.store, "store"), wrap(self.files, "files"), self.clock,
                wrap(self.probes, "probes"))
            self.processes.restart_daemon()
            self.environments = Environments(adapters, self.plan, self.settings, self._emit, account=self._account,
                                             members=self._members)
            self.templates = Templates(self.environments, adapters, self._account, self._emit)
            self.tokens = Tokens(adapters.store, self.clock, self.login, self._emit)
            self.projects = Projects(self.environments, self.templates, self.login, self.developers)
            self.policies = Policies(self.environments.policing, self.environments.registry, self.clock, self._members,
                                     self._emit)
            async with trio.open_nursery() as nursery:
                await nursery.start(self.environments.run)
                await nursery.start(self.templates.run)
                yield self.environments
                nursery.cancel_scope.cancel()
        finally:
            self.store.close()

    async def _members(self, kind: str, name: str) -> tuple[int, ...] | None:
        if kind == "group":
            return self.groups.get(name)
        return next(((user.uid,) for user in self.accounts.values() if user.user == name), None)

    async def _account(self, uid: int) -> Actor | None:
        return self.accounts.get(uid)

    async def login(self, key: int | str) -> Actor | None:
        """Implements ``core.actor.Login``."""
        await trio.lowlevel.checkpoint()
        return next((user for user in self.accounts.values() if key in (user.uid, user.user)), None)

    def held(self) -> dict[str, Any]:
        """Everything that exists of environments, by where it is; what is empty is left out."""
        registry = self.environments.registry
        found: dict[str, Any] = {
            "rows": [e.id for e in self.store.environments()],
            "registry": [e.id for e in registry.all()],
            "slots": self.plan.slots - registry.addresses_free,
            "ports": registry.published,
            "namespaces": dict(self.network.slots),
            "furnished": dict(self.network.furnished),
            "second names": set(self.network.second_names),
            "names left": set(self.network.left),
            "owners": set(self.firewall.owners),
            "published": dict(self.firewall.published),
            "passages": set(self.firewall.judgement.passages),
            "confined": set(self.firewall.judgement.confined),
            "shielded": set(self.firewall.judgement.shielded),
            "cgroups": sorted(self.cgroups.groups),
            "limits": dict(self.cgroups.limited),
            "bandwidths": dict(self.network.bandwidths),
            "quotas": dict(registry.quotas._held),
            "shortages": dict(self.environments._supervisor._shortage._scopes),
            "processes": dict(self.processes.running),
            "files": self.files.observe(),
            "logs": [fd for fd in self.files.descriptors if _is_open(fd)],
            "launches": dict(self.environments._supervisor._launches),
            "early": dict(self.environments._supervisor._early),
            "watched": dict(self.environments._supervisor._health._scopes),
            "errands": dict(self.environments._supervisor._errands._awaited),
            "restarts": dict(self.environments._supervisor._restarts._pending),
            "furnished ids": set(self.environments._particulars.furnished),
            "untidy": set(self.environments._particulars.untidy),
            "attended": set(self.environments._particulars.attended),
            "locks": dict(self.environments._particulars._locks),
        }
        return {name: value for name, value in found.items() if value}

    def kinds(self) -> list[str]:
        """The kinds of events so far."""
        return [kind for kind, _name, _details in self.events]

    def _emit(self, kind: str, uid: int, environment: str, name: str, **details: Any) -> None:
        self.events.append((kind, name, {"uid": uid, "environment": environment, **details}))


def request(name: str = "web", *commands: str, ports: int = 0, **fields: Any) -> wire.CreateRequest:
    """A creation with one service per command, and so many ports."""
    services = [wire.ServiceRequest(name=f"s{number}", command=[command]) for number, command in enumerate(commands)]
    return wire.CreateRequest(**{
        "name": name, "services": services or None,
        "ports": [wire.PortRequest(port=3000 + number) for number in range(ports)], **fields})


def _is_open(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    except FileNotFoundError:
        return False
