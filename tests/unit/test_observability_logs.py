"""The log says what went wrong, and nothing that is a user's."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, structlog
from netnsd.observability import logs
if sys.argv[1] == "terminal":
    sys.stderr.isatty = lambda: True
logs.configure("info")
def start(env):
    raise ValueError("broken")
try:
    start({"PASSWORD": "hush-hush"})
except ValueError:
    structlog.get_logger().exception("request_failed", path="/v1/x")
"""


@pytest.mark.parametrize("where", ["terminal", "file"])
def test_a_traceback_shows_frames_and_no_variables(where: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, where], capture_output=True, text=True, timeout=30,
                          check=True)
    said = done.stdout + done.stderr
    assert "broken" in said
    assert "start" in said
    assert "request_failed" in said
    assert "hush" not in said
