"""Trees of files that a build copies from: a context that came as a tar, a stage's or an image's root, single files.

Runs in: the daemon, in worker threads.

A context is never unpacked: it is an index of the tar, so that no link in it can lead anywhere but into the index, and ten
thousand files cost ten thousand entries and no inodes. A root is looked into through a descriptor and openat2(2).

Not here: what of a tree is taken (`boxship.build.copying`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from boxship.abi import mount as m
from boxship.images.layers import tar
from boxship.kit.errors import InvalidArgument
from boxship.linux.roots import Root

_PIECE = 1 << 20
_MAX_LINKS = 40


class Node(NamedTuple):
    """One file of a tree."""

    kind: int
    """The file type of stat(2)."""
    mode: int
    """Permissions, 12 bits."""
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    """Nanoseconds since 1970."""
    link: str = ""
    """Target of a symbolic link."""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    where: object = None
    """The tree's own: where the data is."""

    @property
    def is_dir(self) -> bool:
        """Whether it has names in it."""
        return self.kind == stat.S_IFDIR


ROOT = Node(stat.S_IFDIR, 0o755)


class Tree(Protocol):
    """Files by path: relative, "/" between names, "" for the root; no path has a link before its last name."""

    def node(self, path: str) -> Node | None:
        """What is at the path itself (a link is not followed); None for nothing."""

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """A regular file's data in pieces."""


def normal(path: str) -> str:
    """A path relative to the root with no `.`, `..` and double slashes; `..` of the root is the root."""
    done: list[str] = []
    for part in path.split("/"):
        if part == "..":
            done[-1:] = []
        elif part not in ("", "."):
            done.append(part)
    return "/".join(done)


def resolve(tree: Tree, path: str, *, last: bool = True) -> str:
    """`path` with its links followed inside the tree; the last name's own link only with `last`.

    What does not exist stays as it is written. Raises InvalidArgument for a circle of links.
    """
    done: list[str] = []
    rest = [part for part in path.split("/") if part not in ("", ".")][::-1]
    count = 0
    while rest:
        part = rest.pop()
        if part == "..":
            done[-1:] = []
            continue
        done.append(part)
        if not rest and not last:
            break
        found = tree.node("/".join(done))
        if found is None or found.kind != stat.S_IFLNK:
            continue
        count += 1
        if count > _MAX_LINKS:
            raise InvalidArgument(f"{path}: too many levels of symbolic links")
        done = [] if found.link.startswith("/") else done[:-1]
        rest += [part for part in found.link.split("/") if part not in ("", ".")][::-1]
    return "/".join(done)


def walk(tree: Tree, path: str) -> Iterator[tuple[str, Node]]:
    """Everything below a directory with its paths, each directory before what is in it, in sorted order."""
    for name in tree.names(path):
        below = f"{path}/{name}" if path else name
        found = tree.node(below)
        if found is None:
            continue  # of a root that is being written to; contexts do not change
        yield below, found
        if found.is_dir:
            yield from walk(tree, below)


def digest(tree: Tree, path: str, node: Node) -> str:
    """SHA-256 of a regular file's data, in hexadecimal."""
    hasher = hashlib.sha256(usedforsecurity=False)
    for piece in tree.chunks(path, node):
        hasher.update(piece)
    return hasher.hexdigest()


class Memory:
    """Files that are in memory: heredocs, and what was fetched from a URL."""

    def __init__(self, files: dict[str, tuple[bytes, int, int]]) -> None:
        """`files`: by name, (data, mode, mtime in nanoseconds)."""
        self._files = files

    def node(self, path: str) -> Node | None:
        """See Tree."""
        if not path:
            return ROOT
        found = self._files.get(path)
        return None if found is None else Node(stat.S_IFREG, found[1], size=len(found[0]), mtime=found[2])

    def names(self, path: str) -> list[str]:
        """See Tree."""
        return sorted(self._files) if not path else []

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        yield self._files[path][0]


class FileTree:
    """One file, by its descriptor, which is the caller's to close."""

    def __init__(self, fd: int, node: Node, name: str) -> None:
        self._fd = fd
        self._node = node
        self._name = name

    def node(self, path: str) -> Node | None:
        """See Tree."""
        return ROOT if not path else self._node if path == self._name else None

    def names(self, path: str) -> list[str]:
        """See Tree."""
        return [] if path else [self._name]

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        yield from _pread(self._fd, 0, node.size)


