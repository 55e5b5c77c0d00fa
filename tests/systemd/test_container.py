"""The container itself: what its tests lean on, and that it goes with whoever made it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.harness import ALICE, Container, wait_until
from tests.harness.container import CHECKOUT


def test_systemd_is_the_first_process_and_nothing_of_netnsd_is_there(bare: Container) -> None:
    assert bare.path("/proc/1/comm").read_text() == "systemd\n"
    assert bare.systemctl("list-unit-files", "netnsd*", "--no-legend", check=False) == ""
    assert bare.systemctl("is-system-running").strip() == "running"
    assert bare.run(["getent", "group", "netnsd"]).returncode != 0
    assert [link.split()[0] for link in bare.run(["ip", "-br", "link"], check=True).stdout.splitlines()] == ["lo"]
    assert bare.run(["id", "-un"], user=ALICE).stdout == "alice\n"


def test_what_is_written_is_told_and_not_on_the_machine(bare: Container) -> None:
    bare.run(["sh", "-c", "echo new >/etc/netnsd-written; rm /etc/hosts; cat /etc/passwd >/etc/copy"], check=True)
    written = bare.written()
    assert {"/etc/netnsd-written", "/etc/hosts", "/etc/copy"} <= written.keys()
    assert written["/etc/hosts"] == ""
    assert not os.path.exists("/etc/netnsd-written")
    assert os.path.exists("/etc/hosts")


def test_a_container_goes_when_its_test_is_killed() -> None:
    script = "from tests.harness import Container; print(Container().cgroup, flush=True); input()"
    maker = subprocess.Popen([sys.executable, "-c", script], cwd=CHECKOUT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert maker.stdin is not None
    assert maker.stdout is not None
    group = maker.stdout.readline().strip().removesuffix("/payload")
    assert os.path.isdir(group)
    maker.kill()
    maker.communicate()
    wait_until(lambda: not os.path.exists(group), seconds=10, what="the container's end")
