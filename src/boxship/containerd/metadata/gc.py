"""Garbage collection: what nothing keeps goes away, and what was left by a killed process is found.

Runs in: a worker thread of the daemon, woken from its event loop.
Spec: containerd docs/garbage-collection.md, its scheduler's configuration (plugins/gc/scheduler.go).

The marking (boxship.containerd.metadata.graph) reads a snapshot of the database, so that nobody waits for it. Rows then go in one
transaction, if nothing was written meanwhile; otherwise the marking is done again. Then go the files and snapshots that no row
names, each in a step of its own. A collection that is killed leaves such files, which the next start takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any

from boxship.api.containerd import pb
from boxship.containerd.metadata import check
from boxship.containerd.metadata.database import CONTENT, Database, now
from boxship.containerd.metadata.graph import Garbage, Graph
from boxship.containerd.metadata.publisher import Publish
from boxship.containerd.metadata.snapshots import finish_commits
from boxship.containerd.snapshots.driver import Driver
from boxship.images.content import ContentStore
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound

log = logging.getLogger("boxship.gc")

ATTEMPTS = 3
"""Times that marking is tried beside others' work before it makes them wait."""
RETRY_S = 10.0
"""After a collection that failed, and for files that could not be removed."""


class Collector:
    """Finds garbage and removes it, in any thread; one collection at a time."""

    def __init__(self, database: Database, files: ContentStore, drivers: Mapping[str, Driver], publish: Publish) -> None:
        self._database = database
        self._files = files
        self._drivers = drivers
        self._publish = publish
        self.next_expiry = 0
        """When something that keeps things will cease to, as of the last collection; nanoseconds since 1970, 0: never."""

    def collect(self) -> Garbage:
        """One collection; returns the rows that went."""
        garbage = self._collect_rows()
        for namespace, kind, name in garbage.snapshots:
            self._publish(namespace, "/snapshot/remove", pb.snapshot_events.SnapshotRemove(
                key=name, snapshotter=kind.removeprefix("snapshots/")))
        for namespace, _, name in garbage.images:
            self._publish(namespace, "/images/delete", pb.image_events.ImageDelete(name=name))
        failpoint.hit("gc-rows")
        with self._database.lock:
            dirty, self._database.dirty = self._database.dirty, set()
        for what in sorted(dirty):
            try:
                if what == CONTENT:
                    self._remove_files()
                elif what.removeprefix("snapshots/") in self._drivers:
                    self._remove_snapshots(what.removeprefix("snapshots/"))
            except BaseException:
                with self._database.lock:
                    self._database.dirty |= dirty
                raise
        if garbage.total():
            log.debug("garbage: %s", ", ".join(f"{len(nodes)} {kind}" for kind, nodes in garbage._asdict().items() if nodes))
        return garbage

    def _collect_rows(self) -> Garbage:
        database = self._database
        for attempt in range(ATTEMPTS + 1):
            with database.snapshot() as (rows, generation):
                graph = Graph(rows, now())
            garbage = graph.garbage()
            self.next_expiry = graph.next_expiry
            with database.lock:
                if database.generation != generation:
                    if attempt < ATTEMPTS:
                        continue
                    with database.reading() as rows:
                        garbage = Graph(rows, now()).garbage()
                database.mutations = database.deletions = 0
                if garbage.total():
                    with database.writing() as rows:
                        self._delete(rows, garbage)
                        # Not a change that could make more garbage.
                        database.mutations = -1
                break
        return garbage

    def _delete(self, rows: sqlite3.Connection, garbage: Garbage) -> None:
        rows.executemany("DELETE FROM blobs WHERE namespace=? AND digest=?", [(node[0], node[2]) for node in garbage.content])
        rows.executemany("DELETE FROM snapshots WHERE namespace=? AND snapshotter=? AND key=?", [
            (namespace, kind.removeprefix("snapshots/"), name) for namespace, kind, name in garbage.snapshots])
        rows.executemany("DELETE FROM ingests WHERE namespace=? AND ref=?", [(node[0], node[2]) for node in garbage.ingests])
        rows.executemany("DELETE FROM records WHERE kind='image' AND namespace=? AND id=?", [
            (node[0], node[2]) for node in garbage.images])
        rows.executemany("DELETE FROM leases WHERE namespace=? AND id=?", [(node[0], node[2]) for node in garbage.leases])
        rows.executemany("DELETE FROM resources WHERE namespace=? AND type=? AND id=?", [
            *garbage.content, *garbage.snapshots, *garbage.ingests, *garbage.images])
        if garbage.content or garbage.ingests:
            self._database.dirty.add(CONTENT)
        self._database.dirty.update(kind for _, kind, _ in garbage.snapshots)

    def _remove_files(self) -> None:
        """Blobs that no namespace has or is about to claim, ingests that none knows."""
        with self._database.reading() as rows:
            known = {row[0] for row in rows.execute("SELECT digest FROM blobs UNION SELECT expected FROM ingests")}
        for info in self._files.walk():
            if info.digest in known:
                continue
            # Under the lock: a commit or a claim of the same content may have come in between.
            with self._database.reading() as rows:
                if (CONTENT, info.digest) in self._database.pending:
                    continue
                query = "SELECT 1 FROM blobs WHERE digest=? UNION ALL SELECT 1 FROM ingests WHERE expected=?"
                if rows.execute(query, (info.digest, info.digest)).fetchone() is None:
                    with contextlib.suppress(NotFound):
                        self._files.delete(info.digest)
        for status in self._files.statuses():
            with self._database.reading() as rows:
                if rows.execute("SELECT 1 FROM ingests WHERE key=?", (status.ref,)).fetchone() is None:
                    with contextlib.suppress(NotFound):
                        self._files.abort(status.ref)

    def _remove_snapshots(self, name: str) -> None:
        """What a driver has and no row names; children before their parents."""
        driver = self._drivers[name]
        for info in reversed(list(driver.walk())):
            with self._database.reading() as rows:
                if (f"snapshots/{name}", info.name) in self._database.pending:
                    continue
                query = ("SELECT 1 FROM snapshots WHERE snapshotter=?1 AND driver_key=?2"
                         " UNION ALL SELECT 1 FROM commits WHERE snapshotter=?1 AND driver_key=?2")
                if rows.execute(query, (name, info.name)).fetchone() is not None:
                    continue
            try:
                driver.remove(info.name)
            except (NotFound, FailedPrecondition):
                continue  # gone already, or the parent of one that is being made
            except OSError as error:
                # A container may have it mounted still; the next collection tries again.
                log.warning("snapshot %s of %s cannot be removed now: %s", info.name, name, error)
                with self._database.lock:
                    self._database.dirty.add(f"snapshots/{name}")
        driver.cleanup()

    # After a crash, and on demand.

    def reconcile(self) -> None:
        """At the start, before anybody asks: rows and files agree again. What has no row is left to the first collection."""
        finish_commits(self._database, self._drivers)
        with self._database.writing() as rows:
            for namespace, digest, what in list(check.lost_content(rows, self._files)):
                log.error("content %s of namespace %s %s", digest, namespace, what)
                rows.execute("DELETE FROM blobs WHERE namespace=? AND digest=?", (namespace, digest))
            for snapshotter, namespace, key in list(check.lost_snapshots(rows, self._keys())):
                log.error("snapshot %s of namespace %s is lost by %s", key, namespace, snapshotter)
                rows.execute("DELETE FROM snapshots WHERE snapshotter=? AND namespace=? AND key=?", (snapshotter, namespace, key))
        with self._database.lock:
            self._database.dirty |= {CONTENT, *(f"snapshots/{name}" for name in self._drivers)}

    def _keys(self) -> dict[str, Callable[[], set[str]]]:
        return {name: lambda driver=driver: {info.name for info in driver.walk()}  # type: ignore[misc]
                for name, driver in self._drivers.items()}

    def check(self) -> list[str]:
        """What is not as it should be, in words; empty when all is well. Reads every blob; others may work meanwhile."""

        def once() -> list[str]:
            with self._database.snapshot() as (rows, _):
                return list(check.database_lines(rows)) + list(check.lines(rows, self._files, self._keys()))

        return check.twice(once)


