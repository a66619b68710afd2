"""pull, push, load, save, import and unpack over a bundle of containerd's services, ours or a real containerd's.

Runs in: the daemon's event loop. What the engine and the transfer service call; no command line and no protocol here.
Spec: containerd 2.x core/transfer/local for what each does and in which order: everything happens under a lease, and the
record that names the image is written last, so that a name never stands for half an image.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.images import archive, media, platforms, progress
from boxship.images.archive import ANNOTATION_IMAGE_NAME, Source
from boxship.images.auth import CredentialSource
from boxship.images.export import Saved, export
from boxship.images.hosts import Configuration
from boxship.images.progress import Callback, Progress
from boxship.images.pull import CONFIG_LIMIT, PARALLEL, Fetcher, Flights, decode_config, pair_layers
from boxship.images.push import Pusher
from boxship.images.registry import Repository
from boxship.images.service import blobs, from_message, to_message
from boxship.images.store import Blobs, read
from boxship.images.transport import Limits, Transport
from boxship.images.unpack import ServiceUnpacker, Several, chain_ids
from boxship.kit.errors import AlreadyExists, InvalidArgument, NotFound
from boxship.oci import reference
from boxship.oci.image import ANNOTATION_REF_NAME, MAX_MANIFEST, Descriptor, Index, Manifest, Platform, decode_manifest

LEASE_HOURS = 24
OWNER_LABEL = "boxship.io/transfer.process"
"""Of a lease: the process whose work it holds together. What a process leaves that was killed is of no use to anybody."""
DEFAULT_SNAPSHOTTER_LABEL = "containerd.io/defaults/snapshotter"

_SNAPSHOTTER_TYPE = "io.containerd.snapshotter.v1"
OWN_ORDER = ("erofs", "overlayfs", "native")
"""Snapshotters of ours, the best first."""
CLIENTS_ORDER = ("overlayfs", "native")
"""What clients of containerd mean when they name none: that is where they look for the snapshots afterwards."""


@dataclass(frozen=True)
class Loaded:
    """An image that an archive held."""

    name: str
    """"" when the archive gives it none and no record was made."""
    target: Descriptor


@dataclass(frozen=True)
class Config:
    """How images are moved; the daemon makes one for itself."""

    registries: Configuration = field(default_factory=Configuration)
    limits: Limits = field(default_factory=Limits)
    downloads: int = PARALLEL
    """Blobs of one pull at once."""
    uploads: int = PARALLEL
    snapshotter: str = ""
    """Into which one is unpacked when nobody says; "": the namespace's, or the best that there is."""
    warn: Callable[[str, str], None] | None = None
    """Gets (host, text) of the warnings of registries."""


