"""What to do at start: a pure function from what should be and what is to actions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netnsd.core.environment import Environment, Service


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel, the launcher and the file system hold.

    ``intact``: ids of environments whose namespace, name and link are all there. ``populated``: (id, service) pairs
    whose cgroup has processes. ``running``: launch id to pid. ``exited``: launch id to exit code.
    """

    intact: frozenset[str]
    slots: frozenset[int]
    cgroups: frozenset[str]
    files: frozenset[str]
    populated: frozenset[tuple[str, str]]
    running: Mapping[str, int]
    exited: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Actions:
    """What to do, in this order. ``lost`` are environments of which the kernel has too little: end them, say so."""

    adopt: list[tuple[Environment, dict[str, Service]]] = field(default_factory=list)
    undo: list[Environment] = field(default_factory=list)
    lost: list[Environment] = field(default_factory=list)
    orphan_slots: list[int] = field(default_factory=list)
    orphan_cgroups: list[str] = field(default_factory=list)
    orphan_files: list[str] = field(default_factory=list)


def plan(desired: Iterable[Environment], observed: Observed) -> Actions:
    """Every environment is whole afterwards, with its servers never interrupted, or gone; and nothing else is left."""
    actions = Actions()
    slots, cgroups, files = set(observed.slots), set(observed.cgroups), set(observed.files)
    for environment in desired:
        slots.discard(environment.slot.index)
        cgroups.discard(environment.slot.cgroup)
        files.discard(environment.id)
        # Without services one that is being made is whole as soon as its namespace has its name, which comes last.
        if environment.state == "removing" or (environment.state == "creating" and (
                environment.services or environment.id not in observed.intact)):
            actions.undo.append(environment)
        elif environment.id not in observed.intact:
            actions.lost.append(environment)
        else:
            services = {name: adopted(environment, service, observed)
                        for name, service in environment.services.items()}
            actions.adopt.append((environment, services))
    actions.orphan_slots.extend(sorted(slots))
    actions.orphan_cgroups.extend(sorted(cgroups))
    actions.orphan_files.extend(sorted(files))
    return actions


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
