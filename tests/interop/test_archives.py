"""Archives and layouts between us and skopeo, umoci, podman, docker and ctr: what they write we read, what we write they read."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from boxship.images import archive
from boxship.images.archive import Imported
from boxship.images.export import Saved, export
from boxship.images.store import LocalBlobs
from boxship.images.transfer import name_of
from boxship.oci.image import Descriptor
from support.archives import OCI_LAYER, Layout, digest_of, layer, old_docker
from support.blobs import MemoryStore
from support.peers import needs
from support.stage import Stage

ONE, TWO = layer(etc__one=b"1" * 2000, bin__x=os.urandom(400_000)), layer(etc__two=b"2")
NAME = "example.com/app:1"


def load(path: Path) -> tuple[MemoryStore, Imported]:
    store = MemoryStore()
    imported = asyncio.run(archive.load(LocalBlobs(store), str(path)))
    assert not store.ingests and not store.busy
    return store, imported


async def stream(data: bytes) -> AsyncIterator[bytes]:
    yield data


def save(path: Path, store: MemoryStore, images: list[Saved], **options: object) -> None:
    async def run() -> None:
        with open(path, "wb") as file:
            async for piece in export(LocalBlobs(store), images, **options):
                file.write(piece)

    asyncio.run(run())


def layers_of(store: MemoryStore, target: Descriptor) -> list[bytes]:
    """The uncompressed layers of an image, or of the only one of an index."""
    document = json.loads(store.blobs[target.digest])
    if "manifests" in document:
        [only] = document["manifests"]
        document = json.loads(store.blobs[only["digest"]])
    found = [store.blobs[each["digest"]] for each in document["layers"]]
    return [gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in found]


def tool(*words: str | Path) -> str:
    """What a tool prints; a failure fails the test."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def skopeo(*words: str | Path) -> str:
    return tool("skopeo", "--insecure-policy", *words)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An archive of one image that every tool reads, as Docker wrote it before 25."""
    path = tmp_path / "image.tar"
    path.write_bytes(old_docker([([NAME], [ONE, TWO])]))
    return path


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, MemoryStore, Descriptor]:
    """An archive that we wrote, of one image with compressed layers."""
    layout = Layout()
    layout.name(layout.image([ONE, TWO], lambda data: gzip.compress(data, mtime=0), OCI_LAYER + "+gzip"), "1", NAME)
    path = tmp_path / "layout.tar"
    path.write_bytes(layout.tar())
    store, imported = load(path)
    target = imported.manifests[0]
    save(tmp_path / "ours.tar", store, [Saved(target, [NAME])])
    return tmp_path / "ours.tar", store, target


# skopeo.


@pytest.mark.parametrize("to", ["docker-archive:{}/out.tar:" + NAME, "oci-archive:{}/out.tar:" + NAME])
def test_archives_that_skopeo_writes(image: Path, tmp_path: Path, to: str) -> None:
    needs("skopeo")
    skopeo("copy", f"docker-archive:{image}", to.format(tmp_path))
    store, imported = load(tmp_path / "out.tar")
    assert [name_of(each) for each in imported.manifests] == [NAME]
    assert layers_of(store, imported.manifests[0]) == [ONE, TWO]


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_layouts_that_skopeo_writes(image: Path, tmp_path: Path, form: str) -> None:
    needs("skopeo")
    skopeo("copy", "--dest-compress-format", form, f"docker-archive:{image}", f"oci:{tmp_path}/layout:{NAME}")
    store, imported = load(tmp_path / "layout")
    [target] = imported.manifests
    assert json.loads(store.blobs[target.digest])["layers"][0]["mediaType"].endswith(f"+{form}")
    assert name_of(target) == NAME


@pytest.mark.parametrize("form", ["docker-archive:{}", "oci-archive:{}"])
def test_archives_that_skopeo_reads(ours: tuple[Path, MemoryStore, Descriptor], tmp_path: Path, form: str) -> None:
    needs("skopeo")
    path, store, target = ours
    skopeo("copy", form.format(path), f"oci:{tmp_path}/copy:x")
    again, imported = load(tmp_path / "copy")
    assert layers_of(again, imported.manifests[0]) == [ONE, TWO]
    if form.startswith("oci"):
        assert skopeo("inspect", "--raw", form.format(path)).encode() == store.blobs[target.digest]


# umoci.


def test_layouts_that_umoci_writes(tmp_path: Path) -> None:
    needs("umoci")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    layout = tmp_path / "layout"
    tool("umoci", "init", "--layout", layout)
    tool("umoci", "new", "--image", f"{layout}:v1")
    tool("umoci", "unpack", "--image", f"{layout}:v1", tmp_path / "bundle")
    (tmp_path / "bundle/rootfs/hello").write_text("from umoci")
    tool("umoci", "repack", "--image", f"{layout}:v2", tmp_path / "bundle")
    store, imported = load(layout)
    assert sorted(each.annotations["org.opencontainers.image.ref.name"] for each in imported.manifests) == ["v1", "v2"]
    [data] = layers_of(store, next(each for each in imported.manifests if each.annotations["org.opencontainers.image.ref.name"] == "v2"))
    (tmp_path / "layer.tar").write_bytes(data)
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert tar.extractfile("hello").read() == b"from umoci"


def test_layouts_that_umoci_reads(ours: tuple[Path, MemoryStore, Descriptor], tmp_path: Path) -> None:
    needs("umoci")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with tarfile.open(ours[0]) as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    tool("umoci", "unpack", "--image", f"{tmp_path}/layout:1", tmp_path / "bundle")
    assert (tmp_path / "bundle/rootfs/etc/one").read_bytes() == b"1" * 2000
    assert (tmp_path / "bundle/rootfs/etc/two").read_bytes() == b"2"


# podman.


@pytest.fixture(scope="module")
def podman(stage: Stage) -> Iterator[object]:
    needs("podman")
    (stage.directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (stage.directory / "registries.conf").write_text("")

    def run(*words: str | Path) -> str:
        options = ["--root", stage.directory / "podman", "--runroot", stage.directory / "podman-run", "--storage-driver", "vfs"]
        environment = {"CONTAINERS_REGISTRIES_CONF": str(stage.directory / "registries.conf")}
        return stage.out("podman", *options, *words, env=environment)

    yield run


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_what_podman_saves(podman, stage: Stage, image: Path, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    podman("load", "--input", image)
    path = stage.directory / f"podman-{form}"
    podman("save", "--format", form, "--output", path, NAME)
    store, imported = load(path)
    assert layers_of(store, imported.manifests[0]) == [ONE, TWO]
    assert [name_of(each) for each in imported.manifests] in ([NAME], [""])


def test_several_images_that_podman_saves(podman, stage: Stage, image: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "other.tar").write_bytes(old_docker([(["example.com/other:2"], [ONE])]))
    podman("load", "--input", image)
    podman("load", "--input", tmp_path / "other.tar")
    path = stage.directory / "several.tar"
    podman("save", "--multi-image-archive", "--output", path, NAME, "example.com/other:2")
    store, imported = load(path)
    found = {name_of(each): layers_of(store, each) for each in imported.manifests}
    assert found == {NAME: [ONE, TWO], "example.com/other:2": [ONE]}


def test_podman_loads_what_we_save(podman, ours: tuple[Path, MemoryStore, Descriptor]) -> None:  # type: ignore[no-untyped-def]
    path, store, target = ours
    podman("rmi", "--all", "--force")
    podman("load", "--input", path)
    [told] = json.loads(podman("image", "inspect", NAME))
    assert told["Id"] == json.loads(store.blobs[target.digest])["config"]["digest"][7:]
    assert told["RootFS"]["Layers"] == [digest_of(ONE), digest_of(TWO)]


# docker.


@pytest.fixture(scope="module")
def docker(stage: Stage) -> Iterator[object]:
    needs("dockerd", "docker", "containerd")
    directory = stage.directory / "docker"
    directory.mkdir()
    socket = directory / "docker.sock"
    (directory / "daemon.json").write_text("{}")

    def run(*words: str | Path, check: bool = True) -> str:
        return stage.run("docker", "--host", f"unix://{socket}", "--config", directory, *words, check=check).stdout

    daemon = stage.start(
        "dockerd", "--config-file", directory / "daemon.json", "--host", f"unix://{socket}", "--data-root", directory / "data", "--exec-root", directory / "exec",
        "--pidfile", directory / "pid", "--bridge", "none", "--iptables=false", "--ip-forward=false", "--storage-driver", "vfs", log=directory / "dockerd.log",
    )
    stage.eventually(lambda: "Server" in run("version", check=False), timeout=40, why="dockerd answering")
    yield run
    stage.stop(daemon)


def test_what_docker_saves(docker, stage: Stage, image: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "other.tar").write_bytes(old_docker([(["other:2", "other:3"], [ONE])]))
    docker("load", "--input", image)
    docker("load", "--input", tmp_path / "other.tar")
    path = stage.directory / "docker-saved.tar"
    docker("save", "--output", path, NAME, "other:2", "other:3")
    store, imported = load(path)
    found = {name_of(each): layers_of(store, each) for each in imported.manifests}
    assert found == {NAME: [ONE, TWO], "docker.io/library/other:2": [ONE], "docker.io/library/other:3": [ONE]}


def test_docker_loads_what_we_save(docker, ours: tuple[Path, MemoryStore, Descriptor]) -> None:  # type: ignore[no-untyped-def]
    path, store, target = ours
    docker("rmi", "--force", NAME, check=False)
    assert NAME in docker("load", "--input", path)
    [told] = json.loads(docker("image", "inspect", NAME))
    assert told["Id"] == json.loads(store.blobs[target.digest])["config"]["digest"]
    assert told["RootFS"]["Layers"] == [digest_of(ONE), digest_of(TWO)]


def test_a_file_system_that_docker_exports_and_imports(docker, stage: Stage) -> None:  # type: ignore[no-untyped-def]
    path = stage.directory / "rootfs.tar"
    path.write_bytes(ONE)
    store = MemoryStore()
    target = asyncio.run(archive.import_rootfs(LocalBlobs(store), str(path), config={"Cmd": ["/bin/x"]}))
    save(stage.directory / "imported.tar", store, [Saved(target, ["imported.example/x:1"])])
    docker("load", "--input", stage.directory / "imported.tar")
    [told] = json.loads(docker("image", "inspect", "imported.example/x:1"))
    assert (told["RootFS"]["Layers"], told["Config"]["Cmd"]) == ([digest_of(ONE)], ["/bin/x"])


# ctr.


@pytest.fixture(scope="module")
def ctr(stage: Stage) -> Iterator[object]:
    needs("containerd", "ctr")
    directory = stage.directory / "containerd"
    directory.mkdir()
    (directory / "config.toml").write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
    socket = directory / "containerd.sock"

    def run(*words: str | Path, check: bool = True) -> str:
        return stage.run("ctr", "--address", socket, *words, check=check).stdout

    daemon = stage.start("containerd", "--config", directory / "config.toml", "--address", socket, "--root", directory / "root",
                         "--state", directory / "state", log=directory / "containerd.log")
    stage.eventually(lambda: "Server" in run("version", check=False), why="containerd answering")
    yield run
    stage.stop(daemon)


def test_what_ctr_exports(ctr, stage: Stage, image: Path) -> None:  # type: ignore[no-untyped-def]
    ctr("image", "import", "--no-unpack", image)
    path = stage.directory / "exported.tar"
    ctr("image", "export", path, NAME)
    store, imported = load(path)
    assert [name_of(each) for each in imported.manifests] == [NAME]
    assert layers_of(store, imported.manifests[0]) == [ONE, TWO]


def test_ctr_imports_what_we_save(ctr, ours: tuple[Path, MemoryStore, Descriptor]) -> None:  # type: ignore[no-untyped-def]
    path, _, target = ours
    ctr("image", "rm", "--sync", NAME, check=False)
    ctr("image", "import", "--snapshotter", "native", path)
    assert f"{NAME} {target.media_type} {target.digest}" in " ".join(ctr("image", "ls").split())


def test_the_manifest_made_for_a_docker_archive_is_the_one_that_containerd_makes(ctr, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    # Layers of its own: containerd takes a compressed one in place of a plain one when it has that already.
    name, path = "example.com/same:1", tmp_path / "same.tar"
    path.write_bytes(old_docker([([name], [layer(a=os.urandom(5000)), layer(b=b"b")])]))
    ctr("image", "import", "--no-unpack", path)
    store, imported = load(path)
    [line] = [line for line in ctr("image", "ls").splitlines() if line.startswith(name)]
    assert json.loads(ctr("content", "get", line.split()[2])) == json.loads(store.blobs[imported.manifests[0].digest])
