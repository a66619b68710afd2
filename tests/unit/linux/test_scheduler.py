"""Scheduling attributes, I/O priority, CPU lists, memory policy: packing and runc's words."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.linux import personality, scheduler


def fields(data: bytes) -> tuple[int, ...]:
    return struct.unpack("=IIQiIQQQII", data)


def test_the_attributes_are_laid_out_as_the_kernel_has_them() -> None:
    assert fields(scheduler.sched_attr("SCHED_BATCH", nice=-3)) == (56, 3, 0, -3, 0, 0, 0, 0, 0, 0)
    assert fields(scheduler.sched_attr("SCHED_FIFO", priority=9))[1:5] == (1, 0, 0, 9)
    flags = ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN"]
    deadline = scheduler.sched_attr("SCHED_DEADLINE", flags=flags, runtime=10, deadline=20, period=30)
    assert fields(deadline) == (56, 6, 5, 0, 0, 10, 20, 30, 0, 0)


@pytest.mark.parametrize(
    ("policy", "number"),
    [("OTHER", 0), ("FIFO", 1), ("RR", 2), ("BATCH", 3), ("ISO", 4), ("IDLE", 5), ("DEADLINE", 6), ("EXT", 7)],
)
def test_every_policy_has_the_kernels_number(policy: str, number: int) -> None:
    assert fields(scheduler.sched_attr(f"SCHED_{policy}"))[1] == number


@pytest.mark.parametrize(
    ("policy", "more", "text"),
    [
        ("", {}, "scheduler policy is required"),
        ("SCHED_X", {}, "invalid scheduler policy: SCHED_X"),
        ("SCHED_OTHER", {"nice": 20}, "invalid scheduler.nice: 20 when scheduler.policy is SCHED_OTHER"),
        ("SCHED_BATCH", {"nice": -21}, "invalid scheduler.nice: -21 when scheduler.policy is SCHED_BATCH"),
        ("SCHED_OTHER", {"priority": 1}, "scheduler.priority can only be specified for SchedFIFO or SchedRR policy"),
        ("SCHED_RR", {"period": 1}, "scheduler runtime/deadline/period can only be specified for SchedDeadline policy"),
        ("SCHED_RR", {"flags": ["SCHED_FLAG_X"]}, "invalid scheduler flag: SCHED_FLAG_X"),
    ],
)
def test_contradictions_are_refused_in_runcs_words(policy: str, more: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        scheduler.sched_attr(policy, **more)  # type: ignore[arg-type]
    assert str(caught.value) == text


def test_io_priorities_carry_class_and_level() -> None:
    assert scheduler.io_priority("IOPRIO_CLASS_RT", 0) == 1 << 13
    assert scheduler.io_priority("IOPRIO_CLASS_BE", 4) == 2 << 13 | 4
    assert scheduler.io_priority("IOPRIO_CLASS_IDLE", 7) == 3 << 13 | 7
    for args, text in (
        (("IOPRIO_CLASS_BE", 8), "invalid ioPriority.Priority: 8"), (("IOPRIO_CLASS_BE", -1), "invalid ioPriority.Priority: -1"),
        (("", 0), 'invalid ioPriority.Class: ""'), (("IOPRIO_CLASS_NONE", 0), 'invalid ioPriority.Class: "IOPRIO_CLASS_NONE"'),
    ):
        with pytest.raises(InvalidArgument) as caught:
            scheduler.io_priority(*args)
        assert str(caught.value) == text


def members(mask: bytes) -> set[int]:
    number = int.from_bytes(mask, "little")
    return {i for i in range(number.bit_length()) if number >> i & 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", {0}), ("0-3,7", {0, 1, 2, 3, 7}), (" 1 , ,2,", {1, 2}), ("63", {63}), ("64-65", {64, 65}), ("65536", {65536})],
)
def test_cpu_lists_become_masks_of_whole_words(text: str, expected: set[int]) -> None:
    mask = scheduler.cpu_mask(text)
    assert mask is not None
    assert len(mask) % 8 == 0
    assert members(mask) == expected


def test_no_list_is_no_mask() -> None:
    assert scheduler.cpu_mask("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", 'strconv.ParseUint: parsing "x": invalid syntax'), ("-1", 'strconv.ParseUint: parsing "": invalid syntax'),
        ("0-", 'strconv.ParseUint: parsing "": invalid syntax'), ("3-1", "invalid range: 3-1"),
        ("65537", "values larger than 65536 are not supported"), (",", 'no members found in set ","'),
        ("4294967296", 'strconv.ParseUint: parsing "4294967296": value out of range'),
        ("9" * 5000, f'strconv.ParseUint: parsing "{"9" * 5000}": value out of range'),
        ("\u0663", 'strconv.ParseUint: parsing "\u0663": invalid syntax'),
        ("0-1-2", 'strconv.ParseUint: parsing "1-2": invalid syntax'),
    ],
)
def test_bad_lists_are_refused_in_runcs_words(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        scheduler.cpu_mask(text)
    assert str(caught.value) == message


@given(st.sets(st.integers(0, 200), min_size=1))
def test_any_set_survives_being_written_and_read(numbers: set[int]) -> None:
    mask = scheduler.cpu_mask(",".join(map(str, sorted(numbers))))
    assert mask is not None
    assert members(mask) == numbers


def test_the_mask_is_what_sched_setaffinity_takes() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    mask = scheduler.cpu_mask(str(one))
    try:
        scheduler_call(mask)
        assert os.sched_getaffinity(0) == {one}
        scheduler_call(scheduler.ALL_CPUS)
        assert os.sched_getaffinity(0) >= before
    finally:
        os.sched_setaffinity(0, before)


def scheduler_call(mask: bytes | None) -> None:
    from boxship.abi import syscalls
    from boxship.linux import _sys

    _sys.syscall(syscalls.SCHED_SETAFFINITY, 0, len(mask or b""), mask)


def test_memory_policies_carry_mode_flags_and_nodes() -> None:
    mode, mask, maxnode = scheduler.memory_policy("MPOL_BIND", "0,2", ["MPOL_F_STATIC_NODES"])
    assert (mode, members(mask), maxnode) == (2 | 1 << 15, {0, 2}, 65)
    assert scheduler.memory_policy("MPOL_DEFAULT") == (0, b"", 0)
    assert scheduler.memory_policy("MPOL_PREFERRED") == (1, b"", 0)
    assert scheduler.memory_policy("MPOL_WEIGHTED_INTERLEAVE", "0")[0] == 6


@pytest.mark.parametrize(
    ("mode", "nodes", "flags", "text"),
    [
        ("MPOL_X", "", [], 'invalid memory policy mode "MPOL_X"'), ("", "", [], 'invalid memory policy mode ""'),
        ("MPOL_BIND", "a", [], 'invalid memory policy nodes "a": strconv.ParseUint: parsing "a": invalid syntax'),
        ("MPOL_BIND", "0", ["MPOL_F_X"], 'invalid memory policy flag "MPOL_F_X"'),
        ("MPOL_BIND", "", [], "memory policy mode requires at least one node but got 0"),
        ("MPOL_LOCAL", "0-1", [], "memory policy mode requires 0 nodes but got 2"),
    ],
)
def test_bad_policies_are_refused_in_runcs_words(mode: str, nodes: str, flags: list[str], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        scheduler.memory_policy(mode, nodes, flags)
    assert str(caught.value) == text


def test_features_lists_modes_and_flags_in_order() -> None:
    assert scheduler.known_memory_modes()[0] == "MPOL_BIND"
    assert scheduler.known_memory_flags() == ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"]


def test_personalities_have_the_kernels_numbers() -> None:
    assert (personality.domain("LINUX"), personality.domain("LINUX32")) == (0, 8)
    with pytest.raises(InvalidArgument, match=r"^invalid personality domain BSD$"):
        personality.domain("BSD")
