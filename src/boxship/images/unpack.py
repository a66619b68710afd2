"""Snapshots out of an image's layers, through the Snapshots and Diff services.

Runs in: the daemon's event loop.
Spec: containerd 2.x core/unpack (keys, labels, chain ids); image-spec config.md (chain id).

Layers become snapshots bottom up, each under its chain id, so that images share them. What two pulls unpack at the same time is
unpacked once: the second finds the snapshot, or waits for it (`Flights`).
Not here: how a layer is applied (`boxship.containerd.diff`).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.images import media, platforms, progress
from boxship.images.progress import Callback, Meter
from boxship.images.pull import Flight, Flights, Layer
from boxship.images.service import to_message
from boxship.images.store import Blobs
from boxship.kit.errors import AlreadyExists, BoxshipError, DataLoss, NotFound
from boxship.oci.image import Descriptor, Platform

DEFAULT_SNAPSHOTTER = ""
"""Which one it is is decided by the namespace or by the service."""

_REF = "containerd.io/snapshot.ref"
_DIFF_ID = "containerd.io/snapshot.diff-id"
_INHERITED = "containerd.io/snapshot/"
_TRIES = 3


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The names of the layers' states: each layer's together with all below it."""
    found: list[str] = []
    for diff_id in diff_ids:
        found.append("sha256:" + hashlib.sha256(f"{found[-1]} {diff_id}".encode()).hexdigest() if found else diff_id)
    return found


class Several:
    """Unpacks for several platforms or into several snapshotters: each image by the first that wants it."""

    def __init__(self, unpackers: Sequence[ServiceUnpacker]) -> None:
        self._unpackers = list(unpackers)

    def wants(self, platform: Platform) -> bool:
        return any(each.wants(platform) for each in self._unpackers)

    async def unpack(
        self, layers: Sequence[Layer], config: Descriptor, platform: Platform, ready: Callable[[Descriptor], Awaitable[None]],
        progress: Callback | None,
    ) -> None:
        for each in self._unpackers:
            if each.wants(platform):
                await each.unpack(layers, config, platform, ready, progress)
                return


class ServiceUnpacker:
    """Unpacks into one snapshotter."""

    def __init__(
        self, containerd: Containerd, call: Call, blobs: Blobs, snapshotter: str, *, wanted: Sequence[Platform] | None = None,
        flights: Flights | None = None,
    ) -> None:
        """`wanted`: only images for these platforms are unpacked; None: those that this machine runs."""
        self._containerd = containerd
        self._call = call
        self._blobs = blobs
        self._snapshotter = snapshotter
        self._matcher = platforms.any_of([platforms.host()] if wanted is None else wanted)
        self._flights = flights if flights is not None else Flights()

    def wants(self, platform: Platform) -> bool:
        return self._matcher.match(platform)

    async def unpack(
        self, layers: Sequence[Layer], config: Descriptor, platform: Platform, ready: Callable[[Descriptor], Awaitable[None]],
        progress: Callback | None,
    ) -> None:
        chains = chain_ids([layer.diff_id for layer in layers])
        for index, layer in enumerate(layers):
            meter = Meter(progress, layer.descriptor)
            key = ("unpack", self._call.namespace, self._snapshotter, chains[index])

            async def work(flight: Flight, layer: Layer = layer, index: int = index) -> None:
                await self._layer(layer, chains[index], chains[index - 1] if index else "", ready, flight.tell)

            await self._flights.join(key, work, meter.tell)
            await ready(layer.descriptor)
        if chains:
            await self._blobs.set_labels(config.digest, {f"{media.GC_SNAPSHOT}{self._snapshotter}": chains[-1]})

    async def _layer(
        self, layer: Layer, chain: str, parent: str, ready: Callable[[Descriptor], Awaitable[None]],
        tell: Callable[[str, int], None],
    ) -> None:
        """The snapshot `chain`, made unless it is there."""
        snapshots = self._containerd.snapshots
        labels = {key: value for key, value in layer.descriptor.annotations.items() if key.startswith(_INHERITED)}
        labels |= {_REF: chain, _DIFF_ID: layer.diff_id}
        prepared = await self._prepare(chain, parent, labels)
        if prepared is None:
            return
        key, mounts = prepared
        try:
            await ready(layer.descriptor)
            tell(progress.EXTRACTING, 0)
            applied = await self._containerd.diff.Apply(
                pb.diff.ApplyRequest(diff=to_message(layer.descriptor), mounts=mounts), self._call
            )
            if applied.applied.digest != layer.diff_id:
                raise DataLoss(
                    f"layer {layer.descriptor.digest}: wrong diff id calculated on extraction {applied.applied.digest}, "
                    f"the image says {layer.diff_id}"
                )
            try:
                await snapshots.Commit(pb.snapshots.CommitSnapshotRequest(
                    snapshotter=self._snapshotter, name=chain, key=key, labels=labels), self._call)
            except AlreadyExists:
                await self._remove(key)
        except BaseException:
            await self._remove(key)
            raise
        await self._blobs.set_labels(layer.descriptor.digest, {media.UNCOMPRESSED: layer.diff_id})
        tell(progress.EXTRACTED, layer.descriptor.size)

    async def _prepare(self, chain: str, parent: str, labels: dict[str, str]) -> tuple[str, Any] | None:
        """A new active snapshot on `parent` and its mounts; None when `chain` is there."""
        snapshots = self._containerd.snapshots
        for _ in range(_TRIES):
            if await self._exists(chain):
                return None
            key = f"extract-{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)} {chain}"
            try:
                answer = await snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(
                    snapshotter=self._snapshotter, key=key, parent=parent, labels=labels), self._call)
                return key, answer.mounts
            except AlreadyExists:
                # Of a snapshotter that has the layer already and only had to be asked for it, or a key used twice.
                continue
        if await self._exists(chain):
            return None
        raise AlreadyExists(f"unable to prepare extraction snapshot for {chain}")

    async def _exists(self, chain: str) -> bool:
        try:
            await self._containerd.snapshots.Stat(
                pb.snapshots.StatSnapshotRequest(snapshotter=self._snapshotter, key=chain), self._call
            )
        except NotFound:
            return False
        return True

    async def _remove(self, key: str) -> None:
        try:
            await self._containerd.snapshots.Remove(
                pb.snapshots.RemoveSnapshotRequest(snapshotter=self._snapshotter, key=key), self._call
            )
        except BoxshipError:
            # The error that led here matters more; garbage collection takes what is left with the lease.
            return
