"""Makes an EROFS image of a layer's tar without moving the data: the tar lies in the image, metadata is appended to it.

Runs in: any thread; root mounts what comes out (`boxship.containerd.snapshots.erofs`).
Spec: Linux fs/erofs/erofs_fs.h. Blocks of 512 bytes, as tar has them, need Linux ≥ 6.4; mounting a file without a loop
device, Linux ≥ 6.12. What overlayfs expects of a lower layer: Documentation/filesystems/overlayfs.rst.

    0       nothing
    1024    superblock, 128 bytes
    4096    the tar, as it is
            blocks of data that the tar has in pieces (sparse files), and of long symbolic links
            inodes of directories, the root's first; inodes of all else      } meta_blkaddr; a nid is an offset here, over 32
            the directories' blocks: entries of 12 bytes, then their names, sorted

An inode is 64 bytes ("extended"), its extended attributes follow, and a symbolic link's target after them when all that lies in
one block ("inline"). A file's data is one run of blocks ("plain"), since tar begins it at a block; a sparse file has a map of
chunks.

Everything but directories is encoded when its member is read, and kept as bytes: an entry costs some 200 bytes of memory. One
that a later entry replaces leaves its inode unused. A tar that cannot be shown this way (a hard link to a layer below, a sparse
file in too many pieces) raises NotConvertible, and is to be unpacked instead.

Not here: fetching or decompressing the tar.
"""

from __future__ import annotations

import os
import stat
from struct import Struct, pack
from typing import TYPE_CHECKING

from boxship.images.layers import names, tar
from boxship.images.layers.apply import shift
from boxship.images.layers.lowers import Lowers
from boxship.kit.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from boxship.images.layers.apply import IdMap
    from boxship.images.layers.tar import Member

TAR_OFFSET = 4096
"""Where the tar begins in the image."""

_BLOCK = 512
_SUPERBLOCK = Struct("<IIIBBHQqIIII16s16sIHHHBBIQB23x")
_SUPER_OFFSET = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT_CHECKSUM, _COMPAT_MTIME = 1, 2
_INCOMPAT_CHUNKED = 4
_INODE = Struct("<HHHHQIIIIqII16x")
_NLINK = 44
"""Where the number of links is in an inode."""
_PLAIN, _INLINE, _CHUNKED = 1, 1 | 2 << 1, 1 | 4 << 1
"""i_format: extended inode, and the layout of its data."""
_HOLE = 0xFFFFFFFF
_DIRENT = Struct("<QHBx")
_REG, _DIR, _CHR, _BLK, _FIFO, _SOCK, _LNK = 1, 2, 3, 4, 5, 6, 7
_TYPES = {stat.S_IFREG: _REG, stat.S_IFCHR: _CHR, stat.S_IFBLK: _BLK, stat.S_IFIFO: _FIFO, stat.S_IFLNK: _LNK}
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_ACLS = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_OPAQUE = b"trusted.overlay.opaque"
_MAX_CHUNKS = 1 << 18
_MAX_CHUNK = 1 << 24
_MAX_LINKS = 255
_SECOND = 1_000_000_000


class NotConvertible(Unsupported):
    """The tar is in order, but cannot lie in an image as it is: unpack it."""


class _Directory:
    """A directory while the tar is read. `nid` and `xattrs` (encoded) are set at the end.

    A child is another one, or a number: offset of its inode in the inodes of files, over 32, times 16, and its type.
    """

    __slots__ = ("attributes", "children", "gid", "implied", "mode", "mtime", "nid", "opaque", "uid", "xattrs")

    def __init__(self) -> None:
        self.children: dict[bytes, int | _Directory] = {}
        self.mode = 0o755
        self.uid = 0
        self.gid = 0
        self.mtime = 0
        self.attributes: dict[bytes, bytes] = {}
        self.opaque = False
        self.implied = True
        self.nid = 0
        self.xattrs = b""


