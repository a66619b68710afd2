"""What a media type says: which content it is, what it refers to, under which labels and refs containerd keeps it.

Runs in: any process that moves images.
Spec: image-spec 1.1.1; the labels of containerd's garbage collection and the names of its ingests (containerd
docs/content-flow.md, docs/garbage-collection.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from boxship.oci.image import (
    ANNOTATION_REF_NAME,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MEDIA_TYPE_CONFIG,
    MEDIA_TYPE_DOCKER_CONFIG,
    MEDIA_TYPE_DOCKER_LAYER,
    Descriptor,
    Index,
    Manifest,
)

CONFIG_TYPES = frozenset((MEDIA_TYPE_CONFIG, MEDIA_TYPE_DOCKER_CONFIG))
LEGACY_CONFIG = "application/octet-stream"

GC_CONTENT = "containerd.io/gc.ref.content"
GC_SNAPSHOT = "containerd.io/gc.ref.snapshot."
SOURCE = "containerd.io/distribution.source."
UNCOMPRESSED = "containerd.io/uncompressed"

_LAYER = "application/vnd.oci.image.layer."
_DOCKER_LAYERS = (MEDIA_TYPE_DOCKER_LAYER, "application/vnd.docker.image.rootfs.foreign.diff.tar")
_CHECKPOINT = "application/vnd.containerd.container.c"
_LABEL_MAX = 4096


def is_layer(media_type: str) -> bool:
    """A layer of a file system, compressed or not."""
    base = media_type.partition("+")[0]
    return media_type.startswith(_LAYER) or base.removesuffix(".gzip").removesuffix(".zstd") in _DOCKER_LAYERS


def is_distributable(media_type: str) -> bool:
    """Whether registries take it."""
    return not media_type.startswith((f"{_LAYER}nondistributable.", _DOCKER_LAYERS[1]))


def is_manifest(media_type: str) -> bool:
    """The manifest of one image."""
    return media_type in MANIFEST_TYPES


def is_index(media_type: str) -> bool:
    """A list of manifests."""
    return media_type in INDEX_TYPES


def is_config(media_type: str) -> bool:
    """The configuration of an image."""
    return media_type in CONFIG_TYPES or media_type.startswith(_CHECKPOINT)


def ref(descriptor: Descriptor) -> str:
    """The name of the content's ingest, the same for everybody who fetches it."""
    name = descriptor.annotations.get(ANNOTATION_REF_NAME, "")
    key = f"{name}@{descriptor.digest}" if name else descriptor.digest
    media_type = descriptor.media_type
    if is_manifest(media_type):
        return f"manifest-{key}"
    if is_index(media_type):
        return f"index-{key}"
    if is_layer(media_type):
        return f"layer-{key}"
    if is_config(media_type):
        return f"config-{key}"
    if media_type == "application/vnd.in-toto+json":
        return f"attestation-{key}"
    return f"unknown-{key}"


def children(document: Manifest | Index | None) -> list[Descriptor]:
    """What a manifest or index refers to, in order."""
    if isinstance(document, Manifest):
        return [document.config, *document.layers]
    if isinstance(document, Index):
        return list(document.manifests)
    return []


def child_labels(descriptors: Iterable[Descriptor]) -> dict[str, str]:
    """The labels that keep children from garbage collection as long as there is what they belong to."""
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    for descriptor in descriptors:
        if is_config(descriptor.media_type):
            key = f"{GC_CONTENT}.config"
        elif is_manifest(descriptor.media_type):
            key = f"{GC_CONTENT}.m."
        elif is_layer(descriptor.media_type):
            key = f"{GC_CONTENT}.l."
        else:
            key = f"{GC_CONTENT}."
        index = counts.get(key, 0)
        counts[key] = index + 1
        labels[f"{key}{index}" if index or key.endswith(".") else key] = descriptor.digest
    return labels


def source_label(known: Mapping[str, str], registry: str, repository: str) -> dict[str, str]:
    """The label that says from which repositories of a registry content came, with one more; {} when it is full."""
    key = SOURCE + _host(registry)
    repositories = {part for part in known.get(key, "").split(",") if part}
    value = ",".join(sorted(repositories | {repository}))
    return {key: value} if len(key) + len(value) <= _LABEL_MAX else {}


def mount_candidates(known: Mapping[str, str], registry: str, repository: str) -> list[str]:
    """Repositories of the registry that have the content, those nearest to `repository` first."""
    parts = repository.split("/")

    def distance(other: str) -> int:
        common = 0
        for own, its in zip(parts, other.split("/"), strict=False):
            if own != its:
                break
            common += 1
        return -common

    repositories = [part for part in known.get(SOURCE + _host(registry), "").split(",") if part and part != repository]
    return sorted(repositories, key=distance)


def _host(registry: str) -> str:
    """The registry's name without its port, as containerd has it in labels."""
    if registry.startswith("["):
        return registry[1:].partition("]")[0]
    return registry.partition(":")[0]
