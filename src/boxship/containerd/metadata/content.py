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
from boxship.images.content import ContentStore, Info, Status, Writer
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from boxship.oci import digest as digests

CHUNK = 1 << 20
INLINE = 64 << 10
"""Writes up to this many bytes are not worth a change of thread."""
INGEST_LIFE_S = 24 * 3600
"""An ingest that no lease holds is dropped after this time."""

class NamespacedContent:
    """The content of one namespace; what is made is held by a lease when there is one."""

    def __init__(
        self, database: Database, files: ContentStore, namespace: str, lease: str, shared: bool,
        created: Callable[[str, int], None],
    ) -> None:
        """`created(digest, size)` is told of every blob that is new in the namespace, in the thread that commits it."""
        self._database = database
        self._files = files
        self._namespace = namespace
        self._lease = lease
        self._shared = shared
        self._created = created

    # --- blobs

    def info(self, digest: str) -> Info:
        """Raises NotFound, InvalidArgument."""
        digests.check(digest)
        with self._database.reading() as rows:
            row = rows.execute("SELECT size, created, updated FROM blobs WHERE namespace=? AND digest=?",
                               (self._namespace, digest)).fetchone()
        if row is None:
            raise NotFound(f"content digest {digest}: not found")
        return Info(digest, row[0], row[1], row[2])

    def open(self, digest: str) -> int:
        """A descriptor, the caller's to close. Raises NotFound."""
        self.info(digest)
        return self._files.open(digest)

    def path(self, digest: str) -> str:
        """Of the file. Raises NotFound."""
        self.info(digest)
        return self._files.path(digest)

    def labels(self, digest: str) -> dict[str, str]:
        """Raises NotFound."""
        with self._database.reading() as rows:
            row = rows.execute("SELECT labels FROM blobs WHERE namespace=? AND digest=?", (self._namespace, digest)).fetchone()
        if row is None:
            raise NotFound(f"content digest {digest}: not found")
        return load(row[0])

    def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add or replace; an empty value removes. Raises NotFound, InvalidArgument."""
        check_labels(dict(labels))
        with self._database.writing():
            known = {**self.labels(digest), **labels}
            self.replace_labels(digest, {key: value for key, value in known.items() if value})

    def replace_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """All of them. Raises NotFound."""
        with self._database.writing() as rows:
            done = rows.execute("UPDATE blobs SET labels=?, updated=? WHERE namespace=? AND digest=?",
                                (dump(labels), now(), self._namespace, digest))
            if done.rowcount == 0:
                raise NotFound(f"content digest {digest}: not found")

    def delete(self, digest: str) -> None:
        """The namespace knows it no longer; the file goes when none does. Raises NotFound."""
        digests.check(digest)
        with self._database.writing() as rows:
            done = rows.execute("DELETE FROM blobs WHERE namespace=? AND digest=?", (self._namespace, digest))
            if done.rowcount == 0:
                raise NotFound(f"content digest {digest}: not found")
            rows.execute("DELETE FROM resources WHERE namespace=? AND type='content' AND id=?", (self._namespace, digest))
            self._database.deletions += 1

    # --- ingests

    def writer(self, ref: str, total: int = 0, expected: str = "") -> NamespacedWriter:
        """Begin or continue. Raises AlreadyExists when the namespace has `expected`, Unavailable, NotFound for the lease."""
        if not ref:
            raise InvalidArgument("ref must not be empty: invalid argument")
        with self._database.writing() as rows:
            self._database.ensure(self._namespace)
            if expected:
                digests.check(expected)
                if self._has(rows, expected):
                    self._database.hold(self._namespace, self._lease, "content", expected)
                    raise AlreadyExists(f"content {expected}: already exists")
                shared = self._elsewhere(expected, total)
                if shared is not None:
                    return NamespacedWriter(self, ref, shared, None, expected)
            row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
            key = row[0] if row else f"{self._namespace}/{os.urandom(8).hex()}/{ref}"
            expires = 0 if self._lease else now() + INGEST_LIFE_S * 10**9
            rows.execute(
                "INSERT INTO ingests VALUES (?,?,?,?,?) ON CONFLICT (namespace, ref) DO UPDATE SET expires=excluded.expires",
                (self._namespace, ref, key, expected, expires))
            self._database.hold(self._namespace, self._lease, "ingests", ref)
            # The file of a digest that another namespace has is of no use as `expected` here: the policy says bring it.
            there = bool(expected) and os.path.exists(self._files.path(expected))
            return NamespacedWriter(self, ref, None, self._files.writer(key, total, "" if there else expected), expected)

    def status(self, ref: str) -> Status:
        """Raises NotFound."""
        with self._database.reading() as rows:
            row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
        if row is None:
            raise NotFound(f'reference "{ref}": not found')
        return _renamed(self._files.status(row[0]), ref)

    def statuses(self) -> list[Status]:
        """Sorted by ref."""
        with self._database.reading() as rows:
            found = rows.execute("SELECT ref, key FROM ingests WHERE namespace=? ORDER BY ref", (self._namespace,)).fetchall()
        made = []
        for ref, key in found:
            with contextlib.suppress(NotFound):  # committed in between
                made.append(_renamed(self._files.status(key), ref))
        return made

    def abort(self, ref: str) -> None:
        """Raises NotFound."""
        with self._database.writing() as rows:
            row = rows.execute("SELECT key FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref)).fetchone()
            if row is None:
                raise NotFound(f'reference "{ref}": not found')
            self._forget(rows, ref)
            with contextlib.suppress(NotFound):
                self._files.abort(row[0])

    def _has(self, rows: Any, digest: str) -> bool:
        query = "SELECT 1 FROM blobs WHERE namespace=? AND digest=?"
        return rows.execute(query, (self._namespace, digest)).fetchone() is not None

    def _elsewhere(self, digest: str, total: int) -> int | None:
        """The size of content that another namespace has, when the policy lets this one see it."""
        if not self._shared:
            return None
        try:
            size = self._files.info(digest).size
        except NotFound:
            return None
        return size if total in (0, size) else None

    def _forget(self, rows: Any, ref: str) -> None:
        rows.execute("DELETE FROM ingests WHERE namespace=? AND ref=?", (self._namespace, ref))
        rows.execute("DELETE FROM resources WHERE namespace=? AND type='ingests' AND id=?", (self._namespace, ref))

    def _adopt(self, ref: str, digest: str, size: int, labels: Mapping[str, str]) -> bool:
        """Let the namespace have a blob; False when it has it already."""
        with self._database.writing() as rows:
            known = self._has(rows, digest)
            if not known:
                rows.execute("INSERT INTO blobs VALUES (?,?,?,?,?,?)",
                             (self._namespace, digest, size, now(), now(), dump(labels)))
            self._forget(rows, ref)
            self._database.hold(self._namespace, self._lease, "content", digest)
        return not known


class NamespacedWriter:
    """An ingest of one namespace; content that another namespace has needs no writing."""

    def __init__(self, content: NamespacedContent, ref: str, shared: int | None, writer: Writer | None, expected: str) -> None:
        self._content = content
        self._ref = ref
        self._shared = shared
        self._writer = writer
        self._expected = expected

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._writer.offset if self._writer is not None else self._shared or 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append. Raises ResourceExhausted, FailedPrecondition."""
        if self._writer is None:
            raise FailedPrecondition(f"content {self._expected} is whole already")
        return self._writer.write(data)

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes."""
        if self._writer is not None:
            self._writer.truncate(size)
        elif size != self._shared:
            # The caller wants to bring it himself.
            content = self._content
            isolated = NamespacedContent(content._database, content._files, content._namespace, content._lease, False,
                                         content._created)
            self._writer = isolated.writer(self._ref, 0, self._expected)._writer
            assert self._writer is not None
            self._writer.truncate(size)

    def digest(self) -> str:
        """Of what is written so far."""
        return self._writer.digest() if self._writer is not None else self._expected

    def status(self) -> Status:
        """As of now."""
        if self._writer is not None:
            return _renamed(self._writer.status(), self._ref)
        return Status(self._ref, self.offset, self.offset, now(), now(), self._expected)

    def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> None:
        """Make it the namespace's. Raises AlreadyExists when it is, FailedPrecondition for other content, ResourceExhausted."""
        check_labels(dict(labels or {}))
        expected = expected or self._expected
        content = self._content
        # The lock keeps a collection from seeing the file without its row.
        with content._database.lock:
            written = self.offset
            if self._writer is None:
                if (size and size != written) or expected != self._expected:
                    raise FailedPrecondition(f"unexpected commit of {self._expected}: failed precondition")
                digest = self._expected
                content._files.info(digest)
            else:
                with contextlib.suppress(AlreadyExists):
                    self._writer.commit(size, expected)
                digest = expected or self._writer.digest()
            if not content._adopt(self._ref, digest, written, labels or {}):
                raise AlreadyExists(f"content {digest}: already exists")
        content._created(digest, written)

    def close(self) -> None:
        """Let go of the ref."""
        if self._writer is not None:
            self._writer.close()


