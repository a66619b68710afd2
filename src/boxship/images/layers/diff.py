"""Makes a layer's tar of two directories, or of an overlay's upper directory.

Runs in: any thread, as whoever may read the directories.
Spec: image-spec 1.1.1, layer.md "Creating" and "Whiteouts": whiteouts come before their siblings, those of single names rather
than opaque ones, no sparse members. POSIX.1-2017 pax for what a ustar header cannot hold; extended attributes as SCHILY.xattr.
What counts as a change is what containerd takes for one.

The same trees make the same bytes: entries are sorted, times are whole seconds, names of owners are left out.

Not here: compression and where the tar goes (`boxship.containerd.diff`).
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING

from boxship.images.layers import names
from boxship.images.layers.lowers import Lowers, is_opaque, is_whiteout

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 512
_PIECE = 1 << 20
_LEFT_OUT = ("trusted.overlay.", "user.overlay.", "security.selinux")
"""Attributes of the machine, not of the image."""


def write_upper(upper: str, lowers: Lowers, write: Callable[[bytes], object], epoch: int | None = None) -> None:
    """Write the layer that the overlay upper directory `upper` is over `lowers`.

    `write` gets the tar in pieces. `epoch`: seconds; later times are put back to it. Raises OSError.
    """
    archive = _Archive(write, epoch)
    status = os.stat(upper)
    below = os.stat(lowers.paths[0]) if lowers else None
    if below is not None and _attributes(status) != _attributes(below):
        archive.add(upper, b"", status)
    _upper_directory(archive, upper, b"", lowers)
    archive.end()


def _upper_directory(archive: _Archive, directory: str, path: bytes, lowers: Lowers) -> None:
    found = {}
    for name in sorted(map(os.fsencode, os.listdir(directory))):
        found[name] = os.stat(os.path.join(os.fsencode(directory), name), follow_symlinks=False)
    gone = {name for name, status in found.items() if is_whiteout(status)}
    if path and is_opaque(directory):
        gone |= lowers.children(path) - found.keys()
    for name in sorted(gone):
        archive.whiteout(_join(path, name))
    for name, status in found.items():
        if name in gone:
            continue
        place = f"{directory}/{os.fsdecode(name)}"
        archive.add(place, _join(path, name), status)
        if stat.S_ISDIR(status.st_mode):
            _upper_directory(archive, place, _join(path, name), lowers)


def write_changes(left: str, right: str, write: Callable[[bytes], object], epoch: int | None = None) -> None:
    """Write the layer that turns the tree `left` into the tree `right`; see `write_upper`."""
    archive = _Archive(write, epoch)
    before, after = os.stat(left), os.stat(right)
    if _attributes(before) != _attributes(after):
        archive.add(right, b"", after)
    _Walk(archive).directory(left, right, b"", [])
    archive.end()


class _Walk:
    """Two trees side by side. A directory is written when it changed, or just before the first of its entries that did."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive

    def directory(self, left: str, right: str, path: bytes, pending: list[tuple[str, bytes, os.stat_result]]) -> None:
        before, after = _scan(left), _scan(right)
        for name in sorted(before.keys() - after.keys()):
            self._flush(pending)
            self._archive.whiteout(_join(path, name))
        for name, status in after.items():
            old = before.get(name)
            below, here = _join(path, name), f"{right}/{os.fsdecode(name)}"
            there = f"{left}/{os.fsdecode(name)}"
            both = old is not None and stat.S_ISDIR(old.st_mode) and stat.S_ISDIR(status.st_mode)
            if both:
                assert old is not None
                if _attributes(old) != _attributes(status) or _xattrs(there) != _xattrs(here):
                    self._flush(pending)
                    self._archive.add(here, below, status)
                    self.directory(there, here, below, [])
                else:
                    pending.append((here, below, status))
                    self.directory(there, here, below, pending)
                    if pending and pending[-1][1] == below:
                        pending.pop()
            elif old is None or not _same(there, old, here, status):
                self._flush(pending)
                self._archive.add(here, below, status)
                if stat.S_ISDIR(status.st_mode):
                    self._all(here, below)

    def _flush(self, pending: list[tuple[str, bytes, os.stat_result]]) -> None:
        for here, path, status in pending:
            self._archive.add(here, path, status)
        pending.clear()

    def _all(self, directory: str, path: bytes) -> None:
        for name, status in _scan(directory).items():
            place = f"{directory}/{os.fsdecode(name)}"
            self._archive.add(place, _join(path, name), status)
            if stat.S_ISDIR(status.st_mode):
                self._all(place, _join(path, name))


