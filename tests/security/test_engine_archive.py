"""docker cp into and out of a hostile container: no link, no name and no race leads out of its root.

Each test has a tree `root`, which stands for the container's root, and beside it a canary that must never be read or changed.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boxship.engine import archive
from boxship.engine.archive import Place
from boxship.engine.volumes import populate
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, PermissionDenied
from boxship.linux.roots import Root

CANARY = "canary\n"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: owners are set")
    inside = tmp_path / "root"
    inside.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text(CANARY)
    yield inside
    assert (outside / "canary").read_text() == CANARY
    assert sorted(os.listdir(outside)) == ["canary"], "something was written outside of the root"


def place(root: Path, path: str = "/", *, read_only: bool = False) -> Place:
    return Place(Root(path=str(root)), path, read_only=read_only)


def packed(*entries: tuple[str, Callable[[tarfile.TarInfo], None], bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, change, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            change(entry)
            made.addfile(entry, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def plain(entry: tarfile.TarInfo) -> None:
    entry.mode = 0o644


def link(target: str) -> Callable[[tarfile.TarInfo], None]:
    def change(entry: tarfile.TarInfo) -> None:
        entry.type, entry.linkname = tarfile.SYMTYPE, target

    return change


def hard(target: str) -> Callable[[tarfile.TarInfo], None]:
    def change(entry: tarfile.TarInfo) -> None:
        entry.type, entry.linkname = tarfile.LNKTYPE, target

    return change


def extract(root: Path, stream: io.BytesIO, path: str = "/") -> None:
    with place(root, path) as spot:
        archive.extract(spot, stream, no_overwrite_kind=False, owner=None)


def read(root: Path, path: str) -> bytes:
    parts: list[bytes] = []
    with place(root, path) as spot:
        archive.write_tar(spot, parts.append, base="x")
    return b"".join(parts)


@pytest.mark.parametrize("name", ["../outside/new", "a/../../outside/new", "/../outside/new", ".."])
def test_names_that_lead_out_are_refused(root: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        extract(root, packed((name, plain, b"x")))


@pytest.mark.parametrize("target", ["../outside", "../../../../../../../..{outside}", "{outside}"])
def test_a_link_in_the_archive_is_followed_inside_the_root_only(root: Path, target: str) -> None:
    outside = str(root.parent / "outside")
    with pytest.raises(BoxshipError):
        extract(root, packed(("l", link(target.format(outside=outside)), b""), ("l/canary", plain, b"overwritten")))
        # Where such a folder exists inside the root, the file belongs there, as in a chroot.
        raise NotFound("written inside")


def test_a_link_of_the_container_to_a_file_outside_is_replaced_not_written_through(root: Path) -> None:
    (root / "f").symlink_to(root.parent / "outside" / "canary")
    extract(root, packed(("f", plain, b"mine")))
    assert (root / "f").read_bytes() == b"mine"
    assert not (root / "f").is_symlink()


def test_a_folder_of_the_container_that_is_a_link_is_followed_as_in_a_chroot(root: Path) -> None:
    (root / "real").mkdir()
    (root / "d").symlink_to("/real")
    extract(root, packed(("f", plain, b"x")), "/d")
    assert (root / "real" / "f").read_bytes() == b"x"


def test_hard_links_out_of_the_root_are_not_made(root: Path) -> None:
    (root / "d").symlink_to(root.parent / "outside")
    with pytest.raises(BoxshipError):
        extract(root, packed(("h", hard("d/canary"), b"")))
    with pytest.raises(BoxshipError):
        extract(root, packed(("h", hard("../outside/canary"), b"")))
    assert not (root / "h").exists()


def test_a_hard_link_to_a_link_is_the_link_itself(root: Path) -> None:
    (root / "l").symlink_to(root.parent / "outside" / "canary")
    extract(root, packed(("h", hard("l"), b"")))
    assert (root / "h").is_symlink()
    extract(root, packed(("h", plain, b"mine")))
    assert (root / "h").read_bytes() == b"mine"


def test_reading_through_a_link_stays_inside(root: Path) -> None:
    (root / "d").symlink_to(root.parent / "outside")
    with pytest.raises(NotFound):
        read(root, "/d/canary")
    (root / "l").symlink_to(root.parent / "outside" / "canary")
    assert CANARY.encode() not in read(root, "/l")


def test_a_magic_link_is_not_followed(root: Path) -> None:
    (root / "p").symlink_to("/proc/self/root")
    with pytest.raises(NotFound):
        read(root, "/p/etc/passwd")


def test_a_read_only_place_is_not_written(root: Path) -> None:
    with pytest.raises(PermissionDenied), place(root, read_only=True) as spot:
        archive.extract(spot, packed(("f", plain, b"x")), no_overwrite_kind=False, owner=None)
    assert not (root / "f").exists()


def test_what_is_no_archive_is_refused(root: Path) -> None:
    with pytest.raises(InvalidArgument):
        extract(root, io.BytesIO(b"nonsense" * 1000))


def test_a_volume_is_not_filled_through_links(root: Path, tmp_path: Path) -> None:
    (root / "d").symlink_to(root.parent / "outside")
    (root / "e").mkdir()
    (root / "e" / "l").symlink_to(root.parent / "outside" / "canary")
    target = tmp_path / "volume"
    target.mkdir()
    with Root(path=str(root)) as source:
        populate(source, "/d", str(target))
        assert list(target.iterdir()) == []
        populate(source, "/e", str(target))
    assert (target / "l").is_symlink()


def test_a_container_that_exchanges_a_folder_for_a_link_meanwhile_gains_nothing(root: Path) -> None:
    end = threading.Event()
    (root / "d").mkdir()

    def exchange() -> None:
        while not end.is_set():
            try:
                (root / "d").rename(root / "aside")
                (root / "d").symlink_to(root.parent / "outside")
                (root / "d").unlink()
                (root / "aside").rename(root / "d")
            except OSError:
                continue

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(100):
            try:
                extract(root, packed(("d/canary", plain, b"overwritten")))
            except (BoxshipError, OSError):
                continue
    finally:
        end.set()
        thread.join()
