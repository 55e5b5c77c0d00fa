"""The state file keeps what it is given, one daemon's at a time, and says clearly what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from netnsd import wire
from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, PublishedPort, Service, Template
from netnsd.errors import AlreadyRunning, StoreError
from netnsd.store import SCHEMA_VERSION, SqliteStore

PLAN = Plan("10.0.0.0/24", 253)
# The first version's, word for word: there are state files that it made.
FIRST_SCHEMA = """
CREATE TABLE environments (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    slot INTEGER NOT NULL UNIQUE,
    netns TEXT NOT NULL UNIQUE,
    labels TEXT NOT NULL,
    share TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    UNIQUE (uid, name)
) STRICT;
CREATE TABLE ports (
    environment TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    port INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    published INTEGER NOT NULL,
    listen TEXT NOT NULL,
    PRIMARY KEY (protocol, published)
) STRICT;
CREATE INDEX ports_by_environment ON ports (environment);
CREATE TABLE services (
    environment TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    command TEXT NOT NULL,
    state TEXT NOT NULL,
    pid INTEGER,
    launch_id TEXT,
    exit_code INTEGER,
    PRIMARY KEY (environment, name)
) STRICT;
PRAGMA user_version = 1;
"""


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


def template(number: int = 0, **changes: object) -> Template:
    wanted = wire.Specification(
        services=[wire.ServiceRequest(name="web", command=["sh", "-c", "é\n"], env={"A": "x=y"}, setuid=True)],
        ports=[wire.PortRequest(port=53, protocol="udp"), wire.PortRequest(port=80, publish=20000)],
        env={"SECRET": "\U0001f600"}, cwd="/srv", labels={"team/x": "ü"}, umask=0o27, limits={"nofile": -1})
    made = Template(f"t{number}", f"shop{number}", 1001, "alice", 100, (27, 100), 3, wanted,
                    f"2030-01-01T00:00:0{number}.000000Z")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def raw_schema(directory: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(directory / "netnsd.db")) as raw:
        found = raw.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").fetchall()
        return [(name, " ".join(sql.split())) for name, sql in found]


def make_first_version(directory: Path, *kept: Environment) -> None:
    """A state file as the first version wrote it, left by a daemon that was killed."""
    with closing(sqlite3.connect(directory / "netnsd.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.executescript(FIRST_SCHEMA)
        for e in kept:
            raw.execute("INSERT INTO environments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (e.id, e.name, e.uid, e.user, e.slot.index, e.netns, json.dumps(e.labels), e.share, e.state,
                         e.created_at, e.boot_id))
            for port in e.ports:
                raw.execute("INSERT INTO ports VALUES (?, ?, ?, ?, ?)",
                            (e.id, port.port, port.protocol, port.published, port.listen))
            for s in e.services.values():
                command = dataclasses.asdict(s.command)
                raw.execute("INSERT INTO services VALUES (?, ?, ?, ?, ?, ?, ?)",
                            (e.id, s.name, json.dumps(command), s.state, s.pid, s.launch_id, s.exit_code))


def add(store: SqliteStore, *environments: Environment) -> None:
    with store.transaction():
        for one in environments:
            store.add(one)


def test_environments_come_back_as_they_were_oldest_first_whatever_the_clock_said(tmp_path: Path) -> None:
    kept = [environment(3), environment(1), environment(2)]
    first = SqliteStore(tmp_path, PLAN)
    add(first, *kept)
    first.close()
    second = SqliteStore(tmp_path, PLAN)
    assert second.environments() == kept
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


class FullAtCommit:
    """A connection whose disk fills up between a statement and its commit. ``ends``: SQLite rolls back by itself."""

    def __init__(self, db: sqlite3.Connection, *, ends: bool) -> None:
        self._db, self._ends = db, ends

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT":
            if self._ends:
                self._db.execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(statement, *values)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


@pytest.mark.parametrize("ends", [False, True])
def test_a_commit_that_fails_writes_nothing_and_is_in_no_other_transactions_way(store: SqliteStore, ends: bool) -> None:
    real = store._db
    store._db = FullAtCommit(real, ends=ends)  # type: ignore[assignment]
    with pytest.raises(StoreError, match="full"):
        add(store, environment())
    store._db = real
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


def test_a_file_of_the_first_version_is_taken_over_with_all_that_it_holds(tmp_path: Path) -> None:
    kept = [environment(0, state="ready"), environment(1, state="removing", services={}, ports=())]
    make_first_version(tmp_path, *kept)
    for _ in range(2):
        store = SqliteStore(tmp_path, PLAN)
        assert store.environments() == kept
        assert all(e.stock == "" for e in store.environments())
        assert store.templates() == []
        store.close()
    store = SqliteStore(tmp_path, PLAN)
    with store.transaction():
        store.add(environment(2, stock="t0"))
        store.add_template(template())
        store.delete("id0")
    assert store.environments() == [kept[1], environment(2, stock="t0")]
    store.close()


def test_a_file_that_was_taken_over_is_as_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    make_first_version(tmp_path)
    for directory in (tmp_path, tmp_path / "new"):
        SqliteStore(directory, PLAN).close()
    assert raw_schema(tmp_path) == raw_schema(tmp_path / "new")
    with closing(sqlite3.connect(tmp_path / "netnsd.db")) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_taking_a_file_over_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    make_first_version(tmp_path, environment())
    with closing(sqlite3.connect(tmp_path / "netnsd.db", isolation_level=None)) as raw:
        raw.execute("CREATE TABLE templates (x)")  # the last step of the way cannot be made
    before = raw_schema(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError):
            SqliteStore(tmp_path, PLAN)
    assert raw_schema(tmp_path) == before
    with closing(sqlite3.connect(tmp_path / "netnsd.db", isolation_level=None)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        raw.execute("DROP TABLE templates")
    store = SqliteStore(tmp_path, PLAN)
    assert store.environments() == [environment()]
    store.close()


def test_a_newer_schema_is_named_with_both_versions(tmp_path: Path) -> None:
    SqliteStore(tmp_path, PLAN).close()
    with closing(sqlite3.connect(tmp_path / "netnsd.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA user_version = 77")
    with pytest.raises(StoreError, match=rf"schema 77.*\b{SCHEMA_VERSION}\b"):
        SqliteStore(tmp_path, PLAN)


def test_templates_come_back_as_they_were_oldest_first_whatever_the_clock_said(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path, PLAN)
    kept = [template(2), template(1), template(3, specification=wire.Specification())]
    with first.transaction():
        for one in kept:
            first.add_template(one)
    first.close()
    second = SqliteStore(tmp_path, PLAN)
    assert second.templates() == kept
    with second.transaction():
        second.delete_template("t1")
        second.delete_template("never was")
    assert second.templates() == [kept[0], kept[2]]
    second.close()


def test_a_template_that_fails_to_be_written_is_not_there(store: SqliteStore) -> None:
    with store.transaction():
        store.add_template(template())
    for twin in (template(1, id="t0"), template(1, name="shop0")):
        with pytest.raises(StoreError), store.transaction():  # noqa: PT012
            store.delete_template("t0")
            store.add_template(template())
            store.add_template(twin)
        assert store.templates() == [template()]
    with store.transaction():
        store.add_template(template(1, name="shop0", uid=1002))


def test_what_is_handed_over_is_kept_and_nothing_else_of_it_changes(store: SqliteStore) -> None:
    old = environment(0, state="ready", stock="t0")
    add(store, old, environment(1))
    new = dataclasses.replace(old, name="web", netns="web", labels={"a": "b"}, stock="",
                              created_at="2029-01-01T00:00:00.000000Z")
    with store.transaction():
        store.rename(new)
    assert store.environments() == [environment(1), new]
    for twin in ({"name": "e1"}, {"netns": "e1.alice"}):
        with pytest.raises(StoreError), store.transaction():
            store.rename(dataclasses.replace(new, **twin))  # type: ignore[arg-type]
    assert store.environments() == [environment(1), new]


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


def test_nobody_else_can_open_the_state_file_at_any_moment(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def connect(path: Path, **options: Any) -> sqlite3.Connection:
        made = sqlite3.Connection(path, **options)
        modes.append(stat.S_IMODE(os.stat(path).st_mode))
        return made

    monkeypatch.setattr("netnsd.store.sqlite3.connect", connect)
    with closing(SqliteStore(tmp_path / "state", PLAN)) as store:
        shutil.rmtree(tmp_path / "state")
        assert store.restore()
    assert modes == [0o600] * 3


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


STATE_FILES = ("netnsd.db", "netnsd.db-wal", "netnsd.db-shm", "lock")


@pytest.mark.parametrize("removed", [*((name,) for name in STATE_FILES), STATE_FILES[1:3], STATE_FILES[:3], None],
                         ids=lambda names: "+".join(names) if names else "directory")
def test_what_is_removed_of_the_directory_is_put_back_with_all_that_was_written(
        tmp_path: Path, removed: tuple[str, ...] | None) -> None:
    directory = tmp_path / "state"
    store = SqliteStore(directory, PLAN)
    add(store, environment(1))
    assert not store.restore()
    if removed is None:
        shutil.rmtree(directory)
    for name in removed or ():
        (directory / name).unlink()
    add(store, environment(2))  # what is open takes it all the same
    assert store.restore()
    assert not store.restore()
    assert sorted(os.listdir(directory)) == sorted(STATE_FILES)
    assert {name: os.stat(directory / name).st_mode & 0o777 for name in ("netnsd.db", "lock")} == {
        "netnsd.db": 0o600, "lock": 0o600}
    with pytest.raises(AlreadyRunning):
        SqliteStore(directory, PLAN)
    add(store, environment(3))
    copy = tmp_path / "killed"  # as a daemon that is killed leaves it
    shutil.copytree(directory, copy)
    killed = SqliteStore(copy, PLAN)
    assert killed.environments() == [environment(n) for n in (1, 2, 3)]
    killed.close()
    store.close()
    again = SqliteStore(directory, PLAN)
    assert again.environments() == [environment(n) for n in (1, 2, 3)]
    again.close()


def test_a_directory_that_another_daemon_has_taken_since_is_left_to_it(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    store = SqliteStore(directory, PLAN)
    add(store, environment(1))
    shutil.rmtree(directory)
    other = SqliteStore(directory, PLAN)
    add(other, environment(2))
    with pytest.raises(AlreadyRunning):
        store.restore()
    assert other.environments() == [environment(2)]
    other.close()
    assert store.restore()
    assert store.environments() == [environment(1)]
    store.close()


def test_a_file_that_cannot_be_put_back_is_a_store_error_until_it_can(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    store = SqliteStore(directory, PLAN)
    add(store, environment(1))
    shutil.rmtree(directory)
    directory.write_text("in the way")
    with pytest.raises(StoreError):
        store.restore()
    directory.unlink()
    assert store.restore()
    assert store.environments() == [environment(1)]
    store.close()


def test_refusals_leave_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "netnsd.db").write_bytes(b"hello" * 1000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StoreError):
            SqliteStore(tmp_path, PLAN)
    assert len(os.listdir("/proc/self/fd")) == before
