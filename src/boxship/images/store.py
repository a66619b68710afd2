"""What pulling, pushing and archives need of a content store.

Runs in: the daemon; tools and tests with a store of plain files.

Two forms of one thing:

    Store     synchronous and local: the content store of files (`boxship.images.content`) as one namespace and lease see it
    Blobs     asynchronous, wherever the content is: `LocalBlobs` over a Store, `boxship.images.service.ServiceBlobs` over
              the Content service, ours or a real containerd's

A Store is used from the event loop's thread, except that a Writer's `write`, `truncate` and `commit` are called from a
worker thread (commit syncs to the disk), one call at a time for each Writer.

Not here: garbage collection, which is the store's; the labels that keep content from it are set here (`boxship.images.labels`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Mapping
from types import TracebackType
from typing import Protocol

from boxship.kit.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, from_os_error
from boxship.oci.image import Descriptor

CHUNK = 1 << 20
"""Bytes that are read or written at once where nothing else decides."""

INLINE = 64 << 10
"""Writes up to this size are not worth a change of thread."""


class Info(Protocol):
    """What a store knows of a blob."""

    @property
    def digest(self) -> str: ...

    @property
    def size(self) -> int: ...


class Writer(Protocol):
    """An ingest under way. It holds its ref until `close`."""

    @property
    def offset(self) -> int:
        """Bytes written so far, those of an earlier attempt that is resumed included."""

    def write(self, data: bytes | bytearray | memoryview) -> object:
        """Append."""

    def truncate(self, size: int) -> None:
        """Go back to `size` bytes (0: start again)."""

    def digest(self) -> str:
        """Of what has been written so far."""

    def commit(self, size: int = 0, expected: str = "") -> None:
        """Make it a blob, durably. Raises AlreadyExists when there is one, FailedPrecondition when size or digest differ."""

    def close(self) -> None:
        """Let go of the ref; what is not committed stays to be resumed or aborted."""


class Store(Protocol):
    """Content by digest, as one namespace sees it."""

    def info(self, digest: str) -> Info:
        """Raises NotFound."""

    def open(self, digest: str) -> int:
        """A descriptor of the blob's file, the caller's to close. Raises NotFound."""

    def writer(self, ref: str, total: int = 0, expected: str = "") -> Writer:
        """Start or resume the ingest `ref`. Raises Unavailable when another holds it, AlreadyExists when `expected` is there."""

    def abort(self, ref: str) -> None:
        """Drop an ingest. Raises NotFound."""

    def labels(self, digest: str) -> Mapping[str, str]:
        """Of a blob. Raises NotFound."""

    def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add or replace labels of a blob; a label whose value is "" is removed. Raises NotFound."""


class AsyncWriter(Protocol):
    """As Writer; `async with` closes it."""

    @property
    def offset(self) -> int:
        """Bytes written so far, those of an earlier attempt included."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append."""

    async def truncate(self, size: int) -> None:
        """Go back to `size` bytes."""

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> str:
        """Make it a blob and return its digest; that it is there already is no error. Raises FailedPrecondition."""

    async def close(self) -> None:
        """Let go of the ref."""

    async def __aenter__(self) -> AsyncWriter: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Blobs(Protocol):
    """Content by digest, wherever it is."""

    async def size(self, digest: str) -> int:
        """Raises NotFound."""

    def stream(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """The blob from `offset` on, in chunks. Raises NotFound."""

    async def writer(self, ref: str, total: int = 0, expected: str = "") -> AsyncWriter:
        """As Store's."""

    async def abort(self, ref: str) -> None:
        """Drop an ingest, if there is one."""

    async def labels(self, digest: str) -> Mapping[str, str]:
        """Raises NotFound."""

    async def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add or replace labels. Raises NotFound."""

    def local(self) -> Store | None:
        """The Store below, when the content lies in files of this process's own."""


async def exists(blobs: Blobs, digest: str) -> bool:
    """Whether the blob is there."""
    try:
        await blobs.size(digest)
    except NotFound:
        return False
    return True


async def read(blobs: Blobs, descriptor: Descriptor, limit: int) -> bytes:
    """The whole of a small blob, verified. Raises NotFound, InvalidArgument (above `limit`), DataLoss (not that content)."""
    if descriptor.size > limit:
        raise InvalidArgument(f"{descriptor.digest} is {descriptor.size} bytes, and no more than {limit} are read")
    size = await blobs.size(descriptor.digest)
    if size != descriptor.size:
        raise DataLoss(f"{descriptor.digest} has {size} bytes in the store, expected {descriptor.size}")
    data = b"".join([chunk async for chunk in blobs.stream(descriptor.digest)])
    try:
        descriptor.verify(data)
    except InvalidArgument as error:
        raise DataLoss(f"content store: {error}") from None
    return data


async def write(blobs: Blobs, ref: str, data: bytes, digest: str, labels: Mapping[str, str] | None = None) -> None:
    """Store a small blob that is in memory; `labels` are set also when it is there already."""
    if not await exists(blobs, digest):
        writer = await blobs.writer(ref, len(data), digest)
        async with writer:
            # What is whole from the beginning is content that another namespace has brought.
            if writer.offset != len(data):
                if writer.offset:
                    await writer.truncate(0)
                await writer.write(data)
            await writer.commit(len(data), digest, labels)
    if labels:
        await blobs.set_labels(digest, labels)


class LocalBlobs:
    """A Store's content for asynchronous callers: what takes long is done in worker threads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def local(self) -> Store | None:
        return self._store

    async def size(self, digest: str) -> int:
        return self._store.info(digest).size

    async def stream(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        fd = self._store.open(digest)
        try:
            while True:
                try:
                    chunk = await asyncio.to_thread(os.pread, fd, CHUNK, offset)
                except OSError as error:
                    raise from_os_error(error, f"reading {digest}") from None
                if not chunk:
                    return
                offset += len(chunk)
                yield chunk
        finally:
            os.close(fd)

    async def writer(self, ref: str, total: int = 0, expected: str = "") -> AsyncWriter:
        return LocalWriter(self._store, self._store.writer(ref, total, expected))

    async def abort(self, ref: str) -> None:
        try:
            self._store.abort(ref)
        except NotFound:
            pass

    async def labels(self, digest: str) -> Mapping[str, str]:
        return self._store.labels(digest)

    async def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        self._store.set_labels(digest, labels)


class LocalWriter:
    """A Writer for asynchronous callers."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self._store = store
        self.writer = writer
        """What a worker thread may use by itself."""

    @property
    def offset(self) -> int:
        return self.writer.offset

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        if len(data) <= INLINE:
            self.writer.write(data)
        else:
            await _whole(asyncio.to_thread(self.writer.write, data))

    async def truncate(self, size: int) -> None:
        await _whole(asyncio.to_thread(self.writer.truncate, size))

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> str:
        digest = expected or self.writer.digest()
        try:
            await _whole(asyncio.to_thread(self.writer.commit, size, expected))
        except AlreadyExists:
            pass
        if labels:
            self._store.set_labels(digest, labels)
        return digest

    async def close(self) -> None:
        self.writer.close()

    async def __aenter__(self) -> LocalWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _whole(work: Coroutine[object, object, object]) -> None:
    """Wait for a thread's work to its end even when cancelled: the writer must not be closed under it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
