"""The content store: blobs by digest, in files, and the ingests from which they come.

Runs in: the daemon; any thread, a Writer in one at a time. Several processes may share a root.
Spec: containerd docs/content-flow.md and its local store, whose layout on disk this is:

    ROOT/
      blobs/ALGORITHM/HEX       whole and verified, mode 0444; never changed
      ingest/SHA256-OF-REF/     what is being written
        ref, total, startedat, expected    written when it begins
        data                    locked (flock) by its writer

A blob gets its name by one rename, after its data are on the disk; so what is below `blobs` is whole, whatever is
killed and whenever.
What is left below `ingest` is continued by the next writer of that ref, or aborted.
Not here: namespaces, labels and garbage collection (`boxship.containerd.metadata`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from boxship.kit import failpoint
from boxship.kit.errors import (
    AlreadyExists,
    BoxshipError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    from_os_error,
)
from boxship.kit.files import read_all, write_all, write_atomic
from boxship.oci import digest as digests

_CHUNK = 1 << 20
_GONE = ".gone-"
"""Begins the name of an ingest's folder that is being removed."""


@dataclass(frozen=True)
class Info:
    """A blob: size in bytes, times in nanoseconds since 1970."""

    digest: str
    size: int
    created: int
    updated: int


@dataclass(frozen=True)
class Status:
    """An ingest: bytes written so far and expected in all (0: unknown), times in nanoseconds since 1970."""

    ref: str
    offset: int
    total: int
    started: int
    updated: int
    expected: str


