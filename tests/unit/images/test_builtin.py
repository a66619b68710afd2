"""What a program needs is what ldd says that it needs; a tree is written out the same each time."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boxship.api.containerd.pb import types
from boxship.images.builtin import provide
from boxship.images.builtin.elf import Linker, read
from boxship.images.builtin.tree import Tree
from boxship.kit.errors import InvalidArgument


@pytest.mark.parametrize("program", ["sh", "tar", "git", "bash"])
def test_libraries_are_those_that_the_linker_loads(program: str) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install {program}")
    told = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = {line.split()[0] for line in told if "=>" in line}
    found = Linker().libraries([path])
    # The linker itself is needed by the C library, and ldd tells its path alone.
    assert {name for name in found if not name.startswith(("/", "ld-"))} == expected
    assert all(Path(library).exists() for library in found.values())


def test_a_program_names_its_linker() -> None:
    assert read(sys.executable).interpreter.startswith("/lib")


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_program_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidArgument):
        read(str(tmp_path / "x"))


def test_a_tree_is_the_same_tar_whatever_the_order(tmp_path: Path) -> None:
    written = []
    for order in (1, -1):
        tree = Tree()
        for name in ("etc/passwd", "usr/lib/x/y", "a")[::order]:
            tree.data(name, name.encode())
        tree.folder("tmp", 0o1777)
        tree.link("bin", "usr/bin")
        out = io.BytesIO()
        tree.write(out)
        written.append(out.getvalue())
    assert written[0] == written[1]
    with tarfile.open(fileobj=io.BytesIO(written[0])) as tar:
        assert [member.name for member in tar] == ["a", "bin", "etc", "etc/passwd", "tmp", "usr", "usr/lib", "usr/lib/x", "usr/lib/x/y"]
        assert tar.getmember("tmp").mode == 0o1777


def test_a_layer_is_whole_wherever_its_last_piece_ends() -> None:
    """What still waits in the buffer of the file that it is written to is a part of it too."""
    from boxship.images.builtin.provide import _layer

    class Writer:
        def __init__(self) -> None:
            self.data = b""

        async def __aenter__(self) -> Writer:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def write(self, data: bytes) -> None:
            assert data, "nothing was left to read, and still it went on"
            self.data += data

        async def commit(self, size: int) -> str:
            assert len(self.data) == size
            return "sha256:" + "0" * 64

    class Store:
        async def writer(self, ref: str, size: int) -> Writer:
            return Writer()

    async def main() -> None:
        for folders in range(1, 60):
            tree = Tree()
            for number in range(folders):
                tree.folder(f"folder-{number}")
            await _layer(Store(), tree)  # type: ignore[arg-type]

    asyncio.run(main())


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """The machine's programs over a root of two layers, upper and lower, on a machine that has /usr/local/etc."""
    monkeypatch.setattr(provide.machine, "PROGRAMS", ("usr",))
    real = os.path.isdir
    monkeypatch.setattr(provide.os.path, "isdir", lambda path: path == "/usr/local/etc" or real(path))
    for name in ("upper", "lower"):
        (tmp_path / name).mkdir()
    mount = types.Mount(type="overlay", source="overlay", options=[
        f"lowerdir={tmp_path}/lower", f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work"])
    return lambda: provide.Builtins(None, str(tmp_path / "builtin")).mounts([mount], str(tmp_path / "spare"), read_only=False)


def test_the_machines_programs_are_below_the_layers_and_its_configuration_is_not(stand: Callable[[], list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "lower/usr/local/etc").mkdir(parents=True)
    programs, hidden = stand()
    assert programs["destination"] == "/usr" and f"lowerdir={tmp_path}/lower/usr:/usr" in programs["options"]
    assert f"upperdir={tmp_path}/upper/usr" in programs["options"]
    assert hidden["destination"] == "/usr/local/etc"
    assert f"lowerdir={tmp_path}/lower/usr/local/etc:{tmp_path}/builtin/nothing" in hidden["options"]


@pytest.mark.parametrize("layer", ["upper", "lower"])
@pytest.mark.parametrize("link", ["usr", "usr/local", "usr/local/etc"])
def test_links_of_layers_are_not_followed(stand: Callable[[], list[dict[str, Any]]], tmp_path: Path, layer: str, link: str) -> None:
    path = tmp_path / layer / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/")
    made = [mount["destination"] for mount in stand()]
    assert made == ([] if link == "usr" else ["/usr"])
    assert not os.path.lexists("/local/etc")


def test_an_opaque_folder_does_not_uncover_the_machines_configuration(stand: Callable[[], list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "upper/usr/local").mkdir(parents=True)
    os.setxattr(tmp_path / "upper/usr/local", "user.overlay.opaque", b"y")
    assert [mount["destination"] for mount in stand()] == ["/usr", "/usr/local/etc"]
