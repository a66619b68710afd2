"""The Diff service over every driver: layers in, layers out, the same trees."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd import diff as service
from boxship.containerd.snapshots.driver import Driver
from boxship.containerd.snapshots.erofs import IMAGE, ErofsDriver
from boxship.containerd.snapshots.native import NativeDriver
from boxship.containerd.snapshots.overlay import OverlayDriver
from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from support.blobs import MemoryStore

pytestmark = pytest.mark.root

TAR = "application/vnd.oci.image.layer.v1.tar"
DRIVERS = {"overlayfs": OverlayDriver, "native": NativeDriver, "erofs": ErofsDriver}


class Content:
    """A Content service of one namespace."""

    def __init__(self) -> None:
        self.blobs = MemoryStore()

    def store(self, call: Call) -> MemoryStore:
        return self.blobs


class Stack:
    """A driver with the Diff service over it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.content = Content()
        self.diff = service.Diff(self.content, [driver])
        self.call = Call("test")

    def apply(self, key: str, blob: bytes, media_type: str = TAR) -> object:
        digest = self.content.blobs.add(blob)
        request = pb.diff.ApplyRequest(
            diff=pb.types.Descriptor(media_type=media_type, digest=digest, size=len(blob)),
            mounts=service.to_messages(self.driver.mounts(key)),
        )
        return asyncio.run(self.diff.Apply(request, self.call)).applied

    def layer(self, name: str, parent: str, blob: bytes, media_type: str = TAR) -> object:
        self.driver.prepare(f"{name}-x", parent)
        applied = self.apply(f"{name}-x", blob, media_type)
        self.driver.commit(name, f"{name}-x")
        return applied

    def tree(self, name: str) -> dict[str, tuple[object, ...]]:
        entries = self.driver.view(f"{name}-view", name)
        try:
            with service.shown(entries) as root:
                return tree(Path(root))
        finally:
            self.driver.remove(f"{name}-view")

    def changes(self, left: str, right: str, media_type: str = TAR, **more: object) -> object:
        """The diff of two committed snapshots."""
        one = self.driver.view("left", left)
        other = self.driver.view("right", right)
        try:
            return asyncio.run(self.diff.Diff(pb.diff.DiffRequest(
                left=service.to_messages(one), right=service.to_messages(other), media_type=media_type, **more), self.call)).diff
        finally:
            self.driver.remove("left")
            self.driver.remove("right")


@pytest.fixture(params=list(DRIVERS))
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    driver = DRIVERS[request.param](str(tmp_path / "root"))
    yield Stack(driver)
    for info in reversed(list(driver.walk())):
        driver.remove(info.name)
    driver.close()
    assert os.listdir(tmp_path / "root/snapshots") == []
    with open("/proc/self/mountinfo") as table:
        assert str(tmp_path) not in table.read()


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a layer may say of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = os.lstat(path if path != root else f"{root}/.")
        regular, directory = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
        name = str(path.relative_to(root))
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif regular:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        # As the path itself: listxattr of a link into /proc is refused.
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
        xattrs = {n: v for n, v in xattrs.items() if not n.startswith("trusted.overlay.")}
        first = inodes.setdefault(status.st_ino, name) if not directory else ""
        found[name] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, status.st_size if regular else 0,
            None if name == "." else int(status.st_mtime), content, xattrs, first, 0 if directory else status.st_nlink,
        )
    return found


