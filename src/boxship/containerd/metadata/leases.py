"""Leases: what keeps content and snapshots from collection while nothing refers to them yet.

Runs in: the daemon, on its event loop.
Spec: containerd API, services leases.v1; docs/garbage-collection.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import Database, dump, now
from boxship.containerd.metadata.records import Collect, label_field
from boxship.containerd.namespaces import check_labels
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound


def _lease_field(lease: Any, path: list[str]) -> str | None:
    match path[0]:
        case "id":
            return str(lease.id) or None
        case "labels" if len(path) > 1:
            return label_field(lease.labels, path)
    return None


class Leases:
    """containerd.services.leases.v1.Leases."""

    def __init__(self, database: Database, collect: Collect, snapshotters: Callable[[], Iterable[str]]) -> None:
        self._database = database
        self._collect = collect
        self._snapshotters = snapshotters

    async def Create(self, request: Any, call: Call) -> Any:
        """Without an id one is made up. Raises AlreadyExists, InvalidArgument."""
        namespace = call.required_namespace()
        lease = pb.leases.Lease(id=request.id or f"{now() % 10**9}-{os.urandom(3).hex()}", labels=request.labels)
        check_labels(dict(lease.labels))
        lease.created_at.FromNanoseconds(now())
        with self._database.writing() as rows:
            self._database.ensure(namespace)
            done = rows.execute("INSERT OR IGNORE INTO records VALUES ('lease',?,?,?,?)",
                                (namespace, lease.id, dump(lease.labels), lease.SerializeToString()))
            if done.rowcount == 0:
                raise AlreadyExists(f'lease "{lease.id}": already exists')
        return pb.leases.CreateResponse(lease=lease)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """With `sync` it returns after what the lease alone held is gone. Raises NotFound."""
        namespace = call.required_namespace()
        with self._database.writing() as rows:
            done = rows.execute("DELETE FROM records WHERE kind='lease' AND namespace=? AND id=?", (namespace, request.id))
            if done.rowcount == 0:
                raise NotFound(f'lease "{request.id}": not found')
            rows.execute("DELETE FROM resources WHERE namespace=? AND lease=?", (namespace, request.id))
            self._database.deletions += 1
        done_collecting = self._collect(request.sync)
        if request.sync:
            await done_collecting
        return Empty()

    async def List(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        with self._database.reading() as rows:
            found = rows.execute("SELECT record FROM records WHERE kind='lease' AND namespace=? ORDER BY id",
                                 (call.required_namespace(),)).fetchall()
        leases = [pb.leases.Lease.FromString(row[0]) for row in found]
        return pb.leases.ListResponse(leases=[
            lease for lease in leases
            if accept(lambda path, each=lease: _lease_field(each, path))  # type: ignore[misc]
        ])

    async def AddResource(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, InvalidArgument for a type that is none."""
        namespace = call.required_namespace()
        self._check(request.resource.type)
        if not request.id:
            raise InvalidArgument("lease id must be set: invalid argument")
        self._database.hold(namespace, request.id, request.resource.type, request.resource.id)
        return Empty()

    async def DeleteResource(self, request: Any, call: Call) -> Empty:
        """What the lease does not hold is no error. Raises NotFound for the lease."""
        namespace = call.required_namespace()
        self._check(request.resource.type)
        with self._database.writing() as rows:
            self._known(rows, namespace, request.id)
            rows.execute("DELETE FROM resources WHERE namespace=? AND lease=? AND type=? AND id=?",
                         (namespace, request.id, request.resource.type, request.resource.id))
            self._database.deletions += 1
        return Empty()

    async def ListResources(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        namespace = call.required_namespace()
        with self._database.reading() as rows:
            self._known(rows, namespace, request.id)
            found = rows.execute("SELECT type, id FROM resources WHERE namespace=? AND lease=? ORDER BY type, id",
                                 (namespace, request.id)).fetchall()
        return pb.leases.ListResourcesResponse(resources=[pb.leases.Resource(type=row[0], id=row[1]) for row in found])

    def _known(self, rows: Any, namespace: str, lease: str) -> None:
        if not rows.execute("SELECT 1 FROM records WHERE kind='lease' AND namespace=? AND id=?", (namespace, lease)).fetchone():
            raise NotFound(f'lease "{lease}": not found')

    def _check(self, kind: str) -> None:
        if kind in ("content", "ingests", "images"):
            return
        first, slash, snapshotter = kind.partition("/")
        if first != "snapshots" or not slash or "/" in snapshotter:
            raise InvalidArgument(f'invalid resource type "{kind}": invalid argument')
        if snapshotter not in self._snapshotters():
            raise FailedPrecondition(f"snapshotter {snapshotter} is not there: failed precondition")
