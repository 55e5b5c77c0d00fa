"""What one run of ``netnsctl`` knows: where the daemon is, how to print, and what it has to say on stderr.

Without click: ``ls`` and ``create`` mostly run without it.
"""

from __future__ import annotations

import contextlib
import os
import sys

from netnsd.client.transport import Client
from netnsd.errors import NetnsdError

TYPE_CHECKING = False  # typing itself would take a tenth of a listing's time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import click

DEFAULT_SOCKET = "/run/netnsd/netnsd.sock"
OUTPUTS = ("table", "json", "yaml", "name")
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


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
        say(printable(line))


def say(line: str) -> None:
    """A line on stderr. Nobody can be told that stderr is gone."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


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


def write(text: str) -> None:
    """A line, or several, on stdout."""
    if sys.stdout is not None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def guarded(session: Session, action: Callable[[], int]) -> int:
    """The exit code of ``action``, or of how it failed, which is said on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = action()
        except NetnsdError as error:
            session.fail(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = interrupted()
        # Written out here, so that its errors are met where they can be handled.
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return io_failed(error, session)
    return code


def interrupted() -> int:
    """The exit code of ^C. The terminal has shown it: the prompt gets a line of its own."""
    if sys.stderr is not None and sys.stderr.isatty():
        say("")
    return EXIT_INTERRUPTED


def io_failed(error: OSError, session: Session) -> int:
    """What could not be read or written: quiet where the reader has gone, which is no fault."""
    # The interpreter flushes stdout once more at its end: let that go nowhere.
    with open(os.devnull, "w") as nowhere:
        if sys.stdout is sys.__stdout__ and sys.stdout is not None:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    session.fail(NetnsdError(f"input or output failed: {where}{error.strerror or error}"))
    return NetnsdError.exit_code
