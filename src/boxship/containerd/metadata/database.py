"""The database: its schema, its transactions, and the namespaces that everything else is in.

Runs in: the daemon; the event loop's thread and worker threads, one at a time by `Database.lock`.
Spec: sqlite.org/wal.html. In WAL mode with synchronous=NORMAL a killed process loses nothing, a power cut at most the last
transactions; the database is whole in both cases.

    records      containers, images, sandboxes, leases: one protobuf message each
    blobs        content that a namespace sees; the content itself is in files (`boxship.images.content`)
    ingests      content under way; `key` is the ref of the file store
    snapshots    of every snapshotter; `driver_key` is the driver's name for it
    resources    what a lease holds
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from boxship.kit.errors import AlreadyExists, FailedPrecondition, Internal, NotFound

VERSION = 1
_SCHEMA = """
CREATE TABLE namespaces (name TEXT PRIMARY KEY, labels TEXT NOT NULL DEFAULT '{}') WITHOUT ROWID;
CREATE TABLE records (
    kind TEXT, namespace TEXT, id TEXT, labels TEXT NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (kind, namespace, id)) WITHOUT ROWID;
CREATE TABLE blobs (
    namespace TEXT, digest TEXT, size INTEGER NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (namespace, digest)) WITHOUT ROWID;
CREATE INDEX blobs_by_digest ON blobs (digest);
CREATE TABLE ingests (
    namespace TEXT, ref TEXT, key TEXT NOT NULL UNIQUE, expected TEXT NOT NULL, expires INTEGER NOT NULL,
    PRIMARY KEY (namespace, ref)) WITHOUT ROWID;
CREATE TABLE snapshots (
    snapshotter TEXT, namespace TEXT, key TEXT, driver_key TEXT NOT NULL, parent TEXT NOT NULL,
    created INTEGER NOT NULL, updated INTEGER NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (snapshotter, namespace, key)) WITHOUT ROWID;
CREATE TABLE resources (
    namespace TEXT, lease TEXT, type TEXT, id TEXT,
    PRIMARY KEY (namespace, lease, type, id)) WITHOUT ROWID;
"""

Labels = dict[str, str]


def dump(labels: Mapping[str, str]) -> str:
    """Labels as they are kept."""
    return json.dumps(dict(labels), separators=(",", ":"), ensure_ascii=False)


def load(text: str) -> Labels:
    """Labels from what is kept."""
    found: Labels = json.loads(text)
    return found


class Database:
    """One file. Everything that reads or writes it does so within `reading` or `writing`."""

    def __init__(self, path: str) -> None:
        """Open it, or make it. Raises Internal for one of a newer version, sqlite3.DatabaseError for what is no database."""
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        self.path = path
        self.lock = threading.RLock()
        self.mutations = 0
        self.deletions = 0
        """Since the last collection: roots and what they held that may have become garbage."""
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        os.chmod(path, 0o600)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "temp_store=MEMORY", "cache_size=-4000"):
            self._connection.execute(f"PRAGMA {pragma}")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise Internal(f"{path} was written by a newer boxship (schema {version}, this one knows {VERSION})")
        if version == 0:
            with self.writing() as rows:
                for statement in _SCHEMA.split(";"):
                    rows.execute(statement)
                rows.execute(f"PRAGMA user_version={VERSION}")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For queries."""
        with self.lock:
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or, when the block raises, nothing. May be nested; the outermost one decides."""
        with self.lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self.mutations += 1

    def check(self) -> list[str]:
        """What is wrong with the file, by PRAGMA integrity_check; empty when nothing is."""
        with self.reading() as rows:
            found = [str(row[0]) for row in rows.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def close(self) -> None:
        """A second time does nothing."""
        with self.lock:
            self._connection.close()

    # --- namespaces: NamespaceStore of boxship.containerd.namespaces

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
            if rows.execute("SELECT 1 FROM namespaces WHERE name=?", (namespace,)).fetchone():
                raise AlreadyExists(f'namespace "{namespace}": already exists')
            rows.execute("INSERT INTO namespaces VALUES (?,?)", (namespace, dump(labels)))

    def set_labels(self, namespace: str, labels: Labels, replace: bool) -> None:
        """Set labels, an empty value removes one; with `replace` all others go. Makes the namespace when it is not there."""
        with self.writing() as rows:
            known = {} if replace else self.labels(namespace)
            known.update(labels)
            kept = dump({key: value for key, value in known.items() if value})
            rows.execute("INSERT INTO namespaces VALUES (?,?) ON CONFLICT (name) DO UPDATE SET labels=excluded.labels",
                         (namespace, kept))

    def delete(self, namespace: str) -> None:
        """Raises NotFound, and FailedPrecondition unless it is empty."""
        with self.writing() as rows:
            if not rows.execute("SELECT 1 FROM namespaces WHERE name=?", (namespace,)).fetchone():
                raise NotFound(f'namespace "{namespace}": not found')
            left = [
                words for words, query in (
                    ("images", "SELECT 1 FROM records WHERE namespace=? AND kind='image' LIMIT 1"),
                    ("containers", "SELECT 1 FROM records WHERE namespace=? AND kind='container' LIMIT 1"),
                    ("sandboxes", "SELECT 1 FROM records WHERE namespace=? AND kind='sandbox' LIMIT 1"),
                    ("blobs", "SELECT 1 FROM blobs WHERE namespace=? LIMIT 1"),
                ) if rows.execute(query, (namespace,)).fetchone()
            ]
            left += [f"snapshots on {row[0]} snapshotter" for row in rows.execute(
                "SELECT DISTINCT snapshotter FROM snapshots WHERE namespace=? ORDER BY 1", (namespace,))]
            if left:
                raise FailedPrecondition(f'namespace "{namespace}" must be empty, but it still has {", ".join(left)}')
            for table in ("records", "ingests", "resources"):
                rows.execute(f"DELETE FROM {table} WHERE namespace=?", (namespace,))
            rows.execute("DELETE FROM namespaces WHERE name=?", (namespace,))

    # --- leases, which everything that is made under one refers to

    def hold(self, namespace: str, lease: str, kind: str, name: str) -> None:
        """Let a lease hold a resource; nothing without a lease. Raises NotFound for a lease that is not there."""
        if not lease:
            return
        with self.writing() as rows:
            query = "SELECT 1 FROM records WHERE kind='lease' AND namespace=? AND id=?"
            if not rows.execute(query, (namespace, lease)).fetchone():
                raise NotFound(f'lease "{lease}": not found')
            rows.execute("INSERT OR IGNORE INTO resources VALUES (?,?,?,?)", (namespace, lease, kind, name))


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()
