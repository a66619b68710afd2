"""The database: its schema, its transactions, the namespaces that everything else is in, and what leases hold.

Runs in: the daemon; the event loop's thread and worker threads, one at a time by `Database.lock`. Queries are short.
Spec: containerd core/metadata (what there is); sqlite.org/wal.html. In WAL mode with synchronous=NORMAL a killed process loses
nothing and a power cut at most the newest transactions; the database is whole in both cases.

    ROOT/metadata.db
      namespaces   names and labels
      records      containers, images, sandboxes: one protobuf message each
      leases       and in `resources` what each of them holds
      blobs        content that a namespace sees; the bytes are in files (boxship.images.content)
      ingests      content under way; `key` is the ref in the store of files, `expected` is set when the blob is there already
                   and only has to be claimed; `expires` (ns, 0: never) when no lease holds it
      snapshots    `driver_key` is the snapshot driver's name for it
      commits      commits of snapshots under way: what the driver has done and these tables do not know yet

Schema 1: the first.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from boxship.kit.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound, ResourceExhausted, Unavailable

log = logging.getLogger("boxship.metadata")

VERSION = 1
_SCHEMA = """
CREATE TABLE namespaces (name TEXT PRIMARY KEY, labels TEXT NOT NULL DEFAULT '{}') WITHOUT ROWID;
CREATE TABLE records (
    kind TEXT NOT NULL, namespace TEXT NOT NULL REFERENCES namespaces, id TEXT NOT NULL, record BLOB NOT NULL,
    UNIQUE (kind, namespace, id));
CREATE TABLE leases (
    namespace TEXT NOT NULL REFERENCES namespaces, id TEXT NOT NULL, created INTEGER NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (namespace, id)) WITHOUT ROWID;
CREATE TABLE resources (
    namespace TEXT NOT NULL, lease TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
    PRIMARY KEY (namespace, lease, type, id),
    FOREIGN KEY (namespace, lease) REFERENCES leases (namespace, id) ON DELETE CASCADE) WITHOUT ROWID;
CREATE TABLE blobs (
    namespace TEXT NOT NULL REFERENCES namespaces, digest TEXT NOT NULL, size INTEGER NOT NULL,
    created INTEGER NOT NULL, updated INTEGER NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (namespace, digest)) WITHOUT ROWID;
CREATE INDEX blobs_by_digest ON blobs (digest);
CREATE TABLE ingests (
    namespace TEXT NOT NULL REFERENCES namespaces, ref TEXT NOT NULL, key TEXT NOT NULL UNIQUE, expected TEXT NOT NULL,
    expires INTEGER NOT NULL, PRIMARY KEY (namespace, ref)) WITHOUT ROWID;
CREATE TABLE snapshots (
    snapshotter TEXT NOT NULL, namespace TEXT NOT NULL REFERENCES namespaces, key TEXT NOT NULL,
    driver_key TEXT NOT NULL, parent TEXT NOT NULL, kind INTEGER NOT NULL,
    created INTEGER NOT NULL, updated INTEGER NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (snapshotter, namespace, key), UNIQUE (snapshotter, driver_key)) WITHOUT ROWID;
CREATE INDEX snapshots_by_parent ON snapshots (snapshotter, namespace, parent);
CREATE TABLE commits (
    snapshotter TEXT NOT NULL, namespace TEXT NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, driver_key TEXT NOT NULL,
    labels TEXT NOT NULL, lease TEXT NOT NULL,
    PRIMARY KEY (snapshotter, driver_key)) WITHOUT ROWID;