class Schedule:
    """When to collect: containerd's rules.

    Attributes:
        pause_threshold: share of the time that collections may take; from it follows how long one waits after the other.
        deletion_threshold: so many deletions bring the next collection forward, to `schedule_delay_s` from now; 0: none do.
        mutation_threshold: so many changes are reason for a collection when its time has come, as any deletion is; 0: none are.
        schedule_delay_s: between being asked for and beginning.
        startup_delay_s: before the first.
    """

    def __init__(
        self, pause_threshold: float = 0.02, deletion_threshold: int = 0, mutation_threshold: int = 100,
        schedule_delay_s: float = 0.0, startup_delay_s: float = 0.1,
    ) -> None:
        self.pause_threshold = min(max(pause_threshold, 0.0), 0.5)
        self.deletion_threshold = max(deletion_threshold, 0)
        self.mutation_threshold = max(mutation_threshold, 0)
        self.schedule_delay_s = max(schedule_delay_s, 0.0)
        self.startup_delay_s = max(startup_delay_s, 0.0)

    def interval_s(self, mean_s: float) -> float:
        """Seconds between collections that take `mean_s` on the average."""
        if not self.pause_threshold:
            return 1.0
        mean_s = max(mean_s, 0.005)
        return mean_s / self.pause_threshold - mean_s