def convert(
    fd: int, size: int, *, lowers: Lowers | None = None, uid_map: IdMap = (), gid_map: IdMap = (), uuid: bytes = bytes(16),
    limits: names.Limits | None = None,
) -> int:
    """Make an image of the file `fd` (open for reading and writing, borrowed), which has a tar of `size` bytes at TAR_OFFSET.

    `lowers`: the layers below, for directories that the tar takes for granted. Answers with the number of the tar's members.
    Raises TarError, InvalidArgument, NotConvertible and OSError; what the file then holds behind the tar is undefined.
    """
    writer = _Writer(fd, size, lowers or Lowers(), uid_map, gid_map)
    with tar.Mapped(fd, TAR_OFFSET, TAR_OFFSET + size) as source:
        entries = writer.read(source, limits or names.Limits())
    writer.finish(uuid)
    return entries


class _Writer:
    def __init__(self, fd: int, size: int, lowers: Lowers, uid_map: IdMap, gid_map: IdMap) -> None:
        self._fd = fd
        self._lowers = lowers
        self._uid_map = uid_map
        self._gid_map = gid_map
        self._root = _Directory()
        self._dirs: dict[bytes, _Directory] = {b"": self._root}
        self._inodes = bytearray()
        self._count = 0
        self._whiteout = -1
        self._chunked = False
        # Where the next block behind the tar goes, and how much may go there besides metadata.
        self._end = TAR_OFFSET + size + -(TAR_OFFSET + size) % _BLOCK
        self._budget = max(64 << 20, size)
        if lowers:
            self._like_lower(self._root, b"")

    # Reading the tar.

    def read(self, source: tar.Mapped, limits: names.Limits) -> int:
        entries = 0
        most = limits.entries or 1 << 62
        dirs = self._dirs
        for member in tar.members(source):
            entries += 1
            if entries > most:
                raise InvalidArgument(f"layer: more than {limits.entries} entries")
            path = names.clean(member.name)
            above, _, base = path.rpartition(b"/")
            if base[:4] == names.WHITEOUT:
                if not names.is_aufs(path):
                    self._hide(self._directory(above), names.whiteout(base))
                continue
            if not path:
                if member.kind != stat.S_IFDIR:
                    raise InvalidArgument("layer: the root is no directory")
                self._describe(self._root, member)
                continue
            parent = dirs.get(above)
            if parent is None:
                parent = self._directory(above)
            if member.kind == stat.S_IFDIR:
                self._make_directory(parent, path, base, member)
            else:
                node = self._link(member) if member.kind == tar.LINK else self._inode(member)
                if base in parent.children:
                    self._drop(parent, base, node)
                parent.children[base] = node
        if self._root.opaque:
            # Overlayfs always merges the roots, whatever they say: hide each name by itself.
            self._root.opaque = False
            for name in self._lowers.names():
                self._hide(self._root, name)
        return entries

    def _make_directory(self, parent: _Directory, path: bytes, base: bytes, member: Member) -> None:
        old = parent.children.get(base)
        if isinstance(old, _Directory):
            directory = old
        else:
            directory = _Directory()
            if old is not None:
                directory.opaque = old == self._whiteout
                self._drop(parent, base, -1)
            parent.children[base] = directory
            self._dirs[path] = directory
        self._describe(directory, member)

    def _describe(self, directory: _Directory, member: Member) -> None:
        directory.implied = False
        directory.mode = member.mode
        directory.uid, directory.gid = self._ids(member)
        directory.mtime = member.mtime
        directory.attributes = {name: value for name, value in member.xattrs.items() if names.keep_xattr(name)}

    def _ids(self, member: Member) -> tuple[int, int]:
        uid = shift(member.uid, self._uid_map) if self._uid_map else member.uid
        gid = shift(member.gid, self._gid_map) if self._gid_map else member.gid
        if uid >> 32 or gid >> 32:
            raise InvalidArgument(f"layer: {os.fsdecode(member.name[:255])}: an owner's id that is too large")
        return uid, gid

    def _inode(self, member: Member) -> int:
        """Encode a member that is neither a directory nor a hard link."""
        kind = member.kind
        xattrs = encode_xattrs({n: v for n, v in member.xattrs.items() if names.keep_xattr(n)}) if member.xattrs else b""
        icount = (len(xattrs) - 12 >> 2) + 1 if xattrs else 0
        layout, size, data, tail = _PLAIN, 0, 0, b""
        mode = member.mode
        if kind == stat.S_IFREG:
            size = member.size
            if member.sparse is not None:
                layout, data, tail = self._chunks(member)
            elif size:
                data = TAR_OFFSET + member.offset >> 9
        elif kind == stat.S_IFLNK:
            tail = member.link
            size = len(tail)
            if not tail or size >= names.MAX_PATH:
                raise InvalidArgument(f"layer: the symbolic link {os.fsdecode(member.name[:255])} has no target that can be")
            layout, mode = _INLINE, 0o777
            if 64 + len(xattrs) + size > _BLOCK:
                layout, data, tail = _PLAIN, self._append(tail) >> 9, b""
        elif kind != stat.S_IFIFO:
            if kind == stat.S_IFCHR and member.major == member.minor == 0:
                return self._whiteout_node()
            if member.major >> 12 or member.minor >> 20:
                raise InvalidArgument(f"layer: {os.fsdecode(member.name[:255])}: no such device number")
            data = member.minor & 0xFF | member.major << 8 | (member.minor & ~0xFF) << 12
        inodes = self._inodes
        at = len(inodes)
        if layout == _INLINE and at % _BLOCK + 64 + len(xattrs) + size > _BLOCK:
            inodes += bytes(-at % _BLOCK)
            at = len(inodes)
        uid, gid = self._ids(member)
        self._count += 1
        inodes += _INODE.pack(
            layout, icount, kind | mode, 0, size, data, self._count & 0xFFFFFFFF, uid, gid,
            member.mtime // _SECOND, member.mtime % _SECOND, 1,
        )
        if xattrs or tail:
            inodes += xattrs
            inodes += tail
            inodes += bytes(-len(inodes) % 32)
        return at >> 5 << 4 | _TYPES[kind]

    def _whiteout_node(self) -> int:
        """One inode for all of them."""
        if self._whiteout < 0:
            at = len(self._inodes)
            self._count += 1
            self._inodes += _INODE.pack(_PLAIN, 0, stat.S_IFCHR, 0, 0, 0, self._count & 0xFFFFFFFF, 0, 0, 0, 0, 1)
            self._whiteout = at >> 5 << 4 | _CHR
        return self._whiteout

    def _link(self, member: Member) -> int:
        target = names.clean(member.link, "link")
        above, _, base = target.rpartition(b"/")
        parent = self._find(above)
        node = parent.children.get(base) if parent is not None else None
        name = os.fsdecode(member.name[:255])
        if node is None and target and self._lowers.find(target) is not None:
            raise NotConvertible(f"layer: {name} is a hard link to a layer below")
        if isinstance(node, _Directory) or not target:
            raise InvalidArgument(f"layer: {name}: a hard link to a directory")
        if node is None or node == self._whiteout:
            raise InvalidArgument(f"layer: {name}: link to {os.fsdecode(target)}: no such file or directory")
        self._add_links(node, 1)
        return node

    def _add_links(self, node: int, number: int) -> None:
        if node != self._whiteout:
            at = (node >> 4 << 5) + _NLINK
            links = max(int.from_bytes(self._inodes[at : at + 4], "little") + number, 0)
            self._inodes[at : at + 4] = links.to_bytes(4, "little")

    def _drop(self, parent: _Directory, base: bytes, node: int) -> None:
        """An entry that `node` is about to replace, with all below it."""
        old = parent.children[base]
        if isinstance(old, _Directory):
            for name in old.children:
                self._drop(old, name, -1)
        elif old != node:
            self._add_links(old, -1)
        else:
            # A link onto itself: counted once too often.
            self._add_links(old, -1)
        if isinstance(old, _Directory) or old & 15 == _LNK:
            # Paths through it lead elsewhere now.
            self._dirs.clear()
            self._dirs[b""] = self._root

    def _hide(self, directory: _Directory, hidden: bytes) -> None:
        if not hidden:
            directory.opaque = True
            return
        old = directory.children.get(hidden)
        if old is None:
            directory.children[hidden] = self._whiteout_node()
        elif isinstance(old, _Directory):
            # This layer's own is not hidden, but what is below it.
            old.opaque = True

    # Finding directories.

    def _find(self, path: bytes) -> _Directory | None:
        return self._dirs.get(path) or self._walk(path, make=False)

    def _directory(self, path: bytes) -> _Directory:
        """The directory at `path`, by way of links of this and the lower layers, made where there is none."""
        found = self._dirs.get(path)
        if found is None:
            found = self._walk(path, make=True)
            assert found is not None
            self._dirs[path] = found
        return found

    def _walk(self, path: bytes, *, make: bool) -> _Directory | None:
        rest = path.split(b"/")[::-1]
        done: list[bytes] = []
        above: list[_Directory] = [self._root]
        links = 0
        while rest:
            part = rest.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if done:
                    done.pop()
                    above.pop()
                continue
            here = above[-1]
            child = here.children.get(part)
            if isinstance(child, _Directory):
                done.append(part)
                above.append(child)
                continue
            target = b""
            if child is not None and child & 15 == _LNK:
                target = self._target(child)
            elif child is not None and child != self._whiteout:
                raise InvalidArgument(f"layer: {os.fsdecode(path[:255])}: not a directory")
            elif not make:
                return None
            else:
                target = self._imply(here, b"/".join([*done, part]), part, child)
            if not target:
                done.append(part)
                made = here.children[part]
                assert isinstance(made, _Directory)
                above.append(made)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise InvalidArgument(f"layer: {os.fsdecode(path[:255])}: too many levels of symbolic links")
            if target.startswith(b"/"):
                done.clear()
                del above[1:]
            rest += target.split(b"/")[::-1]
        return above[-1]

    def _imply(self, parent: _Directory, path: bytes, base: bytes, old: int | None) -> bytes:
        """Make a directory that the tar has no entry for; b"", or where it leads when layers below have a link there."""
        directory = _Directory()
        if old is not None:
            directory.opaque = True
        elif self._lowers:
            target = self._like_lower(directory, path)
            if target:
                return target
        elif self._uid_map:
            directory.uid, directory.gid = shift(0, self._uid_map), shift(0, self._gid_map)
        parent.children[base] = directory
        return b""

    def _like_lower(self, directory: _Directory, path: bytes) -> bytes:
        found = self._lowers.find(path)
        if found is None:
            return b""
        source, status = found
        if stat.S_ISLNK(status.st_mode):
            return os.fsencode(os.readlink(source))
        if stat.S_ISDIR(status.st_mode):
            directory.mode = stat.S_IMODE(status.st_mode)
            directory.uid, directory.gid, directory.mtime = status.st_uid, status.st_gid, status.st_mtime_ns
            for name in os.listxattr(source, follow_symlinks=False):
                if names.keep_xattr(os.fsencode(name)):
                    directory.attributes[os.fsencode(name)] = os.getxattr(source, name, follow_symlinks=False)
        return b""

    def _target(self, node: int) -> bytes:
        at = node >> 4 << 5
        layout, icount, _, _, size, data = _INODE.unpack_from(self._inodes, at)[:6]
        if layout == _PLAIN:
            return os.pread(self._fd, size, data << 9)
        at += 64 + (12 + 4 * (icount - 1) if icount else 0)
        return bytes(self._inodes[at : at + size])

    # Data behind the tar.

    def _append(self, data: bytes) -> int:
        """Write blocks; answers with their offset in the image."""
        at = self._end
        self._budget -= len(data)
        if self._budget < 0:
            raise NotConvertible("layer: too much data in pieces")
        _pwrite_all(self._fd, data, at)
        self._end += len(data) + -len(data) % _BLOCK
        return at

    def _chunks(self, member: Member) -> tuple[int, int, bytes]:
        """A sparse file: layout, chunk format and map. A chunk is a run of blocks of the tar where it can be, else a copy."""
        assert member.sparse is not None
        bits = 12
        while member.size > _MAX_CHUNKS << bits:
            bits += 1
        chunk = 1 << bits
        if chunk > _MAX_CHUNK:
            raise NotConvertible(f"layer: {os.fsdecode(member.name[:255])}: a sparse file that is too large")
        number = (member.size + chunk - 1) >> bits
        self._budget -= 4 * number
        self._chunked = True
        table = bytearray(b"\xff" * 4 * number)
        # The pieces of the file: where they begin in it, where in the image, and how long they are.
        pieces: list[tuple[int, int, int]] = []
        at = TAR_OFFSET + member.offset
        for start, length in member.sparse:
            pieces.append((start, at, length))
            at += length
        first = 0
        done = 0
        for start, _, length in pieces:
            after = (start + length - 1 >> bits) + 1
            for index in range(max(start >> bits, done), after):
                begin = index << bits
                end = min(begin + chunk, member.size)
                while pieces[first][0] + pieces[first][2] <= begin:
                    first += 1
                piece_start, piece_at, piece_length = pieces[first]
                source = piece_at + begin - piece_start
                if piece_start <= begin and end <= piece_start + piece_length and source % _BLOCK == 0:
                    where = source
                else:
                    where = self._append(self._gather(pieces, first, begin, end))
                table[4 * index : 4 * index + 4] = (where >> 9).to_bytes(4, "little")
            done = after
        return _CHUNKED, bits - 9, bytes(table)

    def _gather(self, pieces: list[tuple[int, int, int]], first: int, begin: int, end: int) -> bytes:
        data = bytearray(end - begin)
        while first < len(pieces) and pieces[first][0] < end:
            start, at, length = pieces[first]
            left = max(start, begin)
            right = min(start + length, end)
            data[left - begin : right - begin] = os.pread(self._fd, right - left, at + left - start)
            first += 1
        return bytes(data)

    # Writing the metadata.

    def finish(self, uuid: bytes) -> None:
        """Append the metadata, and write the superblock last: without it, it is no image."""
        directories = self._place()
        meta = self._end
        last = directories[-1]
        head = last[0].nid * 32 + _size(last[0])
        head += -head % _BLOCK
        files = head >> 5
        data = meta + head + len(self._inodes)
        data += -data % _BLOCK
        inodes = bytearray(head)
        self._end = data
        buffer = bytearray()
        for directory, parent in directories:
            blocks, size = _entries(directory, parent, files)
            subdirectories = sum(1 for child in directory.children.values() if isinstance(child, _Directory))
            icount = (len(directory.xattrs) - 12 >> 2) + 1 if directory.xattrs else 0
            at = directory.nid << 5
            self._count += 1
            _INODE.pack_into(
                inodes, at, _PLAIN, icount, stat.S_IFDIR | directory.mode, 0, size, self._end + len(buffer) >> 9,
                self._count & 0xFFFFFFFF, directory.uid, directory.gid, directory.mtime // _SECOND, directory.mtime % _SECOND,
                2 + subdirectories,
            )
            inodes[at + 64 : at + 64 + len(directory.xattrs)] = directory.xattrs
            buffer += blocks
            if len(buffer) > 1 << 20:
                _pwrite_all(self._fd, buffer, self._end)
                self._end += len(buffer)
                buffer.clear()
        _pwrite_all(self._fd, buffer, self._end)
        self._end += len(buffer)
        _pwrite_all(self._fd, inodes, meta)
        _pwrite_all(self._fd, self._inodes, meta + head)
        self._end += -self._end % TAR_OFFSET
        os.ftruncate(self._fd, self._end)
        if self._end >> 9 >= _HOLE:
            raise NotConvertible("layer: too large for an image")
        _pwrite_all(self._fd, self._superblock(meta >> 9, directories[0][0].nid, uuid), 0)

    def _place(self) -> list[tuple[_Directory, _Directory]]:
        """All directories with their parents, the root first, each with its nid and its attributes."""
        found = [(self._root, self._root)]
        at = 1  # no inode is number 0: programs take that for a deleted entry
        for directory, _ in found:
            attributes = directory.attributes
            if directory.opaque:
                attributes = {**attributes, _OPAQUE: b"y"}
            directory.xattrs = encode_xattrs(attributes) if attributes else b""
            directory.nid = at
            at += _size(directory) + 31 >> 5
            found += [(child, directory) for child in directory.children.values() if isinstance(child, _Directory)]
        return found

    def _superblock(self, meta: int, root: int, uuid: bytes) -> bytes:
        def block(checksum: int) -> bytes:
            return _SUPERBLOCK.pack(
                _MAGIC, checksum, _COMPAT_CHECKSUM | _COMPAT_MTIME, 9, 0, root, self._count, 0, 0, self._end >> 9, meta, 0, uuid,
                b"", _INCOMPAT_CHUNKED if self._chunked else 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ).ljust(_BLOCK, b"\0")

        return (bytes(_SUPER_OFFSET) + block(crc32c(block(0)))).ljust(TAR_OFFSET, b"\0")


