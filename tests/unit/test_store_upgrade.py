"""A state file of any earlier version opens with all that it holds, a newer one is refused, and no death halves it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from netnsd import wire
from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, PublishedPort, Service, Template
from netnsd.errors import StoreError
from netnsd.store import SCHEMA_VERSION, SqliteStore

PLAN = Plan("10.0.0.0/24", 253)
DUMPS = Path(__file__).parents[1] / "state"
VERSIONS = range(1, SCHEMA_VERSION)
FILES = ("netnsd.db", "netnsd.db-wal", "netnsd.db-shm")

# What the dumps of tests/state hold.
WEB = Command(("npm", "run", "dev"), {"PATH": "/usr/bin:/bin", "QUOTED": "it's \"é\"\nand \U0001f600"}, "/srv/web",
              1001, 1001, (27, 1001), 0o22, {"nofile": 4096, "core": -1}, False)
DB = Command(("postgres", "-D", "/srv/db"), {}, "/", 1001, 1001, (1001,), 0o77, {}, True)
JOB = Command(("./job",), {"N": "7"}, "/home/bob", 1002, 1002, (), 0o22, {}, False)
SHOP = Template(
    "6e0c7f1e-0000-4000-8000-000000000001", "shop", 1001, "alice", 1001, (27,), 2, wire.Specification(
        services=[wire.ServiceRequest(name="web", command=["npm", "run", "dev"], env={"A": "x=y"}, setuid=True)],
        ports=[wire.PortRequest(port=3000, publish=20005)], env={"SECRET": "é"}, cwd="/srv", labels={"app": "shop"},
        umask=0o27, limits={"nofile": -1}), "2026-11-21T10:00:00.000000Z")
PLAIN = Template("6e0c7f1e-0000-4000-8000-000000000002", "plain", 1002, "bob", 1002, (), 0,
                 wire.Specification(command=["true"]), "2026-11-21T10:00:01.000000Z")


def environments(version: int) -> list[Environment]:
    """What is expected of a file of that version: what it did not know has the value that changes nothing."""
    found = [
        Environment(
            id="5f0c7f1e-0000-4000-8000-000000000001", name="web", uid=1001, user="alice", slot=PLAN.slot(0),
            netns="web", labels={"team": "shop"}, share="owner", created_at="2026-11-20T10:00:00.000001Z",
            boot_id="boot", ports=(PublishedPort(3000, "tcp", 20000), PublishedPort(53, "udp", 20001)), state="ready",
            services={"web": Service("web", WEB, "running", 4242, "launch-web"),
                      "db": Service("db", DB, "exited", None, "launch-db", 137)}),
        Environment(
            id="5f0c7f1e-0000-4000-8000-000000000002", name="web", uid=1002, user="bob", slot=PLAN.slot(7),
            netns="web.bob", labels={}, share="owner", created_at="2026-11-20T10:00:01.000000Z", boot_id="boot",
            ports=(PublishedPort(8080, "tcp", 20007),), state="removing",
            services={"main": Service("main", JOB, "stopped", None, "launch-job", 0)}),
        Environment(
            id="5f0c7f1e-0000-4000-8000-000000000003", name="lab", uid=1001, user="alice", slot=PLAN.slot(3),
            netns="lab", labels={}, share="owner", created_at="2026-11-20T10:00:02.000000Z", boot_id="earlier boot",
            state="creating"),
    ]
    if version >= 2:
        found.append(Environment(
            id="5f0c7f1e-0000-4000-8000-000000000004", name="shop-0a1b2c3d", uid=1001, user="alice",
            slot=PLAN.slot(4), netns="shop-0a1b2c3d", labels={"app": "shop"}, share="owner",
            created_at="2026-11-21T10:00:03.000000Z", boot_id="boot", stock=SHOP.id,
            ports=(PublishedPort(3000, "tcp", 20005),), state="ready",
            services={"web": Service("web", WEB, "running", 4243, "launch-shop")}))
    if version >= 3:
        found.append(Environment(
            id="5f0c7f1e-0000-4000-8000-000000000005", name="kept", uid=1001, user="alice", slot=PLAN.slot(5),
            netns="kept", labels={}, share="owner", created_at="2026-11-22T10:00:00.000000Z", boot_id="boot",
            resources=wire.Resources(pids=64), state="ready",
            services={"web": Service("web", WEB, "restarting", None, "launch-kept", 1, "on-failure",
                                     wire.HealthCheck(http="/", port=3000), 3, 2, "unhealthy")}))
    return found


def templates(version: int) -> list[Template]:
    return [SHOP, PLAIN] if version >= 2 else []


def write(directory: Path, version: int) -> None:
    """A state file as that version left it."""
    with raw(directory) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript((DUMPS / f"version-{version}.sql").read_text(encoding="utf-8"))


@contextmanager
def raw(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(directory / "netnsd.db", isolation_level=None)) as database:
        yield database


def contents(directory: Path) -> tuple[object, ...]:
    """All of a state file: its version, its schema and its rows."""
    with raw(directory) as database:
        return (database.execute("PRAGMA user_version").fetchone(), *database.iterdump())


def schema(directory: Path) -> list[tuple[str, str]]:
    with raw(directory) as database:
        found = database.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").fetchall()
        return [(name, " ".join(sql.split())) for name, sql in found]


def in_bytes(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}


def test_every_earlier_version_has_a_file_here() -> None:
    assert sorted(path.name for path in DUMPS.iterdir()) == [f"version-{version}.sql" for version in VERSIONS]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_an_earlier_version_opens_with_all_that_it_holds(tmp_path: Path, version: int) -> None:
    write(tmp_path, version)
    for _ in range(2):
        with closing(SqliteStore(tmp_path, PLAN)) as store:
            assert store.environments() == environments(version)
            assert store.templates() == templates(version)
    with raw(tmp_path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_that_was_upgraded_is_as_a_new_one(tmp_path: Path, version: int) -> None:
    (tmp_path / "new").mkdir()
    write(tmp_path, version)
    for directory in (tmp_path, tmp_path / "new"):
        SqliteStore(directory, PLAN).close()
    assert schema(tmp_path) == schema(tmp_path / "new")


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_new_is_kept_in_a_file_that_was_upgraded(tmp_path: Path, version: int) -> None:
    write(tmp_path, version)
    check = wire.HealthCheck(http="/healthz", port=3000, retries=7, interval_seconds=1.5)
    with closing(SqliteStore(tmp_path, PLAN)) as store:
        [old, *_] = store.environments()
        service = Service("main", JOB, restart="on-failure", check=check)
        new = Environment(
            id="new", name="new", uid=1002, user="bob", slot=PLAN.slot(9), netns="new", labels={}, share="owner",
            created_at="2027", boot_id="b", resources=wire.Resources(pids=64), services={"main": service})
        restarted = service.changed(state="restarting", restarts=3, tries=2, exit_code=1)
        healthy = old.services["web"].changed(health="healthy")
        with store.transaction():
            store.add(new)
            store.set_service("new", restarted)
            store.set_service(old.id, healthy)
    with closing(SqliteStore(tmp_path, PLAN)) as store:
        by_id = {environment.id: environment for environment in store.environments()}
        assert by_id["new"].services == {"main": restarted}
        assert by_id["new"].resources == wire.Resources(pids=64)
        assert by_id[old.id].services["web"] == healthy
        assert by_id[old.id].services["db"] == old.services["db"]


# Is killed just before the statement with that number, counted from the first that changes anything.
KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from netnsd.core.addressing import Plan
from netnsd import store
left, begun = int(sys.argv[2]), False
def trace(statement):
    global left, begun
    begun = begun or statement.startswith("BEGIN")
    if begun:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
connect = sqlite3.connect
def traced(*arguments, **named):
    database = connect(*arguments, **named)
    database.set_trace_callback(trace)
    return database
sqlite3.connect = traced
store.SqliteStore(Path(sys.argv[1]), Plan("10.0.0.0/24", 253))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_an_upgrade_that_is_killed_at_any_statement_leaves_the_old_version_whole(tmp_path: Path, version: int) -> None:
    write(tmp_path, version)
    before, killed = contents(tmp_path), 0
    while True:
        directory = tmp_path / f"at-{killed}"
        directory.mkdir()
        shutil.copy(tmp_path / "netnsd.db", directory)
        done = subprocess.run([sys.executable, "-c", KILLED, str(directory), str(killed)], timeout=30, check=False,
                              env=os.environ | {"PYTHONPATH": str(DUMPS.parents[1])})
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        copy = tmp_path / f"look-{killed}"
        shutil.copytree(directory, copy)
        assert contents(copy) == before
        with closing(SqliteStore(directory, PLAN)) as store:
            assert store.environments() == environments(version)
            assert store.templates() == templates(version)
        killed += 1
    assert killed > 6, "every statement of the last upgrade, its begin and its commit"


def leave(directory: Path, target: Path) -> None:
    """The files of a state file that is open, as a daemon that is killed now would leave them."""
    target.mkdir()
    for name in FILES:
        if (directory / name).exists():
            shutil.copy(directory / name, target)


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 77, 2**31 - 1])
def test_a_newer_file_is_refused_and_not_one_byte_of_it_changes(tmp_path: Path, killed: bool, version: int) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    SqliteStore(made, PLAN).close()
    with raw(made) as database:
        database.execute(f"PRAGMA user_version = {version}")
        database.execute("CREATE TABLE of_the_future (x)")
        database.execute("INSERT INTO of_the_future VALUES ('kept')")
        if killed:
            leave(made, target)
    if not killed:
        leave(made, target)
    before = in_bytes(target)
    assert len(before) == (3 if killed else 1)
    for _ in range(2):  # and the refusal holds no lock
        with pytest.raises(StoreError, match=rf"newer.*schema {version}\b.*\b{SCHEMA_VERSION}\b"):
            SqliteStore(target, PLAN)
    assert in_bytes(target) == before


def test_a_version_that_was_not_committed_does_not_count(tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    SqliteStore(made, PLAN).close()
    with raw(made) as database:
        database.execute("BEGIN")
        database.execute("CREATE TABLE large (x)")
        database.execute("PRAGMA user_version = 77")
        database.execute("COMMIT")
        leave(made, target)
    log = target / "netnsd.db-wal"
    with pytest.raises(StoreError, match="newer"):
        SqliteStore(target, PLAN)
    os.truncate(log, log.stat().st_size - 24 - 4096)  # the last page, which commits; the version is in the first
    with closing(SqliteStore(target, PLAN)) as store:
        assert store.environments() == []


def test_a_log_that_was_written_over_in_part_does_not_count_beyond_that(tmp_path: Path) -> None:
    """After a checkpoint the log begins anew over what it had; the older frames behind it are still there."""
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    SqliteStore(made, PLAN).close()
    with raw(made) as database:
        database.execute("PRAGMA user_version = 77")
        database.execute("CREATE TABLE large (x)")
        database.executemany("INSERT INTO large VALUES (?)", [("x" * 3000,)] * 20)
        database.execute("PRAGMA wal_checkpoint(RESTART)")
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        leave(made, target)
    SqliteStore(target, PLAN).close()
