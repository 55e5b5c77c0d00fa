"""attach.sock: commands that run on their client's own descriptors.

The request is authorised here; then the connection itself goes to the launcher, whose child receives the descriptors
after it has become the caller. We never keep them: the kernel refuses any that come before that, or, where it cannot,
they are closed in a thread.
"""

from __future__ import annotations

import os
import struct

import structlog
import trio

from netnsd import wire
from netnsd.api import json_body, problems
from netnsd.api.app import BODY_BYTES, BODY_SECONDS
from netnsd.api.closing import Closer
from netnsd.api.trail import DONE, Deed, Trail
from netnsd.api.transport import receive
from netnsd.core.actor import Actor
from netnsd.core.environments import Environments
from netnsd.errors import BodyTooLarge, InternalError, NetnsdError, RequestTimeout, TooManyConnections

_LENGTH = struct.Struct(">I")
_SEND_SECONDS = 1.0
_log = structlog.get_logger()


class AttachServer:
    """Serves connections of attach.sock that a Gate admitted."""

    def __init__(self, environments: Environments, closer: Closer, trail: Trail) -> None:
        self._environments = environments
        self._closer = closer
        self._trail = trail
        self._large = trio.Lock()

    @property
    def refusal(self) -> bytes:
        """What one connection too many is told."""
        return frame(problems.body_of(TooManyConnections("you have too many connections open", hint="Close some.")))

    async def handle(self, connection: trio.socket.SocketType, actor: Actor) -> None:
        """Read one request, and hand the connection over or answer why not.

        Lasts as long as the session, so that sessions count as connections of their user.
        """
        ended = await self._hand_over(connection, actor)
        if ended is not None:
            try:
                await trio.lowlevel.wait_readable(ended)
            finally:
                os.close(ended)

    async def _hand_over(self, connection: trio.socket.SocketType, actor: Actor) -> int | None:
        deed = Deed(actor, "EXEC", "attach.sock")
        try:
            try:
                return await self._attach(connection, deed)
            except NetnsdError as error:
                deed.code = error.code
                await _send(connection, problems.body_of(error))
            except (OSError, EOFError):
                return None
            except Exception:  # the one place where a fault becomes an answer  # noqa: BLE001
                deed.code = InternalError.code
                _log.exception("attach_failed")
                await _send(connection, problems.body_of(InternalError("a fault in netnsd",
                                                                       hint="The daemon's log has the details.")))
            return None
        finally:
            if deed.ref:
                self._trail.keep(deed)
            # Whoever has it now lets its client send descriptors: they may lie unread in it.
            await self._closer.close(connection, is_laced=True)

    async def _attach(self, connection: trio.socket.SocketType, deed: Deed) -> int:
        request = await json_body.parse_in_turn(await self._read(connection), wire.ExecRequest, self._large)
        deed.ref = request.ref
        environment = deed.about(self._environments.registry.find(request.ref, deed.actor))
        os.set_blocking(connection.fileno(), True)  # as whoever gets it next expects
        ended = await self._environments.attach(environment, request, deed.actor, connection.fileno())
        deed.code = DONE
        return ended

    async def _read(self, connection: trio.socket.SocketType) -> bytes:
        with trio.move_on_after(BODY_SECONDS):
            length = _LENGTH.unpack(await self._exactly(connection, _LENGTH.size))[0]
            if length > BODY_BYTES:
                raise BodyTooLarge(f"the request has {length} bytes", hint=f"At most {BODY_BYTES} bytes are read.")
            return await self._exactly(connection, length)
        raise RequestTimeout(f"the request took more than {BODY_SECONDS:g} s", hint="Send it at once.")

    async def _exactly(self, connection: trio.socket.SocketType, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await receive(connection, count - len(data), self._closer)
            if not part:
                raise EOFError
            data += part
        return data


def frame(body: bytes) -> bytes:
    """A frame of the attach protocol: the length in four bytes, big-endian, and JSON."""
    return _LENGTH.pack(len(body)) + body


async def _send(connection: trio.socket.SocketType, body: bytes) -> None:
    """Send a frame, unless the client does not read: then it does not want to know."""
    data = frame(body)
    os.set_blocking(connection.fileno(), False)
    with trio.move_on_after(_SEND_SECONDS):
        try:
            while data:
                data = data[await connection.send(data):]
        except OSError:
            _log.debug("attach_answer_lost")
