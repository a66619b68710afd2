"""The metadata of a daemon in a folder, with the native snapshotter, for tests that want no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.events import Exchange
from boxship.containerd.metadata.store import Metadata
from boxship.containerd.snapshots.native import NativeDriver
from boxship.oci import digest as digests

CALL = Call("one")
OTHER = Call("two")
ROOT = {"containerd.io/gc.root": "1"}


class Daemon:
    """Services by attribute; `events` has the topics that were published."""

    def __init__(self, root: str, tables: dict[str, dict[str, Any]] | None = None) -> None:
        self.events: list[tuple[str, str]] = []
        exchange = Exchange()
        exchange.publish = lambda namespace, topic, event: self.events.append((namespace, topic))  # type: ignore[method-assign]
        self.metadata = Metadata(root, exchange, {"native": NativeDriver(f"{root}/io.containerd.snapshotter.v1.native")}, tables)
        for name, service in self.metadata.services.items():
            setattr(self, name, service)
        self.database, self.files, self.collector = self.metadata.database, self.metadata.files, self.metadata.collector

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def put(self, data: bytes, call: Call = CALL, labels: dict[str, str] | None = None) -> str:
        """Content in a namespace; its digest."""
        digest = digests.of(data)
        writer = self.content.store(call).writer(f"ref-{digest}", len(data), digest)
        if writer.offset == 0:
            writer.write(data)
        writer.commit(len(data), digest, labels)
        writer.close()
        return digest

    def blobs(self) -> set[str]:
        """The digests of all files."""
        return {info.digest for info in self.files.walk()}


def run(root: Any, work: Callable[[Daemon], Awaitable[None]], tables: dict[str, dict[str, Any]] | None = None) -> None:
    """Open what is at `root`, do `work` and close it. Nothing is collected but by request."""

    async def main() -> None:
        daemon = Daemon(str(root), tables)
        try:
            await work(daemon)
        finally:
            await daemon.metadata.close()

    asyncio.run(main())


def image(name: str, digest: str, labels: dict[str, str] | None = None) -> Any:
    return pb.images.CreateImageRequest(image=pb.images.Image(
        name=name, labels=labels, target=pb.types.Descriptor(digest=digest, size=1, media_type="m")))


def container(name: str, snapshot: str = "", labels: dict[str, str] | None = None) -> Any:
    request = pb.containers.CreateContainerRequest()
    request.container.id, request.container.runtime.name = name, "io.containerd.runc.v2"
    request.container.spec.type_url = "x"
    request.container.labels.update(labels or {})
    if snapshot:
        request.container.snapshotter, request.container.snapshot_key = "native", snapshot
    return request


async def gathered(responses: AsyncIterator[Any]) -> list[Any]:
    return [response async for response in responses]


async def given(*requests: Any) -> AsyncIterator[Any]:
    for request in requests:
        yield request
