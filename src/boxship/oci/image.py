"""Images: descriptor, manifest, index, configuration and layout, as typed structures.

Runs in: whatever reads or writes images.
Spec: image-spec 1.1.1; Docker's own media types of the same shapes (manifest v2 schema 2) are accepted beside them.
What Docker adds to the configuration (Healthcheck, OnBuild, Shell ...) is kept in `ImageConfig.extra`.
Not here: registries, blobs and their storage.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument
from boxship.oci import digest, text
from boxship.oci.struct import ZERO, Struct, i64, size64

Digest = str
CHECKS = {"Digest": digest.check}

MEDIA_TYPE_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_TYPE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_TYPE_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_TYPE_EMPTY = "application/vnd.oci.empty.v1+json"
MEDIA_TYPE_LAYOUT = "application/vnd.oci.layout.header.v1+json"
MEDIA_TYPE_LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_TYPE_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_TYPE_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
MEDIA_TYPE_DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MEDIA_TYPE_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MEDIA_TYPE_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
MEDIA_TYPE_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MEDIA_TYPE_DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

INDEX_TYPES = frozenset((MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST))
MANIFEST_TYPES = frozenset((MEDIA_TYPE_MANIFEST, MEDIA_TYPE_DOCKER_MANIFEST))

ANNOTATION_REF_NAME = "org.opencontainers.image.ref.name"

LAYOUT_FILE = "oci-layout"
LAYOUT_VERSION = "1.0.0"
LAYOUT_INDEX = "index.json"
LAYOUT_BLOBS = "blobs"

MAX_MANIFEST = 4 << 20
"""Bytes of a manifest or index that registries are asked to take (distribution-spec); larger ones are refused here."""


class Platform(Struct):
    """What an image runs on, in Go's names (GOOS, GOARCH)."""

    _wire = {"os_version": "os.version", "os_features": "os.features"}
    _always = ("architecture", "os")
    architecture: str = ""
    os: str = ""
    os_version: str = ""
    os_features: list[str] = []
    variant: str = ""


class Descriptor(Struct):
    """Where content is by digest, and what it is."""

    media_type: str
    digest: Digest
    size: size64
    urls: list[str] = []
    annotations: dict[str, str] = {}
    data: str = ""
    platform: Platform | None = None
    artifact_type: str = ""

    def content(self) -> bytes | None:
        """The content itself where `data` embeds it, verified; raises InvalidArgument when it is not that content."""
        if not self.data:
            return None
        import binascii

        try:
            found = binascii.a2b_base64(self.data, strict_mode=True)
        except binascii.Error:
            raise InvalidArgument("descriptor: data is not base64") from None
        self.verify(found)
        return found

    def verify(self, content: bytes) -> None:
        """Raises InvalidArgument when `content` is not what this describes, Unsupported when that cannot be told."""
        if len(content) != self.size:
            raise InvalidArgument(f"unexpected size of {self.digest}: {len(content)} bytes, expected {self.size}")
        hasher = digest.hasher(self.digest)
        hasher.update(content)
        if hasher.hexdigest() != digest.split(self.digest)[1]:
            raise InvalidArgument(f"content does not match digest {self.digest}")


class Manifest(Struct):
    """One image (or artifact): its configuration and layers, bottom-most first."""

    schema_version: i64
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class Index(Struct):
    """A list of manifests, usually one for each platform."""

    schema_version: i64
    media_type: str = ""
    artifact_type: str = ""
    manifests: list[Descriptor]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class ImageConfig(Struct):
    """Defaults of a container that is made of the image."""

    _wire = {
        "user": "User", "exposed_ports": "ExposedPorts", "env": "Env", "entrypoint": "Entrypoint", "cmd": "Cmd",
        "volumes": "Volumes", "working_dir": "WorkingDir", "labels": "Labels", "stop_signal": "StopSignal",
        "args_escaped": "ArgsEscaped",
    }
    user: str = ""
    exposed_ports: dict[str, object] = {}
    env: list[str] = []
    entrypoint: list[str] = []
    cmd: list[str] = []
    volumes: dict[str, object] = {}
    working_dir: str = ""
    labels: dict[str, str] = {}
    stop_signal: str = ""
    args_escaped: bool = False


class RootFS(Struct):
    """The layers by the digests of their uncompressed tars, bottom-most first."""

    _wire = {"diff_ids": "diff_ids"}
    type: str
    diff_ids: list[Digest]


class History(Struct):
    """How a layer came about; `created` as in RFC 3339."""

    _wire = {"created_by": "created_by", "empty_layer": "empty_layer"}
    created: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class Image(Struct):
    """The configuration blob of an image; its digest is the image's id."""

    _wire = {"os_version": "os.version", "os_features": "os.features"}
    _always = ("architecture", "os")
    created: str = ""
    author: str = ""
    architecture: str = ""
    os: str = ""
    os_version: str = ""
    os_features: list[str] = []
    variant: str = ""
    config: ImageConfig = ZERO
    rootfs: RootFS
    history: list[History] = []

    def platform(self) -> Platform:
        """What the image runs on."""
        return Platform(
            architecture=self.architecture, os=self.os, os_version=self.os_version,
            os_features=list(self.os_features), variant=self.variant,
        )


class ImageLayout(Struct):
    """The file `oci-layout` at the root of an image layout."""

    image_layout_version: str


def decode_manifest(data: bytes, media_type: str, name: str) -> Manifest | Index:
    """The manifest or index in `data`, which came under `media_type` (from a descriptor or a Content-Type).

    A document that can be read as both is refused, and one that calls itself something else than `media_type` too:
    otherwise one digest could name two images (CVE-2021-41190). Raises InvalidArgument.
    """
    if len(data) > MAX_MANIFEST:
        raise InvalidArgument(f"{name}: larger than {MAX_MANIFEST} bytes")
    obj = text.loads(data, name)
    if not isinstance(obj, dict):
        raise InvalidArgument(f"{name}: expected an object")
    own = obj.get("mediaType")
    if own not in (None, "", media_type):
        raise InvalidArgument(f"{name}: mediaType is {text.dumps(own)}, expected {text.dumps(media_type)}")
    if media_type in INDEX_TYPES:
        if "config" in obj or "layers" in obj:
            raise InvalidArgument(f"{name}: an index must not have config or layers")
        made: Manifest | Index = Index.decode(obj, name)
    elif media_type in MANIFEST_TYPES:
        if "manifests" in obj or "fsLayers" in obj:
            raise InvalidArgument(f"{name}: a manifest must not have manifests or fsLayers")
        made = Manifest.decode(obj, name)
    else:
        raise InvalidArgument(f"{name}: unsupported media type {text.dumps(media_type)}")
    if made.schema_version != 2:
        raise InvalidArgument(f"{name}: unsupported schemaVersion {made.schema_version}")
    return made
