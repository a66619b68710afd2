"""The Diff service: a layer's blob into a snapshot, and a snapshot's changes into a blob.

Runs in: the daemon's event loop; the work itself in worker threads.
Spec: containerd API, services/diff/v1; containerd 2.x core/diff/{apply,walking} (which mounts are written to directly).

A mount of which the upper directory is known is not mounted: the layer is unpacked right there, in overlay form. When that
directory is a new snapshot of the erofs driver, the layer becomes an image beside it instead. Anything else is mounted for the
time, detached, so that the mount goes when this process does.

Not here: snapshots (`boxship.containerd.snapshots`), which layers an image has (`boxship.images.unpack`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from boxship.abi import syscalls
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.snapshots.driver import Driver, Mount
from boxship.containerd.snapshots.erofs import ErofsDriver
from boxship.images.layers import apply, diff, names, streams, unpack
from boxship.images.layers.compress import Compressor
from boxship.images.layers.lowers import Lowers
from boxship.images.store import Store, Writer
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, from_os_error
from boxship.linux import _sys, mounts
from boxship.oci.image import MEDIA_TYPE_LAYER, MEDIA_TYPE_LAYER_GZIP

UNCOMPRESSED = "containerd.io/uncompressed"
_EMPTY = "unpacked layer has no mounts"


class Content(Protocol):
    """What is needed of the Content service."""

    def store(self, call: Call) -> Store:
        """The blobs as a namespace and lease see them."""


class Diff:
    """containerd.services.diff.v1.Diff."""

    def __init__(self, content: Content, drivers: Iterable[Driver] = (), limits: names.Limits | None = None) -> None:
        """`drivers`: the snapshot drivers of this process, whose mounts are recognised."""
        self._content = content
        self._images = [driver for driver in drivers if isinstance(driver, ErofsDriver)]
        self._limits = limits or names.Limits()

    async def Apply(self, request: Any, call: Call) -> Any:
        """Unpack a layer into what the mounts show, and answer with its uncompressed form's descriptor."""
        wanted = request.diff
        entries = from_messages(request.mounts)
        if not entries:
            raise InvalidArgument("apply: no mounts: invalid argument")
        streams.compression(wanted.media_type)
        fd = self._content.store(call).open(wanted.digest)
        try:
            work = asyncio.ensure_future(asyncio.to_thread(self.apply, fd, wanted.media_type, entries, request.sync_fs))
            try:
                done = await asyncio.shield(work)
            except asyncio.CancelledError:
                # The thread still writes to the snapshot, which the caller is about to remove.
                await asyncio.wait([work])
                raise
        finally:
            os.close(fd)
        return pb.diff.ApplyResponse(
            applied=pb.types.Descriptor(media_type=MEDIA_TYPE_LAYER, digest=done.diff_id, size=done.size))

    def apply(self, blob_fd: int, media_type: str, entries: list[Mount], sync: bool = False) -> unpack.Unpacked:
        """Apply in a thread: the layer `blob_fd` (borrowed) into `entries`. Raises as unpack does, and FailedPrecondition."""
        place = writable(entries)
        try:
            if place is None:
                with shown(entries) as root:
                    done = unpack.unpack(blob_fd, media_type, root, limits=self._limits)
                    if sync:
                        _sync(root)
                return done
            root, form, lowers = place
            for driver in self._images:
                image = driver.image_for(root)
                if image:
                    done = unpack.to_image(blob_fd, media_type, image, root, lowers=lowers, limits=self._limits)
                    if os.path.exists(image):
                        driver.adopt(image)
                    break
            else:
                done = unpack.unpack(blob_fd, media_type, root, form, lowers=lowers, limits=self._limits)
            if sync:
                _sync(root)
            return done
        except OSError as error:
            raise from_os_error(error, "unpacking a layer:") from error

    async def Diff(self, request: Any, call: Call) -> Any:
        """Write what `right` has beyond `left` as a layer into the content store, and answer with its descriptor."""
        media_type = request.media_type or MEDIA_TYPE_LAYER_GZIP
        kind = streams.compression(media_type)
        left, right = from_messages(request.left), from_messages(request.right)
        labels = dict(request.labels)
        epoch = request.source_date_epoch.seconds if request.HasField("source_date_epoch") else None
        store = self._content.store(call)
        ref = request.ref or f"diff-{time.time_ns()}-{secrets.token_urlsafe(3)}"
        writer = store.writer(ref)
        try:
            if writer.offset:
                writer.truncate(0)
            work = asyncio.ensure_future(asyncio.to_thread(self._diff, left, right, kind, writer, epoch))
            try:
                diff_id, size = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise
            except BaseException:
                writer.close()
                store.abort(ref)
                raise
        finally:
            writer.close()
        digest = writer.digest()
        if kind:
            labels[UNCOMPRESSED] = diff_id
        if labels:
            store.set_labels(digest, labels)
        return pb.diff.DiffResponse(diff=pb.types.Descriptor(media_type=media_type, digest=digest, size=size))

    def _diff(self, left: list[Mount], right: list[Mount], kind: str, writer: Writer, epoch: int | None) -> tuple[str, int]:
        sink = Compressor(kind, writer.write)
        try:
            write_diff(left, right, sink.write, epoch)
        except OSError as error:
            raise from_os_error(error, "making a layer:") from error
        diff_id = sink.finish()
        try:
            writer.commit(sink.size, "")
        except AlreadyExists:
            pass  # the very same layer, which is what was asked for
        return diff_id, sink.size


