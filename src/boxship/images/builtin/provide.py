"""The images `host` and `python` in a store: made when they are first asked for, and again when the machine has changed.

Runs in: the daemon, on its event loop; files are read in worker threads.

    ROOT/NAME.json      what the image was made of, and its manifest's digest; for `host` also the ids of all that were made

`host` is an image like others, with one small layer: configuration that everybody may read, and empty folders. The machine's own
programs are not in it but mounted over it, each below a copy-on-write layer of the container (`Builtins.mounts`); only for images
that were made here, so that none from elsewhere gets at them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from boxship import __version__
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.images import media
from boxship.images.builtin import machine, python
from boxship.images.builtin.tree import Tree
from boxship.images.platforms import host as host_platform
from boxship.images.service import blobs, to_message
from boxship.images.store import CHUNK, Blobs, write
from boxship.kit.errors import AlreadyExists, BoxshipError, NotFound
from boxship.kit.files import read_all, write_atomic
from boxship.oci import digest as digests
from boxship.oci import text
from boxship.oci.image import MEDIA_TYPE_CONFIG, MEDIA_TYPE_LAYER, MEDIA_TYPE_MANIFEST, Descriptor

LABEL = "boxship.builtin"
"""On the record of an image in the store: which of these it is. A name that a user gave to something else is left alone."""

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IDS_KEPT = 64


@dataclass
class _Made:
    """Layers and configuration of an image to be, and what of the machine they depend on."""

    layers: list[tuple[Tree, str]]
    """Each with how it came about."""
    config: dict[str, object]
    sources: list[machine.Source]


def _host() -> _Made:
    tree = Tree()
    with tempfile.TemporaryDirectory() as folder:
        sources = machine.build(folder)
        for path, mode in machine.FRESH:
            tree.folder(path, mode)
        for name in ("etc", "var"):
            tree.copy(name, f"{folder}/{name}")
    for name in machine.PROGRAMS:
        if os.path.islink(f"/{name}"):
            tree.link(name, os.readlink(f"/{name}"))
        elif os.path.isdir(f"/{name}"):
            tree.folder(name)
        sources.append((f"/{name}", machine.identity(f"/{name}")[:2]))
    return _Made([(tree, "the machine's own configuration, as far as everybody may read it")],
                 {"Env": [_PATH], "Cmd": ["/bin/sh"], "WorkingDir": "/"}, sources)


def _python() -> _Made:
    path = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    found = python.interpreter(path)
    base, layer = python.build(found)
    sources = [(each, machine.identity(each)) for each in (path, found.stdlib, f"{found.stdlib}/lib-dynload", "/etc/ld.so.cache")]
    return _Made([(base, "the machine's C library"), (layer, f"the machine's Python {found.version}")],
                 python.config(found), sources)


_MAKERS: dict[str, Callable[[], _Made]] = {"host": _host, "python": _python}
NAMES = {f"docker.io/library/{name}:latest": name for name in _MAKERS}


class Builtins:
    """The builtin images of one daemon."""

    def __init__(self, containerd: Any, root: str) -> None:
        """`containerd` is the bundle of services into which images go."""
        self._containerd = containerd
        self._root = root
        self._locks = {name: asyncio.Lock() for name in _MAKERS}

    async def provide(self, reference: str, call: Call) -> None:
        """Make or renew the image when `reference` (whole, with host and tag) is one of these.

        Raises Unsupported, NotFound (a library is missing), OSError as BoxshipError.
        """
        name = NAMES.get(reference)
        if name is None:
            return
        async with self._locks[name]:
            known = self._known(name)
            try:
                record = (await self._containerd.images.Get(pb.images.GetImageRequest(name=reference), call)).image
            except NotFound:
                record = None
            if record is not None:
                if record.labels.get(LABEL) != name:
                    return
                if known.get("manifest") == record.target.digest and self._fresh(known):
                    return
            try:
                made = await asyncio.to_thread(_MAKERS[name])
                await self._store(name, reference, made, known, call, replace=record is not None)
            except (OSError, ValueError) as error:
                raise BoxshipError(f"making the image {name} from this machine's files: {error}") from None

    def made_here(self, image_id: str) -> bool:
        """Whether an image is a `host` that was made here."""
        ids = self._known("host").get("ids")
        return isinstance(ids, list) and image_id in ids

    def mounts(self, image_id: str, folder: str, *, read_only: bool) -> list[dict[str, Any]]:
        """The machine's programs over the root of a container of the image, as the runtime specification's mounts.

        Each folder is the lower layer of an overlay whose upper one lies below `folder`, where it stays from start to start.
        Empty for every image that is not `host`. Raises OSError.
        """
        if not self.made_here(image_id):
            return []
        mounts: list[dict[str, Any]] = []
        read = ["ro"] if read_only else []
        for name in machine.PROGRAMS:
            if os.path.islink(f"/{name}") or not os.path.isdir(f"/{name}"):
                continue
            upper, work = f"{folder}/{name}/upper", f"{folder}/{name}/work"
            os.makedirs(upper, 0o755, exist_ok=True)
            os.makedirs(work, 0o700, exist_ok=True)
            mounts.append({"destination": f"/{name}", "type": "overlay", "source": "overlay", "options": [
                "nosuid", "nodev", *read, f"lowerdir=/{name}", f"upperdir={upper}", f"workdir={work}"]})
        if os.path.isdir("/usr/local/etc") and not os.path.islink("/usr/local"):
            # Configuration of what was built on the machine, so of the same kind as /etc; and nothing in it is let in.
            mounts.append({"destination": "/usr/local/etc", "type": "tmpfs", "source": "tmpfs",
                           "options": ["nosuid", "nodev", *read, "mode=755"]})
        return mounts

    def _known(self, name: str) -> dict[str, Any]:
        try:
            found = text.loads(read_all(f"{self._root}/{name}.json"), f"{name}.json")
        except (OSError, BoxshipError):
            return {}
        return found if isinstance(found, dict) else {}

    def _fresh(self, known: dict[str, Any]) -> bool:
        sources = known.get("sources")
        return known.get("by") == __version__ and isinstance(sources, list) and all(
            machine.identity(path)[: len(identity)] == identity for path, identity in sources)

    async def _store(
        self, name: str, reference: str, made: _Made, known: dict[str, Any], call: Call, *, replace: bool,
    ) -> None:
        leases = self._containerd.leases
        lease = (await leases.Create(pb.leases.CreateRequest(), call)).lease.id
        held = Call(call.namespace, lease)
        try:
            store = blobs(self._containerd.content, held)
            layers = [await _layer(store, tree) for tree, _ in made.layers]
            platform = host_platform()
            config = text.dumps({
                "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "architecture": platform.architecture, "os": platform.os, "config": made.config,
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
                "history": [{"created_by": f"boxship: {how}"} for _, how in made.layers],
            }).encode()
            described = await _blob(store, MEDIA_TYPE_CONFIG, config, {})
            manifest = text.dumps({
                "schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST, "config": described.encode(),
                "layers": [layer.encode() for layer in layers],
            }).encode()
            target = await _blob(store, MEDIA_TYPE_MANIFEST, manifest, media.child_labels([described, *layers]))
            ids = [described.digest, *(each for each in known.get("ids", []) if each != described.digest)][:_IDS_KEPT]
            os.makedirs(self._root, 0o700, exist_ok=True)
            write_atomic(f"{self._root}/{name}.json", text.dumps({
                "by": __version__, "sources": [list(source) for source in made.sources], "manifest": target.digest, "ids": ids,
            }).encode("utf-8", "surrogateescape"))
            image = pb.images.Image(name=reference, labels={LABEL: name}, target=to_message(target))
            try:
                if replace:
                    await self._containerd.images.Update(pb.images.UpdateImageRequest(image=image), held)
                else:
                    await self._containerd.images.Create(pb.images.CreateImageRequest(image=image), held)
            except AlreadyExists:
                await self._containerd.images.Update(pb.images.UpdateImageRequest(image=image), held)
        finally:
            await leases.Delete(pb.leases.DeleteRequest(id=lease), call)


async def _blob(store: Blobs, media_type: str, data: bytes, labels: dict[str, str]) -> Descriptor:
    found = Descriptor(media_type=media_type, digest=digests.of(data), size=len(data))
    await write(store, media.ref(found), data, found.digest, labels)
    return found


async def _layer(store: Blobs, tree: Tree) -> Descriptor:
    with tempfile.TemporaryFile() as spool:
        await asyncio.to_thread(tree.write, spool)
        size = spool.tell()
        writer = await store.writer(f"builtin-{os.urandom(8).hex()}", size)
        async with writer:
            offset = 0
            while offset < size:
                chunk = await asyncio.to_thread(os.pread, spool.fileno(), CHUNK, offset)
                await writer.write(chunk)
                offset += len(chunk)
            digest = await writer.commit(size)
    return Descriptor(media_type=MEDIA_TYPE_LAYER, digest=digest, size=size)
