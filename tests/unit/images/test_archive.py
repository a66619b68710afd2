"""Archives of every form come in, damaged and hostile ones do not, and what goes out comes in again."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from boxship.images import archive, platforms
from boxship.images.archive import Imported, Source, clean
from boxship.images.export import Saved, export
from boxship.images.store import LocalBlobs
from boxship.images.transfer import name_of
from boxship.kit.errors import BoxshipError, DataLoss, InvalidArgument, NotFound
from boxship.oci.image import Descriptor
from support.archives import OCI_LAYER, Layout, config, digest_of, layer, old_docker, tarball
from support.blobs import MemoryStore

ONE, TWO = layer(etc__one=b"1" * 2000), layer(etc__two=b"2")
BIG = layer(big=os.urandom(3_000_000))


async def pieces(data: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin:begin + size]


def load(store: MemoryStore, data: bytes | Source, **options: object) -> Imported:
    source = pieces(data) if isinstance(data, bytes) else data
    return asyncio.run(archive.load(LocalBlobs(store), source, **options))


def names(imported: Imported) -> list[str]:
    return [name_of(each) for each in imported.manifests]


def layers_of(store: MemoryStore, target: Descriptor) -> list[bytes]:
    return [store.blobs[each["digest"]] for each in json.loads(store.blobs[target.digest])["layers"]]


def refused(data: bytes, kind: type[BoxshipError], said: str) -> MemoryStore:
    """Loading fails with these words, and leaves no ingest and no blob that is not its digest."""
    store = MemoryStore()
    with pytest.raises(kind, match=said):
        load(store, data)
    assert not store.ingests and not store.busy
    assert all(digest_of(blob) == digest for digest, blob in store.blobs.items())
    return store


# What comes in.


@pytest.mark.parametrize("order", [None, lambda members: members[::-1], lambda members: sorted(members, key=lambda m: str(m[1])[:9])])
def test_an_old_docker_archive_in_any_order(order: Callable[[list[object]], list[object]] | None) -> None:
    store = MemoryStore()
    imported = load(store, old_docker([(["app:1", "example.com/x/app:2"], [ONE, TWO]), ([], [BIG])], order))
    assert names(imported) == ["docker.io/library/app:1", "example.com/x/app:2", ""]
    assert layers_of(store, imported.manifests[0]) == [ONE, TWO]
    assert layers_of(store, imported.manifests[2]) == [BIG]
    assert imported.manifests[0].platform == platforms.parse("linux/amd64")
    assert json.loads(store.blobs[imported.index.digest])["manifests"][0]["digest"] == imported.manifests[0].digest


def test_layers_that_are_links_to_others() -> None:
    store = MemoryStore()
    imported = load(store, old_docker([(["a:1"], [ONE, TWO]), (["b:1"], [ONE, BIG])], link=True))
    assert layers_of(store, imported.manifests[1]) == [ONE, BIG]
    data = config([ONE])
    members = [("c.json", data), ("real.tar", ONE), ("hard.tar", "=> real.tar"), ("dir/soft.tar", "-> ../hard.tar"),
               ("manifest.json", json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": ["dir/soft.tar"]}]).encode())]
    assert layers_of(store, load(store, tarball(members)).manifests[0]) == [ONE]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:])])
def test_compression_around_everything(pack: Callable[[bytes], bytes]) -> None:
    store = MemoryStore()
    assert layers_of(store, load(store, pack(old_docker([(["app:1"], [BIG])]))).manifests[0]) == [BIG]


@pytest.mark.parametrize(("pack", "kind"), [
    (lambda data: data, "application/vnd.docker.image.rootfs.diff.tar"), (gzip.compress, "application/vnd.docker.image.rootfs.diff.tar.gzip"),
    (zstandard.compress, "application/vnd.docker.image.rootfs.diff.tar.zstd"),
])
def test_layers_of_a_docker_archive_get_the_media_type_that_they_are(pack: Callable[[bytes], bytes], kind: str) -> None:
    store = MemoryStore()
    members = [("c.json", config([ONE])), ("l.tar", pack(ONE)), ("manifest.json", json.dumps([{"Config": "c.json", "Layers": ["l.tar"]}]).encode())]
    [target] = load(store, tarball(members)).manifests
    assert json.loads(store.blobs[target.digest])["layers"][0]["mediaType"] == kind


def test_plain_layers_are_compressed_when_asked() -> None:
    store = MemoryStore()
    [target] = load(store, old_docker([(["app:1"], [BIG])]), compress=True).manifests
    [entry] = json.loads(store.blobs[target.digest])["layers"]
    assert entry["mediaType"].endswith("gzip")
    assert gzip.decompress(store.blobs[entry["digest"]]) == BIG
    assert store.tags[entry["digest"]]["containerd.io/uncompressed"] == digest_of(BIG)
    again = MemoryStore()
    assert load(again, old_docker([(["app:1"], [BIG])]), compress=True).manifests[0].digest == target.digest


def test_a_layout_with_all_that_belongs_to_it() -> None:
    layout = Layout()
    both = [layout.image([ONE], architecture=name) for name in ("amd64", "arm64")]
    layout.name(layout.index(both), "1", "example.com/app:1")
    layout.name(layout.image([TWO], gzip.compress, OCI_LAYER + "+gzip"), "quay.io/other:2")
    layout.name(layout.image([BIG]), "only-a-tag")
    layout.name(layout.image([ONE, TWO]))
    store = MemoryStore()
    imported = load(store, layout.tar())
    assert names(imported) == ["example.com/app:1", "quay.io/other:2", "", ""]
    assert {path.rpartition("/")[2] for path in layout.blobs} <= {digest[7:] for digest in store.blobs}
    labels = store.tags[imported.manifests[0].digest]
    assert sorted(labels.values()) == sorted(each["digest"] for each in both)
    assert "containerd.io/gc.ref.content.l.0" in store.tags[both[1]["digest"]]


def test_dockers_names_for_a_layout_without_names() -> None:
    layout = Layout()
    image = layout.image([ONE])
    layout.name(image)
    entry = next(path for path, data in layout.blobs.items() if data == config([ONE]))
    layout.docker.append({"Config": entry, "RepoTags": ["app:1", "app:2"], "Layers": []})
    assert names(load(MemoryStore(), layout.tar())) == ["docker.io/library/app:1", "docker.io/library/app:2"]


def test_an_index_may_name_platforms_that_were_not_saved() -> None:
    layout = Layout()
    here, away = layout.image([ONE]), layout.image([TWO], architecture="arm64")
    layout.name(layout.index([here, away]), "app:1")
    del layout.blobs[f"blobs/sha256/{away['digest'][7:]}"]
    store = MemoryStore()
    assert names(load(store, layout.tar())) == ["docker.io/library/app:1"]
    assert away["digest"] not in store.blobs


def test_a_layout_in_a_directory(tmp_path: Path) -> None:
    layout = Layout()
    layout.name(layout.index([layout.image([BIG])]), "app:1")
    with tarfile.open(fileobj=io.BytesIO(layout.tar())) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "blobs/sha256/junk").write_text("not named")
    store = MemoryStore()
    assert names(load(store, str(tmp_path))) == ["docker.io/library/app:1"]
    assert sorted(store.blobs.values()) == sorted([*layout.blobs.values(), (tmp_path / "index.json").read_bytes()])
    path = tmp_path / "blobs/sha256" / digest_of(BIG)[7:]
    path.write_bytes(BIG[:-1] + b"x")
    with pytest.raises(DataLoss, match="does not match"):
        load(MemoryStore(), str(tmp_path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InvalidArgument, match="no regular file"):
        load(MemoryStore(), str(tmp_path))
    path.unlink()
    with pytest.raises(InvalidArgument, match="missing"):
        load(MemoryStore(), str(tmp_path))


def test_a_file_by_path_and_by_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar"
    path.write_bytes(b"skipped" + old_docker([(["app:1"], [BIG])]))
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 7, os.SEEK_SET)
    assert names(load(MemoryStore(), fd)) == ["docker.io/library/app:1"]
    os.close(fd)
    path.write_bytes(old_docker([(["app:1"], [BIG])]))
    assert names(load(MemoryStore(), str(path))) == ["docker.io/library/app:1"]


def test_content_that_is_there_is_not_written_again() -> None:
    layout = Layout()
    layout.name(layout.image([BIG]), "app:1")
    store = MemoryStore()
    store.add(BIG)
    written: list[str] = []
    writer = store.writer
    store.writer = lambda ref, total=0, expected="": written.append(ref) or writer(ref, total, expected)
    load(store, layout.tar())
    before = len(written)
    load(store, layout.tar())
    assert not store.ingests
    assert len(written) - before <= len(layout.blobs)


def test_a_cancelled_load_leaves_nothing_half_done() -> None:
    store = MemoryStore()
    data = old_docker([(["app:1"], [BIG])])

    async def slow() -> AsyncIterator[bytes]:
        yield data[:1_000_000]
        await asyncio.sleep(60)

    async def run() -> None:
        task = asyncio.ensure_future(archive.load(LocalBlobs(store), slow()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.get_running_loop().time() - begin < 5

    begin = time.monotonic()
    asyncio.run(run())
    assert not store.ingests and not store.busy


def test_many_at_once_do_not_wait_for_one_another() -> None:
    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        data = old_docker([(["app:1"], [ONE])])
        async with asyncio.timeout(10):
            found = await asyncio.gather(*(archive.load(LocalBlobs(MemoryStore()), pieces(data)) for _ in range(20)))
        assert len(found) == 20

    asyncio.run(run())


# What does not.


@pytest.mark.parametrize("name", ["../evil.tar", "/etc/passwd", "a/../../evil", "blobs/sha256/../../../evil"])
def test_names_that_point_outside_are_refused(name: str) -> None:
    refused(tarball([(name, b"x"), ("manifest.json", b"[]")]), InvalidArgument, "points outside")


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd"])
def test_links_that_point_outside_are_refused(target: str) -> None:
    refused(tarball([("dir/layer.tar", f"-> {target}"), ("manifest.json", b"[]")]), InvalidArgument, "points outside")


def test_links_in_a_circle_are_refused() -> None:
    manifest = json.dumps([{"Config": "a", "Layers": []}]).encode()
    refused(tarball([("a", "-> b"), ("b", "-> a"), ("manifest.json", manifest)]), InvalidArgument, "circle")


@pytest.mark.parametrize(("data", "said"), [
    (b"", "empty"), (bytes(10_240), "empty"), (tarball([("x", b"y")]), "unrecognized image format.*it has x"), (b"<html>" * 300, "checksum|header"),
    (tarball([("manifest.json", b"{}")]), "expected a list"), (tarball([("manifest.json", b"[1]")]), "expected objects"),
    (tarball([("manifest.json", b'[{"Config":1}]')]), "expected a string"), (tarball([("manifest.json", b'[{"Config":"c","Layers":[]}]')]), "'c' not found"),
    (tarball([("oci-layout", b'{"imageLayoutVersion":"2.0.0"}')]), "unsupported OCI version"), (tarball([("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')]), "missing index.json"),
    (tarball([("c", config([])), ("manifest.json", b'[{"Config":"c","Layers":["gone"]}]')]), "'gone' not found"),
    (tarball([("c", b"[]"), ("manifest.json", b'[{"Config":"c","Layers":[]}]')]), "expected an object"),
    (tarball([("c", config([])), ("manifest.json", b'[{"Config":"c","Layers":[],"RepoTags":["UPPER:1"]}]')]), "lowercase"),
    (tarball([("c", config([ONE, TWO])), ("l", ONE), ("manifest.json", b'[{"Config":"c","Layers":["l"]}]')]), "2 diff ids, 1 layers"),
])
def test_what_is_no_archive_of_images_is_refused(data: bytes, said: str) -> None:
    refused(data, InvalidArgument, said)


@pytest.mark.parametrize("cut", [600, 5_000, 1_000_000, 3_000_600])
def test_a_truncated_archive_is_refused(cut: int) -> None:
    refused(old_docker([(["app:1"], [BIG])])[:cut], InvalidArgument, "end|ends|unrecognized")
    refused(gzip.compress(old_docker([(["app:1"], [BIG])]), 1)[:cut], InvalidArgument, "end|ends|unrecognized")


def test_a_source_is_read_to_its_end_and_checked_to_its_end() -> None:
    data = old_docker([(["app:1"], [ONE])]) + bytes(100_000)
    left = [data[begin:begin + 4096] for begin in range(0, len(data), 4096)]

    async def source() -> AsyncIterator[bytes]:
        while left:
            yield left.pop(0)

    load(MemoryStore(), source())
    assert not left
    packed = gzip.compress(data)
    refused(packed[:-8] + bytes(8), InvalidArgument, "gzip")


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_decompression_bomb_is_stopped(pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BOMB_FREE", 1 << 20)
    data = pack(tarball([("layer.tar", bytes(50 << 20))]))
    store = refused(data, InvalidArgument, "decompression bomb")
    assert not store.blobs


def test_a_layer_that_is_not_the_images_is_refused() -> None:
    members = [("c", config([ONE])), ("l", TWO), ("manifest.json", b'[{"Config":"c","Layers":["l"]}]')]
    refused(tarball(members), DataLoss, "not the one that the image names")


def changed(change: Callable[[Layout], None]) -> bytes:
    layout = Layout()
    layout.name(layout.image([BIG]), "app:1")
    change(layout)
    return layout.tar()


def test_a_blob_that_is_not_its_name_is_refused() -> None:
    def change(layout: Layout) -> None:
        layout.blobs[f"blobs/sha256/{digest_of(BIG)[7:]}"] = BIG[:-1] + b"x"

    store = refused(changed(change), DataLoss, "does not match its digest")
    assert digest_of(BIG) not in store.blobs


def test_a_layer_that_is_missing_is_named() -> None:
    refused(changed(lambda layout: layout.blobs.pop(f"blobs/sha256/{digest_of(BIG)[7:]}")), InvalidArgument, f"{digest_of(BIG)} is missing")


def test_a_manifest_that_lies_about_sizes_is_found_out() -> None:
    layout = Layout()
    image = layout.image([BIG])
    data = layout.blobs.pop(f"blobs/sha256/{image['digest'][7:]}").replace(f'"size": {len(BIG)}'.encode(), b'"size": 12345')
    layout.name(layout.blob(image["mediaType"], data))
    refused(layout.tar(), DataLoss, f"has {len(BIG)} bytes, the manifest says 12345")


def test_a_layouts_plain_layer_that_is_not_the_images_is_refused() -> None:
    layout = Layout()
    image = layout.image([ONE])
    document = json.loads(layout.blobs[f"blobs/sha256/{image['digest'][7:]}"])
    document["layers"] = [layout.blob(OCI_LAYER, TWO)]
    layout.name(layout.blob(image["mediaType"], json.dumps(document).encode()))
    refused(layout.tar(), DataLoss, "not the one that the image names")


def test_a_document_without_end_is_not_read() -> None:
    header = tarfile.TarInfo("manifest.json")
    header.size = 1 << 40
    refused(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_240), InvalidArgument, "at most")


def test_names_are_brought_into_one_form() -> None:
    assert clean("./a//b/./c/../d/") == "a/b/d"
    assert clean("./") == ""


# What goes out.


def save(store: MemoryStore, images: list[Saved], **options: object) -> bytes:
    async def run() -> bytes:
        return b"".join([piece async for piece in export(LocalBlobs(store), images, **options)])

    return asyncio.run(run())


@pytest.fixture
def stored() -> tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]:
    """A store with an index of two platforms, and a single image; the index, the image, the platforms' manifests."""
    layout = Layout()
    both = [layout.image([ONE], architecture="arm64"), layout.image([BIG, ONE], gzip.compress, OCI_LAYER + "+gzip")]
    layout.name(layout.index(both))
    layout.name(layout.image([TWO]))
    store = MemoryStore()
    imported = load(store, layout.tar())
    return store, imported.manifests[0], imported.manifests[1], both


