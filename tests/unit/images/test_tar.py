"""The reader of tars: what is in an archive, and what is said of a broken one."""

from __future__ import annotations

import io
import os
import random
import stat
import tarfile
from collections.abc import Callable

import pytest

from boxship.images.layers import names, tar
from boxship.images.layers.diff import header
from boxship.kit.errors import InvalidArgument


def stream(data: bytes, piece: int = 700) -> tar.Stream:
    source = io.BytesIO(data)
    return tar.Stream(lambda: source.read(piece))


def mapped(data: bytes) -> tar.Mapped:
    fd = os.memfd_create("tar")
    os.write(fd, b"before" + data)
    source = tar.Mapped(fd, 6)
    os.close(fd)
    return source


def read(data: bytes, make: Callable[[bytes], tar.Source] = stream) -> list[tuple[tar.Member, bytes]]:
    source = make(data)
    return [(member, b"".join(source.chunks(member.stored))) for member in tar.members(source)]


def one(data: bytes) -> tar.Member:
    (member, _), = read(data)
    return member


def written(layout: int, *infos: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as writer:
        for info, data in infos:
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


def info(name: str, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def pax(records: bytes, after: bytes | None = None) -> bytes:
    """An extended header with these records, before a file."""
    return header(b"x", b"x", len(records)) + records + bytes(-len(records) % 512) + (after or header(b"name", b"0", 0))


@pytest.mark.parametrize("make", [stream, mapped])
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_field(layout: int, make: Callable[[bytes], tar.Source]) -> None:
    data = written(
        layout, (info("a/file", mode=0o4755, uid=1000, gid=2000, mtime=1_234_567_890), b"x" * 1000), (info("empty"), b""),
        (info("dir", type=tarfile.DIRTYPE), b""), (info("link", type=tarfile.SYMTYPE, linkname="to"), b""),
        (info("hard", type=tarfile.LNKTYPE, linkname="a/file"), b""), (info("fifo", type=tarfile.FIFOTYPE), b""),
        (info("dev", type=tarfile.CHRTYPE, devmajor=10, devminor=200), b""), (info("last"), b"y" * 513),
    )
    found = read(data, make)
    member, content = found[0]
    assert (member.name, member.mode, member.uid, member.gid, member.mtime) == (b"a/file", 0o4755, 1000, 2000, 1_234_567_890 * 10**9)
    assert content == b"x" * 1000
    assert [each.kind for each, _ in found] == [
        stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, tar.LINK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFREG]
    assert [each.link for each, _ in found] == [b"", b"", b"", b"to", b"a/file", b"", b"", b""]
    assert (found[6][0].major, found[6][0].minor) == (10, 200)
    assert found[7][1] == b"y" * 513
    assert [each.offset for each, content in found if content] == [512, len(data.rstrip(b"\0")) - 513]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_large_numbers(layout: int) -> None:
    found = read(written(
        layout, (info("n" * 300, uid=3_000_000_000, gid=2**31, mtime=-7), b"x"),
        (info("s", type=tarfile.SYMTYPE, linkname="l" * 500), b""), (info("plain"), b"")))
    assert [member.name for member, _ in found] == [b"n" * 300, b"s", b"plain"]
    assert found[1][0].link == b"l" * 500
    assert (found[0][0].uid, found[0][0].gid, found[0][0].mtime) == (3_000_000_000, 2**31, -7 * 10**9)
    assert found[2][0].link == b""


def test_a_prefix_belongs_to_the_name() -> None:
    name = "/".join(["d" * 50, "e" * 50, "f" * 80])
    assert one(written(tarfile.USTAR_FORMAT, (info(name), b""))).name == name.encode()


def test_a_name_that_ends_in_a_slash_is_a_directory() -> None:
    assert one(header(b"dir/", b"\0", 0)).kind == stat.S_IFDIR
    assert one(pax(b"18 path=long/dir/\n")).kind == stat.S_IFDIR


def test_extended_attributes_hold_any_bytes() -> None:
    value = b"a=b\n\0\xff"
    record = b"SCHILY.xattr.user.x=" + value
    member = one(pax(b"%d %s\n" % (len(record) + 4, record)))
    assert member.xattrs == {b"user.x": value}


@pytest.mark.parametrize("text, nanoseconds", [
    (b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"0.123456789123", 123_456_789), (b"12", 12_000_000_000), (b".25", 250_000_000),
])
def test_times_of_extended_headers(text: bytes, nanoseconds: int) -> None:
    record = b"mtime=" + text
    assert one(pax(b"%d %s\n" % (len(record) + (4 if len(record) > 6 else 3), record))).mtime == nanoseconds


def test_global_headers_and_volume_names_are_read_over() -> None:
    data = header(b"g", b"g", 12) + b"12 uid=1234\n".ljust(512, b"\0") + header(b"volume", b"V", 0) + header(b"file", b"0", 0)
    assert [(member.name, member.uid) for member, _ in read(data)] == [(b"file", 0)]


def test_links_have_no_data_whatever_their_size_says() -> None:
    data = header(b"link", b"1", 5000, link=b"x") + header(b"dir", b"5", 700) + header(b"file", b"0", 0)
    assert [member.name for member, _ in read(data)] == [b"link", b"dir", b"file"]


def test_data_that_is_not_read_is_passed_over() -> None:
    data = written(tarfile.PAX_FORMAT, *[(info(f"f{number}"), bytes([number]) * (number * 300)) for number in range(20)])
    source = stream(data)
    found = []
    for member in tar.members(source):
        for piece in source.chunks(member.stored):
            found.append(bytes(piece[:1]))
            break
    assert len(found) == 19


def test_the_padding_at_the_end_may_be_missing() -> None:
    data = header(b"file", b"0", 3) + b"abc"
    (member, content), = read(data)
    assert (member.name, content) == (b"file", b"abc")


@pytest.mark.parametrize("damage, text", [
    (lambda data: data[:100], "ends within a header at offset 0"),
    (lambda data: data[:1000], "ends within the data"),
    (lambda data: data[:1536] + b"x" * 512, r"broken header \(no checksum\) at offset 1536, after file"),
    (lambda data: data[:1536] + b"y" + data[1537:], r"broken header \(wrong checksum\) at offset 1536, after file"),
    (lambda data: bytes(512) + data, "block of zeros is followed"),
    (lambda data: header(b"q", b"q", 0), "unknown type 'q'"),
    (lambda data: header(b"x", b"x", 2 << 20) + bytes(2 << 20), "extended header of 2097152 bytes"),
    (lambda data: pax(b"garbage"), "broken extended header"),
    (lambda data: pax(b"30 path=short\n"), "broken extended header"),
    (lambda data: pax(b"0 path=x\n"), "broken extended header"),
    (lambda data: pax(b"99999999999999999999 a=b\n"), "broken extended header"),
    (lambda data: pax(b"12 path=a\0b\n"), "NUL"),
    (lambda data: pax(b"12 size=-12\n"), "no number for the size"),
    (lambda data: pax(b"12 uid=ABCD\n"), "no number for the uid"),
    (lambda data: pax(b"13 path=only\n", b" "), "ends within a header"),
    (lambda data: pax(b"13 path=only\n")[:1024], "ends after an extended header"),
    (lambda data: pax(b"16 SCHILY.xattr.=x\n"), "broken|without a name"),
    (lambda data: pax(b"22 GNU.sparse.major=2\n"), "unknown version"),
    (lambda data: pax(b"22 GNU.sparse.map=0,1\n27 GNU.sparse.realsize=100\n"), "disagrees|broken"),
    (lambda data: pax(b"24 GNU.sparse.map=5,1,0\n"), "odd number|broken"),
    (lambda data: pax(b"24 GNU.sparse.map=9,9,0,1\n"), "overlaps|broken"),
])
def test_what_is_broken_is_named_with_its_place(damage: Callable[[bytes], bytes], text: str) -> None:
    data = header(b"file", b"0", 1000) + b"x" * 1024 + header(b"next", b"0", 0)
    with pytest.raises(tar.TarError, match=text):
        read(damage(data))


def test_random_damage_ends_in_an_error_or_in_members_and_never_otherwise() -> None:
    chance = random.Random(7)
    good = written(
        tarfile.PAX_FORMAT, (info("n" * 200, pax_headers={"SCHILY.xattr.user.a": "b"}), b"x" * 700), (info("b"), b"y"),
        (info("l", type=tarfile.SYMTYPE, linkname="t" * 200), b""))
    refused = 0
    for _ in range(3000):
        data = bytearray(good[: chance.choice((len(good), chance.randrange(len(good))))])
        for _ in range(chance.randint(1, 5)):
            if data:
                data[chance.randrange(min(len(data), 6000))] = chance.choice((0, 32, 48, 55, 57, 128, 255, chance.randrange(256)))
        # A right checksum lets the damage through to the fields.
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar" and chance.random() < 0.8:
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        try:
            for member, _content in read(bytes(data)):
                assert isinstance(member.name, bytes)
                assert member.size >= 0
        except tar.TarError as error:
            refused += 1
            assert str(error).startswith("layer: ")
    assert refused > 300


@pytest.mark.parametrize("name, path", [
    (b"a/b", b"a/b"), (b"/a", b"a"), (b"./a/", b"a"), (b"a//b", b"a/b"), (b"a/./b", b"a/b"), (b"a/../b", b"b"), (b".", b""),
    (b"./", b""), (b"/", b""), (b"", b""), (b"..a", b"..a"), (b"a/.hidden", b"a/.hidden"), (b"a/...", b"a/..."), (b"a/b/..", b"a"),
])
def test_names_become_paths_below_the_root(name: bytes, path: bytes) -> None:
    assert names.clean(name) == path


@pytest.mark.parametrize("name", [b"..", b"../a", b"a/../..", b"/..", b"./../x", b"a/../../b", b"n" * 256, b"a/" * 2048 + b"a"])
def test_names_that_lead_out_or_are_too_long(name: bytes) -> None:
    with pytest.raises(InvalidArgument):
        names.clean(name)


def test_headers_that_are_written_are_read_as_they_were() -> None:
    chance = random.Random(3)
    for _ in range(300):
        name = b"/".join(bytes(chance.choices(b"abc\xc3\xa9 ", k=chance.randint(1, 120))) for _ in range(chance.randint(1, 4)))
        fields = {
            "mode": chance.randrange(0o10000), "uid": chance.choice((0, 1000, 2**21, 2**32 - 2)), "gid": chance.randrange(2**32),
            "mtime": chance.choice((0, 1_600_000_000, -5, 2**34)),
        }
        xattrs = {"user." + "n" * chance.randint(1, 100): chance.randbytes(chance.randint(0, 2000))}
        member = one(header(name, b"3", 0, device=(chance.randrange(2**12), chance.randrange(2**20)), xattrs=xattrs, **fields))
        assert (member.name, member.mode, member.uid, member.gid) == (name, fields["mode"], fields["uid"], fields["gid"])
        assert member.mtime == fields["mtime"] * 10**9
        assert member.xattrs == {key.encode(): value for key, value in xattrs.items()}
