"""Fixtures of the system tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import ALICE, Daemon


@pytest.fixture(scope="module")
def used_daemon(shared_daemon: Daemon) -> Daemon:
    """The module's daemon once it has made an environment: what it makes once (a bridge, a cgroup) is there."""
    shared_daemon.create_json("first", "sleep", "1000", user=ALICE)
    shared_daemon.ctl("rm", "first", user=ALICE, check=True)
    return shared_daemon


@pytest.fixture
def tidy_daemon(used_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon; what a test made with it, and a failure left, is removed."""
    yield used_daemon
    for environment in used_daemon.ctl_json("ls", "--all"):
        used_daemon.ctl("rm", environment["id"], check=True)
