"""A user's client that lives through the daemon's deaths: one kept connection, commands, and published ports."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any, NamedTuple
from urllib.parse import quote

from netnsd.client import attach
from netnsd.client.transport import connect
from netnsd.errors import DaemonUnreachable, NetnsdError
from tests.bench.connection import Connection, LostError, RefusedError

PATIENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.02
_BUSY = 503
_PYTHON = "/usr/bin/python3"
# Tells each caller who it is, and keeps the connections: at its end some are open. Without the modules os and socket
# it starts in half of the time.
_SERVER = """
import _socket, posix
server = _socket.socket()
server.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
server.bind(("", int(posix.environ[b"PORT"])))
server.listen(64)
name, kept = posix.environ[b"NETNSD_ID"] + b"\\n", []
while True:
    kept.append(_socket.socket(fileno=server._accept()[0]))
    kept[-1].sendall(name)
"""
SERVER = [_PYTHON, "-IS", "-c", _SERVER]


class Reply(NamedTuple):
    """``code``: the error's, "" where it was done. ``body``: the answer, or the error."""

    status: int
    code: str
    body: Any


class GoneError(Exception):
    """There is no daemon, or it went before it answered: nobody knows whether it did what it was asked."""


class Client:
    """Requests of the user whose process this is. ``attach_socket`` is where commands are asked for."""

    def __init__(self, path: str, attach_socket: str) -> None:
        self._path = path
        self._attach_socket = attach_socket
        self._connection: Connection | None = None
        self.again = 0  # requests of ``insist`` that were made again

    def ask(self, method: str, path: str, body: object = None) -> Reply:
        """One request and its answer. Raises GoneError."""
        try:
            if self._connection is None:
                self._connection = Connection(self._path)
            return Reply(200, "", self._connection.request(method, path, body).body)
        except RefusedError as refused:
            error = json.loads(refused.body)["error"]
            return Reply(refused.status, error["code"], error)
        except (OSError, LostError) as error:
            self.close()
            raise GoneError(str(error)) from error

    def insist(self, method: str, path: str, body: object = None) -> Reply:
        """Ask again while there is no daemon, or it has too much to do; what is asked must bear being done twice."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                reply = self.ask(method, path, body)
            except GoneError:
                if time.monotonic() > deadline:
                    raise
            else:
                if reply.status != _BUSY or time.monotonic() > deadline:
                    return reply
            self.again += 1
            time.sleep(_PAUSE_SECONDS)

    def execute(self, ref: str, command: list[str]) -> tuple[int, str]:
        """Run a command in an environment: its exit code, and what it printed. Raises NetnsdError, GoneError."""
        order = {"ref": ref, "command": command, "cwd": "/", "env": {"PATH": "/usr/bin:/bin"}}
        stdin, output = os.memfd_create("stdin"), os.memfd_create("output")
        try:
            with connect(self._attach_socket) as connected:
                session = attach.Connection(connected, self._attach_socket)
                session.open(order)
                session.hand_over([stdin, output, output])
                while (code := session.receive()) is None:
                    pass
            return code, os.pread(output, 1 << 16, 0).decode(errors="replace")
        except DaemonUnreachable as error:
            raise GoneError(error.message) from error
        except OSError as error:
            raise GoneError(str(error)) from error
        finally:
            os.close(stdin)
            os.close(output)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def greeting(port: int, *, keep: list[socket.socket] | None = None, seconds: float = 3.0) -> str:
    """What the server at a published port of this host says, or an errno's name; ``keep`` gets the open connection."""
    caller = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        caller.settimeout(seconds)
        caller.connect(("127.0.0.1", port))
        said = caller.recv(256).decode().strip()
    except TimeoutError:
        caller.close()
        return "TIMEOUT"
    except OSError as error:
        caller.close()
        return errno.errorcode.get(error.errno or 0, str(error))
    if keep is None:
        caller.close()
    else:
        keep.append(caller)
    return said


def path_of(ref: str, *rest: str) -> str:
    """The route of an environment."""
    return "/".join(("/v1/environments", quote(ref, safe=""), *rest))


__all__ = ["SERVER", "Client", "GoneError", "NetnsdError", "Reply", "greeting", "path_of"]
