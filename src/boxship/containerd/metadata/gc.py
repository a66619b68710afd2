"""Garbage collection: what nothing keeps goes away.

Runs in: a worker thread of the daemon, woken from its event loop.
Spec: containerd docs/garbage-collection.md.

    roots     leases and what they hold; images and their targets; containers and their snapshots; sandboxes;
              content and snapshots with the label containerd.io/gc.root
    edges     containerd.io/gc.ref.content[.NAME], containerd.io/gc.ref.snapshot.SNAPSHOTTER[/NAME], containerd.io/gc.ref.image…
              on whatever has labels; a snapshot's parent; an ingest's expected content
    time      containerd.io/gc.expire on leases and images: roots until then; ingests without a lease, a day

Rows go in one transaction; then files and snapshots that no row names any more, each in a step of its own. A collection that is
killed leaves such files and snapshots, and the next one, or `reconcile` at the start, takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from boxship.api.containerd import pb
from boxship.containerd.metadata.database import Database, load, now
from boxship.containerd.snapshots.driver import Driver
from boxship.images.content import ContentStore
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition, NotFound
from boxship.oci import digest as digests

log = logging.getLogger("boxship.gc")

ROOT = "containerd.io/gc.root"
EXPIRE = "containerd.io/gc.expire"
FLAT = "containerd.io/gc.flat"
REF_CONTENT = "containerd.io/gc.ref.content"
REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."
REF_IMAGE = "containerd.io/gc.ref.image"

Node = tuple[str, str, str]
"""(namespace, type as leases name it, id)."""


def references(namespace: str, labels: Mapping[str, str]) -> list[Node]:
    """What labels keep."""
    found: list[Node] = []
    for key, value in labels.items():
        if not key.startswith("containerd.io/gc.ref."):
            continue
        if key == REF_CONTENT or key.startswith((f"{REF_CONTENT}.", f"{REF_CONTENT}/")):
            found.append((namespace, "content", value))
        elif key.startswith(REF_SNAPSHOT):
            snapshotter = key.removeprefix(REF_SNAPSHOT).partition("/")[0]
            found.append((namespace, f"snapshots/{snapshotter}", value))
        elif key == REF_IMAGE or key.startswith((f"{REF_IMAGE}.", f"{REF_IMAGE}/")):
            found.append((namespace, "images", value))
    return found


def expired(labels: Mapping[str, str], at: int) -> bool:
    """Whether the time of `containerd.io/gc.expire` (RFC 3339) is past; what cannot be read as a time never is."""
    text = labels.get(EXPIRE)
    if not text:
        return False
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return False
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return when.timestamp() * 1e9 < at


class Collector:
    """Collects when asked, one collection at a time."""

    def __init__(
        self, database: Database, files: ContentStore, drivers: Mapping[str, Driver], pending: Iterable[tuple[str, str]] = (),
        delay_s: float = 0.1,
    ) -> None:
        """`pending`: (snapshotter, driver's key) of snapshots that are being made, a set that others change."""
        self._database = database
        self._files = files
        self._drivers = drivers
        self.pending = pending
        self._delay_s = delay_s
        self._wanted = asyncio.Event()
        self._done: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    # --- on the event loop

    def start(self) -> None:
        """Begin to serve `request`; the event loop must run."""
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Let a collection that is under way end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def request(self, sync: bool = False) -> Any:
        """Ask for a collection; with `sync` returns an awaitable that ends after one that began later than this call."""
        if sync:
            return self._collect()
        self._wanted.set()
        return None

    async def _serve(self) -> None:
        while True:
            await self._wanted.wait()
            # What is deleted together is collected together.
            await asyncio.sleep(self._delay_s)
            self._wanted.clear()
            try:
                await self._collect()
            except (BoxshipError, OSError, sqlite3.Error) as error:
                log.error("garbage collection: %s", error)

    async def _collect(self) -> None:
        while self._done is not None:
            await asyncio.shield(self._done)
        self._done = asyncio.get_running_loop().create_future()
        try:
            await asyncio.shield(asyncio.to_thread(self.collect))
        finally:
            done, self._done = self._done, None
            done.set_result(None)

    # --- in any thread

    def collect(self) -> dict[str, int]:
        """One collection; says how many of what went."""
        at = now()
        with self._database.writing() as rows:
            kept = self._mark(rows, at)
            counts = self._sweep(rows, kept, at)
            self._database.deletions = self._database.mutations = 0
        failpoint.hit("gc-rows")
        counts["files"] = self._remove_files()
        for name in self._drivers:
            self._remove_snapshots(name)
        if any(counts.values()):
            log.debug("garbage collection: %s", counts)
        return counts

    def _mark(self, rows: sqlite3.Connection, at: int) -> set[Node]:
        labels: dict[Node, dict[str, str]] = {}
        parents: dict[Node, Node] = {}
        targets: dict[Node, Node] = {}
        todo: list[Node] = []
        flat: set[Node] = set()
        for namespace, digest, text in rows.execute("SELECT namespace, digest, labels FROM blobs"):
            node = (namespace, "content", digest)
            labels[node] = load(text)
            if ROOT in labels[node]:
                todo.append(node)
        for snapshotter, namespace, key, parent, text in rows.execute(
            "SELECT snapshotter, namespace, key, parent, labels FROM snapshots"
        ):
            node = (namespace, f"snapshots/{snapshotter}", key)
            labels[node] = load(text)
            if parent:
                parents[node] = (namespace, f"snapshots/{snapshotter}", parent)
            if ROOT in labels[node]:
                todo.append(node)
        for namespace, ref, expected, expires in rows.execute("SELECT namespace, ref, expected, expires FROM ingests"):
            node = (namespace, "ingests", ref)
            if expected:
                targets[node] = (namespace, "content", expected)
            if expires and expires > at:
                todo.append(node)
        leases: dict[tuple[str, str], bool] = {}
        for kind, namespace, name, text, record in rows.execute("SELECT kind, namespace, id, labels, record FROM records"):
            own = load(text)
            if kind == "image":
                node = (namespace, "images", name)
                labels[node] = own
                targets[node] = (namespace, "content", pb.images.Image.FromString(record).target.digest)
                if not expired(own, at):
                    todo.append(node)
            elif kind == "container":
                container = pb.containers.Container.FromString(record)
                if container.snapshotter and container.snapshot_key:
                    todo.append((namespace, f"snapshots/{container.snapshotter}", container.snapshot_key))
                todo += references(namespace, own)
            elif kind == "sandbox":
                todo += references(namespace, own)
            elif not expired(own, at):
                leases[namespace, name] = FLAT in own
                todo += references(namespace, own)
        for namespace, lease, kind, name in rows.execute("SELECT namespace, lease, type, id FROM resources"):
            if (namespace, lease) in leases:
                node = (namespace, kind, name)
                (flat.add if leases[namespace, lease] else todo.append)(node)
        kept: set[Node] = set()
        while todo:
            node = todo.pop()
            if node in kept:
                continue
            kept.add(node)
            todo += references(node[0], labels.get(node, {}))
            if node in parents:
                todo.append(parents[node])
            if node in targets:
                todo.append(targets[node])
        # A snapshot cannot do without its parents, whatever its lease says.
        for node in flat:
            above: Node | None = node
            while above is not None and above not in kept:
                kept.add(above)
                above = parents.get(above)
        return kept

    def _sweep(self, rows: sqlite3.Connection, kept: set[Node], at: int) -> dict[str, int]:
        content = [(namespace, digest) for namespace, digest in rows.execute("SELECT namespace, digest FROM blobs")
                   if (namespace, "content", digest) not in kept]
        snapshots = [(snapshotter, namespace, key) for snapshotter, namespace, key in rows.execute(
            "SELECT snapshotter, namespace, key FROM snapshots") if (namespace, f"snapshots/{snapshotter}", key) not in kept]
        ingests = [(namespace, ref) for namespace, ref in rows.execute("SELECT namespace, ref FROM ingests")
                   if (namespace, "ingests", ref) not in kept]
        images = [(namespace, name) for namespace, name, text in rows.execute(
            "SELECT namespace, id, labels FROM records WHERE kind='image'")
            if expired(load(text), at) and (namespace, "images", name) not in kept]
        leases = [(namespace, name) for namespace, name, text in rows.execute(
            "SELECT namespace, id, labels FROM records WHERE kind='lease'") if expired(load(text), at)]
        rows.executemany("DELETE FROM blobs WHERE namespace=? AND digest=?", content)
        rows.executemany("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?", snapshots)
        rows.executemany("DELETE FROM ingests WHERE namespace=? AND ref=?", ingests)
        rows.executemany("DELETE FROM records WHERE kind='image' AND namespace=? AND id=?", images)
        rows.executemany("DELETE FROM records WHERE kind='lease' AND namespace=? AND id=?", leases)
        rows.executemany("DELETE FROM resources WHERE namespace=? AND lease=?", leases)
        return {"content": len(content), "snapshots": len(snapshots), "ingests": len(ingests), "images": len(images),
                "leases": len(leases)}

    def _remove_files(self) -> int:
        """Blobs that no namespace has, ingests that none knows."""
        count = 0
        for info in list(self._files.walk()):
            # One at a time under the lock: a commit of the same content may come in between.
            with self._database.reading() as rows:
                if rows.execute("SELECT 1 FROM blobs WHERE digest=? LIMIT 1", (info.digest,)).fetchone() is None:
                    with contextlib.suppress(NotFound):
                        self._files.delete(info.digest)
                        count += 1
        for status in self._files.statuses():
            with self._database.reading() as rows:
                if rows.execute("SELECT 1 FROM ingests WHERE key=?", (status.ref,)).fetchone() is None:
                    with contextlib.suppress(NotFound):
                        self._files.abort(status.ref)
        return count

    def _remove_snapshots(self, name: str) -> None:
        """What a driver has and no row names; children before their parents."""
        driver = self._drivers[name]
        for info in reversed(list(driver.walk())):
            with self._database.reading() as rows:
                query = "SELECT 1 FROM snapshots WHERE snapshotter=? AND driver_key=?"
                wanted = rows.execute(query, (name, info.name)).fetchone()
            if wanted is not None or (name, info.name) in self.pending:
                continue
            try:
                driver.remove(info.name)
            except (NotFound, FailedPrecondition):
                continue  # gone already, or the parent of one that is being made
            except OSError as error:
                log.warning("snapshot %s of %s cannot be removed now: %s", info.name, name, error)
        driver.cleanup()

    def reconcile(self) -> None:
        """At the start, before anybody asks: rows whose content or snapshot is gone go too; then a collection."""
        with self._database.writing() as rows:
            for namespace, digest in rows.execute("SELECT namespace, digest FROM blobs").fetchall():
                try:
                    self._files.info(digest)
                except NotFound:
                    log.error("content %s of namespace %s is lost", digest, namespace)
                    rows.execute("DELETE FROM blobs WHERE namespace=? AND digest=?", (namespace, digest))
            known = {status.ref for status in self._files.statuses()}
            for namespace, ref, key in rows.execute("SELECT namespace, ref, key FROM ingests").fetchall():
                if key not in known:
                    rows.execute("DELETE FROM ingests WHERE namespace=? AND ref=?", (namespace, ref))
            for name, driver in self._drivers.items():
                there = {info.name for info in driver.walk()}
                for namespace, key, driver_key in rows.execute(
                    "SELECT namespace, key, driver_key FROM snapshots WHERE snapshotter=?", (name,)
                ).fetchall():
                    if driver_key not in there:
                        log.warning("snapshot %s of namespace %s is lost", key, namespace)
                        rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?",
                                     (name, namespace, key))
        self.collect()

    def check(self) -> list[str]:
        """What is not as it should be, in words; empty when all is well. Hashes every blob."""
        wrong = [f"database: {line}" for line in self._database.check()]
        with self._database.reading() as rows:
            blobs = rows.execute("SELECT namespace, digest, size FROM blobs").fetchall()
            snapshots = rows.execute("SELECT snapshotter, namespace, key, driver_key, parent FROM snapshots").fetchall()
        seen: dict[str, str] = {}
        for namespace, digest, size in blobs:
            if digest not in seen:
                seen[digest] = ""
                try:
                    fd = self._files.open(digest)
                except NotFound:
                    seen[digest] = "is lost"
                else:
                    try:
                        hasher = digests.hasher(digest)
                        while chunk := os.read(fd, 1 << 20):
                            hasher.update(chunk)
                        if hasher.hexdigest() != digests.split(digest)[1]:
                            seen[digest] = "is not that content any more"
                        elif os.fstat(fd).st_size != size:
                            seen[digest] = f"has {os.fstat(fd).st_size} bytes, {size} were recorded"
                    finally:
                        os.close(fd)
            if seen[digest]:
                wrong.append(f"namespace {namespace}: content {digest} {seen[digest]}")
        for snapshotter, namespace, key, driver_key, parent in snapshots:
            driver = self._drivers.get(snapshotter)
            if driver is None:
                continue
            try:
                driver.stat(driver_key)
            except NotFound:
                wrong.append(f"namespace {namespace}: snapshot {key} of {snapshotter} is lost")
            if parent and not any(row[0] == snapshotter and row[1] == namespace and row[2] == parent for row in snapshots):
                wrong.append(f"namespace {namespace}: snapshot {key} of {snapshotter} has lost its parent {parent}")
        return wrong
