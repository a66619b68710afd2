"""Content as a namespace sees it: which blobs are its own, their labels, and its ingests.

Runs in: the daemon; `NamespacedContent` in any thread, the service on the event loop.
Spec: containerd API, services content.v1; docs/content-flow.md; docs/namespaces.md (content.shared, the policy: a namespace that
knows a digest need not bring the content again, unless the policy is "isolated").

A blob's row is written after its file has its name, and removed before the file is: a file without a row is garbage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import CONTENT, Database, Labels, dump, load, now
from boxship.containerd.metadata.publisher import Publish
from boxship.containerd.metadata.records import changed_labels, label_field
from boxship.containerd.namespaces import check_labels
from boxship.images.content import ContentStore, Info, Status, Writer
from boxship.kit.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from boxship.oci import digest as digests

CHUNK = 1 << 20
INLINE = 64 << 10
"""Writes up to this many bytes are not worth a change of thread."""
INGEST_LIFE_S = 24 * 3600
"""An ingest that no lease holds is dropped after this time."""
SHARED_NAMESPACE = "containerd.io/namespace.shareable"
"""Label of a namespace whose content others may have although the policy is to isolate them."""
T = TypeVar("T")


class Contents:
    """What the content of all namespaces has in common."""

    def __init__(self, database: Database, files: ContentStore, publish: Publish, shared: bool = True) -> None:
        """`shared`: whether a namespace may have what another one has brought, by naming its digest."""
        self.database = database
        self.files = files
        self.publish = publish
        self.shared = shared


class NamespacedContent:
    """The content of one namespace; what is made is held by a lease when there is one. Satisfies boxship.images.store.Store."""

    def __init__(self, contents: Contents, namespace: str, lease: str = "") -> None:
        self._contents = contents
        self._database = contents.database
        self._files = contents.files
        self._namespace = namespace
        self._lease = lease

    # Blobs.

    def info(self, digest: str) -> Info:
        """Raises NotFound, InvalidArgument."""
        return self.described(digest)[0]

    def labels(self, digest: str) -> Labels:
        """Raises NotFound, InvalidArgument."""
        return self.described(digest)[1]

    def described(self, digest: str) -> tuple[Info, Labels]:
        """A blob and its labels. Raises NotFound, InvalidArgument."""
        digests.check(digest)
        with self._database.reading() as rows:
            row = rows.execute("SELECT size, created, updated, labels FROM blobs WHERE namespace=? AND digest=?",
                               (self._namespace, digest)).fetchone()
        if row is None:
            raise NotFound(f"content digest {digest}: not found")
        return Info(digest, row[0], row[1], row[2]), load(row[3])

    def walk(self, filters: Iterable[str] = ()) -> Iterator[tuple[Info, Labels]]:
        """The blobs that pass one of the filters (`digest`, `size`, `labels.KEY`), sorted. Raises InvalidArgument."""
        accept = parse_all(filters)
        with self._database.reading() as rows:
            found = rows.execute("SELECT digest, size, created, updated, labels FROM blobs WHERE namespace=? ORDER BY digest",
                                 (self._namespace,)).fetchall()
        for digest, size, created, updated, text in found:
            labels = load(text)
            if accept(lambda path, digest=digest, size=size, labels=labels: _field(digest, size, labels, path)):  # type: ignore[misc]
                yield Info(digest, size, created, updated), labels

    def open(self, digest: str) -> int:
        """A descriptor, the caller's to close. Raises NotFound."""
        self.info(digest)
        return self._files.open(digest)

    def path(self, digest: str) -> str:
        """Of the file. Raises NotFound."""
        self.info(digest)
        return self._files.path(digest)

    def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add or replace; an empty value removes. Raises NotFound, InvalidArgument."""
        self.update(digest, labels, [f"labels.{key}" for key in labels])

    def update(self, digest: str, labels: Mapping[str, str], paths: Iterable[str] = ()) -> tuple[Info, Labels]:
        """Change all labels, or those that a field mask names. Raises NotFound, InvalidArgument."""
        with self._database.writing() as rows:
            known = changed_labels(self.labels(digest), labels, paths, f'content info "{digest}"')
            rows.execute("UPDATE blobs SET labels=?, updated=? WHERE namespace=? AND digest=?",
                         (dump(known), now(), self._namespace, digest))
            return self.described(digest)

    def delete(self, digest: str) -> None:
        """The namespace knows it no longer; the file goes when none does. Raises NotFound."""
        digests.check(digest)
        with self._database.writing() as rows:
            done = rows.execute("DELETE FROM blobs WHERE namespace=? AND digest=?", (self._namespace, digest))
            if done.rowcount == 0:
                raise NotFound(f"content digest {digest}: not found")
            self._database.release(self._namespace, self._lease, "content", digest)
            self._database.soil(CONTENT)
        self._contents.publish(self._namespace, "/content/delete", pb.content_events.ContentDelete(digest=digest))

    # Ingests.

    def writer(self, ref: str, total: int = 0, expected: str = "") -> NamespacedWriter:
        """Begin or continue. What another namespace has needs no writing, when the policy is so: its writer is at the end.

        Raises AlreadyExists when the namespace has `expected` (the lease holds it then), Unavailable while another writer has
        the ref, NotFound for the lease, FailedPrecondition, ResourceExhausted.
        """
        if not ref:
            raise InvalidArgument("ref must not be empty: invalid argument")
        if expected:
            digests.hasher(expected)
        new = False
        with self._database.writing() as rows:
            self._database.ensure(self._namespace)
            there = bool(expected) and self._has(rows, expected)
            if there:
                self._database.hold(self._namespace, self._lease, "content", expected)
            else:
                size = self._elsewhere(rows, expected, total) if expected else None
                key, new = self._begin(rows, ref, expected if size is not None else "")
        if there:
            raise AlreadyExists(f"content {expected}: already exists")
        if size is not None:
            return NamespacedWriter(self, ref, key, None, expected, size)
        try:
            return NamespacedWriter(self, ref, key, self._writer(key, total, expected), expected, 0)
        except BaseException:
            if new:
                with self._database.writing() as rows:
                    self._forget(rows, ref)
            raise

    def status(self, ref: str) -> Status:
        """Raises NotFound."""
        with self._database.reading() as rows:
            row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
        if row is None:
            raise NotFound(f"reference {ref}: not found")
        return _renamed(self._files.status(row[0]), ref)

    def statuses(self, filters: Iterable[str] = ()) -> list[Status]:
        """Those that pass one of the filters (`ref`), sorted. Raises InvalidArgument."""
        accept = parse_all(filters)
        with self._database.reading() as rows:
            found = rows.execute("SELECT ref, key FROM ingests WHERE namespace=? ORDER BY ref", (self._namespace,)).fetchall()
        made = []
        for ref, key in found:
            if accept(lambda path, ref=ref: ref if path == ["ref"] else None):  # type: ignore[misc]
                with contextlib.suppress(NotFound):  # committed in between, or nothing is written yet
                    made.append(_renamed(self._files.status(key), ref))
        return made

    def abort(self, ref: str) -> None:
        """Raises NotFound."""
        with self._database.lock:
            with self._database.reading() as rows:
                row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
            if row is None:
                raise NotFound(f"reference {ref}: not found")
            # The file first: on a full disk this makes the room that the database needs.
            with contextlib.suppress(NotFound):
                self._files.abort(row[0])
            with self._database.writing() as rows:
                self._forget(rows, ref)

    def _has(self, rows: sqlite3.Connection, digest: str) -> bool:
        query = "SELECT 1 FROM blobs WHERE namespace=? AND digest=?"
        return rows.execute(query, (self._namespace, digest)).fetchone() is not None

    def _elsewhere(self, rows: sqlite3.Connection, digest: str, total: int) -> int | None:
        """The size of content that this namespace may have without bringing it; None when there is none."""
        if not self._contents.shared:
            query = "SELECT labels FROM namespaces WHERE name IN (SELECT namespace FROM blobs WHERE digest=?)"
            if not any(load(text).get(SHARED_NAMESPACE) == "true" for text, in rows.execute(query, (digest,))):
                return None
        try:
            size = self._files.info(digest).size
        except NotFound:
            return None
        return size if total in (0, size) else None

    def _begin(self, rows: sqlite3.Connection, ref: str, expected: str) -> tuple[str, bool]:
        row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
        key = row[0] if row else f"{self._namespace}/{os.urandom(8).hex()}/{ref}"
        expires = 0 if self._lease else now() + INGEST_LIFE_S * 10**9
        rows.execute(
            "INSERT INTO ingests VALUES (?,?,?,?,?) ON CONFLICT (namespace, ref)"
            " DO UPDATE SET expires=excluded.expires, expected=excluded.expected",
            (self._namespace, ref, key, expected, expires))
        self._database.hold(self._namespace, self._lease, "ingests", ref)
        return key, row is None

    def _writer(self, key: str, total: int, expected: str) -> Writer:
        # The namespace's own promise is checked when it commits. The files are told no more than the algorithm, by which
        # they hash along: they may have the blob, and this namespace must bring it all the same.
        other = expected and not expected.startswith("sha256:") and not os.path.exists(self._files.path(expected))
        return self._files.writer(key, total, expected if other else "")

    def _forget(self, rows: sqlite3.Connection, ref: str) -> None:
        rows.execute("DELETE FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref))
        rows.execute("DELETE FROM resources WHERE namespace=? AND type='ingests' AND id=?", (self._namespace, ref))

    def _adopt(self, ref: str, digest: str, size: int, labels: Mapping[str, str]) -> bool:
        """Let the namespace have a blob; False when it has it already."""
        with self._database.writing() as rows:
            at = now()
            done = rows.execute("INSERT OR IGNORE INTO blobs VALUES (?,?,?,?,?,?)",
                                (self._namespace, digest, size, at, at, dump(labels)))
            self._forget(rows, ref)
            self._database.hold(self._namespace, self._lease, "content", digest)
        return done.rowcount == 1


class NamespacedWriter:
    """An ingest of one namespace; content that is there for another one is at its end from the start."""

    def __init__(
        self, content: NamespacedContent, ref: str, key: str, writer: Writer | None, expected: str, whole: int,
    ) -> None:
        self._content = content
        self._ref = ref
        self._key = key
        self._writer = writer
        self._expected = expected
        self._whole = whole
        self._started = now()

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._writer.offset if self._writer is not None else self._whole

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append. Raises ResourceExhausted, FailedPrecondition."""
        if not len(data):
            return 0
        return self._own(self._whole).write(data)

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes. Raises InvalidArgument for more than there are."""
        if self._writer is not None or size != self._whole:
            if size > self.offset:
                raise InvalidArgument(f"ref {self._ref}: cannot go from {self.offset} bytes to {size}")
            self._own(size).truncate(size)

    def digest(self) -> str:
        """Of what is written so far."""
        return self._writer.digest() if self._writer is not None else self._expected

    def status(self) -> Status:
        """As of now."""
        if self._writer is not None:
            return _renamed(self._writer.status(), self._ref)
        return Status(self._ref, self._whole, self._whole, self._started, self._started, self._expected)

    def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> None:
        """Make it the namespace's, on the disk when this returns; the writer is closed then.

        Raises AlreadyExists when the namespace has it (its lease holds it then), FailedPrecondition for another size or content
        (the ingest stays), NotFound for the lease or an aborted ingest, InvalidArgument, ResourceExhausted.
        """
        check_labels(dict(labels or {}))
        content, written = self._content, self.offset
        if self._writer is None:
            if (size and size != written) or (expected and expected != self._expected):
                raise FailedPrecondition(f"ref {self._ref}: {self._expected} of {written} bytes is there,"
                                         f" {expected or self._expected} of {size or written} was expected: failed precondition")
            digest = self._expected
        else:
            digest = expected or self._expected or self._writer.digest()
        with content._database.pending.making((CONTENT, digest)):
            if self._writer is None:
                content._files.info(digest)
            else:
                with contextlib.suppress(AlreadyExists):  # for another namespace, and now for this one too
                    self._writer.commit(size, digest)
            new = content._adopt(self._ref, digest, written, labels or {})
        if not new:
            raise AlreadyExists(f"content {digest}: already exists")
        event = pb.content_events.ContentCreate(digest=digest, size=written)
        content._contents.publish(content._namespace, "/content/create", event)

    def close(self) -> None:
        """Let go of the ref."""
        if self._writer is not None:
            self._writer.close()

    def _own(self, size: int) -> Writer:
        """The writer of files; content of another namespace is copied into it, `size` bytes, when it is to be another's."""
        if self._writer is None:
            made = self._content._files.writer(self._key)
            try:
                made.truncate(0)
                source = self._content._files.open(self._expected)
                try:
                    while made.offset < size and (chunk := os.pread(source, min(CHUNK, size - made.offset), made.offset)):
                        made.write(chunk)
                finally:
                    os.close(source)
            except BaseException:
                made.close()
                raise
            self._writer = made
        return self._writer


