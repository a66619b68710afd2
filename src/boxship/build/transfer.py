"""The cache in registries: what the steps of a build came to, as an artifact that another machine takes results from.

Runs in: the daemon, on its event loop.
Spec: image-spec 1.1.1, manifest.md (artifacts). The manifest's configuration is the list of records, its layers are theirs.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence

from boxship.api.containerd.call import Call
from boxship.build.cache import Cache, Record, decode, encode
from boxship.build.layers import Layers
from boxship.images import media
from boxship.images.auth import CredentialSource
from boxship.images.store import read, write
from boxship.images.transfer import Images
from boxship.kit.errors import InvalidArgument, Unsupported
from boxship.oci.image import MAX_MANIFEST, MEDIA_TYPE_MANIFEST, Descriptor, Manifest, decode_manifest

CONFIG_TYPE = "application/vnd.boxship.build.cache.v1+json"
_LIMIT = 64 << 20


def reference_of(word: str) -> str:
    """The name in `--cache-from` or `--cache-to`: type=registry,ref=NAME, or the name alone.

    Raises Unsupported, InvalidArgument.
    """
    if "=" not in word:
        return word
    fields = dict(each.partition("=")[::2] for each in word.split(","))
    if fields.get("type", "registry") != "registry":
        raise Unsupported(f"a cache of type {fields['type']}", "use type=registry,ref=NAME")
    if not fields.get("ref"):
        raise InvalidArgument(f"cache {word}: ref is missing")
    return fields["ref"]


async def export(
    images: Images, layers: Layers, records: Sequence[Record], name: str, credentials: CredentialSource | None,
) -> Descriptor:
    """Push the records and their layers as `name`. Raises what registries raise."""
    unique = {record.key: record for record in records}
    raw = json.dumps({"records": [encode(unique[key]) for key in sorted(unique)]}, separators=(",", ":")).encode()
    config = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    await write(layers.blobs, f"build-{secrets.token_hex(8)}", raw, config)
    found = {record.layer.descriptor.digest: record.layer.descriptor for record in records if record.layer is not None}
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST, "artifactType": CONFIG_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": config, "size": len(raw)},
        "layers": [{"mediaType": each.media_type, "digest": each.digest, "size": each.size} for each in found.values()],
    }, separators=(",", ":")).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    labels = {f"{media.GC_CONTENT}.config": config} | {
        f"{media.GC_CONTENT}.l.{index}": each for index, each in enumerate(found)}
    await write(layers.blobs, f"build-{secrets.token_hex(8)}", manifest, digest, labels)
    target = Descriptor(media_type=MEDIA_TYPE_MANIFEST, digest=digest, size=len(manifest))
    return await images.push(name, layers.call, target=target, credentials=credentials)


async def import_(
    images: Images, layers: Layers, cache: Cache, name: str, credentials: CredentialSource | None,
) -> int:
    """Fetch the records under `name` and their layers into the cache: how many were new. Raises InvalidArgument for an image."""

    async def unnamed(_target: Descriptor, _call: Call) -> None:
        """The records themselves keep what was fetched."""

    target = await images.pull(name, layers.call, wanted=(), unpack=False, credentials=credentials, record=unnamed)
    document = decode_manifest(await read(layers.blobs, target, MAX_MANIFEST), target.media_type, name)
    if not isinstance(document, Manifest) or document.config.media_type != CONFIG_TYPE:
        raise InvalidArgument(f"{name} is an image, and holds no cache", "export one by --cache-to type=registry,ref=NAME")
    count = 0
    for value in json.loads(await read(layers.blobs, document.config, _LIMIT))["records"]:
        record = decode(value)
        if await cache.find(record.key) is None:
            await cache.put(record, None, layers.call)
            count += 1
    return count
