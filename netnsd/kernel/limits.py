"""What an environment's processes may take together: memory, processor time, and how many of them there may be at once.

Controllers of cgroup v2 see to that where the groups above ours hand them on. Else those of v1 do, where the host has
them: then each environment that is limited has a second group there, which its commands join before they give up root's
rights (joining takes up to 10 ms: kernel/cgroup/cgroup.c, cgroup_attach_lock). What is limited can neither leave nor
raise that, as the groups are root's.

Files: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{memory,pids}.rst, scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import trio

from netnsd import wire
from netnsd.errors import KernelError, LimitUnavailable

REMOVE_SECONDS = 10.0
_BUSY_SECONDS = 0.002
_PERIOD_US = 100_000  # the kernel's own default

Files = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A controller. ``what`` it limits; ``new`` and ``old``: what to write for a limit, in v2 and in v1, in order."""

    what: str
    new: Callable[[float], Files]
    old: Callable[[float], Files]


def _quota(cores: float) -> str:
    return str(round(cores * _PERIOD_US))


# By the name that the kernel has for the controller, and Resources for the limit.
_KINDS = {
    "memory": _Kind("memory", lambda most: {"memory.max": str(most), "memory.swap.max": "0"},
                    lambda most: {"memory.limit_in_bytes": str(most), "memory.memsw.limit_in_bytes": str(most)}),
    "cpu": _Kind("processor time", lambda cores: {"cpu.max": f"{_quota(cores)} {_PERIOD_US}"},
                 lambda cores: {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": _quota(cores)}),
    "pids": _Kind("processes", lambda most: {"pids.max": str(most)}, lambda most: {"pids.max": str(most)}),
}
# A kernel that cannot swap has none of these.
_OF_SWAP = frozenset({"memory.swap.max", "memory.memsw.limit_in_bytes"})


def asked(resources: wire.Resources) -> dict[str, float]:
    """The limits that controllers hold, by their names."""
    return {name: value for name in _KINDS if (value := getattr(resources, name)) is not None}


class Limits:
    """Limits groups directly below ``root``.

    Args:
        root: our group of cgroup v2, which needs not be there yet.
        mount: where cgroup v2 is mounted.
    """

    def __init__(self, root: str, mount: str) -> None:
        self._root = root
        self._mount = mount
        # One name, as the groups between may be another's (systemd's).
        name = os.path.relpath(root, mount).replace("/", ".")
        self._old = {kind: os.path.join(found, name) for kind in _KINDS if (found := _find_v1(kind)) is not None}

    @property
    def old_roots(self) -> list[str]:
        """Our groups of v1, of which none needs to be there."""
        return list(dict.fromkeys(self._old.values()))

    def has(self) -> dict[str, bool]:
        """Which limits this host can hold, by name. Changes nothing."""
        return {kind: kind in self._old or not self._lack(kind) for kind in _KINDS}

    def require(self, limits: Mapping[str, float]) -> None:
        """Raise LimitUnavailable where neither kind of controller is to be had for one of them."""
        for kind in limits:
            self._place(kind)

    def apply(self, group: str, limits: Mapping[str, float]) -> tuple[str, ...]:
        """Limit a group; returns what else its commands must join. Raises LimitUnavailable, KernelError."""
        joins: dict[str, None] = {}
        for kind, most in limits.items():
            root, is_old = self._place(kind)
            directory = os.path.join(root, group)
            try:
                os.makedirs(directory, exist_ok=True)
                for file, value in (_KINDS[kind].old if is_old else _KINDS[kind].new)(most).items():
                    _write(os.path.join(directory, file), value)
            except OSError as error:
                raise KernelError.at("limits", error) from error
            if is_old:
                joins[directory] = None
        return tuple(joins)

    def memory_group(self, group: str) -> tuple[str, bool]:
        """The directory in which the memory of a group that has a limit is counted, and whether that is v1's."""
        new = os.path.join(self._root, group)
        if "memory" in self._old and not os.path.exists(os.path.join(new, "memory.max")):
            return os.path.join(self._old["memory"], group), True
        return new, False

    def observe(self) -> list[str]:
        """The groups that are limited by v1."""
        found = []
        for root in self.old_roots:
            with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
                found += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return found

    async def remove(self, group: str) -> None:
        """Remove what v1 has of a group, and kill what is left in it. Raises KernelError where it does not end."""
        for root in self.old_roots:
            await _remove(os.path.join(root, group))
        self.remove_root()  # a daemon that was killed may have left it empty

    def remove_root(self) -> None:
        """Remove what v1 has of the root; it stays where anything is in it."""
        for root in self.old_roots:
            with contextlib.suppress(OSError):
                os.rmdir(root)

    def _place(self, kind: str) -> tuple[str, bool]:
        """Our group in which a limit of that kind holds, and whether that is v1's."""
        reason = self._enable(kind)
        if not reason:
            return self._root, False
        if kind not in self._old:
            _refuse(kind, reason)
        return self._old[kind], True

    def _enable(self, kind: str) -> str:
        """Have our root hand the controller on; why it cannot, empty where it does.

        What is above the root is asked too where that is ours: a unit's delegated group, and never the mount itself.
        """
        try:
            os.makedirs(self._root, exist_ok=True)
            for directory in (os.path.dirname(self._root), self._root):
                if directory != self._mount and not _has(directory, "cgroup.subtree_control", kind):
                    if not _has(directory, "cgroup.controllers", kind):
                        return f"{directory} has no {kind} controller"
                    _write(os.path.join(directory, "cgroup.subtree_control"), f"+{kind}")
        except OSError as error:
            return f"{error.filename or self._root}: {error.strerror}"
        return ""

    def _lack(self, kind: str) -> str:
        """Why our root could not hand the controller on, as far as one sees that without trying."""
        above = os.path.dirname(self._root)
        file = "cgroup.subtree_control" if above == self._mount else "cgroup.controllers"
        try:
            return "" if _has(above, file, kind) else f"{above} has no {kind} controller"
        except OSError as error:
            return f"{above}: {error.strerror}"


def _refuse(kind: str, reason: str) -> NoReturn:
    raise LimitUnavailable(f"this host cannot limit {_KINDS[kind].what}: {reason}",
                           hint=f"Leave the limit out, or have the controller {kind} handed on to netnsd's cgroup.",
                           limit=kind)


def _has(directory: str, file: str, kind: str) -> bool:
    with open(os.path.join(directory, file), encoding="ascii") as names:
        return kind in names.read().split()


def _find_v1(controller: str) -> str | None:
    """Where the hierarchy of v1 with a controller is mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _source, options = after.split()[:3]
            if kind == "cgroup" and controller in options.split(","):
                return before.split(" ")[4]
    return None


async def _remove(directory: str) -> None:
    last: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), directory)
    with trio.move_on_after(REMOVE_SECONDS):
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise KernelError.at("limits", error) from error
                last = error
            else:
                return
            # Who was moved out of the group of cgroup v2 is counted here still.
            _kill(directory)
            await trio.sleep(_BUSY_SECONDS)
    raise KernelError.at("limits", last)


def _kill(directory: str) -> None:
    for pid in _members(directory):
        with contextlib.suppress(OSError):  # it has ended, or we are out of descriptors: the next round gets it
            handle = os.pidfd_open(pid)
            try:
                if pid in _members(directory):  # and not another that got its number meanwhile
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _members(directory: str) -> list[int]:
    try:
        with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # gone meanwhile
        return []


def _write(path: str, value: str) -> None:
    """Buffered files report errors at close only."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.basename(path) in _OF_SWAP:
            return
        raise
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)
