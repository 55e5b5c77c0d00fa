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
import select
import signal
import socket
import stat
import struct
import termios

from netnsd.kernel import libc
from netnsd.kernel._messages import receive, send
from netnsd.kernel._order import Order, StageError

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any, NoReturn

DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"
SO_PASSRIGHTS = 83  # asm-generic/socket.h, Linux 6.16
DESCRIPTORS_SECONDS = 10.0
HOLD_SECONDS = 1
HOLDER = b"holder"

_FRAME = struct.Struct(">I")


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


class Handles:
    """Descriptors of one start: the group's directory, the namespace, and ``log`` or ``connection``."""

    __slots__ = ("cgroup", "connection", "log", "netns")

    def __init__(self, cgroup: int, netns: int = -1, log: int = -1, connection: int = -1) -> None:
        self.cgroup = cgroup
        self.netns = netns
        self.log = log
        self.connection = connection


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


def _accept_descriptors(connection: socket.socket, accept: bool) -> None:
    # Older kernels always accept, and say ENOPROTOOPT.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(accept))


class Child:
    """A forked child on its way to exec. ``become`` never returns.

    What fails is told to ``report_fd``. Without an ``order`` it waits for one, that comes through ``channel``.
    """

    _order: Order

    def __init__(self, handles: Handles, settings: Settings, report_fd: int, order: Order | None = None, *,
                 is_placed: bool, channel: socket.socket | None = None) -> None:
        self._handles = handles
        self._settings = settings
        self._report_fd = report_fd
        self._channel = channel
        self._is_placed = is_placed
        self._holder = -1
        self._has_order = order is not None
        if order is not None:
            self._order = order

    def become(self) -> NoReturn:
        """Do every step; report the one that fails."""
        stage = "session"
        try:
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
        if self._holder >= 0:  # a failed start leaves nothing in its group
            signal.pidfd_send_signal(self._holder, signal.SIGKILL)
            select.select([self._holder], [], [])
        os.write(self._report_fd, error.encode())

    def _leave_launcher(self) -> None:
        """Behave as a program does, and hold nothing that would hide the launcher's end from the daemon."""
        signal.set_wakeup_fd(-1)  # a number that is another descriptor's soon
        for number in (*self._settings.ignored_signals, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        handles = self._handles
        close_all_but(*(fd for fd in (handles.cgroup, handles.netns, handles.log, handles.connection,
                                      self._settings.null_fd, self._report_fd) if fd >= 0))

    def _join_cgroup(self) -> None:
        if not self._is_placed:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._handles.cgroup)
            os.write(procs, b"0")

    def _await_order(self) -> None:
        if self._has_order or self._channel is None:
            return
        libc.set_process_name("netnsd-waiting")
        self._rehearse()
        order, fds = receive(self._channel)
        if not order:
            os._exit(0)
        self._handles = Handles(self._handles.cgroup, *fds)
        self._order = Order(order)

    def _join_limits(self) -> None:
        """Groups of v1, whose limits count from here on. While it is root's: their files are."""
        for group in self._order.joins:
            procs = os.open(os.path.join(group, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
            os.write(procs, b"0")

    def _rehearse(self) -> None:
        """Do what changes nothing for root: the pages that this writes to are the child's own, then, when it counts."""
        self._order = Order(_REHEARSAL)
        for step in (Child._enter_directory, Child._set_limits, Child._drop_ids):
            step(self)

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
            if kind != resource.RLIMIT_NOFILE:
                _bound(kind, most)
        if self._settings.adjust_oom:
            # Without CAP_SYS_RESOURCE the kernel refuses to lower it: then it stays as the launcher's.
            with contextlib.suppress(PermissionError):
                fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
                os.write(fd, b"0")
        for kind, wanted in self._order.limits:
            if kind != resource.RLIMIT_NOFILE:
                _allow(kind, wanted)

    def _limit_descriptors(self) -> None:
        """Last: descriptors come in until then. Lowering needs no right."""
        for kind, most in self._order.hard_limits:
            if kind == resource.RLIMIT_NOFILE:
                _bound(kind, most)
        for kind, wanted in ((resource.RLIMIT_NOFILE, self._settings.soft_nofile), *self._order.limits):
            if kind == resource.RLIMIT_NOFILE:
                _allow(kind, wanted)

    def _drop_ids(self) -> None:
        order = self._order
        os.setgroups(order.groups)
        os.setresgid(order.gid, order.gid, order.gid)
        os.setresuid(order.uid, order.uid, order.uid)
        # This is still a copy of the launcher's memory, with what other users' orders left there. exec takes it back.
        libc.prctl(libc.PR_SET_DUMPABLE, 0)
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

    def _share_memory(self) -> None:
        """Let another task hold this process's memory, so that exec leaves it to that one to take it apart.

        Last, when it has the command's rights and no more. What tells the launcher of the exec comes only then, as the
        holder has all descriptors that are there before.
        """
        if self._channel is None:
            return
        with contextlib.suppress(OSError):  # then exec takes longer
            self._holder = libc.hold_memory(HOLD_SECONDS)
            send(self._channel, HOLDER, (self._holder,))
        answer, fds = receive(self._channel)
        if not answer:  # nobody would know of the command
            raise StageError("exec", errno.ECANCELED)
        if not fds:  # the limit on descriptors is in force: without the pipe any end would be taken for an exec
            raise StageError("limits", errno.EMFILE, "nofile")

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


def _bound(kind: int, most: int) -> None:
    """What no command's limit may exceed."""
    soft, hard = resource.getrlimit(kind)
    if most >= 0 and (hard == resource.RLIM_INFINITY or most < hard):
        resource.setrlimit(kind, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))


def _allow(kind: int, wanted: int) -> None:
    """The soft limit that is wanted, as far as the hard one lets."""
    hard = resource.getrlimit(kind)[1]
    soft = wanted if hard == resource.RLIM_INFINITY else hard if wanted < 0 else min(wanted, hard)
    resource.setrlimit(kind, (soft, hard))


_REHEARSAL = json.dumps({
    "argv": ["/"], "env": {"PATH": "/"}, "cwd": "/", "uid": 0, "gid": 0, "groups": [], "umask": 0, "limits": {},
    "hard_limits": {}, "setuid": False, "hosts_file": "/", "resolv_file": None, "hostname": "", "tty": False}).encode()


def _execve(path: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> NoReturn:
    try:
        os.execve(path, argv, env)  # noqa: S606  # no shell is the point
    except OSError as error:
        raise OSError(error.errno, "", path.decode("utf-8", "surrogateescape")) from error


_STEPS = (
    ("session", Child._leave_launcher),
    ("cgroup", Child._join_cgroup),
    ("order", Child._await_order),
    ("cgroup", Child._join_limits),
    ("chdir", Child._enter_directory),
    ("setns", Child._enter_network),
    ("mounts", Child._make_mounts),
    ("hostname", Child._set_hostname),
    ("session", Child._make_session),
    ("limits", Child._set_limits),
    ("ids", Child._drop_ids),
    ("privileges", Child._drop_privileges),
    ("stdio", Child._set_descriptors),
    ("exec", Child._share_memory),
    ("limits", Child._limit_descriptors),
    ("exec", Child._execute),
)
