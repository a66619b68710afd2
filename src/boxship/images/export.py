"""Images into an archive that everybody reads: an OCI layout that is a docker-archive (of Docker ≥ 25) too.

Runs in: the daemon's event loop.
Spec: image-spec 1.1.1 image-layout.md; the form that moby writes since 25, and containerd's exporter. The same images make
the same bytes: members are sorted, times are 0, owners are root. What says what is in it comes first, so that a reader of a
stream knows it before the content.

    oci-layout  index.json  manifest.json  repositories  blobs/  blobs/sha256/  blobs/sha256/HEX…

`manifest.json` and `repositories` name one image for each index: the first of the platforms that are wanted.
Not here: reading (`boxship.images.archive`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from boxship.images import media, platforms, progress
from boxship.images.archive import ANNOTATION_IMAGE_NAME, DOCKER_MANIFEST
from boxship.images.progress import Callback, Meter
from boxship.images.pull import unique
from boxship.images.store import Blobs, exists, read
from boxship.kit.errors import DataLoss, InvalidArgument, NotFound
from boxship.oci import digest as digests
from boxship.oci import reference, text
from boxship.oci.image import (
    ANNOTATION_REF_NAME,
    LAYOUT_BLOBS,
    LAYOUT_FILE,
    LAYOUT_INDEX,
    LAYOUT_VERSION,
    MAX_MANIFEST,
    MEDIA_TYPE_INDEX,
    Descriptor,
    Index,
    Manifest,
    Platform,
    decode_manifest,
)

BLOCK = 512


@dataclass(frozen=True)
class Saved:
    """An image to be saved."""

    target: Descriptor
    names: Sequence[str] = ()
    """Full names; none: it is saved by its digest alone."""


@dataclass
class _Plan:
    """What goes into an archive."""

    blobs: dict[str, Descriptor] = field(default_factory=dict)
    top: list[Descriptor] = field(default_factory=list)
    images: dict[str, tuple[Manifest, list[str]]] = field(default_factory=dict)
    """For Docker: the image of each manifest digest, with its names."""


async def export(
    blobs: Blobs, images: Sequence[Saved], *, wanted: Sequence[Platform] | None = None, docker: bool = True,
    distributable_only: bool = False, keep_index: bool = False, callback: Callback | None = None,
) -> AsyncIterator[bytes]:
    """The archive, piece by piece. Nothing is yielded before it is certain that all content is there.

    `wanted`: these platforms; empty: all, and all of them must be there; None: all that are there. `keep_index`: an index of
    which one platform is wanted stays what the name stands for, as containerd has it; otherwise that one image takes its
    place, since an index that names what is not there is of little use to most readers. Raises NotFound when content is
    missing, DataLoss when the store's content is not what its digest says.
    """
    plan = await _plan(blobs, images, wanted, distributable_only=distributable_only, keep_index=keep_index)
    yield _file(LAYOUT_FILE, text.dumps({"imageLayoutVersion": LAYOUT_VERSION}).encode())
    index = Index(schema_version=2, media_type=MEDIA_TYPE_INDEX, manifests=plan.top)
    yield _file(LAYOUT_INDEX, text.dumps(index.encode()).encode())
    if docker and plan.images:
        yield _file(DOCKER_MANIFEST, text.dumps(_docker_manifest(plan)).encode())
        repositories = _repositories(plan)
        if repositories:
            yield _file("repositories", text.dumps(repositories).encode())
    yield header(f"{LAYOUT_BLOBS}/", 0, 0o755)
    for algorithm in sorted({each.digest.partition(":")[0] for each in plan.blobs.values()}):
        yield header(f"{LAYOUT_BLOBS}/{algorithm}/", 0, 0o755)
        for digest in sorted(key for key in plan.blobs if key.startswith(f"{algorithm}:")):
            async for piece in _blob(blobs, plan.blobs[digest], callback):
                yield piece
    yield bytes(2 * BLOCK)


async def _blob(blobs: Blobs, descriptor: Descriptor, callback: Callback | None) -> AsyncIterator[bytes]:
    """A member with its content, which is verified on the way: a damaged archive is not to look like a whole one."""
    algorithm, encoded = digests.split(descriptor.digest)
    yield header(f"{LAYOUT_BLOBS}/{algorithm}/{encoded}", descriptor.size, 0o444)
    meter = Meter(callback, descriptor)
    hasher = digests.hasher(descriptor.digest)
    done = 0
    async for chunk in blobs.stream(descriptor.digest):
        hasher.update(chunk)
        done += len(chunk)
        yield chunk
        meter.moved(progress.EXPORTING, done)
    if done != descriptor.size or hasher.hexdigest() != encoded:
        raise DataLoss(f"content store: {descriptor.digest} is damaged")
    meter.tell(progress.COMPLETE, done)
    if done % BLOCK:
        yield bytes(BLOCK - done % BLOCK)


async def _plan(
    blobs: Blobs, images: Sequence[Saved], wanted: Sequence[Platform] | None, *, distributable_only: bool, keep_index: bool
) -> _Plan:
    plan = _Plan()
    for image in images:
        target = image.target
        if not media.is_manifest(target.media_type) and not media.is_index(target.media_type):
            raise InvalidArgument(f"only manifests may be exported, and {target.digest} is {target.media_type}")
        found = await _Walk(blobs, plan, wanted, distributable_only=distributable_only).walk(target, required=True)
        if not found:
            raise NotFound(f"{target.digest}: no image of it for the platforms that are wanted is in the store")
        single = not keep_index and wanted is not None and len(wanted) == 1 and len(found) == 1
        shown = found[0][0] if single and media.is_index(target.media_type) else target
        if shown is not target:
            plan.blobs.pop(target.digest, None)
        for name in image.names or ("",):
            plan.top.append(_annotated(shown, name))
        first, manifest = _best(found, wanted)
        known = plan.images.setdefault(first.digest, (manifest, []))[1]
        known += [name for name in image.names if name not in known]
    plan.top = _once(plan.top)
    return plan


class _Walk:
    """Collects what a manifest needs."""

    def __init__(
        self, blobs: Blobs, plan: _Plan, wanted: Sequence[Platform] | None, *, distributable_only: bool
    ) -> None:
        self._blobs = blobs
        self._plan = plan
        self._wanted = wanted
        self._only = distributable_only

    async def walk(
        self, descriptor: Descriptor, *, required: bool, depth: int = 0
    ) -> list[tuple[Descriptor, Manifest]]:
        """Add it to the plan; returns the images in it. What is not there is left out unless it is required."""
        if depth > 8:
            raise InvalidArgument("indexes within indexes, more than 8 deep")
        if not await exists(self._blobs, descriptor.digest):
            if required:
                raise NotFound(f"content {descriptor.digest}: not found", "pull the image again")
            return []
        document = decode_manifest(
            await read(self._blobs, descriptor, MAX_MANIFEST), descriptor.media_type, descriptor.digest
        )
        if isinstance(document, Manifest):
            return await self._image(descriptor, document, required=required)
        self._plan.blobs[descriptor.digest] = descriptor
        found = []
        for child in self._chosen(document):
            if media.is_manifest(child.media_type) or media.is_index(child.media_type):
                found += await self.walk(child, required=self._wanted is not None, depth=depth + 1)
            elif await exists(self._blobs, child.digest):
                self._plan.blobs[child.digest] = child
        return found

    def _chosen(self, index: Index) -> list[Descriptor]:
        """The children that are wanted, with the attestations about them."""
        if not self._wanted:
            return list(index.manifests)
        chosen = []
        for platform in self._wanted:
            found = platforms.choose(index.manifests, platforms.only(platform))
            if found:
                chosen.append(found[0])
        digest_of = {each.digest for each in chosen}
        about = [
            each for each in index.manifests
            if each.annotations.get("vnd.docker.reference.digest") in digest_of and each.digest not in digest_of
        ]
        return unique([*chosen, *about])

    async def _image(
        self, descriptor: Descriptor, manifest: Manifest, *, required: bool
    ) -> list[tuple[Descriptor, Manifest]]:
        parts = [each for each in unique(media.children(manifest)) if media.is_distributable(each.media_type) or not self._only]
        missing = [each.digest for each in parts if not await exists(self._blobs, each.digest)]
        missing = [each for each in missing if media.is_distributable(next(p for p in parts if p.digest == each).media_type)]
        if missing:
            if required:
                raise NotFound(f"content {missing[0]}: not found", "pull the image again, with this platform")
            self._plan.blobs[descriptor.digest] = descriptor
            return []
        self._plan.blobs[descriptor.digest] = descriptor
        for each in parts:
            if await exists(self._blobs, each.digest):
                self._plan.blobs[each.digest] = each
        return [(descriptor, manifest)] if media.is_config(manifest.config.media_type) else []


def _best(
    found: Sequence[tuple[Descriptor, Manifest]], wanted: Sequence[Platform] | None
) -> tuple[Descriptor, Manifest]:
    """The image that Docker is told of: this machine's, or the first that is wanted."""
    order = platforms.choose([each for each, _ in found], platforms.any_of(wanted or [platforms.host()]))
    by_digest = {each.digest: (each, manifest) for each, manifest in found}
    return by_digest[order[0].digest] if order else found[0]


