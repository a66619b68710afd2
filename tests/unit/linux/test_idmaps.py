"""Id maps: what is refused, who needs a helper program, subordinate ids."""

from __future__ import annotations

import os

import pytest

from boxship.kit.errors import BoxshipError, InvalidArgument, PermissionDenied, Unsupported
from boxship.linux import idmaps


@pytest.mark.parametrize(
    "mapping",
    [
        (0, 1 << 32, 1), (1 << 32, 0, 1), (0, (1 << 32) - 1, 1), (0, 0, 1 << 32), (-1, 0, 1), (0, -5, 1), (0, 0, 0), (0, 0, -1),
    ],
)
def test_ranges_out_of_32_bits_are_refused(mapping: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidArgument, match=r"^invalid id mapping .*ids have 32 bits"):
        idmaps.check_mappings([mapping])


def test_the_whole_range_is_fine() -> None:
    idmaps.check_mappings([(0, 0, (1 << 32) - 1)])


@pytest.mark.parametrize("mappings", [[(0, 0, 10), (5, 100, 10)], [(0, 100, 10), (50, 105, 1)]])
def test_overlapping_ranges_are_refused(mappings: list[tuple[int, int, int]]) -> None:
    with pytest.raises(InvalidArgument, match="overlap"):
        idmaps.check_mappings(mappings)


def test_more_lines_than_the_kernel_takes_are_refused() -> None:
    lines = [(2 * i, 2 * i, 1) for i in range(341)]
    idmaps.check_mappings(lines[:340])
    with pytest.raises(InvalidArgument, match="too many id mappings: 341"):
        idmaps.check_mappings(lines)


class Files:
    """The map files of a process, and who may write them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[OSError] | None = None) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.error = error
        monkeypatch.setattr(idmaps, "_write", self.write)

    def write(self, path: str, data: bytes) -> None:
        if self.error and path.endswith("_map"):
            raise self.error(1, "Operation not permitted", path)
        self.written.append((path, data))


def test_maps_are_one_write_each(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(monkeypatch)
    idmaps.write_id_maps(7, [(0, 1000, 1), (1, 100000, 10)], [(0, 2000, 5)], deny_setgroups=False)
    assert files.written == [("/proc/7/uid_map", b"0 1000 1\n1 100000 10\n"), ("/proc/7/gid_map", b"0 2000 5\n")]


def test_setgroups_is_denied_first_and_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(monkeypatch)
    gid = os.getegid()
    idmaps.write_id_maps(7, [(0, 0, 1)], [(0, gid, 1)], deny_setgroups=True)
    assert files.written[0] == ("/proc/7/setgroups", b"deny")
    files.written.clear()
    idmaps.write_id_maps(7, [(0, 0, 1)], [(0, gid, 1), (1, 100000, 5)], deny_setgroups=True)
    assert [path for path, _ in files.written] == ["/proc/7/uid_map", "/proc/7/gid_map"]


def script(folder: object, name: str, body: str) -> None:
    with open(f"{folder}/{name}", "w") as file:
        file.write(f"#!/bin/sh\n{body}\n")
    os.chmod(f"{folder}/{name}", 0o755)


def test_without_permission_the_helper_programs_write(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    Files(monkeypatch, PermissionError)
    for name in ("newuidmap", "newgidmap"):
        script(tmp_path, name, f'echo "$0 $*" >> {tmp_path}/log')
    monkeypatch.setenv("PATH", f"{tmp_path}")
    idmaps.write_id_maps(7, [(0, 1000, 1), (1, 100000, 10)], [(0, 2000, 5)], deny_setgroups=False)
    with open(f"{tmp_path}/log") as file:
        assert [line.rpartition("/")[2] for line in file] == ["newuidmap 7 0 1000 1 1 100000 10\n", "newgidmap 7 0 2000 5\n"]


def test_a_helper_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    Files(monkeypatch, PermissionError)
    script(tmp_path, "newuidmap", "echo newuidmap: uid range not allowed >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(BoxshipError, match=r"^failed to use newuid map on 7: newuidmap: uid range not allowed$"):
        idmaps.write_id_maps(7, [(0, 1000, 2)], [], deny_setgroups=False)


def test_a_missing_helper_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    Files(monkeypatch, PermissionError)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with pytest.raises(Unsupported, match=r"^failed to use newgid map on 7: newgidmap not found .*uidmap"):
        idmaps.write_id_maps(7, [], [(0, 1000, 2)], deny_setgroups=False)


def test_other_errors_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(idmaps, "_write", refuse)
    with pytest.raises(PermissionDenied, match=r"^failed to update /proc/7/uid_map: permission denied$"):
        idmaps.write_id_maps(7, [(0, 1000, 1)], [], deny_setgroups=False)


def test_subordinate_ids_are_found_by_name_and_number(tmp_path: object) -> None:
    with open(f"{tmp_path}/subuid", "w") as file:
        file.write("# comment\nalice:100000:65536\nbob:300000:10\n1000:400000:5\n")
        file.write("alice:x:1\nalice:1\nalice:5:0\nalice:1:99999999999999\n")
    assert idmaps.subordinate_ranges(f"{tmp_path}/subuid", "alice", 1000) == [(100000, 65536), (400000, 5)]
    assert idmaps.subordinate_ranges(f"{tmp_path}/none", "alice", 1000) == []
    mappings = idmaps.rootless_mappings(1000, [(100000, 65536), (400000, 5)])
    assert mappings == [(0, 1000, 1), (1, 100000, 65536), (65537, 400000, 5)]
