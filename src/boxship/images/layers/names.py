"""Which names of a layer's members are allowed, and which of them are whiteouts.

Runs in: any thread.
Spec: image-spec 1.1.1, layer.md "Whiteouts"; containerd and docker take absolute names as relative to the root, and so does this.
"""

from __future__ import annotations

import os

from boxship.kit.errors import InvalidArgument

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_META = b".wh..wh."
"""What aufs kept for itself in the root of a layer; it means nothing to others."""

MAX_NAME = 255
MAX_PATH = 4096


def clean(name: bytes, what: str = "name") -> bytes:
    """The path below the root: no empty, `.` or `..` parts, no slash at either end; b"" is the root itself.

    Raises InvalidArgument for one that leads out of the root by `..`, and for what no file system can hold.
    """
    if name[:2] == b"./":  # as `tar .` writes them all
        name = name[2:]
    if b"/." not in name and b"//" not in name and name[:1] not in b"./":
        path = name[:-1] if name.endswith(b"/") else name
    else:
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                if not parts:
                    raise InvalidArgument(f"layer: the {what} {os.fsdecode(name[:MAX_NAME])!r} leads out of the root")
                parts.pop()
            elif part and part != b".":
                parts.append(part)
        path = b"/".join(parts)
    if len(path) > MAX_NAME and (len(path) >= MAX_PATH or any(len(part) > MAX_NAME for part in path.split(b"/"))):
        raise InvalidArgument(f"layer: a {what} that is too long: {os.fsdecode(name[:MAX_NAME])!r}…")
    return path


def whiteout(base: bytes) -> bytes:
    """What the whiteout `base` hides: a name, or b"" for everything in its directory (opaque).

    Raises InvalidArgument for one that would hide no name.
    """
    if base == OPAQUE:
        return b""
    hidden = base[len(WHITEOUT) :]
    if hidden in (b"", b".", b".."):
        raise InvalidArgument(f"layer: invalid whiteout {os.fsdecode(base)!r}")
    return hidden


def is_aufs(path: bytes) -> bool:
    """Whether it is what aufs kept for itself."""
    return path.startswith(_META) and path != OPAQUE


def keep_xattr(name: bytes) -> bool:
    """Whether a layer may set this attribute: those of overlayfs are ours to set, or a layer could reach into others by them."""
    return not name.startswith((b"trusted.overlay.", b"user.overlay."))


class Limits:
    """What a layer may take before it is refused; 0 is no limit.

    Attributes:
        size: bytes of the uncompressed tar.
        entries: members of the tar.
    """

    __slots__ = ("entries", "size")

    def __init__(self, size: int = 1 << 38, entries: int = 10_000_000) -> None:
        self.size = size
        self.entries = entries
