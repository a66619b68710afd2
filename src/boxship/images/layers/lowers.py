"""The layers below: what a path is in them, seen as overlayfs shows it.

Runs in: any thread.
A layer's tar may leave out the directories above its entries, and may link to a file of a layer below. Both need what is there.

Not here: following symbolic links across layers (`boxship.images.layers.apply` does it a step at a time).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OPAQUE_XATTRS = ("trusted.overlay.opaque", "user.overlay.opaque")


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it is a character device 0/0, by which overlayfs knows a name that is gone."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(directory: int | str) -> bool:
    """Whether the directory hides those of the same name below it."""
    for name in OPAQUE_XATTRS:
        try:
            if os.getxattr(directory, name) == b"y":
                return True
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES):
                raise
    return False


class Lowers:
    """Directories in overlay form, the topmost first."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        self.paths = list(paths)

    def __bool__(self) -> bool:
        return bool(self.paths)

    def find(self, path: bytes) -> tuple[str, os.stat_result] | None:
        """Where `path` is (without a link in it that is followed), and its status; None when it is nowhere or hidden."""
        parts = path.split(b"/") if path else []
        for root in self.paths:
            found = self._in_layer(root, parts)
            if found is not None:
                return (f"{root}/{os.fsdecode(path)}", found) if not is_whiteout(found) else None
            if self._hidden:
                return None
        return None

    _hidden = False

    def _in_layer(self, root: str, parts: list[bytes]) -> os.stat_result | None:
        self._hidden = False
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            for at, part in enumerate(parts):
                try:
                    status = os.stat(part, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    self._hidden = self._hidden or is_opaque(fd)
                    return None
                if at == len(parts) - 1:
                    break
                if not stat.S_ISDIR(status.st_mode):
                    self._hidden = True
                    return None
                self._hidden = self._hidden or (at > 0 and is_opaque(fd))
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
            return status
        finally:
            os.close(fd)

    def names(self) -> Iterator[bytes]:
        """What is in the root of any of them."""
        seen: set[bytes] = set()
        for root in self.paths:
            for name in os.listdir(os.fsencode(root)):
                if name not in seen:
                    seen.add(name)
                    yield name


    def children(self, path: bytes) -> set[bytes]:
        """The names in the directory `path`, as overlayfs shows it."""
        found: set[bytes] = set()
        gone: set[bytes] = set()
        parts = path.split(b"/") if path else []
        for root in self.paths:
            status = self._in_layer(root, parts)
            if status is not None:
                if not stat.S_ISDIR(status.st_mode):
                    break
                place = f"{root}/{os.fsdecode(path)}"
                for name in map(os.fsencode, os.listdir(place)):
                    if name in found or name in gone:
                        continue
                    hidden = is_whiteout(os.stat(os.path.join(os.fsencode(place), name), follow_symlinks=False))
                    (gone if hidden else found).add(name)
                if path and is_opaque(place):
                    break
            if self._hidden:
                break
        return found


def copy_xattrs(source: str | int, target: str | int) -> None:
    """Every extended attribute but overlayfs's own, where the file system takes it; neither follows a link."""
    follow = isinstance(source, int)
    try:
        names = os.listxattr(source, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            continue
        value = os.getxattr(source, name, follow_symlinks=follow)
        try:
            os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM):
                raise
