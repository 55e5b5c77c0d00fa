"""A state file that is damaged is refused with a clear error, or is whole: nothing in it is believed unseen."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netnsd import wire
from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, PublishedPort, Quota, Service, Template, Token
from netnsd.core.policy_documents import policy_of
from netnsd.errors import StoreError
from netnsd.store import SqliteStore

PLAN = Plan("10.0.0.0/24", 253)
COMMAND = Command(("sh", "-c", "x"), {"A": "b"}, "/srv", 1001, 1001, (27,), 0o22, {"nofile": -1}, False)
CHECK = wire.HealthCheck(tcp=3000)
ENVIRONMENTS = [
    Environment(
        id=f"5f0c7f1e-0000-4000-8000-00000000000{index}", name=f"web{index}", uid=1001, user="alice",
        slot=PLAN.slot(index), netns=f"web{index}.alice", labels={"team": "x"}, share="owner",
        created_at="2030-01-01T00:00:00.000000Z", boot_id="boot", state="ready", resources=wire.Resources(pids=9),
        request=f"{index:032x}:{index:032x}",
        ports=(PublishedPort(3000, "tcp", 20000 + index),),
        services={"main": Service("main", COMMAND, "running", 7, "launch", None, "always", CHECK, 1, 1, "healthy")})
    for index in range(3)]
TEMPLATE = Template("6e0c7f1e-0000-4000-8000-000000000001", "shop", 1001, "alice", 1001, (27,), 1,
                    wire.Specification(command=["x"]), "2030-01-01T00:00:00.000000Z")
TOKEN = Token("0123456789ab", "ci", 1001, "alice", b"h" * 32, "write", None, "2030-01-01T00:00:00.000000Z",
              "2031-01-01T00:00:00.000000Z")
POLICY = policy_of(
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "closed"},
     "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}}, 1001, "alice", "2030-01-01T00:00:00.000000Z")
CHILD = Token("0123456789ac", "child", 1001, "alice", b"i" * 32, "read", TOKEN.id, "2030-01-01T00:00:00.000000Z", None)


def write(directory: Path) -> None:
    with closing(SqliteStore(directory, PLAN)) as store, store.transaction():
        for environment in ENVIRONMENTS:
            store.add(environment)
        store.add_template(TEMPLATE)
        store.add_token(TOKEN)
        store.add_token(CHILD)
        store.set_policy(POLICY)
        store.set_quota(Quota(1001, "alice", {"environments": 5, "cpu": 1.5, "memory": None}))


@functools.cache
def pristine() -> tuple[bytes, bytes]:
    """A state file that was closed, and what is beside one that was not: the log."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory)
        whole = (directory / "netnsd.db").read_bytes()
        store = SqliteStore(directory, PLAN)
        with store.transaction():
            store.set_state(ENVIRONMENTS[0].id, "removing")
        log = (directory / "netnsd.db-wal").read_bytes()
        store.close()
        return whole, log


@contextlib.contextmanager
def directory_with(database: bytes, log: bytes | None = None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "netnsd.db").write_bytes(database)
        if log is not None:
            (Path(name) / "netnsd.db-wal").write_bytes(log)
        yield Path(name)


def read(directory: Path) -> tuple[list[Environment], list[Template]]:
    """As a daemon's start reads it. Raises StoreError, and nothing else."""
    with closing(SqliteStore(directory, PLAN)) as store:
        assert all(token.scope in ("read", "write", "admin") and len(token.hash) == 32 for token in store.tokens())
        assert all(limit is None or limit >= 0 for quota in store.quotas() for limit in quota.said.values())
        assert all(0 <= policy.uid < 2**32 - 1 and policy.name for policy in store.policies())
        return store.environments(), store.templates()


