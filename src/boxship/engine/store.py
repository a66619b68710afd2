"""What the engine itself remembers: containers and volumes. Images, snapshots and tasks are containerd's to remember.

Runs in: the daemon, on its event loop (a write takes well below a millisecond).
Spec: SQLite in WAL mode: after SIGKILL each record is either the old or the new one.

    ROOT/engine/engine.db
        containers (id, name, record)      name is unique; record is the JSON of boxship.engine.container
        volumes    (name, record)
        meta       (key, value)            schema version, id of the engine
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from typing import Any

from boxship.kit.errors import AlreadyExists, Internal

SCHEMA = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS containers (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS volumes (name TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
"""


class Store:
    """The engine's database. Closed by `close`."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._db = sqlite3.connect(f"{directory}/engine.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_TABLES)
        found = self._meta("schema")
        if found not in ("", str(SCHEMA)):
            raise Internal(f"{directory}/engine.db has schema {found}, this version knows {SCHEMA}")
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('id', ?)", (str(SCHEMA), str(uuid.uuid4())))
        self.id = self._meta("id")

    def _meta(self, key: str) -> str:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    def containers(self) -> list[dict[str, Any]]:
        """All containers' records."""
        return [json.loads(row[0]) for row in self._db.execute("SELECT record FROM containers")]

    def put_container(self, container_id: str, name: str, record: dict[str, Any]) -> None:
        """Write a container's record. Raises AlreadyExists when another one has the name."""
        try:
            self._db.execute(
                "INSERT INTO containers VALUES (?, ?, ?) ON CONFLICT (id)"
                " DO UPDATE SET name = excluded.name, record = excluded.record",
                (container_id, name, json.dumps(record)))
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"the name {name} is in use") from None

    def delete_container(self, container_id: str) -> None:
        """Forget a container."""
        self._db.execute("DELETE FROM containers WHERE id = ?", (container_id,))

    def volumes(self) -> list[dict[str, Any]]:
        """All volumes' records."""
        return [json.loads(row[0]) for row in self._db.execute("SELECT record FROM volumes")]

    def put_volume(self, name: str, record: dict[str, Any]) -> None:
        """Write a volume's record."""
        self._db.execute("INSERT OR REPLACE INTO volumes VALUES (?, ?)", (name, json.dumps(record)))

    def delete_volume(self, name: str) -> None:
        """Forget a volume."""
        self._db.execute("DELETE FROM volumes WHERE name = ?", (name,))

    def close(self) -> None:
        """Close the database."""
        self._db.close()
