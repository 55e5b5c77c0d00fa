"""Echoes what comes, on any number of connections: ``echo.py PORT``."""

from __future__ import annotations

import socketserver
import sys


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(64):
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


_Server(("", int(sys.argv[1])), _Echo).serve_forever()
