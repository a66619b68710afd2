"""Layers that are made to do harm: nothing outside of the snapshot is reached, and the refusal says what is wrong.

Each attack is made on the three ways a layer is taken: unpacked for overlayfs, unpacked over a whole tree, and made an image.
"""

from __future__ import annotations

import gzip
import io
import os
import resource
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from boxship.images.layers import apply, names, unpack
from boxship.images.layers.lowers import Lowers
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux import mounts

pytestmark = pytest.mark.root

TAR = "application/vnd.oci.image.layer.v1.tar"
Member = tuple[str, dict[str, object], bytes]


def entry(name: str, data: bytes = b"", **fields: object) -> Member:
    return name, fields, data


def link(name: str, target: str) -> Member:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> Member:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def folder(name: str) -> Member:
    return entry(name, type=tarfile.DIRTYPE, mode=0o755)


def archive(*members: Member) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as writer:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Place:
    """A root to unpack into with a victim beside it, and what is in the root afterwards."""

    def __init__(self, tmp_path: Path, way: str) -> None:
        self.way = way
        self.outside = tmp_path / "outside"
        self.outside.mkdir()
        (self.outside / "victim").write_text("untouched")
        os.chmod(self.outside / "victim", 0o600)
        (self.outside / "dir").mkdir()
        self.root = tmp_path / "root"
        self.root.mkdir()
        if way == "plain":
            (self.root / "lower").write_text("below")
        self.image = tmp_path / "image"
        self.before = self._look()

    def _look(self) -> list[tuple[str, int, int, int, bytes]]:
        found = []
        for path in sorted([self.outside, *self.outside.rglob("*"), self.root.parent]):
            status = path.lstat()
            found.append((
                str(path), status.st_mode, status.st_uid, status.st_nlink if path.is_file() else 0,
                path.read_bytes() if path.is_file() else b"",
            ))
        return found

    def take(self, blob: bytes, limits: names.Limits | None = None) -> unpack.Unpacked:
        fd = os.memfd_create("layer")
        try:
            os.write(fd, blob)
            if self.way == "image":
                return unpack.to_image(fd, TAR, str(self.image), str(self.root), limits=limits)
            form = apply.PLAIN if self.way == "plain" else apply.OVERLAY
            return unpack.unpack(fd, TAR, str(self.root), form, limits=limits)
        finally:
            os.close(fd)
            assert self._look() == self.before

    def names(self) -> list[str]:
        """What the root has, but for what was there before."""
        if self.way != "image":
            return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.name != "lower")
        mounted = mounts.detached("erofs", str(self.image), ["ro"])
        try:
            root = Path(f"/proc/self/fd/{mounted}/.")
            return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        finally:
            os.close(mounted)


