"""Images out of archives: what `docker save`, `podman save`, skopeo, buildah, umoci and ctr write, and plain root file systems.

Runs in: the daemon's event loop; an archive is read, hashed and written in one worker thread and in one pass.
Spec: image-spec 1.1.1 image-layout.md; docker-archive as moby's image/spec v1.2 has it, and the form of Docker ≥ 25, which
is both at once. Any order of members, gzip or zstd around it all, links for layers that are there twice.

Names in an archive are keys of a dictionary and never paths of this machine; those that point outside are refused all the
same. Every blob of a layout is checked against its name, and every layer that is a plain tar against the image's diff id;
compressed ones are when they are unpacked.
Not here: writing archives (`boxship.images.export`), naming what was read (`boxship.images.transfer`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from boxship.images import media, platforms, progress
from boxship.images.layers import streams, tar
from boxship.images.progress import Callback, Progress
from boxship.images.pull import CONFIG_LIMIT, decode_config
from boxship.images.store import CHUNK, AsyncWriter, Blobs, LocalWriter, exists, read, write
from boxship.kit.errors import AlreadyExists, BoxshipError, DataLoss, InvalidArgument, NotFound, from_os_error
from boxship.oci import digest as digests
from boxship.oci import reference, text
from boxship.oci.image import (
    ANNOTATION_REF_NAME,
    LAYOUT_FILE,
    LAYOUT_INDEX,
    LAYOUT_VERSION,
    MAX_MANIFEST,
    MEDIA_TYPE_CONFIG,
    MEDIA_TYPE_DOCKER_CONFIG,
    MEDIA_TYPE_DOCKER_LAYER,
    MEDIA_TYPE_DOCKER_LAYER_GZIP,
    MEDIA_TYPE_DOCKER_MANIFEST,
    MEDIA_TYPE_INDEX,
    MEDIA_TYPE_LAYER,
    MEDIA_TYPE_LAYER_GZIP,
    MEDIA_TYPE_LAYER_ZSTD,
    MEDIA_TYPE_MANIFEST,
    Descriptor,
    Image,
    Index,
    Manifest,
    Platform,
    decode_manifest,
)

ANNOTATION_IMAGE_NAME = "io.containerd.image.name"
"""The full name of an image, which the annotation of the specification has no room for."""

DOCKER_MANIFEST = "manifest.json"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

MAX_MEMBERS = 100_000
"""Of the archive itself, not of its layers."""
JSON_LIMIT = 20 << 20
BOMB_RATIO = 100
"""An archive that is compressed as a whole may grow to so many times its size; images grow to a few times theirs."""
BOMB_FREE = 1 << 30
"""Bytes to which it may grow whatever its size."""

_IGNORED = frozenset(("repositories", "version"))
_TOLD = 4 << 20
_PADDING = 1 << 20

T = TypeVar("T")


@dataclass
class Imported:
    """What an archive held; everything is in the store, and nothing names it yet."""

    index: Descriptor
    """Of all that follows; in the store too."""
    manifests: list[Descriptor] = field(default_factory=list)
    """Images (manifests or indexes), in the archive's order; the annotations say how they are called."""


Source = AsyncIterator[bytes] | int | str
"""An archive: bytes as they come, a descriptor of a file to read from its position on, or the path of a file or of a layout."""


async def load(
    blobs: Blobs, source: Source, *, callback: Callback | None = None, compress: bool = False
) -> Imported:
    """Read an archive or a layout into the store. All of it, or an error and no ingest left.

    `compress`: layers that are plain tars are stored as gzip. Raises InvalidArgument for what is no archive of images, DataLoss
    for content that is not what its name or the image says.
    """
    if isinstance(source, str) and os.path.isdir(source):
        return await _load_directory(blobs, source, callback)
    contents = await _read_archive(blobs, source, callback)
    if LAYOUT_FILE in contents.documents:
        return await _from_layout(blobs, contents, callback)
    if DOCKER_MANIFEST in contents.documents:
        return await _from_docker(blobs, contents, compress=compress)
    names = ", ".join(sorted([*contents.documents, *contents.blobs])[:5])
    hint = f"it has {names}" if names else "it is empty"
    raise InvalidArgument("unrecognized image format: neither manifest.json nor oci-layout", hint)


