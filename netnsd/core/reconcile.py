"""What to do at start: a pure function from what should be and what is to actions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from netnsd.core.addressing import PORT_PREFIX, Slot
from netnsd.core.environment import Environment, Service
from netnsd.core.interfaces import Wiring


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel, the launcher and the file system hold.

    ``boot_id``: this run of the kernel. ``wiring``: of slots, by index. ``populated``: (id, service) pairs whose cgroup
    has processes. ``running``: launch id to pid. ``exited``: launch id to exit code.
    """

    boot_id: str
    wiring: Mapping[int, Wiring]
    cgroups: frozenset[str]
    files: frozenset[str]
    populated: frozenset[tuple[str, str]]
    running: Mapping[str, int]
    exited: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Orphans:
    """What belongs to nothing: slots by index, cgroups by name, files by the id of the environment they were of."""

    slots: tuple[int, ...] = ()
    cgroups: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.slots or self.cgroups or self.files)


@dataclass(frozen=True, slots=True)
class Actions:
    """What to do, in this order.

    ``mend``: of those to adopt, what has lost a part, and which. ``remake``: of an earlier boot, and to be there again.
    ``lost``: of an earlier boot, and gone: end them, say so.
    """

    adopt: list[tuple[Environment, dict[str, Service]]] = field(default_factory=list)
    mend: list[Environment] = field(default_factory=list)
    remake: list[tuple[Environment, dict[str, Service]]] = field(default_factory=list)
    undo: list[Environment] = field(default_factory=list)
    lost: list[Environment] = field(default_factory=list)
    orphans: Orphans = field(default_factory=Orphans)


def plan(desired: Iterable[Environment], observed: Observed) -> Actions:
    """Every environment is whole afterwards, with its servers never interrupted, or gone; and nothing else is left."""
    actions = Actions()
    environments = list(desired)
    for environment in environments:
        found = faults(environment, observed.wiring)
        is_of_this_boot = environment.boot_id == observed.boot_id
        services = {name: adopted(environment, service, observed) for name, service in environment.services.items()}
        # Without services one that is being made is whole as soon as its namespace has its name, which comes last; and
        # its creator may have been answered.
        if environment.state == "removing" or (environment.state == "creating" and (
                environment.services or (found and is_of_this_boot))):
            actions.undo.append(environment)
        elif is_of_this_boot:
            actions.adopt.append((environment, services))
            if found:
                actions.mend.append(environment)
        elif not environment.stock and any(s.restart != "no" for s in environment.services.values()):
            actions.remake.append((environment, services))
        else:
            actions.lost.append(environment)
    known = orphans(observed.wiring.keys(), observed.cgroups, observed.files,
                    slots={e.slot.index for e in environments}, ids={e.id for e in environments})
    return Actions(actions.adopt, actions.mend, actions.remake, actions.undo, actions.lost, known)


def faults(environment: Environment, wiring: Mapping[int, Wiring]) -> tuple[str, ...]:
    """What the kernel lacks of an environment that was made: ``pin``, ``name``, ``link``."""
    held = wiring.get(environment.slot.index, Wiring())
    parts = (("pin", held.pinned), ("name", environment.netns in held.names),
             ("link", _is_linked(environment.slot, held)))
    return tuple(part for part, is_there in parts if not is_there)


def is_wired(slot: Slot, wiring: Mapping[int, Wiring]) -> bool:
    """Whether a slot that is nobody's yet is of use: one that has lost a part is not mended, another is made."""
    held = wiring.get(slot.index, Wiring())
    return held.pinned and _is_linked(slot, held)


def _is_linked(slot: Slot, held: Wiring) -> bool:
    return held.is_sound and held.master == slot.bridge.ifindex


def orphans(wired: Iterable[int], cgroups: Iterable[str], files: Iterable[str], *, slots: AbstractSet[int],
            ids: AbstractSet[str]) -> Orphans:
    """What there is that belongs neither to one of these slots nor to an environment with one of these ids."""
    groups = {f"{PORT_PREFIX}{index}" for index in slots}
    return Orphans(tuple(sorted(set(wired) - slots)), tuple(sorted(set(cgroups) - groups)),
                   tuple(sorted(set(files) - ids)))


def adopted(environment: Environment, service: Service, observed: Observed) -> Service:
    """A service as it is now, whatever was last written of it."""
    launch = service.launch_id or ""
    lives = (environment.id, service.name) in observed.populated
    if launch in observed.running:
        return service.changed(state="running", pid=observed.running[launch])
    code = observed.exited.get(launch, service.exit_code)
    if lives:
        # Its first process ended and what it left behind serves on, or the launcher that knew it died.
        return service.changed(state="running", exit_code=code)
    if service.state in ("starting", "running"):
        return service.changed(state="exited", pid=None, exit_code=code)
    return service.changed(pid=None, exit_code=code)