def _scan(directory: str) -> dict[bytes, os.stat_result]:
    found = {}
    for name in sorted(map(os.fsencode, os.listdir(directory))):
        try:
            found[name] = os.stat(os.path.join(os.fsencode(directory), name), follow_symlinks=False)
        except FileNotFoundError:
            continue  # a container that runs has removed it meanwhile
    return found


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _attributes(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid


def _same(left: str, before: os.stat_result, right: str, after: os.stat_result) -> bool:
    if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino):
        return True
    if _attributes(before) != _attributes(after) or before.st_rdev != after.st_rdev or _xattrs(left) != _xattrs(right):
        return False
    if stat.S_ISLNK(after.st_mode):
        return os.readlink(left) == os.readlink(right)
    if not stat.S_ISREG(after.st_mode):
        return True
    if before.st_size != after.st_size or before.st_mtime_ns // 10**9 != after.st_mtime_ns // 10**9:
        return False
    # Times from a tar are whole seconds, and a change within that second is not seen by them.
    if before.st_mtime_ns == after.st_mtime_ns and after.st_mtime_ns % 10**9:
        return True
    return _same_content(left, right)


def _same_content(left: str, right: str) -> bool:
    with open(left, "rb", buffering=0) as one, open(right, "rb", buffering=0) as other:
        while True:
            data = one.read(_PIECE)
            if data != other.read(_PIECE):
                return False
            if not data:
                return True


