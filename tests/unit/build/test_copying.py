"""COPY: what patterns take, where it goes, and that no link leads out of a context."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest

from boxship.build.copying import Options, changed_mode, content_key, make_directory, place, take, write_layer
from boxship.build.solve import owner
from boxship.build.state import joined, ports
from boxship.build.tree import Memory, Node, TarTree, Tree, resolve
from boxship.kit.errors import InvalidArgument, NotFound


def tree(*names: str, links: dict[str, str] | None = None, hard: dict[str, str] | None = None, mtime: int = 0) -> TarTree:
    """A context: a name that ends with a slash is a directory, every other a file that holds its own name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.mtime = mtime
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.mode = 0o755 if name.endswith("/") else 0o644
            entry.size = 0 if name.endswith("/") else len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
        for kind, found in ((tarfile.SYMTYPE, links or {}), (tarfile.LNKTYPE, hard or {})):
            for name, target in found.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, target
                archive.addfile(entry)
    with tempfile.TemporaryFile() as spool:
        spool.write(buffer.getvalue())
        spool.flush()
        return TarTree(os.dup(spool.fileno()))


def paths(source: Tree, pattern: str, destination: str, below: Tree | None = None, options: Options | None = None) -> list[str]:
    chosen = options or Options(uid=0, gid=0)
    return [item.path for item in place(take(source, pattern, parents=chosen.parents), below, destination, chosen)]


def test_a_file_to_a_name_and_into_a_directory() -> None:
    context = tree("a", "d/b")
    assert paths(context, "a", "/x") == ["x"]
    assert paths(context, "a", "/x/") == ["x", "x/a"]
    assert paths(context, "a", "/x", Memory({"x": (b"", 0o644, 0)})) == ["x"]
    assert paths(context, "d", "/x") == ["x", "x/b"]
    assert paths(context, ".", "/") == ["a", "d", "d/b"]
    assert paths(context, "a", "/", tree("x/")) == ["a"]
    assert paths(context, "a", "/x", tree("x/")) == ["x/a"]


def test_patterns() -> None:
    context = tree("a.c", "b.c", "c.h", "d/e/f.c", "[x].c")
    assert paths(context, "*.c", "/x/") == ["x", "x/[x].c", "x/a.c", "x/b.c"]
    assert paths(context, "[a-b].c", "/x/") == ["x", "x/a.c", "x/b.c"]
    assert paths(context, "?.h", "/x/") == ["x", "x/c.h"]
    assert paths(context, "**/*.c", "/x/")[-1] == "x/f.c" or "x/f.c" in paths(context, "**/*.c", "/x/")
    assert paths(context, "\\[x\\].c", "/x/") == ["x", "x/[x].c"]
    assert take(context, "*.py") == []
    with pytest.raises(NotFound, match="nothing"):
        take(context, "nothing")
    with pytest.raises(InvalidArgument, match="pattern"):
        take(context, "[a")


def test_parents_and_exclusions() -> None:
    context = tree("a/b/c", "a/b/d.h")
    parents = Options(uid=0, gid=0, parents=True)
    assert paths(context, "a/b/c", "/x/", options=parents) == ["x", "x/a", "x/a/b", "x/a/b/c"]
    assert paths(context, "a/./b/c", "/x/", options=parents) == ["x", "x/b", "x/b/c"]
    without = Options(uid=0, gid=0, exclude=lambda path: path.endswith(".h"))
    assert paths(context, "a", "/x", options=without) == ["x", "x/b", "x/b/c"]


def test_no_link_leads_out_of_a_context() -> None:
    context = tree("in/a", links={"up": "../../../etc/passwd", "abs": "/var/x", "loop": "loop", "in/self": "/in"})
    with pytest.raises(NotFound):
        take(context, "up")
    with pytest.raises(NotFound):
        take(context, "abs/passwd")
    with pytest.raises(InvalidArgument, match="symbolic links"):
        take(context, "loop")
    assert resolve(context, "in/self/self/a") == "in/a"
    assert take(context, "../../in/a")[0].path == "in/a"
    # Inside a directory a link is copied as it is.
    assert [item.node.link for item in place(take(context, "."), None, "/x", Options()) if item.path == "x/abs"] == ["/var/x"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", ".."])
def test_names_that_lead_out_of_a_context_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="leads out"):
        tree(name)


def test_hard_links_are_the_file() -> None:
    context = tree("a", hard={"b": "a"})
    assert b"".join(context.chunks("b", context.node("b") or Node(0, 0))) == b"a"
    with pytest.raises(InvalidArgument, match="not there"):
        tree("a", hard={"b": "/etc/passwd"})