@dataclass
class _Contents:
    """What one pass over an archive found."""

    documents: dict[str, bytes] = field(default_factory=dict)
    """Small files by name: those that say what the rest is."""
    blobs: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Files that are content in the store now, as (digest, size), by name."""
    links: dict[str, str] = field(default_factory=dict)
    """Links of either kind, with what they point to."""

    def blob(self, name: str) -> tuple[str, int] | None:
        """Digest and size of a file, through links."""
        name = clean(name)
        for _ in range(len(self.links) + 1):
            if name in self.blobs:
                return self.blobs[name]
            if name not in self.links:
                return None
            name = self.links[name]
        raise InvalidArgument(f"links in a circle at {name!r}")


class _Bridge:
    """What the worker thread uses of the asynchronous world: it waits there for what is done here."""

    def __init__(self, loop: asyncio.AbstractEventLoop, blobs: Blobs) -> None:
        self._loop = loop
        self._blobs = blobs
        self._reading: Future[bytes] | None = None
        self.stopped = False

    def stop(self) -> None:
        """Called by the loop: the thread is to end, also when it waits for a source that has nothing."""
        self.stopped = True
        if self._reading is not None:
            self._reading.cancel()

    def read(self, work: Coroutine[Any, Any, bytes]) -> bytes:
        """Wait for the loop to get the next piece of a source."""
        self._reading = asyncio.run_coroutine_threadsafe(work, self._loop)
        if self.stopped:
            self._reading.cancel()
        try:
            return self._reading.result()
        except FutureCancelledError:
            raise asyncio.CancelledError from None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the loop to do it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def writer(self, ref: str) -> AsyncWriter:
        """A new ingest."""
        return self.run(self._blobs.writer(ref))

    def abort(self, ref: str) -> None:
        """Drop an ingest."""
        self.run(self._blobs.abort(ref))

    def label(self, digest: str, labels: Mapping[str, str]) -> None:
        """Set labels of a blob."""
        self.run(self._blobs.set_labels(digest, labels))

    def store(self, ref: str, chunks: Iterator[bytes | memoryview], size: int, expected: str) -> str:
        """Write a blob; returns its digest. One that is there under the digest `expected` is not even read."""
        try:
            writer = self.run(self._blobs.writer(ref, size, expected))
        except AlreadyExists:
            return expected
        committed = False
        try:
            # What is whole from the beginning is content that another namespace has brought, or an earlier attempt.
            if not expected or writer.offset != size:
                if writer.offset:
                    self.run(writer.truncate(0))
                append = _appender(self, writer)
                for chunk in chunks:
                    if self.stopped:
                        raise asyncio.CancelledError
                    append(chunk)
            try:
                digest = self.run(writer.commit(size, expected))
            except BoxshipError as error:
                if not expected:
                    raise
                raise DataLoss(f"{expected}: content does not match its digest: {error}", "the archive is damaged") from None
            committed = True
            return digest
        finally:
            self.run(writer.close())
            if not committed:
                self.run(self._blobs.abort(ref))


def _appender(bridge: _Bridge, writer: AsyncWriter) -> Callable[[bytes | memoryview], object]:
    """Local writes are made in this thread itself."""
    if isinstance(writer, LocalWriter):
        return writer.writer.write
    return lambda chunk: bridge.run(writer.write(bytes(chunk)))


async def in_thread(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Do `work` in a thread of its own; when cancelled, ask it to stop and wait until it has.

    Not one of the loop's pool: such work waits for the loop, and the loop for others of the pool.
    """
    pool = ThreadPoolExecutor(1, "boxship-archive")
    task = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise
    finally:
        pool.shutdown(wait=False)


async def _read_archive(blobs: Blobs, source: Source, callback: Callback | None) -> _Contents:
    loop = asyncio.get_running_loop()
    bridge = _Bridge(loop, blobs)
    own = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if isinstance(source, str) else -1
    try:
        fd = own if own >= 0 else source
        pull = _file_reader(fd) if isinstance(fd, int) else _stream_reader(bridge, source)

        def tell(done: int) -> None:
            if callback is not None:
                loop.call_soon_threadsafe(callback, Progress(progress.LOADING, "archive", (), done))

        return await in_thread(lambda: _scan(bridge, _inflated(pull, tell)), bridge.stop)
    finally:
        if own >= 0:
            os.close(own)


