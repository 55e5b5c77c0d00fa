"""The composition root: one daemon's rooms, joined, started in order and stopped in the other."""

from __future__ import annotations

import contextlib
import datetime
import grp
import ipaddress
import os
import platform
import resource
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import structlog
import trio

from netnsd import __version__, wire
from netnsd.api import peer, tcp
from netnsd.api.app import application
from netnsd.api.attach import AttachServer
from netnsd.api.bearer import Bearer
from netnsd.api.closing import Closer
from netnsd.api.routes import Context
from netnsd.api.server import Gate, HttpServer
from netnsd.api.trail import Trail
from netnsd.core import views
from netnsd.core.batch import Shared
from netnsd.core.environments import Environments
from netnsd.core.interfaces import Adapters
from netnsd.core.pace import Pace
from netnsd.core.policies import Policies
from netnsd.core.pool import PoolSettings
from netnsd.core.projects import Projects
from netnsd.core.registry import Settings
from netnsd.core.templates import Templates
from netnsd.core.tokens import Tokens
from netnsd.daemon.config import Config
from netnsd.daemon.doors import Door
from netnsd.errors import ConfigError, HostUnfit, KernelError, NetnsdError, SupernetConflict
from netnsd.kernel import bridges, host, logfile, loss_watch
from netnsd.kernel.cgroup import CgroupTree
from netnsd.kernel.files import EnvironmentFiles
from netnsd.kernel.firewall import NftFirewall
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.network import NETNS_DIRECTORY, KernelNetwork
from netnsd.kernel.probes import HostProbes
from netnsd.kernel.processes import LauncherProcesses
from netnsd.kernel.ruleset_watch import RulesetWatch
from netnsd.kernel.seats import Seats
from netnsd.observability.events import EventLog
from netnsd.observability.metrics import Figures, Metrics
from netnsd.store import SqliteStore

API_SOCKET, ATTACH_SOCKET, LAUNCHER_SOCKET = "netnsd.sock", "attach.sock", "launcher.sock"
_DEFAULT_GROUP = "netnsd"
_CHECK_SECONDS = 60.0
_FIRST_REPAIR_SECONDS, _LAST_REPAIR_SECONDS = 0.01, 1.0
_LOOK_SECONDS = 1.0
_LOG_SECONDS = 2.0
_BUSY_LOG_SECONDS = 0.1
_DESCRIPTORS = 65536
_log = structlog.get_logger()


