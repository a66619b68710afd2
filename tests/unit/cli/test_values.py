"""Sizes, cpus, environment and volumes mean what they mean to docker."""

import os
from pathlib import Path

import pytest

from boxship.cli import values
from boxship.kit.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("512", 512), ("1b", 1), ("2k", 2048), ("3M", 3 << 20), ("1g", 1 << 30), ("1.5G", 3 << 29), ("64MiB", 64 << 20), ("7kb", 7168)],
)
def test_sizes(text: str, number: int) -> None:
    assert values.size(text) == number


@pytest.mark.parametrize("text", ["", "m", "1x", "1mm", "-1", "1bb", "nan", "inf", "1 2", "0x10", "1e400g"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid size"):
        values.size(text)


@pytest.mark.parametrize(("text", "quota"), [("1", 100_000), ("0.5", 50_000), (".25", 25_000), ("1.", 100_000)])
def test_cpus(text: str, quota: int) -> None:
    assert values.cpus(text) == (quota, 100_000)


@pytest.mark.parametrize("text", ["", ".", "-1", "1,5", "two", "100000", "0", "0.0000000001", "1e3"])
def test_wrong_cpus_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        values.cpus(text)


def test_a_name_alone_takes_the_callers_value() -> None:
    assert values.environment(["A=", "B", "C", "D=x=y"], {"B": "here"}) == ["A=", "B=here", "D=x=y"]


def test_an_environment_file_has_no_quoting(tmp_path: Path) -> None:
    (tmp_path / "env").write_text('# comment\n\nA="quoted"\n  B=1 # not a comment\nC\nD\n')
    assert values.environment_file(str(tmp_path / "env"), {"C": "c"}) == ['A="quoted"', "B=1 # not a comment", "C=c"]


@pytest.mark.parametrize("line", ["A B=1", "A =1", "=1"])
def test_an_environment_file_with_a_wrong_name_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "env").write_text(line + "\n")
    with pytest.raises(InvalidArgument):
        values.environment_file(str(tmp_path / "env"), {})


def test_a_volume_is_a_recursive_private_bind(tmp_path: Path) -> None:
    mount = values.volume(f"{tmp_path}:/data", "/")
    assert mount == {"destination": "/data", "type": "bind", "source": str(tmp_path), "options": ["rbind", "rprivate"]}


def test_a_read_only_volume_is_read_only_all_the_way_down(tmp_path: Path) -> None:
    assert values.volume(f"{tmp_path}:/data:ro,rslave", "/")["options"] == ["rbind", "ro", "rro", "rslave"]


def test_a_relative_source_starts_at_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert values.volume("./sub:/data/../x", str(tmp_path)) == {
        "destination": "/x", "type": "bind", "source": f"{tmp_path}/sub", "options": ["rbind", "rprivate"],
    }


def test_a_missing_source_is_made(tmp_path: Path) -> None:
    values.volume(f"{tmp_path}/a/b:/data", "/")
    assert os.path.isdir(tmp_path / "a/b")


@pytest.mark.parametrize("text", ["/data", "name:/data", "/a:data", "/a:/", "/a:/..", "/a:/b:rx", ":/b", "/a:", "/a:/b:ro:x"])
def test_wrong_volumes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid volume specification"):
        values.volume(text, "/")
