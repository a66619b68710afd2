"""Debian's dockerd with `--containerd` pointing at our socket: it finds there what it finds in containerd."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import ENTRY
from support.image import NAME
from support.peers import needs
from support.stage import Stage


class Both:
    """boxshipd and dockerd on the stage, and the docker CLI."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.directory = stage.directory
        self.docker_socket = self.directory / "docker.sock"
        self.containerd_socket = self.directory / "state" / "containerd.sock"
        self.ours: subprocess.Popen[bytes] | None = None

    def start_ours(self) -> None:
        self.ours = self.stage.start(sys.executable, "-c", ENTRY, "--root", self.directory / "root", "--state", self.directory / "state",
                                     log=self.directory / "boxshipd.log")
        self.stage.eventually(lambda: self.stage.run("ctr", "--address", self.containerd_socket, "version", check=False).returncode == 0)

    def kill_ours(self) -> None:
        assert self.ours is not None
        [pid] = Path(f"/proc/{self.ours.pid}/task/{self.ours.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", pid], check=True)
        self.ours.wait(10)
        self.stage.started.remove(self.ours)

    def _words(self, *words: str | Path) -> list[str | Path]:
        return ["docker", "--host", f"unix://{self.docker_socket}", "--config", self.directory / "client", *words]

    def __call__(self, *words: str | Path, **options: object) -> str:
        return self.stage.out(*self._words(*words), **options)

    def code(self, *words: str | Path) -> int:
        return self.stage.run(*self._words(*words), check=False).returncode

    def state(self, name: str) -> str:
        return self("container", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name)


@pytest.fixture(scope="module")
def docker(stage: Stage, archive: Path) -> Iterator[Both]:
    needs("dockerd", "docker", "ctr")
    both = Both(stage)
    both.start_ours()
    (stage.directory / "daemon.json").write_text("{}")
    daemon = stage.start(
        "dockerd", "--config-file", stage.directory / "daemon.json", "--host", f"unix://{both.docker_socket}",
        "--containerd", both.containerd_socket, "--data-root", stage.directory / "data", "--exec-root", stage.directory / "exec",
        "--pidfile", stage.directory / "pid", "--bridge", "none", "--iptables=false", "--ip-forward=false", log=stage.directory / "dockerd.log")
    try:
        stage.eventually(lambda: both.code("version") == 0, timeout=40, why="dockerd answering")
        both("load", "--input", archive)
        yield both
    finally:
        stage.stop(daemon)
        if both.ours is not None:
            stage.stop(both.ours)


def test_it_is_our_containerd(docker: Both) -> None:
    assert "boxship" in docker("version", "--format", "{{json .Server.Components}}")


def test_run_and_its_exit_code(docker: Both) -> None:
    assert docker("run", "--rm", "--network=none", NAME, "echo", "hello") == "hello"
    assert docker.code("run", "--rm", "--network=none", NAME, "sh", "-c", "exit 7") == 7
    assert docker("run", "--rm", "--network=none", "--interactive", NAME, "sort", text="b\na\n") == "a\nb"
    assert docker.code("run", "--rm", "--network=none", NAME, "/nothing/here") == 127


def test_a_container_lives(docker: Both, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")
    docker.stage.eventually(lambda: docker("logs", name) == "up")
    assert docker("exec", name, "echo", "in") == "in"
    assert docker.code("exec", name, "sh", "-c", "exit 9") == 9
    docker("pause", name)
    assert docker.state(name).startswith("paused")
    docker("unpause", name)
    assert "sh -c" in docker("top", name)
    assert name in docker("stats", "--no-stream", "--format", "{{.Name}}", name)
    docker("stop", "--time", "5", name)
    assert docker.state(name) == "exited 5"
    docker("start", name)
    docker("kill", name)
    docker.stage.eventually(lambda: docker.state(name) == "exited 137")
    docker("rm", name)


def test_a_terminal(docker: Both) -> None:
    code, screen = docker.stage.typing(*docker._words("run", "--rm", "--tty", "--interactive", "--network=none", NAME, "sh"),
                                       types="tty; echo $((6*7)); exit 4\n", until="/ #")
    assert code == 4
    assert "/dev/pts/" in screen and "42" in screen


def test_our_death_does_not_hurt_containers_and_their_exits_are_seen(docker: Both, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", f"{name}-1", NAME, "sleep", "1000")
    docker("run", "--detach", "--network=none", "--name", f"{name}-2", NAME, "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; exit 6")
    docker("exec", f"{name}-2", "sh", "-c", "(sleep 1.5; touch /go) >/dev/null 2>&1 &")
    docker.kill_ours()
    time.sleep(3)  # -2 ends while nobody is there
    docker.start_ours()
    docker.stage.eventually(lambda: docker.state(f"{name}-2") == "exited 6", timeout=30)
    assert docker.state(f"{name}-1") == "running 0"
    assert docker("exec", f"{name}-1", "echo", "still") == "still"
    docker("rm", "--force", f"{name}-1", f"{name}-2")
