"""The images `host` and `python` in a store: made when they are first asked for, and again when the machine has changed.

Runs in: the daemon, on its event loop; files are read in worker threads.

    ROOT/NAME.json      what the image was made of, and its manifest's digest; also the digests of all layers that were made
    ROOT/nothing        an empty folder

`host` is an image like others, with one small layer: configuration that everybody may read, and empty folders. The machine's own
programs are not in it. They are the lowest layer of an overlay over each of its folders (`Builtins.mounts`), whose other layers
are those of the root: so what containers and steps of builds write there is part of the root like everything else. Only roots
whose lowest layer was made here have this, and nobody elsewhere makes the same bytes without knowing the machine.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

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
from boxship.linux.roots import split_lowers
from boxship.oci import digest as digests
from boxship.oci import text
from boxship.oci.image import MEDIA_TYPE_CONFIG, MEDIA_TYPE_LAYER, MEDIA_TYPE_MANIFEST, Descriptor

LABEL = "boxship.builtin"
"""On the record of an image in the store: which of these it is. A name that a user gave to something else is left alone."""

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAYERS_KEPT = 64


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

    def made_here(self, diff_ids: Sequence[str]) -> bool:
        """Whether an image of these layers is a `host` that was made here, or was made of one."""
        layers = self._known("host").get("layers")
        return bool(diff_ids) and isinstance(layers, list) and diff_ids[0] in layers

    def mounts(self, root: Sequence[Any], spare: str, *, read_only: bool) -> list[dict[str, Any]]:
        """The machine's programs in a root that `made_here` is true of, as the runtime specification's mounts.

        `root`: the mounts of its active snapshot (containerd.types.Mount). When they are no overlay, what is written below the
        folders goes to the folder `spare`. Raises OSError.
        """
        overlay = len(root) == 1 and root[0].type == "overlay"
        given = dict(option.partition("=")[::2] for option in root[0].options) if overlay else {}
        upper, work = given.get("upperdir", ""), f"{given.get('workdir', '')}-machine"
        lowers = split_lowers(given["lowerdir"]) if upper else []
        if not upper:
            upper, work = f"{spare}/upper", f"{spare}/work"
        mounts: list[dict[str, Any]] = []

        def overlay_at(path: str, beneath: str, *, always: bool = False) -> None:
            seen = _stack([upper, *lowers], path)
            if seen is None or not (seen.bottom or always):
                return  # an image or a container that has taken the folder away, or put something else there
            os.makedirs(f"{upper}/{path}", 0o755, exist_ok=True)
            own_work = f"{work}/{path.replace('/', '-')}"
            os.makedirs(own_work, 0o700, exist_ok=True)
            mounts.append({"destination": f"/{path}", "type": "overlay", "source": "overlay", "options": [
                "nosuid", "nodev", *(["ro"] if read_only else []),
                f"lowerdir={':'.join(map(_escaped, [*seen.below, beneath]))}", f"upperdir={upper}/{path}", f"workdir={own_work}",
                *(["userxattr"] if "userxattr" in given else [])]})

        for name in machine.PROGRAMS:
            if not os.path.islink(f"/{name}") and os.path.isdir(f"/{name}"):
                overlay_at(name, f"/{name}")
        if os.path.isdir("/usr/local/etc") and not os.path.islink("/usr/local"):
            # Configuration of what was built on the machine, so of the same kind as /etc; and nothing in it is let in. An opaque
            # folder is not enough to hide it: in a user namespace overlays do not look at such marks.
            nothing = f"{self._root}/nothing"
            os.makedirs(nothing, 0o755, exist_ok=True)
            overlay_at("usr/local/etc", nothing, always=True)
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
            lowest = layers[0].digest
            kept = [lowest, *(each for each in known.get("layers", []) if each != lowest)][:_LAYERS_KEPT]
            os.makedirs(self._root, 0o700, exist_ok=True)
            write_atomic(f"{self._root}/{name}.json", text.dumps({
                "by": __version__, "sources": [list(source) for source in made.sources], "manifest": target.digest,
                "layers": kept,
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


class _Seen(NamedTuple):
    """What of a stack of layers is seen at a path."""

    below: list[str]
    """The folders of the layers, without the first's."""
    bottom: bool
    """Whether what lies below all layers is seen too."""


def _stack(layers: Sequence[str], path: str) -> _Seen | None:
    """What is seen at `path`; None when that is no folder.

    No link of a layer is followed: layers are made by images and containers, and the folders are used as the machine's root.
    """
    found: list[str] = []
    bottom = True
    for layer in layers:
        place = layer
        for part in path.split("/"):
            place = f"{place}/{part}"
            try:
                status = os.lstat(place)
            except FileNotFoundError:
                break
            if not stat.S_ISDIR(status.st_mode):
                if not found:
                    return None
                bottom = False
                break
            bottom = bottom and not _opaque(place)
        else:
            found.append(place)
        if not bottom:
            break
    return _Seen([each for each in found if each != f"{layers[0]}/{path}"], bottom)


def _opaque(path: str) -> bool:
    for prefix in ("trusted", "user"):
        try:
            if os.getxattr(path, f"{prefix}.overlay.opaque") == b"y":
                return True
        except OSError:
            continue  # has none, or may not be asked
    return False


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")


async def _blob(store: Blobs, media_type: str, data: bytes, labels: dict[str, str]) -> Descriptor:
    found = Descriptor(media_type=media_type, digest=digests.of(data), size=len(data))
    await write(store, media.ref(found), data, found.digest, labels)
    return found


async def _layer(store: Blobs, tree: Tree) -> Descriptor:
    with tempfile.TemporaryFile() as spool:
        await asyncio.to_thread(tree.write, spool)
        spool.flush()
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
