"""From a Unix connection to an Actor: what the kernel vouches for, never what the client says."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable
from typing import Any, TypeVar, cast

import trio

from netnsd.core.actor import Actor

_SO_PEERGROUPS = 59  # asm-generic/socket.h
_SO_PASSRIGHTS = 83
_UCRED = struct.Struct("=iII")
_MOST_GROUPS = 65536
_MOST_DIGITS = 9
_KNOWN_SECONDS = 30.0
_MOST_KNOWN = 4096
# A name service that hangs holds up those who ask with a token, and nobody else's threads.
_LOGINS = trio.CapacityLimiter(8)
# Who is not waited for any more has his thread until the name service answers: all else must not wait for that.
_LOOK_UPS = trio.CapacityLimiter(8)

K = TypeVar("K")
V = TypeVar("V")
_known: dict[tuple[Any, Any], tuple[float, Any]] = {}


def refuse_descriptors(listener: socket.socket) -> bool:
    """Have the kernel refuse descriptors that clients of ``listener`` send; returns whether it can (Linux 6.16).

    A lingering TCP socket, sent as a descriptor and discarded by a read or a close, blocks that call for as long as
    the client likes.
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False
    return True


async def actor_of(connection: trio.socket.SocketType, admin_group: str) -> Actor:
    """Who is at the other end of a Unix stream connection. The pid is not asked: it may be another's by now."""
    _pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    groups = _peer_groups(connection)
    user, home, shell = await _cached(_account, uid)
    admin = await _cached(_group_id, admin_group)
    is_admin = uid == 0 or (admin is not None and (gid == admin or admin in groups))
    return Actor(uid=uid, gid=gid, groups=groups, user=user, home=home, shell=shell, is_admin=is_admin)


async def account(uid: int) -> Actor | None:
    """A user as a login would have it, without any right of an admin; None where there is no such account."""
    return await trio.to_thread.run_sync(_login, uid)


async def members(kind: str, name: str) -> tuple[int, ...] | None:
    """The ids of a user, or of a group's members: those that the group lists, and those whose own group it is.

    None where there is no such user or group. See ``core.actor.Members``.
    """
    return await trio.to_thread.run_sync(_members, kind, name, abandon_on_cancel=True, limiter=_LOOK_UPS)


def _members(kind: str, name: str) -> tuple[int, ...] | None:
    try:
        if kind == "user":
            return (pwd.getpwnam(name).pw_uid,)
        group = grp.getgrnam(name)
    except (KeyError, ValueError):
        return None
    listed = set(group.gr_mem)
    return tuple(sorted({e.pw_uid for e in pwd.getpwall() if e.pw_gid == group.gr_gid or e.pw_name in listed}
                        | {uid for member in listed if (uid := _uid_of(member)) is not None}))


async def named(user: str) -> Actor | None:
    """A user by its name or number, as ``account`` has it; None where there is no such account."""
    key = int(user) if user.isascii() and user.isdigit() and len(user) <= _MOST_DIGITS else user
    return await trio.to_thread.run_sync(_login, key, limiter=_LOGINS)


def _uid_of(user: str) -> int | None:
    """Of a user that a name service may know, and not list."""
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):  # a NUL in it
        return None


async def login(key: int | str, admin_group: str) -> Actor | None:
    """As ``account``, by uid or by name, as it is at this moment, and with an admin's rights where it has them."""
    return await trio.to_thread.run_sync(_login, key, admin_group, limiter=_LOGINS)


def _login(key: int | str, admin_group: str | None = None) -> Actor | None:
    try:
        entry = pwd.getpwuid(key) if isinstance(key, int) else pwd.getpwnam(key)
    except (KeyError, ValueError):  # ValueError: a NUL in it
        return None
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    admin = None if admin_group is None else _group_id(admin_group)
    is_admin = admin_group is not None and (entry.pw_uid == 0 or (admin is not None and admin in groups))
    return Actor(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, user=entry.pw_name, home=entry.pw_dir,
                 shell=entry.pw_shell or "/bin/sh", is_admin=is_admin)


def _peer_groups(connection: trio.socket.SocketType) -> tuple[int, ...]:
    size = 256
    while True:
        try:
            raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, size * 4)
        except OSError as error:
            if error.errno != errno.ERANGE or size >= _MOST_GROUPS:
                raise
            size = _MOST_GROUPS
            continue
        return struct.unpack(f"={len(raw) // 4}I", raw)


async def _cached(look_up: Callable[[K], V], key: K) -> V:
    """What the name service says, which may ask the network: in a thread, and not for every connection."""
    now = trio.current_time()
    known = _known.get((look_up, key))
    if known is None or now > known[0]:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[look_up, key] = (now + _KNOWN_SECONDS, await trio.to_thread.run_sync(look_up, key))
    return cast("V", known[1])


def _account(uid: int) -> tuple[str, str, str]:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return str(uid), "/", "/bin/sh"
    return entry.pw_name, entry.pw_dir, entry.pw_shell or "/bin/sh"


def _group_id(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
