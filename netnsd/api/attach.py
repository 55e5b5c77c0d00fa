"""attach.sock: commands that run on their client's own descriptors.

The request is authorised here; then the connection itself goes to the launcher, whose child receives the descriptors
after it has become the caller. We never receive them: the kernel refuses any that come before that, or, where it
cannot, the request is read in a thread that a smuggled descriptor may block.
"""

from __future__ import annotations

import json
import socket
import struct

import structlog
import trio

from netnsd import wire
from netnsd.api import json_body, problems
from netnsd.api.app import BODY_BYTES, BODY_SECONDS
from netnsd.core.actor import Actor
from netnsd.core.environments import Environments
from netnsd.errors import BodyTooLarge, InternalError, NetnsdError, RequestTimeout, TooManyConnections

_LENGTH = struct.Struct(">I")
_log = structlog.get_logger()


class AttachServer:
    """Serves connections of attach.sock that a Gate admitted."""

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    @property
    def refusal(self) -> bytes:
        """What one connection too many is told."""
        return frame(problems.body_of(TooManyConnections("you have too many connections open", hint="Close some.")))

    async def handle(self, connection: trio.socket.SocketType, actor: Actor) -> None:
        """Read one request, and hand the connection over or answer why not."""
        # From here on a plain socket in a thread: the descriptor must be blocking for who gets it next.
        plain = socket.socket(fileno=connection.detach())
        try:
            try:
                request = json_body.parse(await self._read(plain), wire.ExecRequest)
                await self._environments.attach(request, actor, plain.fileno())
            except NetnsdError as error:
                await _send(plain, problems.body_of(error))
            except (ConnectionError, EOFError):
                return
            except Exception:  # the one place where a fault becomes an answer  # noqa: BLE001
                _log.exception("attach_failed")
                await _send(plain, problems.body_of(InternalError("a fault in netnsd", hint="See the daemon's log.")))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(plain.close, abandon_on_cancel=True)

    async def _read(self, plain: socket.socket) -> bytes:
        plain.settimeout(BODY_SECONDS)
        try:
            return await trio.to_thread.run_sync(_read_frame, plain, abandon_on_cancel=True)
        except TimeoutError as error:
            raise RequestTimeout(f"the request took more than {BODY_SECONDS:g} s", hint="Send it at once.") from error
        finally:
            plain.settimeout(None)


def frame(body: bytes) -> bytes:
    """A frame of the attach protocol: the length in four bytes, big-endian, and JSON."""
    return _LENGTH.pack(len(body)) + body


def _read_frame(plain: socket.socket) -> bytes:
    length = _LENGTH.unpack(_exactly(plain, _LENGTH.size))[0]
    if length > BODY_BYTES:
        raise BodyTooLarge(f"the request has {length} bytes", hint=f"At most {BODY_BYTES} bytes are read.")
    return _exactly(plain, length)


def _exactly(plain: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = plain.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


async def _send(plain: socket.socket, body: bytes) -> None:
    plain.settimeout(1.0)
    try:
        await trio.to_thread.run_sync(plain.sendall, frame(body), abandon_on_cancel=True)
    except OSError:
        _log.debug("attach_answer_lost", body=json.loads(body))
