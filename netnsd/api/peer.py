"""From a Unix connection to an Actor: what the kernel vouches for, never what the client says."""

from __future__ import annotations

import errno
import functools
import grp
import pwd
import socket
import struct
import time

import trio

from netnsd.core.actor import Actor

_SO_PEERGROUPS = 59  # asm-generic/socket.h
_SO_PASSRIGHTS = 83
_UCRED = struct.Struct("=iII")
_MOST_GROUPS = 65536
_ACCOUNT_SECONDS = 30


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
    period = int(time.monotonic()) // _ACCOUNT_SECONDS
    # The name service may ask the network.
    user, home, shell = await trio.to_thread.run_sync(_account, uid, period)
    admin = await trio.to_thread.run_sync(_group_id, admin_group, period)
    is_admin = uid == 0 or (admin is not None and (gid == admin or admin in groups))
    return Actor(uid=uid, gid=gid, groups=groups, user=user, home=home, shell=shell, is_admin=is_admin)



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


@functools.lru_cache(maxsize=4096)
def _account(uid: int, _period: int) -> tuple[str, str, str]:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return str(uid), "/", "/bin/sh"
    return entry.pw_name, entry.pw_dir, entry.pw_shell or "/bin/sh"


@functools.lru_cache(maxsize=16)
def _group_id(name: str, _period: int) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
