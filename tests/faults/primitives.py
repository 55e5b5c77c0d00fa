"""What netnsd calls that is not its own: what changes the world, what only looks, and what can do neither.

Whatever is not listed here counts as a change of the world, so that a new call is a point at once. Standard library
only: the launcher's program imports it.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import Any


class Kind(enum.Enum):
    """EFFECT: the world is another afterwards: a point to be killed at, and to fail at. LOOK: it may fail, no more."""

    EFFECT = "effect"
    LOOK = "look"
    INERT = "inert"


# netnsd's own modules that are primitives to all others, by the name that they have here.
OWN = {"netnsd.kernel.libc": "libc", "netnsd.kernel.nft": "nft"}
# Modules by which a program reaches beyond itself.
OUTWARD = frozenset({
    "ctypes", "fcntl", "io", "libc", "nft", "os", "pathlib", "pyroute2", "resource", "select", "shutil", "signal",
    "socket", "sqlite3", "subprocess", "tempfile", "termios", "threading", "selectors", "mmap",
})
# Modules by which it does not, or that call back into netnsd's own functions.
INWARD = frozenset({
    "__future__", "_blake2", "_collections", "_functools", "_json", "_struct", "_thread", "builtins", "click",
    "collections", "contextlib", "dataclasses", "datetime", "email", "enum", "errno", "functools", "gc", "grp",
    "h11", "hashlib", "heapq", "hmac", "hypercorn", "importlib", "inspect", "ipaddress", "itertools", "json",
    "math", "msgspec", "netnsd", "operator", "outcome", "platform", "prometheus_client", "pwd", "queue", "re",
    "secrets", "select", "starlette", "stat", "string", "struct", "structlog", "sys", "time", "tomllib", "trio",
    "types", "typing", "urllib", "uuid", "weakref",
})
# The C modules behind some of those.
_BEHIND = {"posix": "os", "_socket": "socket", "_io": "io", "_signal": "signal", "_ctypes": "ctypes",
           "_sqlite3": "sqlite3", "_posixsubprocess": "subprocess", "_pathlib": "pathlib", "posixpath": "os.path"}

LOOKS = frozenset({
    "fcntl.fcntl", "fcntl.ioctl", "io.open", "libc.inotify_add_watch", "libc.inotify_init1", "libc.open_tree",
    "nft.Nft", "os.DirEntry.stat", "os.dup", "os.fstat", "os.listdir", "os.lseek", "os.lstat", "os.memfd_create",
    "os.pidfd_open", "os.pipe", "os.pipe2", "os.pread", "os.pwrite", "os.read", "os.scandir", "os.stat",
    "os.truncate", "pathlib.Path.exists", "pathlib.Path.glob", "pathlib.Path.read_text", "pyroute2.IPRoute",
    "pyroute2.RTNL_API.get_addr", "pyroute2.RTNL_API.get_default_routes", "pyroute2.RTNL_API.get_links",
    "pyroute2.RTNL_API.get_routes", "pyroute2.RTNL_API.link_lookup", "socket.if_nametoindex", "socket.socket",
    "socket.socket.recv", "socket.socket.recvmsg", "socket.socketpair",
    # Of netnsd: what the kernel says to a message of netlink, whose sending is the effect.
    "netnsd.kernel.rtnetlink.RouteSocket.transact", "netnsd.kernel.nfnetlink.ElementSocket.add",
    "netnsd.kernel.nfnetlink.ElementSocket.delete",
})
INERT = frozenset({
    # They change this process alone, which is gone after a kill, and do not fail.
    "ctypes.addressof", "socket.htonl",
    "io.close", "io.read", "io.readline", "io.splitlines", "libc.close_range", "libc.inotify_rm_watch",
    "libc.set_process_name", "nft.Nft.close", "os.DirEntry.is_dir", "os.close", "os.defpath", "os.environ",
    "os.geteuid", "os.getpid", "os.path", "os.set_inheritable", "os.strerror", "os.umask", "os.waitpid",
    "os.waitstatus_to_exitcode", "pathlib.Path", "pathlib.Path.absolute", "pathlib.PosixPath", "pathlib.PurePath",
    "pyroute2.nlmsg_base.get_attr", "resource.getrlimit", "resource.setrlimit", "select.poll", "select.select",
    "signal.getsignal", "signal.pthread_sigmask", "signal.set_wakeup_fd", "signal.signal", "signal.sigtimedwait",
    "signal.valid_signals", "socket.CMSG_SPACE", "socket.inet_aton", "socket.inet_ntoa", "socket.socket.close",
    "socket.socket.fileno", "socket.socket.getsockname", "socket.socket.getsockopt", "socket.socket.set_inheritable",
    "socket.socket.setblocking", "socket.socket.setsockopt", "socket.socket.settimeout",
    "sqlite3.Connection.close", "sqlite3.Cursor.fetchone", "threading.Lock", "threading.Thread",
    "threading.Thread.join", "threading.Thread.start",
})
# By the first part of the name: nothing of these is a point.
_INERT_ROOTS = ("os.path.", "os.environ.", "select.", "selectors.", "threading.", "pathlib.PurePath.", "io.")


def own_name(module: str, qualified: str) -> str:
    """A callable's name here, such as ``os.mkdir``, from those that Python knows it by."""
    for prefix, short in OWN.items():
        if module == prefix:
            return f"{short}.{qualified}"
    root = module.partition(".")[0]
    if root == "pyroute2":
        return f"pyroute2.{qualified}"
    if module.startswith("netnsd."):
        return f"{module}.{qualified}"
    return f"{_BEHIND.get(module, module)}.{qualified}"


