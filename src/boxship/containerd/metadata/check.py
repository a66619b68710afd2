"""Whether rows and files agree: what `boxship system check` says.

Runs in: the daemon, or beside it, or without one; changes nothing. Reads every blob.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote

from boxship.images.content import ContentStore
from boxship.kit.errors import BoxshipError, NotFound, from_os_error
from boxship.oci import digest as digests

DATABASE = "metadata.db"
CONTENT_FOLDER = "content"
SNAPSHOTTER_FOLDER = "io.containerd.snapshotter.v1."

Lines = Iterator[str]


def root(path: str) -> list[str]:
    """What is wrong with the store at `path`, in words; empty when all is well. Raises NotFound when there is none."""
    database = os.path.join(path, DATABASE)
    if not os.path.exists(database):
        raise NotFound(f"there is no {DATABASE} in {path}")
    files = ContentStore(os.path.join(path, CONTENT_FOLDER))
    prefix = os.path.join(path, SNAPSHOTTER_FOLDER)
    drivers: dict[str, Callable[[], set[str]]] = {}
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if folder.startswith(prefix):
            drivers[folder[len(prefix):]] = lambda folder=folder: recorded(folder)  # type: ignore[misc]

    def once() -> list[str]:
        with _read_only(database) as rows:
            return list(database_lines(rows)) + list(lines(rows, files, drivers))

    try:
        return twice(once)
    except sqlite3.DatabaseError as error:
        return [f"database: {error}"]
    except OSError as error:
        raise from_os_error(error, "checking the store") from None


def twice(once: Callable[[], list[str]]) -> list[str]:
    """What is found at the first look and at a second: others may have been in the middle of something at the first."""
    found = once()
    if found:
        again = set(once())
        found = [line for line in found if line in again]
    return found


def database_lines(rows: sqlite3.Connection) -> Lines:
    """Of the file itself and of references within it."""
    for line, in rows.execute("PRAGMA integrity_check").fetchall():
        if line != "ok":
            yield f"database: {line}"
    for row in rows.execute("PRAGMA foreign_key_check").fetchall():
        yield f"database: a row of {row[0]} refers to {row[2]} that is not there"


def lines(rows: sqlite3.Connection, files: ContentStore, drivers: Mapping[str, Callable[[], set[str]]]) -> Lines:
    """Of content and snapshots. `drivers` tell the keys of what they have."""
    lost = list(lost_content(rows, files))
    for namespace, digest, what in lost:
        yield f"namespace {namespace}: content {digest} {what}"
    known = {row[0] for row in rows.execute("SELECT digest FROM blobs")} - {digest for _, digest, _ in lost}
    for digest in sorted(known):
        with contextlib.suppress(NotFound):  # deleted meanwhile
            if not intact(files.open(digest), digest):
                yield f"content {digest} is not that content any more"
    for name, namespace, key in lost_snapshots(rows, drivers):
        yield f"namespace {namespace}: snapshot {key} is lost by {name}"
    for name, namespace, key, parent in rows.execute(
        "SELECT snapshotter, namespace, key, parent FROM snapshots child WHERE parent != '' AND NOT EXISTS"
        " (SELECT 1 FROM snapshots WHERE snapshotter=child.snapshotter AND namespace=child.namespace AND key=child.parent)"
    ):
        yield f"namespace {namespace}: snapshot {key} of {name} has lost its parent {parent}"


def lost_content(rows: sqlite3.Connection, files: ContentStore) -> Iterator[tuple[str, str, str]]:
    """(namespace, digest, what is wrong) of blobs whose file is not there, or not of its size."""
    known = rows.execute("SELECT namespace, digest, size FROM blobs").fetchall()
    sizes = {info.digest: info.size for info in files.walk()}
    for namespace, digest, size in known:
        found = sizes.get(digest)
        if found is None:
            yield namespace, digest, "is lost"
        elif found != size:
            yield namespace, digest, f"has {found} bytes, {size} were recorded"


def lost_snapshots(rows: sqlite3.Connection, drivers: Mapping[str, Callable[[], set[str]]]) -> Iterator[tuple[str, str, str]]:
    """(snapshotter, namespace, key) of snapshots that their driver does not have; nothing of drivers that are not there."""
    for name, keys in drivers.items():
        query = "SELECT namespace, key, driver_key FROM snapshots WHERE snapshotter=?"
        known = rows.execute(query, (name,)).fetchall()
        there = keys() if known else set()
        for namespace, key, driver_key in known:
            if driver_key not in there:
                yield name, namespace, key


def intact(fd: int, digest: str) -> bool:
    """Whether a file is what its digest says; closes it."""
    try:
        hasher = digests.hasher(digest)
        while chunk := os.read(fd, 1 << 20):
            hasher.update(chunk)
        return bool(hasher.hexdigest() == digests.split(digest)[1])
    finally:
        os.close(fd)


def recorded(folder: str) -> set[str]:
    """The keys of a driver's snapshots whose directory is there, from its own database, without opening the driver."""
    try:
        with _read_only(os.path.join(folder, "metadata.db")) as rows:
            known = rows.execute("SELECT id, key FROM snapshot").fetchall()
    except sqlite3.DatabaseError as error:
        raise BoxshipError(f"the database of {folder} cannot be read: {error}") from None
    return {key for number, key in known if os.path.isdir(os.path.join(folder, "snapshots", str(number)))}


@contextlib.contextmanager
def _read_only(path: str) -> Iterator[sqlite3.Connection]:
    rows = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=30)
    try:
        yield rows
    finally:
        rows.close()