def _file_reader(fd: int) -> Callable[[int], bytes]:
    def pull(size: int) -> bytes:
        try:
            return os.read(fd, size)
        except OSError as error:
            raise from_os_error(error, "reading the archive") from None

    return pull


def _stream_reader(bridge: _Bridge, source: Source) -> Callable[[int], bytes]:
    if isinstance(source, (int, str)):
        raise InvalidArgument("an archive is a path, a descriptor or a stream")
    iterator = aiter(source)

    async def following() -> bytes:
        parts = []
        size = 0
        # Streams come in small pieces: waiting from thread to loop for each of them would cost more than the work on it.
        async for piece in iterator:
            parts.append(piece)
            size += len(piece)
            if size >= CHUNK // 4:
                break
        return b"".join(parts)

    def pull(_: int) -> bytes:
        return bridge.read(following())

    return pull


def _inflated(pull: Callable[[int], bytes], tell: Callable[[int], None]) -> Callable[[], bytes]:
    """The archive without what is compressed around it, piece by piece."""
    done = told = 0

    def counted(size: int) -> bytes:
        nonlocal done, told
        data = pull(size)
        done += len(data)
        if done - told >= _TOLD or not data:
            told = done
            tell(done)
        return data

    pieces = streams.pieces(counted)
    grown = 0

    def following() -> bytes:
        nonlocal grown
        piece = next(pieces, b"")
        grown += len(piece)
        if grown > BOMB_FREE and grown > done * BOMB_RATIO:
            raise InvalidArgument(f"the archive's {done} bytes grow to over {BOMB_RATIO} times as many: a decompression bomb")
        return piece

    return following


def _scan(bridge: _Bridge, next_piece: Callable[[], bytes]) -> _Contents:
    """One pass: small documents into memory, everything else into the store."""
    contents = _Contents()
    source = tar.Stream(next_piece)
    unique = secrets.token_hex(6)
    for count, member in enumerate(tar.members(source)):
        if count >= MAX_MEMBERS:
            raise InvalidArgument(f"an archive of more than {MAX_MEMBERS} members")
        if bridge.stopped:
            raise asyncio.CancelledError
        name = clean(member.name.decode("utf-8", "surrogateescape"))
        if member.kind == stat.S_IFLNK:
            contents.links[name] = clean(os.path.join(os.path.dirname(name), member.link.decode("utf-8", "surrogateescape")))
        elif member.kind == tar.LINK:
            contents.links[name] = clean(member.link.decode("utf-8", "surrogateescape"))
        elif member.kind == stat.S_IFREG:
            if member.sparse is not None:
                raise InvalidArgument(f"{name}: sparse members are not part of an image archive")
            _keep(bridge, contents, name, source, member.stored, unique)
    # Padding and the checksum of what is compressed around it all; a sender is not cut off while it still sends them.
    left = _PADDING
    while left > 0 and (piece := next_piece()):
        left -= len(piece)
    return contents


def _keep(bridge: _Bridge, contents: _Contents, name: str, source: tar.Stream, size: int, unique: str) -> None:
    """One file of the archive."""
    if name in (LAYOUT_FILE, LAYOUT_INDEX, DOCKER_MANIFEST):
        if size > JSON_LIMIT:
            raise InvalidArgument(f"{name}: {size} bytes, and at most {JSON_LIMIT} are read")
        contents.documents[name] = source.take(size)
        if len(contents.documents[name]) < size:
            raise InvalidArgument("unexpected end of the archive")
        return
    folder, _, base = name.rpartition("/")
    # Of Docker's old form: what each layer once was as an image of its own.
    if base.lower() in _IGNORED or (base == "json" and folder):
        return
    expected = ""
    if folder.startswith("blobs/"):
        expected = f"{folder.removeprefix('blobs/')}:{base}"
        if expected.partition(":")[0] not in digests.LENGTHS:
            return
        digests.check(expected)
    digest = bridge.store(f"import-{unique}-{name}"[:200], source.chunks(size), size, expected)
    contents.blobs[name] = (digest, size)


def clean(name: str) -> str:
    """A member's name in one form; raises InvalidArgument when it points outside of the archive."""
    parts: list[str] = []
    if name.startswith("/") or "\0" in name:
        raise InvalidArgument(f"archive: the name {name!r} points outside")
    for part in name.split("/"):
        if part == "..":
            if not parts:
                raise InvalidArgument(f"archive: the name {name!r} points outside")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


# Layouts.


