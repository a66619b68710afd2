"""Snapshots by namespace, over drivers that know nothing of namespaces.

Runs in: the daemon; drivers in worker threads, because they wait for the file system.
Spec: containerd API, services snapshots.v1; core/metadata/snapshot.go (names, labels that drivers are told).

A row is written after the driver has the snapshot and removed before the driver loses it: what a driver has without a row is
garbage (unless it is `Database.pending`), and what a row has without the driver was lost with a disk. A commit is written down
before the driver does it (`commits`), so that a killed one is brought to its end and no container's work is lost.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import Database, Labels, dump, load, now
from boxship.containerd.metadata.publisher import Publish
from boxship.containerd.metadata.records import changed_labels, label_field
from boxship.containerd.namespaces import check_labels
from boxship.containerd.snapshots.driver import ACTIVE, COMMITTED, KINDS, VIEW, Driver, Mount
from boxship.containerd.snapshots.driver import Info as DriverInfo
from boxship.kit import failpoint
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unsupported

DRIVER_LABELS = "containerd.io/snapshot/"
"""Labels that begin so are for the driver too."""
TARGET = "containerd.io/snapshot.ref"
"""Label of an active snapshot: the name that it is to be committed as. Goes to the driver too."""
Row = tuple[str, str, int, int, int, str]
"""driver_key, parent, kind, created, updated, labels."""
T = TypeVar("T")


class Snapshots:
    """containerd.services.snapshots.v1.Snapshots."""

    def __init__(self, database: Database, drivers: Mapping[str, Driver], publish: Publish) -> None:
        self._database = database
        self._drivers = drivers
        self._publish = publish
        # Drivers wait for the disk, and so that a pull which keeps the loop's own threads busy does not hold up a start.
        self._threads = ThreadPoolExecutor(4, "snapshots")

    def driver(self, name: str) -> Driver:
        """Raises InvalidArgument for a name that no driver has."""
        if not name:
            raise InvalidArgument("snapshotter argument missing: invalid argument")
        found = self._drivers.get(name)
        if found is None:
            raise InvalidArgument(f"snapshotter not loaded: {name}: invalid argument")
        return found

    async def Prepare(self, request: Any, call: Call) -> Any:
        """Raises AlreadyExists (the lease holds it then), NotFound (parent, lease), InvalidArgument."""
        mounts = await self._make(request, call, self.driver(request.snapshotter).prepare, ACTIVE)
        self._publish(call.namespace, "/snapshot/prepare", pb.snapshot_events.SnapshotPrepare(
            key=request.key, parent=request.parent, snapshotter=request.snapshotter))
        return pb.snapshots.PrepareSnapshotResponse(mounts=mounts)

    async def View(self, request: Any, call: Call) -> Any:
        """As Prepare."""
        mounts = await self._make(request, call, self.driver(request.snapshotter).view, VIEW)
        return pb.snapshots.ViewSnapshotResponse(mounts=mounts)

    async def _make(self, request: Any, call: Call, method: Callable[..., list[Mount]], kind: int) -> list[Any]:
        namespace, snapshotter = call.required_namespace(), request.snapshotter
        if not request.key:
            raise InvalidArgument("snapshot key must not be empty: invalid argument")
        labels = dict(request.labels)
        check_labels(labels)
        parent = self._parent_key(request, call, labels.get(TARGET, ""))
        driver_key = f"{namespace}/{os.urandom(8).hex()}/{request.key}"

        def make() -> list[Mount]:
            with self._database.pending.making((f"snapshots/{snapshotter}", driver_key)):
                mounts = method(driver_key, parent, _for_driver(labels))
                failpoint.hit("metadata-snapshot-made")
                try:
                    self._insert(request, call, driver_key, kind, labels)
                except BaseException:
                    self.driver(snapshotter).remove(driver_key)
                    raise
            return mounts

        return [_mount(mount) for mount in await self._run(make)]

    def _parent_key(self, request: Any, call: Call, target: str) -> str:
        """The driver's name for the parent. Raises AlreadyExists, NotFound."""
        namespace, snapshotter = call.namespace, request.snapshotter
        taken = ""
        with self._database.writing() as rows:
            self._database.ensure(namespace)
            for name in (target, request.key):
                if name and not taken and self._row(rows, snapshotter, namespace, name) is not None:
                    taken = name
                    self._database.hold(namespace, call.lease, f"snapshots/{snapshotter}", name)
            row = self._row(rows, snapshotter, namespace, request.parent) if request.parent and not taken else None
        if taken:
            raise AlreadyExists(f'{"target " if taken == target else ""}snapshot "{taken}": already exists')
        if request.parent and row is None:
            raise NotFound(f"parent snapshot {request.parent} does not exist: not found")
        return row[0] if row is not None else ""

    def _insert(self, request: Any, call: Call, driver_key: str, kind: int, labels: Labels) -> None:
        namespace, snapshotter = call.namespace, request.snapshotter
        with self._database.writing() as rows:
            if request.parent and self._row(rows, snapshotter, namespace, request.parent) is None:
                raise NotFound(f"parent snapshot {request.parent} does not exist: not found")
            at = now()
            done = rows.execute(
                "INSERT OR IGNORE INTO snapshots VALUES (?,?,?,?,?,?,?,?,?)",
                (snapshotter, namespace, request.key, driver_key, request.parent, kind, at, at, dump(labels)))
            if done.rowcount == 0:
                raise AlreadyExists(f'snapshot "{request.key}": already exists')
            self._database.hold(namespace, call.lease, f"snapshots/{snapshotter}", request.key)

    async def Mounts(self, request: Any, call: Call) -> Any:
        """Raises NotFound, FailedPrecondition for a committed one."""
        driver, key = self._known(request.snapshotter, call, request.key)
        mounts = await self._run(driver.mounts, key)
        return pb.snapshots.MountsResponse(mounts=[_mount(mount) for mount in mounts])

    async def Commit(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, AlreadyExists (the lease holds it then), FailedPrecondition, InvalidArgument, Unsupported."""
        namespace, snapshotter = call.required_namespace(), request.snapshotter
        driver, key = self._known(snapshotter, call, request.key)
        if not request.name:
            raise InvalidArgument("snapshot name must not be empty: invalid argument")
        labels = dict(request.labels)
        check_labels(labels)
        driver_key = f"{namespace}/{os.urandom(8).hex()}/{request.name}"
        with self._database.writing() as rows:
            taken = self._row(rows, snapshotter, namespace, request.name) is not None
            if taken:
                self._database.hold(namespace, call.lease, f"snapshots/{snapshotter}", request.name)
            else:
                row = self._row(rows, snapshotter, namespace, request.key)
                if request.parent and row is not None and row[1] != request.parent:
                    raise Unsupported(f"snapshot {request.key} cannot be given the parent {request.parent}: not implemented")
                # What the driver does next is not undone by a rollback here; `finish_commits` brings it to its end.
                rows.execute("INSERT INTO commits VALUES (?,?,?,?,?,?,?)",
                             (snapshotter, namespace, request.key, request.name, driver_key, dump(labels), call.lease))
        if taken:
            raise AlreadyExists(f'snapshot "{request.name}": already exists')

        def commit() -> None:
            kind = f"snapshots/{snapshotter}"
            with self._database.pending.making((kind, driver_key), (kind, key)):
                try:
                    driver.commit(driver_key, key, _for_driver(labels))
                    failpoint.hit("metadata-snapshot-committed")
                except BaseException:
                    with self._database.writing() as rows:
                        rows.execute("DELETE FROM commits WHERE snapshotter=? AND driver_key=?", (snapshotter, driver_key))
                    raise
                done = finish_commit(self._database, snapshotter, driver_key)
            if not done:
                raise AlreadyExists(f'snapshot "{request.name}": already exists')

        await self._run(commit)
        self._publish(namespace, "/snapshot/commit", pb.snapshot_events.SnapshotCommit(
            key=request.key, name=request.name, snapshotter=snapshotter))
        return Empty()

    async def Remove(self, request: Any, call: Call) -> Empty:
        """It is gone when this returns; the disk is cleaned soon after. Raises NotFound, FailedPrecondition for a parent."""
        namespace, snapshotter = call.required_namespace(), request.snapshotter
        self.driver(snapshotter)
        with self._database.writing() as rows:
            if self._row(rows, snapshotter, namespace, request.key) is None:
                raise NotFound(f"snapshot {request.key} does not exist: not found")
            if rows.execute("SELECT 1 FROM snapshots WHERE snapshotter=? AND namespace=? AND parent=? LIMIT 1",
                            (snapshotter, namespace, request.key)).fetchone():
                raise FailedPrecondition("cannot remove snapshot with child: failed precondition")
            rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?",
                         (snapshotter, namespace, request.key))
            self._database.release(namespace, call.lease, f"snapshots/{snapshotter}", request.key)
            self._database.soil(f"snapshots/{snapshotter}")
        self._publish(namespace, "/snapshot/remove", pb.snapshot_events.SnapshotRemove(
            key=request.key, snapshotter=snapshotter))
        return Empty()

    async def Stat(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        self.driver(request.snapshotter)
        return pb.snapshots.StatSnapshotResponse(info=self._info(request.snapshotter, call.required_namespace(), request.key))

    async def Update(self, request: Any, call: Call) -> Any:
        """The labels, or those that the mask names. Raises NotFound, InvalidArgument."""
        given, snapshotter = request.info, request.snapshotter
        driver, key = self._known(snapshotter, call, given.name)
        with self._database.writing() as rows:
            row = self._row(rows, snapshotter, call.namespace, given.name)
            if row is None:
                raise NotFound(f"snapshot {given.name} does not exist: not found")
            before = load(row[5])
            labels = changed_labels(before, given.labels, request.update_mask.paths, f'snapshot "{given.name}"')
            rows.execute("UPDATE snapshots SET labels=?, updated=? WHERE snapshotter=? AND namespace=? AND key=?",
                         (dump(labels), now(), snapshotter, call.namespace, given.name))
        if _for_driver(before) != _for_driver(labels):
            await self._run(driver.update, DriverInfo(key, labels=_for_driver(labels)), ())
        return pb.snapshots.UpdateSnapshotResponse(info=self._info(snapshotter, call.namespace, given.name))

    async def List(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Those that pass one of the filters, a hundred in a message. Raises InvalidArgument."""
        namespace = call.required_namespace()
        self.driver(request.snapshotter)
        accept = parse_all(request.filters)
        with self._database.reading() as rows:
            found = rows.execute(
                "SELECT key, parent, kind, created, updated, labels FROM snapshots WHERE snapshotter=? AND namespace=?"
                " ORDER BY key", (request.snapshotter, namespace)).fetchall()
        batch: list[Any] = []
        for key, parent, kind, created, updated, text in found:
            info = _message(key, parent, kind, created, updated, load(text))
            if not accept(lambda path, info=info: _field(info, path)):  # type: ignore[misc]
                continue
            batch.append(info)
            if len(batch) == 100:
                yield pb.snapshots.ListSnapshotsResponse(info=batch)
                batch = []
        if batch:
            yield pb.snapshots.ListSnapshotsResponse(info=batch)

    async def Usage(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        driver, key = self._known(request.snapshotter, call, request.key)
        usage = await self._run(driver.usage, key)
        return pb.snapshots.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def Cleanup(self, request: Any, call: Call) -> Empty:
        """Take away what belongs to no snapshot."""
        await self._run(self.driver(request.snapshotter).cleanup)
        return Empty()

    # For callers in this process.

    def driver_key(self, snapshotter: str, call: Call, key: str) -> str:
        """The driver's name for a snapshot. Raises NotFound."""
        return self._known(snapshotter, call, key)[1]

    def close(self) -> None:
        """Wait for what drivers are doing."""
        self._threads.shutdown()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _known(self, snapshotter: str, call: Call, key: str) -> tuple[Driver, str]:
        namespace, driver = call.required_namespace(), self.driver(snapshotter)
        with self._database.reading() as rows:
            row = self._row(rows, snapshotter, namespace, key)
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return driver, row[0]

    def _row(self, rows: sqlite3.Connection, snapshotter: str, namespace: str, key: str) -> Row | None:
        found: Row | None = rows.execute(
            "SELECT driver_key, parent, kind, created, updated, labels FROM snapshots WHERE snapshotter=? AND namespace=?"
            " AND key=?", (snapshotter, namespace, key)).fetchone()
        return found

    def _info(self, snapshotter: str, namespace: str, key: str) -> Any:
        with self._database.reading() as rows:
            row = self._row(rows, snapshotter, namespace, key)
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return _message(key, row[1], row[2], row[3], row[4], load(row[5]))


def finish_commit(database: Database, snapshotter: str, driver_key: str) -> bool:
    """Let the rows say what the driver has committed; False when the name was taken meanwhile (the snapshot is garbage then)."""
    kind = f"snapshots/{snapshotter}"
    with database.writing() as rows:
        [(namespace, key, name, labels, lease)] = rows.execute(
            "DELETE FROM commits WHERE snapshotter=? AND driver_key=? RETURNING namespace, key, name, labels, lease",
            (snapshotter, driver_key)).fetchall()
        rows.execute("DELETE FROM resources WHERE namespace=? AND type=? AND id=?", (namespace, kind, key))
        parents = rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=? RETURNING parent",
                               (snapshotter, namespace, key)).fetchall()
        at, done = now(), False
        if parents:  # otherwise it was removed meanwhile
            done = rows.execute(
                "INSERT OR IGNORE INTO snapshots VALUES (?,?,?,?,?,?,?,?,?)",
                (snapshotter, namespace, name, driver_key, parents[0][0], COMMITTED, at, at, labels)).rowcount == 1
        if not done:
            database.soil(kind)
        if rows.execute("SELECT 1 FROM leases WHERE namespace=? AND id=?", (namespace, lease)).fetchone():
            database.hold(namespace, lease, kind, name)
    return done


def finish_commits(database: Database, drivers: Mapping[str, Driver]) -> None:
    """At the start: bring to their end the commits that a driver has done and the rows do not say."""
    with database.writing() as rows:
        for snapshotter, driver_key in rows.execute("SELECT snapshotter, driver_key FROM commits").fetchall():
            if snapshotter not in drivers:
                continue
            try:
                drivers[snapshotter].stat(driver_key)
            except NotFound:
                rows.execute("DELETE FROM commits WHERE snapshotter=? AND driver_key=?", (snapshotter, driver_key))
            else:
                finish_commit(database, snapshotter, driver_key)


def _for_driver(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key == TARGET or key.startswith(DRIVER_LABELS)}


def _mount(mount: Mount) -> Any:
    return pb.types.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)


def _message(key: str, parent: str, kind: int, created: int, updated: int, labels: Mapping[str, str]) -> Any:
    message = pb.snapshots.Info(name=key, parent=parent, labels=labels)
    message.kind = kind  # type: ignore[assignment]
    message.created_at.FromNanoseconds(created)
    message.updated_at.FromNanoseconds(updated)
    return message


def _field(info: Any, path: list[str]) -> str | None:
    match path[0]:
        case "name":
            return str(info.name)
        case "parent":
            return str(info.parent) or None
        case "kind":
            return KINDS.get(info.kind, "").lower() or None
        case "labels" if len(path) > 1:
            return label_field(info.labels, path)
    return None
