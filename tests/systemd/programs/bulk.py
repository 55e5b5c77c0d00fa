"""Bulk data over TCP port 3000: ``serve``, or ``to`` and ``from`` ADDRESS for SECONDS, which say bits per second.

Runs on whatever Python a host has.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

BLOCK = b"x" * 65536


def send(peer: socket.socket, seconds: float) -> None:
    """Send all that goes. What waits in a buffer is sent after the time, so that is small."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(BLOCK))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        peer.send(BLOCK)
    peer.shutdown(socket.SHUT_WR)


def take(peer: socket.socket) -> float:
    """Take all that comes; returns how fast that was."""
    taken, began = 0, time.monotonic()
    while block := peer.recv(1 << 18):
        taken += len(block)
    return taken * 8 / (time.monotonic() - began)


def serve(peer: socket.socket) -> None:
    """Do for one client what it asks."""
    with peer:
        peer.settimeout(20)
        if peer.recv(5) == b"from ":
            send(peer, float(peer.recv(16)))
        else:
            peer.sendall(b"%d" % take(peer))


def main() -> None:
    """As the arguments say."""
    if sys.argv[1] == "serve":
        server = socket.create_server(("0.0.0.0", 3000))
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
    direction, address, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    with socket.create_connection((address, 3000), timeout=20) as peer:
        if direction == "from":
            peer.sendall(b"from " + str(seconds).encode())
            print(take(peer))
        else:
            peer.sendall(b"to   ")
            send(peer, seconds)
            print(peer.recv(32).decode())


main()