class UtcClock:
    """Implements ``core.interfaces.Clock``."""

    def now(self) -> str:
        """The time in UTC, RFC 3339 with microseconds."""
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Node:
    """One daemon.

    Args:
        config: read and checked.
        runtime, state: absolute directories; made when missing.
        passed: listening sockets from systemd, by name.
        starts_launcher: whether the launcher is started here where none answers, and ended when nothing is left.
        dismantles: whether everything is removed, instead of served.
    """

    environments: Environments

    def __init__(self, config: Config, runtime: Path, state: Path, passed: dict[str, socket.socket], *,
                 starts_launcher: bool, dismantles: bool = False) -> None:
        self._config = config
        self._runtime, self._state = runtime, state
        self._passed = passed
        self._starts_launcher = starts_launcher
        self._dismantles = dismantles
        self._clock = UtcClock()
        self._started_at = self._clock.now()
        self._events, self._audit = EventLog(self._clock.now), EventLog(self._clock.now)
        self._http: HttpServer | None = None
        self._doors: list[Door] = []
        self._state_trouble = ""
        self._knows = False
        self.left: list[str] = []  # why something could not be removed at the end
        self.is_ready = False
        self._checking = trio.Lock()
        self._check_waits = False
        self._ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled, or until everything is removed; started when clients can connect."""
        self._runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
        plan = self._config.plan
        api = self._config.api
        where = None if self._dismantles else self._config.api_address
        with (tcp.opened(where, api.tls_certificate, api.tls_key) as self._tcp,
              contextlib.closing(SqliteStore(self._state, plan)) as store, NamespaceThread() as thread):
            supernet = self._config.network.supernet
            self._findings = Shared(partial(host.examine, thread, supernet))
            host.require(await host.examine(thread, supernet))
            if not self._dismantles:
                await self._require_free_supernet(thread)
            seats = Seats(plan)
            network = KernelNetwork(thread, self._runtime, self._config.network.mtu, seats)
            forwarding = bridges.Forwarding(self._runtime / "forwarding")
            firewall = NftFirewall(thread, supernet, self._config.network.flows, forwarding=forwarding,
                                   seats=seats, record=self._runtime / "ruleset")
            cgroups = self._cgroups = CgroupTree(self._config.daemon.cgroup)
            files = EnvironmentFiles(self._runtime, self._state, self._config.services.log_bytes)
            await network.open()
            await firewall.start()
            watch = RulesetWatch(firewall.senders)
            processes = LauncherProcesses(str(self._runtime / LAUNCHER_SOCKET), cgroups.root,
                                          hide=[str(NETNS_DIRECTORY), str(network.pins)],
                                          starts=self._starts_launcher)
            adapters = Adapters(network, firewall, processes, cgroups, store, files, self._clock, HostProbes())
            self.environments = Environments(adapters, plan, self._settings(), self._emit, account=peer.account,
                                             members=peer.members)
            self._templates = Templates(self.environments, adapters, peer.account, self._emit)
            login = partial(peer.login, admin_group=self._config.daemon.admin_group)
            self._tokens = Tokens(store, self._clock, login, self._emit)
            self._projects = Projects(self.environments, self._templates, login, api.dev_users)
            self._policies = Policies(self.environments.policing, self.environments.registry, self._clock, peer.members,
                                      self._emit)
            try:
                # What environments lean on ends after them.
                async with trio.open_nursery() as below:
                    await below.start(cgroups.run)
                    await below.start(processes.run)
                    _raise_descriptor_limit()
                    async with trio.open_nursery() as nursery:
                        self._scope = nursery.cancel_scope
                        await nursery.start(self.environments.run)
                        self._knows = True
                        if self._dismantles:
                            await self._remove_all()
                            nursery.cancel_scope.cancel()
                        else:
                            nursery.start_soon(self._look_after_files, store, files, processes)
                            nursery.start_soon(self._watch_rules, watch, firewall)
                            await self._serve(nursery, files)
                            self.is_ready = True
                            task_status.started()
                    with trio.move_on_after(self._config.daemon.grace_seconds, shield=True):
                        await self._drain()
                    below.cancel_scope.cancel()
            finally:
                watch.close()
                self._restore_state(store)
                with trio.move_on_after(self._config.daemon.grace_seconds, shield=True):
                    # Before all was taken over, nobody here knows what there is.
                    unused = self._knows and len(self.environments.registry) == 0 and not self.environments.pool.held
                    if unused:
                        await self._attempt(processes.retire)
                        await self._attempt(cgroups.remove_root)
                    await self._attempt(partial(firewall.stop, remove=unused))
                    await self._attempt(partial(network.close, remove=unused))
                    await self._attempt(partial(self._clear_runtime, files, unused=unused))
                self._ended.set()

    def _settings(self) -> Settings:
        services, pool = self._config.services, PoolSettings(**msgspec.structs.asdict(self._config.pool))
        return Settings(self._config.published_range, services.allow_setuid, host.boot_id(), services.hard_limits,
                        self._config.daemon.creations_waiting, pool,
                        wire.QuotaLimits(**msgspec.structs.asdict(self._config.quota)),
                        wire.Resources(**msgspec.structs.asdict(self._config.resources)))

    async def _serve(self, nursery: trio.Nursery, files: EnvironmentFiles) -> None:
        await nursery.start(self._templates.run)
        nursery.start_soon(self._look_after_logs, files)
        nursery.start_soon(self._check_now_and_then)
        nursery.start_soon(_always, self._watch_links)
        nursery.start_soon(_always, self._watch_names)
        await self._open_sockets(nursery, files)

    async def _remove_all(self) -> None:
        """Remove every environment. What belongs to none went when the others were taken over."""
        failures = await self.environments.remove_many(list(self.environments.registry.all()))
        if failures:
            raise KernelError("; ".join(sorted({error.message for error in failures.values()})),
                              hint="Run it again, or restart the host.")

    async def _drain(self) -> None:
        try:
            await self.environments.pool.drain()
        except (NetnsdError, ExceptionGroup) as error:  # what is left goes with the orphans of the next start
            _log.warning("pool_stuck", reason=str(error))

    async def _attempt(self, step: Callable[[], Awaitable[None] | None]) -> None:
        """A step of the end. What cannot be removed is the next daemon's, and keeps nothing else from being removed."""
        try:
            under_way = step()
            if under_way is not None:
                await under_way
        except (OSError, NetnsdError) as error:
            self.left.append(str(error))
            _log.warning("left", reason=str(error))

    async def stop(self, grace_seconds: float) -> None:
        """Take no more requests, let those under way end within ``grace_seconds``; returns when ``run`` has ended."""
        if self._http is not None:
            await self._http.stop(grace_seconds)
        self._scope.cancel()
        await self._ended.wait()

    async def check(self) -> None:
        """Look whether the host is as it should be, and put right what is not."""
        if self._check_waits:  # it will look after now
            return
        self._check_waits = True
        async with self._checking:
            self._check_waits = False
            await self._check()

    async def _check(self) -> None:
        try:
            if await self.environments.check():
                _log.warning("rules_restored")
        except NetnsdError as error:
            _log.error("check_failed", code=error.code, reason=error.message)

    # -- sockets ------------------------------------------------------------------------------------------------

    async def _open_sockets(self, nursery: trio.Nursery, files: EnvironmentFiles) -> None:
        api, attach = self._door(API_SOCKET), self._door(ATTACH_SOCKET)
        trail = Trail(self._audit.emit)
        context = Context(self.environments, self._templates, Metrics(self._figures).text, self._info, self._examine,
                          files.log_path, logfile.read, self._events.follow, tokens=self._tokens,
                          projects=self._projects, policies=self._policies, follow_audit=self._audit.follow,
                          trail=trail)
        closer = Closer(filters_descriptors=api.filters_descriptors)
        pace = Pace(self._config.api.requests_per_second, self._config.api.requests_burst)
        self._http = HttpServer(Bearer(application(context), self._tokens, pace), closer)
        attach_server = AttachServer(self.environments, closer, trail)
        gate = Gate(self._config.daemon.admin_group, self._config.daemon.connections_per_user, closer)
        for door, server in ((api, self._http), (attach, attach_server)):
            accept = partial(gate.serve, handler=server.handle, nursery=nursery, refused=server.refusal)
            nursery.start_soon(door.serve, accept)
        if self._tcp is not None:
            listener, tls = self._tcp
            tcp_gate = tcp.TcpGate(self._http.handle_visitor, supernet=self._config.plan.supernet, tls=tls,
                                   connections_per_user=self._config.daemon.connections_per_user)
            nursery.start_soon(tcp_gate.run, listener, nursery)

    def _door(self, name: str) -> Door:
        door = Door(self._runtime / name, mode=self._config.socket_permissions, gid=self._socket_gid(),
                    passed=self._passed.get(name))
        self._doors.append(door)
        return door

    def _socket_gid(self) -> int:
        name = self._config.daemon.socket_group
        try:
            return grp.getgrnam(name or _DEFAULT_GROUP).gr_gid
        except KeyError as error:
            if name is None:
                return 0
            raise ConfigError(f"[daemon] socket_group: there is no group {name!r}",
                              hint=f"groupadd --system {name}") from error

    def _clear_runtime(self, files: EnvironmentFiles, *, unused: bool) -> None:
        for door in self._doors:
            door.close()
        if unused:
            files.remove_all()
            with contextlib.suppress(OSError):  # systemd's, or somebody's files are in it
                self._runtime.rmdir()

    # -- what the API shows of the host ---------------------------------------------------------------------------

    def _info(self) -> wire.Info:
        return wire.Info(
            version=__version__, pid=os.getpid(), started_at=self._started_at, kernel=platform.release(),
            supernet=self._config.network.supernet, port_range=self._config.ports.range,
            environments=len(self.environments.registry), published_ports=self.environments.registry.published,
            addresses_free=self.environments.registry.addresses_free, pool_size=self.environments.pool.size,
            pool_ready=self.environments.pool.ready, features={**host.features(), **self._limits()})

    def _limits(self) -> dict[str, bool]:
        return {f"limit_{name}": has for name, has in self._cgroups.has_limits().items()}

    def _figures(self) -> Figures:
        service = self.environments
        found = list(service.registry.all())
        # Of templates' stocks the metrics say how many are ready in all: whose they are is nobody else's business.
        return Figures(
            states={state: sum(e.shown_state == state for e in found)
                    for state in ("creating", "running", "stopped", "removing")},
            published_ports=service.registry.published, addresses_free=service.registry.addresses_free,
            pools=[views.pool(service.pool), self._templates.pool()], creations_under_way=service.admission.under_way,
            creations_waiting=service.admission.waiting, creations_refused=service.admission.refused,
            services={state: sum(s.state == state for e in found for s in e.services.values())
                      for state in get_args(wire.ServiceState)},
            health={state: sum(s.health == state for e in found for s in e.services.values())
                    for state in get_args(wire.HealthState)},
            restarts=service.restarts)

    async def _examine(self) -> list[wire.Check]:
        findings = [*await self._findings.get(), *host.limits(self._cgroups.has_limits())]
        return [wire.Check(name=f.name, ok=f.ok, severity=f.severity, message=f.message, hint=f.hint)
                for f in findings]

    def _emit(self, kind: str, uid: int, environment: str, name: str, **details: Any) -> None:
        if kind == "orphan_left":
            self.left.append(str(details.get("reason")))
        _log.info(kind, uid=uid, environment=environment, name=name, **details)
        self._events.emit(kind, uid, environment, name, **details)

    # -- now and then -------------------------------------------------------------------------------------------

    async def _check_now_and_then(self) -> None:
        while True:
            await trio.sleep(_CHECK_SECONDS)
            await self.check()

    async def _watch_rules(self, watch: RulesetWatch, firewall: NftFirewall) -> None:
        """Not by a check, which may be long: what the rules keep apart is open meanwhile."""
        async with contextlib.aclosing(watch.changes()) as changes:
            async for _ in changes:
                await self._repair(firewall)

    async def _repair(self, firewall: NftFirewall) -> None:
        pause = _FIRST_REPAIR_SECONDS
        while True:
            try:
                was_wrong = await firewall.repair()
            except NetnsdError as error:
                _log.error("rules_missing", code=error.code, reason=error.message)
            else:
                if was_wrong:
                    _log.warning("rules_restored")
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _LAST_REPAIR_SECONDS)

    async def _watch_links(self) -> None:
        async with contextlib.aclosing(loss_watch.links()) as losses:
            async for links in losses:
                if not links or self.environments.caretaker.concerns(links=links, names=()):
                    await self.check()

    async def _watch_names(self) -> None:
        async with contextlib.aclosing(loss_watch.names(str(NETNS_DIRECTORY))) as losses:
            async for names in losses:
                if not names or self.environments.caretaker.concerns(links=(), names=names):
                    await self.check()

    async def _look_after_files(self, store: SqliteStore, files: EnvironmentFiles,
                                processes: LauncherProcesses) -> None:
        """What others take away of our files, and what they change in the host's."""
        while True:
            await trio.sleep(_LOOK_SECONDS)
            self._restore_state(store)
            processes.look()
            for door in self._doors:
                door.look()
            try:
                for _environment in files.follow_host(self.environments.registry.all()):
                    await trio.lowlevel.checkpoint()
            except NetnsdError as error:
                _log.error("host_files_unread", reason=error.message)

    def _restore_state(self, store: SqliteStore) -> None:
        try:
            if store.restore():
                self._emit("state_restored", 0, "", "", reason="the state file, or what is beside it, was removed")
        except NetnsdError as error:
            if error.message != self._state_trouble:
                self._emit("state_missing", 0, "", "", reason=error.message)
            self._state_trouble = error.message
        else:
            self._state_trouble = ""

    async def _look_after_logs(self, files: EnvironmentFiles) -> None:
        while True:
            await trio.sleep(_BUSY_LOG_SECONDS if files.cap_logs() else _LOG_SECONDS)

    async def _require_free_supernet(self, thread: NamespaceThread) -> None:
        supernet = ipaddress.ip_network(self._config.network.supernet)
        for route in await thread.run(bridges.host_routes, Priority.CREATE):
            if ipaddress.ip_network(route.network).overlaps(supernet):
                raise SupernetConflict(
                    f"[network] supernet {supernet} overlaps the host's route {route.network} by {route.interface}",
                    hint="Configure another supernet, such as 10.204.0.0/16.", route=route.network)


async def _always(watch: Callable[[], Awaitable[None]]) -> None:
    """A watch that cannot be kept, for lack of descriptors or memory, is begun again."""
    while True:
        try:
            await watch()
        except OSError as error:
            _log.error("watch_failed", reason=str(error))
        await trio.sleep(_LOOK_SECONDS)


def _raise_descriptor_limit() -> None:
    """A connection is a descriptor; the usual soft limit of 1024 is too few. After the launcher took its own."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:
        raise HostUnfit(f"the limit of open files cannot be raised to {most}: {error}",
                        hint="LimitNOFILE= in the unit, or ulimit -n.") from error
