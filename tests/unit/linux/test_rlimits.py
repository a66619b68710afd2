"""Resource limits: names, packing, clamping."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux import rlimits


def test_names_have_the_numbers_that_python_knows() -> None:
    for name in rlimits.abi.RLIMITS:
        if hasattr(resource, name):
            assert rlimits.number(name) == getattr(resource, name)
            assert rlimits.name(rlimits.number(name)) == name
    assert rlimits.name(16) == "RLIMIT_16"


def test_an_unknown_name_is_refused_in_runcs_words() -> None:
    with pytest.raises(InvalidArgument, match=r"^wrong rlimit value: RLIMIT_FOO$"):
        rlimits.number("RLIMIT_FOO")


def test_all_64_bits_pack_and_minus_one_is_infinity() -> None:
    assert rlimits.pack(1, (1 << 64) - 1) == (1).to_bytes(8, "little") + b"\xff" * 8
    assert rlimits.pack(-1, -1) == b"\xff" * 16


def test_a_limit_is_set_and_read_back() -> None:
    before = rlimits.get(0, rlimits.number("RLIMIT_CORE"))
    try:
        assert rlimits.apply(os.getpid(), "RLIMIT_CORE", 0, before[1]) == (0, before[1])
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    finally:
        rlimits.prlimit(0, rlimits.number("RLIMIT_CORE"), *before)


def fake_kernel(monkeypatch: pytest.MonkeyPatch, hard_now: int) -> list[tuple[int, int]]:
    """prlimit(2) of a caller without CAP_SYS_RESOURCE."""
    taken: list[tuple[int, int]] = []

    def syscall(nr: int, pid: int, resource: int, new: bytes | None, old: bytearray | None) -> int:
        if new is not None:
            soft, hard = rlimits.RLIMIT.unpack(new)
            if soft > hard:
                raise OSError(errno.EINVAL, "Invalid argument")
            if hard > hard_now:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            taken.append((soft, hard))
        if old is not None:
            old[:] = rlimits.RLIMIT.pack(1, hard_now)
        return 0

    monkeypatch.setattr(rlimits._sys, "syscall", syscall)
    return taken


def test_what_may_not_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fake_kernel(monkeypatch, 100)
    told: list[str] = []
    assert rlimits.apply(7, "RLIMIT_NOFILE", 50, 200, told.append) == (50, 100)
    assert rlimits.apply(7, "RLIMIT_NOFILE", 150, 200, told.append) == (100, 100)
    assert taken == [(50, 100), (100, 100)]
    assert told[0] == "RLIMIT_NOFILE: 50:200 is not permitted, stays at 50:100"


def test_what_may_be_set_is_set_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernel(monkeypatch, 100)
    assert rlimits.apply(7, "RLIMIT_NOFILE", 5, 10, pytest.fail) == (5, 10)


def test_a_soft_limit_above_the_hard_one_is_refused_in_runcs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernel(monkeypatch, 100)
    with pytest.raises(BoxshipError) as caught:
        rlimits.apply(7, "RLIMIT_NOFILE", 20, 10)
    assert str(caught.value) == "error setting rlimits for ready process: error setting rlimit type 7: invalid argument"
