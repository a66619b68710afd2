"""Scratch folders go away with their run, or with the next one."""

import os
from pathlib import Path

import pytest

from boxship.cli import scratch


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "boxship" / "scratch"
    path.mkdir(parents=True, mode=0o700)
    return str(path)


def dead(run_id: str) -> bool:
    return False


def test_a_name_is_taken_once(base: str) -> None:
    run = scratch.Scratch(base, "t1")
    with pytest.raises(FileExistsError):
        scratch.Scratch(base, "t1")
    run.remove()
    assert os.listdir(base) == []


def test_removal_follows_no_link_and_minds_no_permission(base: str, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    run = scratch.Scratch(base, "t1")
    os.symlink(tmp_path / "precious", f"{run.rootfs}/link")
    os.makedirs(f"{run.rootfs}/a/b")
    os.mkfifo(f"{run.rootfs}/a/b/fifo")
    os.chmod(f"{run.rootfs}/a/b", 0)
    os.chmod(f"{run.rootfs}/a", 0o500)
    run.remove()
    assert not os.path.exists(run.path)
    assert (tmp_path / "precious/file").exists()


def test_a_sweep_leaves_runs_that_are_going_on(base: str) -> None:
    run = scratch.Scratch(base, "t1")
    # The lock belongs to the open file, so another open one in this process does not hold it.
    assert scratch.sweep([base], dead) == 0
    assert os.path.isdir(run.path)
    run.remove()


def test_a_sweep_removes_what_a_killed_run_left(base: str) -> None:
    pid = os.fork()
    if pid == 0:
        scratch.Scratch(base, "t1")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.listdir(base) == ["t1"]
    assert scratch.sweep([base, base + "/none"], lambda run_id: True) == 0
    assert scratch.sweep([base, base + "/none"], dead) == 1
    assert os.listdir(base) == []


def test_the_upper_folder_has_the_lower_ones_permissions(base: str, tmp_path: Path) -> None:
    lower = tmp_path / "lower,with:all\\sorts"
    lower.mkdir()
    lower.chmod(0o1751)
    run = scratch.Scratch(base, "t1")
    link, upper, work = run.layer(str(lower))
    assert os.readlink(link) == str(lower)
    assert os.stat(upper).st_mode & 0o7777 == 0o1751
    assert not set(",:\\") & set(link + upper + work)


def test_places_that_options_cannot_express_are_unfit(tmp_path: Path) -> None:
    assert scratch.fit(str(tmp_path / "a b" / "scratch")) is False
    assert scratch.fit(str(tmp_path / "a,b" / "scratch")) is False


def test_a_place_that_is_no_folder_of_ours_is_unfit(tmp_path: Path) -> None:
    (tmp_path / "boxship").mkdir()
    (tmp_path / "boxship/scratch").symlink_to("/tmp")
    assert scratch.fit(str(tmp_path / "boxship/scratch")) is False
