"""Reads tar archives: every dialect that layers are written in, from a file or a stream, in bounded memory.

Runs in: any thread.
Spec: POSIX.1-2017 pax (ustar, extended headers); GNU tar's manual, "Basic Tar Format", "Storing Sparse Files" and "Extensions";
SCHILY.xattr as star writes it. Where readers disagree, this one does as Go's archive/tar, which every other container engine
uses: global extended headers are read over, a link has no data, one block of zeros must be followed by another.

A header is 512 bytes: name 100, mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, type 1, link name 100, magic 6, version 2,
user 32, group 32, device major 8, minor 8, prefix 155. Numbers are octal digits, or (first bit set) big-endian base 256.

Not here: what a member does to a file system, and which names are allowed (`boxship.images.layers.names`).
"""

from __future__ import annotations

import mmap
import os
import stat
from struct import Struct
from typing import TYPE_CHECKING, Protocol
from zlib import adler32

from boxship.kit.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
LINK = 0
"""The kind of a hard link; every other kind is the file type of stat(2)."""
MAX_HEADER = 1 << 20
"""Bytes that an extended header, a long name or a map of a sparse file may have: what Go takes."""

_HEADER = Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_ZEROS = bytes(BLOCK)
_KINDS = {
    b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG, b"S": stat.S_IFREG, b"1": LINK, b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO, b"D": stat.S_IFDIR,
}
_XATTR = b"SCHILY.xattr."
_NO_RECORDS: dict[bytes, bytes] = {}


class TarError(InvalidArgument):
    """The archive is broken; the text names the place."""


class Source(Protocol):
    """Where the bytes come from."""

    offset: int
    """Of the next byte."""

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; answers with how many there were."""

    def chunks(self, size: int) -> Iterator[bytes | memoryview]:
        """The next `size` bytes in pieces, each valid until the next is asked for; raises TarError when there are fewer."""


class Mapped:
    """A source that is a file, mapped into memory from `start` (bytes) on; `fd` is borrowed.

    The file must not shrink meanwhile. Close it, or use it in a `with`.
    """

    def __init__(self, fd: int, start: int = 0, end: int | None = None) -> None:
        self.offset = 0
        self._start = start
        self._end = (os.fstat(fd).st_size if end is None else end) - start
        self._map = mmap.mmap(fd, start + self._end, access=mmap.ACCESS_READ) if self._end > 0 else None

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap; what `chunks` gave must not be in use any more."""
        if self._map is not None:
            self._map.close()

    def take(self, size: int) -> bytes:
        """See Source."""
        at = self._start + self.offset
        size = min(size, self._end - self.offset)
        self.offset += size
        return self._map[at : at + size] if self._map is not None and size > 0 else b""

    def skip(self, size: int) -> int:
        """See Source."""
        size = min(size, self._end - self.offset)
        self.offset += size
        return size

    def chunks(self, size: int) -> Iterator[bytes]:
        """See Source."""
        while size:
            data = self.take(min(size, 1 << 20))
            if not data:
                raise TarError(f"layer: the archive ends within the data at offset {self.offset}")
            size -= len(data)
            yield data