def members_of(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {each.name: tar.extractfile(each).read() if each.isfile() else b"" for each in tar}


def test_what_is_saved_is_loaded_again(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, index, image, _ = stored
    data = save(store, [Saved(index, ["docker.io/library/app:1", "docker.io/library/app:2"]), Saved(image, ["example.com/x:3"]), Saved(image, [])])
    again = MemoryStore()
    imported = load(again, data)
    assert names(imported) == ["docker.io/library/app:1", "docker.io/library/app:2", "example.com/x:3"]
    assert [each.digest for each in imported.manifests] == [index.digest, index.digest, image.digest]
    for digest, blob in again.blobs.items():
        assert store.blobs.get(digest, blob) == blob


def test_the_same_images_make_the_same_bytes(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, index, image, _ = stored
    saved = [Saved(index, ["docker.io/library/app:1"]), Saved(image, ["example.com/x:3"])]
    data = save(store, saved)
    assert save(store, saved) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {(each.mtime, each.uid, each.gid, each.uname) for each in tar} == {(0, 0, 0, "")}
        assert [each.name for each in tar][:4] == ["oci-layout", "index.json", "manifest.json", "repositories"]


def test_docker_is_told_of_one_image_for_each_index(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, index, image, both = stored
    data = save(store, [Saved(index, ["docker.io/library/app:1"]), Saved(image, ["example.com/x:3"])], wanted=[platforms.parse("linux/amd64"), platforms.parse("linux/arm64")])
    first, second = json.loads(members_of(data)["manifest.json"])
    assert (first["RepoTags"], second["RepoTags"]) == (["app:1"], ["example.com/x:3"])
    config_of = json.loads(store.blobs[str(both[1]["digest"])])["config"]["digest"]
    assert first["Config"] == "blobs/sha256/" + config_of[7:]
    assert len(first["Layers"]) == 2
    assert json.loads(members_of(data)["repositories"])["app"]["1"] == first["Layers"][-1].rpartition("/")[2]
    docker_only = {name: blob for name, blob in members_of(data).items() if name not in ("oci-layout", "index.json")}
    again = MemoryStore()
    imported = load(again, tarball(list(docker_only.items())))
    assert names(imported) == ["docker.io/library/app:1", "example.com/x:3"]


def test_one_platform_is_saved_as_an_image_of_its_own(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, index, _, both = stored
    data = save(store, [Saved(index, ["docker.io/library/app:1"])], wanted=[platforms.parse("linux/arm64")])
    [entry] = json.loads(members_of(data)["index.json"])["manifests"]
    assert entry["digest"] == both[0]["digest"]
    assert f"blobs/sha256/{index.digest[7:]}" not in members_of(data)
    kept = save(store, [Saved(index, ["docker.io/library/app:1"])], wanted=[platforms.parse("linux/arm64")], keep_index=True)
    [entry] = json.loads(members_of(kept)["index.json"])["manifests"]
    assert entry["digest"] == index.digest
    assert names(load(MemoryStore(), kept)) == ["docker.io/library/app:1"]
    assert f"blobs/sha256/{both[1]['digest'][7:]}" not in members_of(kept)
    with pytest.raises(NotFound, match="no image of it"):
        save(store, [Saved(index)], wanted=[platforms.parse("linux/s390x")])


def test_missing_content_is_noticed_before_the_first_byte(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, index, _, both = stored
    del store.blobs[json.loads(store.blobs[str(both[0]["digest"])])["layers"][0]["digest"]]

    async def first(wanted: object) -> bytes:
        return await anext(export(LocalBlobs(store), [Saved(index)], wanted=wanted))

    with pytest.raises(NotFound, match="not found"):
        asyncio.run(first([]))
    assert asyncio.run(first(None))
    assert asyncio.run(first([platforms.parse("linux/amd64")]))


def test_damaged_content_does_not_end_as_an_archive(stored: tuple[MemoryStore, Descriptor, Descriptor, list[dict[str, object]]]) -> None:
    store, _, image, _ = stored
    digest = digest_of(TWO)
    store.blobs[digest] = store.blobs[digest][:-1] + b"x"
    with pytest.raises(DataLoss, match=digest):
        save(store, [Saved(image)])


# Root file systems.


@pytest.mark.parametrize(("pack", "kind"), [(lambda data: data, "tar"), (gzip.compress, "tar+gzip"), (zstandard.compress, "tar+zstd")])
def test_a_root_file_system_becomes_an_image(pack: Callable[[bytes], bytes], kind: str) -> None:
    store = MemoryStore()
    packed = pack(BIG)
    target = asyncio.run(archive.import_rootfs(
        LocalBlobs(store), pieces(packed), platform=platforms.parse("linux/arm64/v8"), config={"Cmd": ["/init"]}, created="2020-01-01T00:00:00Z", message="hello",
    ))
    manifest = json.loads(store.blobs[target.digest])
    assert manifest["layers"][0]["mediaType"].endswith(f".{kind}")
    assert store.blobs[manifest["layers"][0]["digest"]] == packed
    image = json.loads(store.blobs[manifest["config"]["digest"]])
    assert image["rootfs"]["diff_ids"] == [digest_of(BIG)]
    assert (image["architecture"], image["config"], image["history"][0]["comment"]) == ("arm64", {"Cmd": ["/init"]}, "hello")
    assert store.tags[manifest["layers"][0]["digest"]]["containerd.io/uncompressed"] == digest_of(BIG)


@pytest.mark.parametrize("data", [b"", b"no tar" * 500, gzip.compress(b"no tar" * 500), gzip.compress(BIG)[:100_000], BIG[:100_000]])
def test_what_is_no_root_file_system_is_refused(data: bytes) -> None:
    store = MemoryStore()
    with pytest.raises(InvalidArgument):
        asyncio.run(archive.import_rootfs(LocalBlobs(store), pieces(data)))
    assert not store.ingests and not store.busy and not store.blobs
