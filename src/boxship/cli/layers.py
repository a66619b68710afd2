"""A container's root made of folders that must not change: a copy-on-write overlay over each.

Runs in: the boxship command; the mounts themselves are made by the container's init, from the entries returned here.
Spec: overlayfs (Documentation/filesystems/overlayfs.rst); in user namespaces Linux ≥ 5.11, with `userxattr`.

One overlay for each top-level folder, not one over the whole root: in a user namespace overlayfs refuses a lower layer below
which something else is mounted. A folder like that is taken apart: its children get overlays of their own, and what cannot be
taken apart is bound read-only.

Not here: which folders (`boxship.cli.host`, `boxship.cli.image`).
"""

from __future__ import annotations

import os
import stat

from boxship.kit.files import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.scratch import Scratch

_TAKE_APART_AT_MOST = 128
"""Children of a folder that is taken apart; each costs a mount."""


def mount_points(mountinfo: str = "/proc/self/mountinfo") -> list[str]:
    """Where anything is mounted, as this process sees it."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        return [_unescape(line.split(" ", 5)[4]) for line in file]


def _unescape(text: str) -> str:
    # Spec: proc_pid_mountinfo(5): space, tab, newline and backslash as three octal digits.
    if "\\" in text:
        for code in ("\\040", "\\011", "\\012", "\\134"):
            text = text.replace(code, chr(int(code[1:], 8)))
    return text


class Kernel:
    """What decides how layers are mounted.

    Attributes:
        userns: the container has a user namespace of its own.
        version: of the kernel, as (major, minor).
        busy: mount points of the host.
    """

    __slots__ = ("busy", "userns", "version")

    def __init__(self, *, userns: bool, version: tuple[int, int], busy: list[str]) -> None:
        self.userns = userns
        self.version = version
        self.busy = busy

    def overlays(self) -> bool:
        """Whether the container may mount overlays at all."""
        return not self.userns or self.version >= (5, 11)

    def below(self, path: str) -> bool:
        """Whether anything is mounted below a folder of the host."""
        prefix = path.rstrip("/") + "/"
        return any(point.startswith(prefix) for point in self.busy)


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 1) from "6.1.0-18-amd64"."""
    numbers = []
    for part in release.split(".")[:2]:
        digits = ""
        for char in part:
            if not char.isdigit():
                break
            digits += char
        numbers.append(int(digits or 0))
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


class Layers:
    """Collects the mounts of one container's root, and makes the skeleton for them.

    `uppers` are the writable folders by destination, for files that are to lie over an image's own.
    """

    def __init__(self, scratch: Scratch, kernel: Kernel, flags: list[str]) -> None:
        """`flags`: mount options of every layer, such as nosuid."""
        self.scratch = scratch
        self.kernel = kernel
        self.flags = flags
        self.mounts: list[dict[str, Any]] = []
        self.uppers: dict[str, str] = {}

    def folder(self, source: str, destination: str) -> None:
        """The folder `source` of the host at `destination`, to be written to at will and never changed."""
        below = self.kernel.below(source)
        if not self.kernel.overlays():
            self._bind(source, destination)
        elif below and self.kernel.userns:
            self._take_apart(source, destination)
        else:
            self._overlay(source, destination)
            if below:
                # Overlayfs shows the bare folder below each mount; what is mounted there gets its own.
                prefix = source.rstrip("/") + "/"
                for point in sorted(self.kernel.busy):
                    parent = destination.rstrip("/") + "/" + point[len(prefix) :] if point.startswith(prefix) else ""
                    if parent and os.path.isdir(point) and not os.path.islink(point):
                        self._overlay(point, parent)

    def _overlay(self, source: str, destination: str) -> None:
        lower, upper, work = self.scratch.layer(source)
        self.uppers[destination] = upper
        options = [*self.flags, f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"]
        if self.kernel.userns:
            options.append("userxattr")
        if self.kernel.version >= (5, 10):
            # Nothing of it is to survive, so nothing needs to reach the disk, least of all when it is unmounted.
            options.append("volatile")
        self.mounts.append({"destination": destination, "type": "overlay", "source": "overlay", "options": options})

    def _bind(self, source: str, destination: str) -> None:
        options = ["rbind", "rprivate", *self.flags, "ro", "rro"]
        self.mounts.append({"destination": destination, "type": "bind", "source": source, "options": options})

    def _take_apart(self, source: str, destination: str) -> None:
        with os.scandir(source) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        if len(children) > _TAKE_APART_AT_MOST:
            self._bind(source, destination)
            return
        self.skeleton(destination, stat.S_IMODE(os.stat(source).st_mode))
        for child in children:
            target = f"{destination.rstrip('/')}/{child.name}"
            if child.is_symlink():
                os.symlink(os.readlink(child.path), self.inside(target))
            elif child.is_dir():
                self.folder(child.path, target)
            elif child.is_file():
                self._bind(child.path, target)

    def inside(self, path: str) -> str:
        """Where a path of the container is in the skeleton."""
        return self.scratch.rootfs + path

    def skeleton(self, path: str, mode: int = 0o755) -> None:
        """A folder in the skeleton, with its parents; the mode holds whatever the umask is."""
        target = self.inside(path)
        os.makedirs(target, 0o755, exist_ok=True)
        os.chmod(target, mode)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file in the container, whether its folder is of the skeleton or a layer; an image's own is covered."""
        best = ""
        for destination in self.uppers:
            if path.startswith(destination.rstrip("/") + "/") and len(destination) > len(best):
                best = destination
        if best:
            target = self.uppers[best] + path[len(best.rstrip("/")) :]
            if os.path.dirname(target) != self.uppers[best]:
                raise ValueError(f"{path} is not directly in a layer")
        else:
            target = self.inside(path)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            write_all(fd, data)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
