"""ctr's images against our daemon, with docker-registry at the other end: Debian's (the client does the work) and, where
BOXSHIP_PEERS has one, ctr of containerd 2 (which asks the transfer service to).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.archives import OCI_LAYER, Layout, digest_of, layer
from support.daemon import Daemon, daemon
from support.docker_registry import Server
from support.peers import needs, peer_directories

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FIRST, SECOND = layer(etc__one=b"1" * 2000, usr__big=os.urandom(500_000)), layer(etc__two=b"2")
NAME = "example.com/app:1"


def programs() -> list[str]:
    found = [shutil.which("ctr"), *(str(folder / "ctr") for folder in peer_directories() if (folder / "ctr").exists())]
    return list(dict.fromkeys(path for path in found if path))


class Ctr:
    def __init__(self, program: str, daemon: Daemon, registry: Server, folder: Path) -> None:
        self.program = program
        self.daemon = daemon
        self.registry = registry
        self.folder = folder
        self.namespace = f"n{len(list(folder.iterdir()))}-{os.urandom(3).hex()}"

    def __call__(self, *words: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            [self.program, "--address", self.daemon.socket, "--namespace", self.namespace, *map(str, words)], capture_output=True, text=True, timeout=60,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def images(self) -> dict[str, str]:
        """Names with digests."""
        rows = [line.split() for line in self("image", "ls").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def blobs(self) -> set[str]:
        return set(self("content", "ls", "-q").split())

    def snapshots(self) -> int:
        return len(self("snapshots", "ls").splitlines()) - 1


@pytest.fixture(scope="module")
def started() -> Iterator[Daemon]:
    with daemon() as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs("docker-registry", "skopeo", "ctr")
    server = Server(tmp_path_factory.mktemp("registry"), port=True)
    yield server
    server.stop()


@pytest.fixture(params=programs(), ids=lambda path: path.strip("/").replace("/", "-"))
def ctr(request: pytest.FixtureRequest, started: Daemon, registry: Server, tmp_path: Path) -> Ctr:
    return Ctr(request.param, started, registry, tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An image of two platforms, of which one has two compressed layers."""
    layout = Layout()
    other = layout.image([layer(z=b"z")], architecture="s390x")
    image = layout.image([FIRST, SECOND], lambda data: gzip.compress(data, mtime=0), OCI_LAYER + "+gzip")
    layout.name(layout.index([other, image]), "1", NAME)
    path = tmp_path / "image.tar"
    path.write_bytes(layout.tar())
    return path


def push(registry: Server, archive: Path, name: str) -> str:
    """Put the archive's image into the registry; its name there."""
    full = f"{registry.address}/{name}"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--all", "--dest-tls-verify=false", f"oci-archive:{archive}", f"docker://{full}"], check=True,
    )
    return full


def test_pull_with_everything_that_belongs_to_it(ctr: Ctr, archive: Path) -> None:
    name = push(ctr.registry, archive, "pull/app:1")
    ctr("image", "pull", "--plain-http", name)
    assert list(ctr.images()) == [name]
    assert digest_of(gzip.compress(FIRST, mtime=0)) in ctr.blobs()
    assert ctr.snapshots() == 2
    mounts = ctr("image", "mount", name, ctr.folder / "mnt", check=False) if (ctr.folder / "mnt").mkdir() is None else ""
    try:
        assert (ctr.folder / "mnt/etc/one").read_bytes() == b"1" * 2000, mounts
        assert (ctr.folder / "mnt/etc/two").read_bytes() == b"2"
    finally:
        ctr("image", "unmount", "--rm", ctr.folder / "mnt", check=False)
    # A second pull finds all of it there.
    ctr("image", "pull", "--plain-http", name)


def test_pull_of_what_is_not_there(ctr: Ctr) -> None:
    said = ctr("image", "pull", "--plain-http", f"{ctr.registry.address}/no/such:1", check=False)
    assert re.search("not found|404", said, re.I), said
    assert not ctr.images() and not ctr.blobs()


def test_import_and_export_there_and_back(ctr: Ctr, archive: Path) -> None:
    ctr("image", "import", archive)
    digest = ctr.images()[NAME]
    assert ctr.snapshots() == 2
    out = ctr.folder / "out.tar"
    ctr("image", "export", out, NAME)
    ctr("image", "rm", "--sync", NAME)
    assert not ctr.images()
    ctr("image", "import", out)
    assert NAME in ctr.images()
    assert ctr.images()[NAME] == digest


def test_push_and_pull_again_elsewhere(ctr: Ctr, archive: Path) -> None:
    ctr("image", "import", "--all-platforms", "--no-unpack", archive)
    name = f"{ctr.registry.address}/push/{ctr.namespace}:2"
    ctr("image", "push", "--plain-http", name, NAME)
    told = json.loads(subprocess.run(["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"], capture_output=True, check=True).stdout)
    assert told.get("manifests") or told["layers"]
    ctr("image", "pull", "--plain-http", name)
    assert name in ctr.images()


def test_names_come_and_go_and_content_with_the_last(ctr: Ctr, archive: Path) -> None:
    ctr("image", "import", archive)
    ctr("image", "tag", NAME, "example.com/other:2")
    images = ctr.images()
    assert images["example.com/other:2"] == images[NAME]
    ctr("image", "rm", "--sync", NAME)
    assert ctr.blobs()
    ctr("image", "rm", "--sync", "example.com/other:2")
    assert not ctr.blobs()
    assert ctr.snapshots() == 0


def test_a_damaged_archive_leaves_nothing(ctr: Ctr, archive: Path) -> None:
    # Content of its own: what another namespace has brought whole is not looked for in the archive.
    layout = Layout()
    own = gzip.compress(layer(own=os.urandom(100_000)), mtime=0)
    layout.name(layout.image([gzip.decompress(own)], lambda data: own, OCI_LAYER + "+gzip"), "1", NAME)
    data = bytearray(layout.tar())
    data[data.index(own[:64]) + 5000] ^= 1
    archive.write_bytes(data)
    said = ctr("image", "import", archive, check=False)
    assert "ctr:" in said
    assert ctr.snapshots() == 0
    # The old client names an image before it unpacks it.
    assert NAME not in ctr.images() or " 1." in ctr("--version")