async def _from_layout(blobs: Blobs, contents: _Contents, callback: Callback | None) -> Imported:
    _check_layout(contents.documents[LAYOUT_FILE])
    data = contents.documents.get(LAYOUT_INDEX)
    if data is None:
        raise InvalidArgument(f"missing {LAYOUT_INDEX} in OCI layout {LAYOUT_VERSION}")
    index = _decode_index(data)
    names = await _docker_names(blobs, contents)
    return await _finish(blobs, data, index, names)


def _check_layout(data: bytes) -> None:
    found = text.loads(data, LAYOUT_FILE)
    version = found.get("imageLayoutVersion") if isinstance(found, dict) else None
    if not isinstance(version, str) or version.split(".")[0] != LAYOUT_VERSION.split(".")[0]:
        raise InvalidArgument(f"unsupported OCI version {version}")


def _decode_index(data: bytes) -> Index:
    index = decode_manifest(data, MEDIA_TYPE_INDEX, LAYOUT_INDEX)
    if not isinstance(index, Index):  # pragma: no cover - the media type makes it one
        raise InvalidArgument(f"{LAYOUT_INDEX}: expected an index")
    return index


async def _docker_names(blobs: Blobs, contents: _Contents) -> dict[str, list[str]]:
    """Config digest → names, from the manifest.json that Docker and others put beside the layout."""
    if DOCKER_MANIFEST not in contents.documents:
        return {}
    names: dict[str, list[str]] = {}
    for entry in _docker_entries(contents.documents[DOCKER_MANIFEST]):
        config = contents.blob(entry.config)
        if config is not None:
            names.setdefault(config[0], []).extend(entry.tags)
    return names


async def _finish(blobs: Blobs, data: bytes, index: Index, names: Mapping[str, list[str]]) -> Imported:
    """Check that what the index names is there, label it, and store the index itself."""
    found: list[Descriptor] = []
    seen: dict[str, list[str]] = {}
    for descriptor in index.manifests:
        configs = await label_tree(blobs, descriptor)
        known = [name for config in configs for name in names.get(config, [])]
        annotated = descriptor.annotations.get(ANNOTATION_IMAGE_NAME) or descriptor.annotations.get(ANNOTATION_REF_NAME)
        if annotated or not known:
            found.append(descriptor)
        else:
            found += [named(descriptor, name) for name in known if name not in seen.get(descriptor.digest, [])]
            seen.setdefault(descriptor.digest, []).extend(known)
    target = Descriptor(media_type=MEDIA_TYPE_INDEX, digest=digests.of(data), size=len(data))
    await write(blobs, media.ref(target), data, target.digest, media.child_labels(index.manifests))
    return Imported(target, found)


async def label_tree(blobs: Blobs, descriptor: Descriptor, depth: int = 0) -> list[str]:
    """Set the labels that keep what a manifest refers to, for all of it that is there; returns the configs' digests.

    A manifest of an index may be missing, as when one platform was saved; what a manifest that is there needs must be there too.
    Raises InvalidArgument otherwise.
    """
    if depth > 8:
        raise InvalidArgument("indexes within indexes, more than 8 deep")
    if not media.is_manifest(descriptor.media_type) and not media.is_index(descriptor.media_type):
        if not await exists(blobs, descriptor.digest):
            raise InvalidArgument(f"{descriptor.digest} is missing in the archive")
        return []
    if not await exists(blobs, descriptor.digest):
        if depth:
            return []
        raise InvalidArgument(f"{descriptor.digest} is missing in the archive")
    document = decode_manifest(await read(blobs, descriptor, MAX_MANIFEST), descriptor.media_type, descriptor.digest)
    await blobs.set_labels(descriptor.digest, media.child_labels(media.children(document)))
    if isinstance(document, Index):
        return [config for child in document.manifests for config in await label_tree(blobs, child, depth + 1)]
    await _check_image(blobs, document, descriptor.digest)
    return [document.config.digest]