def _annotated(descriptor: Descriptor, name: str) -> Descriptor:
    annotations = {
        key: value for key, value in descriptor.annotations.items() if key not in (ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME)
    }
    if name:
        annotations[ANNOTATION_IMAGE_NAME] = name
        annotations[ANNOTATION_REF_NAME] = _tag(name) or name
    return Descriptor(
        media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size, platform=descriptor.platform,
        annotations=annotations, artifact_type=descriptor.artifact_type,
    )


def _tag(name: str) -> str:
    try:
        return reference.parse(name).tag
    except InvalidArgument:
        return ""


def _familiar(name: str) -> str:
    try:
        return reference.parse(name).familiar()
    except InvalidArgument:
        return name


def _once(descriptors: Sequence[Descriptor]) -> list[Descriptor]:
    """Without what is there twice; an image without a name is left out where it is there with one."""
    found: dict[tuple[str, str], Descriptor] = {}
    named = {each.digest for each in descriptors if ANNOTATION_IMAGE_NAME in each.annotations}
    for each in descriptors:
        name = each.annotations.get(ANNOTATION_IMAGE_NAME, "")
        if name or each.digest not in named:
            found[each.digest, name] = each
    return list(found.values())


def _docker_manifest(plan: _Plan) -> list[dict[str, object]]:
    return [
        {
            "Config": _path(manifest.config.digest), "RepoTags": [_familiar(name) for name in names if _tag(name)] or None,
            "Layers": [_path(each.digest) for each in manifest.layers],
        }
        for manifest, names in plan.images.values()
    ]


