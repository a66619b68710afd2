"""Images as typed structures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.oci import digest, text
from boxship.oci.image import (
    MAX_MANIFEST,
    MEDIA_TYPE_CONFIG,
    MEDIA_TYPE_DOCKER_LIST,
    MEDIA_TYPE_DOCKER_MANIFEST,
    MEDIA_TYPE_INDEX,
    MEDIA_TYPE_LAYER_GZIP,
    MEDIA_TYPE_MANIFEST,
    Descriptor,
    Image,
    ImageLayout,
    Index,
    Manifest,
    decode_manifest,
)

SHA = "sha256:" + "ab" * 32
LAYER = {"mediaType": MEDIA_TYPE_LAYER_GZIP, "digest": SHA, "size": 5}
MANIFEST: dict[str, object] = {
    "schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST, "artifactType": "application/x",
    "config": {"mediaType": MEDIA_TYPE_CONFIG, "digest": SHA, "size": 7}, "layers": [LAYER, LAYER],
    "subject": {"mediaType": MEDIA_TYPE_MANIFEST, "digest": SHA, "size": 1}, "annotations": {"a": "b"},
}  # fmt: skip
INDEX: dict[str, object] = {
    "schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX,
    "manifests": [
        {
            "mediaType": MEDIA_TYPE_MANIFEST, "digest": SHA, "size": 7, "urls": ["https://x"], "annotations": {"k": "v"},
            "data": "e30=",
            "platform": {
                "architecture": "arm", "os": "linux", "os.version": "10", "os.features": ["f"], "variant": "v7",
            },
            "artifactType": "application/y",
        },
    ],
}  # fmt: skip
IMAGE: dict[str, object] = {
    "created": "2015-10-31T22:22:56.015925234Z", "author": "A", "architecture": "arm64", "os": "linux",
    "os.version": "1", "os.features": ["f"], "variant": "v8",
    "config": {
        "User": "alice", "ExposedPorts": {"8080/tcp": {}}, "Env": ["PATH=/bin"], "Entrypoint": ["/e"], "Cmd": ["--x"],
        "Volumes": {"/var": {}}, "WorkingDir": "/w", "Labels": {"l": "m"}, "StopSignal": "SIGINT", "ArgsEscaped": True,
        "Healthcheck": {"Test": ["CMD", "true"]},
    },
    "rootfs": {"type": "layers", "diff_ids": [SHA, SHA]},
    "history": [
        {"created": "2015-10-31T22:22:54Z", "created_by": "/bin/sh", "author": "B", "comment": "c", "empty_layer": True},
    ],
}  # fmt: skip


def encoded(obj: object) -> bytes:
    return text.dumps(obj).encode()


def test_everything_is_written_back_in_the_order_of_the_specification() -> None:
    assert text.dumps(Manifest.decode(MANIFEST).encode()) == text.dumps(MANIFEST)
    assert text.dumps(Index.decode(INDEX).encode()) == text.dumps(INDEX)
    assert text.dumps(Image.decode(IMAGE).encode()) == text.dumps(IMAGE)
    assert ImageLayout.decode({"imageLayoutVersion": "1.0.0"}).encode() == {"imageLayoutVersion": "1.0.0"}


def test_only_what_docker_adds_is_extra() -> None:
    image = Image.decode(IMAGE)
    assert image.extra == image.rootfs.extra == image.history[0].extra == {}
    assert image.config.extra == {"Healthcheck": {"Test": ["CMD", "true"]}}
    manifest = Manifest.decode(MANIFEST)
    assert manifest.extra == manifest.config.extra == manifest.layers[0].extra == {}
    platform = Index.decode(INDEX).manifests[0].platform
    assert platform is not None
    assert platform.extra == {}
    assert (platform.os_version, platform.os_features) == ("10", ["f"])


def test_null_of_docker_is_absent() -> None:
    image = Image.decode(
        {"config": {"Env": None, "Labels": None, "Volumes": None, "Cmd": None}, "rootfs": {"type": "layers", "diff_ids": []}}
    )
    assert (image.config.env, image.config.labels, image.config.volumes, image.config.cmd) == ([], {}, {}, [])
    assert image.platform().architecture == ""


def test_image_knows_its_platform() -> None:
    assert Image.decode(IMAGE).platform().encode() == {
        "architecture": "arm64", "os": "linux", "os.version": "1", "os.features": ["f"], "variant": "v8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"config": None}, "config: is required"),
        ({"layers": None}, "layers: is required"),
        ({"layers": [LAYER, LAYER | {"digest": "sha256:../../etc"}]}, "layers[1].digest: invalid checksum digest length"),
        ({"layers": [LAYER | {"size": -1}]}, "layers[0].size: expected an integer from 0 to 9223372036854775807, got -1"),
    ],
)
def test_errors_name_the_place(change: dict[str, object], error: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Manifest.decode(MANIFEST | change)
    assert str(caught.value).startswith(error)


def test_manifest_and_index_are_told_apart_by_media_type() -> None:
    assert isinstance(decode_manifest(encoded(MANIFEST), MEDIA_TYPE_MANIFEST, "m"), Manifest)
    assert isinstance(decode_manifest(encoded(INDEX), MEDIA_TYPE_INDEX, "m"), Index)
    docker = {key: value for key, value in MANIFEST.items() if key != "mediaType"}
    assert isinstance(decode_manifest(encoded(docker), MEDIA_TYPE_DOCKER_MANIFEST, "m"), Manifest)
    docker_list = INDEX | {"mediaType": MEDIA_TYPE_DOCKER_LIST}
    assert isinstance(decode_manifest(encoded(docker_list), MEDIA_TYPE_DOCKER_LIST, "m"), Index)


@pytest.mark.parametrize(
    ("obj", "media_type", "words"),
    [
        (MANIFEST, MEDIA_TYPE_INDEX, "m: mediaType is"),
        (MANIFEST | {"manifests": []}, MEDIA_TYPE_MANIFEST, "m: a manifest must not have manifests"),
        (INDEX | {"layers": []}, MEDIA_TYPE_INDEX, "m: an index must not have config or layers"),
        (INDEX | {"config": {}}, MEDIA_TYPE_INDEX, "m: an index must not have config or layers"),
        (MANIFEST | {"schemaVersion": 1}, MEDIA_TYPE_MANIFEST, "m: unsupported schemaVersion 1"),
        ([], MEDIA_TYPE_MANIFEST, "m: expected an object"),
        ({}, "text/plain", 'm: unsupported media type "text/plain"'),
        (MANIFEST | {"layers": 1}, MEDIA_TYPE_MANIFEST, "m.layers: expected a list"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(obj: object, media_type: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_manifest(encoded(obj), media_type, "m")
    assert str(caught.value).startswith(words)


def test_huge_manifest_is_refused_unread() -> None:
    with pytest.raises(InvalidArgument, match=f"larger than {MAX_MANIFEST} bytes"):
        decode_manifest(b"[" * (MAX_MANIFEST + 1), MEDIA_TYPE_MANIFEST, "m")


def test_descriptor_verifies_content() -> None:
    content = b"{}"
    descriptor = Descriptor(media_type="x", digest=digest.of(content), size=2)
    descriptor.verify(content)
    with pytest.raises(InvalidArgument, match="does not match"):
        descriptor.verify(b"[]")
    with pytest.raises(InvalidArgument, match="unexpected size"):
        descriptor.verify(b"{} ")
    with pytest.raises(Unsupported, match="unsupported digest algorithm blake3"):
        Descriptor(media_type="x", digest="blake3:" + "a" * 64, size=2).verify(content)


def test_embedded_content_is_verified() -> None:
    good = Descriptor(media_type="x", digest=digest.of(b"{}"), size=2, data="e30=")
    assert good.content() == b"{}"
    assert Descriptor(media_type="x", digest=SHA, size=2).content() is None
    for data in ("W10=", "e30", "e30=\n", "%"):
        good.data = data
        with pytest.raises(InvalidArgument):
            good.content()


@pytest.mark.parametrize(
    "good",
    [SHA, "sha384:" + "0" * 96, "sha512:" + "f" * 128, "multihash+base58:QmRZxt2b1FVZPN", "blake3:ab", "a.b-c_d:=_-"],
)
def test_digests(good: str) -> None:
    assert digest.split(good) == tuple(good.split(":", 1))


@pytest.mark.parametrize(
    "bad",
    [
        "", ":", "sha256", "sha256:", "sha256:ab", SHA + "0", SHA.upper(), "sha256:" + "AB" * 32, "sha256:" + "zz" * 32,
        "SHA256:" + "ab" * 32, "a..b:x", "+a:x", "a:", ":x", "a:b/c", "a:..", "a/b:c", "a:b:c", "sha512:" + "ab" * 32, "a:é",
    ],
)  # fmt: skip
def test_what_is_no_digest_is_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid checksum digest"):
        digest.split(bad)


@given(st.text(max_size=20))
def test_a_digest_is_safe_in_a_path(anything: str) -> None:
    try:
        parts = digest.split(anything)
    except BoxshipError:
        return
    assert not any("/" in part or "\0" in part or part in ("", ".", "..") for part in parts)


def test_unknown_algorithm_cannot_be_computed() -> None:
    assert digest.of(b"", "sha512").startswith("sha512:cf83e135")
    with pytest.raises(Unsupported):
        digest.of(b"", "md5")