def _renamed(status: Status, ref: str) -> Status:
    return Status(ref, status.offset, status.total, status.started, status.updated, status.expected)


class Content:
    """containerd.services.content.v1.Content."""

    def __init__(
        self, database: Database, files: ContentStore, exchange: Exchange, collect: Collect, shared: bool = True,
    ) -> None:
        """`shared`: whether a namespace may have what another one has brought, by naming its digest."""
        self._database = database
        self._files = files
        self._exchange = exchange
        self._collect = collect
        self._shared = shared

    def store(self, call: Call) -> NamespacedContent:
        """The content of the call's namespace for callers in this process. Raises FailedPrecondition without a namespace."""
        namespace = call.required_namespace()
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None

        def created(digest: str, size: int) -> None:
            event = pb.content_events.ContentCreate(digest=digest, size=size)
            if loop is not None:
                loop.call_soon_threadsafe(self._exchange.publish, namespace, "/content/create", event)

        return NamespacedContent(self._database, self._files, namespace, call.lease, self._shared, created)

    async def Info(self, request: Any, call: Call) -> Any:
        """Raises NotFound, InvalidArgument."""
        store = self.store(call)
        return pb.content.InfoResponse(info=_message(store.info(request.digest), store.labels(request.digest)))

    async def Update(self, request: Any, call: Call) -> Any:
        """The labels, or those that the mask names. Raises NotFound, InvalidArgument."""
        store, given = self.store(call), request.info
        digests.check(given.digest)
        with self._database.writing():
            known = store.labels(given.digest)
            for path in list(request.update_mask.paths) or ["labels"]:
                if path == "labels":
                    known = dict(given.labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    known[key] = given.labels.get(key, "")
                else:
                    raise InvalidArgument(f'cannot update "{path}" field on content info "{given.digest}": invalid argument')
            known = {key: value for key, value in known.items() if value}
            check_labels(known)
            store.replace_labels(given.digest, known)
            self._database.deletions += 1
        return pb.content.UpdateResponse(info=_message(store.info(given.digest), known))

    async def List(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Those that pass one of the filters, a hundred in a message. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        with self._database.reading() as rows:
            found = rows.execute("SELECT digest, size, created, updated, labels FROM blobs WHERE namespace=? ORDER BY digest",
                                 (call.required_namespace(),)).fetchall()
        batch: list[Any] = []
        for digest, size, created, updated, text in found:
            labels = load(text)
            if not accept(lambda path, digest=digest, size=size, labels=labels: _field(digest, size, labels, path)):  # type: ignore[misc]
                continue
            batch.append(_message(Info(digest, size, created, updated), labels))
            if len(batch) == 100:
                yield pb.content.ListContentResponse(info=batch)
                batch = []
        if batch:
            yield pb.content.ListContentResponse(info=batch)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """Raises NotFound."""
        self.store(call).delete(request.digest)
        self._exchange.publish(call.namespace, "/content/delete", pb.content_events.ContentDelete(digest=request.digest))
        self._collect(False)
        return Empty()

    async def Read(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """From `offset`, `size` bytes (0: to the end), in chunks of a mebibyte. Raises NotFound, OutOfRange."""
        store = self.store(call)
        length = store.info(request.digest).size
        offset, size = request.offset, request.size or length - request.offset
        if offset < 0 or size < 0 or offset + size > length:
            raise OutOfRange(f"read past object length {length} bytes: out of range")
        fd = store.open(request.digest)
        try:
            end = offset + size
            while offset < end:
                wanted = min(CHUNK, end - offset)
                if wanted <= INLINE:
                    data = os.pread(fd, wanted, offset)
                else:
                    data = await asyncio.to_thread(os.pread, fd, wanted, offset)
                if not data:
                    raise OutOfRange(f"content {request.digest} ends at {offset} bytes, {length} were recorded")
                yield pb.content.ReadContentResponse(offset=offset, data=data)
                offset += len(data)
        finally:
            os.close(fd)

    async def Status(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        return pb.content.StatusResponse(status=_status_message(self.store(call).status(request.ref)))

    async def ListStatuses(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters, whose only field is `ref`. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        return pb.content.ListStatusesResponse(statuses=[
            _status_message(status) for status in self.store(call).statuses()
            if accept(lambda path, ref=status.ref: ref if path == ["ref"] else None)  # type: ignore[misc]
        ])

    async def Abort(self, request: Any, call: Call) -> Empty:
        """Raises NotFound."""
        self.store(call).abort(request.ref)
        return Empty()

    async def Write(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        """One ingest: the first message names it, each is answered. Raises what `NamespacedContent.writer` and `commit` raise."""
        store = self.store(call)
        writer: NamespacedWriter | None = None
        total, expected = 0, ""
        try:
            async for request in requests:
                if writer is None:
                    total, expected = request.total, request.expected
                    writer = store.writer(request.ref, total, expected)
                elif request.expected and expected and request.expected != expected:
                    raise InvalidArgument(f"commit digest differs from initial digest: {request.expected} != {expected}")
                if request.total and total and request.total != total:
                    raise FailedPrecondition(f"commit total {request.total} differs from initial total {total}")
                total, expected = total or request.total, expected or request.expected
                committed = request.action == pb.content.COMMIT
                if request.action != pb.content.STAT:
                    await _write(writer, request, total)
                if committed:
                    size = writer.offset
                    await asyncio.to_thread(writer.commit, total, expected, dict(request.labels))
                    answer = pb.content.WriteContentResponse(action=request.action, offset=size, total=size,
                                                             digest=expected or writer.digest())
                    answer.started_at.FromNanoseconds(now())
                    answer.updated_at.FromNanoseconds(now())
                    yield answer
                    return
                status = writer.status()
                answer = pb.content.WriteContentResponse(action=request.action, offset=status.offset,
                                                         total=total or status.total, digest=writer.digest())
                answer.started_at.FromNanoseconds(status.started)
                answer.updated_at.FromNanoseconds(status.updated)
                yield answer
        finally:
            if writer is not None:
                writer.close()


async def _write(writer: NamespacedWriter, request: Any, total: int) -> None:
    offset = writer.offset
    if request.offset > offset:
        raise OutOfRange(f"write @{request.offset} must occur at current offset {offset}: out of range")
    # A commit that brings nothing may leave its offset out.
    if request.offset < offset and (request.data or request.action == pb.content.WRITE):
        writer.truncate(request.offset)
    if not request.data:
        return
    if total and writer.offset + len(request.data) > total:
        raise OutOfRange(f"write extends past the total of {total} bytes: out of range")
    if len(request.data) <= INLINE:
        writer.write(request.data)
    else:
        await asyncio.to_thread(writer.write, request.data)


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


__all__ = ["Content", "NamespacedContent", "NamespacedWriter"]
