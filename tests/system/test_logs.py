"""What servers write is kept, shown, followed, and bounded."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, wait_until
from tests.harness.daemon import program
from tests.system.clients import PYTHON, Environment, is_gone, main_of

LOG_BYTES = 65536
# Numbered lines of 100 bytes, about a megabyte a second; ends after COUNT lines, when the file ``go`` is there.
_CHATTY = """
import os, sys, time
count = int(sys.argv[1])
for number in range(count):
    os.write(1, f"{number:099d}\\n".encode())
    if number % 100 == 99:
        time.sleep(0.01)
while not os.path.exists("go"):
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    """A daemon that keeps little of each log."""
    with Daemon(shared_host, config={"services": {"log_bytes": LOG_BYTES}}) as started:
        yield started


def _follow(daemon: Daemon, *options: str) -> subprocess.Popen[bytes]:
    return daemon.host.popen([program("netnsctl"), "logs", "-f", *options, "web"], user=ALICE,
                             env={"NETNSD_SOCKET": daemon.socket})


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """Its next line of output, which comes within five seconds; the output is not buffered."""
    assert process.stdout is not None
    data = b""
    while not data.endswith(b"\n"):
        readable, _, _ = select.select([process.stdout], [], [], 5)
        assert readable, f"nothing came after {data!r}"
        more = os.read(process.stdout.fileno(), 1)
        if not more:
            break
        data += more
    return data


def _log(daemon: Daemon, environment: Environment) -> os.stat_result:
    return os.stat(daemon.host.path(f"{daemon.state_dir}/logs/{environment['id']}/main.log"))


def _said(daemon: Daemon, *options: str) -> str:
    return daemon.ctl("logs", "web", *options, user=ALICE, check=True).stdout


def test_logs_have_both_streams_in_order_and_are_the_owners_alone(tidy_daemon: Daemon) -> None:
    web = tidy_daemon.create_json("web", "sh", "-c", "for i in 1 2 3; do echo out$i; echo err$i >&2; done; printf end",
                                  user=ALICE)
    tidy_daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE)
    assert _said(tidy_daemon).split() == ["out1", "err1", "out2", "err2", "out3", "err3", "end"]
    assert _said(tidy_daemon, "--tail", "2") == "err3\nend"
    assert _said(tidy_daemon, "--tail", "0") == ""
    log = _log(tidy_daemon, web)
    # Root's, so that its user can neither lease nor execute it; the group bits are the mask of the access list.
    assert (log.st_uid, log.st_mode & 0o777) == (0, 0o660)
    path = f"{tidy_daemon.state_dir}/logs/{web['id']}/main.log"
    readers = {user: tidy_daemon.host.run(["cat", path], user=user).returncode == 0 for user in (ALICE, BOB)}
    assert readers == {ALICE: True, BOB: False}
    assert tidy_daemon.ctl("logs", "web", user=BOB).returncode == 4


def test_a_follower_sees_lines_as_they_come_and_ends_with_the_server(tidy_daemon: Daemon) -> None:
    code = "for i in 1 2 3; do until [ -e $i ]; do sleep 0.01; done; rm -f $i; echo line$i; done"
    tidy_daemon.create_json("web", "sh", "-c", code, user=ALICE)
    follower = _follow(tidy_daemon)
    for number in (1, 2, 3):
        tidy_daemon.host.write(f"{ALICE.home}/{number}", "", user=ALICE)
        assert _line(follower) == f"line{number}\n".encode()
    assert follower.wait(timeout=5) == 0


def test_a_follower_ends_when_the_environment_is_removed(tidy_daemon: Daemon) -> None:
    tidy_daemon.create_json("web", "sh", "-c", "echo one; exec sleep 1000", user=ALICE)
    follower = _follow(tidy_daemon)
    assert _line(follower) == b"one\n"
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
    assert follower.wait(timeout=5) == 0


def test_a_follower_that_is_killed_costs_the_server_nothing(tidy_daemon: Daemon) -> None:
    web = tidy_daemon.create_json("web", "sh", "-c", "while :; do echo x; sleep 0.01; done", user=ALICE)
    follower = _follow(tidy_daemon)
    assert _line(follower) == b"x\n"
    follower.kill()
    size = _log(tidy_daemon, web).st_size
    wait_until(lambda: _log(tidy_daemon, web).st_size > size, what="more lines")
    assert not is_gone(main_of(web)["pid"])


def test_a_chatty_servers_log_takes_bounded_disk_while_offsets_grow_and_a_follower_keeps_up(
        tidy_daemon: Daemon) -> None:
    lines = 40_000
    web = tidy_daemon.create_json("web", PYTHON, "-c", _CHATTY, str(lines), user=ALICE)
    follower = _follow(tidy_daemon)
    most = seen = 0
    last = -1

    def follow() -> bool:
        nonlocal most, seen, last
        assert follower.stdout is not None
        # A line may begin within a hole's end: only whole ones are numbers.
        text = os.read(follower.stdout.fileno(), 1 << 20)
        numbers = [int(part) for part in text.split(b"\n") if len(part) == 99 and part.isdigit()]
        assert numbers == sorted(numbers)
        assert not numbers or numbers[0] > last
        last = max([last, *numbers])
        seen += len(numbers)
        if _log(tidy_daemon, web).st_size > 2_000_000:  # a first look at a quiet log comes after two seconds
            most = max(most, _log(tidy_daemon, web).st_blocks * 512)
        return last == lines - 1

    wait_until(follow, seconds=20, what="the last line")
    assert _log(tidy_daemon, web).st_size == lines * 100
    assert most < 2_000_000, "a fraction of what was written"
    assert seen > lines // 4, "it followed, rather than looked now and then"
    wait_until(lambda: _log(tidy_daemon, web).st_blocks * 512 <= LOG_BYTES, what="the bound")
    kept = _said(tidy_daemon)
    assert 0 < len(kept) <= LOG_BYTES
    assert kept.endswith(f"{lines - 1:099d}\n")
    assert _said(tidy_daemon, "--tail", "3").splitlines() == [f"{n:099d}" for n in range(lines - 3, lines)]
    tidy_daemon.host.write(f"{ALICE.home}/go", "", user=ALICE)
    assert tidy_daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE).returncode == 0
