"""A user's requests, one JSON object per line in and out, from one process that is that user: agent.py SOCKET

``{"method", "path", "body", "seconds"}`` asks the daemon; ``{"say", "address", "port", "seconds"}`` asks a server by
that protocol until it answers; ``{"connect", "port"}`` opens a conversation that is kept, and ``{"speak"}`` goes on.
``{"rows": FILE}`` counts the rows of a state file, ``{"change", "state", "values"}`` changes some.
Standard library only, as it runs in the system's Python.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
import time
from contextlib import closing
from typing import Any

_conversation: list[socket.socket] = []


def request(path: str, order: dict[str, Any]) -> dict[str, Any]:
    body = b"" if order.get("body") is None else json.dumps(order["body"]).encode()
    head = (f"{order['method']} {order['path']} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(order["seconds"])
        connection.connect(path)
        connection.sendall(head.encode() + body)
        data = b""
        while part := connection.recv(65536):
            data += part
    head_bytes, _, rest = data.partition(b"\r\n\r\n")
    if not head_bytes:
        return {"error": "closed without an answer"}
    if b"chunked" in head_bytes.lower():
        joined = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            joined, rest = joined + rest[:int(size, 16)], rest[int(size, 16) + 2:]
        rest = joined
    return {"status": int(head_bytes.split(b" ", 2)[1]), "body": json.loads(rest) if rest else None}


def say(order: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + order["seconds"]
    kind = socket.SOCK_STREAM if order["say"] == "tcp" else socket.SOCK_DGRAM
    while True:
        try:
            with socket.socket(socket.AF_INET, kind) as client:
                client.settimeout(0.5)
                client.connect((order["address"], order["port"]))
                client.send(b"hello")
                return {"answer": client.recv(4096).decode()}
        except OSError as error:
            if time.monotonic() > deadline:
                return {"answer": repr(error)}
            time.sleep(0.01)


def connect(order: dict[str, Any]) -> dict[str, Any]:
    _conversation.append(socket.create_connection(("127.0.0.1", order["port"]), timeout=5))
    return {}


def rows(order: dict[str, Any]) -> dict[str, Any]:
    with closing(sqlite3.connect(f"file:{order['rows']}?mode=ro", uri=True)) as state:
        names = [name for (name,) in state.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: state.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


def change(order: dict[str, Any]) -> dict[str, Any]:
    with closing(sqlite3.connect(order["state"])) as state, state:
        return {"changed": state.execute(order["change"], order["values"]).rowcount}


def speak(_order: dict[str, Any]) -> dict[str, Any]:
    _conversation[0].sendall(b"still there?")
    return {"answer": _conversation[0].recv(4096).decode()}


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "method" in order:
                answer = request(sys.argv[1], order)
            else:
                answer = next(do for word, do in (("say", say), ("connect", connect), ("speak", speak),
                                                      ("rows", rows), ("change", change))
                              if word in order)(order)
        except OSError as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
