"""The daemon's Unix sockets: where they are, who may connect, and made anew where somebody removes one."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import trio

from netnsd.api import peer

_BACKLOG = 1024
_log = structlog.get_logger()


class Door:
    """One listening socket at a path. It is made at once; use ``serve`` and ``look``, and ``close`` at the end.

    Args:
        path: where it is, or is to be.
        mode, gid: of the file.
        passed: systemd's, which only systemd can make anew.

    Raises OSError.
    """

    def __init__(self, path: Path, *, mode: int, gid: int, passed: socket.socket | None = None) -> None:
        self._path = path if passed is None else Path(passed.getsockname())
        self._mode, self._gid = mode, gid
        self._passed = passed
        self._inode: tuple[int, int] | None = None
        self._listener = passed or self._made()
        self.filters_descriptors = peer.refuse_descriptors(self._listener)
        self._inode = self._seen()
        self._is_missed = False
        self._is_renewed = trio.Event()
        self._old = self._listener

    def close(self) -> None:
        """Remove the file, unless it is systemd's."""
        if self._passed is None and self._seen() == self._inode:
            self._path.unlink(missing_ok=True)

    async def serve(self, accept: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Have ``accept`` serve the socket for ever, and a new one once ``look`` has made it. Connections go on."""
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept, self._listener)
                await self._is_renewed.wait()
                nursery.cancel_scope.cancel()
            self._is_renewed = trio.Event()
            self._old.close()
            _log.warning("socket_restored", path=str(self._path))

    def look(self) -> None:
        """Make the socket anew where its file is gone: call it now and then."""
        if not self._is_renewed.is_set() and (made := self._made_anew()) is not None:
            self._old, self._listener, self._inode = self._listener, made, self._seen()
            self._is_renewed.set()

    def _made_anew(self) -> socket.socket | None:
        """A new socket, where the file is not this one's any more and one can be made."""
        if self._seen() == self._inode:
            self._is_missed = False
            return None
        try:
            if self._passed is not None:
                raise OSError("systemd has it: systemctl restart netnsd.socket netnsd-attach.socket")
            made = self._made()
            peer.refuse_descriptors(made)
        except OSError as error:
            if not self._is_missed:
                _log.error("socket_missing", path=str(self._path), reason=str(error))
            self._is_missed = True
            return None
        return made

    def _made(self) -> socket.socket:
        """A socket that is at its path when it is ready: nobody is refused who may connect, nobody let who may not."""
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            mask = os.umask(0o777)
            try:
                listener.bind(str(fresh))
            finally:
                os.umask(mask)
            os.chown(fresh, 0, self._gid)
            fresh.chmod(self._mode)
            listener.listen(_BACKLOG)
            fresh.replace(self._path)
        except BaseException:
            listener.close()
            raise
        return listener

    def _seen(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # nobody can tell now
            return self._inode
        return status.st_dev, status.st_ino
