"""COPY and ADD: which files of a tree are taken, where they go, and the layer that they make.

Runs in: the daemon, in worker threads.
Spec: the Dockerfile reference, ADD and COPY; image-spec 1.1.1, layer.md.

The layer's tar is written straight from the source: nothing is copied into a snapshot, and the same files make the same layer.
Where files go is looked up in the tree that they are copied over, whose directories and links decide.

    source: a pattern                    take()                                    tar
    tree ───────────────► Taken(source path, path below the destination) ─► Item(path in the image, node) ─► header, data
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from boxship.build.tree import Node, Tree, digest, normal, resolve, walk
from boxship.images.layers.diff import BLOCK, header
from boxship.kit.errors import InvalidArgument, NotFound

_WILD = re.compile(r"[*?\[]")


class Taken(NamedTuple):
    """One source that a pattern names."""

    tree: Tree
    path: str
    node: Node
    name: str
    """What it is called at the destination; of a directory only its content is copied."""


class Options(NamedTuple):
    """The flags of the instruction, with what they name already looked up."""

    uid: int | None = None
    """None: the source's own."""
    gid: int | None = None
    chmod: str = ""
    """Octal or symbolic; "" to keep."""
    parents: bool = False
    exclude: Callable[[str], bool] | None = None
    """Whether a path, relative to the source, is left out."""
    mtime: int | None = None
    """Of the directories that are made, in nanoseconds."""


class Item(NamedTuple):
    """A member of the layer."""

    path: str
    node: Node
    tree: Tree | None
    source: str
    """Path in `tree` of a regular file."""


def take(tree: Tree, pattern: str, what: str = "", *, parents: bool = False) -> list[Taken]:
    """The files that a source of COPY names: none for a pattern that matches nothing, as BuildKit has it.

    Raises NotFound for a name that is not there. `what`: the tree's name for the text.
    """
    pivot = ""
    if parents and "/./" in f"{pattern}/":
        pivot, _, pattern = pattern.partition("/./")
        pivot = resolve(tree, pivot)
        pattern = f"{pivot}/{pattern}"
    if not _WILD.search(pattern):
        path = resolve(tree, pattern.replace("\\", ""))
        node = tree.node(path)
        if node is None:
            raise NotFound(f"COPY failed: file not found in {what or 'build context'}: stat {pattern}: file does not exist")
        name = normal(pattern.replace("\\", ""))
        return [Taken(tree, path, node, name[len(pivot):].strip("/") if parents else name.rpartition("/")[2])]
    found = []
    for path in _matches(tree, [part for part in pattern.split("/") if part not in ("", ".")], ""):
        node = tree.node(path)
        if node is not None:
            found.append(Taken(tree, path, node, path[len(pivot):].strip("/") if parents else path.rpartition("/")[2]))
    return found


def _matches(tree: Tree, parts: list[str], above: str) -> Iterator[str]:
    """Paths that match, sorted; links before the last name are followed."""
    if not parts:
        yield above
        return
    part, *rest = parts
    prefix = f"{above}/" if above else ""
    if part == "..":
        yield from _matches(tree, rest, above.rpartition("/")[0])
    elif part == "**":
        yield from _matches(tree, rest, above)
        for name in tree.names(above):
            node = tree.node(prefix + name)
            if node is not None and node.is_dir:
                yield from _matches(tree, parts, prefix + name)
            elif not rest:
                yield prefix + name
    elif not _WILD.search(part):
        below = prefix + part.replace("\\", "")
        if rest:
            below = resolve(tree, below)
        if tree.node(below) is not None:
            yield from _matches(tree, rest, below)
    else:
        matches = re.compile(_translate(part)).fullmatch
        for name in tree.names(above):
            if matches(name):
                below = prefix + name
                yield from _matches(tree, rest, resolve(tree, below) if rest else below)


def _translate(pattern: str) -> str:
    """A name's pattern as Go's path.Match has it, as a regular expression. Raises InvalidArgument for a broken one."""
    made, at = "(?s:", 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            made += "[^/]*"
        elif char == "?":
            made += "[^/]"
        elif char == "\\" and at < len(pattern):
            made += re.escape(pattern[at])
            at += 1
        elif char == "[":
            end = pattern.find("]", at + 1)
            if end < 0:
                raise InvalidArgument(f"syntax error in pattern {pattern}: [ without ]")
            inside = pattern[at:end]
            negated = inside.startswith("^")
            inside = re.sub(r"([\[\]&~|])", r"\\\1", inside[1:] if negated else inside)
            made += f"[{'^' if negated else ''}{inside}]"
            at = end + 1
        else:
            made += re.escape(char)
    return made + ")"


