"""Which environments there are, and which names, slots and ports are taken. Nothing here awaits, so no two callers
can take the same thing.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from netnsd import wire
from netnsd.core import specification
from netnsd.core.actor import Actor
from netnsd.core.addressing import Slot
from netnsd.core.allocation import PortAllocator, SlotAllocator
from netnsd.core.environment import Environment, PublishedPort, Service
from netnsd.core.interfaces import Clock, Store
from netnsd.core.pool import PoolSettings
from netnsd.core.quotas import Quotas
from netnsd.errors import InvalidRequest, NameTaken, NetnsTaken, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

# Each is an element, and a check lists all of them: 40 000 take a second, in which nothing can be wired.
MOST_GUESTS = 8192
_USER_IN_NETNS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration decides for core.

    ``published_range`` is inclusive. ``hard_limits``: what no command's limits may exceed, by lower-case name.
    ``creations_waiting``: of one user. ``quota``: what a user may have of whom no admin has said anything.
    ``resources``: what an environment may take that says nothing.
    """

    published_range: tuple[int, int]
    allow_setuid: bool
    boot_id: str
    hard_limits: dict[str, int] = field(default_factory=dict)
    creations_waiting: int = 64
    pool: PoolSettings = field(default_factory=PoolSettings)
    quota: wire.QuotaLimits = field(default_factory=wire.QuotaLimits)
    resources: wire.Resources = field(default_factory=wire.Resources)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A request that was checked, and means something. ``stock``, ``request``, ``guests``: as in Environment."""

    name: str
    labels: dict[str, str]
    share: str
    egress: str
    ports: list[wire.PortRequest]
    services: dict[str, Service]
    resources: wire.Resources
    stock: str = ""
    request: str = ""
    guests: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: wire.CreateRequest, actor: Actor, settings: Settings) -> Blueprint:
        """Check everything of a request that needs no look at what there is. Raises Invalid*, Forbidden."""
        name = specification.name_of(request)
        variables = specification.check_variables(request.env)
        # Also where no service is there to inherit them.
        specification.check_circumstances(actor.home if request.cwd is None else request.cwd, request.umask,
                                          request.limits)
        services = {
            service.name: Service(service.name, specification.command(
                argv=service.command, env={**variables, **service.env},
                cwd=request.cwd if service.cwd is None else service.cwd,
                umask=request.umask, limits=request.limits,
                setuid=request.setuid if service.setuid is None else service.setuid,
                actor=actor, allow_setuid=settings.allow_setuid),
                restart=request.restart if service.restart is None else service.restart,
                check=specification.check_health(service.health))
            for service in specification.check_services(request)
        }
        ports = specification.check_ports(request.ports, settings.published_range)
        return cls(name, specification.check_labels(request.labels), specification.check_share(request.share),
                   specification.check_egress(request.egress), ports, services,
                   specification.check_resources(request.resources, settings.resources))


class Registry:
    """All environments of this host, by id and by name, and what they hold.

    Args:
        store: written before anything is taken.
        slots: who has which slot; those of what is remembered are claimed there, those of what is released go back.
        is_listening: whether a socket of the host has a port of a protocol.
        is_taken: whether the host has a namespace of a name.
    """

    def __init__(self, settings: Settings, store: Store, clock: Clock, slots: SlotAllocator, *,
                 is_listening: Callable[[str, int], bool], is_taken: Callable[[str], bool]) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._is_taken = is_taken
        self._by_id: dict[str, Environment] = {}
        self._by_name: dict[tuple[int, str], Environment] = {}
        self._stock_names: set[tuple[int, str]] = set()
        self._by_key: dict[tuple[int, str], dict[str, Environment]] = {}
        self._netns: set[str] = set()
        self._slots = slots
        self.quotas = Quotas(settings.quota, store)
        self._ports = PortAllocator(*settings.published_range, is_listening)

    def __contains__(self, environment: Environment) -> bool:
        return environment.id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> Iterable[Environment]:
        """All of them, oldest first; a copy."""
        return list(self._by_id.values())

    @property
    def published(self) -> int:
        """How many host ports are leased."""
        return len(self._ports.leases)

    @property
    def leases(self) -> Mapping[tuple[str, int], str]:
        """Who holds which host port: (protocol, port) to an environment's id."""
        return dict(self._ports.leases)

    @property
    def addresses_free(self) -> int:
        """How many environments more the supernet has room for."""
        return self._slots.free

    def own(self, actor: Actor, name: str) -> Environment | None:
        """The actor's own environment of that name."""
        return self._by_name.get((actor.uid, name))

    def find(self, ref: str, actor: Actor) -> Environment:
        """The environment that ``actor`` means: a name of its own, NAME.USER, or an id. Raises NotFound."""
        found = self.own(actor, ref) or self._by_id.get(ref)
        if found is None and "." in ref:
            name, _, user = ref.partition(".")
            # Whoever may not see it is not told by the time that this takes, either.
            found = next((e for e in self._by_name.values()
                          if actor.may_see(e.uid) and e.name == name and e.user == user), None)
        if found is None or found.stock or not actor.may_see(found.uid):
            raise NotFound(f"there is no environment {ref[:80]!r}", hint="`netnsctl ls` lists yours.", ref=ref[:80])
        return found

    def visible(self, actor: Actor, *, everyones: bool, labels: dict[str, str]) -> list[Environment]:
        """The actor's environments, or all that it may see, that have all of ``labels``; oldest first."""
        return [e for e in self._by_name.values()
                if (actor.may_see(e.uid) if everyones else e.uid == actor.uid)
                and all(e.labels.get(key) == value for key, value in labels.items())]

    def reserve(self, blueprint: Blueprint, actor: Actor, slot: Slot) -> Environment:
        """Take a name and ports, and write the intent for ``slot``, which is the caller's. All or nothing.

        Raises QuotaExceeded, TooManyCreations, InvalidRequest, NameTaken, NetnsTaken, PortTaken, PortsExhausted,
        StoreError.
        """
        self.quotas.require(actor.uid, blueprint.resources, len(blueprint.ports))
        self.require_guests(actor.uid, blueprint.guests)
        netns = self.free_netns(blueprint.name, actor.uid, actor.user)
        environment_id = str(uuid.uuid4())
        ports: dict[int, PublishedPort] = {}  # by their place in the request
        try:
            # Numbers that are asked for first: a free one could be one of them.
            for place, wanted in sorted(enumerate(blueprint.ports), key=lambda item: item[1].publish is None):
                ports[place] = self._lease(wanted, environment_id, actor)
            environment = Environment(
                id=environment_id, name=blueprint.name, uid=actor.uid, user=actor.user, slot=slot, netns=netns,
                labels=blueprint.labels, share=blueprint.share, egress=blueprint.egress,
                created_at=self._clock.now(),
                boot_id=self._settings.boot_id, stock=blueprint.stock, request=blueprint.request,
                resources=blueprint.resources,
                ports=tuple(ports[place] for place in sorted(ports)), guests=blueprint.guests,
                services=dict(blueprint.services))
            with self._store.transaction():
                self._store.add(environment)
        except BaseException:
            for port in ports.values():
                self._ports.release(port.protocol, port.published)
            raise
        self._know(environment)
        self.quotas.take(environment)
        return environment

    def require_guests(self, uid: int, guests: Sequence[int], instead_of: Environment | None = None) -> None:
        """Raise InvalidRequest where a user's environments had more guests together than the host keeps of one user.

        ``instead_of``: that one has these, in place of its own.
        """
        if not guests:
            return
        count = len(guests) + sum(len(e.guests) for e in self._by_id.values() if e.uid == uid and e is not instead_of)
        if count > MOST_GUESTS:
            raise InvalidRequest(f"share: your environments would have {count} guests, more than {MOST_GUESTS}",
                                 hint="Share with smaller groups, or with host.")

    def change(self, environment: Environment, *, labels: dict[str, str], share: str, egress: str,
               guests: tuple[int, ...]) -> None:
        """Write what else is to be so of an environment, and have it so. Raises StoreError, with nothing changed."""
        with self._store.transaction():
            self._store.change(replace(environment, labels=labels, share=share, egress=egress))
        environment.labels, environment.share, environment.egress = labels, share, egress
        environment.guests = guests

    def remember(self, environment: Environment) -> None:
        """Know an environment of an earlier run, and what it holds."""
        self._know(environment)
        self.quotas.remember(environment)
        self._slots.claim(environment.slot.index)
        for port in environment.ports:
            self._ports.restore(port.protocol, port.published, environment.id)

    def release(self, environments: Sequence[Environment]) -> None:
        """Forget environments of which nothing is left, and give back what they held."""
        with self._store.transaction():
            for environment in environments:
                self._store.delete(environment.id)
        for environment in environments:
            if self._by_id.pop(environment.id, None) is None:
                continue
            self.quotas.give_back(environment)
            if self._by_name.get((environment.uid, environment.name)) is environment:
                del self._by_name[environment.uid, environment.name]
            if environment.stock:
                self._stock_names.discard((environment.uid, environment.name))
            self._unmark(environment)
            self._netns.discard(environment.netns)
            self._slots.release(environment.slot.index)
            for port in environment.ports:
                self._ports.release(port.protocol, port.published)

    def marked(self, uid: int, key: str) -> list[Environment]:
        """A user's environments that were made under a key, given as its digest, and are not going."""
        return [e for e in self._by_key.get((uid, key), {}).values() if e.state != "removing"]

    def stock(self, template: str) -> list[Environment]:
        """The environments that are kept for a template, oldest first."""
        return [e for e in self._by_id.values() if e.stock == template]

    def hand_over(self, environment: Environment, name: str, netns: str, labels: dict[str, str],
                  request: str = "") -> None:
        """Let an environment of the stock be its owner's, as ``name``. All or nothing; its old name stays taken.

        ``request``: as in Environment.
        """
        if (environment.uid, name) in self._by_name:
            raise NameTaken(f"you have an environment {name!r} already",
                            hint="Choose another name, remove it, or pass --replace.", name=name)
        changed = replace(environment, name=name, netns=netns, labels=labels, stock="", request=request,
                          created_at=self._clock.now())
        with self._store.transaction():
            self._store.rename(changed)
        self._stock_names.discard((environment.uid, environment.name))
        for field_name in ("name", "netns", "labels", "stock", "request", "created_at"):
            setattr(environment, field_name, getattr(changed, field_name))
        self._by_name[environment.uid, name] = environment
        self._mark(environment)
        self._netns.add(netns)

    def rename(self, environment: Environment) -> str:
        """Have another name for an environment's namespace, as its own is somebody else's now; returns the old one.

        Raises NetnsTaken, StoreError.
        """
        old, new = environment.netns, self._free_netns(environment.name, environment.uid, environment.user)
        with self._store.transaction():
            self._store.rename(replace(environment, netns=new))
        environment.netns = new
        self._netns.add(new)
        self._netns.discard(old)
        return old

    def free(self, netns: str) -> None:
        """No environment's namespace is called that any more."""
        self._netns.discard(netns)

    def _know(self, environment: Environment) -> None:
        self._by_id[environment.id] = environment
        if environment.stock:
            self._stock_names.add((environment.uid, environment.name))
        else:
            self._by_name[environment.uid, environment.name] = environment
        self._mark(environment)
        self._netns.add(environment.netns)

    def _mark(self, environment: Environment) -> None:
        if environment.request:
            key = environment.uid, environment.request.partition(":")[0]
            self._by_key.setdefault(key, {})[environment.id] = environment

    def _unmark(self, environment: Environment) -> None:
        key = environment.uid, environment.request.partition(":")[0]
        marked = self._by_key.get(key, {})
        marked.pop(environment.id, None)
        if not marked:
            self._by_key.pop(key, None)

    def _lease(self, wanted: wire.PortRequest, environment_id: str, actor: Actor) -> PublishedPort:
        if wanted.publish is None:
            published = self._ports.take(wanted.protocol, environment_id)
        else:
            published = self._ports.take_number(wanted.protocol, wanted.publish, environment_id,
                                                partial(self._name_for, actor))
        return PublishedPort(wanted.port, wanted.protocol, published)

    def _name_for(self, actor: Actor, environment_id: str) -> str | None:
        holder = self._by_id.get(environment_id)
        return holder.name if holder is not None and actor.may_see(holder.uid) else None

    def free_netns(self, name: str, uid: int, user: str) -> str:
        """What the namespace of a user's environment of that name is to be called. Raises NameTaken, NetnsTaken."""
        if (uid, name) in self._by_name:
            raise NameTaken(f"you have an environment {name!r} already",
                            hint="Choose another name, remove it, or pass --replace.", name=name)
        if (uid, name) in self._stock_names:
            raise NameTaken(f"one in stock of a template of yours is called {name!r}", hint="Choose another name.",
                            name=name)
        return self._free_netns(name, uid, user)

    def _free_netns(self, name: str, uid: int, user: str) -> str:
        user = user if _USER_IN_NETNS.match(user) else str(uid)
        for candidate in (name, f"{name}.{user}"):
            if candidate not in self._netns and not self._is_taken(candidate):
                return candidate
        raise NetnsTaken(f"namespaces {name!r} and '{name}.{user}' both exist and are not this environment's",
                         hint="Choose another name.", name=name)