def kind_of(name: str, arguments: tuple[Any, ...] = ()) -> Kind:
    """What a call of that name is, with these arguments."""
    if name in LOOKS:
        return Kind.LOOK
    root = name.partition(".")[0]
    if root not in OUTWARD or name in INERT:
        return Kind.INERT
    if name == "os.open":
        flags = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], int) else 0
        return Kind.EFFECT if flags & (os.O_CREAT | os.O_TRUNC) else Kind.LOOK
    if name.startswith(_INERT_ROOTS):
        return Kind.INERT
    if name == "sqlite3.Connection.execute" and arguments:
        return Kind.LOOK if str(arguments[0]).lstrip().upper().startswith("SELECT") else Kind.EFFECT
    return Kind.EFFECT


_OF_NAME = {
    "os.mkdir": ("ENOSPC", "ENOMEM"), "os.makedirs": ("ENOSPC",), "os.rmdir": ("EBUSY",), "os.unlink": ("EBUSY",),
    "os.write": ("ENOSPC", "EBUSY", "ENOMEM"), "os.open": ("EMFILE", "ENOSPC", "ENOMEM"), "os.setxattr": ("ENOSPC",),
    "libc.mount": ("ENOSPC", "ENOMEM", "EBUSY"), "libc.umount2": ("EBUSY",), "libc.unshare": ("ENOSPC", "ENOMEM"),
    "libc.setns": ("ENOMEM",), "shutil.rmtree": ("EBUSY", "EIO"), "nft.Nft.run": ("refused",),
    "netnsd.kernel.rtnetlink.RouteSocket.transact": ("EXFULL", "EBUSY", "ENOMEM"),
    "netnsd.kernel.nfnetlink.ElementSocket.add": ("ENOMEM", "ENFILE", "EBUSY"),
    "netnsd.kernel.nfnetlink.ElementSocket.delete": ("ENOMEM", "EBUSY"),
    "pyroute2.RTNL_API.link": ("EBUSY", "ENOMEM"), "pathlib.Path.write_text": ("ENOSPC",),
    "pathlib.Path.mkdir": ("ENOSPC",), "socket.socket": ("EMFILE", "ENOBUFS"), "os.stat": ("ENOMEM",),
    "os.lstat": ("ENOMEM",), "os.fstat": ("ENOMEM",), "os.DirEntry.stat": ("ENOMEM",), "os.read": ("ENOMEM",),
    "os.chmod": ("EROFS",), "os.chown": ("EROFS",), "os.posix_spawn": ("EAGAIN", "ENOMEM"), "os.kill": ("ESRCH",),
    "socket.socket.recvmsg": ("ECONNRESET",),
    "pathlib.Path.chmod": ("EROFS",), "pathlib.Path.unlink": ("EBUSY",), "pathlib.Path.rmdir": ("EBUSY",),
}
_OF_ROOT = {"sqlite3": ("full",), "pyroute2": ("ENOMEM",), "socket": ("ENOBUFS",), "os": ("EMFILE", "ENOMEM"),
            "nft": ("ENOMEM",), "libc": ("ENOMEM", "EMFILE"), "pathlib": ("EMFILE", "ENOSPC"), "signal": ("ESRCH",)}
_NEVER_FAIL = ("os._exit", "os.setsid")
# What cannot fail by lack of anything, and why: it is left out, not excused.
_CANNOT = {
    "daemon.systemd.Notifier.send:sender.sendto": "who starts the daemon would not hear that it is ready",
    "daemon.systemd.Notifier.send:socket.socket": "who starts the daemon would not hear that it is ready",
    "kernel._messages.read_sealed:fcntl.fcntl": "a file in memory",
    "kernel._messages.read_sealed:os.pread": "a file in memory",
    "kernel.launcher.Launcher._woken:wakeup.recv": "a pair of sockets in one process: there is a byte, or EAGAIN",
}


def failures_of(name: str, point: str) -> tuple[str, ...]:
    """How a call of that name is made to fail: errno's names, ``refused`` by nft, ``full`` by SQLite."""
    if point in _CANNOT or name in _NEVER_FAIL:
        return ()
    return _OF_NAME.get(name) or _OF_ROOT.get(name.partition(".")[0], ("ENOMEM",))


def may_persist(name: str) -> bool:
    """Whether it may fail again and again. Of the end of a connection one is told once; a name is busy until what
    is mounted on it went, and a cgroup until the processes have ended that were killed.
    """
    return name not in ("socket.socket.recvmsg", "os.unlink", "os.rmdir")


def failure(name: str, what: str, arguments: tuple[Any, ...]) -> Exception:
    """The exception by which that call fails so."""
    if what == "full":
        import sqlite3

        return sqlite3.OperationalError("database or disk is full")
    if what == "refused":
        from netnsd.kernel.nft import NftError

        return NftError("Error: Could not process rule: Cannot allocate memory (planted)")
    number = getattr(errno, what)
    if name == "nft.Nft":
        from netnsd.errors import KernelError

        return KernelError.at("nftables", OSError(number, os.strerror(number)))
    if name.endswith("RouteSocket.transact"):
        from netnsd.kernel.rtnetlink import StageError

        return StageError(number, arguments[-1].stages[0] if hasattr(arguments[-1], "stages") else "planted")
    if name.startswith("pyroute2.") and name != "pyroute2.IPRoute":
        from pyroute2.netlink.exceptions import NetlinkError

        refused: Exception = NetlinkError(number, os.strerror(number))
        return refused
    return OSError(number, os.strerror(number))
