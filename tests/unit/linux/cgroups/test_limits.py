"""Limits: scales of v1 and v2."""

from __future__ import annotations

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.linux.cgroups import DeviceRule, Limits
from boxship.linux.cgroups.limits import bitmap, cpu_weight, io_weight, pids_max, swap_only


@pytest.mark.parametrize(
    ("shares", "weight"),
    [(0, 0), (1, 1), (2, 1), (3, 2), (100, 17), (512, 59), (1023, 100), (1024, 100), (2048, 174), (262143, 10000),
     (262144, 10000), (1 << 40, 10000)],
)
def test_shares_become_the_weight_that_runc_computes(shares: int, weight: int) -> None:
    assert cpu_weight(shares) == weight


def test_weight_grows_with_shares() -> None:
    weights = [cpu_weight(shares) for shares in range(2, 262145, 997)]
    assert weights == sorted(weights)


@pytest.mark.parametrize(("blkio", "io"), [(0, 0), (10, 1), (500, 4950), (1000, 10000)])
def test_blkio_weight_is_mapped_linearly(blkio: int, io: int) -> None:
    assert io_weight(blkio) == io


@pytest.mark.parametrize(
    ("swap", "memory", "result"),
    [(0, 0, 0), (0, -1, -1), (-1, 5, -1), (0, 5, 0), (7, -1, 7), (100, 60, 40), (60, 60, 0)],
)
def test_swap_of_v2_does_not_include_memory(swap: int, memory: int, result: int) -> None:
    assert swap_only(swap, memory) == result


@pytest.mark.parametrize(
    ("swap", "memory", "text"),
    [
        (5, 0, "unable to set swap limit without memory limit"), (5, -2, "invalid memory value: -2"),
        (5, 6, "memory[+]swap limit should be >= memory limit"),
    ],
)
def test_swap_that_makes_no_sense_is_refused(swap: int, memory: int, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        swap_only(swap, memory)


def test_a_pids_limit_of_zero_is_one_and_a_negative_one_is_none() -> None:
    assert [pids_max(limit) for limit in (5, 0, -1)] == ["5", "1", "max"]


def test_cpu_lists_become_bits() -> None:
    assert bitmap("0") == b"\x01"
    assert bitmap(" 1, 3-5,,8") == b"\x3a\x01"
    for wrong in ("", ",", "a", "3-1", "1-", "-1", "70000"):
        with pytest.raises(InvalidArgument):
            bitmap(wrong)


def test_only_controllers_with_a_limit_are_wanted() -> None:
    limits = Limits()
    assert limits.wanted() == []
    limits.pids_limit = 0
    limits.cpu_idle = 0
    limits.memory_swappiness = 0
    assert limits.wanted() == ["memory", "cpu", "pids"]
    limits = Limits()
    limits.cpu_quota = 0
    limits.memory_limit = 0
    assert limits.wanted() == []


def test_a_device_rule_reads_as_v1_takes_it() -> None:
    assert str(DeviceRule(True)) == "a *:* rwm"
    assert str(DeviceRule(False, "c", 1, 3, "rw")) == "c 1:3 rw"
