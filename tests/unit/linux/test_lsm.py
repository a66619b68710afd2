"""Security modules and keyrings: which file gets which text."""

from __future__ import annotations

import os

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.linux import keyring, lsm


def machine(monkeypatch: pytest.MonkeyPatch, *, apparmor: bool = False, selinux: bool = False, stacked: bool = True) -> None:
    monkeypatch.setattr(lsm, "apparmor_enabled", lambda: apparmor)
    monkeypatch.setattr(lsm, "selinux_enabled", lambda: selinux)
    monkeypatch.setattr(os.path, "exists", lambda path: stacked)


@pytest.mark.parametrize(("stacked", "file"), [(True, "attr/apparmor/exec"), (False, "attr/exec")])
def test_a_profile_goes_to_apparmors_own_file_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, stacked: bool, file: str
) -> None:
    machine(monkeypatch, apparmor=True, stacked=stacked)
    assert lsm.exec_attributes("docker-default", "") == [(file, b"exec docker-default")]


def test_a_profile_without_apparmor_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert lsm.exec_attributes("docker-default", "") == []


def test_a_label_goes_to_selinux_for_the_program_and_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, selinux=True)
    assert lsm.exec_attributes("", "a:b:c:s0") == [("attr/exec", b"a:b:c:s0")]
    assert lsm.key_attributes("a:b:c:s0") == [("attr/keycreate", b"a:b:c:s0")]
    assert lsm.key_attributes("") == []


def test_a_label_without_selinux_is_refused_in_runcs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(InvalidArgument) as caught:
        lsm.exec_attributes("", "a:b:c:s0")
    assert str(caught.value) == "selinux label is specified in config, but selinux is disabled or not supported"
    assert lsm.key_attributes("a:b:c:s0") == []


@pytest.mark.parametrize(("enabled", "expected"), [(b"Y\n", True), (b"N\n", False), (b"", False)])
def test_apparmor_is_on_when_the_module_says_so(monkeypatch: pytest.MonkeyPatch, enabled: bytes, expected: bool) -> None:
    monkeypatch.setattr(lsm.os, "stat", lambda path: None)
    monkeypatch.setattr(lsm, "read_all", lambda path: enabled)
    assert lsm.apparmor_enabled() is expected


def test_apparmor_is_off_without_its_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(lsm.os, "stat", missing)
    assert lsm.apparmor_enabled() is False


@pytest.mark.parametrize(
    ("filesystems", "current", "mounted", "expected"),
    [
        (b"nodev\tselinuxfs\n", b"u:r:t:s0\0", True, True), (b"nodev\tselinuxfs\n", b"kernel\0", True, False),
        (b"nodev\tselinuxfs\n", b"u:r:t:s0\0", False, False), (b"nodev\tproc\n", b"x", True, False),
    ],
)
def test_selinux_is_on_with_a_policy_and_its_file_system(
    monkeypatch: pytest.MonkeyPatch, filesystems: bytes, current: bytes, mounted: bool, expected: bool
) -> None:
    files = {
        "/proc/filesystems": filesystems, "/proc/self/attr/current": current,
        "/proc/self/mountinfo": b"1 2 3 / /sel rw - selinuxfs s rw\n",
    }
    monkeypatch.setattr(lsm, "read_all", files.__getitem__)
    monkeypatch.setattr(lsm, "_is_selinuxfs", lambda path: mounted and path == "/sel")
    assert lsm.selinux_enabled() is expected


def test_a_session_keyring_can_be_searched_by_its_owner_or_in_a_user_namespace_by_all() -> None:
    assert keyring.permissions(userns=False) == 0x3F1B0000
    assert keyring.permissions(userns=True) == 0x3F130008
    assert keyring.session_name("c1") == "_ses.c1"
