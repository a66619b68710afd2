"""From a layer's blob to what a snapshot is made of, in one pass: decompressed, hashed, and unpacked or made an image.

Runs in: any thread; see streams.py for the threads beside it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from boxship.images.layers import apply, erofs, names, streams, tar
from boxship.kit import failpoint

if TYPE_CHECKING:
    from boxship.images.layers.apply import IdMap
    from boxship.images.layers.lowers import Lowers


class Unpacked:
    """What a layer turned out to be.

    Attributes:
        diff_id: the digest of the uncompressed tar, which the caller compares with the image's.
        size: bytes of the uncompressed tar.
        entries: members of the tar.
        devices: names of devices that were left out, for want of the right to make them.
    """

    __slots__ = ("devices", "diff_id", "entries", "size")

    def __init__(self, diff_id: str, size: int, entries: int, devices: list[bytes]) -> None:
        self.diff_id = diff_id
        self.size = size
        self.entries = entries
        self.devices = devices


def unpack(
    blob_fd: int, media_type: str, root: str, form: str = apply.PLAIN, *, lowers: Lowers | None = None, uid_map: IdMap = (),
    gid_map: IdMap = (), limits: names.Limits | None = None,
) -> Unpacked:
    """Unpack the layer `blob_fd` (borrowed) into the directory `root`; see `apply.apply`. Blocks.

    Raises Unsupported for the media type, InvalidArgument for a broken or hostile layer, OSError.
    """
    streams.compression(media_type)
    limits = limits or names.Limits()
    with streams.Layer(streams.reader(blob_fd), limits.size) as layer:
        done = apply.apply(
            tar.Stream(layer.read), root, form, lowers=lowers, uid_map=uid_map, gid_map=gid_map, limits=limits)
        return Unpacked(layer.finish(), layer.size, done.entries, done.devices)


def to_image(
    blob_fd: int, media_type: str, image: str, root: str, *, lowers: Lowers | None = None, uid_map: IdMap = (),
    gid_map: IdMap = (), limits: names.Limits | None = None,
) -> Unpacked:
    """Make the EROFS image `image` (a new file) of the layer `blob_fd` (borrowed). Blocks.

    Where the tar cannot be shown as an image it is unpacked into the directory `root` instead, in overlay form, and there is no
    file `image` afterwards. Nor is there after an error. Raises as `unpack` does.
    """
    streams.compression(media_type)
    limits = limits or names.Limits()
    fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    keep = False
    try:
        with streams.Layer(streams.reader(blob_fd), limits.size) as layer:
            at = erofs.TAR_OFFSET
            while piece := layer.read():
                view = memoryview(piece)
                while view:
                    written = os.pwrite(fd, view, at)
                    at += written
                    view = view[written:]
            failpoint.hit("layer.written")
            diff_id, size = layer.finish(), layer.size
        try:
            entries = erofs.convert(
                fd, size, lowers=lowers, uid_map=uid_map, gid_map=gid_map, uuid=bytes.fromhex(diff_id[7:39]), limits=limits)
            keep = True
            return Unpacked(diff_id, size, entries, [])
        except erofs.NotConvertible:
            with tar.Mapped(fd, erofs.TAR_OFFSET, erofs.TAR_OFFSET + size) as source:
                done = apply.apply(
                    source, root, apply.OVERLAY, lowers=lowers, uid_map=uid_map, gid_map=gid_map, limits=limits)
            return Unpacked(diff_id, size, done.entries, done.devices)
    finally:
        os.close(fd)
        if not keep:
            os.unlink(image)