def is_sane(environments: list[Environment], templates: list[Template]) -> bool:
    """What is acted upon: paths, users, ports."""
    names = [text for e in environments for text in (e.id, e.name, e.netns, *e.services)] + [t.id for t in templates]
    return (all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]*", name) for name in names)
            and all(s.command.uid == e.uid for e in environments for s in e.services.values())
            and all(0 <= uid < 2**32 - 1 for uid in (*(e.uid for e in environments), *(t.uid for t in templates)))
            and all(1 <= p.published <= 65535 for e in environments for p in e.ports)
            and len({e.slot.index for e in environments}) == len(environments))


def check_outcome(directory: Path) -> bool:
    """Whether it was refused. What is read is sane; a second look gives the same."""
    try:
        found = read(directory)
    except StoreError:
        with pytest.raises(StoreError, match="the state file") as refused:
            read(directory)
        assert refused.value.hint
        return True
    assert is_sane(*found)
    assert read(directory) == found
    return False


def test_what_is_whole_is_read() -> None:
    with directory_with(pristine()[0]) as directory:
        assert read(directory) == (ENVIRONMENTS, [TEMPLATE])
    with directory_with(*pristine()) as directory:
        assert read(directory)[0][0].state == "removing"


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=8))
@settings(max_examples=120)
def test_bytes_that_are_flipped(flips: list[tuple[int, int]]) -> None:
    data = bytearray(pristine()[0])
    for place, change in flips:
        data[place % len(data)] ^= change
    with directory_with(bytes(data)) as directory:
        check_outcome(directory)


@given(st.integers(0, 1 << 20), st.booleans())
@settings(max_examples=60)
def test_a_file_that_is_cut_off(length: int, zeros: bool) -> None:
    data = pristine()[0]
    length %= len(data)
    with directory_with(data[:length] + (bytes(len(data) - length) if zeros else b"")) as directory:
        check_outcome(directory)


@given(st.integers(0, 100), st.integers(0, 100))
@settings(max_examples=60)
def test_pages_that_are_swapped(one: int, other: int) -> None:
    data = pristine()[0]
    pages = [data[start:start + 4096] for start in range(0, len(data), 4096)]
    one, other = one % len(pages), other % len(pages)
    pages[one], pages[other] = pages[other], pages[one]
    with directory_with(b"".join(pages)) as directory:
        check_outcome(directory)


@given(st.one_of(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=4),
                 st.integers(0, 1 << 20)))
@settings(max_examples=100)
def test_a_log_that_is_garbage(damage: Any) -> None:
    database, log = pristine()
    if isinstance(damage, bytes):
        log = damage
    elif isinstance(damage, int):
        log = log[:damage % len(log)]
    else:
        changed = bytearray(log)
        for place, change in damage:
            changed[place % len(log)] ^= change
        log = bytes(changed)
    with directory_with(database, log) as directory:
        check_outcome(directory)


VALUES: list[Any] = [
    "", "x", "../../etc/passwd", "/etc/passwd", "..", "a\0b", "[]", "{}", "{", "null", '{"a": 1}', "[1", "\U0001f600",
    '{"\\ud800": "x"}', "[" * 100_000, -1, 0, 1, 2**32 - 1, 2**63 - 1, -2**63, 65536, 1.5, b"", b"\xff\xfe",
    None, "creating", "owner"]
COLUMNS = {
    "environments": ["id", "name", "uid", "user", "slot", "netns", "labels", "share", "state", "created_at", "boot_id",
                     "stock", "resources", "egress", "request"],
    "policies": ["uid", "user", "name", "document", "created_at"],
    "ports": ["environment", "port", "protocol", "published", "listen"],
    "services": ["environment", "name", "command", "state", "pid", "launch_id", "exit_code", "restart", "health_check",
                 "restarts", "tries", "health"],
    "tokens": ["id", "name", "uid", "user", "hash", "scope", "parent", "created_at", "expires_at"],
    "quotas": ["uid", "user", "limits"],
    "templates": ["id", "name", "uid", "user", "gid", "other_gids", "warm", "specification", "created_at"],
}


