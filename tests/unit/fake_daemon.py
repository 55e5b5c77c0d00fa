"""A small daemon that speaks netnsd's contract on a temporary directory's sockets, with threads and no kernel work.

``requests`` holds what clients sent. ``answers`` overrides a route by (method, path without query).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

DEADLINE_SECONDS = 20.0


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Problem(Exception):
    """An error that the daemon answers."""

    def __init__(self, status: int, code: str, message: str, hint: str = "", details: dict[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": code, "message": message, "hint": hint, "details": details or {}}}


class Request:
    """What a client sent. ``body`` is the JSON value, None where there was none."""

    def __init__(self, method: str, target: str, headers: dict[str, str], body: Any) -> None:
        self.method = method
        self.target = target
        self.path = unquote(urlsplit(target).path)
        self.query = parse_qsl(urlsplit(target).query)
        self.headers = headers
        self.body = body


class FakeDaemon:
    """Start it as a context manager; ``socket_path`` is where clients find it."""

    def __init__(self, directory: Path) -> None:
        self.socket_path = str(directory / "netnsd.sock")
        self.version: str | None = "0.1.0"
        self.environments: dict[str, dict[str, Any]] = {}
        self.templates: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.pool = {"name": "slots", "size": 8, "target": 8, "ready": 7, "claimed": 3, "missed": 1, "reason": ""}
        # So many creations are answered with that first, with this Retry-After.
        self.overloaded = 0
        self.overload = Problem(503, "overloaded", "64 creations of yours wait already", "try again.")
        # Of so many requests that change something, the connection is lost after these bytes of an answer.
        self.lost: list[bytes] = []
        self.retry_after: str | None = "0"
        self.requests: list[Request] = []
        self.answers: dict[tuple[str, str], bytes | dict[str, Any] | Problem] = {}
        self.raw_answer: bytes | None = None
        self.log_pieces: list[bytes] = [b"first\n", b"second\n"]
        self.follow_ends = threading.Event()
        self.followers_gone = threading.Event()
        self.attach_requests: list[dict[str, Any]] = []
        self.attach_answer: dict[str, Any] | None = None
        self.attach_dies = False
        self.signals: list[int] = []
        self.signalled = threading.Event()
        self.children_ended = threading.Event()
        self._listeners = [self._listen(self.socket_path, self._serve),
                           self._listen(str(directory / "attach.sock"), self._attach)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.follow_ends.set()
        for listener, thread in self._listeners:
            # Closing alone does not wake a thread in accept.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_SECONDS)
            listener.close()

    def add(self, name: str, **changes: Any) -> dict[str, Any]:
        """An environment as if it had been created."""
        index = len(self.environments)
        environment = {
            "id": f"00000000-0000-4000-8000-{index:012d}", "name": name,
            "owner": {"uid": os.getuid(), "user": "me"}, "state": "running", "address": f"10.203.0.{index + 2}",
            "netns": f"/run/netns/{name}", "ports": [], "services": [], "labels": {}, "share": "owner",
            "created_at": "2020-01-01T00:00:00.000000Z",
        } | changes
        self.environments[environment["id"]] = environment
        return environment

    def _listen(self, path: str, serve: Callable[[socket.socket], None]) -> tuple[socket.socket, threading.Thread]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(64)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._guarded, args=(serve, connection), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        return listener, thread

    def _guarded(self, serve: Callable[[socket.socket], None], connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            connection.settimeout(DEADLINE_SECONDS)
            serve(connection)

    # -- HTTP ---------------------------------------------------------------------------------------------------

    def _serve(self, connection: socket.socket) -> None:
        request = self._read(connection)
        if request is None:
            return
        self.requests.append(request)
        if self.lost and request.method != "GET":
            connection.sendall(self.lost.pop(0))
            return
        if self.raw_answer is not None:
            connection.sendall(self.raw_answer)
            return
        try:
            answer = self.answers.get((request.method, request.path))
            if isinstance(answer, Problem):
                raise answer
            if answer is None and request.path.endswith("/logs"):
                self._logs(connection, request)
                return
            status, answer = (200, answer) if answer is not None else self._route(request)
        except Problem as problem:
            status, answer = problem.status, problem.body
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        after = f"Retry-After: {self.retry_after}\r\n" if status in (429, 503) and self.retry_after is not None else ""
        connection.sendall(self._head(status, f"{after}Content-Length: {len(body)}\r\n") + body)

    def _head(self, status: int, headers: str) -> bytes:
        version = f"netnsd-version: {self.version}\r\n" if self.version else ""
        return f"HTTP/1.1 {status} X\r\n{version}{headers}\r\n".encode()

    def _read(self, connection: socket.socket) -> Request | None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        method, target, _ = line.split(" ")
        return Request(method, target, headers, json.loads(body) if body else None)

    def _find(self, ref: str) -> dict[str, Any]:
        for environment in self.environments.values():
            if ref in (environment["id"], environment["name"]):
                return environment
        raise Problem(404, "not_found", f"no environment {ref!r}", "`netnsctl ls` lists yours.")

    def _route(self, request: Request) -> tuple[int, dict[str, Any]]:
        parts = request.path.removeprefix("/v1/").split("/")
        if parts == ["info"]:
            return 200, {"version": "0.1.0", "pid": 1, "features": {"passrights": True}}
        if parts[0] == "templates":
            return self._template(request, parts[1:])
        if parts[0].partition("?")[0] == "tokens":
            return self._tokens(request, parts[1:])
        if parts[0] == "pools":
            return self._pools(request)
        if parts[0] != "environments":
            raise Problem(404, "no_route", "nothing there")
        if len(parts) == 1:
            return self._many(request)
        if len(parts) == 3 and parts[2] == "wait" and ("for", "gone") in request.query:
            return 200, {}
        environment = self._find(parts[1])
        if request.method == "DELETE":
            del self.environments[environment["id"]]
            return 202 if ("wait", "0") in request.query else 200, {}
        if request.method == "POST":
            environment["state"] = "stopped" if parts[2] == "stop" else "running"
        return 200, environment

    def _many(self, request: Request) -> tuple[int, dict[str, Any]]:
        if request.method == "GET":
            return 200, self._list(request)
        if request.method == "DELETE":
            return 202 if ("wait", "0") in request.query else 200, self._remove(request)
        if self.overloaded:
            self.overloaded -= 1
            raise self.overload
        body = request.body
        if body.get("count") is None:
            return 201, self._create(body)
        made = [self._create(body | {"name": f"{body['name']}-{number}"}) for number in range(1, body["count"] + 1)]
        return 201, {"environments": made}

    def _remove(self, request: Request) -> dict[str, Any]:
        if len(request.target) > 8192:
            raise Problem(400, "bad_request", "the first line is not METHOD PATH HTTP/1.1")
        removed, failed = [], []
        for ref in dict.fromkeys(v for k, v in request.query if k == "ref"):
            try:
                environment = self._find(ref)
            except Problem as problem:
                failed.append({"ref": ref, **problem.body})
            else:
                del self.environments[environment["id"]]
                removed.append(environment["name"])
        return {"removed": removed, "failed": failed}

    def _template(self, request: Request, rest: list[str]) -> tuple[int, dict[str, Any]]:
        if request.method == "POST":
            return 201, self._add_template(request.body)
        if not rest:
            return 200, {"templates": list(self.templates.values())}
        if rest[0] not in self.templates:
            raise Problem(404, "not_found", f"there is no template {rest[0]!r}", "`netnsctl template ls` lists yours.")
        return 200, self.templates[rest[0]] if request.method == "GET" else self.templates.pop(rest[0]) and {}

    def _add_template(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["name"] in self.templates and not body["replace"]:
            raise Problem(409, "name_taken", f"you have a template {body['name']!r} already", "pass --replace.")
        wanted = body["specification"]
        services = [{"name": "main", "command": wanted["command"], "cwd": wanted["cwd"]}] if "command" in wanted else []
        self.templates[body["name"]] = {
            "id": "00000000-0000-4000-8000-0000000000ff", "name": body["name"], "warm": body["warm"], "ready": 0,
            "owner": {"uid": os.getuid(), "user": "me"}, "reason": "no room" if body["warm"] else "",
            "services": services, "ports": wanted["ports"], "labels": wanted["labels"],
            "created_at": "2020-01-01T00:00:00.000000Z"}
        return self.templates[body["name"]]

    def _tokens(self, request: Request, rest: list[str]) -> tuple[int, dict[str, Any]]:
        if request.method == "POST":
            ends = "2020-02-01T00:00:00.000000Z" if "expires_seconds" in request.body else None
            token = {"id": "0123456789ab", "name": request.body["name"], "owner": {"uid": 1, "user": "me"},
                     "scope": request.body["scope"], "parent": None, "created_at": "2020-01-01T00:00:00.000000Z",
                     "expires_at": ends, "expired": ends is not None}
            self.tokens[request.body["name"]] = token
            return 201, token | {"token": "netnsd_0123456789ab_" + "5" * 64}
        if not rest:
            return 200, {"tokens": list(self.tokens.values())}
        if rest[0] not in self.tokens:
            raise Problem(404, "not_found", f"there is no token {rest[0]!r}", "`netnsctl token ls` lists yours.")
        del self.tokens[rest[0]]
        return 200, {}

    def _pools(self, request: Request) -> tuple[int, dict[str, Any]]:
        if request.method == "PATCH":
            self.pool |= request.body
            return 200, self.pool
        return 200, {"pools": [self.pool]}

    def _list(self, request: Request) -> dict[str, Any]:
        wanted = [tuple(v.split("=", 1)) for k, v in request.query if k == "label"]
        everyone = ("all", "1") in request.query
        return {"environments": [e for e in self.environments.values() if (everyone or e["owner"]["uid"] == os.getuid())
                                 and all(e["labels"].get(k) == v for k, v in wanted)]}

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        old = next((e for e in self.environments.values() if e["name"] == body["name"]), None)
        if old and not body.get("replace"):
            raise Problem(409, "name_taken", f"you have a {body['name']!r} already", "pass --replace.")
        if "template" in body and body["template"] not in self.templates:
            raise Problem(404, "not_found", f"there is no template {body['template']!r}")
        ports = [{"port": p["port"], "protocol": p["protocol"], "published": p.get("publish", 20000 + i),
                  "listen": "127.0.0.1"} for i, p in enumerate(body.get("ports", []))]
        services = [{"name": "main", "command": body["command"], "pid": 4711, "state": "running", "exit_code": None}
                    ] if body.get("command") else []
        return self.add(body["name"], ports=ports, services=services, labels=body["labels"])

    def _logs(self, connection: socket.socket, request: Request) -> None:
        self._find(request.path.split("/")[3])
        try:
            self._send_logs(connection)
            if ("follow", "1") in request.query:
                connection.settimeout(0.02)
                while not self.follow_ends.is_set():
                    with suppress(TimeoutError):
                        if not connection.recv(1):
                            self.followers_gone.set()
                            return
            connection.sendall(b"0\r\n\r\n")
        except ConnectionError:  # it left without having read all
            self.followers_gone.set()

    def _send_logs(self, connection: socket.socket) -> None:
        connection.sendall(self._head(200, "Transfer-Encoding: chunked\r\n"))
        for piece in self.log_pieces:
            chunk = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
            # In two halves: a client must not think that pieces end where packets do.
            connection.sendall(chunk[:-1])
            connection.sendall(chunk[-1:])

    # -- attach.sock --------------------------------------------------------------------------------------------

    def _attach(self, connection: socket.socket) -> None:
        length = struct.unpack("!I", self._exactly(connection, 4))[0]
        request = json.loads(self._exactly(connection, length))
        self.attach_requests.append(request)
        if self.attach_answer is not None:
            self._frame(connection, self.attach_answer)
            return
        self._frame(connection, {"ready": True})
        _, fds, _, _ = socket.recv_fds(connection, 1, 3)
        if not fds:
            return
        if self.attach_dies:
            for fd in fds:
                os.close(fd)
            return
        try:
            # Between fork and exec the child makes one system call, and takes no lock of any thread.
            child = subprocess.Popen(
                request["command"], stdin=fds[0], stdout=fds[1], stderr=fds[2], env=request["env"],
                cwd=request["cwd"], start_new_session=True,
                preexec_fn=_take_terminal if request["tty"] else None)  # noqa: PLW1509
        except OSError as error:
            self._frame(connection, {"error": {
                "code": "launch_failed", "message": f"exec: {error.strerror}", "hint": "",
                "details": {"stage": "exec", "errno": "ENOENT" if error.errno == 2 else "EACCES"}}})
            return
        finally:
            for fd in fds:
                os.close(fd)
        threading.Thread(target=self._forward, args=(connection.dup(), child.pid), daemon=True).start()
        code = child.wait(DEADLINE_SECONDS)
        try:
            self._frame(connection, {"exit": code if code >= 0 else 128 - code})
        finally:
            self.children_ended.set()

    def _forward(self, connection: socket.socket, pid: int) -> None:
        with connection, suppress(ProcessLookupError, OSError):
            while byte := connection.recv(1):
                self.signals.append(byte[0])
                os.killpg(pid, byte[0])
                self.signalled.set()
            os.killpg(pid, signal.SIGHUP)

    def _exactly(self, connection: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = connection.recv(count - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    def _frame(self, connection: socket.socket, value: dict[str, Any]) -> None:
        payload = json.dumps(value).encode()
        connection.sendall(struct.pack("!I", len(payload)) + payload)
