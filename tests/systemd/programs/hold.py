"""Holds one connection to an echo server: ``hold.py PORT``. Asks it every 5 ms until standard input ends.

Says ``connected`` first, and at the end how often it was answered and how long the slowest answer took, in seconds.
Anything else is a failure.
"""

from __future__ import annotations

import select
import socket
import sys
import time

line = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30)
print("connected", flush=True)
answers, longest = 0, 0.0
ended = False
while not ended:  # the last time after the end was asked for
    ended = bool(select.select([sys.stdin], [], [], 0.005)[0])
    asked = time.monotonic()
    line.sendall(b"%08d" % answers)
    assert line.recv(8, socket.MSG_WAITALL) == b"%08d" % answers, "the connection was closed"
    longest = max(longest, time.monotonic() - asked)
    answers += 1
print(answers, longest)
