"""The build cache: what a step made, by what it was made of.

Runs in: the daemon, on its event loop.
Spec: BuildKit's idea of a cache: the same inputs give the same result. A key is a hash; nothing of what went into it can be read
from it.

A record is a small blob of JSON in containerd's content store. Its labels keep it, the layer's blob and the layer's snapshot from
being collected:

    boxship.io/build.key            the key
    boxship.io/build.used           when it was last of use, RFC 3339
    containerd.io/gc.root           while it has this label
    containerd.io/gc.ref.content.0  the layer's blob

All records of a namespace are read once, when the first build needs them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from datetime import UTC, datetime
from typing import Any, NamedTuple

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.build.layers import Layer
from boxship.images import media
from boxship.images.service import blobs
from boxship.images.store import read, write
from boxship.images.unpack import chain_ids
from boxship.kit.errors import BoxshipError, NotFound
from boxship.oci.image import Descriptor

KEY, USED, KIND = "boxship.io/build.key", "boxship.io/build.used", "boxship.io/build.kind"
_ROOT = "containerd.io/gc.root"
_MEDIA_TYPE = "application/vnd.boxship.build.record.v1+json"
_LIMIT = 64 << 10


def key(*parts: object) -> str:
    """The hash of the parts, whatever JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Record(NamedTuple):
    """A step's result."""

    key: str
    layer: Layer | None
    """None when it changed no file."""
    created: str
    """When it was carried out, RFC 3339."""
    about: str
    """The instruction, as `docker system df -v` shows it."""
    blob: str = ""
    """Digest of the record itself."""
    used: str = ""


def now() -> str:
    """RFC 3339, in nanoseconds as Docker writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Cache:
    """The records of one namespace."""

    def __init__(self, containerd: Containerd, call: Call, snapshotter: str) -> None:
        self._containerd = containerd
        self._call = call
        self._snapshotter = snapshotter
        self._records: dict[str, Record] | None = None
        self._lock = asyncio.Lock()
        self._under_way: dict[str, asyncio.Future[None]] = {}

    async def _loaded(self) -> dict[str, Record]:
        async with self._lock:
            if self._records is None:
                found: dict[str, Record] = {}
                request = pb.content.ListContentRequest(filters=[f'labels."{KEY}"'])
                async for answer in self._containerd.content.List(request, self._call):
                    for info in answer.info:
                        try:
                            record = await self._read(info)
                        except (BoxshipError, ValueError, KeyError, TypeError):
                            continue  # of another version, or damaged: the step is carried out again
                        found[record.key] = record
                self._records = found
            return self._records

    async def _read(self, info: Any) -> Record:
        store = blobs(self._containerd.content, self._call)
        descriptor = Descriptor(media_type=_MEDIA_TYPE, digest=info.digest, size=info.size)
        value = json.loads(await read(store, descriptor, _LIMIT))
        return decode(value)._replace(blob=info.digest, used=info.labels.get(USED, ""))

    async def find(self, wanted: str) -> Record | None:
        """The result under a key, if its layer is here; what became useless is forgotten."""
        records = await self._loaded()
        record = records.get(wanted)
        if record is None:
            return None
        if record.layer is not None:
            try:
                await self._containerd.content.Info(
                    pb.content.InfoRequest(digest=record.layer.descriptor.digest), self._call)
            except NotFound:
                await self.forget(record)
                return None
        records[wanted] = record._replace(used=now())
        return record

    async def put(self, record: Record, below: list[Layer] | None, call: Call) -> Record:
        """Keep a result. `below`: the layers that its own lies on; None when they are not known here, as of an import."""
        records = await self._loaded()
        labels = {KEY: record.key, USED: now(), _ROOT: now()}
        if record.layer is not None:
            labels[f"{media.GC_CONTENT}.0"] = record.layer.descriptor.digest
        if record.layer is not None and below is not None:
            chain = chain_ids([each.diff_id for each in (*below, record.layer)])[-1]
            labels[f"{media.GC_SNAPSHOT}{self._snapshotter}"] = chain
        raw = json.dumps(encode(record)).encode()
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        await write(blobs(self._containerd.content, call), f"build-record-{secrets.token_hex(8)}", raw, digest, labels)
        made = record._replace(blob=digest, used=labels[USED])
        records[record.key] = made
        return made

    async def forget(self, record: Record) -> None:
        """Let go of a record; what only it kept is collected."""
        records = await self._loaded()
        if records.get(record.key) is record or record.key in records:
            del records[record.key]
        if record.blob:
            try:
                await self._containerd.content.Delete(pb.content.DeleteContentRequest(digest=record.blob), self._call)
            except NotFound:
                pass

    async def all(self) -> list[Record]:
        """Every record."""
        return list((await self._loaded()).values())

    async def once(self, wanted: str) -> bool:
        """Whether the caller is to carry out the step of this key now; otherwise another has just done so, or failed.

        After True `done` must be called.
        """
        other = self._under_way.get(wanted)
        if other is None:
            self._under_way[wanted] = asyncio.get_running_loop().create_future()
            return True
        await asyncio.shield(other)
        return False

    def done(self, wanted: str) -> None:
        """The step is over, well or not."""
        waiting = self._under_way.pop(wanted, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


def encode(record: Record) -> dict[str, Any]:
    """A record as JSON."""
    layer = record.layer
    return {
        "key": record.key, "created": record.created, "about": record.about,
        "layer": None if layer is None else {
            "mediaType": layer.descriptor.media_type, "digest": layer.descriptor.digest, "size": layer.descriptor.size,
            "diffID": layer.diff_id},
    }


def decode(value: Any) -> Record:
    """A record of its JSON. Raises KeyError, TypeError, and InvalidArgument for a digest that is none."""
    layer = value["layer"]
    made = None
    if layer is not None:
        made = Layer(Descriptor.decode(
            {"mediaType": layer["mediaType"], "digest": layer["digest"], "size": layer["size"]}, "layer"), str(layer["diffID"]))
    return Record(str(value["key"]), made, str(value["created"]), str(value["about"]))