def _xattrs(path: str) -> dict[str, bytes]:
    try:
        listed = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return {}
        raise
    found = {}
    for name in sorted(listed):
        if not name.startswith(_LEFT_OUT):
            try:
                found[name] = os.getxattr(path, name, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                    raise
    return found


class _Archive:
    """A tar being written."""

    def __init__(self, write: Callable[[bytes], object], epoch: int | None) -> None:
        self._out = write
        self._epoch = epoch
        self._links: dict[tuple[int, int], bytes] = {}
        self._buffer = bytearray()

    def _write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _PIECE:
            self._out(bytes(self._buffer))
            self._buffer.clear()

    def end(self) -> None:
        """Two blocks of zeros, and what is still to be handed on."""
        self._write(bytes(2 * BLOCK))
        self._out(bytes(self._buffer))

    def whiteout(self, path: bytes) -> None:
        """`path` is gone."""
        above, slash, base = path.rpartition(b"/")
        self._write(header(above + slash + names.WHITEOUT + base, b"0", 0, mtime=self._epoch or 0))

    def add(self, place: str, path: bytes, status: os.stat_result) -> None:
        """The file at `place` as the entry `path`."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return  # means nothing without who listens
        mtime = int(status.st_mtime_ns // 10**9)
        if self._epoch is not None:
            mtime = min(mtime, self._epoch)
        described = partial(header, mode=stat.S_IMODE(status.st_mode), uid=status.st_uid, gid=status.st_gid, mtime=mtime)
        try:
            xattrs = _xattrs(place)
            if kind == stat.S_IFDIR:
                self._write(described((path or b".") + b"/", b"5", 0, xattrs=xattrs))
                return
            if status.st_nlink > 1:
                first = self._links.setdefault((status.st_dev, status.st_ino), path)
                if first != path:
                    self._write(described(path, b"1", 0, link=first))
                    return
            if kind == stat.S_IFREG:
                self._file(place, path, xattrs, described)
            elif kind == stat.S_IFLNK:
                target = os.fsencode(os.readlink(place))
                self._write(described(path, b"2", 0, link=target, xattrs=xattrs))
            elif kind == stat.S_IFIFO:
                self._write(described(path, b"6", 0, xattrs=xattrs))
            else:
                flag = b"3" if kind == stat.S_IFCHR else b"4"
                device = (os.major(status.st_rdev), os.minor(status.st_rdev))
                self._write(described(path, flag, 0, xattrs=xattrs, device=device))
        except FileNotFoundError:
            return  # removed meanwhile

    def _file(self, place: str, path: bytes, xattrs: dict[str, bytes], described: partial[bytes]) -> None:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = left = os.fstat(fd).st_size
            self._write(described(path, b"0", size, xattrs=xattrs))
            while left:
                data = os.read(fd, min(left, _PIECE))
                if not data:
                    self._write(bytes(left))  # cut short meanwhile; the header has promised more
                    break
                left -= len(data)
                self._write(data)
            self._write(bytes(-size % BLOCK))
        finally:
            os.close(fd)


def header(
    path: bytes, flag: bytes, size: int, *, mode: int = 0, uid: int = 0, gid: int = 0, mtime: int = 0, link: bytes = b"",
    device: tuple[int, int] = (0, 0), xattrs: dict[str, bytes] | None = None,
) -> bytes:
    """The blocks of one member's header: ustar, with an extended one before it for what does not fit."""
    records: dict[bytes, bytes] = {}
    name, prefix = path, b""
    if len(path) > 100:
        # As much as fits into the prefix, at a slash.
        cut = path.rfind(b"/", 0, 156)
        if cut > 0 and 0 < len(path) - cut - 1 <= 100:
            name, prefix = path[cut + 1 :], path[:cut]
        else:
            name, prefix = path[:100], b""
            records[b"path"] = path
    if not path.isascii():
        records[b"path"] = path
    if len(link) > 100 or not link.isascii():
        records[b"linkpath"] = link
    fields = [_octal(mode, 8), b"", b"", b"", b""]
    for index, (key, value, width) in enumerate(
        ((b"uid", uid, 8), (b"gid", gid, 8), (b"size", size, 12), (b"mtime", mtime, 12)), 1
    ):
        fits = 0 <= value < 1 << 3 * (width - 1)
        fields[index] = _octal(value if fits else 0, width)
        if not fits:
            records[key] = b"%d" % value
    devices = b""
    for key, value in ((b"SCHILY.devmajor", device[0]), (b"SCHILY.devminor", device[1])):
        fits = value < 1 << 21
        devices += _octal(value if fits else 0, 8)
        if not fits:
            records[key] = b"%d" % value
    for attribute, content in (xattrs or {}).items():
        records[b"SCHILY.xattr." + os.fsencode(attribute)] = content
    before = b""
    if records:
        body = b"".join(_record(key, records[key]) for key in sorted(records))
        base = path.rstrip(b"/").rpartition(b"/")[2]
        zero = _octal(0, 8)
        numbers = [_octal(0o644, 8), zero, zero, _octal(len(body), 12), _octal(0, 12)]
        before = _block(b"PaxHeaders.0/" + base[:80], numbers, b"x", b"", b"", b"")
        before += body + bytes(-len(body) % BLOCK)
    return before + _block(name, fields, flag, link[:100], devices, prefix)


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def _record(key: bytes, value: bytes) -> bytes:
    """Its length, which counts its own digits, a blank, key, equals sign, value, newline."""
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


def _block(name: bytes, fields: list[bytes], flag: bytes, link: bytes, devices: bytes, prefix: bytes) -> bytes:
    block = (
        name.ljust(100, b"\0") + b"".join(fields) + b" " * 8 + flag + link.ljust(100, b"\0") + b"ustar\x0000" + bytes(64)
        + devices.ljust(16, b"\0") + prefix.ljust(155, b"\0")
    ).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
