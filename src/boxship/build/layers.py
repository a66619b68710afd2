"""Layers and snapshots of a build, through containerd's services: made, kept while the build goes on, looked into.

Runs in: the daemon, on its event loop; what reads and writes files in worker threads.
Spec: containerd's Content, Snapshots and Diff services; image-spec config.md (chain ids).

Whatever is made belongs to the build's lease, so that a build that is killed leaves nothing that is not collected.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.images import media
from boxship.images.layers.compress import Compressor
from boxship.images.layers.streams import compression
from boxship.images.platforms import host
from boxship.images.pull import Flights
from boxship.images.pull import Layer as ImageLayer
from boxship.images.service import blobs
from boxship.images.store import CHUNK, exists
from boxship.images.unpack import ServiceUnpacker, chain_ids
from boxship.kit.errors import AlreadyExists, BoxshipError, NotFound
from boxship.linux.roots import Root
from boxship.oci.image import MEDIA_TYPE_CONFIG, MEDIA_TYPE_LAYER_GZIP, Descriptor

T = TypeVar("T")

EMPTY_DIFF_ID = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
"""Of a tar without members: a step that changed no file makes no layer."""


class Layer(NamedTuple):
    """A layer of an image: its blob, and the digest of its tar."""

    descriptor: Descriptor
    diff_id: str


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread, to its end even when the build is cancelled: what it uses must not be taken from under it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Layers:
    """The layers of one snapshotter under one lease."""

    def __init__(self, containerd: Containerd, call: Call, snapshotter: str, flights: Flights, media_type: str = "") -> None:
        """`call` has the build's lease."""
        self.containerd = containerd
        self.call = call
        self.snapshotter = snapshotter
        self.blobs = blobs(containerd.content, call)
        self._flights = flights
        self._media_type = media_type or MEDIA_TYPE_LAYER_GZIP

    # blobs

    async def write(self, produce: Callable[[Callable[[bytes], object]], None]) -> Layer | None:
        """The layer whose tar `produce(write)` writes, in a worker thread; None when the tar is empty."""
        ref = f"build-{secrets.token_hex(12)}"
        kind = compression(self._media_type)
        writer = await self.blobs.writer(ref)
        try:
            with tempfile.TemporaryFile() as spool:
                def work() -> Compressor:
                    made = Compressor(kind, direct.write if direct is not None else spool.write)
                    produce(made.write)
                    return made

                # A store of this process is written to by the thread itself, another through its service afterwards.
                direct = getattr(writer, "writer", None)
                made_by: list[str] = []

                def run() -> Compressor:
                    compressor = work()
                    made_by.append(compressor.finish())
                    return compressor

                compressor = await in_thread(run)
                diff_id = made_by[0]
                if diff_id == EMPTY_DIFF_ID:
                    await writer.close()
                    await self.blobs.abort(ref)
                    return None
                if direct is None:
                    spool.seek(0)
                    while piece := spool.read(CHUNK):
                        await writer.write(piece)
                labels = {media.UNCOMPRESSED: diff_id} if kind else {}
                digest = await writer.commit(compressor.size, "", labels)
        except BaseException:
            await writer.close()
            await asyncio.shield(self.blobs.abort(ref))
            raise
        await writer.close()
        return Layer(Descriptor(media_type=self._media_type, digest=digest, size=compressor.size), diff_id)

    async def has(self, layer: Layer) -> bool:
        """Whether the blob is here."""
        return await exists(self.blobs, layer.descriptor.digest)

    # snapshots

    async def exists(self, chain: str) -> bool:
        """Whether there is a snapshot of that name."""
        try:
            await self.containerd.snapshots.Stat(
                pb.snapshots.StatSnapshotRequest(snapshotter=self.snapshotter, key=chain), self.call)
        except NotFound:
            return False
        return True

    async def ensure(self, layers: Sequence[Layer]) -> str:
        """Make the snapshots of a stack of layers, those that are missing; the topmost's name, "" for no layer.

        Raises NotFound when a blob is missing.
        """
        if not layers:
            return ""
        chain = chain_ids([layer.diff_id for layer in layers])[-1]
        if await self.exists(chain):
            return chain
        unpacker = ServiceUnpacker(self.containerd, self.call, self.blobs, self.snapshotter, flights=self._flights)
        # The labels that keep an image's snapshots are put on its configuration once there is one.
        config = Descriptor(media_type=MEDIA_TYPE_CONFIG, digest=layers[-1].descriptor.digest, size=0)
        await unpacker.unpack(
            [ImageLayer(layer.descriptor, layer.diff_id) for layer in layers], config, host(), _ready, None)
        return chain

    @asynccontextmanager
    async def view(self, layers: Sequence[Layer]) -> AsyncIterator[Root | None]:
        """The root that the layers make, to look into; None for no layer."""
        chain = await self.ensure(layers)
        if not chain:
            yield None
            return
        async with self.mounts(chain) as mounts:
            with await in_thread(lambda: Root(mounts, read_only=True)) as root:
                yield root

    @asynccontextmanager
    async def mounts(self, chain: str, *, writable: bool = False) -> AsyncIterator[list[Any]]:
        """The mounts of a view of a snapshot, or of a place over it to write to that is thrown away."""
        key = f"build-{secrets.token_hex(12)}"
        service = self.containerd.snapshots
        if writable:
            made: Any = await service.Prepare(
                pb.snapshots.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=chain), self.call)
        else:
            made = await service.View(
                pb.snapshots.ViewSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=chain), self.call)
        try:
            yield list(made.mounts)
        finally:
            await asyncio.shield(self.remove(key))

    async def prepare(self, key: str, chain: str, labels: dict[str, str]) -> list[Any]:
        """A new active snapshot over `chain`: its mounts."""
        made = await self.containerd.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=chain, labels=labels), self.call)
        return list(made.mounts)

    async def commit(self, key: str, mounts: list[Any], below: Sequence[Layer], epoch: int | None) -> Layer | None:
        """What the active snapshot has beyond the layers below it, as a layer; None for nothing. The snapshot is used up."""
        parent = chain_ids([layer.diff_id for layer in below])[-1] if below else ""
        request = pb.diff.DiffRequest(right=mounts, media_type=self._media_type, ref=f"build-{key}")
        if epoch is not None:
            request.source_date_epoch.seconds = epoch
        async with self.mounts(parent) as left:
            request.left.extend(left)
            made = (await self.containerd.diff.Diff(request, self.call)).diff
        info = (await self.containerd.content.Info(pb.content.InfoRequest(digest=made.digest), self.call)).info
        diff_id = info.labels.get(media.UNCOMPRESSED, made.digest)
        if diff_id == EMPTY_DIFF_ID:
            await self.remove(key)
            return None
        layer = Layer(Descriptor(media_type=made.media_type, digest=made.digest, size=made.size), diff_id)
        chain = chain_ids([each.diff_id for each in (*below, layer)])[-1]
        try:
            await self.containerd.snapshots.Commit(pb.snapshots.CommitSnapshotRequest(
                snapshotter=self.snapshotter, name=chain, key=key), self.call)
        except AlreadyExists:
            await self.remove(key)
        return layer

    async def remove(self, key: str) -> None:
        """Remove a snapshot, if it is there."""
        try:
            await self.containerd.snapshots.Remove(
                pb.snapshots.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key), self.call)
        except BoxshipError:
            return  # not there, or somebody stands on it: then the lease's end collects it