async def _check_image(blobs: Blobs, manifest: Manifest, name: str) -> None:
    """All of an image is there, in the sizes that it says, and its plain layers are those of its configuration."""
    missing = []
    for child in media.children(manifest):
        try:
            size = await blobs.size(child.digest)
        except NotFound:
            if media.is_distributable(child.media_type) and child.content() is None:
                missing.append(child.digest)
            continue
        if size != child.size:
            raise DataLoss(f"{name}: {child.digest} has {size} bytes, the manifest says {child.size}")
    if len(missing) == len(media.children(manifest)):
        # Only the manifest of this platform was saved.
        return
    if missing:
        raise InvalidArgument(f"{name}: {missing[0]} is missing in the archive")
    if not media.is_config(manifest.config.media_type):
        return
    image = decode_config(await read(blobs, manifest.config, CONFIG_LIMIT), manifest.config.digest)
    layers = [each for each in manifest.layers if media.is_layer(each.media_type)]
    check_diff_ids([(each.media_type, each.digest) for each in layers], image, name)


def check_diff_ids(layers: list[tuple[str, str]], image: Image, name: str) -> None:
    """Plain tars are their own diff ids. Raises DataLoss when the image says otherwise, InvalidArgument for another number."""
    if len(layers) != len(image.rootfs.diff_ids):
        raise InvalidArgument(
            f"{name}: mismatched image rootfs and manifest layers: {len(image.rootfs.diff_ids)} diff ids, {len(layers)} layers"
        )
    for (media_type, digest), diff_id in zip(layers, image.rootfs.diff_ids, strict=True):
        if media_type in (MEDIA_TYPE_LAYER, MEDIA_TYPE_DOCKER_LAYER) and digest != diff_id and digest[:7] == diff_id[:7]:
            raise DataLoss(f"{name}: layer {digest} is not the one that the image names, {diff_id}")


def named(descriptor: Descriptor, name: str) -> Descriptor:
    """The descriptor with a full name in its annotations; raises InvalidArgument for what is no name."""
    full = reference.parse(name).tagged()
    annotations = {**descriptor.annotations, ANNOTATION_IMAGE_NAME: str(full), ANNOTATION_REF_NAME: full.tag or str(full)}
    return Descriptor(
        media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size, platform=descriptor.platform,
        annotations=annotations, artifact_type=descriptor.artifact_type,
    )


async def _load_directory(blobs: Blobs, path: str, callback: Callback | None) -> Imported:
    """A layout that lies unpacked in a directory: what its index leads to, and nothing else of it."""
    bridge = _Bridge(asyncio.get_running_loop(), blobs)
    _check_layout(await asyncio.to_thread(_small_file, os.path.join(path, LAYOUT_FILE)))
    data = await asyncio.to_thread(_small_file, os.path.join(path, LAYOUT_INDEX))
    index = _decode_index(data)

    async def fetch(descriptor: Descriptor, depth: int) -> None:
        algorithm, encoded = digests.split(descriptor.digest)
        name = os.path.join(path, "blobs", algorithm, encoded)
        if not os.path.exists(name):
            return
        await in_thread(lambda: _store_file(bridge, name, descriptor), bridge.stop)
        if callback is not None:
            callback(Progress(progress.COMPLETE, media.ref(descriptor), (), descriptor.size, descriptor.size, descriptor))
        if depth < 8 and (media.is_manifest(descriptor.media_type) or media.is_index(descriptor.media_type)):
            content = await read(blobs, descriptor, MAX_MANIFEST)
            for child in media.children(decode_manifest(content, descriptor.media_type, descriptor.digest)):
                await fetch(child, depth + 1)

    for descriptor in index.manifests:
        await fetch(descriptor, 0)
    return await _finish(blobs, data, index, {})


