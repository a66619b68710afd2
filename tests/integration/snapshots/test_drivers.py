"""What every snapshot driver does, whichever it is: one suite for all."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from boxship.containerd.snapshots.driver import ACTIVE, COMMITTED, VIEW, Driver, Info, Mount
from boxship.containerd.snapshots.erofs import ErofsDriver
from boxship.containerd.snapshots.native import NativeDriver
from boxship.containerd.snapshots.overlay import OverlayDriver
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from boxship.linux import mounts

pytestmark = pytest.mark.root

DRIVERS: dict[str, Callable[[str], Driver]] = {"overlayfs": OverlayDriver, "native": NativeDriver, "erofs": ErofsDriver}
if os.environ.get("BOXSHIP_TEST_ROOTLESS"):
    # Set by test_rootless.py, which runs this very suite in a user namespace.
    DRIVERS = {"overlayfs": partial(OverlayDriver, userxattr=True), "native": NativeDriver}


@pytest.fixture(params=list(DRIVERS))
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    made = DRIVERS[request.param](str(tmp_path / "root"))
    yield made
    for info in reversed(list(made.walk())):
        made.remove(info.name)
    left = os.listdir(tmp_path / "root" / "snapshots")
    made.close()
    mounted = [point for point in mounts.mount_points() if point.startswith(str(tmp_path))]
    for point in mounted:
        mounts.umount(point, 2)
    assert mounted == []
    assert left == []


@contextmanager
def mounted(entries: list[Mount]) -> Iterator[Path]:
    """The mounts at a place of their own."""
    with tempfile.TemporaryDirectory() as place:
        for entry in entries:
            mounts.attach(entry.type, entry.source, place, entry.options)
        try:
            yield Path(place)
        finally:
            for _ in entries:
                mounts.umount(place)


def tree(root: Path) -> dict[str, str]:
    """What a tree looks like: type, mode, owner, content."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        text = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
        if path.is_symlink():
            text += f" -> {os.readlink(path)}"
        elif path.is_file():
            text += f" {path.read_text()}"
        found[str(path.relative_to(root))] = text
    return found


def layer(driver: Driver, name: str, parent: str, change: Callable[[Path], object]) -> None:
    """Commit `change` on top of `parent`."""
    with mounted(driver.prepare(f"{name}-active", parent)) as root:
        change(root)
    driver.commit(name, f"{name}-active")


def looks_like(driver: Driver, name: str) -> dict[str, str]:
    """What a committed snapshot holds, through a view."""
    with mounted(driver.view(f"{name}-look", name)) as root:
        found = tree(root)
    driver.remove(f"{name}-look")
    return found


def names(driver: Driver, name: str) -> list[str]:
    return list(looks_like(driver, name))


def base(root: Path) -> None:
    (root / "a").write_text("one")
    (root / "etc").mkdir(mode=0o750)
    (root / "etc/passwd").write_text("root")
    (root / "etc/deep").mkdir()
    (root / "etc/deep/file").write_text("deep")
    os.symlink("etc/passwd", root / "link")


def test_what_is_written_is_committed_and_seen_by_children(driver: Driver) -> None:
    layer(driver, "one", "", base)
    layer(driver, "two", "one", lambda root: (root / "b").write_text("two"))
    assert names(driver, "one") == ["a", "etc", "etc/deep", "etc/deep/file", "etc/passwd", "link"]
    assert names(driver, "two") == ["a", "b", "etc", "etc/deep", "etc/deep/file", "etc/passwd", "link"]
    assert looks_like(driver, "two")["etc"].startswith("drwxr-x---")


def test_a_child_changes_nothing_of_its_parent(driver: Driver) -> None:
    layer(driver, "one", "", base)
    before = looks_like(driver, "one")

    def change(root: Path) -> None:
        (root / "a").write_text("changed")
        (root / "etc/passwd").unlink()
        os.chmod(root / "etc", 0o700)
        os.chown(root / "etc/deep/file", 7, 8)

    layer(driver, "two", "one", change)
    after = looks_like(driver, "two")
    assert looks_like(driver, "one") == before
    assert after["a"].endswith("changed")
    assert "etc/passwd" not in after
    assert after["etc"].startswith("drwx------")
    assert "7:8" in after["etc/deep/file"]


def test_deleted_directories_stay_deleted_and_made_again_are_empty(driver: Driver) -> None:
    layer(driver, "one", "", base)
    layer(driver, "two", "one", lambda root: subprocess.run(["rm", "-r", root / "etc"], check=True))
    layer(driver, "three", "two", lambda root: (root / "etc").mkdir())
    assert names(driver, "two") == ["a", "link"]
    assert names(driver, "three") == ["a", "etc", "link"]


