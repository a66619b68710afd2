"""docker-py's own integration tests against the engine: those of its files that take seconds. docs/conformance.md has the whole.

The package's newer releases carry no tests: they are taken from the source of 7.0.0, or from BOXSHIP_DOCKER_PY (a folder that has
`tests/integration`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage

RELEASE = "7.0.0"
FILES = ("api_exec", "api_volume", "api_healthcheck", "models_volumes")
COMPLETED = "busybox --install -s /bin; mkdir /var/opt; echo 'postgres:x:70:70::/:/bin/sh' >> /etc/passwd"
"""What the suite expects of alpine and the image of the other tests lacks."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above `tests`."""
    pytest.importorskip("docker", reason="docker-py is missing: pip install docker")
    if given := os.environ.get("BOXSHIP_DOCKER_PY"):
        return Path(given)
    folder = tmp_path_factory.mktemp("docker-py")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "docker", "--dest", folder, f"docker=={RELEASE}"],
        capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the source of docker-py {RELEASE} cannot be had (BOXSHIP_DOCKER_PY names a copy): {done.stderr[-300:]}")
    with tarfile.open(folder / f"docker-{RELEASE}.tar.gz") as archive:
        members = [member for member in archive if f"docker-{RELEASE}/tests/" in member.name]  # the package is the installed one
        archive.extractall(folder, members, filter="data")
    return folder / f"docker-{RELEASE}"


@pytest.fixture(scope="module")
def socket(stage: Stage, archive: Path) -> Iterator[Path]:
    needs("docker")
    folder = stage.directory / "suite"
    folder.mkdir()
    daemon = stage.start(
        Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, log=folder / "log")
    docker = ["docker", "--host", f"unix://{folder}/docker.sock"]
    stage.eventually(lambda: stage.run(*docker, "version", check=False).returncode == 0, timeout=40, why="the engine answering")
    stage.run(*docker, "load", "--input", archive)
    stage.run(*docker, "run", "--name", "base", "--network=none", NAME, "sh", "-c", COMPLETED)
    stage.run(*docker, "commit", "base", "alpine:3.10")
    stage.run(*docker, "rm", "base")
    yield folder / "docker.sock"
    stage.stop(daemon)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.mark.timeout(300)
def test_docker_pys_own_tests_pass(stage: Stage, source: Path, socket: Path) -> None:
    # The suite's helpers import a client of SSH that none of these tests uses.
    (source / "stubs").mkdir(exist_ok=True)
    (source / "stubs" / "paramiko.py").write_text("class Channel: ...\n")
    done = stage.run(
        sys.executable, "-m", "pytest", "-q", "-rfE", "--timeout=60", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore",
        f"--rootdir={source}", *(f"{source}/tests/integration/{name}_test.py" for name in FILES),
        check=False, timeout=240, env={"DOCKER_HOST": f"unix://{socket}", "DOCKER_TEST_API_VERSION": "1.41", "PYTHONPATH": f"{source}/stubs"})
    assert done.returncode == 0, done.stdout[-12000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 34
