"""The system calls that Python 3.11's ``os`` does not have, through ctypes. Standard library only.

Each function raises OSError with the call's errno. The launcher uses this file without the rest of netnsd.
"""

from __future__ import annotations

import ctypes
import os
import signal

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD = -100
AT_RECURSIVE = 0x8000

# linux/inotify.h
IN_MODIFY = 0x00000002
IN_MOVED_FROM = 0x00000040
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_DELETE = 0x00000200
IN_DELETE_SELF = 0x00000400
IN_IGNORED = 0x00008000
IN_Q_OVERFLOW = 0x00004000
IN_NONBLOCK = os.O_NONBLOCK
IN_CLOEXEC = os.O_CLOEXEC

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# Numbers of calls newer than the split of architectures (asm-generic/unistd.h): the same on all that matter here.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_CLOSE_RANGE = 436
_SYS_CLONE3 = 435
# Older than the split, so by machine; 219 is the generic number.
_SYS_KEYCTL = {"x86_64": 250, "i686": 288, "ppc64le": 271, "s390x": 280}.get(os.uname().machine, 219)
_KEYCTL_JOIN_SESSION_KEYRING, _KEYCTL_REVOKE, _KEY_SPEC_SESSION_KEYRING = 1, 3, -3  # linux/keyctl.h
# linux/sched.h
_CLONE_VM = 0x00000100
_CLONE_PIDFD = 0x00001000
_CLONE_PARENT = 0x00008000
_CLONE_INTO_CGROUP = 0x200000000


class _CloneArguments(ctypes.Structure):
    """struct clone_args, linux/sched.h."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in (
        "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
        "set_tid_size", "cgroup"))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc_held = ctypes.PyDLL(None, use_errno=True)
_libc_held.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.clone.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_holders_stack = (ctypes.c_char * 16384)()
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)


def _check(result: int, path: str | bytes | None = None) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def _bytes(text: str | bytes | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces: man 2 unshare."""
    _check(_libc.unshare(flags))


def setns(fd: int, nstype: int) -> None:
    """Move the calling thread to the namespace of ``fd``: man 2 setns."""
    _check(_libc.setns(fd, nstype))


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """Mount, bind, or change how mounts propagate: man 2 mount."""
    _check(_libc.mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data)), target)


def umount2(target: str, flags: int) -> None:
    """Unmount: man 2 umount2. EINVAL: nothing is mounted there."""
    _check(_libc.umount2(_bytes(target), flags), target)


def open_tree(directory_fd: int, path: str, flags: int) -> int:
    """A descriptor of a mount, or with OPEN_TREE_CLONE of a detached copy of it: man 2 open_tree, Linux 5.2."""
    return _check(_syscall(_SYS_OPEN_TREE, directory_fd, _bytes(path), flags), path)


def move_mount(from_fd: int, to_path: str) -> None:
    """Attach the mount of ``from_fd`` at ``to_path``: man 2 move_mount, Linux 5.2."""
    _check(_syscall(_SYS_MOVE_MOUNT, from_fd, b"", AT_FDCWD, _bytes(to_path), MOVE_MOUNT_F_EMPTY_PATH), to_path)


def close_range(first: int, last: int) -> None:
    """Close descriptors ``first`` to ``last``, both included: man 2 close_range, Linux 5.9."""
    _check(_syscall(_SYS_CLOSE_RANGE, first, last, 0))


def prctl(option: int, argument: int = 0) -> None:
    """Set one number: man 2 prctl."""
    _check(_libc.prctl(option, argument, 0, 0, 0))


def set_process_name(name: str) -> None:
    """What ``ps -o comm`` shows, at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _check(_libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0))


def sethostname(name: str) -> None:
    """The host name of the calling thread's UTS namespace: man 2 sethostname."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, len(encoded)))


def inotify_init1(flags: int) -> int:
    """A new inotify descriptor. The caller closes it."""
    return _check(_libc.inotify_init1(flags))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """A watch descriptor for ``path``."""
    return _check(_libc.inotify_add_watch(fd, _bytes(path), mask), path)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Remove a watch. EINVAL: it is gone already, with its file."""
    _check(_libc.inotify_rm_watch(fd, watch))


def fallocate_punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the disk below ``length`` bytes at ``offset``; size and offsets stay. man 2 fallocate."""
    _check(_libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length))


def fork_into_cgroup(cgroup_fd: int) -> int:
    """Like fork(2), but the child is born in the group of the directory ``cgroup_fd``: man 2 clone3, Linux 5.7.

    For a process with one thread, whose child does little before its exec: Python is not told of the fork. Raises
    OSError: ENOSYS or EPERM where a kernel or a filter has no clone3, ENOENT or ENODEV for a removed group.
    """
    arguments = _CloneArguments(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=cgroup_fd)
    # Not through _libc: that would let go of the interpreter's lock, and the child has nobody to take it back from.
    result: int = _libc_held.syscall(ctypes.c_long(_SYS_CLONE3), ctypes.byref(arguments),
                                     ctypes.c_long(ctypes.sizeof(arguments)))
    return _check(result)


def hold_memory(seconds: int) -> int:
    """Start a task that shares the calling process's memory and does nothing but sleep; its pidfd, or OSError.

    While it lives, an exec of the caller need not take that memory apart, which for Python's takes longer than all
    else of an exec. It is a child of the caller's parent, and runs sleep(3) alone: man 2 clone. Whoever has the pidfd
    kills it; it ends after ``seconds`` in any case. For a process with one thread, that execs or ends soon, once.
    """
    pidfd = ctypes.c_int(-1)
    sleep = ctypes.cast(_libc.sleep, ctypes.c_void_p)
    top = ctypes.addressof(_holders_stack) + ctypes.sizeof(_holders_stack) & ~15
    _check(_libc.clone(sleep, top, _CLONE_VM | _CLONE_PIDFD | _CLONE_PARENT, seconds, ctypes.byref(pidfd)))
    return pidfd.value


def join_session_keyring() -> None:
    """Give the calling process a new, empty session keyring: man 2 keyctl. EDQUOT: its user has too many keys."""
    _check(_syscall(_SYS_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, 0))


def revoke_session_keyring() -> None:
    """Make the session keyring useless to all who share it."""
    _check(_syscall(_SYS_KEYCTL, _KEYCTL_REVOKE, _KEY_SPEC_SESSION_KEYRING))


def _syscall(number: int, *arguments: Any) -> int:
    """A variadic call: numbers are widened, so that no register holds half of one."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    return result
