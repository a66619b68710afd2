"""What is remembered about networks.

Runs in: the daemon, on its event loop (a write takes well below a millisecond).
Spec: SQLite in WAL mode: after SIGKILL each record is either the old or the new one. `addresses` has the pair of network and
address as its key, so that no address is given twice, whatever the code above believes.

    ROOT/network/network.db
        networks  (id, name, record)
        sandboxes (id, record)
        endpoints (id, sandbox, record)
        addresses (network, address, endpoint)
        meta      (key, value)                      schema version
"""

from __future__ import annotations

import json
import os
import sqlite3

from boxship.kit.errors import AlreadyExists, Internal
from boxship.network.model import Endpoint, Network, Sandbox

SCHEMA = "1"

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS networks (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sandboxes (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS endpoints (id TEXT PRIMARY KEY, sandbox TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS addresses (network TEXT NOT NULL, address TEXT NOT NULL, endpoint TEXT NOT NULL,
    PRIMARY KEY (network, address)) WITHOUT ROWID;
"""


class Store:
    """The database. Closed by `close`."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._db = sqlite3.connect(f"{directory}/network.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_TABLES)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (SCHEMA,))
        (found,) = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if found != SCHEMA:
            raise Internal(f"{directory}/network.db has schema {found}, this version knows {SCHEMA}")

    def networks(self) -> list[Network]:
        """All networks."""
        return [Network.of(json.loads(row[0])) for row in self._db.execute("SELECT record FROM networks")]

    def put_network(self, network: Network) -> None:
        """Write a network. Raises AlreadyExists when another one has the name."""
        try:
            self._db.execute(
                "INSERT INTO networks VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET name = excluded.name, record = excluded.record",
                (network.id, network.name, json.dumps(network.record())),
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"network with name {network.name} already exists") from None

    def delete_network(self, network_id: str) -> None:
        """Forget a network."""
        self._db.execute("DELETE FROM networks WHERE id = ?", (network_id,))

    def sandboxes(self) -> list[Sandbox]:
        """All sandboxes with their endpoints."""
        found = {row[0]: Sandbox(**json.loads(row[1])) for row in self._db.execute("SELECT id, record FROM sandboxes")}
        for sandbox_id, record in self._db.execute("SELECT sandbox, record FROM endpoints"):
            if sandbox_id in found:
                found[sandbox_id].endpoints.append(Endpoint.of(json.loads(record)))
        return list(found.values())

    def put_sandbox(self, sandbox: Sandbox) -> None:
        """Write a sandbox, its endpoints and their addresses, all or nothing. Raises AlreadyExists for an address in use."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("INSERT OR REPLACE INTO sandboxes VALUES (?, ?)", (sandbox.id, json.dumps(sandbox.record())))
            for endpoint in sandbox.endpoints:
                self._put_endpoint(sandbox, endpoint)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _put_endpoint(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO endpoints VALUES (?, ?, ?)", (endpoint.id, sandbox.id, json.dumps(endpoint.record()))
        )
        for address in filter(None, (endpoint.ipv4, endpoint.ipv6)):
            row = self._db.execute(
                "INSERT INTO addresses VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET endpoint = endpoint"
                " WHERE endpoint = excluded.endpoint RETURNING endpoint",
                (endpoint.network, address, endpoint.id),
            ).fetchone()
            if row is None:
                raise AlreadyExists(f"the address {address} is in use on this network")

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Forget an endpoint; its addresses are free."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM addresses WHERE endpoint = ?", (endpoint_id,))
        self._db.execute("DELETE FROM endpoints WHERE id = ?", (endpoint_id,))
        self._db.execute("COMMIT")

    def delete_sandbox(self, sandbox: Sandbox) -> None:
        """Forget a sandbox and its endpoints; their addresses are free."""
        self._db.execute("BEGIN IMMEDIATE")
        for endpoint in sandbox.endpoints:
            self._db.execute("DELETE FROM addresses WHERE endpoint = ?", (endpoint.id,))
            self._db.execute("DELETE FROM endpoints WHERE id = ?", (endpoint.id,))
        self._db.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox.id,))
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the database."""
        self._db.close()