class ContentStore:
    """The files below one root, which is made when it is missing."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._ingests = f"{root}/ingest"
        os.makedirs(f"{root}/blobs", 0o700, exist_ok=True)
        os.makedirs(self._ingests, 0o700, exist_ok=True)
        for name in os.listdir(self._ingests):
            if name.startswith(_GONE):
                _remove(f"{self._ingests}/{name}")

    def path(self, digest: str) -> str:
        """Where the blob is, or would be. Raises InvalidArgument."""
        algorithm, encoded = digests.split(digest)
        return f"{self.root}/blobs/{algorithm}/{encoded}"

    def info(self, digest: str) -> Info:
        """Raises NotFound, InvalidArgument."""
        try:
            status = os.stat(self.path(digest), follow_symlinks=False)
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found") from None
        return _info(digest, status)

    def open(self, digest: str) -> int:
        """A descriptor of the blob, to read from, the caller's to close. Raises NotFound, InvalidArgument."""
        try:
            return os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found") from None

    def walk(self) -> Iterator[Info]:
        """Every blob."""
        for algorithm in sorted(os.listdir(f"{self.root}/blobs")):
            with os.scandir(f"{self.root}/blobs/{algorithm}") as entries:
                for entry in entries:
                    try:
                        digest = f"{algorithm}:{entry.name}"
                        digests.check(digest)
                        yield _info(digest, entry.stat(follow_symlinks=False))
                    except (FileNotFoundError, InvalidArgument):
                        continue  # deleted meanwhile, or nothing of ours

    def delete(self, digest: str) -> None:
        """Who has it open can read on. Raises NotFound."""
        try:
            os.unlink(self.path(digest))
        except FileNotFoundError:
            raise NotFound(f"content {digest}: not found") from None

    def writer(self, ref: str, total: int = 0, expected: str = "") -> Writer:
        """Begin the ingest `ref`, or go on with it where its last writer stopped.

        Raises AlreadyExists when the blob `expected` is there, Unavailable while another writer has the ref,
        FailedPrecondition when it was begun for another size or content, InvalidArgument, ResourceExhausted (disk full).
        """
        if not ref:
            raise InvalidArgument("ref must not be empty")
        if expected:
            digests.hasher(expected)
            if os.path.exists(self.path(expected)):
                raise AlreadyExists(f"content {expected}: already exists")
        folder = self._folder(ref)
        try:
            fd = self._lock(folder, ref)
            try:
                status = self._begin(folder, ref, fd, total, expected)
                return Writer(self, folder, fd, status)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise from_os_error(error, f"ingest {ref}: writing") from None

    def status(self, ref: str) -> Status:
        """Raises NotFound."""
        found = _status(self._folder(ref))
        if found is None:
            raise NotFound(f"ingest ref {ref}: not found")
        return found

    def statuses(self) -> list[Status]:
        """Every ingest that was begun and is neither committed nor aborted."""
        names = sorted(name for name in os.listdir(self._ingests) if not name.startswith("."))
        return [status for name in names if (status := _status(f"{self._ingests}/{name}")) is not None]

    def abort(self, ref: str) -> None:
        """Drop an ingest; its writer, if there is one, can write on and not commit. Raises NotFound."""
        if not self._discard(self._folder(ref)):
            raise NotFound(f"ingest ref {ref}: not found")

    def _folder(self, ref: str) -> str:
        return f"{self._ingests}/{hashlib.sha256(ref.encode('utf-8', 'surrogateescape')).hexdigest()}"

    def _lock(self, folder: str, ref: str) -> int:
        while True:
            os.makedirs(folder, 0o700, exist_ok=True)
            try:
                fd = os.open(f"{folder}/data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # the folder was removed in between
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # What was locked may be a blob by now, or have been removed with its folder.
                if os.stat(f"{folder}/data", follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise Unavailable(f"ref {ref} locked: unavailable", "another writer has it") from None
            except FileNotFoundError:
                pass
            os.close(fd)

    def _begin(self, folder: str, ref: str, fd: int, total: int, expected: str) -> Status:
        known = _status(folder)
        if known is None:
            os.ftruncate(fd, 0)
            if total:
                write_atomic(f"{folder}/total", str(total).encode())
            if expected:
                write_atomic(f"{folder}/expected", expected.encode())
            write_atomic(f"{folder}/startedat", str(time.time_ns()).encode())
            failpoint.hit("content-begin")
            write_atomic(f"{folder}/ref", ref.encode("utf-8", "surrogateescape"))
            return Status(ref, 0, total, time.time_ns(), time.time_ns(), expected)
        if total and known.total and total != known.total:
            raise FailedPrecondition(f"ref {ref}: provided total differs from status: {total} != {known.total}")
        if expected and known.expected and expected != known.expected:
            raise FailedPrecondition(f"ref {ref}: expected {expected}, but it was begun for {known.expected}", "abort it first")
        return Status(ref, known.offset, total or known.total, known.started, known.updated, expected or known.expected)

    def _discard(self, folder: str) -> bool:
        gone = f"{self._ingests}/{_GONE}{os.urandom(8).hex()}"
        try:
            os.rename(folder, gone)
        except FileNotFoundError:
            return False
        _remove(gone)
        return True


class Writer:
    """An ingest under way; holds its ref until `close`."""

    def __init__(self, store: ContentStore, folder: str, fd: int, status: Status) -> None:
        self._store = store
        self._folder = folder
        self._fd = fd
        self.ref = status.ref
        self.total = status.total
        self.expected = status.expected
        self.started = status.started
        self._hash = digests.hasher(status.expected or "sha256:" + "0" * 64)
        self._algorithm = digests.split(status.expected)[0] if status.expected else "sha256"
        self.offset = os.lseek(fd, status.offset, os.SEEK_SET)
        self._hashed = 0
        """What was written by an earlier writer is hashed when the hash is needed first, and not on opening."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append; returns the bytes written. Raises ResourceExhausted when the disk is full, and nothing is appended then."""
        if self._fd < 0:
            raise FailedPrecondition(f"ref {self.ref}: the writer is closed")
        self._catch_up()
        try:
            failpoint.hit("content-write")
            write_all(self._fd, data if isinstance(data, bytes) else memoryview(data))  # type: ignore[arg-type]
        except OSError as error:
            os.ftruncate(self._fd, self.offset)
            os.lseek(self._fd, self.offset, os.SEEK_SET)
            raise from_os_error(error, f"ingest {self.ref}: writing") from None
        self._hash.update(data)
        self.offset += len(data)
        self._hashed = self.offset
        return len(data)

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes. Raises InvalidArgument for more than were written."""
        if not 0 <= size <= self.offset:
            raise InvalidArgument(f"ref {self.ref}: cannot go from {self.offset} bytes to {size}")
        if size == self.offset:
            return
        os.ftruncate(self._fd, size)
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False)
        self._hashed = 0
        self.offset = os.lseek(self._fd, size, os.SEEK_SET)

    def digest(self) -> str:
        """Of what is written so far; reads what an earlier writer wrote."""
        self._catch_up()
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def status(self) -> Status:
        """As `ContentStore.status`, without looking at files."""
        return Status(self.ref, self.offset, self.total, self.started, time.time_ns(), self.expected)

    def commit(self, size: int = 0, expected: str = "") -> None:
        """Make it a blob, on the disk when this returns; the writer is closed then.

        Raises FailedPrecondition when size or digest are others (the ingest stays), AlreadyExists when the blob is there
        (the ingest is gone), NotFound when it was aborted, ResourceExhausted.
        """
        if self._fd < 0:
            raise FailedPrecondition(f"ref {self.ref}: the writer is closed")
        expected = expected or self.expected
        if size and size != self.offset:
            raise FailedPrecondition(f"unexpected commit size {self.offset}, expected {size}: failed precondition")
        if expected and digests.split(expected)[0] != self._algorithm:
            self._algorithm = digests.split(expected)[0]
            self._hash = digests.hasher(expected)
            self._hashed = 0
        digest = self.digest()
        if expected and expected != digest:
            raise FailedPrecondition(f"unexpected commit digest {digest}, expected {expected}: failed precondition")
        target = self._store.path(digest)
        if os.path.exists(target):
            self._store._discard(self._folder)
            self.close()
            raise AlreadyExists(f"content {digest}: already exists")
        try:
            self._publish(target)
        except FileNotFoundError:
            raise NotFound(f"ingest ref {self.ref}: not found") from None
        except OSError as error:
            raise from_os_error(error, f"ingest {self.ref}: committing") from None
        self._store._discard(self._folder)
        self.close()

    def close(self) -> None:
        """Let go of the ref; what is not committed stays for the next writer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _publish(self, target: str) -> None:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
            _sync(os.path.dirname(folder))
        os.fchmod(self._fd, 0o444)
        os.fsync(self._fd)
        failpoint.hit("content-commit")
        os.rename(f"{self._folder}/data", target)
        failpoint.hit("content-committed")
        _sync(folder)

    def _catch_up(self) -> None:
        """Hash what is not hashed yet. Raises DataLoss when the data are shorter than they were."""
        while self._hashed < self.offset:
            chunk = os.pread(self._fd, min(_CHUNK, self.offset - self._hashed), self._hashed)
            if not chunk:
                raise DataLoss(f"ref {self.ref}: {self._hashed} bytes are left of {self.offset}")
            self._hash.update(chunk)
            self._hashed += len(chunk)


def _info(digest: str, status: os.stat_result) -> Info:
    return Info(digest, status.st_size, status.st_mtime_ns, status.st_mtime_ns)


def _status(folder: str) -> Status | None:
    """None for what was never begun, is committed, or is damaged (and then begins anew)."""
    try:
        ref = read_all(f"{folder}/ref").decode("utf-8", "surrogateescape")
        data = os.stat(f"{folder}/data", follow_symlinks=False)
        started = int(read_all(f"{folder}/startedat"))
        total = int(_optional(f"{folder}/total") or 0)
        expected = _optional(f"{folder}/expected").decode()
        if expected:
            digests.check(expected)
    except (FileNotFoundError, ValueError, BoxshipError):
        return None
    return Status(ref, data.st_size, total, started, data.st_mtime_ns, expected)


def _optional(path: str) -> bytes:
    try:
        return read_all(path)
    except FileNotFoundError:
        return b""


def _remove(folder: str) -> None:
    try:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
    except FileNotFoundError:
        pass  # another process removes it too


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
