"""A root file system by descriptor: looked into and written to without being mounted anywhere.

Runs in: the daemon.
Spec: fsopen(2), open_tree(2): a detached mount lives as long as its descriptor; openat2(2): no path leads out of the root.
"""

from __future__ import annotations

import os

from boxship.abi import mount as m
from boxship.kit.errors import Unsupported, from_os_error
from boxship.linux import mounts as linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_INSIDE = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS


class Root:
    """A root file system by descriptor: of mounts that are not mounted anywhere, or of a directory such as /proc/PID/root."""

    def __init__(self, mounts: list[Any] | None = None, *, path: str = "", read_only: bool = False) -> None:
        try:
            if mounts is not None:
                mount = detached(mounts, read_only=read_only)
                try:
                    # A descriptor of the mount itself would need AT_EMPTY_PATH everywhere.
                    self.fd = os.open(".", m.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
                finally:
                    os.close(mount)
            else:
                self.fd = os.open(path, m.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise from_os_error(error, "opening the root file system") from None

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go; a detached mount is gone with its last descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """openat2(2) below the root: links are followed as inside the container, none leads out. Raises OSError."""
        return linux.openat2(self.fd, path.strip("/") or ".", flags | os.O_CLOEXEC, mode, _INSIDE)

    def open_beneath(self, path: str) -> int:
        """A descriptor (O_PATH) of a path that no link on the way leads out of. Raises OSError; EXDEV for one that does."""
        how = m.RESOLVE_BENEATH | m.RESOLVE_NO_MAGICLINKS
        return linux.openat2(self.fd, path.strip("/") or ".", m.O_PATH | os.O_CLOEXEC, 0, how)

    def open_folder(self, path: str) -> int:
        """A descriptor of a folder. Raises OSError."""
        return self.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def read(self, path: str) -> str:
        """The text of a file, "" when there is none that can be read."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return ""
        try:
            parts = []
            size = 0
            while size < 16 << 20 and (chunk := os.read(fd, 1 << 20)):
                parts.append(chunk)
                size += len(chunk)
            return b"".join(parts).decode("utf-8", "surrogateescape")
        except OSError:
            return ""
        finally:
            os.close(fd)

    def make_folder(self, path: str, mode: int) -> None:
        """mkdir -p below the root. Raises OSError."""
        done = ""
        for name in filter(None, path.split("/")):
            parent = self.open_folder(done)
            try:
                os.mkdir(name, mode, dir_fd=parent)
            except FileExistsError:
                pass
            finally:
                os.close(parent)
            done = f"{done}/{name}"


def detached(mounts: list[Any], *, read_only: bool = False) -> int:
    """A descriptor of the mounted file system, which is mounted nowhere. Raises OSError, Unsupported."""
    if len(mounts) != 1:
        raise Unsupported(f"a root file system of {len(mounts)} mounts")
    mount = mounts[0]
    options = list(mount.options)
    if mount.type in ("bind", "") or "bind" in options or "rbind" in options:
        return linux.open_tree(m.AT_FDCWD, mount.source, m.OPEN_TREE_CLONE | m.AT_RECURSIVE)
    if mount.type != "overlay":
        raise Unsupported(f"a root file system of type {mount.type}")
    return linux.make_mount("overlay", _overlay_options(options, read_only=read_only))


def split_lowers(lowers: str) -> list[str]:
    """lowerdir's directories: between colons, where a backslash takes the meaning from the next character."""
    found, word, escaped = [], "", False
    for letter in lowers:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        elif letter == ":":
            found.append(word)
            word = ""
        else:
            word += letter
    return [*found, word]


def _overlay_options(options: list[str], *, read_only: bool) -> list[tuple[str, str | None]]:
    made: list[tuple[str, str | None]] = []
    lowers: list[str] = []
    upper = ""
    for option in options:
        key, sign, value = option.partition("=")
        if key == "lowerdir":
            lowers = split_lowers(value)
        elif key == "upperdir":
            upper = value
        elif key == "workdir":
            if not read_only:
                made.append((key, value))
        elif key not in ("rw", "ro", "volatile", "index", "uidmap", "gidmap"):
            made.append((key, value if sign else None))
    if upper and read_only:
        lowers = [upper, *lowers]
    elif upper:
        made.append(("upperdir", upper))
    # One by one (Linux >= 6.7): the whole list in one string may be longer than the 255 bytes that fsconfig takes.
    return [*[("lowerdir+", lower) for lower in lowers], *made, *([("ro", None)] if not upper else [])]
