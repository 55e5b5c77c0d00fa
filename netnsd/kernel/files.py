"""The files of an environment: its hosts and resolv.conf, and its services' logs. Implements ``core.interfaces.Files``.

Logs lie in directories that only root can write, so that users cannot put links in our way, and are root's: an owner
could take a lease on a file, or execute it, and whoever opens it then waits or fails. Their users may open them all the
same (servers that log to /dev/stdout do), by an access list. A log's offsets only grow; its head is punched out, so
that the disk it takes is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from netnsd.core.environment import Environment
from netnsd.errors import KernelError
from netnsd.kernel import libc

_HOSTS = Path("/etc/hosts")
_RESOLV_CONF = Path("/etc/resolv.conf")
_UPLINK_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")
_HOST_FILES = [str(path) for path in (_HOSTS, _RESOLV_CONF, _UPLINK_RESOLV_CONF)]
_BLOCK_BYTES = 4096
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ACL_VERSION, _ACL_NOBODY = 2, 0xFFFFFFFF
_ACL_USER_OBJ, _ACL_USER, _ACL_GROUP_OBJ, _ACL_MASK, _ACL_OTHER = 0x01, 0x02, 0x04, 0x10, 0x20


class EnvironmentFiles:
    """Files below the runtime directory (hosts, resolv.conf) and the state directory (logs).

    Args:
        runtime, state: the daemon's directories.
        log_bytes: the disk space that one service's log may take; a little more between two looks.
    """

    def __init__(self, runtime: Path, state: Path, log_bytes: int) -> None:
        self._names = runtime / "env"
        self._logs = state / "logs"
        self._log_bytes = log_bytes
        self._seen, self._followed = _stamps(), _of_host()
        for directory in (self._names, self._logs):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)

    def furnish(self, environment: Environment) -> tuple[str, str | None]:
        """See ``core.interfaces.Files``."""
        directory = f"{self._names}/{environment.id}"
        hosts, resolv = f"{directory}/hosts", f"{directory}/resolv.conf"
        try:
            _make_in(self._names, environment.id, 0o755)
            names, text = _of_host()
            _write(hosts, _hosts(environment, names))
            if text is None:
                return hosts, None
            _write(resolv, text)
        except OSError as error:
            raise KernelError.at("files", error) from error
        return hosts, resolv

    def follow_host(self, environments: Iterable[Environment]) -> Iterator[Environment]:
        """Where the host's names or name servers have changed since the last look, write them for ``environments``.

        In place: running servers have these very files mounted. Gives each that was changed, after it was; what keeps
        one from being written does not keep the others. Raises KernelError where the host's cannot be read.
        """
        seen = _stamps()
        if seen == self._seen:
            return
        names, text = _of_host()
        if (names, text) == self._followed:
            self._seen = seen
            return
        for environment in environments:
            directory = self._names / environment.id
            for path, wanted in ((directory / "hosts", _hosts(environment, names)), (directory / "resolv.conf", text)):
                if wanted is not None and path.exists():  # else nothing was started there yet
                    with contextlib.suppress(OSError):
                        _write(str(path), wanted)
            yield environment
        self._seen, self._followed = seen, (names, text)

    def open_log(self, environment: Environment, service: str) -> int:
        """See ``core.interfaces.Files``."""
        path = self.log_path(environment.id, service)
        try:
            _make_in(self._logs, environment.id, 0o711)
            fd = os.open(path, _APPEND, 0o600)
            _let_user_write(fd, environment.uid)
        except OSError as error:
            raise KernelError.at("log", error) from error
        return fd

    def log_path(self, environment_id: str, service: str) -> str:
        """See ``core.interfaces.Files``."""
        return str(self._logs / environment_id / f"{service}.log")

    def remove(self, environment_id: str) -> None:
        """See ``core.interfaces.Files``."""
        try:
            for name in _entries(self._logs / environment_id):
                with contextlib.suppress(OSError):  # what is no log of ours, such as a program that runs
                    _take_back(f"{self._logs}/{environment_id}/{name}")
        except OSError as error:
            raise KernelError.at("files", error) from error
        for directory in (self._names / environment_id, self._logs / environment_id):
            try:
                shutil.rmtree(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise KernelError.at("files", error) from error

    def remove_all(self) -> None:
        """Remove the directories themselves; what is in them stays."""
        for directory in (self._names, self._logs):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def observe(self) -> set[str]:
        """See ``core.interfaces.Files``."""
        try:
            return set(_entries(self._names)) | set(_entries(self._logs))
        except OSError as error:
            raise KernelError.at("files", error) from error

    def cap_logs(self) -> int:
        """Punch out the heads of logs that take too much disk. Returns how many grew beyond half of their bound."""
        busy = 0
        try:
            directories = _entries(self._logs)
        except OSError:  # out of descriptors, say: next time, then
            return 0
        for directory in directories:
            # Whatever is wrong with one log must not keep the others from being capped.
            with contextlib.suppress(OSError), os.scandir(self._logs / directory) as logs:
                for log in logs:
                    with contextlib.suppress(OSError):
                        taken = log.stat(follow_symlinks=False).st_blocks * 512
                        busy += taken > self._log_bytes // 2
                        if taken > self._log_bytes:
                            self._punch(log.path)
        return busy

    def _punch(self, path: str) -> None:
        # Half of the bound is kept, so that a busy log is not punched at every look.
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            end = os.fstat(fd).st_size - self._log_bytes // 2
            if end >= _BLOCK_BYTES:
                libc.fallocate_punch_hole(fd, 0, end // _BLOCK_BYTES * _BLOCK_BYTES)
            status = os.fstat(fd)
            if status.st_blocks * 512 > self._log_bytes:
                # Room that was reserved behind the end, which no log needs; what comes in this moment is lost.
                os.ftruncate(fd, status.st_size)
        finally:
            os.close(fd)


def _make_in(parent: Path, name: str, mode: int) -> None:
    """Make a directory in one of ours, which somebody may have removed."""
    try:
        os.mkdir(parent / name, mode)
    except FileExistsError:
        pass
    except FileNotFoundError:
        parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        os.mkdir(parent / name, mode)


def _entries(directory: Path) -> list[str]:
    """What is in one of our directories, which somebody may have removed."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _stamps() -> list[tuple[int, int, int] | None]:
    """What tells that one of the host's files has changed, or is there now, without reading it."""
    stamps: list[tuple[int, int, int] | None] = []
    for path in _HOST_FILES:
        try:
            status = os.stat(path)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return stamps