def _open_file(path: str) -> int:
    """A regular file; raises InvalidArgument for anything else, which could block or be endless."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_os_error(error, "reading the layout") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument(f"{path} is no regular file")
    return fd


def _small_file(path: str) -> bytes:
    fd = _open_file(path)
    try:
        data = b""
        while len(data) <= JSON_LIMIT and (more := os.read(fd, CHUNK)):
            data += more
    finally:
        os.close(fd)
    if len(data) > JSON_LIMIT:
        raise InvalidArgument(f"{path}: more than {JSON_LIMIT} bytes")
    return data


def _store_file(bridge: _Bridge, path: str, descriptor: Descriptor) -> None:
    fd = _open_file(path)
    try:
        size = os.fstat(fd).st_size
        if size != descriptor.size:
            raise DataLoss(f"{path} has {size} bytes, expected {descriptor.size}")
        pull = _file_reader(fd)
        bridge.store(media.ref(descriptor), iter(lambda: pull(CHUNK), b""), size, descriptor.digest)
    finally:
        os.close(fd)


# Docker's archives.


@dataclass(frozen=True)
class _Entry:
    """An image in manifest.json."""

    config: str
    tags: list[str]
    layers: list[str]


def _docker_entries(data: bytes) -> list[_Entry]:
    found = text.loads(data, DOCKER_MANIFEST)
    if not isinstance(found, list):
        raise InvalidArgument(f"{DOCKER_MANIFEST}: expected a list")
    entries = []
    for entry in found:
        if not isinstance(entry, dict):
            raise InvalidArgument(f"{DOCKER_MANIFEST}: expected objects")
        config, tags, layers = entry.get("Config"), entry.get("RepoTags") or [], entry.get("Layers") or []
        if not isinstance(config, str) or not _are_strings(tags) or not _are_strings(layers):
            raise InvalidArgument(f"{DOCKER_MANIFEST}: Config, RepoTags and Layers: expected a string and lists of strings")
        entries.append(_Entry(config, tags, layers))
    return entries


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


async def _from_docker(blobs: Blobs, contents: _Contents, *, compress: bool) -> Imported:
    """The images of a docker-archive, with manifests that are made for them."""
    manifests: list[Descriptor] = []
    for entry in _docker_entries(contents.documents[DOCKER_MANIFEST]):
        config = contents.blob(entry.config)
        if config is None:
            raise InvalidArgument(f"image config {entry.config!r} not found in the archive")
        config_descriptor = Descriptor(media_type=MEDIA_TYPE_DOCKER_CONFIG, digest=config[0], size=config[1])
        image = decode_config(await read(blobs, config_descriptor, CONFIG_LIMIT), entry.config)
        layers = []
        for name in entry.layers:
            layer = contents.blob(name)
            if layer is None:
                raise InvalidArgument(f"layer {name!r} not found in the archive")
            media_type = _LAYER_TYPES[await _compression(blobs, layer[0])]
            layers.append(Descriptor(media_type=media_type, digest=layer[0], size=layer[1]))
        check_diff_ids([(each.media_type, each.digest) for each in layers], image, entry.config)
        if compress:
            layers = [
                await _compressed(blobs, each) if each.media_type == MEDIA_TYPE_DOCKER_LAYER else each for each in layers
            ]
        manifest = Manifest(
            schema_version=2, media_type=MEDIA_TYPE_DOCKER_MANIFEST, config=config_descriptor, layers=layers
        )
        descriptor = await store_document(blobs, manifest, manifest.media_type)
        descriptor = Descriptor(
            media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size,
            platform=image.platform() if image.os else None,
        )
        manifests += [named(descriptor, tag) for tag in entry.tags] or [descriptor]
    index = Index(schema_version=2, media_type=MEDIA_TYPE_INDEX, manifests=manifests)
    return Imported(await store_document(blobs, index, MEDIA_TYPE_INDEX), manifests)


async def store_document(blobs: Blobs, document: Manifest | Index, media_type: str) -> Descriptor:
    """Store a manifest or index with the labels that keep what it refers to; returns its descriptor."""
    data = text.dumps(document.encode()).encode()
    descriptor = Descriptor(media_type=media_type, digest=digests.of(data), size=len(data))
    await write(blobs, media.ref(descriptor), data, descriptor.digest, media.child_labels(media.children(document)))
    return descriptor


_LAYER_TYPES = {"": MEDIA_TYPE_DOCKER_LAYER, "gzip": MEDIA_TYPE_DOCKER_LAYER_GZIP, "zstd": DOCKER_LAYER_ZSTD}


async def _compression(blobs: Blobs, digest: str) -> str:
    head = b""
    async for chunk in blobs.stream(digest):
        head += chunk
        if len(head) >= 4:
            break
    return compression_of(head)


def compression_of(head: bytes) -> str:
    """What the first bytes of a stream say: "gzip", "zstd", or "" for neither."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else ""


async def _compressed(blobs: Blobs, layer: Descriptor) -> Descriptor:
    """The layer as gzip, the same bytes each time."""
    ref = f"compress-blob-{layer.digest}"
    writer = await blobs.writer(ref)
    committed = False
    try:
        async with writer:
            if writer.offset:
                await writer.truncate(0)
            pack = _Gzip()
            async for chunk in blobs.stream(layer.digest):
                await writer.write(await asyncio.to_thread(pack.add, chunk))
            await writer.write(pack.end())
            size = writer.offset
            digest = await writer.commit(size)
            committed = True
    finally:
        if not committed:
            await blobs.abort(ref)
    await blobs.set_labels(digest, {media.UNCOMPRESSED: layer.digest})
    return Descriptor(media_type=MEDIA_TYPE_DOCKER_LAYER_GZIP, digest=digest, size=size)


