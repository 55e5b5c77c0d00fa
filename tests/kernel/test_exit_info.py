"""The kernel tells how a process ended that is nobody's here, to who had a pidfd of it before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from netnsd.kernel import exit_info
from tests.harness import wait_until

pytestmark = pytest.mark.skipif(not exit_info.is_known(), reason="needs Linux 6.15")

# Leaves a child behind that ends with what it reads, and says its pid.
LEAVES = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    os.close(1)
    word = sys.stdin.readline().strip()
    if word.startswith("exit"):
        os._exit(int(word.split()[1]))
    os.kill(os.getpid(), int(word.split()[1]))
os._exit(0)
"""


@contextmanager
def orphan() -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A process whose parent has ended, and a pipe to it."""
    with subprocess.Popen([sys.executable, "-c", LEAVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.wait(timeout=5) == 0
        yield pid, parent


@pytest.mark.parametrize(("word", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255),
                                            (f"signal {signal.SIGTERM.value}", 143),
                                            (f"signal {signal.SIGKILL.value}", 137)])
async def test_the_code_of_an_orphan_is_told(word: str, code: int) -> None:
    with orphan() as (pid, parent), trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            told: list[int | None] = []

            async def ask() -> None:
                told.append(await exit_info.of(pid, lambda: True))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert parent.stdin is not None
            parent.stdin.write(f"{word}\n".encode())
            parent.stdin.flush()
        assert told == [code]


async def test_another_process_of_that_number_is_not_asked() -> None:
    with orphan() as (pid, _parent), trio.fail_after(1):
        assert await exit_info.of(pid, lambda: False) is None


async def test_what_has_ended_before_is_not_known_and_nothing_is_left_open() -> None:
    with orphan() as (pid, _parent):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), what="process 1 to reap it")
    before = os.listdir("/proc/self/fd")
    with trio.fail_after(1):
        assert await exit_info.of(pid, lambda: True) is None
    assert os.listdir("/proc/self/fd") == before


async def test_waiting_can_be_cancelled() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with orphan() as (pid, _parent):
        with trio.move_on_after(0.05) as scope:
            await exit_info.of(pid, lambda: True)
        assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == before
