"""What an environment's processes may take together: how many of them, with their threads, there may be at once.

The pids controller of cgroup v2 does that where the groups above ours hand it on. Else the one of v1 does, where the
host has that: then each environment that is limited has a second group there, which its commands join before they give
up root's rights (joining takes up to 10 ms: kernel/cgroup/cgroup.c, cgroup_attach_lock). What is limited can neither
leave nor raise that, as the groups are root's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import NoReturn

import trio

from netnsd.errors import KernelError, LimitUnavailable

REMOVE_SECONDS = 10.0
_BUSY_SECONDS = 0.002


class PidsLimit:
    """Limits groups directly below ``root``.

    Args:
        root: our group of cgroup v2, which needs not be there yet.
        mount: where cgroup v2 is mounted.
    """

    def __init__(self, root: str, mount: str) -> None:
        self._root = root
        self._mount = mount
        old = _find_v1("pids")
        # One name, as the groups between may be another's (systemd's).
        self._old_root = None if old is None else os.path.join(old, os.path.relpath(root, mount).replace("/", "."))

    def require(self) -> None:
        """Raise LimitUnavailable where neither kind of controller is to be had."""
        reason = self._enable()
        if reason and self._old_root is None:
            _refuse(reason)

    def apply(self, group: str, most: int) -> tuple[str, ...]:
        """Limit a group; returns what else its commands must join. Raises LimitUnavailable, KernelError."""
        reason = self._enable()
        if reason and self._old_root is None:
            _refuse(reason)
        directory = os.path.join(self._old_root if reason and self._old_root else self._root, group)
        try:
            os.makedirs(directory, exist_ok=True)
            _write(os.path.join(directory, "pids.max"), str(most))
        except OSError as error:
            raise KernelError.at("limits", error) from error
        return (directory,) if reason else ()

    def observe(self) -> list[str]:
        """The groups that are limited by v1."""
        if self._old_root is None:
            return []
        try:
            with os.scandir(self._old_root) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    async def remove(self, group: str) -> None:
        """Remove what v1 has of a group, and kill what is left in it. Raises KernelError where it does not end."""
        if self._old_root is None:
            return
        directory = os.path.join(self._old_root, group)
        last: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), directory)
        with trio.move_on_after(REMOVE_SECONDS):
            while True:
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    self.remove_root()  # a daemon that was killed may have left it empty
                    return
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise KernelError.at("limits", error) from error
                    last = error
                else:
                    self.remove_root()
                    return
                # Who was moved out of the group of cgroup v2 is counted here still.
                _kill(directory)
                await trio.sleep(_BUSY_SECONDS)
        raise KernelError.at("limits", last)

    def remove_root(self) -> None:
        """Remove what v1 has of the root; it stays where anything is in it."""
        if self._old_root is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._old_root)

    def _enable(self) -> str:
        """Have our root hand the controller on; why it cannot, empty where it does.

        What is above the root is asked too where that is ours: a unit's delegated group, and never the mount itself.
        """
        try:
            os.makedirs(self._root, exist_ok=True)
            for directory in (os.path.dirname(self._root), self._root):
                if directory != self._mount and not _has(directory, "cgroup.subtree_control"):
                    if not _has(directory, "cgroup.controllers"):
                        return f"{directory} has no pids controller"
                    _write(os.path.join(directory, "cgroup.subtree_control"), "+pids")
        except OSError as error:
            return f"{error.filename or self._root}: {error.strerror}"
        return ""


def _refuse(reason: str) -> NoReturn:
    raise LimitUnavailable(f"this host cannot limit processes: {reason}",
                           hint="Leave the limit out, or have the controller pids handed on to netnsd's cgroup.",
                           limit="pids")


def _has(directory: str, file: str) -> bool:
    with open(os.path.join(directory, file), encoding="ascii") as names:
        return "pids" in names.read().split()


def _find_v1(controller: str) -> str | None:
    """Where the hierarchy of v1 with a controller is mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _source, options = after.split()[:3]
            if kind == "cgroup" and controller in options.split(","):
                return before.split(" ")[4]
    return None


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
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)
