"""Capabilities: names, masks, the structures of capset(2)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from boxship.linux import capabilities
from support.machine import capability_sets


@pytest.fixture(autouse=True)
def a_kernel_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_last_cap", 40)


def test_the_table_has_the_kernels_numbers() -> None:
    known = capabilities.known()
    assert len(known) == 41
    for name, number in (("CAP_CHOWN", 0), ("CAP_SYS_ADMIN", 21), ("CAP_SYS_RESOURCE", 24), ("CAP_CHECKPOINT_RESTORE", 40)):
        assert known[number] == name


def test_names_become_a_mask_and_back() -> None:
    mask, unknown = capabilities.bits(["CAP_KILL", "CAP_CHOWN", "CAP_BPF"])
    assert mask == 1 << 5 | 1 << 0 | 1 << 39
    assert unknown == []
    assert capabilities.names(mask) == ["CAP_CHOWN", "CAP_KILL", "CAP_BPF"]


def test_unknown_names_are_told_once_and_in_order() -> None:
    assert capabilities.bits(["CAP_ZZZ", "cap_kill", "KILL", "CAP_ZZZ"]) == (0, ["CAP_ZZZ", "KILL", "cap_kill"])


def test_what_an_older_kernel_lacks_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_last_cap", 37)
    assert capabilities.bits(["CAP_PERFMON", "CAP_KILL"]) == (1 << 5, ["CAP_PERFMON"])


def test_bits_without_a_name_are_named_by_number() -> None:
    assert capabilities.names(1 << 41 | 1) == ["CAP_CHOWN", "CAP_41"]


def test_capset_takes_the_sets_in_two_words() -> None:
    header, data = capabilities.capset_data(1 << 40 | 1, 1 << 39 | 2, 1 << 38 | 4)
    assert struct.unpack("=Ii", header) == (0x20080522, 0)
    assert struct.unpack("=6I", data) == (1, 2, 4, 1 << 8, 1 << 7, 1 << 6)


def test_our_own_sets_are_subsets_of_the_bounding_set() -> None:
    sets = capability_sets(Path("/proc/self/status").read_text())
    assert sets["CapBnd"] == capabilities.bounding()
    assert sets["CapEff"] == capabilities.effective()
    assert sets["CapEff"] & ~sets["CapPrm"] == 0
