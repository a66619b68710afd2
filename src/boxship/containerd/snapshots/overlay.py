"""The overlayfs snapshotter: a directory for each layer, overlayfs stacks them. Root, and rootless in a user namespace.

Runs in: the daemon, any thread.
Spec: containerd 2.x plugins/snapshots/overlay (layout, options of the mounts); Documentation/filesystems/overlayfs.rst. In a user
namespace Linux ≥ 5.11, with `userxattr`.

    ROOT/snapshots/ID/fs      what this snapshot has beyond its parents: the upper directory
    ROOT/snapshots/ID/work    overlayfs's own, for an active snapshot
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from boxship.containerd.snapshots.base import BaseDriver, disk_usage
from boxship.containerd.snapshots.driver import ACTIVE, VIEW, Mount, Usage

if TYPE_CHECKING:
    from boxship.containerd.snapshots.database import Row


class OverlayDriver(BaseDriver):
    """Layers as directories, mounted together by overlayfs."""

    name = "overlayfs"

    def __init__(self, root: str, *, userxattr: bool = False, options: tuple[str, ...] = ()) -> None:
        """`userxattr`: for user namespaces; opaque directories are then marked so. `options`: added to each mount."""
        self._options = [*options]
        if userxattr:
            self._options.append("userxattr")
        # Where the kernel has it on by default, one lower layer could not be used by two uppers.
        if os.path.exists("/sys/module/overlay/parameters/index"):
            self._options.append("index=off")
        super().__init__(root)

    def _make(self, directory: str, kind: int, parents: list[Row]) -> None:
        os.chmod(directory, 0o711 if kind == ACTIVE else 0o700)
        upper = os.path.join(directory, "fs")
        os.mkdir(upper, 0o755)
        os.chmod(upper, 0o755)
        if kind == ACTIVE:
            os.mkdir(os.path.join(directory, "work"), 0o711)
        if parents:
            # The root of an overlay looks as its uppermost directory does: as that of the parent.
            like(upper, self._dirs(parents[0])[0])

    def _dirs(self, row: Row) -> list[str]:
        """The directories of a committed snapshot alone, the uppermost first."""
        return [os.path.join(self.directory(row.id), "fs")]

    def _below(self, row: Row, parents: list[Row]) -> list[str]:
        """The lower directories of a view or an active snapshot, the uppermost first."""
        return [path for parent in parents for path in self._dirs(parent)]

    def _mounts(self, row: Row, parents: list[Row]) -> list[Mount]:
        upper = os.path.join(self.directory(row.id), "fs")
        lowers = self._below(row, parents)
        if row.kind == VIEW:
            if len(lowers) <= 1:
                return [Mount("bind", lowers[0] if lowers else upper, ["ro", "rbind"])]
            return [Mount("overlay", "overlay", [*self._options, "lowerdir=" + _joined(lowers)])]
        if not lowers:
            return [Mount("bind", upper, ["rw", "rbind"])]
        work = os.path.join(self.directory(row.id), "work")
        return [Mount("overlay", "overlay", [
            *self._options, f"workdir={work}", f"upperdir={upper}", "lowerdir=" + _joined(lowers),
        ])]

    def _measure(self, row: Row) -> Usage:
        return disk_usage(os.path.join(self.directory(row.id), "fs"))


def like(directory: str, other: str) -> None:
    """Give a directory the owner, mode and times of another."""
    status = os.stat(other)
    os.chown(directory, status.st_uid, status.st_gid)
    os.chmod(directory, stat.S_IMODE(status.st_mode))
    os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns))


def _joined(lowers: list[str]) -> str:
    return ":".join(lower.replace("\\", "\\\\").replace(":", "\\:") for lower in lowers)
