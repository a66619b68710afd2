"""A content store behind containerd's Content service: ours in this process, or a real one's by its socket.

Runs in: the daemon's event loop.
Spec: containerd API, services/content/v1. An ingest's writer is one Write call, which is answered message by message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.images.store import AsyncWriter, Blobs, LocalBlobs, Store
from boxship.kit.errors import AlreadyExists, Internal, NotFound, Unavailable
from boxship.oci.image import Descriptor, Platform

MESSAGE = 1 << 20
"""Bytes of content in one message."""


def blobs(content: Any, call: Call) -> Blobs:
    """The content of a namespace. A service of this process that gives its files away (`store(call)`) is used directly."""
    opener = getattr(content, "store", None)
    if callable(opener):
        store: Store = opener(call)
        return LocalBlobs(store)
    return ServiceBlobs(content, call)


class ServiceBlobs:
    """Content through the Content service."""

    def __init__(self, content: Any, call: Call) -> None:
        self._content = content
        self._call = call

    def local(self) -> Store | None:
        return None

    async def size(self, digest: str) -> int:
        answer = await self._content.Info(pb.content.InfoRequest(digest=digest), self._call)
        return int(answer.info.size)

    async def stream(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        # A read that begins at the end is refused by containerd.
        if offset >= await self.size(digest):
            return
        async for answer in self._content.Read(pb.content.ReadContentRequest(digest=digest, offset=offset), self._call):
            yield answer.data

    async def writer(self, ref: str, total: int = 0, expected: str = "") -> AsyncWriter:
        made = ServiceWriter(self._content, self._call, ref, total, expected)
        await made.start()
        return made

    async def abort(self, ref: str) -> None:
        try:
            await self._content.Abort(pb.content.AbortRequest(ref=ref), self._call)
        except NotFound:
            pass

    async def labels(self, digest: str) -> Mapping[str, str]:
        answer = await self._content.Info(pb.content.InfoRequest(digest=digest), self._call)
        return dict(answer.info.labels)

    async def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        request = pb.content.UpdateRequest(info=pb.content.Info(digest=digest, labels=labels))
        request.update_mask.paths.extend(f"labels.{key}" for key in labels)
        await self._content.Update(request, self._call)


class ServiceWriter:
    """A Write call under way."""

    def __init__(self, content: Any, call: Call, ref: str, total: int, expected: str) -> None:
        self._ref = ref
        self._total = total
        self._expected = expected
        self._requests: asyncio.Queue[Any] = asyncio.Queue(1)
        self._answers = content.Write(self._sent(), call)
        self._offset = 0
        self._digest = ""
        self._ended = False

    async def _sent(self) -> AsyncIterator[Any]:
        while True:
            request = await self._requests.get()
            if request is None:
                return
            yield request

    async def _ask(self, action: Any, **fields: Any) -> Any:
        """One message and its answer. Once the call has failed its error is raised."""
        await self._requests.put(pb.content.WriteContentRequest(
            action=action, ref=self._ref, total=self._total, expected=self._expected, **fields
        ))
        try:
            answer = await anext(self._answers)
        except StopAsyncIteration:
            self._ended = True
            raise Unavailable(f"writing {self._ref}: the content service ended the call") from None
        except BaseException:
            self._ended = True
            raise
        self._offset = answer.offset
        self._digest = answer.digest or self._digest
        return answer

    async def start(self) -> None:
        """Open the ingest. Raises Unavailable when another holds it, AlreadyExists when the content is there."""
        try:
            await self._ask(pb.content.STAT)
        except BaseException:
            await self.close()
            raise

    @property
    def offset(self) -> int:
        return self._offset

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), MESSAGE):
            part = bytes(view[begin:begin + MESSAGE])
            expected = self._offset + len(part)
            answer = await self._ask(pb.content.WRITE, offset=self._offset, data=part)
            if answer.offset != expected:
                raise Internal(f"writing {self._ref}: the content service is at {answer.offset}, expected {expected}")

    async def truncate(self, size: int) -> None:
        # A message whose offset lies before the end makes the service go back; only to the beginning in containerd.
        await self._ask(pb.content.WRITE, offset=size)

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> str:
        self._expected = expected or self._expected
        self._total = size or self._total
        try:
            await self._ask(pb.content.COMMIT, offset=self._offset, labels=labels or {})
        except AlreadyExists:
            if not self._expected and not self._digest:
                raise
        return self._expected or self._digest

    async def close(self) -> None:
        if self._requests.empty():
            await self._requests.put(None)
        await self._answers.aclose()

    async def __aenter__(self) -> ServiceWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def to_message(descriptor: Descriptor) -> Any:
    """A descriptor as the API has it."""
    return pb.types.Descriptor(
        media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size, annotations=descriptor.annotations
    )


def from_message(message: Any) -> Descriptor:
    """A descriptor of the API."""
    return Descriptor(
        media_type=message.media_type, digest=message.digest, size=message.size, annotations=dict(message.annotations)
    )


def platform_from_message(message: Any) -> Platform:
    """A platform of the API."""
    return Platform(
        os=message.os, architecture=message.architecture, variant=message.variant, os_version=message.os_version,
        os_features=list(message.os_features),
    )
