"""What all drivers have in common: a directory for each snapshot, and the database that says which there are.

Runs in: the daemon, any thread.

    ROOT/metadata.db       see database.py
    ROOT/snapshots/ID      of one snapshot; what is in it is the driver's
    ROOT/snapshots/new-*   being made          } what a killed process leaves: `cleanup` takes it away,
    ROOT/snapshots/rm-*    being removed       } and so does opening the driver
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from typing import TYPE_CHECKING

from boxship.abi import mount as m
from boxship.containerd.snapshots.database import Database, Row
from boxship.containerd.snapshots.driver import ACTIVE, COMMITTED, VIEW, Info, Mount, Usage
from boxship.kit import failpoint
from boxship.kit.errors import FailedPrecondition
from boxship.linux.mounts import openat2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class BaseDriver:
    """The methods of Driver; a driver itself says how a snapshot is made, mounted and measured."""

    name = ""

    def __init__(self, root: str) -> None:
        """`root` is made when it is not there, and belongs to this driver of this process alone."""
        self.root = os.path.abspath(root)
        self._snapshots = os.path.join(self.root, "snapshots")
        self._database = Database(self.root)
        os.makedirs(self._snapshots, 0o700, exist_ok=True)
        self.cleanup()

    # What a driver says.

    def _make(self, directory: str, kind: int, parents: list[Row]) -> None:
        """Fill the new, empty `directory` of a snapshot; `parents` has the nearest first."""
        raise NotImplementedError

    def _mounts(self, row: Row, parents: list[Row]) -> list[Mount]:
        """Of an active snapshot or a view. May make what the mounts need."""
        raise NotImplementedError

    def _measure(self, row: Row) -> Usage:
        """Of an active snapshot."""
        raise NotImplementedError

    def _form(self, row: Row) -> str:
        """What the snapshot that is committed now is made of."""
        return row.form

    def _release(self, number: int) -> None:
        """Before the directory of a snapshot is taken away."""

    # What all do.

    def directory(self, number: int) -> str:
        """Of a snapshot."""
        return os.path.join(self._snapshots, str(number))

    def stat(self, key: str) -> Info:
        """See Driver."""
        with self._database as database:
            return database.info(key)

    def update(self, info: Info, fieldpaths: Iterable[str] = ()) -> Info:
        """See Driver."""
        with self._database as database:
            return database.update(info, fieldpaths)

    def usage(self, key: str) -> Usage:
        """See Driver."""
        with self._database as database:
            row = database.get(key)
            if row.kind == COMMITTED:
                return database.stored_usage(row.id)
        return self._measure(row) if row.kind == ACTIVE else Usage()

    def mounts(self, key: str) -> list[Mount]:
        """See Driver."""
        with self._database as database:
            row = database.get(key)
            if row.kind == COMMITTED:
                raise FailedPrecondition(f"snapshot {key} is committed and has no mounts: failed precondition")
            return self._mounts(row, database.chain(row))

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See Driver."""
        return self._create(key, parent, ACTIVE, labels)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """See Driver."""
        return self._create(key, parent, VIEW, labels)

    def _create(self, key: str, parent: str, kind: int, labels: Mapping[str, str] | None) -> list[Mount]:
        made = ""
        try:
            with self._database as database:
                row = database.create(key, parent, kind, labels)
                parents = database.chain(row)
                made = tempfile.mkdtemp(prefix="new-", dir=self._snapshots)
                self._make(made, kind, parents)
                failpoint.hit("snapshot.made")
                os.rename(made, self.directory(row.id))
                made = self.directory(row.id)
                mounts = self._mounts(row, parents)
        except BaseException:
            if made:
                remove_tree(made)
            raise
        return mounts

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """See Driver."""
        with self._database as database:
            row = database.get(key)
            if row.kind != ACTIVE:
                raise FailedPrecondition(f"snapshot {key} is not active: failed precondition")
            database.commit(key, name, self._measure(row), labels, self._form(row))
            failpoint.hit("snapshot.commit")

    def remove(self, key: str) -> None:
        """See Driver."""
        with self._database as database:
            row = database.remove(key)
            self._release(row.id)
            gone = os.path.join(self._snapshots, f"rm-{row.id}")
            try:
                os.rename(self.directory(row.id), gone)
            except FileNotFoundError:
                gone = ""
            failpoint.hit("snapshot.remove")
        if gone:
            remove_tree(gone)

    def walk(self) -> Iterator[Info]:
        """See Driver."""
        return self._database.walk()

    def cleanup(self) -> None:
        """See Driver."""
        with self._database as database:
            known = {str(number) for number in database.ids()}
            stale = []
            for name in sorted(os.listdir(self._snapshots)):
                if name.startswith("rm-") and name[3:] in known:
                    # Killed between the rename and the end of the transaction: it was never removed.
                    os.rename(os.path.join(self._snapshots, name), self.directory(int(name[3:])))
                elif name not in known:
                    stale.append(name)
                    if name.isdigit():
                        self._release(int(name))
        for name in stale:
            remove_tree(os.path.join(self._snapshots, name))

    def close(self) -> None:
        """See Driver."""
        self._database.close()


def remove_tree(path: str) -> None:
    """All of a directory, links not followed; that it is not there is no error. Raises OSError."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


def disk_usage(path: str) -> Usage:
    """Inodes and bytes of blocks below a directory, itself included; a file with several names counts once.

    A container may be changing the tree meanwhile: what vanishes is left out, and no link is followed. Raises OSError.
    """
    seen: set[int] = set()
    total = Usage()
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    pending = [b"."]
    try:
        while pending:
            below = pending.pop()
            try:
                fd = openat2(root, os.fsdecode(below), os.O_RDONLY | os.O_DIRECTORY, 0, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue
                raise
            try:
                _measure_directory(fd, below, pending, seen, total)
            finally:
                os.close(fd)
    finally:
        os.close(root)
    return total


def _measure_directory(fd: int, path: bytes, pending: list[bytes], seen: set[int], total: Usage) -> None:
    status = os.fstat(fd)
    total.inodes += 1
    total.size += status.st_blocks * 512
    for name in map(os.fsencode, os.listdir(fd)):
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            pending.append(path + b"/" + name)
        elif status.st_nlink == 1 or status.st_ino not in seen:
            seen.add(status.st_ino)
            total.inodes += 1
            total.size += status.st_blocks * 512
