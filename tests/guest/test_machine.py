"""What the other tests here take for granted."""

from __future__ import annotations

import os

from boxship.linux.cgroups.arrangement import arrangement, systemd_runs


def test_v2_is_all_there_is() -> None:
    assert arrangement().pure_v2
    assert arrangement().unified == "/sys/fs/cgroup"
    with open("/sys/fs/cgroup/cgroup.controllers") as file:
        assert {"cpuset", "cpu", "io", "memory", "pids"} <= set(file.read().split())


def test_systemd_runs_where_it_should(lane: str) -> None:
    assert systemd_runs() is (lane == "systemd")
    with open("/proc/1/comm") as file:
        assert file.read().strip() == ("systemd" if lane == "systemd" else "init")


def test_the_kernel_is_debians_own() -> None:
    assert "cloud-amd64" in os.uname().release
