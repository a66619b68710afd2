"""An image from a registry into a content store, layers unpacked while others still arrive.

Runs in: the daemon's event loop; hashing and writing in worker threads.
Spec: containerd docs/content-flow.md (order, labels); distribution-spec "Pull".

Every blob is hashed while it is written and becomes content only under its digest; what turns out to be something else is
dropped. A download that breaks is continued where it stopped, and one that ends in failure leaves no ingest behind
unless it is asked to (`keep_partial`). What several pulls want at the same time is fetched once (`Flights`).
Not here: what names the image (`boxship.images.transfer`), unpacking itself (`Unpacker`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from boxship.images import media, platforms, progress
from boxship.images.progress import Callback, Meter
from boxship.images.registry import Repository, decode_known
from boxship.images.store import AsyncWriter, Blobs, exists, read, write
from boxship.kit.errors import (
    AlreadyExists,
    BoxshipError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from boxship.oci import text
from boxship.oci.image import MAX_MANIFEST, Descriptor, Image, Index, Manifest, Platform
from boxship.oci.reference import Reference

PARALLEL = 4
"""Blobs of one pull that are downloaded at the same time."""

CONFIG_LIMIT = 64 << 20
BLOCK = 1 << 20
"""Bytes that are gathered before they are handed to the thread that hashes and writes."""

_DEPTH = 8
_BUSY_S = 0.05
_BUSY_MAX_S = 1.0


@dataclass(frozen=True)
class Layer:
    """A layer of an image as unpacking needs it."""

    descriptor: Descriptor
    diff_id: str


class Unpacker(Protocol):
    """Makes what containers are started from out of an image's layers."""

    def wants(self, platform: Platform) -> bool:
        """Whether an image for this platform is to be unpacked."""

    async def unpack(
        self, layers: Sequence[Layer], config: Descriptor, platform: Platform, ready: Callable[[Descriptor], Awaitable[None]],
        progress: Callback | None,
    ) -> None:
        """Unpack the layers, bottom-most first; `ready(descriptor)` returns when the layer's blob is in the store.

        When it is cancelled or fails it leaves nothing half-made behind.
        """


