"""Somebody mounts on the name of an environment: what is ours goes with it, and what is theirs stays."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness import ALICE, Daemon, HostNamespace, wait_until
from tests.system.clients import nothing_left

OURS, THEIRS, OTHERS = "/run/netns/web", "/run/netns/theirs", "/run/netns/others"


@pytest.fixture
def host(tidy_daemon: Daemon) -> Iterator[HostNamespace]:
    yield tidy_daemon.host
    for name in ("web", "theirs", "others"):
        tidy_daemon.host.run(["ip", "netns", "delete", name])


def _inode(host: HostNamespace, path: str) -> int:
    return os.stat(host.path(path)).st_ino


def _lines(host: HostNamespace) -> list[list[str]]:
    """What is mounted on the environment's name, the lowest first, as proc(5) has it in mountinfo."""
    lines = map(str.split, host.run(["cat", "/proc/self/mountinfo"]).stdout.splitlines())
    return [fields for fields in lines if fields[4] == OURS]


def _mounts(host: HostNamespace) -> list[str]:
    """The namespaces that are mounted on the environment's name, the lowest first."""
    return [fields[3] for fields in _lines(host)]


@pytest.mark.parametrize("killed", [False, True], ids=["running", "restarted"])
def test_our_own_namespace_that_is_mounted_again_on_its_name_goes_whole(
        tidy_daemon: Daemon, host: HostNamespace, killed: bool) -> None:
    with nothing_left(host):
        tidy_daemon.create_json("web", "sleep", "1000", user=ALICE)
        for _ in range(2):
            host.run(["mount", "--bind", OURS, OURS], check=True)
        if killed:
            tidy_daemon.kill()
            tidy_daemon.start()
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
        assert not host.path(OURS).exists()


@pytest.mark.parametrize("stack", [[THEIRS], [THEIRS, OURS], [THEIRS, OTHERS], [OURS, THEIRS]],
                         ids=lambda stack: "+".join(["web", *(path.rpartition("/")[2] for path in stack)]))
def test_anothers_namespace_that_is_mounted_on_our_name_keeps_it_and_ours_goes_from_below(
        tidy_daemon: Daemon, host: HostNamespace, stack: list[str]) -> None:
    for path in (THEIRS, OTHERS):
        host.run(["ip", "netns", "add", path.rpartition("/")[2]], check=True)
        host.run(["ip", "netns", "exec", path.rpartition("/")[2], "ip", "link", "add", "mark0", "type", "bridge"],
                 check=True)
    tidy_daemon.create_json("web", "sleep", "1000", user=ALICE)
    ours = _inode(host, OURS)
    # Ours, to mount it again from. Private: else what is mounted on the one appears on the other.
    host.write("/run/test/copy", "")
    host.run(["mount", "--bind", "--make-private", OURS, "/run/test/copy"], check=True)
    uppermost = next(path for path in reversed(stack) if path != OURS)
    for path in stack:
        # What is mounted on one of several peers appears on all, and would be on names that nobody meant.
        options = ["--bind"] if len(stack) == 1 else ["--bind", "--make-private"]
        host.run(["mount", *options, "/run/test/copy" if path == OURS else path, OURS], check=True)
    host.run(["umount", "/run/test/copy"], check=True)
    assert len(_mounts(host)) == 1 + len(stack)
    theirs = _inode(host, uppermost)
    # Nothing else holds it: it lives by our name alone.
    host.run(["ip", "netns", "delete", uppermost.rpartition("/")[2]], check=True)
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
    assert _mounts(host) == [f"net:[{theirs}]"]
    assert "mark0" in host.run(["ip", "netns", "exec", "web", "ip", "-br", "link"], check=True).stdout
    wait_until(lambda: f"net:[{ours}]" not in host.run(["cat", "/proc/self/mountinfo"]).stdout, what="our end")
    assert tidy_daemon.ctl_json("ls", "--all") == []
    assert tidy_daemon.create_json("web", user=ALICE)["netns"] == "/run/netns/web.alice"


def test_a_name_that_became_anothers_altogether_is_not_touched(tidy_daemon: Daemon, host: HostNamespace) -> None:
    tidy_daemon.create_json("web", "sleep", "1000", user=ALICE)
    host.run(["sh", "-ec", "ip netns delete web; ip netns add web"], check=True)
    theirs = _inode(host, OURS)
    before = _lines(host)
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
    assert _inode(host, OURS) == theirs
    assert _lines(host) == before, "the same mount, so that it was not gone for a moment either"