"""
MIGRATIONS: dict[int, str] = {1: _SCHEMA}
"""Statements that lead to each version of the schema from the one before it."""

Labels = dict[str, str]
CONTENT = "content"
"""Names the files of content in `Database.dirty`; snapshots are named by their snapshotter, below `snapshots/`."""


def dump(labels: Mapping[str, str]) -> str:
    """Labels as they are kept; an empty value means that there is none."""
    return json.dumps({key: value for key, value in labels.items() if value}, separators=(",", ":"), ensure_ascii=False)


def load(text: str) -> Labels:
    """Labels from what is kept."""
    found: Labels = json.loads(text) if text != "{}" else {}
    return found


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()


class Pending:
    """Names of files and snapshots that are being made and have no row yet, so that they are not taken for garbage.

    Changed and asked under the database's lock: `(CONTENT, digest)` and `(snapshots/SNAPSHOTTER, driver's key)`.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._names: Counter[tuple[str, str]] = Counter()

    def __contains__(self, name: tuple[str, str]) -> bool:
        with self._lock:
            return name in self._names

    @contextmanager
    def making(self, *names: tuple[str, str]) -> Iterator[None]:
        """While the block runs; it writes the rows."""
        with self._lock:
            self._names.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._names.subtract(names)
                self._names = +self._names


class Database:
    """One file. Everything that reads or writes it does so within `reading` or `writing`."""

    def __init__(self, path: str) -> None:
        """Open it, or make it. Raises FailedPrecondition for one of a newer version, DataLoss for what is no database."""
        os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
        self.path = path
        self.lock = threading.RLock()
        self.pending = Pending(self.lock)
        self.generation = 0
        """Counts the transactions of this process that wrote."""
        self.mutations = 0
        self.deletions = 0
        """Since the last collection: transactions, and those of them that may have made garbage."""
        self.dirty: set[str] = set()
        """Whose files may have no row any more."""
        self.on_change: Callable[[], None] | None = None
        """Called after each transaction, by the thread that made it."""
        self._connection = self._connect()
        try:
            with failures(path):
                self._connection.execute("PRAGMA journal_mode=WAL")
                os.chmod(path, 0o600)
                self._migrate()
        except BaseException:
            self._connection.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        with failures(self.path):
            for pragma in ("synchronous=NORMAL", "temp_store=MEMORY", "cache_size=-8000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
        return connection

    def _migrate(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise FailedPrecondition(f"{self.path} is of schema {version}, and this version knows {VERSION}")
        for wanted in range(version + 1, VERSION + 1):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for statement in MIGRATIONS[wanted].split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version={wanted}")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For queries."""
        with self.lock, failures(self.path):
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing when the block raises. May be nested; the outermost one decides.

        Raises ResourceExhausted when the disk is full, DataLoss when the file is damaged.
        """
        connection = self._connection
        with self.lock, failures(self.path):
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.OperationalError):  # SQLite has rolled back by itself, as when the disk is full
                    connection.execute("ROLLBACK")
                raise
            self.generation += 1
            self.mutations += 1
        if self.on_change is not None:
            self.on_change()

    @contextmanager
    def snapshot(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """The database as it is now, to be read while others go on writing, and the `generation` that this is."""
        connection = self._connect()
        try:
            with self.lock, failures(self.path):
                connection.execute("BEGIN")
                connection.execute("SELECT 1 FROM namespaces").fetchone()
                generation = self.generation
            with failures(self.path):
                yield connection, generation
        finally:
            connection.close()

    def soil(self, what: str) -> None:
        """Within a transaction that removes rows: files of `what` may be garbage now."""
        self.deletions += 1
        self.dirty.add(what)

    def close(self) -> None:
        """A second time does nothing."""
        with self.lock:
            self._connection.close()

    # Namespaces: NamespaceStore of boxship.containerd.namespaces.

    def ensure(self, namespace: str) -> None:
        """A namespace is there as soon as something is in it."""
        with self.writing() as rows:
            rows.execute("INSERT OR IGNORE INTO namespaces (name) VALUES (?)", (namespace,))

    def names(self) -> list[str]:
        """All namespaces, sorted."""
        with self.reading() as rows:
            return [row[0] for row in rows.execute("SELECT name FROM namespaces ORDER BY name")]

    def labels(self, namespace: str) -> Labels:
        """Of a namespace; none of one that is not there."""
        with self.reading() as rows:
            row = rows.execute("SELECT labels FROM namespaces WHERE name=?", (namespace,)).fetchone()
        return load(row[0]) if row else {}

    def create(self, namespace: str, labels: Labels) -> None:
        """Raises AlreadyExists."""
        with self.writing() as rows:
            done = rows.execute("INSERT OR IGNORE INTO namespaces VALUES (?,?)", (namespace, dump(labels)))
            if done.rowcount == 0:
                raise AlreadyExists(f'namespace "{namespace}": already exists')

    def set_labels(self, namespace: str, labels: Labels, replace: bool) -> None:
        """Set labels, an empty value removes one; with `replace` all others go. Makes the namespace when it is not there."""
        with self.writing() as rows:
            known = {} if replace else self.labels(namespace)
            rows.execute("INSERT INTO namespaces VALUES (?,?) ON CONFLICT (name) DO UPDATE SET labels=excluded.labels",
                         (namespace, dump(known | labels)))

    def delete(self, namespace: str) -> None:
        """Raises NotFound, and FailedPrecondition unless it is empty."""
        with self.writing() as rows:
            if not rows.execute("SELECT 1 FROM namespaces WHERE name=?", (namespace,)).fetchone():
                raise NotFound(f'namespace "{namespace}": not found')
            left = [
                words for words, query in (
                    ("images", "SELECT 1 FROM records WHERE namespace=? AND kind='image' LIMIT 1"),
                    ("blobs", "SELECT 1 FROM blobs WHERE namespace=? LIMIT 1"),
                    ("containers", "SELECT 1 FROM records WHERE namespace=? AND kind='container' LIMIT 1"),
                    ("sandboxes", "SELECT 1 FROM records WHERE namespace=? AND kind='sandbox' LIMIT 1"),
                ) if rows.execute(query, (namespace,)).fetchone()
            ]
            left += [f"snapshots on {row[0]} snapshotter" for row in rows.execute(
                "SELECT DISTINCT snapshotter FROM snapshots WHERE namespace=? ORDER BY 1", (namespace,))]
            if left:
                raise FailedPrecondition(
                    f'namespace "{namespace}" must be empty, but it still has {", ".join(left)}: failed precondition')
            for table in ("resources", "leases", "ingests"):
                rows.execute(f"DELETE FROM {table} WHERE namespace=?", (namespace,))
            rows.execute("DELETE FROM namespaces WHERE name=?", (namespace,))
            self.soil(CONTENT)

    # Leases: everything that is made under one is held by it.

    def hold(self, namespace: str, lease: str, kind: str, name: str) -> None:
        """Let a lease hold a resource; nothing when `lease` is "". Raises NotFound for a lease that is not there."""
        if not lease:
            return
        with self.writing() as rows:
            if not rows.execute("SELECT 1 FROM leases WHERE namespace=? AND id=?", (namespace, lease)).fetchone():
                raise NotFound(f'lease "{lease}" does not exist: not found')
            rows.execute("INSERT OR IGNORE INTO resources VALUES (?,?,?,?)", (namespace, lease, kind, name))

    def release(self, namespace: str, lease: str, kind: str, name: str) -> None:
        """Let a lease hold it no more; what it does not hold is no error."""
        if lease:
            with self.writing() as rows:
                rows.execute("DELETE FROM resources WHERE namespace=? AND lease=? AND type=? AND id=?",
                             (namespace, lease, kind, name))


@contextmanager
def failures(path: str) -> Iterator[None]:
    """Turns what SQLite raises into our errors: ResourceExhausted, Unavailable, DataLoss."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise ResourceExhausted(f"writing {path}: no space left on device") from None
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise Unavailable(f"{path} is in use by another process") from None
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise DataLoss(f"{path} is damaged: {error}") from None
        raise