class Flights:
    """Work that several may want at the same time and that is done once, by whoever came first.

    It is done with the first one's rights, over his connections and under his lease. So when he fails or gives up, one of
    those who waited does it again for himself.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    async def join(
        self, key: Hashable, work: Callable[[Flight], Coroutine[object, object, None]], listener: Callable[[str, int], None]
    ) -> bool:
        """Do the work, or wait until another has done it; whether it was done here. Raises what the work raises here."""
        while (flight := self._flights.get(key)) is not None:
            if await flight.wait(listener):
                return False
        flight = self._flights[key] = Flight(listener)
        done = False
        try:
            await work(flight)
            done = True
        finally:
            del self._flights[key]
            flight.land(done)
        return True


class Flight:
    """Work under way."""

    def __init__(self, listener: Callable[[str, int], None]) -> None:
        self._listeners = [listener]
        self._landed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def tell(self, event: str, done: int) -> None:
        """Tell everybody who wants it."""
        for listener in self._listeners:
            listener(event, done)

    def shared(self) -> bool:
        """Whether others than the one who does it want it."""
        return len(self._listeners) > 1

    async def wait(self, listener: Callable[[str, int], None]) -> bool:
        """Whether it was done in the end."""
        self._listeners.append(listener)
        try:
            return await asyncio.shield(self._landed)
        finally:
            self._listeners.remove(listener)

    def land(self, done: bool) -> None:
        """The end."""
        self._landed.set_result(done)


class Fetcher:
    """Fetches an image of a repository, or parts of it, into a store."""

    def __init__(
        self, repository: Repository, blobs: Blobs, *, wanted: Sequence[Platform] | None = None, unpacker: Unpacker | None = None,
        callback: Callback | None = None, parallel: int = PARALLEL, flights: Flights | None = None, scope: Hashable = "",
        keep_partial: bool = False, all_metadata: bool = False,
    ) -> None:
        """`wanted`: platforms; None: this machine's, empty: all. `scope`: what `flights` are shared within (a namespace).

        `all_metadata`: manifest and configuration of every other platform come too, without the layers.
        """
        self._repository = repository
        self._blobs = blobs
        self._wanted = [platforms.host()] if wanted is None else list(wanted)
        self._unpacker = unpacker
        self._callback = callback
        self._limit = asyncio.Semaphore(parallel)
        self._flights = flights if flights is not None else Flights()
        self._scope = scope
        self._keep = keep_partial
        self._all_metadata = all_metadata
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def resolve(self, reference: Reference) -> Descriptor:
        """The descriptor of what the reference names; the manifest is stored when it had to be fetched for that."""
        pinned = reference.pinned()
        descriptor, data = await self._repository.resolve(pinned.digest or pinned.tag)
        if data is not None:
            await write(self._blobs, media.ref(descriptor), data, descriptor.digest)
        return descriptor

    async def fetch(self, target: Descriptor, name: str = "") -> None:
        """Fetch `target` and all that it refers to for the platforms that are wanted, and unpack it. All of it or an error.

        `name`: what events name as the parent of the target.
        """
        try:
            await self._tree(target, (name,) if name else (), 0)
        finally:
            # Of several that failed at once, all have ended before the caller learns of the first.
            tasks = [task for task in self._tasks.values() if not task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._tasks.clear()

    async def _tree(self, descriptor: Descriptor, parents: tuple[str, ...], depth: int) -> None:
        if depth > _DEPTH:
            raise InvalidArgument(f"{self._repository.reference.name}: indexes within indexes, more than {_DEPTH} deep")
        if not media.is_index(descriptor.media_type) and not media.is_manifest(descriptor.media_type):
            await self._blob(descriptor, parents)
            return
        document = await self._manifest(descriptor, parents)
        parents = (media.ref(descriptor),)
        if isinstance(document, Index):
            chosen = await self._choose(document, parents)
            others = [each for each in document.manifests if each not in chosen] if self._all_metadata else []
            await run_all([
                *(self._tree(child, parents, depth + 1) for child in chosen),
                *(self._metadata(child, parents) for child in others),
            ])
        elif isinstance(document, Manifest):
            await self._image(document, parents)

    async def _metadata(self, descriptor: Descriptor, parents: tuple[str, ...]) -> None:
        """Manifest and configuration of an image of which nothing else is wanted."""
        if media.is_manifest(descriptor.media_type):
            document = await self._manifest(descriptor, parents)
            if isinstance(document, Manifest):
                await self._blob(document.config, (media.ref(descriptor),))

    async def _manifest(self, descriptor: Descriptor, parents: tuple[str, ...]) -> Manifest | Index | None:
        """The document, which is stored with the labels that keep its children."""
        meter = Meter(self._callback, descriptor, parents)
        what = f"{self._repository.reference.name}@{descriptor.digest}"
        there = await self._has(descriptor)
        if there:
            data = await read(self._blobs, descriptor, MAX_MANIFEST)
        else:
            meter.tell(progress.WAITING)
            data = await self._repository.manifest(descriptor)
        document = decode_known(data, descriptor.media_type, what)
        labels = media.child_labels(media.children(document))
        await write(self._blobs, media.ref(descriptor), data, descriptor.digest, labels)
        await self._label_source(descriptor)
        meter.tell(progress.EXISTS if there else progress.COMPLETE, descriptor.size)
        return document

    async def _choose(self, index: Index, parents: tuple[str, ...]) -> list[Descriptor]:
        """The best manifest for each platform that is wanted; every one when all are."""
        if not self._wanted:
            return list(index.manifests)
        chosen: dict[str, Descriptor] = {}
        for platform in self._wanted:
            matcher = platforms.only(platform)
            found = platforms.choose(index.manifests, matcher)
            best = next((each for each in found if each.platform is not None), None)
            if best is None:
                best = await self._by_config(found, matcher, parents)
            if best is None:
                there = sorted({platforms.format(each.platform) for each in index.manifests if each.platform is not None})
                hint = f"there are: {', '.join(there)}" if there else ""
                name = self._repository.reference.name
                raise NotFound(f"{name}: no matching manifest for {matcher.name} in the manifest list entries", hint)
            chosen[best.digest] = best
        return list(chosen.values())

    async def _by_config(
        self, candidates: Iterable[Descriptor], matcher: platforms.Matcher, parents: tuple[str, ...]
    ) -> Descriptor | None:
        """Of manifests of which the index does not say the platform: the first whose configuration says the right one."""
        for candidate in candidates:
            if media.is_index(candidate.media_type):
                return candidate
            document = await self._manifest(candidate, parents)
            if isinstance(document, Manifest) and media.is_config(document.config.media_type):
                await self._blob(document.config, (media.ref(candidate),))
                if matcher.match((await self._config(document.config)).platform()):
                    return candidate
        return None

    async def _image(self, manifest: Manifest, parents: tuple[str, ...]) -> None:
        """Configuration and layers; unpacking goes on beside."""
        work = [self._blob(each, parents) for each in unique([manifest.config, *manifest.layers])]
        if self._unpacker is not None and any(media.is_layer(each.media_type) for each in manifest.layers):
            work.append(self._unpack(manifest, parents))
        await run_all(work)

    async def _unpack(self, manifest: Manifest, parents: tuple[str, ...]) -> None:
        if self._unpacker is None or manifest.config.media_type not in (*media.CONFIG_TYPES, media.LEGACY_CONFIG):
            return

        async def ready(descriptor: Descriptor) -> None:
            await self._blob(descriptor, parents)

        await ready(manifest.config)
        image = await self._config(manifest.config)
        if not self._unpacker.wants(image.platform()):
            return
        layers = pair_layers(manifest, image, self._repository.reference.name)
        await self._unpacker.unpack(layers, manifest.config, image.platform(), ready, self._callback)

    async def _config(self, descriptor: Descriptor) -> Image:
        return decode_config(await read(self._blobs, descriptor, CONFIG_LIMIT), descriptor.digest)

    # One blob.

    async def _blob(self, descriptor: Descriptor, parents: tuple[str, ...]) -> None:
        """In the store when it returns; asked for several times it is fetched once."""
        task = self._tasks.get(descriptor.digest)
        if task is None:
            task = self._tasks[descriptor.digest] = asyncio.ensure_future(self._fetch_blob(descriptor, parents))
        await asyncio.shield(task)

    async def _fetch_blob(self, descriptor: Descriptor, parents: tuple[str, ...]) -> None:
        meter = Meter(self._callback, descriptor, parents)
        if await self._has(descriptor):
            meter.tell(progress.EXISTS, descriptor.size)
            await self._label_source(descriptor)
            return
        meter.tell(progress.WAITING)
        embedded = descriptor.content()
        if embedded is not None:
            await write(self._blobs, media.ref(descriptor), embedded, descriptor.digest)
            meter.tell(progress.COMPLETE, descriptor.size)
            return

        def listen(event: str, done: int) -> None:
            if event == progress.DOWNLOADING:
                meter.moved(event, done)
            else:
                meter.tell(progress.DOWNLOADING, done, event)

        async def work(flight: Flight) -> None:
            async with self._limit:
                await self._download(descriptor, flight)

        started = await self._flights.join((self._scope, descriptor.digest), work, listen)
        if not started and not await self._has(descriptor):
            raise Unavailable(f"{descriptor.digest}: fetched by another, and gone again")
        await self._label_source(descriptor)
        meter.tell(progress.COMPLETE, descriptor.size)

    async def _has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there. Asked by opening a writer where that can be: the lease of this pull then holds it too."""
        if not await exists(self._blobs, descriptor.digest):
            return False
        try:
            writer = await self._blobs.writer(media.ref(descriptor), descriptor.size, descriptor.digest)
        except AlreadyExists:
            return True
        except Unavailable:
            return await exists(self._blobs, descriptor.digest)
        await writer.close()
        await self._blobs.abort(media.ref(descriptor))
        return False

    async def _download(self, descriptor: Descriptor, flight: Flight) -> None:
        name = media.ref(descriptor)
        try:
            writer = await self._writer(descriptor)
        except AlreadyExists:
            return
        keep = False
        try:
            async with writer:
                try:
                    await self._attempts(writer, descriptor, flight.tell)
                except (Unavailable, asyncio.CancelledError):
                    keep = self._keep or flight.shared()
                    raise
        except BaseException:
            if not keep:
                await self._blobs.abort(name)
            raise

    async def _writer(self, descriptor: Descriptor) -> AsyncWriter:
        """The ingest; another process or client that holds it is waited for. Raises AlreadyExists when it was finished."""
        pause = _BUSY_S
        while True:
            try:
                return await self._blobs.writer(media.ref(descriptor), descriptor.size, descriptor.digest)
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _BUSY_MAX_S)

    async def _attempts(self, writer: AsyncWriter, descriptor: Descriptor, tell: Callable[[str, int], None]) -> None:
        """Download until it is whole and right, or there is no hope."""
        failures = 0
        avoid: set[str] = set()
        resumed = writer.offset > 0
        farthest = writer.offset
        while True:
            try:
                server = await self._transfer(writer, descriptor, avoid, tell)
            except _Broken as broken:
                avoid.add(broken.server)
                failures = failures + 1 if writer.offset <= farthest else 1
                farthest = max(farthest, writer.offset)
                if failures >= self._repository.transport.limits.attempts:
                    raise broken.error from None
                resumed = resumed or writer.offset > 0
                tell(f"{broken.error}; trying again", writer.offset)
                await self._repository.transport.pause_before(failures, str(broken.error))
                continue
            except (DataLoss, InvalidArgument) as error:
                # Of a server that cannot go on where it was left, or has something else now: from the beginning, once.
                if not writer.offset or not resumed or not _about_range(error):
                    raise
                resumed = False
                await writer.truncate(0)
                tell(f"{error}; trying again", 0)
                continue
            try:
                await writer.commit(descriptor.size, descriptor.digest)
                return
            except FailedPrecondition as error:
                what = f"{self._repository.reference.name}@{descriptor.digest}"
                failure = DataLoss(f"{what}: content does not match its digest: {error}", "the registry's copy is damaged")
            # What an earlier attempt or another server left may have been the wrong part.
            avoid.add(server)
            failures += 1
            if not (resumed or len(avoid) < self._repository.servers()) or failures >= self._repository.transport.limits.attempts:
                raise failure
            resumed = False
            await writer.truncate(0)
            tell(f"{failure}; trying again", 0)

    async def _transfer(
        self, writer: AsyncWriter, descriptor: Descriptor, avoid: set[str], tell: Callable[[str, int], None]
    ) -> str:
        """Append what the server has from the writer's offset on; returns the server."""
        if writer.offset > descriptor.size:
            await writer.truncate(0)
        if writer.offset == descriptor.size and descriptor.size:
            return ""
        server = ""
        try:
            async with self._repository.blob(descriptor, writer.offset, avoid) as (begin, chunks, server):
                if begin < writer.offset:
                    await writer.truncate(begin)
                pending = bytearray()
                try:
                    async for chunk in chunks:
                        pending += chunk
                        if len(pending) >= BLOCK:
                            await writer.write(pending)
                            pending = bytearray()
                            tell(progress.DOWNLOADING, writer.offset)
                except Unavailable:
                    await writer.write(pending)
                    raise
                if pending:
                    await writer.write(pending)
                tell(progress.DOWNLOADING, writer.offset)
        except Unavailable as error:
            raise _Broken(error, server) from None
        return server

    async def _label_source(self, descriptor: Descriptor) -> None:
        labels = media.source_label(
            await self._blobs.labels(descriptor.digest), self._repository.registry, self._repository.name
        )
        if labels:
            await self._blobs.set_labels(descriptor.digest, labels)


