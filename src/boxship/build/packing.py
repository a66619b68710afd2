"""A directory as the tar that a build context is sent as.

Runs in: the boxship command.
Spec: docker's contexts: owners are root's, names relative, sorted; .dockerignore is applied, and is sent too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from boxship.images.layers.diff import BLOCK, header
from boxship.kit.errors import InvalidArgument, from_os_error

_PIECE = 1 << 20


def pack(
    directory: str, excluded: Callable[[str], bool], pruned: Callable[[str], bool], *, prefix: str = "",
) -> Iterator[bytes]:
    """The members below `directory`, each name behind `prefix`; `close_archive` ends the tar.

    `excluded`: whether a path is left out. `pruned`: whether an excluded directory has nothing in it that is not.
    A link is sent as a link, wherever it leads. Raises BoxshipError's for what cannot be read.
    """
    buffer = bytearray()
    if prefix:
        buffer += header(os.fsencode(prefix), b"5", 0, mode=0o755)
    links: dict[tuple[int, int], bytes] = {}
    for path, place, status in _walk(directory, "", excluded, pruned):
        name = os.fsencode(prefix + path)
        mode, mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            buffer += header(name + b"/", b"5", 0, mode=mode, mtime=mtime)
        elif kind == stat.S_IFLNK:
            buffer += header(name, b"2", 0, mode=0o777, mtime=mtime, link=os.fsencode(os.readlink(place)))
        elif kind == stat.S_IFREG:
            first = links.setdefault((status.st_dev, status.st_ino), name) if status.st_nlink > 1 else name
            if first != name:
                buffer += header(name, b"1", 0, mode=mode, mtime=mtime, link=first)
                continue
            yield from _file(place, name, mode, mtime, buffer)
        elif kind == stat.S_IFIFO:
            buffer += header(name, b"6", 0, mode=mode, mtime=mtime)
        if len(buffer) >= _PIECE:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


def _file(place: str, name: bytes, mode: int, mtime: int, buffer: bytearray) -> Iterator[bytes]:
    try:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, "reading the build context") from None
    try:
        size = left = os.fstat(fd).st_size
        buffer += header(name, b"0", size, mode=mode, mtime=mtime)
        while left:
            piece = os.read(fd, min(left, _PIECE))
            if not piece:
                raise InvalidArgument(f"{place} became shorter while it was sent")
            left -= len(piece)
            buffer += piece
            if len(buffer) >= _PIECE:
                yield bytes(buffer)
                buffer.clear()
        buffer += bytes(-size % BLOCK)
    finally:
        os.close(fd)


def _walk(
    directory: str, path: str, excluded: Callable[[str], bool], pruned: Callable[[str], bool],
) -> Iterator[tuple[str, str, os.stat_result]]:
    try:
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise from_os_error(error, "reading the build context") from None
    for entry in found:
        below = f"{path}/{entry.name}" if path else entry.name
        out = excluded(below)
        is_dir = entry.is_dir(follow_symlinks=False)
        if out and (not is_dir or pruned(below)):
            continue
        if not out:
            yield below, entry.path, entry.stat(follow_symlinks=False)
        if is_dir:
            yield from _walk(entry.path, below, excluded, pruned)


def one_file(name: str, data: bytes) -> bytes:
    """A member that is in memory."""
    return header(os.fsencode(name), b"0", len(data), mode=0o644) + data + bytes(-len(data) % BLOCK)


def close_archive() -> bytes:
    """The end of the tar."""
    return bytes(2 * BLOCK)
