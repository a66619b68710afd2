"""Real engines drive the runtime: what each test needs from podman, containerd and dockerd.

BOXSHIP_INTEROP_RUNTIME=PATH takes another runtime, so that these tests are run on runc before they are believed.
BOXSHIP_PEERS takes other engines than the machine's (support/peers.py).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import image
from support.peers import needs, peer_directories
from support.stage import Stage, open_stage


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The OCI runtime under test."""
    path = os.environ.get("BOXSHIP_INTEROP_RUNTIME") or Path(sys.executable).with_name("boxrun")
    found = shutil.which(path)
    if found is None:
        pytest.fail(f"there is no runtime at {path}: make build")
    return Path(found).absolute()


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as a file that every engine loads."""
    if not image.BUSYBOX.exists():
        pytest.skip("/bin/busybox is missing: apt-get install busybox-static")
    path = tmp_path_factory.mktemp("image") / "image.tar"
    image.write_archive(path)
    return path


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A machine in the machine for one engine."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    needs("ip")
    stage = open_stage(peer_directories())
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for a container that tells whose it is."""
    return "t-" + "".join(c if c.isalnum() else "-" for c in request.node.name.removeprefix("test_"))[:50].strip("-")