async def _ready(_: Descriptor) -> None:
    """The blobs are here already."""


def upper_directory(mounts: list[Any]) -> str:
    """The directory of the host that is written to through an active snapshot's mounts; "" when there is none to be seen."""
    if len(mounts) != 1:
        return ""
    options = list(mounts[0].options)
    if mounts[0].type == "overlay":
        return next((option[9:] for option in options if option.startswith("upperdir=")), "")
    return str(mounts[0].source) if mounts[0].type == "bind" or {"bind", "rbind"} & set(options) else ""


def remove_stubs(upper: str, paths: Sequence[str]) -> None:
    """Take the empty files and directories out of `upper` that a runtime made to mount on.

    `paths`: those that were not there before, relative to the root. Whatever has something in it stays.
    """
    for path in sorted(paths, key=lambda each: -each.count("/")):
        above, _, name = path.rpartition("/")
        fd = _open_inside(upper, above)
        if fd < 0:
            continue
        try:
            try:
                os.rmdir(name, dir_fd=fd)
            except NotADirectoryError:
                if os.stat(name, dir_fd=fd, follow_symlinks=False).st_size == 0:
                    os.unlink(name, dir_fd=fd)
            except OSError:
                continue  # not empty, or gone: both are the step's own doing
        finally:
            os.close(fd)


def drop_untouched(upper: str, path: str, like: tuple[int, int, int, int]) -> None:
    """Remove an empty directory from an overlay's upper directory that is as the one below it: (mode, uid, gid, mtime in ns).

    Making a stub copies its directory up; that is no change of the step's.
    """
    above, _, name = path.rpartition("/")
    fd = _open_inside(upper, above)
    if fd < 0:
        return
    try:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (found.st_mode, found.st_uid, found.st_gid) == like[:3]:
            inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                opaque = any(each.endswith("overlay.opaque") for each in os.listxattr(inside))
                if not os.listdir(inside) and not opaque:
                    os.rmdir(name, dir_fd=fd)
                elif found.st_mtime_ns != like[3]:
                    os.utime(inside, ns=(like[3], like[3]))
            finally:
                os.close(inside)
    except OSError:
        return  # gone, or something else now
    finally:
        os.close(fd)


def _open_inside(upper: str, path: str) -> int:
    """A descriptor of a directory below `upper`, no link followed; -1 when there is none."""
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in filter(None, path.split("/")):
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            os.close(fd)
            return -1
        os.close(fd)
        fd = below
    return fd
