"""Root file systems of containers: snapshots, unpacked when first needed, and looked into without being mounted anywhere.

Runs in: the daemon.
Spec: containerd's Snapshots service; fsopen(2), open_tree(2): a detached mount lives as long as its descriptor, so that none is
left behind by a daemon that is killed.

    chain ID of the image's layers ── NAME-init (the empty files that bind mounts go on) ── the container's own

The shim mounts the container's root; what the engine does itself (users' names, cp, export, volumes' first content) it does
through a descriptor of the root, and openat2(2) keeps every path below that.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from typing import Any

from boxship.abi import mount as m
from boxship.api.containerd.call import Call
from boxship.api.containerd.pb import content, snapshots
from boxship.api.containerd.services import Containerd
from boxship.images.service import from_message
from boxship.images.transfer import Images as Mover
from boxship.kit.errors import AlreadyExists, NotFound, Unsupported, from_os_error
from boxship.linux import mounts as linux

_FOLDERS = ("dev", "dev/pts", "dev/shm", "proc", "sys", "etc")
_FILES = (".dockerenv", "etc/resolv.conf", "etc/hosts", "etc/hostname", "dev/console")
_INSIDE = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS


class Snapshots:
    """The snapshots of one snapshotter, as images and containers need them."""

    def __init__(self, containerd: Containerd, call: Call, snapshotter: str, mover: Mover) -> None:
        self._containerd = containerd
        self._call = call
        self.snapshotter = snapshotter
        self._locks: dict[str, asyncio.Lock] = {}
        self._ready: set[str] = set()
        self.mover = mover

    async def exists(self, key: str) -> bool:
        """Whether there is a snapshot of that name."""
        try:
            await self._containerd.snapshots.Stat(snapshots.StatSnapshotRequest(snapshotter=self.snapshotter, key=key),
                self._call)
        except NotFound:
            return False
        return True

    async def mounts(self, key: str) -> list[Any]:
        """The mounts of an active snapshot."""
        request = snapshots.MountsRequest(snapshotter=self.snapshotter, key=key)
        return list((await self._containerd.snapshots.Mounts(request, self._call)).mounts)

    async def usage(self, key: str) -> int:
        """Bytes that a snapshot takes, without its parents."""
        request = snapshots.UsageRequest(snapshotter=self.snapshotter, key=key)
        return int((await self._containerd.snapshots.Usage(request, self._call)).size)

    async def remove(self, key: str) -> None:
        """Remove a snapshot; that it is not there is no error."""
        try:
            await self._containerd.snapshots.Remove(
                snapshots.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key), self._call)
        except NotFound:
            pass

    async def prepare(self, key: str, image: Any, labels: dict[str, str]) -> None:
        """Make the active snapshot of a container of `image` (boxship.engine.images.Image)."""
        for attempt in (1, 2):
            parent = await self._parent(image)
            try:
                await self._containerd.snapshots.Prepare(
                    snapshots.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels),
                    self._call)
                return
            except NotFound:
                # Collected, or removed by hand, since it was last seen.
                self._ready.discard(image.id)
                if attempt == 2:
                    raise

    async def _parent(self, image: Any) -> str:
        """The snapshot that containers of the image are made on; unpacks the image when it has to."""
        name = f"{image.chain or 'scratch'}-init"
        if image.id in self._ready:
            return name
        lock = self._locks.setdefault(image.id, asyncio.Lock())
        async with lock:
            if image.id not in self._ready:
                async with self.mover.leased(self._call) as call:
                    if image.diff_ids:
                        await self.mover.unpack(from_message(image.target), call, snapshotter=self.snapshotter)
                    if not await self.exists(name):
                        await self._make_init(name, image.chain, call)
                    await self._label(image, name, call)
                self._ready.add(image.id)
        return name

    async def _label(self, image: Any, name: str, call: Call) -> None:
        """The snapshots live as long as the image's configuration."""
        base = f"containerd.io/gc.ref.snapshot.{self.snapshotter}"
        wanted = {f"{base}/init": name} | ({base: image.chain} if image.chain else {})
        info = content.Info(digest=image.id, labels=wanted)
        request = content.UpdateRequest(info=info)
        request.update_mask.paths.extend(f"labels.{key}" for key in wanted)
        await self._containerd.content.Update(request, call)

    async def _make_init(self, name: str, parent: str, call: Call) -> None:
        key = f"{name}-{secrets.token_hex(6)}"
        service = self._containerd.snapshots
        made = await service.Prepare(
            snapshots.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent), call)
        try:
            with Root(list(made.mounts)) as root:
                _fill_init(root)
            await service.Commit(snapshots.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key), call)
        except AlreadyExists:
            await self.remove(key)
        except BaseException:
            await self.remove(key)
            raise


def _fill_init(root: Root) -> None:
    """What dockerd puts under a container: places for bind mounts, and the mark by which programs know that they are in one."""
    for path in _FOLDERS:
        root.make_folder(path, 0o755)
    for path in _FILES:
        folder, _, name = path.rpartition("/")
        parent = root.open_folder(folder)
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o755, dir_fd=parent))
        except FileExistsError:
            pass
        finally:
            os.close(parent)
    etc = root.open_folder("etc")
    try:
        os.symlink("/proc/mounts", "mtab", dir_fd=etc)
    except FileExistsError:
        pass
    finally:
        os.close(etc)


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


def overlay_layers(mounts: list[Any]) -> tuple[str, list[str]]:
    """(upper directory, lower directories) of a container's mounts. Raises Unsupported when they are no overlay."""
    if len(mounts) != 1:
        raise Unsupported(f"changes of a root file system of {len(mounts)} mounts")
    found = dict(option.partition("=")[::2] for option in mounts[0].options)
    if mounts[0].type != "overlay" or "upperdir" not in found:
        raise Unsupported(f"changes of a root file system of type {mounts[0].type}")
    return found["upperdir"], _split(found["lowerdir"])


def _split(lowers: str) -> list[str]:
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
            lowers = _split(value)
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
