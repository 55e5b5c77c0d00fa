"""What the kernel holds of slots: pins, names, links, and who is in their namespaces. Looks only.

Everything here runs in a thread that is in the host's network namespace.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from netnsd.core.addressing import FIRST_PORT_IFINDEX, PORT_PREFIX
from netnsd.core.interfaces import Inhabitant, Inspection, Wiring
from netnsd.kernel import inhabitants, rtnetlink


def inode(path: str) -> os.stat_result | None:
    """What is at a path, not followed; None for nothing."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def is_namespace(status: os.stat_result) -> bool:
    """Whether this is a file of nsfs: all namespaces are on the one device that our own is on."""
    return status.st_dev == os.stat("/proc/self/ns/net").st_dev


def namespace_at(path: str) -> int | None:
    """The inode number of the namespace that is pinned at a path; None where none is."""
    status = inode(path)
    return status.st_ino if status is not None and is_namespace(status) else None


def take(pins: Path, names: Path) -> dict[int, Wiring]:
    """See ``core.interfaces.Network.survey``.

    Args:
        pins: the directory of pins, named after slots' indexes.
        names: /run/netns.

    Raises OSError.
    """
    pinned = {int(entry): namespace_at(f"{pins}/{entry}") for entry in _entries(pins) if entry.isdigit()}
    leading: defaultdict[int | None, set[str]] = defaultdict(set)
    for name in _entries(names):
        leading[namespace_at(f"{names}/{name}")].add(name)
    with contextlib.closing(rtnetlink.RouteSocket()) as route:
        links = {port.index - FIRST_PORT_IFINDEX: port for port in route.ports() if _is_ours(port)}
    found = {}
    for index in pinned.keys() | links.keys():
        namespace, link = pinned.get(index), links.get(index)
        found[index] = Wiring(
            pinned=namespace is not None,
            names=frozenset(leading[namespace]) if namespace is not None else frozenset(),
            master=None if link is None else link.master,
            is_sound=link is not None and link.is_up and link.group == rtnetlink.LINK_GROUP
            and link.alias == rtnetlink.LINK_ALIAS,
            mac=b"" if link is None else link.mac)
    return found


def _entries(directory: Path) -> list[str]:
    """Of a directory that somebody may have removed."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _is_ours(port: rtnetlink.Port) -> bool:
    """By index and name, which are chosen together; whatever else it lost."""
    return port.index >= FIRST_PORT_IFINDEX and port.name == f"{PORT_PREFIX}{port.index - FIRST_PORT_IFINDEX}"


def inspect(pins: Path, names: Path) -> Inspection:
    """See ``core.interfaces.Network.inspect``. Arguments as of ``take``. Raises OSError."""
    slots = {namespace: int(entry) for entry in _entries(pins)
             if entry.isdigit() and (namespace := namespace_at(f"{pins}/{entry}")) is not None}
    found: defaultdict[int, list[Inhabitant]] = defaultdict(list)
    for pid, namespace in inhabitants.find(slots.keys()):
        with contextlib.suppress(OSError):  # it ended meanwhile
            uid = os.stat(f"/proc/{pid}").st_uid
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
            found[slots[namespace]].append(Inhabitant(pid, uid, name))
    return Inspection(found, frozenset(_stacked(pins, names, slots)))


def _stacked(pins: Path, names: Path, slots: Mapping[int, int]) -> list[str]:
    """Paths on which more than one mount lies, at least one of them of a slot's namespace."""
    mounted: defaultdict[str, list[str]] = defaultdict(list)
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        root, point = line.split(" ", 5)[3:5]
        if point.startswith((f"{pins}/", f"{names}/")):
            mounted[point].append(root)
    ours = {f"net:[{namespace}]" for namespace in slots}
    return [point for point, roots in mounted.items() if len(roots) > 1 and not ours.isdisjoint(roots)]
