"""The state file keeps what it is given, one daemon's at a time, and says clearly what it cannot do."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, PublishedPort, Service
from netnsd.errors import AlreadyRunning, StoreError
from netnsd.store import SCHEMA_VERSION, SqliteStore

PLAN = Plan("10.0.0.0/24", 253)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path, PLAN)
    yield made
    made.close()


def environment(index: int = 0, **changes: object) -> Environment:
    command = Command(("sh", "-c", "é\n\U0001f600"), {"A": "x=y", "B": ""}, "/srv/ä", 1001, 1002, (1, 2), 0o27,
                      {"nofile": -1}, True)
    made = Environment(
        id=f"id{index}", name=f"e{index}", uid=1001, user="alice", slot=PLAN.slot(index), netns=f"e{index}.alice",
        labels={"team/x": "ü"}, share="owner", created_at=f"2030-01-01T00:00:0{index % 10}.000000Z", boot_id="b",
        ports=(PublishedPort(3000, "tcp", 20000 + index), PublishedPort(53, "udp", 20000 + index)), state="creating",
        services={"web": Service("web", command), "db": Service("db", command, "running", 7, "launch", None)})
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def add(store: SqliteStore, *environments: Environment) -> None:
    with store.transaction():
        for one in environments:
            store.add(one)


def test_environments_come_back_as_they_were_oldest_first(tmp_path: Path) -> None:
    kept = [environment(3), environment(1), environment(2)]
    first = SqliteStore(tmp_path, PLAN)
    add(first, *kept)
    first.close()
    second = SqliteStore(tmp_path, PLAN)
    assert second.environments() == [environment(1), environment(2), environment(3)]
    assert list(second.environments()[0].services) == ["web", "db"]
    second.close()


def test_changes_are_kept(store: SqliteStore) -> None:
    add(store, environment())
    changed = environment().services["db"].changed(state="exited", pid=None, exit_code=137, launch_id="other")
    with store.transaction():
        store.set_state("id0", "ready")
        store.set_service("id0", changed)
    [found] = store.environments()
    assert found.state == "ready"
    assert found.services == {**environment().services, "db": changed}


def test_deleting_takes_ports_and_services_along(store: SqliteStore) -> None:
    add(store, environment())
    with store.transaction():
        store.delete("id0")
        store.delete("never was")
    assert store.environments() == []
    add(store, environment())


def test_a_transaction_that_fails_writes_nothing(store: SqliteStore) -> None:
    with pytest.raises(RuntimeError), store.transaction():  # noqa: PT012
        store.add(environment())
        raise RuntimeError
    assert store.environments() == []
    add(store, environment())


@pytest.mark.parametrize("twin", [
    {"id": "id0"}, {"name": "e0"}, {"netns": "e0.alice"}, {"slot": PLAN.slot(0)},
    {"ports": (PublishedPort(80, "tcp", 20000),)}], ids=lambda twin: next(iter(twin)))
def test_nothing_is_given_twice(store: SqliteStore, twin: dict[str, object]) -> None:
    add(store, environment(0))
    with pytest.raises(StoreError):
        add(store, environment(1, **twin))
    assert store.environments() == [environment(0)]


def test_the_file_is_for_root_alone(store: SqliteStore, tmp_path: Path) -> None:
    add(store, environment())
    for name in ("netnsd.db", "netnsd.db-wal", "netnsd.db-shm", "lock"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name


def test_a_second_daemon_is_refused_until_the_first_ends(store: SqliteStore, tmp_path: Path) -> None:
    with pytest.raises(AlreadyRunning):
        SqliteStore(tmp_path, PLAN)
    store.close()
    store.__init__(tmp_path, PLAN)  # type: ignore[misc]


def test_a_newer_schema_is_refused_unharmed(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path, PLAN)
    add(first, environment())
    first.close()
    with sqlite3.connect(tmp_path / "netnsd.db") as raw:
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.close()
    before = (tmp_path / "netnsd.db").read_bytes()
    for _ in range(2):  # and the refusal holds no lock
        with pytest.raises(StoreError, match="newer"):
            SqliteStore(tmp_path, PLAN)
    assert (tmp_path / "netnsd.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"hello" * 1000, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_not_ours_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "netnsd.db").write_bytes(content)
    with pytest.raises(StoreError):
        SqliteStore(tmp_path, PLAN)
    assert (tmp_path / "netnsd.db").read_bytes() == content


def test_a_slot_outside_the_supernet_is_named(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path, PLAN)
    add(first, environment(200))
    first.close()
    small = SqliteStore(tmp_path, Plan("10.0.0.0/28", 13))
    with pytest.raises(StoreError, match="slot 200"):
        small.environments()
    small.close()


@pytest.mark.parametrize("pragma", ["query_only = ON", "max_page_count = 1"], ids=["read-only", "full"])
def test_a_disk_that_cannot_be_written_is_a_store_error_and_changes_nothing(store: SqliteStore, pragma: str) -> None:
    add(store, environment())
    store._db.execute(f"PRAGMA {pragma}")
    with pytest.raises(StoreError):
        add(store, *(environment(n, labels={"a": "x" * 5000}) for n in range(1, 9)))
    assert store.environments() == [environment()]
    store._db.execute("PRAGMA query_only = OFF")
    store._db.execute("PRAGMA max_page_count = 100000")
    add(store, environment(1))


def test_a_directory_that_cannot_be_used_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        SqliteStore(tmp_path / "file", PLAN)


def test_refusals_leave_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "netnsd.db").write_bytes(b"hello" * 1000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StoreError):
            SqliteStore(tmp_path, PLAN)
    assert len(os.listdir("/proc/self/fd")) == before
