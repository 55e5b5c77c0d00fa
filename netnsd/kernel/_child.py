"""What happens between fork and exec.

Part of the launcher: standard library only, one thread, everything imported before the first fork. A child does its
steps in one order, each under a stable name (its stage), and reports the one that failed through a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import struct
import termios

from netnsd.kernel import libc

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any, NoReturn

DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"
SO_PASSRIGHTS = 83  # asm-generic/socket.h, Linux 6.16
DESCRIPTORS_SECONDS = 10.0
_MAX_SUBJECT_BYTES = 512

_LIMITS = {name[7:].lower(): getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
_FRAME = struct.Struct(">I")


class StageError(Exception):
    """A step failed: its stage, an errno, and what it was about (a path, a name, or nothing)."""

    def __init__(self, stage: str, number: int, subject: str = "") -> None:
        super().__init__(stage, number, subject)
        self.stage = stage
        self.number = number
        # Users choose it: no answer may grow beyond a message for it, and the cut may go through a character.
        self.subject = subject.encode("utf-8", "replace")[:_MAX_SUBJECT_BYTES].decode("utf-8", "replace")

    @property
    def errno_name(self) -> str:
        """Such as EACCES."""
        return errno.errorcode.get(self.number, str(self.number))

    @property
    def message(self) -> str:
        """For people, such as ``chdir: Permission denied: /srv/x``."""
        reason = os.strerror(self.number) if self.number else "failed"
        return f"{self.stage}: {reason}" + (f": {self.subject}" if self.subject else "")

    @property
    def hint(self) -> str:
        """What to do next; empty where there is nothing to say."""
        return _HINTS.get((self.stage, self.number)) or _HINTS.get((self.stage, 0), "")

    def encode(self) -> bytes:
        """As it travels through a pipe, in one atomic write."""
        subject = _bytes(self.subject)[:_MAX_SUBJECT_BYTES]
        return b"\0".join((self.stage.encode(), str(self.number).encode(), subject))

    @classmethod
    def decode(cls, data: bytes) -> StageError:
        """The inverse of ``encode``."""
        stage, number, subject = data.split(b"\0", 2)
        return cls(stage.decode(), int(number), subject.decode("utf-8", "replace"))


_HINTS = {
    ("chdir", errno.ENOENT): "Create the directory, or name another with --cwd.",
    ("chdir", errno.EACCES): "The command's user may not enter that directory. Name another with --cwd.",
    ("exec", errno.ENOENT): "Check the command's name and PATH; of a script, check the interpreter in its first line.",
    ("exec", errno.EACCES): "The file is there, but the command's user may not execute it (chmod +x).",
    ("exec", errno.ENOEXEC): "A script needs a first line such as #!/bin/sh.",
    ("exec", errno.E2BIG): "Arguments and variables together are too large.",
    ("exec", errno.EAGAIN): "The user has as many processes as its limit allows.",
    ("limits", 0): "Limits are named as in `ulimit`'s system calls: nofile, nproc, core ...",
    ("mounts", 0): "`netnsctl doctor` checks what this host lacks.",
}


class Settings:
    """What all children share: found once, when the launcher starts. Raises OSError without /dev/null."""

    __slots__ = ("adjust_oom", "ignored_signals", "null_fd", "soft_nofile")

    def __init__(self) -> None:
        self.null_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.soft_nofile, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Python ignores these two by itself; no child has to take that back when nobody does it.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        self.ignored_signals = [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN]
        try:
            with open("/proc/self/oom_score_adj", "rb") as file:
                self.adjust_oom = file.read().strip() != b"0"
        except OSError:
            self.adjust_oom = False


class Order:
    """One command to start, decoded from JSON, checked, and encoded for exec before the fork.

    Raises StageError for a limit that does not exist, ValueError for anything else malformed.
    """

    __slots__ = ("argv", "cwd", "env", "gid", "groups", "hard_limits", "hostname", "hosts_file", "launch_id",
                 "limits", "resolv_file", "setuid", "tty", "uid", "umask")

    def __init__(self, data: bytes) -> None:
        try:
            fields: dict[str, Any] = json.loads(data)
            self.launch_id = _text(fields["launch_id"])
            self.argv = [_bytes(argument) for argument in fields["argv"]]
            self.env = {_bytes(name): _bytes(value) for name, value in fields["env"].items()}
            self.cwd = _text(fields["cwd"])
            self.uid = _id(fields["uid"])
            self.gid = _id(fields["gid"])
            self.groups = [_id(group) for group in fields["groups"]]
            self.umask = int(fields["umask"]) & 0o777
            self.limits = _limits(fields["limits"])
            self.hard_limits = _limits(fields["hard_limits"])
            self.setuid = bool(fields["setuid"])
            self.hosts_file = _text(fields["hosts_file"])
            self.resolv_file = None if fields["resolv_file"] is None else _text(fields["resolv_file"])
            self.hostname = _text(fields["hostname"])
            self.tty = bool(fields["tty"])
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"malformed order: {error!r}") from error
        if not self.argv:
            raise ValueError("malformed order: no command")


class Handles:
    """Descriptors of one start: the group's directory, the namespace, and ``log`` or ``connection``."""

    __slots__ = ("cgroup", "connection", "log", "netns")

    def __init__(self, cgroup: int, netns: int, log: int = -1, connection: int = -1) -> None:
        self.cgroup = cgroup
        self.netns = netns
        self.log = log
        self.connection = connection


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("malformed order: not a text without NUL")
    return value


