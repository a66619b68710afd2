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

from boxship.api.containerd.call import Call
from boxship.api.containerd.pb import content, snapshots
from boxship.api.containerd.services import Containerd
from boxship.images.service import from_message
from boxship.images.transfer import Images as Mover
from boxship.kit.errors import AlreadyExists, NotFound, Unsupported
from boxship.linux.roots import Root, split_lowers

_FOLDERS = ("dev", "dev/pts", "dev/shm", "proc", "sys", "etc")
_FILES = (".dockerenv", "etc/resolv.conf", "etc/hosts", "etc/hostname", "dev/console")


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


def overlay_layers(mounts: list[Any]) -> tuple[str, list[str]]:
    """(upper directory, lower directories) of a container's mounts. Raises Unsupported when they are no overlay."""
    if len(mounts) != 1:
        raise Unsupported(f"changes of a root file system of {len(mounts)} mounts")
    found = dict(option.partition("=")[::2] for option in mounts[0].options)
    if mounts[0].type != "overlay" or "upperdir" not in found:
        raise Unsupported(f"changes of a root file system of type {mounts[0].type}")
    return found["upperdir"], split_lowers(found["lowerdir"])
