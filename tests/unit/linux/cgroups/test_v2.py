"""v2: what is written where, on a folder that stands for a group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from boxship.kit.errors import BoxshipError
from boxship.linux.cgroups import Limits, arrangement
from boxship.linux.cgroups.v2 import V2Group, locate_v2

FILES = (
    "pids.max", "memory.max", "memory.low", "memory.swap.max", "memory.current", "cpu.max", "cpu.max.burst", "cpu.weight",
    "cpu.idle", "io.max", "io.weight", "cpuset.cpus", "cpuset.mems", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max", "rdma.max",
    "memory.high", "cgroup.controllers",
)
MB = 1 << 20


class Folder:
    """A group whose files are ordinary ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in FILES:
            (path / name).touch()
        self.group = V2Group(str(path), rootless=False, explicit=True)
        self.group.fresh = True

    def apply(self, **settings: object) -> dict[str, str]:
        """Apply limits; the files that have content then."""
        limits = Limits()
        for name, value in settings.items():
            setattr(limits, name, value)
        self.group.apply(limits)
        return {name: text for name in FILES if (text := (self.path / name).read_text())}

    def update(self, before: dict[str, str], **settings: object) -> dict[str, str]:
        """Apply limits to a group that is in use, and has these contents."""
        for name, text in before.items():
            (self.path / name).write_text(text)
        self.group.fresh = False
        return self.apply(**settings)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_nothing_is_written_without_limits(folder: Folder) -> None:
    assert folder.apply() == {}


def test_memory_and_swap_are_separate(folder: Folder) -> None:
    assert folder.apply(memory_limit=30 * MB, memory_swap=50 * MB, memory_reservation=5) == {
        "memory.max": str(30 * MB), "memory.swap.max": str(20 * MB), "memory.low": "5",
    }


def test_equal_memory_and_swap_mean_no_swap(folder: Folder) -> None:
    assert folder.apply(memory_limit=MB, memory_swap=MB)["memory.swap.max"] == "0"


def test_memory_without_limit_lifts_swap_too(folder: Folder) -> None:
    assert folder.apply(memory_limit=-1) == {"memory.max": "max", "memory.swap.max": "max"}


def test_memory_alone_leaves_swap_alone(folder: Folder) -> None:
    assert folder.apply(memory_limit=MB) == {"memory.max": str(MB)}


def test_without_swap_accounting_only_a_real_swap_limit_fails(folder: Folder) -> None:
    (folder.path / "memory.swap.max").unlink()
    folder.group.apply(_limits(memory_limit=MB, memory_swap=MB))
    folder.group.apply(_limits(memory_limit=MB, memory_swap=-1))
    with pytest.raises(BoxshipError, match=r"memory.swap.max: no such file or directory"):
        folder.group.apply(_limits(memory_limit=MB, memory_swap=2 * MB))


def test_an_update_of_swap_knows_the_memory_limit(folder: Folder) -> None:
    before = {"memory.max": str(30 * MB), "memory.swap.max": "max"}
    assert folder.update(before, memory_swap=50 * MB)["memory.swap.max"][:8] == str(20 * MB)


def test_an_update_of_memory_keeps_the_sum_of_both(folder: Folder) -> None:
    before = {"memory.max": str(30 * MB), "memory.swap.max": str(20 * MB)}
    assert folder.update(before, memory_limit=40 * MB)["memory.swap.max"] == str(10 * MB)
    with pytest.raises(BoxshipError, match=r"memory\+swap limit should be >= memory limit"):
        folder.update(before, memory_limit=60 * MB)


def test_swap_without_any_memory_limit_is_refused(folder: Folder) -> None:
    with pytest.raises(BoxshipError, match="unable to set swap limit without memory limit"):
        folder.update({"memory.max": "max", "memory.swap.max": "max"}, memory_swap=MB)


