"""The erofs snapshotter: a layer is the image file that its tar was made into; overlayfs stacks the mounted images.

Runs in: the daemon, any thread, as root.
Spec: containerd 2.x docs/snapshotters/erofs.md for the idea; overlayfs as in overlay.py. Linux ≥ 6.12 mounts images from files.

    ROOT/snapshots/ID/fs            what was written to the snapshot: the upper directory
    ROOT/snapshots/ID/work          overlayfs's own
    ROOT/snapshots/ID/layer.erofs   the image, when the snapshot was made of a layer's tar; `image_for` says where one may be put
    ROOT/layers/ID                  where the image is mounted

A snapshot's form says what it consists of: "" (its `fs`), "image", or "image+fs" when something was written over the image before
it was committed. An image is mounted when it is first needed, by this driver alone: mounts that are handed out name directories,
as those of the overlayfs snapshotter do. It stays mounted until the snapshot is removed or the driver is closed; who has mounted
what was handed out keeps it. After a SIGKILL the mounts of before are found in the mount table, and what the
active snapshots and views stand on is mounted again when the driver is opened.

Not here: how an image is made (`boxship.images.layers.erofs`).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from boxship.abi import mount as m
from boxship.containerd.snapshots.driver import ACTIVE, COMMITTED, Usage
from boxship.containerd.snapshots.overlay import OverlayDriver, like
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition, from_os_error
from boxship.linux import mounts

if TYPE_CHECKING:
    from boxship.containerd.snapshots.database import Row

IMAGE = "layer.erofs"
_PART = "layer.part"


class ErofsDriver(OverlayDriver):
    """Layers as EROFS images, mounted together by overlayfs."""

    name = "erofs"

    def __init__(self, root: str, *, options: tuple[str, ...] = ()) -> None:
        """`options`: added to each overlay."""
        self._layers = os.path.join(os.path.abspath(root), "layers")
        os.makedirs(self._layers, 0o700, exist_ok=True)
        prefix = self._layers + "/"
        self._mounted = {
            int(point[len(prefix) :]) for point in mounts.mount_points("erofs")
            if point.startswith(prefix) and point[len(prefix) :].isdigit()
        }
        super().__init__(root, options=options)
        self._mount_used()

    def _mount_used(self) -> None:
        """Mounts that were handed out before a restart may be carried out only now."""
        with self._database as database:
            for info in list(database.walk()):
                if info.kind != COMMITTED:
                    row = database.get(info.name)
                    try:
                        self._below(row, database.chain(row))
                    except BoxshipError:
                        continue  # an image that is gone: who uses the snapshot is told then

    def close(self) -> None:
        """See Driver."""
        for number in sorted(self._mounted):
            try:
                mounts.umount(os.path.join(self._layers, str(number)))
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
                    raise
        self._mounted.clear()
        super().close()

    # Images.

    def image_for(self, upper: str) -> str:
        """Where to put the image of the layer that is to be unpacked into `upper`, which `prepare` handed out.

        "" when it is not an untouched active snapshot of this driver. The file is not there; give it to `adopt` when it is whole.
        """
        directory = os.path.dirname(upper)
        number = os.path.basename(directory)
        if os.path.dirname(directory) != self._snapshots or os.path.basename(upper) != "fs" or not number.isdigit():
            return ""
        with self._database as database:
            if int(number) not in database.ids():
                return ""
            row = database.by_id(int(number))
        if row.kind != ACTIVE or row.form or os.listdir(upper):
            return ""
        for name in (_PART, IMAGE):
            try:
                os.unlink(os.path.join(directory, name))  # of a killed process
            except FileNotFoundError:
                pass
        return os.path.join(directory, _PART)

    def adopt(self, part: str) -> None:
        """Make the image that was put where `image_for` said the content of that snapshot. Raises FailedPrecondition, OSError."""
        directory = os.path.dirname(part)
        with self._database as database:
            row = database.by_id(int(os.path.basename(directory)))
            if row.kind != ACTIVE or row.form:
                raise FailedPrecondition(f"snapshot {row.key} cannot take an image now: failed precondition")
            failpoint.hit("snapshot.adopt")
            os.rename(part, os.path.join(directory, IMAGE))
            database.set_form(row.id, "image")

    def _mount_image(self, number: int) -> str:
        """Where the image is mounted, from now on. The database's lock is held."""
        target = os.path.join(self._layers, str(number))
        if number not in self._mounted:
            os.makedirs(target, 0o700, exist_ok=True)
            image = os.path.join(self.directory(number), IMAGE)
            try:
                mounts.attach("erofs", image, target, ["ro"])
            except OSError as error:
                raise from_os_error(error, f"mounting the layer {image}") from error
            self._mounted.add(number)
        return target

    # What differs from directories.

    def _dirs(self, row: Row) -> list[str]:
        if not row.form:
            return super()._dirs(row)
        image = [self._mount_image(row.id)]
        return image if row.form == "image" else super()._dirs(row) + image

    def _below(self, row: Row, parents: list[Row]) -> list[str]:
        if row.kind != ACTIVE or not row.form:
            return super()._below(row, parents)
        # It has its image already, and is mounted before it is committed.
        upper = os.path.join(self.directory(row.id), "fs")
        image = self._mount_image(row.id)
        if not os.listdir(upper):
            like(upper, image)
        return [image, *super()._below(row, parents)]

    def _form(self, row: Row) -> str:
        if row.form == "image" and os.listdir(os.path.join(self.directory(row.id), "fs")):
            return "image+fs"
        return row.form

    def _measure(self, row: Row) -> Usage:
        usage = super()._measure(row)
        if row.form:
            status = os.stat(os.path.join(self.directory(row.id), IMAGE))
            usage.inodes += 1
            usage.size += status.st_blocks * 512
        return usage

    def _release(self, number: int) -> None:
        target = os.path.join(self._layers, str(number))
        if number in self._mounted:
            # Lazily: a container of another mount namespace may have a copy of the mount, or a process its files open.
            try:
                mounts.umount(target, m.MNT_DETACH)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else unmounted it
                    raise
            self._mounted.discard(number)
        try:
            os.rmdir(target)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def cleanup(self) -> None:
        """See Driver: also mounts without a snapshot."""
        with self._database as database:
            known = database.ids()
            for name in os.listdir(self._layers):
                if name.isdigit() and int(name) not in known:
                    self._release(int(name))
        super().cleanup()
