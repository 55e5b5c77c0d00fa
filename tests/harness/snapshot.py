"""What the kernel and the file system hold, as text, so that two moments can be compared.

A snapshot is of the machine, seen from the test's own process, or of a disposable host. On a machine that others use
too, what they do must not fail our tests: of processes and network namespaces, a machine's snapshot therefore counts
only those that came from this run, told by an inherited variable, by cgroup or by ancestry.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tests.harness import cgroups

if TYPE_CHECKING:
    from tests.harness.host import HostNamespace

RUN_ID = uuid.uuid4().hex[:8]
# Not NETNSD_*: the daemon reads those as configuration.
RUN_VARIABLE = "HARNESS_RUN"

_OF_RUN = re.compile(r"netnsd-(?:host|test)-([0-9a-f]{8})-\w+")
_NETNS = re.compile(r"net:\[(\d+)\]")
_WATCHED_TREES = ("/run", "/var/lib", "/etc/netns", "/var/log/netnsd")
# Package managers, which other people run, and the test data of the machine's own services.
_IGNORED_TREES = ("/var/lib/apt", "/var/lib/dpkg", "/run/lock", "/run/log", "/run/systemd", "/run/udev", "/run/user")
_TREE_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sets of descriptions, by kind. ``namespaces`` are inode numbers of network namespaces."""

    links: frozenset[str]
    addresses: frozenset[str]
    routes: frozenset[str]
    neighbours: frozenset[str]
    tables: frozenset[str]
    elements: frozenset[str]
    mounts: frozenset[str]
    namespaces: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of_machine(cls) -> Snapshot:
        """The machine, as this process sees it."""
        def run(command: list[str]) -> str:
            return _output([shutil.which(command[0]) or command[0], *command[1:]])

        mount = cgroups.cgroup2_mount()
        ours = sorted(_processes_of_this_run())
        mountinfo = _read("/proc/self/mountinfo")
        trees = [path for tree in _WATCHED_TREES for path in _tree(tree)]
        temporary = [f"/tmp/{name}" for name in os.listdir("/tmp") if name.startswith("netnsd")]
        return cls(
            **_network(run),
            mounts=frozenset(_mounts(mountinfo)),
            namespaces=frozenset(_namespaces(ours, mountinfo)),
            cgroups=frozenset(path for path in (*_directories(mount), *_limiting()) if not _of_another_run(path)),
            processes=frozenset(f"{pid} {_command_line(pid)}" for pid in ours),
            files=frozenset(trees + temporary),
        )

    @classmethod
    def of_host(cls, host: HostNamespace) -> Snapshot:
        """A disposable host, without what the harness itself keeps on it."""
        def run(command: list[str]) -> str:
            return host.run(command, cwd="/").stdout

        mountinfo = _read(f"/proc/{host.host_pid}/mountinfo")
        pids = host.processes()
        root = f"/proc/{host.host_pid}/root"
        files = [path.removeprefix(root) for path in _tree(f"{root}/run", depth=6)]
        return cls(
            **_network(run),
            mounts=frozenset(_mounts(mountinfo)),
            namespaces=frozenset(_namespaces([host.host_pid, *pids], mountinfo)),
            cgroups=frozenset((*_directories(host.cgroup), *_directories(host.daemon_cgroup),
                               *(path for group in cgroups.limits_of(host.daemon_cgroup_name)
                                 for path in _directories(group)))),
            processes=frozenset(f"{pid} {_command_line(pid)}" for pid in pids),
            files=frozenset(path for path in files if not path.startswith("/run/harness")),
        )


def differences(before: Snapshot, after: Snapshot, *, ignore: Iterable[str] = ()) -> list[str]:
    """What came and what went, a line each, such as ``links: came nd0``; kinds in ``ignore`` are left out."""
    skipped = set(ignore)
    lines: list[str] = []
    for field in fields(Snapshot):
        if field.name in skipped:
            continue
        old, new = getattr(before, field.name), getattr(after, field.name)
        lines += [f"{field.name}: came {item}" for item in sorted(new - old)]
        lines += [f"{field.name}: went {item}" for item in sorted(old - new)]
    return lines


def settle(before: Snapshot, take: Callable[[], Snapshot], *, seconds: float = 5.0, only_new: bool = False,
           ignore: Iterable[str] = ()) -> list[str]:
    """The differences that are still there after ``seconds``: the kernel destroys namespaces a little later.

    With ``only_new``, what went does not count: others tidy up too.
    """
    skipped = tuple(ignore)
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= deadline
        lines = differences(before, take(), ignore=skipped)
        if only_new:
            lines = [line for line in lines if ": came " in line]
        if not lines or late:
            return lines
        time.sleep(0.05)


