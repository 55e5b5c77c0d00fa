"""What systemd and a daemon say to each other: readiness, the watchdog, sockets. sd_notify(3), sd_listen_fds(3)."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

_FIRST_FD = 3


class Notifier:
    """Sends states to NOTIFY_SOCKET where there is one. Takes the variables out of ``environ``.

    ``watchdog_seconds``: how often systemd must hear from us, None where it does not watch.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", str(os.getpid()))
        self.watchdog_seconds = int(usec) / 1e6 if usec.isdigit() and pid == str(os.getpid()) else None

    def send(self, state: str) -> None:
        """Send, such as ``READY=1``. Nobody there to hear it is fine."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), address)
        except OSError:
            return


def listening_sockets(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """The listening sockets that systemd passed, by FileDescriptorName; takes the variables out of ``environ``."""
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdigit() or pid != str(os.getpid()):
        return {}
    found = {}
    for index in range(int(count)):
        fd = _FIRST_FD + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) and names[index] else str(index)
        found[name] = socket.socket(fileno=fd)
    return found
