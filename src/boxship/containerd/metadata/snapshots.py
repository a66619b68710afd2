"""Snapshots by namespace, over drivers that know nothing of namespaces.

Runs in: the daemon; drivers in worker threads, because they wait for the file system.
Spec: containerd API, services snapshots.v1; core/metadata/snapshot.go (names, labels that drivers are told).

A row is written after the driver has the snapshot and removed before the driver loses it: what a driver has without a row is
garbage, and what a row has without the driver was lost with a disk; `Collector.reconcile` removes both.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.events import Exchange
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import Database, dump, load, now
from boxship.containerd.metadata.records import Collect, label_field
from boxship.containerd.namespaces import check_labels
from boxship.containerd.snapshots.driver import KINDS, Driver, Mount
from boxship.containerd.snapshots.driver import Info as DriverInfo
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

DRIVER_LABELS = "containerd.io/snapshot/"
"""Labels that begin so are for the driver too."""


class Snapshots:
    """containerd.services.snapshots.v1.Snapshots."""

    def __init__(self, database: Database, drivers: Mapping[str, Driver], exchange: Exchange, collect: Collect) -> None:
        self._database = database
        self._drivers = drivers
        self._exchange = exchange
        self._collect = collect
        self.pending: set[tuple[str, str]] = set()
        """(snapshotter, driver's key) of what is being made and has no row yet; not garbage."""

    def driver(self, name: str) -> Driver:
        """Raises InvalidArgument without a name, NotFound."""
        if not name:
            raise InvalidArgument("snapshotter argument missing: invalid argument")
        found = self._drivers.get(name)
        if found is None:
            raise NotFound(f"snapshotter not loaded: {name}: not found")
        return found

    async def Prepare(self, request: Any, call: Call) -> Any:
        """Raises AlreadyExists, NotFound (parent, lease), InvalidArgument."""
        mounts = await self._make(request, call, lambda driver: driver.prepare)
        self._exchange.publish(call.namespace, "/snapshot/prepare", pb.snapshot_events.SnapshotPrepare(
            key=request.key, parent=request.parent, snapshotter=request.snapshotter))
        return pb.snapshots.PrepareSnapshotResponse(mounts=mounts)

    async def View(self, request: Any, call: Call) -> Any:
        """As Prepare."""
        return pb.snapshots.ViewSnapshotResponse(mounts=await self._make(request, call, lambda driver: driver.view))

    async def _make(self, request: Any, call: Call, method: Callable[[Driver], Callable[..., list[Mount]]]) -> list[Any]:
        namespace, driver = call.required_namespace(), self.driver(request.snapshotter)
        if not request.key:
            raise InvalidArgument("snapshot key must not be empty: invalid argument")
        labels = dict(request.labels)
        check_labels(labels)
        with self._database.writing() as rows:
            self._database.ensure(namespace)
            if self._row(rows, request.snapshotter, namespace, request.key) is not None:
                raise AlreadyExists(f'snapshot "{request.key}": already exists')
            parent = ""
            if request.parent:
                row = self._row(rows, request.snapshotter, namespace, request.parent)
                if row is None:
                    raise NotFound(f'parent snapshot {request.parent} does not exist: not found')
                parent = row[0]
            # Held before it is there: a collection must not take what is being unpacked.
            self._database.hold(namespace, call.lease, f"snapshots/{request.snapshotter}", request.key)
        key = f"{namespace}/{os.urandom(8).hex()}/{request.key}"
        pending = (request.snapshotter, key)
        self.pending.add(pending)
        try:
            mounts = await asyncio.to_thread(method(driver), key, parent, _for_driver(labels))
            try:
                with self._database.writing() as rows:
                    done = rows.execute(
                        "INSERT OR IGNORE INTO snapshots VALUES (?,?,?,?,?,?,?,?)",
                        (request.snapshotter, namespace, request.key, key, request.parent, now(), now(), dump(labels)))
                    if done.rowcount == 0:
                        raise AlreadyExists(f'snapshot "{request.key}": already exists')
            except BaseException:
                await asyncio.to_thread(driver.remove, key)
                raise
        finally:
            self.pending.discard(pending)
        return [_mount(mount) for mount in mounts]

    async def Mounts(self, request: Any, call: Call) -> Any:
        """Raises NotFound, FailedPrecondition for a committed one."""
        driver, key = self._known(request.snapshotter, call, request.key)
        mounts = await asyncio.to_thread(driver.mounts, key)
        return pb.snapshots.MountsResponse(mounts=[_mount(mount) for mount in mounts])

    async def Commit(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, AlreadyExists, FailedPrecondition, InvalidArgument."""
        namespace = call.required_namespace()
        driver, key = self._known(request.snapshotter, call, request.key)
        if not request.name:
            raise InvalidArgument("snapshot name must not be empty: invalid argument")
        labels = dict(request.labels)
        check_labels(labels)
        with self._database.writing() as rows:
            if self._row(rows, request.snapshotter, namespace, request.name) is not None:
                raise AlreadyExists(f'snapshot "{request.name}": already exists')
            self._database.hold(namespace, call.lease, f"snapshots/{request.snapshotter}", request.name)
        name = f"{namespace}/{os.urandom(8).hex()}/{request.name}"
        pending = {(request.snapshotter, name), (request.snapshotter, key)}
        self.pending |= pending
        try:
            await asyncio.to_thread(driver.commit, name, key, _for_driver(labels))
            lost = False
            with self._database.writing() as rows:
                if self._row(rows, request.snapshotter, namespace, request.name) is None:
                    rows.execute(
                        "UPDATE snapshots SET key=?, driver_key=?, labels=?, created=?, updated=?"
                        " WHERE snapshotter=? AND namespace=? AND key=?",
                        (request.name, name, dump(labels), now(), now(), request.snapshotter, namespace, request.key))
                else:
                    lost = True
                    rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?",
                                 (request.snapshotter, namespace, request.key))
                rows.execute("DELETE FROM resources WHERE namespace=? AND type=? AND id=?",
                             (namespace, f"snapshots/{request.snapshotter}", request.key))
            if lost:
                await asyncio.to_thread(driver.remove, name)
                raise AlreadyExists(f'snapshot "{request.name}": already exists')
        finally:
            self.pending -= pending
        self._exchange.publish(namespace, "/snapshot/commit", pb.snapshot_events.SnapshotCommit(
            key=request.key, name=request.name, snapshotter=request.snapshotter))
        return Empty()

    async def Remove(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, FailedPrecondition while others have it as parent."""
        namespace, driver = call.required_namespace(), self.driver(request.snapshotter)
        with self._database.writing() as rows:
            row = self._row(rows, request.snapshotter, namespace, request.key)
            if row is None:
                raise NotFound(f"snapshot {request.key} does not exist: not found")
            if rows.execute("SELECT 1 FROM snapshots WHERE snapshotter=? AND namespace=? AND parent=? LIMIT 1",
                            (request.snapshotter, namespace, request.key)).fetchone():
                raise FailedPrecondition("cannot remove snapshot with child: failed precondition")
            rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?",
                         (request.snapshotter, namespace, request.key))
            rows.execute("DELETE FROM resources WHERE namespace=? AND type=? AND id=?",
                         (namespace, f"snapshots/{request.snapshotter}", request.key))
            self._database.deletions += 1
        self._exchange.publish(namespace, "/snapshot/remove", pb.snapshot_events.SnapshotRemove(
            key=request.key, snapshotter=request.snapshotter))
        await asyncio.to_thread(driver.remove, row[0])
        self._collect(False)
        return Empty()

    async def Stat(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        driver, key = self._known(request.snapshotter, call, request.key)
        kind = driver.stat(key).kind
        return pb.snapshots.StatSnapshotResponse(info=self._info(request.snapshotter, call.namespace, request.key, kind))

    async def Update(self, request: Any, call: Call) -> Any:
        """The labels, or those that the mask names. Raises NotFound, InvalidArgument."""
        given = request.info
        driver, key = self._known(request.snapshotter, call, given.name)
        with self._database.writing() as rows:
            row = self._row(rows, request.snapshotter, call.namespace, given.name)
            if row is None:
                raise NotFound(f"snapshot {given.name} does not exist: not found")
            labels = load(row[4])
            for path in list(request.update_mask.paths) or ["labels"]:
                if path == "labels":
                    labels = dict(given.labels)
                elif path.startswith("labels."):
                    name = path.removeprefix("labels.")
                    labels[name] = given.labels.get(name, "")
                else:
                    raise InvalidArgument(f'cannot update "{path}" field on snapshot "{given.name}": invalid argument')
            labels = {name: value for name, value in labels.items() if value}
            check_labels(labels)
            rows.execute("UPDATE snapshots SET labels=?, updated=? WHERE snapshotter=? AND namespace=? AND key=?",
                         (dump(labels), now(), request.snapshotter, call.namespace, given.name))
            self._database.deletions += 1
        if any(name.startswith(DRIVER_LABELS) for name in labels):
            driver.update(DriverInfo(key, labels=_for_driver(labels)), ())
        kind = driver.stat(key).kind
        return pb.snapshots.UpdateSnapshotResponse(info=self._info(request.snapshotter, call.namespace, given.name, kind))

    async def List(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Those that pass one of the filters, a hundred in a message. Raises NotFound for the snapshotter, InvalidArgument."""
        namespace, driver = call.required_namespace(), self.driver(request.snapshotter)
        accept = parse_all(request.filters)
        with self._database.reading() as rows:
            found = rows.execute(
                "SELECT key, driver_key, parent, created, updated, labels FROM snapshots WHERE snapshotter=? AND namespace=?"
                " ORDER BY key", (request.snapshotter, namespace)).fetchall()
        kinds = {info.name: info.kind for info in driver.walk()} if found else {}
        batch: list[Any] = []
        for key, driver_key, parent, created, updated, text in found:
            if driver_key not in kinds:
                continue  # removed meanwhile
            info = _message(key, parent, kinds[driver_key], created, updated, load(text))
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
        usage = await asyncio.to_thread(driver.usage, key)
        return pb.snapshots.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def Cleanup(self, request: Any, call: Call) -> Empty:
        """Take away what belongs to no snapshot."""
        await asyncio.to_thread(self.driver(request.snapshotter).cleanup)
        return Empty()

    # --- for callers in this process

    def driver_key(self, snapshotter: str, call: Call, key: str) -> str:
        """The driver's name for a snapshot. Raises NotFound."""
        return self._known(snapshotter, call, key)[1]

    def _known(self, snapshotter: str, call: Call, key: str) -> tuple[Driver, str]:
        namespace, driver = call.required_namespace(), self.driver(snapshotter)
        with self._database.reading() as rows:
            row = self._row(rows, snapshotter, namespace, key)
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return driver, row[0]

    def _row(self, rows: Any, snapshotter: str, namespace: str, key: str) -> tuple[str, str, int, int, str] | None:
        found: tuple[str, str, int, int, str] | None = rows.execute(
            "SELECT driver_key, parent, created, updated, labels FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?",
            (snapshotter, namespace, key)).fetchone()
        return found

    def _info(self, snapshotter: str, namespace: str, key: str, kind: int) -> Any:
        with self._database.reading() as rows:
            row = self._row(rows, snapshotter, namespace, key)
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return _message(key, row[1], kind, row[2], row[3], load(row[4]))


def _for_driver(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key.startswith(DRIVER_LABELS)}


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