def _renamed(status: Status, ref: str) -> Status:
    return Status(ref, status.offset, status.total, status.started, status.updated, status.expected)


class Content:
    """containerd.services.content.v1.Content."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def store(self, call: Call) -> NamespacedContent:
        """The content of the call's namespace for callers in this process. Raises FailedPrecondition without a namespace."""
        return NamespacedContent(self._contents, call.required_namespace(), call.lease)

    async def Info(self, request: Any, call: Call) -> Any:
        """Raises NotFound, InvalidArgument."""
        return pb.content.InfoResponse(info=_message(*self.store(call).described(request.digest)))

    async def Update(self, request: Any, call: Call) -> Any:
        """The labels, or those that the mask names. Raises NotFound, InvalidArgument."""
        given = request.info
        return pb.content.UpdateResponse(
            info=_message(*self.store(call).update(given.digest, given.labels, request.update_mask.paths)))

    async def List(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Those that pass one of the filters, a hundred in a message. Raises InvalidArgument."""
        batch: list[Any] = []
        for info, labels in self.store(call).walk(request.filters):
            batch.append(_message(info, labels))
            if len(batch) == 100:
                yield pb.content.ListContentResponse(info=batch)
                batch = []
        if batch:
            yield pb.content.ListContentResponse(info=batch)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """Raises NotFound, InvalidArgument."""
        self.store(call).delete(request.digest)
        return Empty()

    async def Read(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """From `offset`, `size` bytes at most (0: to the end), in chunks of a mebibyte. Raises NotFound, OutOfRange, DataLoss."""
        store = self.store(call)
        length = store.info(request.digest).size
        offset = max(request.offset, 0)
        if offset > length:
            raise OutOfRange(f"read past object length {length} bytes")
        end = min(offset + request.size, length) if request.size > 0 else length
        fd = store.open(request.digest)
        try:
            while offset < end:
                wanted = min(CHUNK, end - offset)
                if wanted <= INLINE:
                    data = os.pread(fd, wanted, offset)
                else:
                    data = await whole(asyncio.to_thread(os.pread, fd, wanted, offset))
                if not data:
                    raise DataLoss(f"content {request.digest} ends at {offset} bytes, {length} were recorded")
                yield pb.content.ReadContentResponse(offset=offset, data=data)
                offset += len(data)
        finally:
            os.close(fd)

    async def Status(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        return pb.content.StatusResponse(status=_status_message(self.store(call).status(request.ref)))

    async def ListStatuses(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters, whose only field is `ref`. Raises InvalidArgument."""
        return pb.content.ListStatusesResponse(
            statuses=[_status_message(status) for status in self.store(call).statuses(request.filters)])

    async def Abort(self, request: Any, call: Call) -> Empty:
        """Raises NotFound."""
        self.store(call).abort(request.ref)
        return Empty()

    async def Write(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        """One ingest: the first message names it and takes its lock, each is answered, COMMIT ends it.

        An offset of 0 begins anew; another one must be where the ingest is (OutOfRange). Raises AlreadyExists as soon as a
        message expects what is there (the ingest is dropped), and what `NamespacedContent.writer` and `commit` raise.
        """
        store = self.store(call)
        writer: NamespacedWriter | None = None
        total, expected, ref = 0, "", ""
        try:
            async for request in requests:
                if writer is None:
                    ref = request.ref
                    if not ref:
                        raise InvalidArgument("first message must have a reference")
                    writer = store.writer(ref, request.total, request.expected)
                    if writer.offset > INLINE:
                        await whole(asyncio.to_thread(writer.digest))  # hashes what is there
                elif request.expected and request.expected != expected:
                    _refuse_known(store, writer, ref, request.expected)
                total, expected = request.total or total, request.expected or expected
                status = writer.status()
                if request.action != pb.content.STAT:
                    await _append(writer, request)
                answer = pb.content.WriteContentResponse(action=request.action, offset=writer.offset, digest=writer.digest())
                if request.action == pb.content.COMMIT:
                    await whole(asyncio.to_thread(writer.commit, total, expected, dict(request.labels)))
                    answer.digest = expected or answer.digest
                elif request.action == pb.content.STAT:
                    answer.total = total or status.total
                    answer.started_at.FromNanoseconds(status.started)
                    answer.updated_at.FromNanoseconds(status.updated)
                yield answer
                if request.action == pb.content.COMMIT:
                    return
        finally:
            if writer is not None:
                writer.close()


def _refuse_known(store: NamespacedContent, writer: NamespacedWriter, ref: str, expected: str) -> None:
    try:
        store.info(expected)
    except NotFound:
        return
    writer.close()
    with contextlib.suppress(NotFound):
        store.abort(ref)
    raise AlreadyExists(f"blob with expected digest {expected} exists")


async def _append(writer: NamespacedWriter, request: Any) -> None:
    offset = writer.offset
    if request.offset > 0 and request.offset != offset:
        raise OutOfRange(f"write @{request.offset} must occur at current offset {offset}")
    if request.offset == 0 and offset > 0:
        writer.truncate(0)
    if len(request.data) <= INLINE:
        writer.write(request.data)
    else:
        await whole(asyncio.to_thread(writer.write, request.data))


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """The result of a thread's work, which is waited for also when the caller is cancelled: it uses what is closed then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _field(digest: str, size: int, labels: Mapping[str, str], path: list[str]) -> str | None:
    match path[0]:
        case "digest":
            return digest
        case "size":
            return str(size)
        case "labels" if len(path) > 1:
            return label_field(labels, path)
    return None


def _message(info: Info, labels: Mapping[str, str]) -> Any:
    message = pb.content.Info(digest=info.digest, size=info.size, labels=labels)
    message.created_at.FromNanoseconds(info.created)
    message.updated_at.FromNanoseconds(info.updated)
    return message


def _status_message(status: Status) -> Any:
    message = pb.content.Status(ref=status.ref, offset=status.offset, total=status.total, expected=status.expected)
    message.started_at.FromNanoseconds(status.started)
    message.updated_at.FromNanoseconds(status.updated)
    return message