def open_descriptors(pid: int) -> list[str]:
    """What the process has open, as the kernel names it; unnamed objects without their numbers."""
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(re.sub(r"\[\d+\]", "[]", os.readlink(f"/proc/{pid}/fd/{number}")))
        except FileNotFoundError:
            continue
    return sorted(names)


# -- the parts --------------------------------------------------------------------------------------------------


def _network(run: Callable[[list[str]], str]) -> dict[str, frozenset[str]]:
    def ip(*arguments: str) -> list[dict[str, Any]]:
        listing: list[dict[str, Any]] = json.loads(run(["ip", "-j", *arguments]) or "[]")
        return [row for row in listing if row]

    addresses = ip("address")
    has_nft = shutil.which("nft") is not None
    ruleset = json.loads(run(["nft", "-j", "list", "ruleset"]) or "{}").get("nftables", []) if has_nft else []
    routes = [*ip("route", "show", "table", "all"), *ip("-6", "route", "show", "table", "all")]
    return {
        "links": frozenset(row["ifname"] for row in addresses),
        "addresses": frozenset(f"{row['ifname']} {a['local']}/{a['prefixlen']}"
                               for row in addresses for a in row["addr_info"] if a.get("scope") != "link"),
        # Link-local and multicast routes come with a link some time after it is up.
        "routes": frozenset(f"{row['dst']} dev {row.get('dev')}" for row in routes
                            if not str(row["dst"]).startswith(("fe80", "ff00", "multicast"))),
        "neighbours": frozenset(f"{row['dst']} dev {row['dev']}"
                                for row in ip("neighbour", "show", "nud", "permanent")),
        "tables": frozenset(f"{row['table']['family']} {row['table']['name']}" for row in ruleset if "table" in row),
        "elements": frozenset(_elements(ruleset)),
    }


def _elements(ruleset: list[dict[str, Any]]) -> Iterator[str]:
    for row in ruleset:
        for kind in ("set", "map"):
            for element in row.get(kind, {}).get("elem", []):
                yield f"{row[kind]['table']} {row[kind]['name']} {json.dumps(element)}"


def _mounts(mountinfo: str) -> Iterator[str]:
    """A mount point that is mounted on twice counts twice."""
    seen: dict[str, int] = {}
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        point = head.split()[4]
        if "/fdinfo" in point:
            continue
        seen[point] = seen.get(point, 0) + 1
        yield f"{point} {tail.split()[0]} {seen[point]}"


def _namespaces(pids: Iterable[int], mountinfo: str) -> Iterator[str]:
    """Network namespaces that processes live in, and that are pinned by mounts."""
    for pid in pids:
        match = _NETNS.match(_link(f"/proc/{pid}/ns/net"))
        if match:
            yield match[1]
    for line in mountinfo.splitlines():
        match = _NETNS.match(line.split()[3])
        if match:
            yield match[1]


def _processes_of_this_run() -> Iterator[int]:
    parents: dict[int, int] = {}
    marked: set[int] = set()
    marker = f"{RUN_VARIABLE}={RUN_ID}"
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        status = _read(f"/proc/{pid}/stat")
        if not status:
            continue
        state, parent_field = status.rpartition(")")[2].split()[:2]
        parents[pid] = int(parent_field)
        # A zombie is its parent's business, and gone with it.
        if state != "Z" and (marker in _read(f"/proc/{pid}/environ").split("\0") or RUN_ID in
                             _read(f"/proc/{pid}/cgroup")):
            marked.add(pid)
    me = os.getpid()
    for pid, parent in parents.items():
        ancestor = parent
        while ancestor != me and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == me or pid in marked:
            yield pid


def _tree(top: str, depth: int = _TREE_DEPTH) -> list[str]:
    found: list[str] = []
    for directory, directories, files in os.walk(top):
        relative = os.path.relpath(directory, top)
        level = 0 if relative == "." else relative.count("/") + 1
        found += [f"{directory}/{name}" for name in (*directories, *files)]
        directories[:] = [name for name in directories if level + 1 < depth
                          and f"{directory}/{name}" not in _IGNORED_TREES]
    return found


def _directories(top: str) -> list[str]:
    return [directory for directory, _, _ in os.walk(top)]


def _limiting() -> list[str]:
    """Groups of cgroup v1 that netnsd made; others make some too."""
    return [path for group in cgroups.limits_of("") for path in _directories(group) if "netnsd" in path]


def _of_another_run(path: str) -> bool:
    match = _OF_RUN.search(path)
    return match is not None and match[1] != RUN_ID


def _command_line(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # gone meanwhile: ENOENT before the open, ESRCH after it
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
