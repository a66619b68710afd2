"""The native snapshotter: every snapshot is a whole copy of its parent. Works on any file system, and takes the space.

Runs in: the daemon, any thread.
Spec: containerd 2.x plugins/snapshots/native.

    ROOT/snapshots/ID/fs      the whole tree
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from boxship.containerd.snapshots.base import BaseDriver, disk_usage
from boxship.containerd.snapshots.copy import copy_tree
from boxship.containerd.snapshots.driver import VIEW, Mount, Usage

if TYPE_CHECKING:
    from boxship.containerd.snapshots.database import Row


class NativeDriver(BaseDriver):
    """Layers as copies."""

    name = "native"

    def _make(self, directory: str, kind: int, parents: list[Row]) -> None:
        if kind == VIEW and parents:
            return  # the parent's own tree is mounted, read-only
        tree = os.path.join(directory, "fs")
        os.mkdir(tree, 0o755)
        os.chmod(tree, 0o755)
        if parents:
            copy_tree(os.path.join(self.directory(parents[0].id), "fs"), tree)

    def _mounts(self, row: Row, parents: list[Row]) -> list[Mount]:
        number = parents[0].id if row.kind == VIEW and parents else row.id
        return [Mount("bind", os.path.join(self.directory(number), "fs"), ["ro" if row.kind == VIEW else "rw", "rbind"])]

    def _measure(self, row: Row) -> Usage:
        return disk_usage(os.path.join(self.directory(row.id), "fs"))