def _size(directory: _Directory) -> int:
    return 64 + len(directory.xattrs)


def _entries(directory: _Directory, parent: _Directory, files: int) -> tuple[bytes, int]:
    """A directory's blocks, and its size; `files` is the nid of the first inode that is no directory's."""
    children: dict[bytes, int | _Directory] = {**directory.children, b".": directory, b"..": parent}
    blocks: list[bytes] = []
    heads: list[tuple[int, int]] = []
    texts: list[bytes] = []
    used = 0
    for name in sorted(children):
        child = children[name]
        need = 12 + len(name)
        if used + need > _BLOCK:
            blocks.append(_block(heads, texts).ljust(_BLOCK, b"\0"))
            heads, texts, used = [], [], 0
        heads.append((child.nid, _DIR) if isinstance(child, _Directory) else ((child >> 4) + files, child & 15))
        texts.append(name)
        used += need
    blocks.append(_block(heads, texts))
    size = _BLOCK * (len(blocks) - 1) + used
    blocks[-1] = blocks[-1].ljust(_BLOCK, b"\0")
    return b"".join(blocks), size


def _block(heads: list[tuple[int, int]], texts: list[bytes]) -> bytes:
    at = 12 * len(heads)
    parts = []
    for (nid, kind), text in zip(heads, texts, strict=True):
        parts.append(_DIRENT.pack(nid, at, kind))
        at += len(text)
    return b"".join(parts + texts)


def encode_xattrs(attributes: dict[bytes, bytes]) -> bytes:
    """What follows an inode that has attributes; b"" when none is of a kind that EROFS knows. Raises InvalidArgument."""
    entries = bytearray()
    for name, value in sorted(attributes.items()):
        index = _ACLS.get(name, 0)
        rest = b""
        if not index:
            for prefix, number in _PREFIXES:
                if name.startswith(prefix):
                    index, rest = number, name[len(prefix) :]
            if not rest:
                continue
        if len(rest) > 255 or len(value) > 0xFFFF:
            raise InvalidArgument(f"layer: the extended attribute {os.fsdecode(name[:64])} is too long")
        entries += pack("<BBH", len(rest), index, len(value)) + rest + value
        entries += bytes(-len(entries) % 4)
    if not entries:
        return b""
    if len(entries) >> 2 > 0xFFFE:
        raise InvalidArgument("layer: the extended attributes of a file are too many")
    return bytes(12) + bytes(entries)


def _pwrite_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def crc32c(data: bytes) -> int:
    """CRC-32C as EROFS wants it: begun with all ones, not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


_CRC = _crc_table()