def test_links_of_the_image_are_followed_inside_it() -> None:
    context = tree("bin/tool", "f")
    image = tree("usr/bin/", "usr/bin/old", links={"bin": "usr/bin", "lib": "/usr/lib", "deep": "../../../usr"})
    assert paths(context, ".", "/", image) == ["usr/bin/tool", "f"]
    assert paths(context, "f", "/bin/", image) == ["usr/bin/f"]
    assert paths(context, "f", "/deep/x", image) == ["usr/x"]
    assert paths(context, "f", "/lib/x", image) == ["usr/lib", "usr/lib/x"]


def test_what_cannot_be_copied() -> None:
    context = tree("a", "d/x")
    with pytest.raises(InvalidArgument, match="to directory"):
        paths(context, "d", "/", tree("x/"))
    with pytest.raises(InvalidArgument, match="non-directory"):
        paths(context, "a", "/f/", tree("f"))
    with pytest.raises(InvalidArgument, match="non-directory"):
        paths(context, "d", "/f", tree("f"))
    with pytest.raises(InvalidArgument, match="a file of that name"):
        make_directory(tree("f"), "/f", Options())


@pytest.mark.parametrize(("wanted", "mode", "is_dir", "result"), [
    ("0640", 0o777, False, 0o640), ("755", 0, False, 0o755), ("u=rwx,go=r", 0o600, False, 0o744), ("a+X", 0o600, False, 0o600),
    ("a+X", 0o600, True, 0o711), ("go-w,+x", 0o666, False, 0o755), ("u+s", 0o755, False, 0o4755), ("+t", 0o777, True, 0o1777),
    ("g=u", 0o740, False, 0o770), ("u=rwX,go=rX", 0o600, False, 0o644), ("=r", 0o777, False, 0o444),
])
def test_chmod(wanted: str, mode: int, is_dir: bool, result: int) -> None:
    assert changed_mode(mode, wanted, is_dir=is_dir) == result


@pytest.mark.parametrize("wanted", ["rwx", "9", "u", "x=r", "0o644", "1777777"])
def test_chmod_refuses(wanted: str) -> None:
    with pytest.raises(InvalidArgument, match="chmod"):
        changed_mode(0, wanted, is_dir=False)


def test_the_key_of_files_is_content_and_metadata_without_times() -> None:
    def key(context: TarTree, **options: object) -> str:
        return content_key(place(take(context, "."), None, "/x", Options(**options)))  # type: ignore[arg-type]

    assert key(tree("a", mtime=1)) == key(tree("a", mtime=2))
    assert key(tree("a")) != key(tree("b"))
    assert key(tree("a")) != key(tree("a"), uid=1)
    assert key(tree("a")) != key(tree("a"), chmod="0600")
    assert key(tree("a", links={"l": "a"})) != key(tree("a", links={"l": "b"}))


def test_the_layer_is_a_tar_whose_times_are_clamped() -> None:
    context = tree("a", "d/" + "n" * 120, links={"l": "a"}, mtime=2_000_000_000)
    pieces: list[bytes] = []
    write_layer(place(take(context, "."), None, "/x", Options(uid=3, gid=4)), pieces.append, 1_000_000_000)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert set(members) == {"x", "x/a", "x/d", "x/d/" + "n" * 120, "x/l"}
        assert all(member.mtime <= 1_000_000_000 for member in members.values())
        assert {(member.uid, member.gid) for member in members.values()} == {(3, 4)}
        file = archive.extractfile("x/a")
        assert file is not None and file.read() == b"a"
        assert members["x/l"].linkname == "a"


def test_owners() -> None:
    names = Memory({})
    etc = tree("etc/")
    assert owner("5", names) == (5, 5) and owner("5:6", etc) == (5, 6)
    with pytest.raises(NotFound, match="unable to find user nobody"):
        owner("nobody", etc)


def test_paths_of_instructions() -> None:
    assert joined("/w", "a") == "/w/a" and joined("/w", "a/") == "/w/a/" and joined("/w", ".") == "/w/"
    assert joined("/", "../x") == "/x" and joined("/w", "/a/../b") == "/b" and joined("/", ".") == "/"


def test_ports() -> None:
    assert ports(["80", "1-3/udp", "8080:90/TCP"]) == {
        "80/tcp": {}, "1/udp": {}, "2/udp": {}, "3/udp": {}, "90/tcp": {}}
    for wrong in ("x", "0", "70000", "5-1", "80/xyz"):
        with pytest.raises(InvalidArgument, match="containerPort"):
            ports([wrong])


def test_sparse_files_have_their_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    archive = tmp_path / "a.tar"
    os.system(f"tar -S -C {tmp_path} -cf {archive} sparse")
    made = TarTree(os.open(archive, os.O_RDONLY))
    node = made.node("sparse")
    assert node is not None and stat.S_ISREG(node.kind) and node.size == 1 << 20
    assert b"".join(made.chunks("sparse", node)) == path.read_bytes()