def place(taken: Sequence[Taken], below: Tree | None, destination: str, options: Options) -> list[Item]:
    """The members of the layer that puts `taken` at `destination` (absolute, a slash at its end makes it a directory).

    `below`: what the layer goes on; None for a layer that goes on anything (--link). Raises InvalidArgument.
    """
    layer = _Layer(below, options)
    target = resolve(below, destination) if below is not None else normal(destination)
    there = layer.look(target)
    several = len(taken) > 1
    into = destination.endswith("/") or several or options.parents or bool(there and there.is_dir)
    if there is not None and not there.is_dir and (into or (taken and taken[0].node.is_dir)):
        raise InvalidArgument(f"cannot copy to non-directory: {destination}")
    for each in taken:
        if options.parents:
            base = target
            inner = ""
            for part in each.name.split("/")[:-1]:
                inner = f"{inner}/{part}" if inner else part
            layer.copy(each, _join(base, each.name))
        elif each.node.is_dir:
            layer.make(target)
            layer.tree(each, target)
        elif into:
            layer.copy(each, _join(target, each.name))
        else:
            layer.copy(each, target)
    return layer.items


def make_directory(below: Tree | None, path: str, options: Options) -> list[Item]:
    """The members of the layer that makes a directory with those above it; none when it is there. Raises InvalidArgument."""
    layer = _Layer(below, options)
    target = resolve(below, path) if below is not None else normal(path)
    there = layer.look(target)
    if there is not None and not there.is_dir:
        raise InvalidArgument(f"cannot make the directory {path}: there is a file of that name")
    layer.make(target)
    return layer.items


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above else name


class _Layer:
    """Members in the order of the tar, with what they hide of the tree below."""

    def __init__(self, below: Tree | None, options: Options) -> None:
        self._below = below
        self._options = options
        self._made: dict[str, Node] = {}
        self.items: list[Item] = []

    def look(self, path: str) -> Node | None:
        """What is at a path, in this layer or below."""
        if not path:
            return Node(stat.S_IFDIR, 0o755)
        if path in self._made:
            return self._made[path]
        return self._below.node(path) if self._below is not None else None

    def _add(self, path: str, node: Node, tree: Tree | None = None, source: str = "") -> None:
        self._made[path] = node
        self.items.append(Item(path, node, tree, source))

    def _owned(self, node: Node) -> Node:
        options = self._options
        mode = node.mode
        if options.chmod and node.kind != stat.S_IFLNK:
            mode = changed_mode(mode, options.chmod, is_dir=node.is_dir)
        uid = node.uid if options.uid is None else options.uid
        gid = node.gid if options.gid is None else options.gid
        return node._replace(mode=mode, uid=uid, gid=gid)

    def make(self, path: str) -> None:
        """mkdir -p, the ones that are not there."""
        if not path:
            return
        there = self.look(path)
        if there is not None:
            if not there.is_dir:
                raise InvalidArgument(f"cannot copy to non-directory: /{path}")
            return
        self.make(path.rpartition("/")[0])
        options = self._options
        self._add(path, Node(stat.S_IFDIR, 0o755, options.uid or 0, options.gid or 0, mtime=options.mtime or 0))

    def copy(self, taken: Taken, target: str) -> None:
        """A file, or with --parents a directory with itself, to `target`."""
        if self._options.exclude is not None and self._options.exclude(taken.name):
            return
        self.make(target.rpartition("/")[0])
        if taken.node.is_dir:
            self._directory(target, taken.node)
            self.tree(taken, target)
            return
        self._file(taken.tree, taken.path, taken.node, target)

    def _file(self, tree: Tree, source: str, node: Node, target: str) -> None:
        there = self.look(target)
        if there is not None and there.is_dir:
            raise InvalidArgument(f"cannot copy to directory: /{target}")
        if node.kind == stat.S_IFSOCK:
            return
        self._add(target, self._owned(node), tree, source)

    def _directory(self, target: str, node: Node) -> str:
        """Where the content of a directory goes: a link to a directory that is there is followed."""
        there = self.look(target)
        if there is not None and there.kind == stat.S_IFLNK and self._below is not None:
            target = resolve(self._below, target)
            there = self.look(target)
            if there is not None and there.is_dir:
                return target
        if there is not None and not there.is_dir:
            raise InvalidArgument(f"cannot copy to non-directory: /{target}")
        self._add(target, self._owned(node))
        return target

    def tree(self, taken: Taken, target: str) -> None:
        """A directory's content to `target`, merged with what is there."""
        excluded = self._options.exclude
        places = {taken.path: target}
        for path, node in walk(taken.tree, taken.path):
            if excluded is not None and excluded(path[len(taken.path):].lstrip("/")):
                continue
            above, _, name = path.rpartition("/")
            if above not in places:
                # Its directory was left out and it was not: the directory is made all the same.
                places[above] = self._above(taken, above, places)
            if node.is_dir:
                places[path] = self._directory(_join(places[above], name), node)
            else:
                self._file(taken.tree, path, node, _join(places[above], name))

    def _above(self, taken: Taken, path: str, places: dict[str, str]) -> str:
        above, _, name = path.rpartition("/")
        if above not in places:
            places[above] = self._above(taken, above, places)
        node = taken.tree.node(path)
        assert node is not None
        return self._directory(_join(places[above], name), node)


