"""A layer being put together: names, and where their content comes from; written out as one deterministic tar.

Runs in: the daemon, in a worker thread.
Not here: which files (`boxship.images.builtin.python`, `boxship.images.builtin.host`).
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from typing import IO


class Tree:
    """What a layer has in it. Everything belongs to root; a path is without leading slash."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tarfile.TarInfo, str | bytes]] = {}

    def __contains__(self, path: str) -> bool:
        return path.strip("/") in self._entries

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder and, where they are missing, those above it. A later call decides the mode."""
        path = path.strip("/")
        parent = os.path.dirname(path)
        if parent and parent not in self._entries:
            self.folder(parent)
        info = self._info(path, tarfile.DIRTYPE, mode, 0)
        self._entries[path] = info, b""

    def link(self, path: str, to: str) -> None:
        """A symbolic link."""
        info = self._info(path, tarfile.SYMTYPE, 0o777, 0)
        info.linkname = to
        self._add(info, b"")

    def data(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A file of this content."""
        info = self._info(path, tarfile.REGTYPE, mode, 0)
        info.size = len(content)
        self._add(info, content)

    def file(self, path: str, source: str) -> None:
        """A copy of a file of the machine, links followed. Raises OSError."""
        status = os.stat(source)
        info = self._info(path, tarfile.REGTYPE, 0o755 if status.st_mode & 0o111 else 0o644, int(status.st_mtime))
        info.size = status.st_size
        self._add(info, source)

    def copy(self, path: str, source: str) -> None:
        """A folder with all below: folders, small regular files, which are read now, links as they are. Raises OSError."""
        self.folder(path, stat.S_IMODE(os.stat(source).st_mode) & 0o1777)
        with os.scandir(source) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for child in children:
            below = f"{path}/{child.name}"
            if child.is_symlink():
                self.link(below, os.readlink(child.path))
            elif child.is_dir(follow_symlinks=False):
                self.copy(below, child.path)
            elif child.is_file(follow_symlinks=False):
                status = child.stat()
                with open(child.path, "rb") as file:
                    self.data(below, file.read(), 0o755 if status.st_mode & 0o111 else 0o644)

    def write(self, out: IO[bytes]) -> None:
        """The tar, members sorted by path. Raises OSError; ValueError when a file of the machine changed its size meanwhile."""
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
            for path in sorted(self._entries):
                info, source = self._entries[path]
                if isinstance(source, bytes):
                    tar.addfile(info, io.BytesIO(source) if source else None)
                    continue
                with open(source, "rb") as file:
                    if os.fstat(file.fileno()).st_size != info.size:
                        raise ValueError(f"{source} changed while it was copied")
                    tar.addfile(info, file)

    def _info(self, path: str, kind: bytes, mode: int, mtime: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(path.strip("/"))
        info.type = kind
        info.mode = mode
        info.mtime = mtime
        return info

    def _add(self, info: tarfile.TarInfo, source: str | bytes) -> None:
        parent = os.path.dirname(info.name)
        if parent and parent not in self._entries:
            self.folder(parent)
        self._entries[info.name] = info, source