def from_messages(messages: Iterable[Any]) -> list[Mount]:
    """Mounts of the API."""
    return [Mount(each.type, each.source, list(each.options), each.target) for each in messages]


def to_messages(entries: Iterable[Mount]) -> list[Any]:
    """Mounts for the API."""
    return [
        pb.types.Mount(type=entry.type, source=entry.source, target=entry.target, options=entry.options) for entry in entries
    ]


def writable(entries: list[Mount]) -> tuple[str, str, Lowers] | None:
    """The directory that is written to through the mounts, the form of whiteouts in it, and what is below it.

    None when there is no such directory and they have to be mounted. Raises FailedPrecondition when they are read-only.
    """
    if len(entries) != 1:
        return None
    entry = entries[0]
    if entry.type == "overlay":
        upper, lowers = layers_of(entry)
        if not upper:
            raise FailedPrecondition("unpacking into a read-only mount: failed precondition")
        return upper, apply.USER_OVERLAY if "userxattr" in entry.options else apply.OVERLAY, Lowers(lowers)
    if entry.type == "bind" or {"bind", "rbind"} & set(entry.options):
        if "ro" in entry.options:
            raise FailedPrecondition("unpacking into a read-only mount: failed precondition")
        return entry.source, apply.PLAIN, Lowers()
    return None


def layers_of(entry: Mount) -> tuple[str, list[str]]:
    """An overlay's upper directory ("" without one) and its lower ones; of a bind, what is bound."""
    upper, lowers = "", []
    for option in entry.options:
        if option.startswith("upperdir="):
            upper = option[9:]
        elif option.startswith("lowerdir="):
            lowers = [lower.replace("\\:", ":") for lower in mounts.split_lowers(option[9:])]
    if entry.type != "overlay":
        lowers = [entry.source]
    return upper, lowers


def write_diff(left: list[Mount], right: list[Mount], write: Callable[[bytes], object], epoch: int | None) -> None:
    """Write the layer that turns `left` into `right`. Two stacks that differ in one directory are not walked but for that one."""
    top = _top(left, right)
    if top is not None:
        diff.write_upper(top[0], top[1], write, epoch)
        return
    with shown(left) as before, shown(right) as after:
        diff.write_changes(before, after, write, epoch)


def _top(left: list[Mount], right: list[Mount]) -> tuple[str, Lowers] | None:
    if len(left) != 1 or len(right) != 1 or right[0].type != "overlay" or left[0].type not in ("bind", "overlay"):
        return None
    if any(_is_on(f"/sys/module/overlay/parameters/{name}") for name in ("redirect_dir", "metacopy")):
        return None  # an upper directory then does not hold all that it shows
    upper, lowers = layers_of(right[0])
    stack = [upper, *lowers] if upper else lowers
    left_upper, below = layers_of(left[0])
    if left_upper or stack[1:] != below:
        return None
    return stack[0], Lowers(below)


def _is_on(parameter: str) -> bool:
    try:
        with open(parameter, encoding="ascii") as file:
            return file.read(1) in "Y1"
    except FileNotFoundError:
        return False


@contextmanager
def shown(entries: list[Mount]) -> Iterator[str]:
    """A path below which the mounts are, for as long as it is used. An upper directory is shown as a read-only layer of it."""
    if not entries:
        raise InvalidArgument("no mounts: invalid argument")
    if len(entries) != 1:
        raise InvalidArgument("more than one mount: not supported here: invalid argument")
    entry = _read_only(entries[0])
    fd = mounts.detached(entry.type, entry.source, entry.options)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _read_only(entry: Mount) -> Mount:
    """Of an overlay that may be in use elsewhere: two mounts must not share an upper directory."""
    upper, lowers = layers_of(entry)
    if entry.type != "overlay" or not upper:
        return entry
    kept = [option for option in entry.options if not option.startswith(("upperdir=", "workdir=", "lowerdir=", "index="))]
    joined = ":".join(path.replace(":", "\\:") for path in [upper, *lowers])
    return Mount("overlay", "overlay", [*kept, f"lowerdir={joined}"])


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sys.syscall(syscalls.SYNCFS, fd)
    finally:
        os.close(fd)
