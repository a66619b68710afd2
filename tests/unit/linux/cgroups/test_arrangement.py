"""Arrangement: what mountinfo and /proc/PID/cgroup say."""

from __future__ import annotations

from boxship.linux.cgroups.arrangement import parse_membership, parse_mountinfo, unescape

HYBRID = r"""
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:12 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,noprefix,cpuset,clone_children
35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:32 / /mnt/second\040memory rw,relatime - cgroup cgroup rw,memory
43 31 0:32 / /mnt/cgroup rw,relatime - ext4 /dev/sda - cgroup rw
"""


def test_hybrid_is_v1_with_a_v2_mount_beside() -> None:
    found = parse_mountinfo(HYBRID)
    assert [h.mountpoint for h in found.hierarchies] == [
        "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpuset", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd",
    ]
    assert found.hierarchies[0].controllers == ["cpu", "cpuacct"]
    assert found.by_controller["cpuacct"] is found.by_controller["cpu"]
    assert found.by_controller["cpuset"].plain_names
    assert not found.by_controller["cpu"].plain_names
    assert found.by_controller["name=systemd"].mountpoint == "/sys/fs/cgroup/systemd"
    assert found.unified == "/sys/fs/cgroup/unified"
    assert not found.pure_v2


def test_v2_alone_is_pure() -> None:
    found = parse_mountinfo("30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n")
    assert found.pure_v2
    assert found.unified == "/sys/fs/cgroup"


def test_no_mount_is_neither() -> None:
    found = parse_mountinfo("30 23 0:26 / / rw - ext4 /dev/sda rw\n")
    assert not found.pure_v2
    assert not found.hierarchies


def test_the_v2_mount_at_the_usual_place_counts() -> None:
    found = parse_mountinfo(
        "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n31 23 0:26 / /mnt/x rw - cgroup2 cgroup2 rw\n"
    )
    assert found.unified == "/sys/fs/cgroup"


def test_a_group_is_found_below_a_mount_that_shows_a_part() -> None:
    memory = parse_mountinfo(HYBRID).by_controller["memory"]
    assert memory.directory("/docker/abc") == "/sys/fs/cgroup/memory"
    assert memory.directory("/docker/abc/x") == "/sys/fs/cgroup/memory/x"


def test_membership_is_by_controller() -> None:
    text = "9:name=systemd:/a\n5:cpu,cpuacct:/b:c\n0::/d\n"
    assert parse_membership(text) == {"name=systemd": "/a", "cpu": "/b:c", "cpuacct": "/b:c", "": "/d"}


def test_mountinfo_escapes_are_undone() -> None:
    assert unescape(r"/a\040b\134c") == "/a b\\c"