def test_a_directory_replaced_by_a_file_and_back(driver: Driver) -> None:
    def to_file(root: Path) -> None:
        subprocess.run(["rm", "-r", root / "etc"], check=True)
        (root / "etc").write_text("now a file")

    def to_directory(root: Path) -> None:
        (root / "etc").unlink()
        (root / "etc").mkdir()
        (root / "etc/new").write_text("new")

    layer(driver, "one", "", base)
    layer(driver, "two", "one", to_file)
    layer(driver, "three", "two", to_directory)
    assert looks_like(driver, "two")["etc"].endswith("now a file")
    assert names(driver, "three") == ["a", "etc", "etc/new", "link"]


def test_moves_and_hard_links(driver: Driver) -> None:
    def change(root: Path) -> None:
        os.rename(root / "a", root / "moved")
        os.link(root / "etc/passwd", root / "also")
        os.rename(root / "etc/deep/file", root / "etc/file")

    layer(driver, "one", "", base)
    layer(driver, "two", "one", change)
    assert names(driver, "two") == ["also", "etc", "etc/deep", "etc/file", "etc/passwd", "link", "moved"]


def test_a_renamed_directory(driver: Driver) -> None:
    layer(driver, "one", "", base)
    layer(driver, "two", "one", lambda root: subprocess.run(["mv", root / "etc", root / "usr"], check=True))
    assert names(driver, "two") == ["a", "link", "usr", "usr/deep", "usr/deep/file", "usr/passwd"]


def test_the_root_keeps_mode_and_owner(driver: Driver) -> None:
    def change(root: Path) -> None:
        os.chown(root, 5, 6)
        os.chmod(root, 0o1777)

    layer(driver, "one", "", change)
    layer(driver, "two", "one", lambda root: (root / "x").write_text(""))
    with mounted(driver.prepare("three", "two")) as root:
        status = root.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1777, 5, 6)
    with mounted(driver.prepare("bare")) as root:
        assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_a_view_is_read_only(driver: Driver) -> None:
    layer(driver, "one", "", base)
    layer(driver, "two", "one", lambda root: (root / "b").write_text("two"))
    for parent in ("", "one", "two"):
        with mounted(driver.view(f"view-{parent}", parent)) as root, pytest.raises(OSError, match="Read-only"):
            (root / "no").write_text("")
        assert driver.stat(f"view-{parent}").kind == VIEW
        with pytest.raises(FailedPrecondition):
            driver.commit("never", f"view-{parent}")


def test_stat_tells_kind_parent_labels_and_times(driver: Driver) -> None:
    driver.prepare("key", labels={"one": "1", "containerd.io/gc.root": "x"})
    info = driver.stat("key")
    assert (info.name, info.parent, info.kind) == ("key", "", ACTIVE)
    assert info.labels == {"one": "1", "containerd.io/gc.root": "x"}
    assert info.created == info.updated > 1_600_000_000 * 10**9
    driver.commit("name", "key", {"two": "2"})
    with pytest.raises(NotFound):
        driver.stat("key")
    info = driver.stat("name")
    assert (info.name, info.kind, info.labels) == ("name", COMMITTED, {"two": "2"})
    driver.prepare("child", "name")
    assert driver.stat("child").parent == "name"


def test_names_are_taken_once(driver: Driver) -> None:
    driver.prepare("key")
    for make in (driver.prepare, driver.view):
        with pytest.raises(AlreadyExists):
            make("key")
    driver.commit("name", "key")
    driver.prepare("key")
    with pytest.raises(AlreadyExists):
        driver.commit("name", "key")
    assert driver.stat("key").kind == ACTIVE
    with pytest.raises(AlreadyExists):
        driver.prepare("name")


def test_a_parent_must_be_there_and_committed(driver: Driver) -> None:
    driver.prepare("active")
    for make in (driver.prepare, driver.view):
        with pytest.raises(InvalidArgument):
            make("key", "active")
        with pytest.raises(NotFound):
            make("key", "nobody")
    assert [info.name for info in driver.walk()] == ["active"]


def test_what_is_not_there_is_not_found(driver: Driver) -> None:
    for call in (driver.stat, driver.usage, driver.mounts, driver.remove):
        with pytest.raises(NotFound):
            call("nobody")
    with pytest.raises(NotFound):
        driver.commit("name", "nobody")
    with pytest.raises(NotFound):
        driver.update(Info("nobody"))


def test_mounts_answers_again_as_prepare_did(driver: Driver) -> None:
    layer(driver, "one", "", base)
    assert driver.prepare("active", "one") == driver.mounts("active")
    assert driver.view("view", "one") == driver.mounts("view")
    with pytest.raises(FailedPrecondition):
        driver.mounts("one")


