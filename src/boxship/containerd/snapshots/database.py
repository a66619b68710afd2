"""What a snapshot driver knows of its snapshots: one small SQLite database in its root.

Runs in: the daemon, any thread; one connection, one lock.
Spec: containerd 2.x core/snapshots/storage (which error when).

    metadata.db
      snapshot   id (never used twice), key, parent (id), kind, created, updated (ns), inodes, size, form
      label      snapshot (id), key, value

`form` is the driver's own: what a snapshot's content is made of. A transaction is kept open while the driver changes
the disk; when that fails it is rolled back, so that the two agree.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

from boxship.containerd.snapshots.driver import ACTIVE, COMMITTED, Info, Usage
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshot (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, parent INTEGER REFERENCES snapshot (id), kind INTEGER NOT NULL,
  created INTEGER NOT NULL, updated INTEGER NOT NULL, inodes INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL DEFAULT 0,
  form TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS snapshot_parent ON snapshot (parent);
CREATE TABLE IF NOT EXISTS label (
  snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE, key TEXT NOT NULL, value TEXT NOT NULL,
  PRIMARY KEY (snapshot, key)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


class Row:
    """One snapshot as the driver sees it: `id` names what is on the disk."""

    __slots__ = ("form", "id", "key", "kind", "parent")

    def __init__(self, id: int, key: str, parent: int | None, kind: int, form: str) -> None:  # noqa: A002
        self.id = id
        self.key = key
        self.parent = parent
        self.kind = kind
        self.form = form


class Database:
    """Use it as `with database:` around everything that belongs together: a transaction, and a lock among threads."""

    def __init__(self, root: str) -> None:
        os.makedirs(root, 0o700, exist_ok=True)
        self._lock = threading.RLock()
        self._depth = 0
        self._closed = False
        self._db = sqlite3.connect(os.path.join(root, "metadata.db"), check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        # Survives a killed process; after a power cut the newest snapshots may be missing, and are cleaned up.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA busy_timeout = 10000")
        self._db.executescript(_SCHEMA)

    def __enter__(self) -> Database:
        self._lock.acquire()
        if self._depth == 0:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except BaseException:
                self._lock.release()
                raise
        self._depth += 1
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            self._lock.release()

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._db.close()

    def get(self, key: str) -> Row:
        """Raises NotFound."""
        found = self._db.execute("SELECT id, key, parent, kind, form FROM snapshot WHERE key = ?", (key,)).fetchone()
        if found is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return Row(*found)

    def by_id(self, number: int) -> Row:
        """Raises NotFound."""
        found = self._db.execute("SELECT id, key, parent, kind, form FROM snapshot WHERE id = ?", (number,)).fetchone()
        if found is None:
            raise NotFound(f"snapshot {number} does not exist: not found")
        return Row(*found)

    def chain(self, row: Row) -> list[Row]:
        """Its parents, the nearest first."""
        found = self._db.execute(
            "WITH RECURSIVE up (id, key, parent, kind, form, depth) AS ("
            " SELECT id, key, parent, kind, form, 1 FROM snapshot WHERE id = ?"
            " UNION ALL SELECT s.id, s.key, s.parent, s.kind, s.form, depth + 1 FROM snapshot s JOIN up ON s.id = up.parent)"
            " SELECT id, key, parent, kind, form FROM up ORDER BY depth", (row.parent,)).fetchall()
        return [Row(*each) for each in found]

    def info(self, key: str) -> Info:
        """Raises NotFound."""
        row = self.get(key)
        return self._info(row.id)

    def _info(self, number: int) -> Info:
        key, parent, kind, created, updated = self._db.execute(
            "SELECT s.key, coalesce(p.key, ''), s.kind, s.created, s.updated FROM snapshot s"
            " LEFT JOIN snapshot p ON p.id = s.parent WHERE s.id = ?", (number,)).fetchone()
        labels = dict(self._db.execute("SELECT key, value FROM label WHERE snapshot = ? ORDER BY key", (number,)))
        return Info(key, parent, kind, labels, created, updated)

    def walk(self) -> Iterator[Info]:
        """Everything, in the order of making; what is removed meanwhile is left out."""
        with self._lock:
            numbers = [number for number, in self._db.execute("SELECT id FROM snapshot ORDER BY id")]
        for number in numbers:
            with self._lock:
                if self._db.execute("SELECT 1 FROM snapshot WHERE id = ?", (number,)).fetchone() is None:
                    continue
                info = self._info(number)
            yield info

    def ids(self) -> set[int]:
        """Of every snapshot."""
        return {number for number, in self._db.execute("SELECT id FROM snapshot")}

    def forms(self) -> list[tuple[int, str]]:
        """(id, form) of every snapshot."""
        return list(self._db.execute("SELECT id, form FROM snapshot ORDER BY id"))

    def create(self, key: str, parent: str, kind: int, labels: Mapping[str, str] | None) -> Row:
        """A new active snapshot or view. Raises AlreadyExists, NotFound, InvalidArgument."""
        if not key:
            raise InvalidArgument("snapshot: the key is empty: invalid argument")
        above: int | None = None
        if parent:
            row = self.get(parent)
            if row.kind != COMMITTED:
                raise InvalidArgument(f'parent "{parent}" is not committed snapshot: invalid argument')
            above = row.id
        now = time.time_ns()
        try:
            cursor = self._db.execute(
                "INSERT INTO snapshot (key, parent, kind, created, updated) VALUES (?, ?, ?, ?, ?)", (key, above, kind, now, now))
        except sqlite3.IntegrityError:
            raise AlreadyExists(f'snapshot "{key}": already exists') from None
        number = cursor.lastrowid
        assert number is not None
        self._set_labels(number, labels or {})
        return Row(number, key, above, kind, "")

    def commit(self, key: str, name: str, usage: Usage, labels: Mapping[str, str] | None, form: str) -> Row:
        """Active `key` becomes committed `name`, with those labels and no others. See Driver.commit."""
        row = self.get(key)
        if row.kind != ACTIVE:
            raise FailedPrecondition(f"snapshot {key} is not active: failed precondition")
        if not name:
            raise InvalidArgument("snapshot: the name is empty: invalid argument")
        now = time.time_ns()
        try:
            self._db.execute(
                "UPDATE snapshot SET key = ?, kind = ?, created = ?, updated = ?, inodes = ?, size = ?, form = ? WHERE id = ?",
                (name, COMMITTED, now, now, usage.inodes, usage.size, form, row.id))
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"committed snapshot {name}: already exists") from None
        self._set_labels(row.id, labels or {})
        return Row(row.id, name, row.parent, COMMITTED, form)

    def set_form(self, number: int, form: str) -> None:
        """What the snapshot's content is made of."""
        self._db.execute("UPDATE snapshot SET form = ? WHERE id = ?", (form, number))

    def stored_usage(self, number: int) -> Usage:
        """What it took when it was committed."""
        return Usage(*self._db.execute("SELECT inodes, size FROM snapshot WHERE id = ?", (number,)).fetchone())

    def remove(self, key: str) -> Row:
        """Raises NotFound, FailedPrecondition while it has children."""
        row = self.get(key)
        if self._db.execute("SELECT 1 FROM snapshot WHERE parent = ? LIMIT 1", (row.id,)).fetchone() is not None:
            raise FailedPrecondition("cannot remove snapshot with child: failed precondition")
        self._db.execute("DELETE FROM snapshot WHERE id = ?", (row.id,))
        return row

    def update(self, info: Info, fieldpaths: Iterable[str]) -> Info:
        """See Driver.update."""
        row = self.get(info.name)
        paths = list(fieldpaths)
        labels = dict(self._db.execute("SELECT key, value FROM label WHERE snapshot = ?", (row.id,)))
        if not paths or "labels" in paths:
            labels = dict(info.labels)
        for path in paths:
            if path.startswith("labels."):
                key = path[7:]
                value = info.labels.get(key, "")
                labels.pop(key, None)
                if value:
                    labels[key] = value
            elif path != "labels":
                raise InvalidArgument(f'cannot update "{path}" field on snapshot "{info.name}": invalid argument')
        self._set_labels(row.id, labels)
        self._db.execute("UPDATE snapshot SET updated = ? WHERE id = ?", (time.time_ns(), row.id))
        return self._info(row.id)

    def _set_labels(self, number: int, labels: Mapping[str, str]) -> None:
        self._db.execute("DELETE FROM label WHERE snapshot = ?", (number,))
        self._db.executemany("INSERT INTO label VALUES (?, ?, ?)", [(number, key, value) for key, value in labels.items()])
