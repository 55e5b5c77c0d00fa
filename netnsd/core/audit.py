"""Where state file, daemon and kernel do not agree: a pure function from what should be and what is to differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from netnsd.core.addressing import PORT_PREFIX
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Inspection, Wiring
from netnsd.core.reconcile import Orphans, faults

Kind = Literal["missing", "orphan", "stray"]
_NAMES = {"pin": "the pin of its namespace", "name": "its name", "link": "its link, or its bridge"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be.

    ``missing``: an environment, or netnsd, should have it; a check puts it there. ``orphan``: nobody has it; a prune
    removes it. ``stray``: a process in an environment, but not in its group: it ends with the environment all the same.
    ``what`` is the kind of thing, ``subject`` which one. ``environment`` is an id, or "" where it is nobody's.
    """

    kind: Kind
    what: str
    subject: str
    message: str
    environment: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """What there is, at about one moment.

    ``members``: pids in each slot's cgroup. ``populated``: as in ``reconcile.Observed``. ``rows``: the state file's
    environments. ``leases``: the daemon's ports, (protocol, port) to environment. ``missing_elements`` and
    ``surplus_elements`` of the firewall, and ``bridges``, are names of what is wrong.
    """

    wiring: Mapping[int, Wiring]
    inspection: Inspection
    orphans: Orphans
    members: Mapping[int, AbstractSet[int]]
    populated: AbstractSet[tuple[str, str]]
    rows: AbstractSet[str]
    leases: Mapping[tuple[str, int], str]
    missing_elements: Iterable[str]
    surplus_elements: Iterable[str]
    bridges: Iterable[str]


def differences(environments: Iterable[Environment], held: Held) -> list[Difference]:
    """Compare. Environments that are being made or removed are on their way, and count for what they hold only."""
    known = list(environments)
    return [
        *(found for e in known if e.state == "ready" for found in _of_environment(e, held)),
        *_rows(known, held),
        *_leases(known, held),
        *(Difference("missing", "sysctl" if name.startswith("/") else "bridge", name, f"{name} is not as it was set")
          for name in held.bridges),
        *(Difference("missing", "element", name, f"the firewall lacks {name}") for name in held.missing_elements),
        *(Difference("orphan", "element", name, f"the firewall has {name}, which nobody opened")
          for name in held.surplus_elements),
        *_orphans(held.orphans),
        *(Difference("orphan", "mount", path, f"more than one mount lies on {path}")
          for path in sorted(held.inspection.stacked)),
    ]


def _of_environment(environment: Environment, held: Held) -> Iterator[Difference]:
    e = environment
    for part in faults(e, held.wiring):
        yield Difference("missing", part, e.netns_path if part == "name" else e.slot.port_name,
                         f"{e.name!r} has lost {_NAMES[part]}", e.id)
    names = held.wiring.get(e.slot.index, Wiring()).names - {e.netns}
    for name in sorted(names):
        yield Difference("orphan", "name", f"/run/netns/{name}", f"a second name of {e.name!r}", e.id)
    for service in e.services.values():
        lives = (e.id, service.name) in held.populated
        if service.state == "running" and not lives:
            yield Difference("missing", "process", service.name, f"{service.name!r} of {e.name!r} is said to run", e.id)
        if service.state in ("exited", "stopped") and lives:
            yield Difference("orphan", "process", service.name, f"{service.name!r} of {e.name!r} has ended, and"
                             " processes of it live", e.id)
    members = held.members.get(e.slot.index, frozenset())
    for inhabitant in held.inspection.inhabitants.get(e.slot.index, ()):
        if inhabitant.pid not in members:
            yield Difference("stray", "process", str(inhabitant.pid),
                             f"{inhabitant.name} (pid {inhabitant.pid}, uid {inhabitant.uid}) is in the namespace of"
                             f" {e.name!r}, and has left its group", e.id)


def _rows(known: list[Environment], held: Held) -> Iterator[Difference]:
    ids = {e.id for e in known}
    for lost in sorted(ids - held.rows):
        yield Difference("missing", "row", lost, f"the state file has no environment {lost}", lost)
    for surplus in sorted(held.rows - ids):
        yield Difference("orphan", "row", surplus, f"the state file has an environment {surplus} that is not there")


def _leases(known: list[Environment], held: Held) -> Iterator[Difference]:
    due = {(p.protocol, p.published): e.id for e in known for p in e.ports}
    for protocol, port in sorted(due.keys() | held.leases.keys()):
        holder, leased = due.get((protocol, port)), held.leases.get((protocol, port))
        subject = f"{port}/{protocol}"
        if leased is None and holder is not None:
            yield Difference("missing", "port", subject, f"published port {subject} is not leased", holder)
        elif leased != holder:
            yield Difference("orphan", "port", subject, f"published port {subject} is leased to nobody")


def _orphans(found: Orphans) -> Iterator[Difference]:
    for index in found.slots:
        name = f"{PORT_PREFIX}{index}"
        yield Difference("orphan", "netns", name, f"a namespace or a link {name} is nobody's")
    for name in found.cgroups:
        yield Difference("orphan", "cgroup", name, f"a control group {name} is nobody's")
    for name in found.files:
        yield Difference("orphan", "files", name, f"files of an environment {name} that is not there")
