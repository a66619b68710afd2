"""Builds by the clients that people have (docker CLI, docker-py, docker-compose), and their images read by other engines."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage

DOCKERFILE = f"""# syntax=docker/dockerfile:1
ARG BASE={NAME}
FROM ${{BASE}} AS made
ARG WHO=nobody
RUN --mount=type=cache,target=/cache <<EOF
echo "made for $WHO" > /made
EOF
FROM ${{BASE}}
COPY --from=made --chmod=0640 --chown=65534:1 /made /srv/
COPY a.txt sub /srv/
ENV GREETING="hello there"
CMD ["cat", "/srv/made"]
"""


@pytest.fixture(scope="module")
def socket(stage: Stage, archive: Path) -> Iterator[Path]:
    needs("docker")
    folder = stage.directory / "bld"
    folder.mkdir()
    daemon = stage.start(
        Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, log=folder / "log")
    path = folder / "docker.sock"
    stage.eventually(path.exists, timeout=40, why="the engine answering")
    stage.out("docker", "-H", f"unix://{path}", "load", "-i", archive)
    yield path
    stage.stop(daemon)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "sub").mkdir(parents=True)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "a.txt").write_text("a\n")
    (folder / "sub/b.txt").write_text("b\n")
    return folder


def clients() -> list[str]:
    """The docker CLIs of this machine, by path."""
    return [path for path in ("/usr/bin/docker", "/usr/local/bin/docker") if shutil.which(path)]


@pytest.mark.parametrize("client", clients() or ["docker"])
def test_the_docker_cli_builds(stage: Stage, socket: Path, context: Path, client: str) -> None:
    needs("docker")
    docker: list[str | Path] = [client, "-H", f"unix://{socket}"]
    environ = {"DOCKER_BUILDKIT": "0"}
    said = stage.out(*docker, "build", "-t", "cli:1", "--build-arg", "WHO=you", "--label", "l=1", context, env=environ)
    assert "Step 1/" in said and "Successfully built " in said and "Successfully tagged cli:1" in said
    assert stage.out(*docker, "run", "--rm", "--network=none", "cli:1") == "made for you"
    assert stage.out(*docker, "run", "--rm", "--network=none", "cli:1", "stat", "-c", "%a %u:%g", "/srv/made") == "640 65534:1"
    again = stage.out(*docker, "build", "-t", "cli:2", "--build-arg", "WHO=you", "--label", "l=1", context, env=environ)
    assert "Using cache" in again and "Running in" not in again
    ids = {stage.out(*docker, "image", "inspect", "--format", "{{.Id}}", f"cli:{number}") for number in (1, 2)}
    assert len(ids) == 1
    quiet = stage.out(*docker, "build", "-q", "--build-arg", "WHO=you", "--label", "l=1", context, env=environ)
    assert quiet.strip() == ids.pop().strip()


def test_the_docker_cli_with_a_dockerfile_from_elsewhere(stage: Stage, socket: Path, context: Path, tmp_path: Path) -> None:
    docker: list[str | Path] = ["docker", "-H", f"unix://{socket}"]
    environ = {"DOCKER_BUILDKIT": "0"}
    outside = tmp_path / "Other"
    outside.write_text(f"FROM {NAME}\nCOPY . /ctx\nRUN ls -a /ctx\nRUN cat /etc/resolv.conf && ip addr\n")
    (context / ".dockerignore").write_text("sub\n")
    said = stage.out(*docker, "build", "-f", outside, "--iidfile", tmp_path / "iid", context, env=environ)
    assert "a.txt" in said and "b.txt" not in said and ".dockerfile." not in said
    assert "eth0" in said
    assert (tmp_path / "iid").read_text().startswith("sha256:")
    said = stage.out(*docker, "build", "--network=none", "-", text=f"FROM {NAME}\nRUN ip addr; echo alone\n", env=environ)
    assert "alone" in said and "eth0" not in said
    done = stage.run(*docker, "build", "-", text=f"FROM {NAME}\nRUN exit 5\n", env=environ, check=False)
    assert done.returncode == 5 and "returned a non-zero code: 5" in done.stderr
    done = stage.run(*docker, "build", "-", text=f"FROM {NAME}\nRUNN true\n", env=environ, check=False)
    assert done.returncode == 1 and "unknown instruction: RUNN" in done.stderr
    rows = stage.out(*docker, "system", "df", "-v")
    assert "Build cache usage" in rows
    assert "Total reclaimed space" in stage.out(*docker, "builder", "prune", "-af", env=environ)


def test_docker_py_builds(socket: Path, context: Path, tmp_path: Path) -> None:
    docker = pytest.importorskip("docker", reason="docker-py is missing: pip install docker")
    client = docker.DockerClient(base_url=f"unix://{socket}")
    try:
        image, messages = client.images.build(path=str(context), tag="py:1", buildargs={"WHO": "py"}, rm=True)
        assert image.tags == ["py:1"] and image.attrs["Config"]["Env"][-1] == "GREETING=hello there"
        assert any("Successfully built" in each.get("stream", "") for each in messages)
        assert client.containers.run("py:1", remove=True, network_mode="none") == b"made for py\n"
        with pytest.raises(docker.errors.BuildError, match="non-zero code: 3"):
            client.images.build(fileobj=io.BytesIO(f"FROM {NAME}\nRUN exit 3\n".encode()))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(context, arcname=".")
        image, _ = client.images.build(fileobj=io.BytesIO(packed.getvalue()), custom_context=True, encoding="gzip")
        assert image.id.startswith("sha256:")
    finally:
        client.close()


def test_docker_compose_builds(stage: Stage, socket: Path, context: Path) -> None:
    if shutil.which("/usr/bin/docker-compose") is None:
        pytest.skip("docker-compose is missing: apt-get install docker-compose")
    (context / "docker-compose.yml").write_text(json.dumps({
        "version": "3", "services": {"one": {"build": {"context": ".", "args": {"WHO": "compose"}}, "image": "composed:1"}}}))
    environ = {"DOCKER_HOST": f"unix://{socket}", "COMPOSE_DOCKER_CLI_BUILD": "0"}
    stage.out("/usr/bin/docker-compose", "-f", context / "docker-compose.yml", "build", env=environ)
    assert stage.out("docker", "-H", f"unix://{socket}", "run", "--rm", "--network=none", "composed:1") == "made for compose"


def test_other_engines_read_the_image(stage: Stage, socket: Path, context: Path, tmp_path: Path) -> None:
    for program in ("skopeo", "podman"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt-get install {program}")
    docker: list[str | Path] = ["docker", "-H", f"unix://{socket}"]
    stage.out(*docker, "build", "-t", "read:1", "--build-arg", "WHO=others", context, env={"DOCKER_BUILDKIT": "0"})
    saved = tmp_path / "saved.tar"
    stage.out(*docker, "save", "-o", saved, "read:1")
    shown: dict[str, Any] = json.loads(stage.out("skopeo", "inspect", f"docker-archive:{saved}"))
    assert len(shown["Layers"]) == 3 and "GREETING=hello there" in shown["Env"]
    config = json.loads(stage.out("skopeo", "inspect", "--config", f"docker-archive:{saved}"))
    assert [bool(each.get("empty_layer")) for each in config["history"]].count(False) == 3
    podman = ["podman", "--root", stage.directory / "p", "--runroot", stage.directory / "r", "--storage-driver", "vfs"]
    stage.out(*podman, "load", "-i", saved)
    listed = json.loads(stage.out(*podman, "images", "--format", "json"))
    assert any("read:1" in str(each.get("Names")) for each in listed)