def _bytes(value: Any) -> bytes:
    return _text(value).encode("utf-8", "surrogateescape")


def _id(value: Any) -> int:
    # -1 means "unchanged" to setresuid(2), which would leave the command with root's ids.
    if not isinstance(value, int) or not 0 <= value < 2**32 - 1:
        raise ValueError("malformed order: not a user or group id")
    return value


def _limits(wanted: dict[str, int]) -> list[tuple[int, int]]:
    for name, soft in wanted.items():
        if name not in _LIMITS:
            raise StageError("limits", errno.EINVAL, name)
        if not isinstance(soft, int) or soft < resource.RLIM_INFINITY:
            raise ValueError(f"malformed order: limit {name}")
    return [(_LIMITS[name], soft) for name, soft in wanted.items()]


def close_all_but(*kept: int) -> None:
    """Close every descriptor above 2 that is not in ``kept``."""
    first = 3
    for fd in sorted(kept):
        if fd > first:
            libc.close_range(first, fd - 1)
        first = max(first, fd + 1)
    libc.close_range(first, 2**32 - 1)


def frame(message: dict[str, Any]) -> bytes:
    """A message as attach.sock has them: its length, and JSON."""
    data = json.dumps(message).encode()
    return _FRAME.pack(len(data)) + data


def exit_code(status: int) -> int:
    """From waitpid(2)'s status to 0-255, or 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def fork_child(order: Order, handles: Handles, settings: Settings) -> tuple[int, int]:
    """Start it: its pid, and a pipe that ends when it was exec'd, or else gives a StageError. The caller closes it.

    Raises StageError ``fork`` or ``cgroup``.
    """
    reading, writing = os.pipe()
    try:
        pid, is_placed = _fork(handles.cgroup)
        if pid == 0:
            Child(order, handles, settings, writing, is_placed=is_placed).become()
    except OSError as error:
        os.close(reading)
        stage = "cgroup" if error.errno in _REFUSALS_OF_GROUPS else "fork"
        raise StageError(stage, error.errno or errno.EAGAIN) from error
    finally:
        os.close(writing)
    return pid, reading


# A group that was removed, that has controllers and so no processes of its own, or that is of another kind.
_REFUSALS_OF_GROUPS = (errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.EOPNOTSUPP, errno.EBADF)


def _fork(cgroup: int) -> tuple[int, bool]:
    """A fork that is born in the group, or where the kernel has no such thing an ordinary one; and which.

    Moving a process to another group waits for a grace period of RCU, 10 ms and more, unless one was moved just
    before (cgroup_threadgroup_rwsem, kernel/cgroup/cgroup.c). Being born there does not.
    """
    try:
        return libc.fork_into_cgroup(cgroup), True
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG):
            raise
    return os.fork(), False


def _accept_descriptors(connection: socket.socket, accept: bool) -> None:
    # Older kernels always accept, and say ENOPROTOOPT.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(accept))


class Child:
    """A forked child on its way to exec. ``become`` never returns."""

    def __init__(self, order: Order, handles: Handles, settings: Settings, report_fd: int, *,
                 is_placed: bool) -> None:
        self._order = order
        self._handles = handles
        self._settings = settings
        self._report_fd = report_fd
        self._is_placed = is_placed

    def become(self) -> NoReturn:
        """Do every step; report the one that fails."""
        stage = "session"
        try:
            self._leave_launcher()
            for stage, step in _STEPS:  # noqa: B007  # read where a step failed
                step(self)
        except StageError as error:
            self._report(error)
        except OSError as error:
            subject = error.filename if isinstance(error.filename, str) else ""
            self._report(StageError(stage, error.errno or errno.ETIMEDOUT, subject))
        except MemoryError:  # a small limit on memory, already in force
            self._report(StageError(stage, errno.ENOMEM))
        except (ValueError, OverflowError) as error:
            self._report(StageError(stage, errno.EINVAL, str(error)))
        except BaseException as error:  # silence would be taken for success  # noqa: BLE001
            self._report(StageError(stage, errno.EIO, repr(error)))
        finally:
            os._exit(127)

    def _report(self, error: StageError) -> None:
        os.write(self._report_fd, error.encode())

    def _leave_launcher(self) -> None:
        """Behave as a program does, and hold nothing that would hide the launcher's end from the daemon."""
        for number in (*self._settings.ignored_signals, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        handles = self._handles
        close_all_but(handles.cgroup, handles.netns, self._settings.null_fd, self._report_fd,
                      handles.log if handles.log >= 0 else handles.connection)

    def _join_cgroup(self) -> None:
        if not self._is_placed:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._handles.cgroup)
            os.write(procs, b"0")

    def _enter_directory(self) -> None:
        """As the user, for directories that root may not enter (NFS); the saved id stays root's until ``ids``."""
        order = self._order
        os.setgroups(order.groups)
        os.setegid(order.gid)
        os.seteuid(order.uid)
        os.chdir(order.cwd)
        os.seteuid(0)
        os.setegid(0)

    def _enter_network(self) -> None:
        libc.setns(self._handles.netns, libc.CLONE_NEWNET)

    def _make_mounts(self) -> None:
        order = self._order
        libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWUTS)
        libc.mount(None, "/", None, libc.MS_REC | libc.MS_PRIVATE)
        libc.mount(order.hosts_file, "/etc/hosts", None, libc.MS_BIND)
        if order.resolv_file is not None:
            libc.mount(order.resolv_file, "/etc/resolv.conf", None, libc.MS_BIND)
        # A sysfs shows the network devices of the namespace that it was mounted in.
        flags = libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC | libc.AT_RECURSIVE
        cgroups = libc.open_tree(libc.AT_FDCWD, "/sys/fs/cgroup", flags)
        libc.mount("sysfs", "/sys", "sysfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
        libc.move_mount(cgroups, "/sys/fs/cgroup")

    def _set_hostname(self) -> None:
        # sudoers has rules by host name: who may gain rights does not choose it.
        if not self._order.setuid:
            libc.sethostname(self._order.hostname)

    def _make_session(self) -> None:
        os.setsid()
        os.umask(self._order.umask)

    def _set_limits(self) -> None:
        for kind, most in self._order.hard_limits:
            soft, hard = resource.getrlimit(kind)
            if most >= 0 and (hard == resource.RLIM_INFINITY or most < hard):
                resource.setrlimit(kind, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))
        if self._settings.adjust_oom:
            # Without CAP_SYS_RESOURCE the kernel refuses to lower it: then it stays as the launcher's.
            with contextlib.suppress(PermissionError):
                fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
                os.write(fd, b"0")
        for kind, wanted in ((resource.RLIMIT_NOFILE, self._settings.soft_nofile), *self._order.limits):
            hard = resource.getrlimit(kind)[1]
            soft = wanted if hard == resource.RLIM_INFINITY else hard if wanted < 0 else min(wanted, hard)
            resource.setrlimit(kind, (soft, hard))

    def _drop_ids(self) -> None:
        order = self._order
        os.setgroups(order.groups)
        os.setresgid(order.gid, order.gid, order.gid)
        os.setresuid(order.uid, order.uid, order.uid)
        # The launcher's is dead (see launcher.main). Without one of its own, as with too many keys, a command goes on.
        with contextlib.suppress(OSError):
            libc.join_session_keyring()

    def _drop_privileges(self) -> None:
        if not self._order.setuid:
            libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)

    def _set_descriptors(self) -> None:
        handles = self._handles
        if handles.connection >= 0:
            descriptors = self._receive_descriptors()
        else:
            descriptors = (self._settings.null_fd, handles.log, handles.log)
        for target, fd in enumerate(descriptors):
            os.dup2(fd, target)
        if self._order.tty:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def _receive_descriptors(self) -> tuple[int, ...]:
        """The client's own stdin, stdout and stderr; by now this process has no more rights than the client."""
        connection = socket.socket(fileno=self._handles.connection)
        connection.settimeout(DESCRIPTORS_SECONDS)
        _accept_descriptors(connection, True)
        connection.sendall(frame({"ready": True}))
        room = socket.CMSG_SPACE(3 * struct.calcsize("i"))
        data, ancillary, flags, _ = connection.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        _accept_descriptors(connection, False)
        if not data:
            raise OSError(errno.ECONNRESET, "")
        rights = [d for level, kind, d in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)]
        if data != b"\0" or flags & socket.MSG_CTRUNC or len(rights) != 1 or len(rights[0]) != struct.calcsize("3i"):
            raise OSError(errno.EBADMSG, "")
        return struct.unpack("3i", rights[0])

    def _execute(self) -> NoReturn:
        """As execvp(3) in the command's own PATH, but with the reasons that a shell gives."""
        argv, env = self._order.argv, self._order.env
        name = argv[0]
        if b"/" in name:
            _execve(name, argv, env)
        found = errno.ENOENT
        for directory in env.get(b"PATH", DEFAULT_PATH).split(b":") if name else ():
            path = os.path.join(directory or b".", name)
            try:
                mode = os.stat(path).st_mode
            except OSError:  # not there, or not to be seen by this user: the next directory may have it
                continue
            if stat.S_ISDIR(mode):
                continue
            try:
                _execve(path, argv, env)
            except PermissionError:
                found = errno.EACCES
        raise StageError("exec", found, name.decode("utf-8", "surrogateescape"))


def _execve(path: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> NoReturn:
    try:
        os.execve(path, argv, env)  # noqa: S606  # no shell is the point
    except OSError as error:
        raise OSError(error.errno, "", path.decode("utf-8", "surrogateescape")) from error


_STEPS = (
    ("cgroup", Child._join_cgroup),
    ("chdir", Child._enter_directory),
    ("setns", Child._enter_network),
    ("mounts", Child._make_mounts),
    ("hostname", Child._set_hostname),
    ("session", Child._make_session),
    ("limits", Child._set_limits),
    ("ids", Child._drop_ids),
    ("privileges", Child._drop_privileges),
    ("stdio", Child._set_descriptors),
    ("exec", Child._execute),
)