def test_a_parent_cannot_be_removed_before_its_children(driver: Driver) -> None:
    layer(driver, "one", "", base)
    layer(driver, "two", "one", lambda root: (root / "b").write_text(""))
    driver.prepare("active", "two")
    for name in ("one", "two"):
        with pytest.raises(FailedPrecondition):
            driver.remove(name)
    driver.remove("active")
    driver.remove("two")
    driver.remove("one")
    assert list(driver.walk()) == []


def test_update_changes_labels_and_nothing_else(driver: Driver) -> None:
    driver.prepare("key", labels={"a": "1", "b": "2"})
    created = driver.stat("key").created
    updated = driver.update(Info("key", labels={"a": "changed", "c": "new"}), ["labels.a", "labels.b"])
    assert updated.labels == {"a": "changed"}
    assert updated.updated > created == updated.created
    assert driver.update(Info("key", labels={"c": "3"}), ["labels"]).labels == {"c": "3"}
    assert driver.update(Info("key", labels={"d": "4"})).labels == {"d": "4"}
    for path in ("name", "parent", "kind", "label"):
        with pytest.raises(InvalidArgument):
            driver.update(Info("key", parent="x"), [path])
    assert driver.stat("key").labels == {"d": "4"}


def test_walk_shows_all_of_them(driver: Driver) -> None:
    layer(driver, "one", "", base)
    driver.prepare("active", "one", {"l": "v"})
    driver.view("view", "one")
    assert [(info.name, info.kind, info.parent, info.labels) for info in driver.walk()] == [
        ("one", COMMITTED, "", {}), ("active", ACTIVE, "one", {"l": "v"}), ("view", VIEW, "one", {}),
    ]


def test_usage_grows_with_what_is_written_and_is_kept_by_commit(driver: Driver) -> None:
    with mounted(driver.prepare("key")) as root:
        empty = driver.usage("key")
        (root / "file").write_bytes(os.urandom(300_000))
        os.link(root / "file", root / "again")
        subprocess.run(["sync", "-f", root], check=True)
        full = driver.usage("key")
    assert 300_000 <= full.size - empty.size < 400_000
    assert full.inodes == empty.inodes + 1
    driver.commit("name", "key")
    assert 300_000 <= driver.usage("name").size < 400_000
    view = driver.usage("name")
    driver.view("view", "name")
    assert driver.usage("view").size == 0
    assert driver.usage("name").size == view.size


def test_a_driver_is_found_again_as_it_was(driver: Driver, tmp_path: Path) -> None:
    layer(driver, "one", "", base)
    driver.prepare("active", "one", {"l": "v"})
    before = [(info.name, info.kind, info.parent, info.labels, info.created) for info in driver.walk()]
    os.makedirs(tmp_path / "root/snapshots/new-half/fs")
    os.makedirs(tmp_path / "root/snapshots/rm-77/fs/x")
    os.makedirs(tmp_path / "root/snapshots/99/fs")
    again = DRIVERS[driver.name](str(tmp_path / "root"))
    assert [(info.name, info.kind, info.parent, info.labels, info.created) for info in again.walk()] == before
    assert names(again, "one") == ["a", "etc", "etc/deep", "etc/deep/file", "etc/passwd", "link"]
    assert not {"new-half", "rm-77", "99"} & set(os.listdir(tmp_path / "root/snapshots"))
    again.close()
    again.close()


def test_128_layers(driver: Driver) -> None:
    parent = ""
    for number in range(1, 129):
        mounts_of = driver.prepare(f"{number}-active", parent)
        place = next((o.removeprefix("upperdir=") for o in mounts_of[0].options if o.startswith("upperdir=")), mounts_of[0].source)
        Path(place, f"f{number}").write_text(str(number))
        if number > 1 and mounts_of[0].type == "bind":
            Path(place, f"f{number - 1}").unlink()
        driver.commit(str(number), f"{number}-active")
        parent = str(number)
    found = looks_like(driver, "128")
    assert found["f128"].endswith(" 128")
    with mounted(driver.prepare("top", "128")) as root:
        (root / "written").write_text("")


def test_two_children_of_one_parent_know_nothing_of_each_other(driver: Driver) -> None:
    layer(driver, "one", "", base)
    with mounted(driver.prepare("x", "one")) as x, mounted(driver.prepare("y", "one")) as y:
        (x / "mine").write_text("x")
        (y / "etc/passwd").write_text("y")
        assert not (y / "mine").exists()
        assert (x / "etc/passwd").read_text() == "root"