def _of_host() -> tuple[str, str | None]:
    """What the files are made of: the host's names, and its resolv.conf."""
    return _host_names_of(_read(_HOSTS) or ""), resolv_conf()


def _hosts(environment: Environment, names: str) -> str:
    return f"127.0.0.1\tlocalhost\n{environment.slot.address}\t{environment.name}\n{names}"


@functools.lru_cache(maxsize=4)
def _host_names_of(text: str) -> str:
    """The host's own /etc/hosts without its loopback names.

    IPv6 is off inside: localhost must not name ::1, which servers would bind alone and clients try first.
    """
    lines = text.splitlines()
    kept = [line for line in lines if (fields := line.split("#")[0].split()) and not _is_loopback(fields[0])]
    return "".join(f"{line}\n" for line in kept)


def _let_user_write(fd: int, uid: int) -> None:
    """Give ``uid`` read and write on a file of root's: acl(5), linux/posix_acl_xattr.h."""
    entries = [(_ACL_USER_OBJ, 6, _ACL_NOBODY), (_ACL_USER, 6, uid), (_ACL_GROUP_OBJ, 0, _ACL_NOBODY),
               (_ACL_MASK, 6, _ACL_NOBODY), (_ACL_OTHER, 0, _ACL_NOBODY)]
    value = struct.pack("<I", _ACL_VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(fd, "system.posix_acl_access", value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # such a file system has no access lists: its servers use their descriptor
            raise


def _take_back(path: str) -> None:
    """Empty a log, for root alone. A second name that its user gave it would be a file of root's to write to, that no
    quota of the user's counts and nobody caps.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # there is none on such a file system
            os.removexattr(fd, "system.posix_acl_access")
        os.fchmod(fd, 0o600)  # the list's mask was the group's
        if os.fstat(fd).st_nlink > 1:  # from here on nobody can make another
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def resolv_conf() -> str | None:
    """What environments resolve names with: the host's own, or its uplink's where the host's is a loopback stub.

    A stub at 127.0.0.53 is not there in another namespace. None where the host has no resolv.conf.
    """
    text = _read(_RESOLV_CONF)
    if text is None or not _is_loopback_only(text):
        return text
    return _read(_UPLINK_RESOLV_CONF) or text


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_loopback_only(text: str) -> bool:
    servers = [line.split()[1] for line in text.splitlines() if line.startswith("nameserver") and len(line.split()) > 1]
    return bool(servers) and all(_is_loopback(server) for server in servers)


def _write(path: str, text: str) -> None:
    # Never empty in between: somebody may be reading it.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, os.write(fd, text.encode(errors="surrogateescape")))
    finally:
        os.close(fd)


def _read(path: Path) -> str | None:
    """A file of the host's, read again when it has changed; None where it is not there."""
    try:
        status = os.stat(path)
        return _contents(path, status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise KernelError.at("resolv.conf", error) from error
        return None


@functools.lru_cache(maxsize=16)
def _contents(path: Path, _inode: int, _changed_ns: int, _size: int) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")  # an admin's comment may be in any encoding