@pytest.fixture(params=["overlay", "plain", "image"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path, request.param)


@pytest.mark.parametrize("members", [
    [entry("../outside/victim", b"x")],
    [entry("a/../../outside/victim", b"x")],
    [entry("/../outside/new", b"x")],
    [entry("./..", b"")],
    [folder("../outside/dir/more")],
    [link("../outside/link", "x")],
    [entry("f", b""), hard("h", "../outside/victim")],
    [hard("h", "/../../outside/victim")],
    [entry("../outside/.wh.victim")],
    [entry(".wh...")],
    [entry(".wh..")],
    [entry(".wh.")],
    [entry("a/.wh...")],
    [entry(".", b"x")],
    [entry("n" * 256, b"")],
    [entry("/".join(["n" * 250] * 17), b"")],
    [link("empty", "")],
    [hard("d", "")],
    [folder("d"), hard("h", "d")],
    [hard("h", "missing")],
    [entry("f", b""), entry("f/below", b"")],
    [link("loop", "loop"), entry("loop/x", b"")],
    [link("a", "b"), link("b", "a"), entry("a/x", b"")],
    [entry("f", b""), link("s", "f"), entry("s/x", b"")],
], ids=lambda members: members[-1][0][:30])
def test_it_is_refused(place: Place, members: list[Member]) -> None:
    with pytest.raises(InvalidArgument, match=r"^layer: "):
        place.take(archive(*members))
    assert not place.image.exists()


@pytest.mark.parametrize("members, made", [
    ([entry("/etc/passwd", b"x")], ["etc", "etc/passwd"]),
    ([entry("////abs", b"x"), entry("./././dot", b"")], ["abs", "dot"]),
    ([entry("a/../b", b"x")], ["b"]),
    ([link("out", "../outside"), entry("out/victim", b"x")], ["out", "outside", "outside/victim"]),
    ([link("out", "OUTSIDE"), entry("out/new", b"x")], None),
    ([link("out", "OUTSIDE"), folder("out/dir/more")], None),
    ([link("out", "OUTSIDE/dir"), entry("out", b"x")], ["out"]),
    ([link("f", "OUTSIDE/victim"), entry("f", b"x")], ["f"]),
    ([link("f", "OUTSIDE/victim"), hard("h", "f"), entry("h", b"x")], ["f", "h"]),
    ([link("out", "OUTSIDE"), entry("out/.wh.victim")], None),
    ([link("out", "OUTSIDE"), entry("out/.wh..wh..opq")], None),
    ([link("victim", "OUTSIDE/victim"), entry(".wh.victim")], ["victim"]),
    ([link("d", "OUTSIDE/dir"), folder("d")], ["d"]),
    ([link("a", "OUTSIDE"), link("b", "a/dir"), entry("b/x", b"")], None),
    ([folder("d"), link("d/up", "../../../outside"), entry("d/up/victim", b"x")], None),
    ([link("x", "/proc/self/root"), entry("x/OUTSIDE/victim", b"x")], None),
    ([link("magic", "/proc/self/cwd"), entry("magic/file", b"x")], None),
], ids=lambda value: value[-1][0][:30] if isinstance(value, list) and value and isinstance(value[-1], tuple) else "")
def test_it_stays_within_the_root(place: Place, members: list[Member], made: list[str] | None) -> None:
    outside = str(place.outside)
    members = [
        (name.replace("OUTSIDE", outside[1:]), {k: v.replace("OUTSIDE", outside) if isinstance(v, str) else v for k, v in f.items()}, d)
        for name, f, d in members
    ]
    place.take(archive(*members))
    if made is not None:
        assert place.names() == made


def test_a_directory_swapped_for_a_link_in_the_middle(place: Place) -> None:
    outside = str(place.outside)
    place.take(archive(
        folder("d"), entry("d/one", b""), entry("e/two", b""), link("d", outside), entry("d/victim", b"x"), link("e", outside),
        entry("e/victim", b"x"), folder("d"), entry("d/three", b""),
    ))
    assert "d/three" in place.names()


def test_whiteouts_reach_no_further_than_their_directory(tmp_path: Path) -> None:
    place = Place(tmp_path, "plain")
    os.symlink(place.outside, place.root / "out")
    (place.root / "in").mkdir()
    os.symlink(place.outside, place.root / "in/out")
    os.symlink(place.outside / "victim", place.root / "in/victim")
    place.take(archive(entry("out/.wh.victim"), entry("out/.wh..wh..opq"), entry("in/.wh..wh..opq"), entry("nothing/.wh.x")))
    assert os.listdir(place.root / "in") == []
    place.take(archive(entry(".wh.in"), entry(".wh.out")))
    assert sorted(os.listdir(place.root)) == ["lower"]


def test_layers_do_not_speak_to_overlayfs(place: Place) -> None:
    place.take(archive(
        entry("f", b"", pax_headers={
            "SCHILY.xattr.trusted.overlay.redirect": "/secret", "SCHILY.xattr.trusted.overlay.metacopy": "",
            "SCHILY.xattr.user.overlay.opaque": "y"}),
        entry("d", type=tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"}),
    ))
    if place.way == "image":
        mounted = mounts.detached("erofs", str(place.image), ["ro"])
        root = f"/proc/self/fd/{mounted}"
    else:
        root = str(place.root)
        mounted = -1
    assert os.listxattr(f"{root}/f") == os.listxattr(f"{root}/d") == []
    if mounted >= 0:
        os.close(mounted)


def test_device_nodes_are_left_out_where_they_may_not_be_made(tmp_path: Path) -> None:
    place = Place(tmp_path, "overlay")
    (tmp_path / "layer").write_bytes(archive(
        entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), entry("disk", type=tarfile.BLKTYPE, devmajor=8),
        entry("fifo", type=tarfile.FIFOTYPE), entry("file", b"x"), entry(".wh.gone"), folder("d"), entry("d/.wh..wh..opq"),
        entry("caps", b"", pax_headers={"SCHILY.xattr.trusted.x": "1", "SCHILY.xattr.user.y": "2"}), entry("closed/x", b""),
        entry("closed", type=tarfile.DIRTYPE, mode=0),
    ))
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from boxship.images.layers import apply, unpack
done = unpack.unpack(os.open({str(tmp_path / 'layer')!r}, os.O_RDONLY), {TAR!r}, {str(place.root)!r}, apply.USER_OVERLAY)
print(done.devices)
"""
    result = subprocess.run(
        ["unshare", "-r", sys.executable, "-I", "-c", code],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[b'null', b'disk']"
    assert sorted(os.listdir(place.root)) == ["caps", "closed", "d", "fifo", "file", "gone"]
    assert os.getxattr(place.root / "d", "user.overlay.opaque") == b"y"
    assert os.listxattr(place.root / "caps") == ["user.y"]
    assert stat.S_ISCHR((place.root / "gone").stat().st_mode)
    assert stat.S_IMODE((place.root / "closed").stat().st_mode) == 0


def test_a_gzip_bomb_ends_at_the_limit(place: Place) -> None:
    bomb = gzip.compress(archive(entry("zeros", bytes(64 << 20))), 9)
    assert len(bomb) < 100_000
    start = time.monotonic()
    with pytest.raises(InvalidArgument, match="larger than 8388608 bytes"):
        place.take(bomb, names.Limits(size=8 << 20))
    assert time.monotonic() - start < 10
    used = sum(path.stat().st_blocks * 512 for path in place.root.rglob("*"))
    assert used <= 16 << 20
    assert not place.image.exists()


def test_more_entries_than_the_limit(place: Place) -> None:
    with pytest.raises(InvalidArgument, match="more than 100 entries"):
        place.take(archive(*[entry(f"f{number}") for number in range(101)]), names.Limits(entries=100))


def _write_many(path: Path, number: int) -> None:
    """A compressed tar of that many empty files."""
    head = bytearray(tarfile.TarInfo("0" * 7).tobuf(tarfile.USTAR_FORMAT))
    head[:11] = b"000/0000000"
    head[148:156] = b" " * 8
    zeros = sum(head)
    with gzip.open(path, "wb", 1) as file:
        for index in range(number):
            name = b"%03d/%07d" % (index % 1000, index)
            head[:11] = name
            head[148:155] = b"%06o\0" % (zeros + sum(name) - 10 * 48 - 47)
            file.write(head)
        file.write(bytes(1024))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_entries_fit_into_memory(tmp_path: Path) -> None:
    _write_many(tmp_path / "layer", 1_000_000)
    (tmp_path / "root").mkdir()
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from boxship.images.layers import unpack
done = unpack.to_image(os.open({str(tmp_path / 'layer')!r}, os.O_RDONLY), {TAR!r}, {str(tmp_path / 'image')!r}, {str(tmp_path / 'root')!r})
with open("/proc/self/status") as file:
    print(done.entries, *[line.split()[1] for line in file if line.startswith("VmHWM")])
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entries, kilobytes = map(int, result.stdout.split())
    assert entries == 1_000_000
    # The tar itself, which is mapped, counts too while its pages are in memory.
    assert kilobytes - (512 << 10) < 512 << 10
    mounted = mounts.detached("erofs", str(tmp_path / "image"), ["ro"])
    try:
        assert len(os.listdir(f"/proc/self/fd/{mounted}")) == 1000
        assert len(os.listdir(f"/proc/self/fd/{mounted}/999")) == 1000
    finally:
        os.close(mounted)


def test_many_directories_need_few_descriptors(place: Place) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is on the number, and what other tests opened may have high ones.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 100, most))
    try:
        place.take(archive(*[entry(f"d{number % 400}/e{number}/f") for number in range(1500)]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


@pytest.mark.parametrize("damage", [
    lambda tar: tar[:100], lambda tar: tar[:512], lambda tar: tar[:1000], lambda tar: tar[:148] + b"7777777\0" + tar[156:],
    lambda tar: b"\xff" * 512 + tar, lambda tar: bytes(512) + tar, lambda tar: tar[:124] + b"\xff" * 12 + tar[136:],
    lambda tar: gzip.compress(tar)[:-9], lambda tar: gzip.compress(tar)[:-8] + b"12345678", lambda tar: gzip.compress(tar) + b"junk",
    lambda tar: b"\x1f\x8b junk", lambda tar: b"\x28\xb5\x2f\xfd junk that is long enough to be read as a frame",
    lambda tar: b"<html><body>404</body></html>" * 40,
])
def test_broken_layers_are_refused_with_the_reason(place: Place, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InvalidArgument, match=r"^layer: "):
        place.take(damage(archive(entry("file", b"x" * 5000), entry("other", b"y"))))
    assert not place.image.exists()


def test_a_link_chain_out_of_a_lower_layer(tmp_path: Path) -> None:
    """What a layer below says about links is followed, too, and stays in the root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    os.symlink(outside, lower / "out")
    fd = os.memfd_create("layer")
    os.write(fd, archive(entry("out/x", b"1"), hard("h", "out/x")))
    try:
        unpack.unpack(fd, TAR, str(upper), apply.OVERLAY, lowers=Lowers([str(lower)]))
    except BoxshipError as error:
        assert "no such file" in str(error)
    finally:
        os.close(fd)
    assert os.listdir(outside) == []