def _repositories(plan: _Plan) -> dict[str, dict[str, str]]:
    """What readers before manifest.json look at: repository → tag → the topmost layer."""
    found: dict[str, dict[str, str]] = {}
    for manifest, names in plan.images.values():
        for name in names:
            if _tag(name) and manifest.layers:
                parsed = reference.parse(name)
                found.setdefault(parsed.familiar_name(), {})[parsed.tag] = manifest.layers[-1].digest.partition(":")[2]
    return found


def _path(digest: str) -> str:
    algorithm, encoded = digests.split(digest)
    return f"{LAYOUT_BLOBS}/{algorithm}/{encoded}"


def _file(name: str, data: bytes) -> bytes:
    return header(name, len(data), 0o644) + data + bytes(-len(data) % BLOCK)


def header(name: str, size: int, mode: int) -> bytes:
    """A member's header: a directory when the name ends with a slash, otherwise a file; root's, from 1970."""
    kind = b"5" if name.endswith("/") else b"0"
    length = f"{size:011o}\0".encode() if size < 1 << 33 else b"\x80" + size.to_bytes(11, "big")
    fields = [
        name.encode().ljust(100, b"\0"), f"{mode:07o}\0".encode(), b"0000000\0", b"0000000\0", length, b"00000000000\0",
        b"        ", kind, bytes(100), b"ustar\00000", bytes(32), bytes(32), b"0000000\0", b"0000000\0", bytes(155), bytes(12),
    ]
    block = b"".join(fields)
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]