class Images:
    """The images of one bundle of services, in any namespace."""

    def __init__(self, containerd: Containerd, config: Config | None = None) -> None:
        self.containerd = containerd
        self.config = config or Config()
        self._flights = Flights()

    # Moving images.

    async def pull(
        self, name: str, call: Call, *, wanted: Sequence[Platform] | None = None, unpack: bool = True, snapshotter: str = "",
        labels: Mapping[str, str] | None = None, credentials: CredentialSource | None = None,
        registries: Configuration | None = None, callback: Callback | None = None,
        record: Callable[[Descriptor, Call], Awaitable[None]] | None = None, all_metadata: bool = False,
        unpacks: Sequence[tuple[Platform, str]] = (), trace: Callable[[str], None] | None = None,
    ) -> Descriptor:
        """Fetch the image `name` (any reference that people type) and record it; returns its target.

        `wanted`: platforms; None: this machine's, empty: all. `all_metadata`: see Fetcher. `unpacks`: (platform, snapshotter)
        in place of `wanted` and `snapshotter`. `record`: names the image, in place of the whole reference. Raises NotFound,
        Unauthenticated, PermissionDenied, Unavailable, DataLoss, InvalidArgument and others; then nothing is recorded, and what
        was fetched goes with the lease.
        """
        parsed = reference.parse(name).tagged()
        async with self.leased(call) as leased, self.transport(credentials, registries, trace) as transport:
            store = blobs(self.containerd.content, leased)
            unpacker = await self._unpackers(leased, store, unpacks or ((None, snapshotter),), wanted) if unpack else None
            fetcher = Fetcher(
                Repository(transport, parsed), store, wanted=wanted, unpacker=unpacker, callback=callback,
                parallel=self.config.downloads, flights=self._flights, scope=leased.namespace, all_metadata=all_metadata,
            )
            target = await fetcher.resolve(parsed)
            tell(callback, "fetching image content", str(parsed), target)
            await fetcher.fetch(target, str(parsed))
            if record is not None:
                await record(target, leased)
            else:
                await self.record(str(parsed), target, leased, labels)
                tell(callback, progress.SAVED, str(parsed), target)
        return target

    async def push(
        self, name: str, call: Call, *, to: str = "", target: Descriptor | None = None, wanted: Sequence[Platform] = (),
        credentials: CredentialSource | None = None, registries: Configuration | None = None, callback: Callback | None = None,
        chunk: int = 0, trace: Callable[[str], None] | None = None,
    ) -> Descriptor:
        """Push the image recorded as `name` (or `target`) to the reference `to` ("": `name` itself); returns what was pushed.

        `wanted`: these platforms; empty: all that the image has when they are here, otherwise the one that is.
        """
        parsed = reference.parse(to or name).tagged()
        if target is None:
            target = await self.target(name, call)
        async with self.leased(call) as leased, self.transport(credentials, registries, trace) as transport:
            store = blobs(self.containerd.content, leased)
            pusher = Pusher(
                Repository(transport, parsed), store, wanted=wanted, callback=callback, parallel=self.config.uploads, chunk=chunk
            )
            return await pusher.push(target, [parsed.tag] if parsed.tag else [], name)

    async def load(
        self, source: Source, call: Call, *, wanted: Sequence[Platform] | None = None, unpack: bool = True, snapshotter: str = "",
        labels: Mapping[str, str] | None = None, callback: Callback | None = None, compress: bool = False,
        nameless: str = "", unpacks: Sequence[tuple[Platform, str]] = (),
        record: Callable[[Descriptor, Call, bool], Awaitable[list[str]]] | None = None,
    ) -> list[Loaded]:
        """The images of an archive or a layout, recorded under their names and unpacked for `wanted` (None: this machine).

        `nameless`: those without a name are recorded as `nameless@DIGEST`; "" leaves them without a record, and
        to garbage collection. `unpacks`: as for pull. `record(target, call, top)` names the index of
        all (`top`) and each image, in place of this.
        """
        async with self.leased(call) as leased:
            store = blobs(self.containerd.content, leased)
            imported = await archive.load(store, source, callback=callback, compress=compress)
            if unpack:
                unpacker = await self._unpackers(leased, store, unpacks or ((None, snapshotter),), wanted)
                for target in {each.digest: each for each in imported.manifests}.values():
                    await self._unpack(store, target, unpacker, callback)
            if record is not None:
                recorded = [(imported.index, await record(imported.index, leased, True))]
                recorded += [(target, await record(target, leased, False)) for target in imported.manifests]
                return [Loaded(name, target) for target, names in recorded for name in names]
            found = []
            for target in imported.manifests:
                name = name_of(target) or (f"{nameless}@{target.digest}" if nameless else "")
                if name:
                    await self.record(name, target, leased, labels)
                    tell(callback, progress.SAVED, name, target)
                found.append(Loaded(name, target))
        return found

    async def import_rootfs(
        self, source: Source, call: Call, *, name: str = "", platform: Platform | None = None,
        config: Mapping[str, object] | None = None, message: str = "", unpack: bool = True, snapshotter: str = "",
        labels: Mapping[str, str] | None = None, callback: Callback | None = None, created: datetime | None = None,
    ) -> Descriptor:
        """An image of one layer out of a tar of a root file system; see `archive.import_rootfs`. `name` "": no record is made."""
        stamp = (created or datetime.now(UTC)).isoformat().replace("+00:00", "Z")
        async with self.leased(call) as leased:
            store = blobs(self.containerd.content, leased)
            target = await archive.import_rootfs(
                store, source, platform=platform, config=config, created=stamp, message=message, callback=callback
            )
            if unpack:
                wanted = [target.platform] if target.platform is not None else None
                await self._unpack(store, target, await self._unpacker(leased, store, snapshotter, wanted), callback)
            if name:
                await self.record(str(reference.parse(name).tagged()), target, leased, labels)
        return target

    async def save(
        self, images: Sequence[Saved], call: Call, *, wanted: Sequence[Platform] | None = None, docker: bool = True,
        distributable_only: bool = False, keep_index: bool = False, callback: Callback | None = None,
    ) -> AsyncIterator[bytes]:
        """An archive of the images, piece by piece; see `export`."""
        async with self.leased(call) as leased:
            store = blobs(self.containerd.content, leased)
            async for piece in export(
                store, images, wanted=wanted, docker=docker, distributable_only=distributable_only, keep_index=keep_index,
                callback=callback,
            ):
                yield piece

    async def unpack(
        self, target: Descriptor, call: Call, *, snapshotter: str = "", wanted: Sequence[Platform] | None = None,
        callback: Callback | None = None,
    ) -> str:
        """Make the snapshots of an image whose content is here, those that are missing; returns the topmost's name.

        Raises NotFound when content is missing or no image is for the platform.
        """
        async with self.leased(call) as leased:
            store = blobs(self.containerd.content, leased)
            unpacker = await self._unpacker(leased, store, snapshotter, wanted)
            chains = await self._unpack(store, target, unpacker, callback)
        if not chains:
            names = ", ".join(platforms.format(each) for each in wanted or [platforms.host()])
            raise NotFound(f"{target.digest}: no image for {names} in it")
        return chains[0]

    # Records.

    async def record(self, name: str, target: Descriptor, call: Call, labels: Mapping[str, str] | None = None) -> None:
        """Make `name` stand for `target`, whatever it stood for; labels are added to those that it has."""
        image = pb.images.Image(name=name, target=to_message(_bare(target)), labels=labels or {})
        try:
            await self.containerd.images.Create(pb.images.CreateImageRequest(image=image), call)
        except AlreadyExists:
            request = pb.images.UpdateImageRequest(image=image)
            request.update_mask.paths.extend(["target", *(f"labels.{key}" for key in labels or {})])
            await self.containerd.images.Update(request, call)

    async def target(self, name: str, call: Call) -> Descriptor:
        """What the record `name` stands for, also when it is given in short. Raises NotFound."""
        try:
            answer = await self.containerd.images.Get(pb.images.GetImageRequest(name=name), call)
        except NotFound:
            try:
                full = str(reference.parse(name).tagged())
            except InvalidArgument:
                full = name
            if full == name:
                raise
            answer = await self.containerd.images.Get(pb.images.GetImageRequest(name=full), call)
        return from_message(answer.image.target)

    # What the above is made of.

    def transport(
        self, credentials: CredentialSource | None, registries: Configuration | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> Transport:
        """The client of registries for one operation, with this caller's credentials."""
        return Transport(registries or self.config.registries, credentials, self.config.limits, self.config.warn, trace)

    @asynccontextmanager
    async def leased(self, call: Call) -> AsyncIterator[Call]:
        """A call whose lease keeps what it makes until the end; the caller's own lease when it has one."""
        if call.lease:
            yield call
            return
        expires = datetime.now(UTC) + timedelta(hours=LEASE_HOURS)
        lease = f"boxship-{secrets.token_hex(8)}"
        labels = {"containerd.io/gc.expire": expires.strftime("%Y-%m-%dT%H:%M:%SZ"), OWNER_LABEL: _process(os.getpid())}
        await self.containerd.leases.Create(pb.leases.CreateRequest(id=lease, labels=labels), call)
        try:
            yield Call(call.namespace, lease, call.timeout)
        finally:
            try:
                await self.containerd.leases.Delete(pb.leases.DeleteRequest(id=lease), call)
            except NotFound:
                pass

    async def settle(self) -> int:
        """Let go of what pulls and loads of processes held that are gone; returns how many leases that were."""
        count = 0
        for namespace in (await self.containerd.namespaces.List(pb.namespaces.ListNamespacesRequest(), Call())).namespaces:
            call = Call(namespace.name)
            for lease in (await self.containerd.leases.List(pb.leases.ListRequest(), call)).leases:
                owner = lease.labels.get(OWNER_LABEL, "")
                if owner and owner != _process(int(owner.partition(".")[0])):
                    await self.containerd.leases.Delete(pb.leases.DeleteRequest(id=lease.id), call)
                    count += 1
        return count

    async def snapshotter(self, call: Call, given: str = "", order: Sequence[str] = ()) -> str:
        """The snapshotter to use: the given, the configured, the namespace's, or the first of `order` that is there."""
        if given or self.config.snapshotter:
            return given or self.config.snapshotter
        try:
            answer = await self.containerd.namespaces.Get(pb.namespaces.GetNamespaceRequest(name=call.namespace), call)
            label = answer.namespace.labels.get(DEFAULT_SNAPSHOTTER_LABEL, "")
            if label:
                return str(label)
        except NotFound:
            pass
        request = pb.introspection.PluginsRequest(filters=[f"type=={_SNAPSHOTTER_TYPE}"])
        plugins = (await self.containerd.introspection.Plugins(request, call)).plugins
        there = [plugin.id for plugin in plugins if plugin.type == _SNAPSHOTTER_TYPE and not plugin.init_err.code]
        own = callable(getattr(self.containerd.content, "store", None))
        for name in order or (OWN_ORDER if own else CLIENTS_ORDER):
            if name in there:
                return name
        raise NotFound(f"no usable snapshotter; there are {', '.join(there) or 'none'}")

    async def _unpackers(
        self, call: Call, store: Blobs, unpacks: Sequence[tuple[Platform | None, str]], wanted: Sequence[Platform] | None
    ) -> Several:
        return Several([
            await self._unpacker(call, store, snapshotter, wanted if platform is None else [platform])
            for platform, snapshotter in unpacks
        ])

    async def _unpacker(
        self, call: Call, store: Blobs, snapshotter: str, wanted: Sequence[Platform] | None
    ) -> ServiceUnpacker:
        name = await self.snapshotter(call, snapshotter)
        return ServiceUnpacker(self.containerd, call, store, name, wanted=wanted or None, flights=self._flights)

    async def _unpack(
        self, store: Blobs, target: Descriptor, unpacker: ServiceUnpacker | Several, callback: Callback | None
    ) -> list[str]:
        """The topmost snapshots of the images in `target` that are wanted, the best of an index first."""
        chains = []
        for manifest in await images_of(store, target):
            config = decode_config(await read(store, manifest.config, CONFIG_LIMIT), manifest.config.digest)
            if not unpacker.wants(config.platform()) or not media.is_config(manifest.config.media_type):
                continue
            layers = pair_layers(manifest, config, target.digest)
            await unpacker.unpack(layers, manifest.config, config.platform(), _ready, callback)
            chains.append((chain_ids([layer.diff_id for layer in layers]) or [""])[-1])
        return chains


def _process(pid: int) -> str:
    """A process by its number, its start and this boot of the machine; "" when there is none of that number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            started = file.read().rpartition(b")")[2].split()[19].decode()
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{pid}.{started}.{file.read().strip()}"
    except OSError:
        return ""


async def _ready(_: Descriptor) -> None:
    """Everything is there already."""


async def images_of(store: Blobs, target: Descriptor, depth: int = 0) -> list[Manifest]:
    """The manifests of images at or below `target` whose configuration is in the store; this machine's platform first."""
    if depth > 8 or not (media.is_manifest(target.media_type) or media.is_index(target.media_type)):
        return []
    try:
        data = await read(store, target, MAX_MANIFEST)
    except NotFound:
        if depth:
            return []
        raise
    document = decode_manifest(data, target.media_type, target.digest)
    if isinstance(document, Index):
        first = platforms.choose(document.manifests, platforms.only(platforms.host()))
        order = {each.digest: each for each in [*first, *document.manifests]}
        return [found for child in order.values() for found in await images_of(store, child, depth + 1)]
    try:
        await store.size(document.config.digest)
    except NotFound:
        return []
    return [document] if media.is_config(document.config.media_type) else []


def name_of(target: Descriptor) -> str:
    """The full name that an imported image's annotations give it; "" when they do not."""
    full = target.annotations.get(ANNOTATION_IMAGE_NAME, "")
    short = target.annotations.get(ANNOTATION_REF_NAME, "")
    name = full or (short if any(mark in short for mark in "/:@") else "")
    try:
        return str(reference.parse(name).tagged()) if name else ""
    except InvalidArgument:
        return ""


def _bare(target: Descriptor) -> Descriptor:
    """The target without what only an archive's index says of it."""
    annotations = {
        key: value for key, value in target.annotations.items() if key not in (ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME)
    }
    return Descriptor(media_type=target.media_type, digest=target.digest, size=target.size, annotations=annotations)


def tell(callback: Callback | None, event: str, name: str, target: Descriptor) -> None:
    """An event about a whole image."""
    if callback is not None:
        callback(Progress(event, name, (), 0, 0, target))


