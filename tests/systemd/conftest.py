"""Containers with systemd, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Container


@pytest.fixture(scope="module")
def bare() -> Iterator[Container]:
    """A container without netnsd."""
    with Container() as made:
        yield made


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first container that installs netnsd leaves its virtual environment for the others."""
    return tmp_path_factory.mktemp("installed")


@pytest.fixture(scope="module")
def container(bare: Container, kept: Path) -> Container:
    """A container with netnsd installed, which Alice and Bob may use."""
    bare.install_quickly(kept)
    for user in ("alice", "bob"):
        bare.run(["usermod", "-aG", "netnsd", user], check=True)
    return bare