class Stream:
    """A source that is read once; `read` answers with the next piece, of any size, and with b"" at the end."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self.offset = 0
        self._read = read
        self._buffer = b""
        self._at = 0

    def take(self, size: int) -> bytes:
        """See Source."""
        at = self._at
        end = at + size
        if end <= len(self._buffer):
            self._at = end
            self.offset += size
            return self._buffer[at:end]
        data = self._buffer[at:]
        while len(data) < size:
            piece = self._read()
            if not piece:
                self._buffer, self._at = b"", 0
                self.offset += len(data)
                return data
            missing = size - len(data)
            data += piece[:missing]
            self._buffer, self._at = piece, min(missing, len(piece))
        self.offset += size
        return data

    def skip(self, size: int) -> int:
        """See Source."""
        skipped = 0
        while skipped < size:
            here = min(size - skipped, len(self._buffer) - self._at)
            self._at += here
            skipped += here
            if skipped < size:
                self._buffer, self._at = self._read(), 0
                if not self._buffer:
                    break
        self.offset += skipped
        return skipped

    def chunks(self, size: int) -> Iterator[memoryview]:
        """See Source."""
        while size:
            here = min(size, len(self._buffer) - self._at)
            if here:
                view = memoryview(self._buffer)[self._at : self._at + here]
                self._at += here
                self.offset += here
                size -= here
                yield view
            else:
                self._buffer, self._at = self._read(), 0
                if not self._buffer:
                    raise TarError(f"layer: the archive ends within the data at offset {self.offset}")


class Member:
    """One entry of an archive.

    Attributes:
        name, link: as they are written, without any check but for NUL bytes; `link` is the target of either kind of link.
        kind: LINK or the file type of stat(2).
        mode: permissions, with set-id and sticky bits (12 bits).
        uid, gid: as written; the names of owners are not looked at.
        mtime: nanoseconds since 1970.
        size: of the file, in bytes.
        offset: where its data begins in the archive.
        stored: bytes of data in the archive; differs from `size` in a sparse file.
        sparse: None, or where the data goes: (offset, length) in order, without overlap.
        xattrs: by name.
        major, minor: of a device.
    """

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime", "name", "offset", "size", "sparse", "stored", "uid", "xattrs",
    )

    name: bytes
    link: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    offset: int
    stored: int
    sparse: list[tuple[int, int]] | None
    xattrs: dict[bytes, bytes]
    major: int
    minor: int


def members(source: Source) -> Iterator[Member]:
    """Every member of the archive, in order; of a regular file `source.chunks(member.stored)` is the data.

    What is not read of it is passed over. Ends at the end of the archive and leaves the rest of the source (padding) unread.
    Raises TarError.
    """
    return _Reader(source).members()


class _Reader:
    __slots__ = ("_last", "_numbers", "_source", "_start")

    def __init__(self, source: Source) -> None:
        self._source = source
        self._last = b""
        self._start = 0
        # mode, uid and gid are the same few texts in most members.
        self._numbers: dict[bytes, int] = {}

    def members(self) -> Iterator[Member]:
        source = self._source
        records = _NO_RECORDS
        sparse_records: list[tuple[int, int]] | None = None
        long_name = long_link = b""
        while True:
            self._start = source.offset
            block = source.take(BLOCK)
            if len(block) < BLOCK:
                if block:
                    raise self._error("the archive ends within a header")
                if records or long_name or long_link:
                    raise self._error("the archive ends after an extended header")
                return
            if block[0] == 0 and block == _ZEROS:
                second = source.take(BLOCK)
                if second and second != _ZEROS:
                    raise self._error("a block of zeros is followed by something else")
                return
            fields = _HEADER.unpack(block)
            self._check(block, fields[6])
            flag = fields[7]
            if flag in b"xXgLKV":
                size = self._number(fields[4], "size")
                if flag == b"V":  # the volume's name
                    self._pass(size + -size % BLOCK)
                    continue
                if size > MAX_HEADER:
                    raise self._error(f"an extended header of {size} bytes, more than {MAX_HEADER}")
                data = source.take(size)
                if len(data) < size:
                    raise self._error("the archive ends within an extended header")
                self._pass(-size % BLOCK)
                if flag in b"xX":
                    records, sparse_records = self._records(data)
                elif flag == b"L":
                    long_name = data.partition(b"\0")[0]
                elif flag == b"K":
                    long_link = data.partition(b"\0")[0]
                continue
            member = self._member(block, fields, long_name, long_link)
            if records:
                self._apply(member, records, sparse_records)
            elif flag == b"S":
                self._old_sparse(member, block)
            self._last = member.name
            # What follows a link or a device by mistake of its writer is no data, whatever the size says.
            if member.kind != stat.S_IFREG:
                if member.kind != stat.S_IFDIR or flag != b"D":
                    member.stored = 0
                member.size = 0
            records = _NO_RECORDS
            sparse_records = None
            long_name = long_link = b""
            yield member
            end = member.offset + member.stored
            end += -end % BLOCK
            here = source.offset
            if end != here:
                source.skip(end - here)
                # Padding at the very end may be missing.
                if source.offset < member.offset + member.stored:
                    raise self._error("the archive ends within the data", member.name)

    def _check(self, block: bytes, checksum: bytes) -> None:
        # adler32 with a start of 0 holds the sum of the bytes in its low half, exact below 65,521: that of 256 bytes always is.
        total = (adler32(block[:256], 0) & 0xFFFF) + (adler32(block[256:], 0) & 0xFFFF) - sum(checksum) + 256
        try:
            wanted = int(checksum[:6], 8)
        except ValueError:
            try:
                wanted = self._number(checksum, "checksum")
            except TarError:
                raise self._error("broken header (no checksum)") from None
        if total != wanted:
            # Some old writers took the bytes for signed ones.
            negative = sum(1 for index, byte in enumerate(block) if byte > 127 and not 148 <= index < 156)
            if total - 256 * negative != wanted and total != self._number(checksum, "checksum"):
                raise self._error("broken header (wrong checksum)")

    def _member(self, block: bytes, fields: tuple[bytes, ...], long_name: bytes, long_link: bytes) -> Member:
        name, mode, uid, gid, size, mtime, _, flag, link, magic, _, _, major, minor, prefix = fields
        kind = _KINDS.get(flag)
        if kind is None:
            raise self._error(f"a member of the unknown type {flag.decode('latin-1')!r}", name.partition(b"\0")[0])
        member = Member()
        name = name.rstrip(b"\0")
        if b"\0" in name:
            name = name.partition(b"\0")[0]
        if prefix[0] and magic == b"ustar\x0000":
            if block[508:512] == b"tar\0":  # star keeps access and change times behind a shorter prefix
                prefix = prefix[:131]
            name = prefix.partition(b"\0")[0] + b"/" + name
        member.name = long_name or name
        member.link = long_link or (link.partition(b"\0")[0] if link[0] else b"")
        member.kind = stat.S_IFDIR if kind == stat.S_IFREG and member.name.endswith(b"/") else kind
        numbers = self._numbers
        try:
            member.mode = numbers[mode] & 0o7777
            member.uid = numbers[uid]
            member.gid = numbers[gid]
        except KeyError:
            if len(numbers) > 4096:
                numbers.clear()
            numbers[mode], numbers[uid], numbers[gid] = (
                self._number(mode, "mode"), self._number(uid, "uid"), self._number(gid, "gid")
            )
            member.mode = numbers[mode] & 0o7777
            member.uid = numbers[uid]
            member.gid = numbers[gid]
        digits = size[:11]
        try:
            number = int(digits, 8) if digits.isdigit() and size[11] in b" \0" else self._number(size, "size")
        except ValueError:
            raise self._error(f"no number for the size: {size!r}") from None
        member.size = member.stored = number
        try:
            member.mtime = numbers[mtime]
        except KeyError:
            member.mtime = numbers[mtime] = self._number(mtime, "mtime", signed=True) * 1_000_000_000
        member.offset = self._source.offset
        member.sparse = None
        member.xattrs = _NO_RECORDS
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            member.major = self._number(major, "device")
            member.minor = self._number(minor, "device")
        else:
            member.major = member.minor = 0
        return member

    def _number(self, field: bytes, what: str, signed: bool = False) -> int:
        digits = field[:-1]
        if digits.isdigit() and field[-1] in b" \0":
            try:
                return int(digits, 8)
            except ValueError:
                raise self._error(f"no number for the {what}: {field!r}") from None
        if field[0] & 0x80:
            number = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
            if field[0] & 0x40:
                number -= 1 << 8 * len(field) - 1
            if number < 0 and not signed:
                raise self._error(f"a negative {what}")
            if number >> 63 not in (0, -1):
                raise self._error(f"a {what} that is too large")
            return number
        digits = field.strip(b" \0").partition(b"\0")[0].strip(b" ")
        if not digits:
            return 0
        try:
            if not digits.isdigit():
                raise ValueError
            return int(digits, 8)
        except ValueError:
            raise self._error(f"no number for the {what}: {field!r}") from None

    def _records(self, data: bytes) -> tuple[dict[bytes, bytes], list[tuple[int, int]] | None]:
        records: dict[bytes, bytes] = {}
        sparse: list[tuple[int, int]] | None = None
        start = 0
        at = 0
        size = len(data)
        while at < size:
            blank = data.find(b" ", at, at + 20)
            digits = data[at:blank]
            end = at + int(digits) if blank > at and digits.isdigit() else 0
            equals = data.find(b"=", blank, end)
            if end > size or equals < 0 or data[end - 1] != 10:
                raise self._error("a broken extended header")
            key = data[blank + 1 : equals]
            value = data[equals + 1 : end - 1]
            at = end
            # Sparse format 0.0 repeats its keys; the pairs are in order.
            if key == b"GNU.sparse.offset":
                start = self._decimal(value, "sparse offset")
            elif key == b"GNU.sparse.numbytes":
                sparse = sparse or []
                sparse.append((start, self._decimal(value, "sparse length")))
            else:
                records[key] = value
        return records, sparse

    def _decimal(self, value: bytes, what: str) -> int:
        if not value.isdigit() or len(value) > 19 or int(value) >> 63:
            raise self._error(f"no number for the {what}: {value[:40]!r}")
        return int(value)

    def _apply(self, member: Member, records: dict[bytes, bytes], pairs: list[tuple[int, int]] | None) -> None:
        """The extended header's records over the header's fields. An empty value leaves the field as it is."""
        xattrs: dict[bytes, bytes] = {}
        sparse = pairs is not None
        for key, value in records.items():
            if key.startswith(_XATTR):
                if len(key) == len(_XATTR) or b"\0" in key:
                    raise self._error("an extended attribute without a name", member.name)
                xattrs[key[len(_XATTR) :]] = value
            elif key.startswith(b"GNU.sparse."):
                sparse = True
            elif not value:
                continue
            elif key == b"path":
                member.name = self._text(value)
                if member.kind == stat.S_IFREG and value.endswith(b"/"):
                    member.kind = stat.S_IFDIR
            elif key == b"linkpath":
                member.link = self._text(value)
            elif key == b"size":
                member.size = member.stored = self._decimal(value, "size")
            elif key == b"uid":
                member.uid = self._decimal(value, "uid")
            elif key == b"gid":
                member.gid = self._decimal(value, "gid")
            elif key == b"mtime":
                member.mtime = self._time(value)
            elif key == b"SCHILY.devmajor":
                member.major = self._decimal(value, "device")
            elif key == b"SCHILY.devminor":
                member.minor = self._decimal(value, "device")
        if xattrs:
            member.xattrs = xattrs
        if sparse and member.kind == stat.S_IFREG:
            self._pax_sparse(member, records, pairs)

    def _text(self, value: bytes) -> bytes:
        if b"\0" in value:
            raise self._error("a name with a NUL byte")
        return value

    def _time(self, value: bytes) -> int:
        negative = value.startswith(b"-")
        seconds, _, fraction = value[negative:].partition(b".")
        if (fraction and not fraction.isdigit()) or len(value) > 64:
            raise self._error(f"no time: {value[:64]!r}")
        number = self._decimal(seconds or b"0", "mtime") * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
        return -number if negative else number

    def _pax_sparse(self, member: Member, records: dict[bytes, bytes], pairs: list[tuple[int, int]] | None) -> None:
        name = records.get(b"GNU.sparse.name")
        if name:
            member.name = self._text(name)
        real = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
        size = self._decimal(real, "sparse size") if real else member.size
        major, minor = records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0")
        listed = records.get(b"GNU.sparse.map")
        if (major, minor) == (b"1", b"0"):
            pairs = self._map_in_data(member)
        elif (major, minor) not in ((b"0", b"0"), (b"0", b"1")):
            raise self._error("a sparse file of an unknown version", member.name)
        elif listed is not None:
            numbers = [self._decimal(number, "sparse map") for number in listed.split(b",")] if listed else []
            if len(numbers) % 2:
                raise self._error("a sparse map with an odd number of entries", member.name)
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        elif pairs is None:
            return  # nothing but the size: written whole
        member.size = size
        self._set_sparse(member, pairs or [])

    def _map_in_data(self, member: Member) -> list[tuple[int, int]]:
        """Format 1.0: decimal numbers, a line each, in the first blocks of the data."""
        source = self._source
        text = b""
        lines: list[bytes] = []
        wanted = 1
        while len(lines) < wanted:
            block = source.take(BLOCK)
            if len(block) < BLOCK or source.offset - member.offset > min(MAX_HEADER, member.stored + -member.stored % BLOCK):
                raise self._error("a sparse map without an end", member.name)
            *found, text = (text + block).split(b"\n")
            lines += found
            if lines and wanted == 1:
                wanted += 2 * self._decimal(lines[0], "sparse map")
        numbers = [self._decimal(line, "sparse map") for line in lines[1:wanted]]
        member.stored -= source.offset - member.offset
        member.offset = source.offset
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _old_sparse(self, member: Member, block: bytes) -> None:
        """The map in the header itself, and in blocks behind it."""
        member.size = self._number(block[483:495], "sparse size")
        pairs: list[tuple[int, int]] = []
        table, more = block[386:482], block[482]
        while True:
            for at in range(0, len(table) - 23, 24):
                if not table[at]:
                    break
                start = self._number(table[at : at + 12], "sparse map")
                pairs.append((start, self._number(table[at + 12 : at + 24], "sparse map")))
            if not more:
                break
            if 24 * len(pairs) > MAX_HEADER:
                raise self._error("a sparse map that is too long", member.name)
            extension = self._source.take(BLOCK)
            if len(extension) < BLOCK:
                raise self._error("the archive ends within a sparse map", member.name)
            table, more = extension[:504], extension[504]
        member.offset = self._source.offset
        self._set_sparse(member, pairs)

    def _set_sparse(self, member: Member, pairs: list[tuple[int, int]]) -> None:
        end = 0
        total = 0
        for start, length in pairs:
            if start < end or start + length > member.size:
                raise self._error("a sparse map that overlaps itself or the end", member.name)
            end = start + length
            total += length
        if total != member.stored:
            raise self._error("a sparse map that disagrees with the size", member.name)
        member.sparse = [pair for pair in pairs if pair[1]]

    def _pass(self, size: int) -> None:
        if size and self._source.skip(size) != size:
            raise self._error("the archive ends too early")

    def _error(self, what: str, name: bytes = b"") -> TarError:
        text = f"layer: {what} at offset {self._start}"
        if name:
            text += f", {os.fsdecode(name[:255])}"
        elif self._last:
            text += f", after {os.fsdecode(self._last[:255])}"
        return TarError(text)