def _about_range(error: BoxshipError) -> bool:
    return "asked for the bytes from" in str(error) or ": 416 " in str(error)


class _Broken(Exception):
    """A transfer that ended early."""

    def __init__(self, error: BoxshipError, server: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.server = server


def decode_config(data: bytes, name: str) -> Image:
    """The configuration of an image; raises InvalidArgument."""
    found = text.loads(data, name)
    if not isinstance(found, dict):
        raise InvalidArgument(f"{name}: expected an object")
    return Image.decode(found, name)


def pair_layers(manifest: Manifest, image: Image, name: str) -> list[Layer]:
    """The layers with their diff ids; raises InvalidArgument when there are not as many of one as of the other."""
    layers = [each for each in manifest.layers if media.is_layer(each.media_type)]
    if len(layers) != len(image.rootfs.diff_ids):
        raise InvalidArgument(
            f"{name}: mismatched image rootfs and manifest layers: {len(image.rootfs.diff_ids)} diff ids, {len(layers)} layers"
        )
    return [Layer(descriptor, diff_id) for descriptor, diff_id in zip(layers, image.rootfs.diff_ids, strict=True)]


def unique(descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    """Each content once, in order."""
    return list({descriptor.digest: descriptor for descriptor in descriptors}.values())


async def run_all(work: Iterable[Coroutine[object, object, None]]) -> None:
    """Do it all at once; the first failure cancels the rest, and is raised when all have ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    failed = [task for task in tasks if task in done and not task.cancelled() and task.exception() is not None]
    for task in failed or tasks:
        await task
