"""The daemon's start: goes on with what an earlier run made, and ends what that left half-made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from netnsd.core import reconcile
from netnsd.core.interfaces import Adapters, Emit, Wiring
from netnsd.core.launching import as_now
from netnsd.core.particulars import Particulars, opening
from netnsd.core.pool import FIRST_SERVICE
from netnsd.core.supervisor import Supervisor, group_of
from netnsd.errors import ConfigError, KernelError, NetnsdError, NetnsLost

if TYPE_CHECKING:
    from netnsd.core.actor import Account
    from netnsd.core.caretaker import Caretaker
    from netnsd.core.environment import Environment, Service
    from netnsd.core.policing import Policing
    from netnsd.core.registry import Registry
    from netnsd.core.removal import Removal
    from netnsd.core.settling import Settling
    from netnsd.core.sharing import Sharing

_REBOOTED = "the host was started anew"


class Takeover:
    """Done once, before anybody can ask for anything."""

    def __init__(self, adapters: Adapters, boot_id: str, emit: Emit, account: Account, *, registry: Registry,
                 supervisor: Supervisor, particulars: Particulars, settling: Settling, removal: Removal,
                 caretaker: Caretaker, sharing: Sharing, policing: Policing) -> None:
        self._a = adapters
        self._boot_id = boot_id
        self._emit = emit
        self._account = account
        self._registry = registry
        self._supervisor = supervisor
        self._particulars = particulars
        self._settling = settling
        self._removal = removal
        self._caretaker = caretaker
        self._sharing = sharing
        self._policing = policing

    async def run(self) -> None:
        """Do it. Every environment of the state file is whole afterwards, or going.

        Raises KernelError, StoreError, and ConfigError, with nothing changed, where the addresses are other ones now.
        """
        self._registry.quotas.load()
        self._policing.load()
        desired = self._a.store.environments()
        await self._require_addresses(desired)
        for environment in desired:
            self._registry.remember(environment)
        try:
            await self._a.network.tidy([(e.slot, e.netns) for e in desired])
        except KernelError as error:
            self._emit("orphan_left", 0, "", "", reason=error.message)
        await self._mend_bridges(desired)
        observed = await self._observe(desired)
        actions = reconcile.plan(desired, observed)
        lost = dict.fromkeys((e.id for e in actions.lost), _REBOOTED)
        await self._mend(actions, lost)
        for environment, _ in actions.remake:
            # Whose port it is now would be robbed of those who connect to it, root among them.
            if taken := [p for p in environment.ports if self._a.firewall.is_listening(p.protocol, p.published)]:
                lost[environment.id] = f"published port {taken[0].published}/{taken[0].protocol} is another's now"
        await self._sharing.recall(desired)
        # Nobody reaches anything of before until what may reach it is known, and what it may reach.
        await self._policing.begin()
        await self._a.firewall.restore([opening(e) for e, _ in (*actions.adopt, *actions.remake) if e.id not in lost])
        for environment, services in actions.adopt:
            if environment.id not in lost:
                self._adopt(environment, services, observed)
        await self._caretaker.clear(actions.orphans)
        for environment, services in actions.remake:
            if environment.id not in lost:
                await self._remake(environment, services, observed, lost)
        gone = [e for e in desired if e.id in lost]
        await self._removal.remove_quietly(actions.undo + gone)
        for environment in gone:
            self._particulars.tell("lost", environment, reason=lost[environment.id])

    async def _require_addresses(self, desired: list[Environment]) -> None:
        """What runs knows its address, and is reached by no other."""
        wiring = await self._a.network.survey()
        for environment in desired:
            mac = wiring.get(environment.slot.index, Wiring()).mac
            if mac not in (b"", environment.slot.port_mac):
                raise ConfigError(
                    f"[network] supernet: {environment.name!r} runs at another address than {environment.slot.address}",
                    hint="Restore [network] supernet and bridge_ports, remove the environments, and change them then.")

    async def _mend_bridges(self, desired: list[Environment]) -> None:
        """First: with a bridge that is made anew, the links that were its ports are what there is to mend."""
        bridges = {e.slot.bridge.index: e.slot.bridge for e in desired if e.boot_id == self._boot_id}
        try:
            for name in await self._a.network.mend_bridges(list(bridges.values())):
                self._emit("bridge_mended", 0, "", "", what=name)
        except KernelError as error:  # checks try again
            self._emit("mend_failed", 0, "", "", reason=error.message)

    async def _mend(self, actions: reconcile.Actions, lost: dict[str, str]) -> None:
        """What nothing leads to any more is lost: what is left of it is of no use to anybody."""
        async def mend(environment: Environment) -> None:
            try:
                await self._caretaker.mend(environment)
            except NetnsLost as error:
                lost[environment.id] = error.message
            except NetnsdError as error:  # checks try again
                self._particulars.tell("mend_failed", environment, reason=error.message)

        # Each that fails tries for a while; one after the other many would take longer than a start may.
        async with trio.open_nursery() as nursery:
            for environment in actions.mend:
                nursery.start_soon(mend, environment)

    def _adopt(self, environment: Environment, services: dict[str, Service], observed: reconcile.Observed) -> None:
        environment.state = "ready"
        if FIRST_SERVICE not in environment.services:  # it may have come from the pool a moment ago
            self._particulars.attended.add(environment.id)
        # Again, as the daemon may have been killed between the answer and that; done twice it changes nothing.
        self._settling.settle(environment)
        self._supervisor.adopt(environment, services, reported=observed.running.keys())

    async def _remake(self, environment: Environment, services: dict[str, Service], observed: reconcile.Observed,
                      lost: dict[str, str]) -> None:
        """Make an environment of an earlier boot again, with its id, address and ports; its services follow."""
        account = await self._account(environment.uid)
        if account is None or account.user != environment.user:
            lost[environment.id] = f"there is no user {environment.user!r} any more"
            return
        try:
            if environment.slot.index in observed.wiring:  # left of an attempt that was killed
                await self._a.network.unwire([(environment.slot, environment.netns)])
            if self._a.network.is_taken(environment.netns):  # somebody was quicker since the host's start
                self._registry.rename(environment)
            await self._a.network.wire(environment.slot, environment.netns)
            services = {name: as_now(service, account) for name, service in services.items()}
            with self._a.store.transaction():
                for service in services.values():
                    self._a.store.set_command(environment.id, service)
                self._a.store.set_boot(environment.id, self._boot_id)
        except (NetnsdError, ExceptionGroup) as error:
            lost[environment.id] = f"it could not be made again: {error}"
            return
        environment.boot_id = self._boot_id
        self._adopt(environment, services, observed)
        self._particulars.tell("remade", environment, reason=_REBOOTED)

    async def _observe(self, desired: list[Environment]) -> reconcile.Observed:
        running, exited = await self._a.processes.known()
        return reconcile.Observed(
            boot_id=self._boot_id,
            wiring=await self._a.network.survey(),
            cgroups=frozenset(self._a.cgroups.observe()),
            files=frozenset(self._a.files.observe()),
            populated=frozenset((e.id, s) for e in desired for s in e.services
                                if self._a.cgroups.populated(group_of(e.slot, s))),
            running={r.launch_id: r.pid for r in running},
            exited={x.launch_id: x.code for x in exited},
        )
