"""An image from a content store into a registry.

Runs in: the daemon's event loop.
Spec: distribution-spec "Push" (content first, what refers to it after); Docker's choice where only some platforms of an
image are here: the whole index when all of it is, otherwise the one image that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from boxship.images import media, platforms, progress
from boxship.images.progress import Callback, Meter
from boxship.images.pull import run_all, unique
from boxship.images.registry import Repository, decode_known
from boxship.images.store import Blobs, exists, read
from boxship.kit.errors import NotFound
from boxship.oci.image import MAX_MANIFEST, Descriptor, Index, Manifest, Platform

PARALLEL = 4


@dataclass(frozen=True)
class _Node:
    """A manifest or index with what is below it."""

    descriptor: Descriptor
    data: bytes
    document: Manifest | Index | None
    manifests: tuple[_Node, ...]
    blobs: tuple[Descriptor, ...]


class Pusher:
    """Stores an image, or the part of it that is here, in a repository."""

    def __init__(
        self, repository: Repository, blobs: Blobs, *, wanted: Sequence[Platform] = (), callback: Callback | None = None,
        parallel: int = PARALLEL, chunk: int = 0,
    ) -> None:
        """`wanted`: these platforms only; empty: all, if all are here. `chunk`: bytes of each chunk of an upload, 0: none."""
        self._repository = repository
        self._blobs = blobs
        self._wanted = list(wanted)
        self._callback = callback
        self._limit = asyncio.Semaphore(parallel)
        self._chunk = chunk
        self._blob_tasks: dict[str, asyncio.Task[None]] = {}

    async def push(self, target: Descriptor, tags: Sequence[str], name: str = "") -> Descriptor:
        """Push `target` under `tags` (none: by its digest alone); returns what was pushed, which may be one image of an index.

        `name`: what events name as the parent of what is pushed.

        Raises NotFound when content that the image needs is not in the store, and what the registry's client raises.
        """
        node = await self._read(target)
        chosen = await self._choose(node)
        self._blob_tasks = {}
        try:
            await self._tree(chosen, tags, (name,) if name else ())
        finally:
            for task in self._blob_tasks.values():
                task.cancel()
            await asyncio.gather(*self._blob_tasks.values(), return_exceptions=True)
        return chosen.descriptor

    async def _read(self, descriptor: Descriptor) -> _Node:
        """The tree below a manifest; parts that are not in the store raise NotFound only when something needs them."""
        data = await read(self._blobs, descriptor, MAX_MANIFEST)
        document = decode_known(data, descriptor.media_type, descriptor.digest)
        manifests, blobs = [], []
        for child in unique(media.children(document)):
            if not media.is_manifest(child.media_type) and not media.is_index(child.media_type):
                blobs.append(child)
            elif await exists(self._blobs, child.digest):
                manifests.append(await self._read(child))
        return _Node(descriptor, data, document, tuple(manifests), tuple(blobs))

    async def _choose(self, node: _Node) -> _Node:
        """The whole tree, or the image in it that is complete and wanted."""
        if not isinstance(node.document, Index):
            return node
        missing = await self._missing(node)
        if not self._wanted and missing is None:
            return node
        matcher = platforms.any_of(self._wanted or [platforms.host()])
        complete = {each.descriptor.digest: each for each in node.manifests if await self._missing(each) is None}
        for descriptor in platforms.choose(node.document.manifests, matcher):
            if descriptor.digest in complete:
                return complete[descriptor.digest]
        images = [each for each in complete.values() if _is_image(node.document, each.descriptor)]
        if not self._wanted and len(images) == 1:
            return images[0]
        raise NotFound(
            f"content of {missing or matcher.name} is not in the store",
            "pull the image with all platforms, or name the platform that is to be pushed",
        )

    async def _missing(self, node: _Node) -> str | None:
        """The digest of something below that is not in the store."""
        if isinstance(node.document, Index):
            there = {each.descriptor.digest for each in node.manifests}
            for descriptor in node.document.manifests:
                if descriptor.digest not in there:
                    return descriptor.digest
        for child in node.manifests:
            missing = await self._missing(child)
            if missing is not None:
                return missing
        for blob in node.blobs:
            if media.is_distributable(blob.media_type) and not await exists(self._blobs, blob.digest):
                return blob.digest
        return None

    async def _tree(self, node: _Node, tags: Sequence[str], parents: tuple[str, ...]) -> None:
        meter = Meter(self._callback, node.descriptor, parents)
        meter.tell(progress.WAITING)
        below = (meter.name,)
        await run_all([
            *(self._tree(child, (), below) for child in node.manifests),
            *(self._once(blob, below) for blob in node.blobs if media.is_distributable(blob.media_type)),
        ])
        await self._repository.push_manifest(node.data, node.descriptor.media_type, tags, node.descriptor.digest)
        meter.tell(progress.COMPLETE, node.descriptor.size)

    async def _once(self, descriptor: Descriptor, parents: tuple[str, ...]) -> None:
        """A blob of several manifests is pushed once."""
        task = self._blob_tasks.get(descriptor.digest)
        if task is None:
            task = self._blob_tasks[descriptor.digest] = asyncio.ensure_future(self._blob(descriptor, parents))
        await asyncio.shield(task)

    async def _blob(self, descriptor: Descriptor, parents: tuple[str, ...]) -> None:
        meter = Meter(self._callback, descriptor, parents)
        meter.tell(progress.WAITING)
        repository = self._repository
        labels = await self._blobs.labels(descriptor.digest)

        def body(offset: int) -> AsyncIterator[bytes]:
            return self._blobs.stream(descriptor.digest, offset)

        async with self._limit:
            pushed = await repository.push_blob(
                descriptor, body, chunk=self._chunk, progress=lambda done: meter.moved(progress.UPLOADING, done),
                sources=media.mount_candidates(labels, repository.registry, repository.name),
            )
        added = media.source_label(labels, repository.registry, repository.name)
        if added:
            await self._blobs.set_labels(descriptor.digest, added)
        if pushed.mounted_from:
            meter.tell(progress.MOUNTED, descriptor.size, pushed.mounted_from)
        else:
            meter.tell(progress.EXISTS if pushed.existed else progress.COMPLETE, descriptor.size)


def _is_image(index: Index, descriptor: Descriptor) -> bool:
    """Whether the index has it as an image, not as an attestation about one."""
    entry = next((each for each in index.manifests if each.digest == descriptor.digest), descriptor)
    return not (entry.platform is not None and entry.platform.architecture == "unknown")