_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)\Z")
_WHO = {"u": 0o4700, "g": 0o2070, "o": 0o1007}


def changed_mode(mode: int, wanted: str, *, is_dir: bool) -> int:
    """chmod(1): `wanted` is octal or symbolic. Raises InvalidArgument."""
    if re.fullmatch(r"[0-7]{1,5}", wanted):
        return int(wanted, 8) & 0o7777
    for clause in wanted.split(","):
        found = _CLAUSE.match(clause)
        if not found:
            raise InvalidArgument(f"invalid chmod parameter: '{wanted}'. it should be octal string and between 0 and 07777, or"
                                  " symbolic as u=rwX,go=rX")
        who = set(found[1]) or set("a")
        mask = 0o7777 if "a" in who else sum(_WHO[each] for each in who)
        for sign, letters in re.findall(r"([-+=])([ugorwxXst]*)", found[2]):
            bits = _bits(letters, mode, is_dir=is_dir) & mask
            if "t" in letters:
                bits |= 0o1000
            if sign == "+":
                mode |= bits
            elif sign == "-":
                mode &= ~bits
            else:
                mode = mode & ~(mask & (0o0777 if is_dir else 0o6777)) | bits
    return mode & 0o7777


def _bits(letters: str, mode: int, *, is_dir: bool) -> int:
    if letters in ("u", "g", "o"):
        three = mode >> {"u": 6, "g": 3, "o": 0}[letters] & 7
        return three * 0o111
    bits = 0
    for letter in letters:
        bits |= {"r": 0o444, "w": 0o222, "x": 0o111, "s": 0o6000, "t": 0}.get(letter, 0)
        if letter == "X" and (is_dir or mode & 0o111):
            bits |= 0o111
    return bits


def content_key(items: Sequence[Item]) -> str:
    """What the members are, by their content and metadata without times: the part of a cache's key that files are."""
    hasher = hashlib.sha256()
    for item in items:
        node = item.node
        data = ""
        if node.kind == stat.S_IFREG and item.tree is not None:
            data = digest(item.tree, item.source, node)
        described = [item.path, node.kind, node.mode, node.uid, node.gid, data, node.link, list(node.device),
                     [[name, value.hex()] for name, value in node.xattrs]]
        hasher.update(json.dumps(described).encode() + b"\n")
    return hasher.hexdigest()


def write_layer(items: Sequence[Item], write: Callable[[bytes], object], epoch: int | None) -> None:
    """The tar of the members. `epoch`: seconds; later times are put back to it."""
    buffer = bytearray()
    for item in items:
        node = item.node
        mtime = node.mtime // 10**9
        if epoch is not None:
            mtime = min(mtime, epoch)
        path = item.path.encode("utf-8", "surrogateescape")
        head = partial(header, path, mode=node.mode, uid=node.uid, gid=node.gid, mtime=mtime)
        xattrs = dict(node.xattrs)
        if node.is_dir:
            buffer += header(
                path + b"/", b"5", 0, xattrs=xattrs, mode=node.mode, uid=node.uid, gid=node.gid, mtime=mtime)
        elif node.kind == stat.S_IFREG:
            buffer += head(b"0", node.size, xattrs=xattrs)
            assert item.tree is not None
            for piece in item.tree.chunks(item.source, node):
                buffer += piece
                if len(buffer) >= 1 << 20:
                    write(bytes(buffer))
                    buffer.clear()
            buffer += bytes(-node.size % BLOCK)
        elif node.kind == stat.S_IFLNK:
            buffer += head(b"2", 0, link=node.link.encode("utf-8", "surrogateescape"))
        elif node.kind == stat.S_IFIFO:
            buffer += head(b"6", 0)
        else:
            buffer += head(b"3" if node.kind == stat.S_IFCHR else b"4", 0, device=node.device)
        if len(buffer) >= 1 << 20:
            write(bytes(buffer))
            buffer.clear()
    write(bytes(buffer) + bytes(2 * BLOCK))
