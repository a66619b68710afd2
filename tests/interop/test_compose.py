"""docker-compose against the engine: a stack of three services from up to down, by Debian's compose 1.29 and, where it is, by v2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs, peer_directories
from support.stage import Stage

PORT = 18080
V2_PLACES = ("libexec/docker/cli-plugins/docker-compose", "lib/docker/cli-plugins/docker-compose")
STACK = f"""
services:
  db:
    image: {NAME}
    command: ["sh", "-c", "echo from-db > /data/state; exec busybox httpd -f -p 5432 -h /data"]
    volumes: ["data:/data"]
    networks: [back]
    healthcheck: {{test: ["CMD", "test", "-s", "/data/state"], interval: 200ms, retries: 20}}
    stop_signal: SIGKILL
  app:
    image: {NAME}
    command: ["sh", "-c", "until busybox wget -q -O /tmp/state http://db:5432/state; do sleep 0.2; done; exec busybox httpd -f -p 8000 -h /tmp"]
    depends_on: {{db: {{condition: service_healthy}}}}
    networks: [front, back]
    environment: {{GREETING: hello}}
    stop_signal: SIGKILL
  web:
    image: {NAME}
    command: ["sh", "-c", "until busybox wget -q -O /tmp/state http://app:8000/state; do sleep 0.2; done; echo serving; exec busybox httpd -f -p 80 -h /tmp"]
    depends_on: [app]
    networks: [front]
    ports: ["{PORT}:80"]
    stop_signal: SIGKILL
volumes: {{data: {{}}}}
networks: {{front: {{}}, back: {{internal: true}}}}
"""


def compose_v2() -> Path | None:
    """The plugin as the program that it is too."""
    for directory in [*peer_directories(), Path("/usr/bin"), Path("/usr/local/bin")]:
        for place in V2_PLACES:
            if (found := directory.parent / place).exists():
                return found
    return None


@pytest.fixture(scope="module")
def daemon(stage: Stage, archive: Path) -> Iterator[Path]:
    needs("docker")
    folder = stage.directory / "compose"
    folder.mkdir()
    process = stage.start(
        Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, log=folder / "log")
    docker = ["docker", "--host", f"unix://{folder}/docker.sock"]
    stage.eventually(lambda: stage.run(*docker, "version", check=False).returncode == 0, timeout=40, why="the engine answering")
    stage.run(*docker, "load", "--input", archive)
    (folder / "compose.yaml").write_text(STACK)
    (folder / "compose-1.yaml").write_text('version: "2.4"\n' + STACK)  # the last that knows conditions of depends_on
    yield folder
    stage.stop(process)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.mark.parametrize("generation", [1, 2])
def test_a_stack_of_three_services_from_up_to_down(stage: Stage, daemon: Path, generation: int) -> None:
    if generation == 1:
        needs("docker-compose")
        program = [Path(shutil.which("docker-compose") or ""), "--file", daemon / "compose-1.yaml"]
    else:
        found = compose_v2()
        if found is None:
            pytest.skip("the docker CLI's plugin compose is missing: apt-get install docker-compose of Debian 14, or Docker's package")
        program = [found, "--file", daemon / "compose.yaml"]
    env = {"DOCKER_HOST": f"unix://{daemon}/docker.sock", "HOME": str(daemon)}
    project = f"stack{generation}"

    def compose(*words: str) -> str:
        done = stage.run(*program, "--project-name", project, *words, env=env)
        return done.stdout + (done.stderr if words[0] == "port" else "")

    def docker(*words: str) -> str:
        return stage.out("docker", "--host", env["DOCKER_HOST"], *words)

    try:
        compose("up", "--detach")
        if "127.0.0.11" not in compose("exec", "-T", "app", "cat", "/etc/resolv.conf"):
            pytest.skip("the engine gives networks that users made no name server")
        stage.eventually(
            lambda: stage.out("curl", "-s", "-m", "2", f"http://127.0.0.1:{PORT}/state") == "from-db", why="the page from the database")
        assert len(compose("ps", "--quiet").split()) == 3
        assert compose("exec", "-T", "app", "sh", "-c", "echo $GREETING") == "hello\n"
        assert compose("port", "web", "80").strip() == f"0.0.0.0:{PORT}"
        assert "serving" in compose("logs", "--no-color", "web")
        compose("up", "--detach", "--scale", "app=3")
        assert len(compose("ps", "--quiet", "app").split()) == 3
        names = docker("ps", "--filter", f"label=com.docker.compose.project={project}", "--format", "{{.Names}}").split()
        assert len(names) == 5
        # Two names of one service: whoever asks on their network gets all three addresses.
        web = compose("ps", "--quiet", "web").strip()
        assert docker("exec", web, "busybox", "nslookup", "app", "127.0.0.11").count("Address") >= 4
        assert compose("run", "--rm", "--no-deps", "app", "echo", "once").strip().endswith("once")
        compose("restart", "web")
        health = json.loads(docker("inspect", "--format", "{{json .State.Health}}", compose("ps", "--quiet", "db").strip()))
        assert health["Status"] == "healthy"
    finally:
        compose("down", "--volumes")
    of_project = ("--filter", f"label=com.docker.compose.project={project}", "--quiet")
    assert docker("ps", "--all", *of_project) == ""
    assert docker("network", "ls", *of_project) == ""
    assert docker("volume", "ls", *of_project) == ""