class TarTree:
    """The files of an uncompressed tar that lies in a file. Owners are root's, as contexts have them everywhere.

    Raises InvalidArgument (and its TarError) for a broken archive and for names that lead out of it. Closed by `close`.
    """

    def __init__(self, fd: int, *, owners: bool = False, limit: int = 1 << 20, strip: bool = False) -> None:
        """`fd` is the tree's from now on. `owners`: keep uid and gid. `limit`: members at most. `strip`: the single directory on
        top is the root (archives of repositories)."""
        self._fd = fd
        self._owners = owners
        self._nodes: dict[str, Node] = {"": ROOT}
        self._children: dict[str, set[str]] = {"": set()}
        self._sorted: dict[str, list[str]] = {}
        with tar.Mapped(fd) as source:
            for count, member in enumerate(tar.members(source)):
                if count >= limit:
                    raise InvalidArgument(f"the build context has more than {limit} files")
                self._add(member)
        self._top = ""
        if strip and len(self._children[""]) == 1:
            only = next(iter(self._children[""]))
            self._top = only if self._nodes[only].is_dir else ""

    def _add(self, member: tar.Member) -> None:
        path = _member_path(member.name)
        if not path:
            return
        uid, gid = (member.uid, member.gid) if self._owners else (0, 0)
        if member.kind == tar.LINK:
            made = self._nodes.get(_member_path(member.link))
            if made is None or made.is_dir:
                raise InvalidArgument(f"build context: {path} is a link to {os.fsdecode(member.link)}, which is not there")
        else:
            made = Node(
                member.kind, member.mode, uid, gid, member.size, member.mtime, os.fsdecode(member.link),
                (member.major, member.minor),
                tuple((os.fsdecode(name), value) for name, value in sorted(member.xattrs.items())),
                (member.offset, member.sparse))
        former = self._nodes.get(path)
        if former is not None and former.is_dir and not made.is_dir:
            for below in [each for each in self._nodes if each.startswith(f"{path}/")]:
                del self._nodes[below]
                self._children.pop(below, None)
            self._children.pop(path, None)
        self._nodes[path] = made
        if made.is_dir:
            self._children.setdefault(path, set())
        while path:
            above, _, name = path.rpartition("/")
            known = above in self._children
            self._children.setdefault(above, set()).add(name)
            if known:
                break
            if not (above in self._nodes and self._nodes[above].is_dir):
                self._nodes[above] = ROOT
            path = above

    def close(self) -> None:
        """Let go of the archive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _full(self, path: str) -> str:
        return f"{self._top}/{path}".rstrip("/") if self._top else path

    def node(self, path: str) -> Node | None:
        """See Tree."""
        return self._nodes.get(self._full(path))

    def names(self, path: str) -> list[str]:
        """See Tree."""
        path = self._full(path)
        if path not in self._sorted:
            self._sorted[path] = sorted(self._children.get(path, ()))
        return self._sorted[path]

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        assert isinstance(node.where, tuple)
        offset, sparse = node.where
        if sparse is None:
            yield from _pread(self._fd, offset, node.size)
            return
        at = 0
        for begin, length in sparse:
            yield from _zeros(begin - at)
            yield from _pread(self._fd, offset, length)
            offset += length
            at = begin + length
        yield from _zeros(node.size - at)

    def remove(self, path: str) -> None:
        """Take a file out of the tree."""
        full = self._full(path)
        if self._nodes.pop(full, None) is not None:
            above, _, name = full.rpartition("/")
            self._children[above].discard(name)
            self._children.pop(full, None)
            self._sorted.pop(above, None)

    def read(self, path: str, limit: int) -> bytes | None:
        """A small regular file, links followed; None when there is none. Raises InvalidArgument above `limit` bytes."""
        path = resolve(self, path)
        node = self.node(path)
        if node is None or node.kind != stat.S_IFREG:
            return None
        if node.size > limit:
            raise InvalidArgument(f"{path} is {node.size} bytes, and no more than {limit} are read")
        return b"".join(self.chunks(path, node))


def _member_path(name: bytes) -> str:
    text = os.fsdecode(name)
    if ".." in text.split("/"):
        raise InvalidArgument(f"build context: the name {text} leads out of it")
    return normal(text)


def _pread(fd: int, offset: int, size: int) -> Iterator[bytes]:
    while size:
        piece = os.pread(fd, min(size, _PIECE), offset)
        if not piece:
            raise InvalidArgument("build context: the archive ends within a file")
        offset += len(piece)
        size -= len(piece)
        yield piece


def _zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        piece = min(size, _PIECE)
        yield bytes(piece)
        size -= piece


class Filtered:
    """A tree without some of its files: what .dockerignore leaves."""

    def __init__(self, tree: Tree, hidden: frozenset[str]) -> None:
        """`hidden`: paths; of a directory everything below is listed too, or shown."""
        self._tree = tree
        self._hidden = hidden

    def node(self, path: str) -> Node | None:
        """See Tree."""
        return None if path in self._hidden else self._tree.node(path)

    def names(self, path: str) -> list[str]:
        """See Tree."""
        prefix = f"{path}/" if path else ""
        return [name for name in self._tree.names(path) if prefix + name not in self._hidden]

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        return self._tree.chunks(path, node)


class Subtree:
    """A directory of a tree, as a tree."""

    def __init__(self, tree: Tree, top: str) -> None:
        self._tree = tree
        self._top = top

    def _full(self, path: str) -> str:
        return f"{self._top}/{path}".rstrip("/")

    def node(self, path: str) -> Node | None:
        """See Tree."""
        return self._tree.node(self._full(path))

    def names(self, path: str) -> list[str]:
        """See Tree."""
        return self._tree.names(self._full(path))

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        return self._tree.chunks(self._full(path), node)


class RootTree:
    """A root file system. The root is the caller's to close, after the tree is done with."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def node(self, path: str) -> Node | None:
        """See Tree."""
        try:
            fd = self._root.open(path, m.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        try:
            status = os.fstat(fd)
            link = os.readlink("", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else ""
        finally:
            os.close(fd)
        return Node(
            stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size,
            status.st_mtime_ns, link, (os.major(status.st_rdev), os.minor(status.st_rdev)),
            self._xattrs(path) if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else ())

    def _xattrs(self, path: str) -> tuple[tuple[str, bytes], ...]:
        fd = self._root.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return tuple(
                (name, os.getxattr(fd, name)) for name in sorted(os.listxattr(fd))
                if not name.startswith(("trusted.overlay.", "user.overlay.", "security.selinux")))
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EPERM, errno.ENODATA):
                return ()
            raise
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str]:
        """See Tree."""
        try:
            fd = self._root.open_folder(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return []
            raise
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def chunks(self, path: str, node: Node) -> Iterator[bytes]:
        """See Tree."""
        fd = self._root.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            left = node.size
            while left:
                piece = os.read(fd, min(left, _PIECE))
                if not piece:
                    raise InvalidArgument(f"/{path} became shorter while it was copied")
                left -= len(piece)
                yield piece
        finally:
            os.close(fd)
