"""Metadata as ctr sees it: what is collected and when, what namespaces share, filters. Each test runs on the real containerd too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from support.daemon import ENTRY
from support.image import NAME
from support.peers import needs
from support.stage import Stage


class Server:
    """A server on the stage, and ctr for it in one namespace."""

    def __init__(self, stage: Stage, kind: str) -> None:
        self.stage = stage
        self.folder = stage.directory / f"meta-{kind}"
        self.folder.mkdir()
        self.socket = self.folder / "state" / "containerd.sock"
        if kind == "boxship":
            self.words: list[str | Path] = [sys.executable, "-c", ENTRY]
            self.blobs = self.folder / "root/content/blobs/sha256"
        else:
            config = self.folder / "config.toml"
            config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
            self.words = ["containerd", "--config", config, "--address", self.socket]
            self.blobs = self.folder / "root/io.containerd.content.v1.content/blobs/sha256"
        self.words += ["--root", self.folder / "root", "--state", self.folder / "state"]

    def start(self) -> None:
        self.process = self.stage.start(*self.words, log=self.folder / "log")
        self.stage.eventually(
            lambda: self.stage.run("ctr", "--address", self.socket, "version", check=False).returncode == 0, why="a server")

    def kill(self) -> None:
        [pid] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", pid], check=True)
        self.process.wait(10)
        self.stage.started.remove(self.process)

    def __call__(self, *words: str | Path, namespace: str = "default", text: str = "") -> str:
        return self.stage.out("ctr", "--address", self.socket, "--namespace", namespace, *words, text=text)

    def content(self, *filters: str, namespace: str = "default") -> set[str]:
        """The digests that a namespace sees."""
        return {line.split()[0] for line in self("content", "ls", *filters, namespace=namespace).splitlines()[1:]}

    def files(self) -> set[str]:
        """The digests that lie on the disk."""
        return {f"sha256:{path.name}" for path in self.blobs.iterdir()} if self.blobs.exists() else set()

    def snapshots(self, namespace: str = "default") -> list[str]:
        return self("snapshots", "ls", namespace=namespace).splitlines()[1:]


@pytest.fixture(scope="module", params=["boxship", "containerd"])
def ctr(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Server]:
    needs("ctr", *(["containerd"] if request.param == "containerd" else []))
    server = Server(stage, request.param)
    server.start()
    try:
        yield server
    finally:
        stage.stop(server.process)


def test_an_image_that_is_removed_takes_its_content_and_snapshots_along(ctr: Server, archive: Path) -> None:
    ctr("images", "import", archive)
    assert len(ctr.content()) == len(ctr.files()) >= 3 and ctr.snapshots()
    ctr("images", "rm", "--sync", NAME)
    assert ctr.content() == ctr.files() == set()
    assert ctr.snapshots() == []


def test_a_blob_is_one_file_for_all_namespaces_and_goes_with_the_last(ctr: Server, archive: Path) -> None:
    for namespace in ("one", "two"):
        ctr("images", "import", archive, namespace=namespace)
    assert ctr.content(namespace="one") == ctr.content(namespace="two") == ctr.files()
    ctr("images", "rm", "--sync", NAME, namespace="one")
    assert ctr.content(namespace="one") == set()
    assert ctr.content(namespace="two") == ctr.files() != set()
    ctr("images", "rm", "--sync", NAME, namespace="two")
    assert ctr.files() == set()


def labelled(ctr: Server, word: str, label: str) -> str:
    """Content with a label; ctr ingests without a lease, so a collection may be quicker than the label."""
    digest = f"sha256:{sha256(word.encode()).hexdigest()}"

    def tried() -> bool:
        if digest not in ctr.content():
            ctr("content", "ingest", f"ref-{word}", text=word)
        words = ["ctr", "--address", ctr.socket, "content", "label", digest, label]
        return ctr.stage.run(*words, check=False).returncode == 0

    ctr.stage.eventually(tried, why=f"{word} with {label}")
    return digest


def test_labels_decide_what_is_kept_and_what_is_listed(ctr: Server) -> None:
    child = labelled(ctr, "child", "containerd.io/gc.root=1")
    kept = labelled(ctr, "kept", "containerd.io/gc.root=yes")
    ctr("content", "label", kept, f"containerd.io/gc.ref.content.0={child}")
    ctr("content", "label", child, "containerd.io/gc.root=")
    labelled(ctr, "stray", "x=y")
    assert ctr.content('labels."containerd.io/gc.root"==yes') == {kept}
    assert ctr.content("labels.none", f"digest=={child}") == {child}
    assert ctr.content('labels."containerd.io/gc.ref.content.0"~=^sha256') == {kept}
    ctr("leases", "create", "--id", "held")
    ctr("leases", "rm", "--sync", "held")
    assert ctr.content() == {kept, child}
    ctr("content", "label", kept, "containerd.io/gc.root=")
    ctr("leases", "create", "--id", "again")
    ctr("leases", "rm", "--sync", "again")
    assert ctr.files() == set()


def test_a_killed_server_knows_what_it_has_answered(ctr: Server, archive: Path) -> None:
    ctr("images", "import", archive)
    ctr("containers", "create", NAME, "c", "true")
    ctr("leases", "create", "--id", "l", "x=y")
    ctr("leases", "create", "--id", "other")
    ctr("leases", "rm", "--sync", "other")  # so that what the import left over is gone
    before = ctr.content(), ctr.snapshots(), ctr("images", "ls"), ctr("containers", "ls"), ctr("leases", "ls")
    ctr.kill()
    ctr.start()
    assert (ctr.content(), ctr.snapshots(), ctr("images", "ls"), ctr("containers", "ls"), ctr("leases", "ls")) == before
    ctr("containers", "rm", "c")
    ctr("images", "rm", "--sync", NAME)
    ctr("leases", "rm", "--sync", "l")
    assert ctr.files() == set() and ctr.snapshots() == []