class _Gzip:
    """A gzip stream without name and time."""

    def __init__(self) -> None:
        from isal import isal_zlib

        self._deflate = isal_zlib.compressobj(2, wbits=31)

    def add(self, data: bytes) -> bytes:
        packed: bytes = self._deflate.compress(data)
        return packed

    def end(self) -> bytes:
        packed: bytes = self._deflate.flush()
        return packed


# Plain root file systems.


async def import_rootfs(
    blobs: Blobs, source: Source, *, platform: Platform | None = None, config: Mapping[str, object] | None = None,
    created: str = "", message: str = "", callback: Callback | None = None,
) -> Descriptor:
    """An image of one layer out of a tar of a root file system, compressed or not, which is stored as it is.

    `config`: the image's `config` object in the words of image-spec. `created`: RFC 3339. Returns the manifest's descriptor, with
    its platform. Raises InvalidArgument when it is no tar.
    """
    bridge = _Bridge(asyncio.get_running_loop(), blobs)
    own = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if isinstance(source, str) else -1
    try:
        fd = own if own >= 0 else source
        pull = _file_reader(fd) if isinstance(fd, int) else _stream_reader(bridge, source)
        if callback is not None:
            callback(Progress(progress.LOADING, "rootfs"))
        layer, diff_id = await in_thread(lambda: _store_rootfs(bridge, pull), bridge.stop)
    finally:
        if own >= 0:
            os.close(own)
    own_platform = platforms.normalize(platform or platforms.host())
    body: dict[str, object] = {
        **({"created": created} if created else {}), "architecture": own_platform.architecture, "os": own_platform.os,
        **({"variant": own_platform.variant} if own_platform.variant else {}), "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{**({"created": created} if created else {}), "comment": message or "imported from a root file system"}],
    }
    data = text.dumps(body).encode()
    image = Descriptor(media_type=MEDIA_TYPE_CONFIG, digest=digests.of(data), size=len(data))
    await write(blobs, media.ref(image), data, image.digest)
    manifest = Manifest(schema_version=2, media_type=MEDIA_TYPE_MANIFEST, config=image, layers=[layer])
    made = await store_document(blobs, manifest, MEDIA_TYPE_MANIFEST)
    return Descriptor(media_type=made.media_type, digest=made.digest, size=made.size, platform=own_platform)


def _store_rootfs(bridge: _Bridge, pull: Callable[[int], bytes]) -> tuple[Descriptor, str]:
    """Store the tar as it comes; its uncompressed content is hashed and looked through in the same pass."""
    first = pull(CHUNK)
    kind = compression_of(first)
    size = 0
    feed: list[bytes] = [first]

    def taken(_: int) -> bytes:
        """For the inflater: the next piece, which is written to the store on the way."""
        nonlocal size
        data = feed.pop() if feed else pull(CHUNK)
        if bridge.stopped:
            raise asyncio.CancelledError
        size += len(data)
        if data:
            append(data)
        return data

    ref = f"import-rootfs-{secrets.token_hex(6)}"
    writer = bridge.writer(ref)
    append = _appender(bridge, writer)
    committed = False
    try:
        with streams.Layer(taken) as layer:
            # A tar that cannot be read would otherwise be noticed by the first container.
            for _ in tar.members(tar.Stream(layer.read)):
                pass
            diff_id = layer.finish()
            if not layer.size:
                raise InvalidArgument("the root file system is empty: no tar archive")
        digest = bridge.run(writer.commit(size))
        committed = True
    finally:
        bridge.run(writer.close())
        if not committed:
            bridge.abort(ref)
    media_type = {"": MEDIA_TYPE_LAYER, "gzip": MEDIA_TYPE_LAYER_GZIP, "zstd": MEDIA_TYPE_LAYER_ZSTD}[kind]
    bridge.label(digest, {media.UNCOMPRESSED: diff_id})
    return Descriptor(media_type=media_type, digest=digest, size=size), diff_id