def changed(directory: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    """Change rows as no daemon would, past every rule of the schema: wrong types, nulls and duplicates go in."""
    with closing(sqlite3.connect(directory / "netnsd.db")) as database:
        tables = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        rows = {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
        database.execute("PRAGMA foreign_keys = OFF")
        for name, sql in tables.items():
            database.execute(f"DROP TABLE {name}")
            without = re.sub(r",\s*(UNIQUE|PRIMARY KEY) \([^)]*\)", "", sql)
            database.execute(re.sub(r" (TEXT|INTEGER|BLOB)|NOT NULL|UNIQUE|PRIMARY KEY|STRICT"
                                    r"|REFERENCES \w+ \(id\) ON DELETE CASCADE", "", without))
            for row in rows[name]:
                database.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)
        for statement, values in statements:
            database.execute(statement, values)
        database.commit()


@given(st.sampled_from([(table, column) for table, columns in COLUMNS.items() for column in columns]),
       st.sampled_from(VALUES))
@settings(max_examples=400)
def test_a_value_of_another_kind(place: tuple[str, str], value: Any) -> None:
    table, column = place
    with directory_with(pristine()[0]) as directory:
        changed(directory, (f"UPDATE {table} SET {column} = ? WHERE rowid = 1", (value,)))
        check_outcome(directory)


CANNOT_BE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "a namespace outside": ("UPDATE environments SET netns = '../../etc/passwd' WHERE rowid = 1", ()),
    "an id that is a path": ("UPDATE environments SET id = '../../../etc' WHERE rowid = 1", ()),
    "a service that is a path": ("UPDATE services SET name = '../../x' WHERE rowid = 1", ()),
    "another user's command": ("UPDATE services SET command = replace(command, '1001', '0')", ()),
    "a user that is none": ("UPDATE environments SET uid = -1", ()),
    "a user that changes nothing": ("UPDATE environments SET uid = 4294967295", ()),
    "a port beyond": ("UPDATE ports SET published = 65536 WHERE rowid = 1", ()),
    "an address that is none": ("UPDATE ports SET listen = 'accept' WHERE rowid = 1", ()),
    "a protocol that is none": ("UPDATE ports SET protocol = '} drop' WHERE rowid = 1", ()),
    "a slot twice": ("UPDATE environments SET slot = 1", ()),
    "a slot beyond": ("UPDATE environments SET slot = 253 WHERE rowid = 1", ()),
    "a slot below": ("UPDATE environments SET slot = -1 WHERE rowid = 1", ()),
    "a namespace twice": ("UPDATE environments SET netns = 'web'", ()),
    "a name twice": ("UPDATE environments SET name = 'web'", ()),
    "a published port twice": ("UPDATE ports SET published = 20000", ()),
    "a state that is none": ("UPDATE environments SET state = 'gone' WHERE rowid = 1", ()),
    "a service's state that is none": ("UPDATE services SET state = 'gone' WHERE rowid = 1", ()),
    "labels that are no texts": ("UPDATE environments SET labels = '{\"a\": 1}' WHERE rowid = 1", ()),
    "no labels": ("UPDATE environments SET labels = NULL WHERE rowid = 1", ()),
    "resources that are none": ("UPDATE environments SET resources = '{\"pids\": -1}' WHERE rowid = 1", ()),
    "resources that nobody knows": ("UPDATE environments SET resources = '{\"gpu\": 1}' WHERE rowid = 1", ()),
    "a pid that is none": ("UPDATE services SET pid = 9223372036854775807 WHERE rowid = 1", ()),
    "a check of nothing": ("UPDATE services SET health_check = '{}' WHERE rowid = 1", ()),
    "a limit that is none": ("UPDATE services SET command = replace(command, 'nofile', 'x')", ()),
    "a template's groups": ("UPDATE templates SET other_gids = '[-1]'", ()),
    "a template's number": ("UPDATE templates SET warm = 1000000000", ()),
    "a template's specification": ("UPDATE templates SET specification = '[]'", ()),
    "a scope that is none": ("UPDATE tokens SET scope = 'root' WHERE rowid = 1", ()),
    "a hash of nothing": ("UPDATE tokens SET hash = x'' WHERE rowid = 1", ()),
    "a hash that is a text": ("UPDATE tokens SET hash = 'hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh' WHERE rowid = 1", ()),
    "a token of nobody's": ("UPDATE tokens SET uid = -1 WHERE rowid = 1", ()),
    "a time that never comes": ("UPDATE tokens SET expires_at = 'never' WHERE rowid = 1", ()),
    "a token twice": ("UPDATE tokens SET id = 'a'", ()),
    "a policy that is none": ("UPDATE policies SET document = '[]'", ()),
    "a policy of nothing": ("UPDATE policies SET document = 'null'", ()),
    "a policy of something unknown": ("UPDATE policies SET document = replace(document, 'ports', 'port')", ()),
    "a policy under another's name": ("UPDATE policies SET name = 'open'", ()),
    "a policy of nobody's": ("UPDATE policies SET uid = -1", ()),
    "a policy twice": ("INSERT INTO policies SELECT * FROM policies", ()),
    "a policy nested without end": ("UPDATE policies SET document = ?", ("[" * 100_000,)),
    "a request's mark that is none": ("UPDATE environments SET request = 'x' WHERE rowid = 1", ()),
    "a request's mark of half": ("UPDATE environments SET request = substr(request, 1, 32) WHERE rowid = 1", ()),
    "no request's mark": ("UPDATE environments SET request = NULL WHERE rowid = 1", ()),
    "a quota that bounds nothing": ("UPDATE quotas SET limits = '{\"environments\": \"many\"}'", ()),
    "a quota below nothing": ("UPDATE quotas SET limits = '{\"cpu\": -1}'", ()),
    "a quota without end": ("UPDATE quotas SET limits = '{\"cpu\": Infinity}'", ()),
    "a quota of nobody's": ("UPDATE quotas SET uid = -1", ()),
    "a quota of something unknown": ("UPDATE quotas SET limits = '{\"gpu\": 1}'", ()),
    "no table": ("DROP TABLE ports", ()),
    "no column": ("ALTER TABLE environments DROP COLUMN share", ()),
}


