"""How the launcher starts: its arguments, its socket, and its going into the background.

Part of the launcher: standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket


def listen(path: str) -> socket.socket:
    """A root-only socket at ``path``, in place of one that nobody listens on. Raises FileExistsError, OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise FileExistsError(errno.EEXIST, "another launcher listens", path)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen(16)
    return sock


def detach() -> None:
    """Go on in a process that is nobody's child, in a session of its own; the caller's process ends well."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def parse(arguments: list[str]) -> tuple[str, list[str], bool]:
    """Where to listen, what to hide, whether to detach. By hand: argparse would stay in memory. Raises ValueError."""
    path, hidden, detached = "", [], False
    words = iter(arguments)
    for word in words:
        if word == "--socket":
            path = next(words, "")
        elif word == "--hide":
            hidden.append(next(words, ""))
        elif word == "--detach":
            detached = True
        else:
            raise ValueError(f"unknown argument: {word}")
    if not path:
        raise ValueError("--socket is missing")
    return path, hidden, detached