def archive(*members: tuple[str, dict[str, object], bytes], layout: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as writer:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1_600_000_000
            info.mode = 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[str, dict[str, object], bytes]:
    return name, fields, data


def folder(name: str, mode: int = 0o755, **fields: object) -> tuple[str, dict[str, object], bytes]:
    return name, {"type": tarfile.DIRTYPE, "mode": mode, **fields}, b""


ALL = archive(
    folder("./", 0o750, uid=3, gid=4), folder("dir", 0o1777), entry("dir/file", b"content", uid=1000, gid=1001, mode=0o4755),
    entry("dir/hard2", type=tarfile.LNKTYPE, linkname="./dir//file"), entry("dir/empty"), entry("big", os.urandom(1_500_000)), entry("exact", b"x" * 512), entry("exact4k", b"y" * 4096),
    entry("link", type=tarfile.SYMTYPE, linkname="dir/file", uid=5), entry("dangling", type=tarfile.SYMTYPE, linkname="/no/where"),
    entry("long", type=tarfile.SYMTYPE, linkname="x/" * 700 + "end"), entry("middling", type=tarfile.SYMTYPE, linkname="m" * 430),
    entry("hard", type=tarfile.LNKTYPE, linkname="dir/hard2"),
    entry("fifo", type=tarfile.FIFOTYPE, mode=0o600), entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("disk", type=tarfile.BLKTYPE, devmajor=259, devminor=70000, mode=0o640),
    entry("x" * 255, b"long name"), *[folder("/".join(["y" * 200] * depth)) for depth in range(1, 10)],
    entry("/".join(["y" * 200] * 10), b"long path"), entry("ünïcode", b"u"),
    entry("latin\udcff", b"raw"),
    entry("caps", b"c", pax_headers={"SCHILY.xattr.security.capability": b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0".decode()}),
    entry("attributes", b"a", pax_headers={
        "SCHILY.xattr.user.one": "1", "SCHILY.xattr.user.two": "2" * 300, "SCHILY.xattr.trusted.three": "3"}),
    folder("attributed", pax_headers={"SCHILY.xattr.user.dir": "d"}),
    entry("old", mtime=-5), entry("nanoseconds", mtime=1_600_000_001.5), entry("owner", uid=3_000_000_000, gid=2_999_999_999),
    folder("many"), *[entry(f"many/{number:04}-{'n' * (number % 60)}", b"%d" % number) for number in range(1200)],
)


def test_every_kind_of_entry_is_as_gnu_tar_unpacks_it(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "gnu").mkdir()
    subprocess.run(
        ["tar", "-x", "-p", "--same-owner", "--xattrs", "--xattrs-include=*", "-C", tmp_path / "gnu"], input=ALL, check=True)
    applied = stack.layer("one", "", ALL)
    assert applied.digest == "sha256:" + hashlib.sha256(ALL).hexdigest()
    assert applied.size == len(ALL)
    assert stack.tree("one") == tree(tmp_path / "gnu")


def test_of_the_erofs_driver_it_is_an_image(tmp_path: Path) -> None:
    driver = ErofsDriver(str(tmp_path / "root"))
    Stack(driver).layer("one", "", ALL)
    assert driver.view("view", "one")[0].source == str(tmp_path / "root/layers/1")
    assert os.listdir(tmp_path / "root/snapshots/1/fs") == []
    assert os.path.exists(tmp_path / "root/snapshots/1" / IMAGE)
    assert driver.usage("one").size > 1_500_000
    driver.remove("view")
    driver.remove("one")
    driver.close()


@pytest.mark.parametrize("media_type, pack", [
    (f"{TAR}+gzip", gzip.compress),
    (f"{TAR}+gzip", lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + bytes(700)),
    ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.compress),
    (f"{TAR}+zstd", zstandard.compress),
    (f"{TAR}+zstd", lambda data: zstandard.compress(data[:9999]) + b"\x50\x2a\x4d\x18\3\0\0\0abc" + zstandard.compress(data[9999:])),
    (TAR, zstandard.compress),
    (f"{TAR}+gzip", bytes),
])
def test_compressions(stack: Stack, media_type: str, pack: object) -> None:
    applied = stack.layer("one", "", pack(ALL), media_type)  # type: ignore[operator]
    assert applied.digest == "sha256:" + hashlib.sha256(ALL).hexdigest()
    assert applied.media_type == TAR
    assert len(stack.tree("one")) > 1200


LOWER = archive(
    folder("etc", 0o751, uid=7), entry("etc/passwd", b"root"), entry("etc/group", b"wheel"), folder("etc/deep"),
    entry("etc/deep/file", b"deep"), entry("a", b"one"), entry("b", b"two"), folder("usr"), folder("usr/lib", 0o700, uid=9),
    entry("usr/lib/old", b"old"), entry("lib", type=tarfile.SYMTYPE, linkname="usr/lib"), folder("gone"), entry("gone/x", b"x"),
)


def test_whiteouts_hide_what_is_below(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    before = stack.tree("one")
    stack.layer("two", "one", archive(
        entry(".wh.a"), folder("etc", 0o700), entry("etc/.wh.passwd"), entry("etc/new", b"new"), entry(".wh.gone"),
        entry("etc/deep/.wh..wh..opq"), entry("etc/deep/fresh", b"fresh"),
    ))
    found = stack.tree("two")
    assert sorted(found) == sorted([
        ".", "b", "etc", "etc/deep", "etc/deep/fresh", "etc/group", "etc/new", "lib", "usr", "usr/lib", "usr/lib/old"])
    assert found["etc"][0] == oct(0o40700)
    assert found["etc/deep"] == before["etc/deep"][:5] + found["etc/deep"][5:6] + before["etc/deep"][6:]
    assert stack.tree("one") == before


def test_whiteouts_do_not_hide_entries_of_their_own_layer(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    stack.layer("two", "one", archive(
        entry("a", b"again"), entry(".wh.a"), entry(".wh.b"), entry("b", b"again"),
        folder("etc"), entry("etc/mine", b"m"), entry(".wh.etc"),
        entry(".wh.gone"), folder("gone"), entry("gone/mine", b"m"),
        folder("usr/lib"), entry("usr/lib/mine", b"m"), entry("usr/lib/.wh..wh..opq"),
    ))
    assert sorted(stack.tree("two")) == sorted([
        ".", "a", "b", "etc", "etc/mine", "gone", "gone/mine", "lib", "usr", "usr/lib", "usr/lib/mine"])


def test_an_opaque_root_hides_everything_below(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    stack.layer("two", "one", archive(folder("etc"), entry("etc/mine", b""), entry(".wh..wh..opq"), entry("new", b"")))
    assert sorted(stack.tree("two")) == [".", "etc", "etc/mine", "new"]


def test_directories_that_the_tar_leaves_out_are_as_below(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    before = stack.tree("one")
    stack.layer("two", "one", archive(
        entry("etc/deep/new", b"1"), entry("lib/by-link", b"2"), entry("not/there/before", b"3"), entry("lib/.wh.old"),
    ))
    found = stack.tree("two")
    assert found["etc"][:5] == before["etc"][:5]
    assert found["usr/lib"][:3] == before["usr/lib"][:3] == (oct(0o40700), 9, 0)
    assert found["lib"][6] == "usr/lib"
    assert "usr/lib/by-link" in found
    assert "usr/lib/old" not in found
    assert found["not/there"][:3] == (oct(0o40755), 0, 0)
    assert "etc/passwd" in found


def test_a_link_to_a_file_of_a_layer_below(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    stack.layer("two", "one", archive(entry("new", type=tarfile.LNKTYPE, linkname="etc/passwd"), entry("more", b"m")))
    found = stack.tree("two")
    assert found["new"][6] == found["etc/passwd"][6]
    assert found["new"][8] == "etc/passwd"
    assert found["new"][9] == 2


def test_files_replace_directories_and_the_other_way(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    stack.layer("two", "one", archive(entry("etc", b"file now"), folder("a"), entry("a/in", b""), folder("lib"), entry("lib/x", b"")))
    found = stack.tree("two")
    assert {"a/in", "lib/x"} <= found.keys()
    assert not {"etc/passwd", "lib/old"} & found.keys()
    assert found["usr/lib/old"]


def test_the_last_of_several_entries_wins(stack: Stack) -> None:
    stack.layer("one", "", archive(
        entry("f", b"first"), entry("f", b"second", mode=0o600), folder("d", 0o700), entry("d/x", b""), folder("d", 0o755),
        entry("s", type=tarfile.SYMTYPE, linkname="d"), entry("s/through", b""), folder("s"), entry("s/own", b""),
        folder("r"), entry("r/below", b""), entry("h", type=tarfile.LNKTYPE, linkname="r/below"), entry("r", b"file"),
        entry("c", b"1"), entry("e", type=tarfile.LNKTYPE, linkname="c"), entry("c", b"2"), entry("e", type=tarfile.LNKTYPE, linkname="e"),
    ))
    found = stack.tree("one")
    assert sorted(found) == sorted([".", "c", "d", "d/through", "d/x", "e", "f", "h", "r", "s", "s/own"])
    assert found["f"][0] == oct(0o100600)
    assert found["f"][6] == hashlib.sha256(b"second").hexdigest()
    assert [found[name][9] for name in "ceh"] == [1, 1, 1]
    assert found["e"][6] == hashlib.sha256(b"1").hexdigest()


def test_links_on_the_way_are_followed_within_the_root(stack: Stack) -> None:
    stack.layer("one", "", archive(
        folder("real"), entry("in", type=tarfile.SYMTYPE, linkname="/real"), entry("in/one", b""), entry("up", type=tarfile.SYMTYPE,
        linkname="../../real"), entry("up/two", b""), entry("later", type=tarfile.SYMTYPE, linkname="not/yet"), entry("later/three", b""),
    ))
    assert sorted(stack.tree("one")) == sorted([
        ".", "in", "later", "not", "not/yet", "not/yet/three", "real", "real/one", "real/two", "up"])


def test_sparse_files_of_every_format(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, pieces in {
        "aligned": [(0, 4096), (1 << 20, 8192), (3 << 20, 4096)], "odd": [(5000, 100), (70_000, 33_333), (200_000, 1)],
        "end": [(1 << 22, 10)], "hole": [], "start": [(0, 10)],
    }.items():
        with open(source / name, "wb") as file:
            for at, size in pieces:
                file.seek(at)
                file.write(os.urandom(size))
            file.truncate(6 << 20)
    wanted = {name: line[4:7:2] for name, line in tree(source).items() if name != "."}
    parent = ""
    for layout in (["--format=gnu"], ["--sparse-version=0.0"], ["--sparse-version=0.1"], ["--sparse-version=1.0"]):
        posix = [] if "gnu" in layout[0] else ["--format=posix"]
        data = subprocess.run(["tar", "-cS", *posix, *layout, "-C", source, "."], capture_output=True, check=True).stdout
        assert len(data) < 1 << 20
        name = layout[0][-3:]
        stack.layer(name, parent, data)
        parent = name
        assert {each: line[4:7:2] for each, line in stack.tree(name).items() if each != "."} == wanted


@pytest.mark.parametrize("layout", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_every_format_of_gnu_tar(stack: Stack, tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    deep = source / ("d" * 40) / ("e" * 30)
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    os.symlink("t" * 90, deep / "link")
    os.link(deep / "file", deep / "hard")
    if layout in ("gnu", "posix", "oldgnu"):
        (deep / ("f" * 200)).write_text("y")
        os.symlink("t" * 300, deep / "longlink")
    data = subprocess.run(["tar", "-c", f"--format={layout}", "-C", source, "."], capture_output=True, check=True).stdout
    stack.layer("one", "", data)
    assert stack.tree("one") == tree(source) | {".": stack.tree("one")["."]}


def test_what_diff_writes_makes_the_same_tree_again(stack: Stack) -> None:
    stack.layer("one", "", ALL)
    stack.layer("two", "one", archive(
        folder("./", 0o711), entry("dir/.wh.file"), entry("big", b"small now"), entry("new", b"n", uid=5), folder("dir", 0o700),
        entry("many/.wh..wh..opq"), entry("many/one", b""), entry(".wh.attributed"), entry("fifo", b"file now"),
        entry("attributes", b"a", pax_headers={"SCHILY.xattr.user.other": "o"}), entry("h2", type=tarfile.LNKTYPE, linkname="new"),
    ))
    whole = stack.changes("", "one", f"{TAR}+gzip")
    change = stack.changes("one", "two", f"{TAR}+zstd", labels={"a": "b"})
    assert stack.content.blobs.labels(change.digest)["a"] == "b"
    diff_id = stack.content.blobs.labels(change.digest)["containerd.io/uncompressed"]
    stack.layer("one-again", "", stack.content.blobs.blobs[whole.digest], whole.media_type)
    applied = stack.layer("two-again", "one-again", stack.content.blobs.blobs[change.digest], change.media_type)
    assert applied.digest == diff_id
    assert stack.tree("one-again") == stack.tree("one")
    assert stack.tree("two-again") == stack.tree("two")
    assert stack.changes("one", "two", f"{TAR}+zstd").digest == change.digest


def test_a_diff_holds_the_changes_only_whiteouts_first(stack: Stack) -> None:
    stack.layer("one", "", LOWER)
    stack.layer("two", "one", archive(folder("etc"), entry("etc/zz", b""), entry("etc/.wh.passwd"), entry("etc/.wh.deep")))
    change = stack.changes("one", "two")
    with tarfile.open(fileobj=io.BytesIO(stack.content.blobs.blobs[change.digest])) as reader:
        names = reader.getnames()
    assert [name for name in names if name != "."] == ["etc", "etc/.wh.deep", "etc/.wh.passwd", "etc/zz"]
    empty = stack.changes("one", "one")
    with tarfile.open(fileobj=io.BytesIO(stack.content.blobs.blobs[empty.digest])) as reader:
        assert reader.getnames() == []


def test_times_are_put_back_to_the_epoch(stack: Stack) -> None:
    stack.layer("one", "", ALL)
    request = {"source_date_epoch": {"seconds": 1000}}
    change = stack.changes("", "one", **request)
    with tarfile.open(fileobj=io.BytesIO(stack.content.blobs.blobs[change.digest])) as reader:
        assert {min(member.mtime, 1000) for member in reader} == {-5, 1000}


def test_refusals(stack: Stack) -> None:
    stack.driver.prepare("key")
    with pytest.raises(Unsupported, match="encrypted"):
        stack.apply("key", b"", f"{TAR}+encrypted")
    with pytest.raises(Unsupported):
        stack.apply("key", b"", "application/json")
    with pytest.raises(InvalidArgument):
        asyncio.run(stack.diff.Apply(pb.diff.ApplyRequest(diff=pb.types.Descriptor(media_type=TAR)), stack.call))
    with pytest.raises(NotFound):
        asyncio.run(stack.diff.Apply(pb.diff.ApplyRequest(
            diff=pb.types.Descriptor(media_type=TAR, digest="sha256:" + "0" * 64),
            mounts=service.to_messages(stack.driver.mounts("key"))), stack.call))
    stack.driver.view("view")
    with pytest.raises(FailedPrecondition):
        stack.apply("view", ALL)
    with pytest.raises(Unsupported):
        stack.changes("", "", "text/plain")


def test_an_empty_layer(stack: Stack) -> None:
    for number, blob in enumerate((b"", bytes(1024), bytes(10240), gzip.compress(b""))):
        applied = stack.layer(f"l{number}", f"l{number - 1}" if number else "", blob)
        assert applied.size == len(blob) if number < 3 else applied.size == 0
    assert sorted(stack.tree("l3")) == ["."]


def test_written_over_after_apply_and_applied_twice(stack: Stack) -> None:
    stack.driver.prepare("key")
    stack.apply("key", LOWER)
    with service.shown(stack.driver.mounts("key")) as root:
        assert sorted(os.listdir(root)) == ["a", "b", "etc", "gone", "lib", "usr"]
    stack.apply("key", archive(entry("second", b""), entry("a", b"changed")))
    stack.driver.commit("name", "key")
    found = stack.tree("name")
    assert {"second", "etc/passwd", "usr/lib/old"} <= found.keys()
    assert found["a"][6] == hashlib.sha256(b"changed").hexdigest()
    assert found["etc"][0] == oct(0o40751)