@pytest.mark.parametrize("statement", CANNOT_BE.values(), ids=CANNOT_BE.keys())
def test_what_cannot_be_is_refused(statement: tuple[str, tuple[Any, ...]]) -> None:
    with directory_with(pristine()[0]) as directory:
        changed(directory, statement)
        assert check_outcome(directory)


@pytest.mark.parametrize("table", ["ports", "services"])
def test_what_is_of_no_environment_is_refused(table: str) -> None:
    with directory_with(pristine()[0]) as directory:
        with closing(sqlite3.connect(directory / "netnsd.db")) as database:
            database.execute("PRAGMA foreign_keys = OFF")
            database.execute(f"UPDATE {table} SET environment = 'nobody' WHERE rowid = 1")
            database.commit()
        assert check_outcome(directory)


@pytest.mark.parametrize("version", [-1, 1, 3, 5, 2**31 - 1])
def test_a_version_that_it_is_not_is_refused_and_the_file_stays(version: int) -> None:
    with directory_with(pristine()[0]) as directory:
        with closing(sqlite3.connect(directory / "netnsd.db")) as database:
            database.execute(f"PRAGMA user_version = {version}")
        copy = directory / "copy"
        shutil.copy(directory / "netnsd.db", copy)
        assert check_outcome(directory)
        with closing(sqlite3.connect(directory / "netnsd.db")) as one, closing(sqlite3.connect(copy)) as other:
            assert list(one.iterdump()) == list(other.iterdump())