def test_a_limit_below_what_is_in_use_is_refused_on_request(folder: Folder) -> None:
    before = {"memory.current": str(10 * MB), "memory.max": "max", "memory.swap.max": "max"}
    with pytest.raises(BoxshipError, match=rf"rejecting memory limit {MB} <= usage {10 * MB}"):
        folder.update(before, memory_limit=MB, memory_check_before_update=True)
    with pytest.raises(BoxshipError, match=rf"rejecting memory\+swap limit {MB} <= usage {10 * MB}"):
        folder.update(before, memory_limit=MB, memory_swap=MB, memory_check_before_update=True)
    folder.update(before, memory_limit=MB)


@pytest.mark.parametrize(
    ("settings", "content"),
    [
        ({"cpu_quota": 5000}, "5000 100000"), ({"cpu_period": 5000}, "max 5000"), ({"cpu_quota": -1}, "max 100000"),
        ({"cpu_quota": 1000, "cpu_period": 5000}, "1000 5000"),
    ],
)
def test_quota_and_period_are_one_file(folder: Folder, settings: dict[str, int], content: str) -> None:
    assert folder.apply(**settings) == {"cpu.max": content}


def test_an_update_of_quota_or_period_keeps_the_other(folder: Folder) -> None:
    assert folder.update({"cpu.max": "1000 5000\n"}, cpu_period=6000)["cpu.max"] == "1000 6000\n"
    assert folder.update({"cpu.max": "1000 5000\n"}, cpu_quota=2000)["cpu.max"] == "2000 5000\n"
    assert folder.update({"cpu.max": "max 5000\n"}, cpu_period=6000)["cpu.max"] == "max 6000\n"


def test_shares_idle_and_burst(folder: Folder) -> None:
    assert folder.apply(cpu_shares=2048, cpu_idle=1, cpu_burst=0) == {"cpu.weight": "174", "cpu.idle": "1", "cpu.max.burst": "0"}


def test_processes_cpus_pages_rdma_and_unified(folder: Folder) -> None:
    assert folder.apply(
        pids_limit=0, cpu_cpus="0-1", cpu_mems="0", hugepages=[("2MB", 4 * MB)], rdma={"mlx5_1": (3, None)},
        unified={"memory.high": "7"},
    ) == {
        "pids.max": "1", "cpuset.cpus": "0-1", "cpuset.mems": "0", "hugetlb.2MB.max": str(4 * MB),
        "hugetlb.2MB.rsvd.max": str(4 * MB), "rdma.max": "mlx5_1 hca_handle=3", "memory.high": "7",
    }


def test_block_io_has_converted_weights_and_one_file_of_limits(folder: Folder) -> None:
    written = folder.apply(blkio_weight=500, blkio_throttle_write_iops=[(8, 0, 77)], blkio_weight_device=[(8, 0, 10, None)])
    assert written == {"io.weight": "4950", "io.max": "8:0 wiops=77"}


def test_with_bfq_weights_are_not_converted(folder: Folder) -> None:
    (folder.path / "io.bfq.weight").write_text("default 100\n")
    folder.apply(blkio_weight=500)
    assert (folder.path / "io.bfq.weight").read_text().startswith("500")


def test_the_group_that_could_not_be_made_takes_no_limits(tmp_path: Path) -> None:
    group = V2Group("", rootless=True, explicit=False)
    group.apply(Limits())
    assert (group.join_fds(), group.clone_fd(), group.pids(), group.exists(), group.frozen()) == ([], -1, [], False, False)
    with pytest.raises(BoxshipError, match="cannot set pids limit: container could not join or create cgroup"):
        group.apply(_limits(pids_limit=5))


def test_relative_paths_are_beside_the_callers_group(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = arrangement.parse_mountinfo("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(arrangement, "_known", machine)
    own: Callable[[int], dict[str, str]] = lambda pid: {"": "/user.slice/session-1.scope"}  # noqa: E731
    monkeypatch.setattr("boxship.linux.cgroups.v2.membership", own)
    assert locate_v2("/a/b", 0) == "/sys/fs/cgroup/a/b"
    assert locate_v2("a/b", 0) == "/sys/fs/cgroup/user.slice/a/b"


def _limits(**settings: object) -> Limits:
    limits = Limits()
    for name, value in settings.items():
        setattr(limits, name, value)
    return limits
