"""Fixtures for all tests. What needs root is skipped without it, and says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.harness import ALICE, BOB, CAROL, MALLORY, Daemon, HostNamespace, Snapshot, User, settle

# How long an example takes is the machine's business; a test has its own deadline.
settings.register_profile("netnsd", deadline=None)
settings.load_profile("netnsd")

_HERE = Path(__file__).parent
_ROOT_DIRECTORIES = (_HERE / "kernel", _HERE / "system", _HERE / "systemd")
_IS_ROOT = os.geteuid() == 0
# Long enough for the kernel to destroy a namespace whose last socket had unsent data.
_LEAK_SECONDS = 15.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/kernel, tests/system or tests/systemd needs root, and so does what is marked."""
    for item in items:
        if any(directory in item.path.parents for directory in _ROOT_DIRECTORIES):
            item.add_marker("root")
        if not _IS_ROOT and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root: it makes network and mount namespaces"))


@pytest.fixture(scope="session", autouse=True)
def _machine_is_left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """The whole run leaves nothing on the machine: no link, table, mount, namespace, cgroup, process or file."""
    if not _IS_ROOT or not any(item.get_closest_marker("root") for item in request.session.items):
        yield
        return
    before = Snapshot.of_machine()
    yield
    left = settle(before, Snapshot.of_machine, seconds=_LEAK_SECONDS, only_new=True)
    assert not left, "the tests left on the machine:\n" + "\n".join(left)


@pytest.fixture
def host() -> Iterator[HostNamespace]:
    """A disposable host."""
    with HostNamespace() as made:
        yield made


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A disposable host for all tests of a module."""
    with HostNamespace() as made:
        yield made


@pytest.fixture
def routed_host() -> Iterator[HostNamespace]:
    """A disposable host with a way to a network outside."""
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """A running netnsd on a disposable host."""
    with Daemon(host) as started:
        yield started


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    """A running netnsd for all tests of a module; each removes what it made."""
    with Daemon(shared_host) as started:
        yield started


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    """Starts netnsd with a configuration, each on a disposable host: ``make_daemon(config={...}, uplink=True)``."""
    with ExitStack() as stack:
        def make(*, uplink: bool = False, **options: Any) -> Daemon:
            host = stack.enter_context(HostNamespace(uplink=uplink))
            return stack.enter_context(Daemon(host, **options))

        yield make


@pytest.fixture
def alice() -> User:
    """In the groups netnsd and netnsdtest."""
    return ALICE


@pytest.fixture
def bob() -> User:
    """In the group netnsd."""
    return BOB


@pytest.fixture
def carol() -> User:
    """In the groups netnsd and netnsd-admin."""
    return CAROL


@pytest.fixture
def mallory() -> User:
    """In no group of netnsd's."""
    return MALLORY
