"""A stage's last state as an image: its configuration and its manifest in the content store.

Runs in: the daemon, on its event loop.
Spec: image-spec 1.1.1, manifest.md, config.md; the labels of containerd's garbage collection.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from boxship.build.layers import Layers
from boxship.build.state import State
from boxship.images import media
from boxship.images.store import write
from boxship.oci.image import MEDIA_TYPE_CONFIG, MEDIA_TYPE_MANIFEST, Descriptor


class Built(NamedTuple):
    """An image that was written."""

    id: str
    """Digest of the configuration."""
    target: Descriptor


async def write_image(layers: Layers, state: State, annotations: Mapping[str, str] | None = None) -> Built:
    """Write configuration and manifest. The same state makes the same image."""
    raw = json.dumps(state.document(), separators=(",", ":"), ensure_ascii=False).encode()
    config = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    there = state.chain and await layers.exists(state.chain)
    snapshot = {f"{media.GC_SNAPSHOT}{layers.snapshotter}": state.chain} if there else {}
    await write(layers.blobs, f"build-{secrets.token_hex(8)}", raw, config, snapshot)
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST,
        "config": {"mediaType": MEDIA_TYPE_CONFIG, "digest": config, "size": len(raw)},
        "layers": [
            {"mediaType": each.descriptor.media_type, "digest": each.descriptor.digest, "size": each.descriptor.size}
            for each in state.layers
        ],
        **({"annotations": dict(annotations)} if annotations else {}),
    }, separators=(",", ":")).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    labels = {f"{media.GC_CONTENT}.config": config} | {
        f"{media.GC_CONTENT}.l.{index}": each.descriptor.digest for index, each in enumerate(state.layers)}
    await write(layers.blobs, f"build-{secrets.token_hex(8)}", manifest, digest, labels)
    return Built(config, Descriptor(media_type=MEDIA_TYPE_MANIFEST, digest=digest, size=len(manifest)))
