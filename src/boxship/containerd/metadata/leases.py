"""Leases: what keeps content and snapshots from collection while nothing refers to them yet.

Runs in: the daemon, on its event loop.
Spec: containerd API, services leases.v1; docs/garbage-collection.md.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import Database, Labels, dump, load, now
from boxship.containerd.metadata.records import Collect, label_field
from boxship.containerd.namespaces import check_labels
from boxship.kit.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from boxship.oci import digest as digests

SIMPLE = ("content", "ingests", "images")
"""Types of resources that are one word; of snapshots it is `snapshots/SNAPSHOTTER`."""


def _field(name: str, labels: Labels, path: list[str]) -> str | None:
    match path[0]:
        case "id":
            return name or None
        case "labels" if len(path) > 1:
            return label_field(labels, path)
    return None


class Leases:
    """containerd.services.leases.v1.Leases."""

    def __init__(self, database: Database, collect: Collect) -> None:
        self._database = database
        self._collect = collect

    async def Create(self, request: Any, call: Call) -> Any:
        """Without an id one is made up. Raises AlreadyExists, InvalidArgument."""
        namespace = call.required_namespace()
        labels = dict(request.labels)
        check_labels(labels)
        created = now()
        name = request.id or f"{created % 10**9}-{os.urandom(3).hex()}"
        with self._database.writing() as rows:
            self._database.ensure(namespace)
            done = rows.execute("INSERT OR IGNORE INTO leases VALUES (?,?,?,?)", (namespace, name, created, dump(labels)))
            if done.rowcount == 0:
                raise AlreadyExists(f'lease "{name}": already exists')
        return pb.leases.CreateResponse(lease=_message(name, created, labels))

    async def Delete(self, request: Any, call: Call) -> Empty:
        """With `sync` it returns after what the lease alone held is gone. Raises NotFound."""
        namespace = call.required_namespace()
        with self._database.writing() as rows:
            done = rows.execute("DELETE FROM leases WHERE namespace=? AND id=?", (namespace, request.id))
            if done.rowcount == 0:
                raise NotFound(f'lease "{request.id}": not found')
            self._database.deletions += 1
        if request.sync:
            await self._collect()
        return Empty()

    async def List(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        with self._database.reading() as rows:
            found = rows.execute("SELECT id, created, labels FROM leases WHERE namespace=? ORDER BY id",
                                 (call.required_namespace(),)).fetchall()
        known = [(name, created, load(text)) for name, created, text in found]
        return pb.leases.ListResponse(leases=[
            _message(name, created, labels) for name, created, labels in known
            if accept(lambda path, name=name, labels=labels: _field(name, labels, path))  # type: ignore[misc]
        ])

    async def AddResource(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, InvalidArgument, Unsupported for a type that is none."""
        namespace = call.required_namespace()
        _check(request.resource)
        if not request.id:
            raise InvalidArgument("lease id must be provided: invalid argument")
        self._database.hold(namespace, request.id, request.resource.type, request.resource.id)
        return Empty()

    async def DeleteResource(self, request: Any, call: Call) -> Empty:
        """What the lease does not hold is no error. Raises as AddResource."""
        namespace = call.required_namespace()
        _check(request.resource)
        with self._database.writing() as rows:
            _known(rows, namespace, request.id)
            self._database.release(namespace, request.id, request.resource.type, request.resource.id)
            self._database.deletions += 1
        return Empty()

    async def ListResources(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        namespace = call.required_namespace()
        with self._database.reading() as rows:
            _known(rows, namespace, request.id)
            found = rows.execute("SELECT type, id FROM resources WHERE namespace=? AND lease=? ORDER BY type, id",
                                 (namespace, request.id)).fetchall()
        return pb.leases.ListResourcesResponse(resources=[pb.leases.Resource(type=row[0], id=row[1]) for row in found])


def _message(name: str, created: int, labels: Labels) -> Any:
    message = pb.leases.Lease(id=name, labels=labels)
    message.created_at.FromNanoseconds(created)
    return message


def _known(rows: sqlite3.Connection, namespace: str, lease: str) -> None:
    if not rows.execute("SELECT 1 FROM leases WHERE namespace=? AND id=?", (namespace, lease)).fetchone():
        raise NotFound(f'lease "{lease}": not found')


def _check(resource: Any) -> None:
    first, slash, rest = resource.type.partition("/")
    if first not in (*SIMPLE, "snapshots"):
        raise Unsupported(f"resource type {resource.type} not supported yet: not implemented")
    if first == "snapshots":
        if not rest or "/" in rest:
            raise InvalidArgument(f"invalid snapshot resource type {resource.type}: invalid argument")
    elif slash:
        raise InvalidArgument(f"invalid resource type {resource.type}: invalid argument")
    if first == "content":
        try:
            digests.check(resource.id)
        except InvalidArgument as error:
            raise InvalidArgument(f"invalid content resource id {resource.id}: {error}: invalid argument") from None
