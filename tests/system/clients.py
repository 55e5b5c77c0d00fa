"""What the system tests run on a disposable host: small clients and servers, and a look at what is left afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from tests.harness import Daemon, HostNamespace, Snapshot, User, settle
from tests.harness.host import Place, tool

PYTHON = "/usr/bin/python3"
Environment = dict[str, Any]

# Answers each TCP connection and UDP datagram with its name and the text it got, at ADDRESS:PORT.
ECHO = """
import socket, sys, threading
name, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((address, port))
tcp = socket.create_server((address, port))
def answer():
    while True:
        text, peer = udp.recvfrom(4096)
        udp.sendto(name.encode() + b" heard " + text, peer)
def converse(connection):
    while text := connection.recv(4096):
        connection.sendall(name.encode() + b" heard " + text)
    connection.close()
threading.Thread(target=answer, daemon=True).start()
while True:
    threading.Thread(target=converse, args=(tcp.accept()[0],), daemon=True).start()
"""
# Says what came back, or the error's name.
_ASK = """
import errno, socket, sys
kind, address, port, source = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as client:
    client.settimeout(float(sys.argv[5]))
    try:
        if source:
            client.bind((source, 0))
        client.connect((address, port))
        client.send(b"hello")
        print(client.recv(4096).decode())
    except OSError as error:
        print(errno.errorcode.get(error.errno, "TIMEOUT") if error.errno else "TIMEOUT")
"""


def echo_server(name: str, port: int, address: str = "127.0.0.1") -> list[str]:
    """A command that answers TCP and UDP with ``NAME heard TEXT``."""
    return [PYTHON, "-c", ECHO, name, address, str(port)]


def asking(kind: str, address: str, port: int, *, source: str = "", seconds: float = 3.0) -> list[str]:
    """A command that says hello to ``address``:``port`` and prints the answer, an errno's name, or TIMEOUT."""
    return [PYTHON, "-c", _ASK, kind, address, str(port), source, str(seconds)]


def ask(place: Place, kind: str, address: str, port: int, *, user: User | str | None = None,
        source: str = "", seconds: float = 3.0) -> str:
    """Say hello by ``kind`` (tcp, udp) from ``place``; the answer, an errno's name, or TIMEOUT."""
    return place.run(asking(kind, address, port, source=source, seconds=seconds), user=user, cwd="/",
                     check=True).stdout.strip()


class Conversation:
    """A user's TCP connection from ``place`` that is kept open: what is said comes back. Close it, or use a context."""

    _PROGRAM = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
for line in sys.stdin:
    connection.sendall(line.strip().encode())
    print(connection.recv(4096).decode(), flush=True)
"""

    def __init__(self, place: Place, address: str, port: int, *, user: User) -> None:
        self._process = place.popen([PYTHON, "-c", self._PROGRAM, address, str(port)], user=user, cwd="/",
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def say(self, text: str) -> str:
        """Say it, and return the answer, or what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().decode().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=5)


def pings(place: Place, address: str, *, user: User | str | None = None, seconds: float = 3.0) -> bool:
    """Whether ``address`` answers one ICMP echo in time."""
    return place.run([tool("ping"), "-c1", f"-W{seconds:g}", address], user=user, cwd="/").returncode == 0


def published(environment: Environment, port: int | None = None) -> int:
    """The host's port for ``port`` inside, or for the only one."""
    number: int = next(p["published"] for p in environment["ports"] if port in (None, p["port"]))
    return number


def main_of(environment: Environment) -> dict[str, Any]:
    """The environment's first service."""
    service: dict[str, Any] = environment["services"][0]
    return service


def is_gone(pid: int) -> bool:
    """Whether it ended; who inherited it may be late to wait for it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def inside(daemon: Daemon, ref: str, *command: str, user: User | str | None = None, **options: Any) -> str:
    """What a command printed in an environment, which must succeed."""
    return daemon.ctl("exec", ref, *options.pop("flags", ()), "--", *command, user=user, check=True,
                      **options).stdout.strip()


@contextmanager
def nothing_left(host: HostNamespace, *, seconds: float = 5.0) -> Iterator[None]:
    """What is on the host afterwards is what was there before; daemon and launcher may have become others."""
    def look() -> Snapshot:
        seen = Snapshot.of_host(host)
        # Users' own files stay theirs.
        return replace(seen, files=frozenset(path for path in seen.files if not path.startswith("/run/home/")),
                       processes=frozenset(line for line in seen.processes if "/run/test/" not in line))

    before = look()
    yield
    left = settle(before, look, seconds=seconds)
    assert left == [], "\n".join(left)