def configured(table: Mapping[str, Any]) -> Schedule:
    """The schedule of the configuration's table `gc`, whose words are containerd's. Raises InvalidArgument."""
    words: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("schedule_delay", "startup_delay"):
            words[f"{key}_s"] = _seconds(key, value)
        elif key not in ("pause_threshold", "deletion_threshold", "mutation_threshold"):
            raise InvalidArgument(f"gc.{key} is no setting")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise InvalidArgument(f"gc.{key} must be a number, not {value!r}")
        else:
            words[key] = value
    return Schedule(**words)


def _seconds(key: str, value: Any) -> float:
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
        if isinstance(value, str) and value.endswith(unit):
            with contextlib.suppress(ValueError):
                return float(value.removesuffix(unit)) * factor
    raise InvalidArgument(f'gc.{key} must be a time as "100ms" or "2s", not {value!r}')


class Scheduler:
    """Collects on the event loop's account when `Schedule` says so; nothing wakes up while nothing changes."""

    def __init__(self, database: Database, collector: Collector, schedule: Schedule) -> None:
        self._database = database
        self._collector = collector
        self._schedule = schedule
        self._changed = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._spent_s = 0.0
        self._count = 0

    def change(self, schedule: Schedule) -> None:
        """Go by another schedule from now on."""
        self._schedule = schedule
        self._changed.set()

    def start(self) -> None:
        """Begin; the first collection comes by itself. An event loop must run."""
        loop = asyncio.get_running_loop()
        told = False

        def tell() -> None:
            nonlocal told
            told = False
            self._changed.set()

        def changed() -> None:
            nonlocal told
            if not told and not loop.is_closed():
                told = True
                loop.call_soon_threadsafe(tell)

        self._database.on_change = changed
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Let a collection that is under way end."""
        self._database.on_change = None
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._answer(None)

    async def collect(self) -> None:
        """Collect soon, and return when that is done. Raises what goes wrong."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._changed.set()
        await done

    async def _serve(self) -> None:
        earliest = time.monotonic() + self._schedule.startup_delay_s
        first = True
        while True:
            due = self._due(earliest, first)
            self._changed.clear()
            wait = max(due - time.monotonic(), 0.0)
            if wait > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), None if math.isinf(wait) else wait)
                    continue
            waiting, self._waiting = self._waiting, []
            begin = time.monotonic()
            done = await self._run(waiting)
            first = False
            self._spent_s += time.monotonic() - begin
            self._count += 1
            earliest = time.monotonic() + (self._schedule.interval_s(self._spent_s / self._count) if done else RETRY_S)

    async def _run(self, waiting: list[asyncio.Future[None]]) -> bool:
        work = asyncio.ensure_future(asyncio.to_thread(self._collector.collect))
        error: Exception | None = None
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            self._waiting += waiting
            raise
        except (BoxshipError, OSError, sqlite3.Error) as failure:
            log.error("garbage collection failed: %s", failure)
            error = failure
        except Exception as failure:  # a mistake must not end the collecting, nor leave callers waiting
            log.exception("garbage collection failed")
            error = failure
        self._waiting, kept = waiting, self._waiting
        self._answer(error)
        self._waiting = kept
        return error is None

    def _answer(self, error: Exception | None) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            if not done.done():
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    def _due(self, earliest: float, first: bool) -> float:
        """When to collect next, of time.monotonic; never, as long as nothing is a reason to."""
        schedule, database = self._schedule, self._database
        soon = time.monotonic() + schedule.schedule_delay_s
        if self._waiting:
            return soon
        if schedule.deletion_threshold and database.deletions >= schedule.deletion_threshold:
            return min(soon, earliest)
        many = bool(schedule.mutation_threshold) and database.mutations >= schedule.mutation_threshold
        if first or database.deletions > 0 or many:
            return earliest
        if database.dirty:  # what could not be removed
            return max(earliest, time.monotonic() + RETRY_S)
        if self._collector.next_expiry:
            return max(earliest, time.monotonic() + (self._collector.next_expiry - now()) / 1e9)
        return math.inf
