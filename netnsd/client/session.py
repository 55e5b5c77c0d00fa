"""What one run of ``netnsctl`` knows: where the daemon is, how to print, and what it has to say on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from netnsd.client.transport import Client
from netnsd.errors import NetnsdError

DEFAULT_SOCKET = "/run/netnsd/netnsd.sock"
OUTPUTS = ("table", "json", "yaml", "name")


class Session:
    """Global options and the client that they make. Options after the verb win over those before it."""

    def __init__(self) -> None:
        self.output: str | None = None
        self.socket: str | None = None
        self._client: Client | None = None

    @property
    def socket_path(self) -> str:
        """The daemon's socket: ``--socket``, else NETNSD_SOCKET, else the default."""
        return self.socket or os.environ.get("NETNSD_SOCKET") or DEFAULT_SOCKET

    @property
    def client(self) -> Client:
        """The client of this session, made at its first use."""
        if self._client is None:
            self._client = Client(self.socket_path, self.warn)
        return self._client

    def warn(self, message: str) -> None:
        """Say on stderr what does not stop us; a JSON line of its own where the output is JSON."""
        if self.output == "json":
            self._say_json({"warning": {"message": message}})
        else:
            self._say(f"netnsctl: warning: {message}")

    def fail(self, error: NetnsdError) -> None:
        """Say on stderr what went wrong and what to do next."""
        if self.output == "json":
            self._say_json({"error": {"code": error.code, "message": error.message, "hint": error.hint,
                                      "details": error.details}})
            return
        self._say(f"netnsctl: {error.message}")
        if error.hint:
            self._say(f"  hint: {error.hint}")

    def _say_json(self, value: dict[str, Any]) -> None:
        import json

        self._say(json.dumps(value))

    def _say(self, line: str) -> None:
        # Nobody can be told that stderr is gone.
        with contextlib.suppress(OSError):
            click.echo(printable(line), err=True)


def printable(text: str) -> str:
    """Text with its control characters and lone surrogates escaped: other people's words reach our terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def session_of(ctx: click.Context) -> Session:
    """The session of the run that ``ctx`` belongs to."""
    root = ctx.find_root()
    if not isinstance(root.obj, Session):
        root.obj = Session()
    return root.obj


def flush_output() -> None:
    """Write out what stdout still holds, so that its errors are met where they can be handled."""
    if sys.stdout is not None:
        sys.stdout.flush()
