"""The state file: SQLite in WAL mode. A row states what is intended before the kernel is touched.

``synchronous=NORMAL``: a commit costs tens of microseconds and survives any death of the daemon. Power loss may take
the last commits, and takes the namespaces with it anyway.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from netnsd import wire
from netnsd.core import recorded
from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, PublishedPort, Quota, Service, Template, Token
from netnsd.core.policy import Policy
from netnsd.errors import AlreadyRunning, StoreError

# What makes each version's schema of the one before; a new state file goes through all of them.
_MIGRATIONS = ("""
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
""", """
ALTER TABLE environments ADD COLUMN stock TEXT NOT NULL DEFAULT '';
CREATE TABLE templates (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    gid INTEGER NOT NULL,
    other_gids TEXT NOT NULL,
    warm INTEGER NOT NULL,
    specification TEXT NOT NULL,
    created_at TEXT NOT NULL,
    UNIQUE (uid, name)
) STRICT;
""", """
ALTER TABLE environments ADD COLUMN resources TEXT NOT NULL DEFAULT '{}';
ALTER TABLE services ADD COLUMN restart TEXT NOT NULL DEFAULT 'no';
ALTER TABLE services ADD COLUMN health_check TEXT;
ALTER TABLE services ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE services ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE services ADD COLUMN health TEXT;
""", """
ALTER TABLE environments ADD COLUMN egress TEXT NOT NULL DEFAULT 'allow';
ALTER TABLE environments ADD COLUMN request TEXT NOT NULL DEFAULT '';
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    hash BLOB NOT NULL,
    scope TEXT NOT NULL,
    parent TEXT REFERENCES tokens (id) ON DELETE CASCADE,
    created_at TEXT NOT NULL,
    expires_at TEXT,
    UNIQUE (uid, name)
) STRICT;
CREATE TABLE policies (
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    name TEXT NOT NULL,
    document TEXT NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (uid, name)
) STRICT;
CREATE TABLE quotas (
    uid INTEGER PRIMARY KEY,
    user TEXT NOT NULL,
    limits TEXT NOT NULL
) STRICT;
""")
SCHEMA_VERSION = len(_MIGRATIONS)
_HEADER_BYTES = 100  # of the first page
_FILE = "netnsd.db"
_LOCK = "lock"
_BESIDE = (f"{_FILE}-wal", f"{_FILE}-shm")


class SqliteStore:
    """The state file of one daemon; implements ``core.interfaces.Store``.

    Args:
        directory: the state directory, made when it is missing, for root alone.
        plan: gives slots back from their indexes.

    Raises AlreadyRunning where another daemon has it open, StoreError where it cannot be used.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._plan = plan
        self._directory, self._prefix = directory, f"{directory}/"
        self._lock = _lock(directory)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock)
            _require_known(_version_of(directory / _FILE))
            with _translated():
                self._db = _open(directory / _FILE)
                undo.callback(self._db.close)
                self._require_whole()
            self._migrate()
            self._files = self._identities()
            undo.pop_all()

    def close(self) -> None:
        """Close the file and let another daemon have it."""
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._roll_back()  # what an earlier one could not
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # what went wrong first is what matters
                    self._roll_back()
                raise

    def restore(self) -> bool:
        """Put back, whole, what somebody has removed of the directory: the state file, what is beside it, the lock.

        What is open lives on without its name, and all that is written to it would be gone with the daemon. Returns
        whether anything was missing. Raises AlreadyRunning where another daemon has the directory now, and StoreError.
        """
        try:
            missing = {name for name, identity in self._files.items() if _identity(self._prefix + name) != identity}
            if missing and _LOCK in missing:
                lock = _lock(self._directory)
                os.close(self._lock)
                self._lock = lock
            if missing - {_LOCK}:
                with _translated():
                    self._write_anew()
            if missing:
                self._files = self._identities()
        except OSError as error:
            raise StoreError(f"the state file cannot be put back: {error}",
                             hint="Is the disk of the state directory full, or not writable?") from error
        return bool(missing)

    def _write_anew(self) -> None:
        path, fresh = self._directory / _FILE, self._directory / f"{_FILE}.new"
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # where the file is still there it lacks nothing
        fresh.unlink(missing_ok=True)
        _make(fresh)
        copy = sqlite3.connect(fresh)
        try:
            self._db.backup(copy)
        finally:
            copy.close()
        for name in _BESIDE:  # of the file that goes: the new one would be read with it
            (self._directory / name).unlink(missing_ok=True)
        os.replace(fresh, path)
        old, self._db = self._db, _open(path)
        self._db.execute("SELECT count(*) FROM environments").fetchone()  # makes what is beside it
        old.close()

    def _identities(self) -> dict[str, tuple[int, int] | None]:
        return {name: _identity(self._prefix + name) for name in (_FILE, *_BESIDE, _LOCK)}

    def environments(self) -> list[Environment]:
        """See ``core.interfaces.Store``. Raises StoreError also where something in it cannot be."""
        with _translated(), _decoded("environments"):
            ports: dict[str, list[PublishedPort]] = {}
            for row in self._db.execute("SELECT * FROM ports ORDER BY rowid"):
                ports.setdefault(row["environment"], []).append(
                    PublishedPort(row["port"], row["protocol"], row["published"], row["listen"]))
            services: dict[str, dict[str, Service]] = {}
            for row in self._db.execute("SELECT * FROM services ORDER BY rowid"):
                services.setdefault(row["environment"], {})[row["name"]] = _service(row)
            return recorded.environments([
                Environment(
                    id=row["id"], name=row["name"], uid=row["uid"], user=row["user"],
                    slot=self._slot(row["slot"]), netns=row["netns"],
                    labels=msgspec.json.decode(row["labels"], type=dict[str, str]),
                    share=row["share"], created_at=row["created_at"], boot_id=row["boot_id"],
                    stock=row["stock"], request=row["request"], egress=row["egress"],
                    resources=msgspec.json.decode(row["resources"], type=wire.Resources),
                    ports=tuple(ports.get(row["id"], ())), state=row["state"], services=services.get(row["id"], {}))
                for row in self._db.execute("SELECT * FROM environments ORDER BY rowid")
            ])

    def add(self, environment: Environment) -> None:
        """See ``core.interfaces.Store``."""
        e = environment
        with _translated():
            self._db.execute(
                "INSERT INTO environments (id, name, uid, user, slot, netns, labels, share, state, created_at, boot_id,"
                " stock, resources, egress, request) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (e.id, e.name, e.uid, e.user, e.slot.index, e.netns, json.dumps(e.labels), e.share, e.state,
                 e.created_at, e.boot_id, e.stock, msgspec.json.encode(e.resources).decode(), e.egress,
                 e.request))
            self._db.executemany(
                "INSERT INTO ports (environment, port, protocol, published, listen) VALUES (?, ?, ?, ?, ?)",
                [(e.id, p.port, p.protocol, p.published, p.listen) for p in e.ports])
            self._db.executemany(
                "INSERT INTO services (environment, name, command, state, pid, launch_id, exit_code, restart,"
                " health_check, restarts, tries, health) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(e.id, s.name, _dumped(s.command), s.state, s.pid, s.launch_id, s.exit_code, s.restart,
                  None if s.check is None else msgspec.json.encode(s.check).decode(), s.restarts, s.tries, s.health)
                 for s in e.services.values()])

    def rename(self, environment: Environment) -> None:
        """See ``core.interfaces.Store``."""
        e = environment
        with _translated():
            # The youngest from now on. By number, as the clock may be set back.
            self._db.execute("UPDATE environments SET name = ?, netns = ?, labels = ?, stock = ?, request = ?,"
                             " created_at = ?, rowid = (SELECT max(rowid) + 1 FROM environments) WHERE id = ?",
                             (e.name, e.netns, json.dumps(e.labels), e.stock, e.request, e.created_at, e.id))

    def change(self, environment: Environment) -> None:
        """See ``core.interfaces.Store``."""
        e = environment
        with _translated():
            self._db.execute("UPDATE environments SET labels = ?, share = ?, egress = ? WHERE id = ?",
                             (json.dumps(e.labels), e.share, e.egress, e.id))

    def templates(self) -> list[Template]:
        """See ``core.interfaces.Store``."""
        with _translated(), _decoded("templates"):
            return recorded.templates([
                Template(row["id"], row["name"], row["uid"], row["user"], row["gid"],
                         msgspec.json.decode(row["other_gids"], type=tuple[int, ...]), row["warm"],
                         msgspec.json.decode(row["specification"], type=wire.Specification), row["created_at"])
                for row in self._db.execute("SELECT * FROM templates ORDER BY rowid")])

    def add_template(self, template: Template) -> None:
        """See ``core.interfaces.Store``."""
        t = template
        with _translated():
            self._db.execute(
                "INSERT INTO templates (id, name, uid, user, gid, other_gids, warm, specification, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (t.id, t.name, t.uid, t.user, t.gid, json.dumps(t.groups), t.warm,
                 msgspec.json.encode(t.specification).decode(), t.created_at))

    def delete_template(self, template_id: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("DELETE FROM templates WHERE id = ?", (template_id,))

    def tokens(self) -> list[Token]:
        """See ``core.interfaces.Store``."""
        with _translated(), _decoded("tokens"):
            rows = self._db.execute("SELECT * FROM tokens ORDER BY rowid")
            return recorded.tokens([Token(**dict(row)) for row in rows])

    def add_token(self, token: Token) -> None:
        """See ``core.interfaces.Store``."""
        t = token
        with _translated():
            self._db.execute(
                "INSERT INTO tokens (id, name, uid, user, hash, scope, parent, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (t.id, t.name, t.uid, t.user, t.hash, t.scope, t.parent, t.created_at, t.expires_at))

    def delete_token(self, token_id: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("DELETE FROM tokens WHERE id = ?", (token_id,))

    def policies(self) -> list[Policy]:
        """See ``core.interfaces.Store``."""
        with _translated(), _decoded("policies"):
            return recorded.policies([
                (row["uid"], row["user"], row["name"], json.loads(row["document"]), row["created_at"])
                for row in self._db.execute("SELECT * FROM policies ORDER BY uid, name")])

    def set_policy(self, policy: Policy) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute(
                "INSERT OR REPLACE INTO policies (uid, user, name, document, created_at) VALUES (?, ?, ?, ?, ?)",
                (policy.uid, policy.user, policy.name, json.dumps(policy.document), policy.created_at))

    def delete_policy(self, uid: int, name: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("DELETE FROM policies WHERE uid = ? AND name = ?", (uid, name))

    def quotas(self) -> list[Quota]:
        """See ``core.interfaces.Store``."""
        with _translated(), _decoded("quotas"):
            return recorded.quotas([Quota(row["uid"], row["user"], json.loads(row["limits"]))
                                    for row in self._db.execute("SELECT * FROM quotas ORDER BY uid")])

    def set_quota(self, quota: Quota) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("INSERT OR REPLACE INTO quotas (uid, user, limits) VALUES (?, ?, ?)",
                             (quota.uid, quota.user, json.dumps(quota.said)))

    def delete_quota(self, uid: int) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("DELETE FROM quotas WHERE uid = ?", (uid,))

    def ids(self) -> frozenset[str]:
        """See ``core.interfaces.Store``."""
        with _translated():
            return frozenset(row["id"] for row in self._db.execute("SELECT id FROM environments"))

    def set_command(self, environment_id: str, service: Service) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("UPDATE services SET command = ? WHERE environment = ? AND name = ?",
                             (_dumped(service.command), environment_id, service.name))

    def set_boot(self, environment_id: str, boot_id: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("UPDATE environments SET boot_id = ? WHERE id = ?", (boot_id, environment_id))

    def set_state(self, environment_id: str, state: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("UPDATE environments SET state = ? WHERE id = ?", (state, environment_id))

    def set_service(self, environment_id: str, service: Service) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute(
                "UPDATE services SET state = ?, pid = ?, launch_id = ?, exit_code = ?, restarts = ?, tries = ?,"
                " health = ? WHERE environment = ? AND name = ?",
                (service.state, service.pid, service.launch_id, service.exit_code, service.restarts, service.tries,
                 service.health, environment_id, service.name))

    def delete(self, environment_id: str) -> None:
        """See ``core.interfaces.Store``."""
        with _translated():
            self._db.execute("DELETE FROM environments WHERE id = ?", (environment_id,))

    def _roll_back(self) -> None:
        """Also after a commit that failed, which may leave its transaction open; a full disk may end it as well."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _slot(self, index: int) -> Any:
        try:
            return self._plan.slot(index)
        except IndexError as error:
            raise StoreError(
                f"the state file has an environment in slot {index}, outside the configured supernet",
                hint="Restore [network] supernet and bridge_ports, or remove environments first.") from error

    def _require_whole(self) -> None:
        """Look at every page: SQLite finds damage where it meets it, which is too late. A few milliseconds per MiB."""
        for found in self._db.execute("PRAGMA integrity_check(1)"):
            if found[0] != "ok":
                raise recorded.refuse("SQLite", found[0])
        for table, rowid, parent, _ in self._db.execute("PRAGMA foreign_key_check"):
            raise recorded.refuse(table, f"row {rowid} is of none of the {parent}")

    def _migrate(self) -> None:
        with self.transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            _require_known(version)
            if version < SCHEMA_VERSION:
                for statement in ";".join(_MIGRATIONS[version:]).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _require_known(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(f"the state file is of a newer netnsd (schema {version}, this one knows {SCHEMA_VERSION})",
                         hint="Start the newer netnsd. Nothing was changed.")


def _version_of(file: Path) -> int:
    """The schema's version of a state file, 0 where there is none. Changes nothing: SQLite, even where it only looks,
    changes the log (-wal) and its index (-shm), and takes the log away when it closes the file.

    Where things are: https://www.sqlite.org/fileformat2.html, 1.3 and 4.1. Checksums of the log are not looked at:
    without a loss of power what has the log's salts was written whole, and counts when a commit follows.
    """
    version = b""
    try:
        with open(file, "rb") as database:
            header = database.read(_HEADER_BYTES)
        version = header[60:64] if header.startswith(b"SQLite format 3\0") else b""
        with open(f"{file}-wal", "rb") as log:
            start = log.read(32)
            page_bytes, salts, seen = int.from_bytes(start[8:12]), start[16:24], version
            while len(frame := log.read(24)) == 24 and frame[8:16] == salts:
                page = log.read(_HEADER_BYTES)
                if int.from_bytes(frame[:4]) == 1:
                    seen = page[60:64]
                if int.from_bytes(frame[4:8]):  # the size of the database after this commit
                    version = seen
                log.seek(page_bytes - len(page), os.SEEK_CUR)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}", hint="Name another --state-dir.") from error
    return int.from_bytes(version)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: of a message that names what is damaged
        hint = "Is the disk of the state directory full, or not writable?"
        if not isinstance(error, sqlite3.OperationalError):  # not a database, malformed, or text that is none
            hint = recorded.HINT
        raise StoreError(f"the state file: {error}", hint=hint) from error


@contextmanager
def _decoded(table: str) -> Iterator[None]:
    """For what is read: JSON that is none, a column that is not there, a value of another type."""
    try:
        yield
    except (msgspec.MsgspecError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise recorded.refuse(table, error) from error


def _make(path: Path) -> None:
    """Have the file there, for root alone: others can open what SQLite makes until its mode is changed."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"the state file: {error.strerror}: {path}",
                         hint="Is the disk of the state directory full, or not writable?") from error


def _open(path: Path) -> sqlite3.Connection:
    _make(path)
    database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        os.chmod(path, 0o600)
        database.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            database.execute(f"PRAGMA {pragma}")
    except BaseException:
        database.close()
        raise
    return database


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _lock(directory: Path) -> int:
    """Take the directory for this process: the lock goes with the process, however it ends."""
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror}", hint="Name another --state-dir.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise AlreadyRunning(f"another netnsd uses {directory}",
                             hint="Stop it, or name another --state-dir and --runtime-dir.") from error
    return fd


def _dumped(command: Command) -> str:
    return json.dumps({
        "argv": command.argv, "env": command.env, "cwd": command.cwd, "uid": command.uid, "gid": command.gid,
        "groups": command.groups, "umask": command.umask, "limits": command.limits, "setuid": command.setuid})


def _service(row: sqlite3.Row) -> Service:
    check = row["health_check"]
    return Service(
        row["name"], msgspec.json.decode(row["command"], type=Command), row["state"], row["pid"], row["launch_id"],
        row["exit_code"], row["restart"],
        None if check is None else msgspec.json.decode(check, type=wire.HealthCheck),
        row["restarts"], row["tries"], row["health"])
