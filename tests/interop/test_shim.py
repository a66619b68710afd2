"""A real containerd with our shim: what is not about one container (that is test_containerd.py), but about containerd coming and going."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage

SHIM = Path(sys.executable).with_name("containerd-shim-boxship-v1")
RUNTIME = "io.containerd.boxship.v1"


class Containerd:
    """One on the stage, which may be killed and started again."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.directory = stage.directory / "own"
        self.directory.mkdir()
        self.socket = self.directory / "containerd.sock"
        self.config = self.directory / "containerd.toml"
        self.config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
        self.process: subprocess.Popen[bytes] | None = None
        # Under this name it gets the options that ctr gives to no other.
        names = self.directory / "names"
        names.mkdir()
        (names / "containerd-shim-runc-v2").symlink_to(SHIM)
        self.search = f"{names}:{SHIM.parent}:{stage.search}"

    def start(self) -> None:
        """Until it answers."""
        directory = self.directory
        self.process = self.stage.start(
            "containerd", "--config", self.config, "--address", self.socket, "--root", directory / "root", "--state",
            directory / "state", log=directory / "containerd.log", env={"PATH": self.search})
        self.stage.eventually(lambda: self.code("version") == 0, why=f"containerd answering ({directory}/containerd.log)")

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait(20)
        self.stage.started.remove(self.process)

    def __call__(self, *words: str | Path) -> str:
        """What ctr prints."""
        return self.stage.out("ctr", "--address", self.socket, *words)

    def code(self, *words: str | Path) -> int:
        """ctr's exit code."""
        return self.stage.run("ctr", "--address", self.socket, *words, check=False).returncode

    def run(self, name: str, *words: str | Path) -> None:
        """In the background."""
        self("run", "--detach", "--runtime", RUNTIME, NAME, name, *words)

    def status(self, name: str) -> str:
        """Of the task."""
        found = re.search(rf"^{re.escape(name)}\s+\d+\s+(\w+)", self("task", "ls"), re.M)
        return found[1] if found else ""

    def remove(self, name: str) -> None:
        """Task and container."""
        self.code("task", "kill", "--signal", "SIGKILL", name)
        self.stage.eventually(lambda: self.status(name) in ("STOPPED", ""))
        self.code("task", "rm", name)
        self("container", "rm", name)


@pytest.fixture(scope="module")
def containerd(stage: Stage, archive: Path) -> Iterator[Containerd]:
    needs("containerd", "ctr")
    containerd = Containerd(stage)
    containerd.start()
    containerd("image", "import", archive)
    yield containerd
    assert containerd.process is not None
    stage.stop(containerd.process)


def test_containers_outlive_containerd(containerd: Containerd, name: str) -> None:
    containerd.run(name, "sleep", "1000")
    pid = containerd("task", "ls")
    containerd.kill()
    containerd.start()
    assert containerd("task", "ls") == pid
    assert containerd.status(name) == "RUNNING"
    assert "sleep" in containerd("task", "exec", "--exec-id", "look", name, "cat", "/proc/1/cmdline")
    containerd.remove(name)


def test_an_exit_while_containerd_is_down_is_seen_when_it_is_back(containerd: Containerd, name: str) -> None:
    containerd.run(name, "sh", "-c", "sleep 1; exit 42")
    containerd.kill()
    time.sleep(1.5)
    containerd.start()
    assert containerd.status(name) == "STOPPED"
    removed = containerd.stage.run("ctr", "--address", containerd.socket, "task", "rm", name, check=False)
    assert removed.returncode == 42 or "exit code 42" in removed.stderr  # ctr 2 and ctr 1
    containerd("container", "rm", name)


def test_events_reach_subscribers_in_order(containerd: Containerd, name: str) -> None:
    log = containerd.directory / "events.log"
    listener = containerd.stage.start("ctr", "--address", containerd.socket, "events", log=log)
    containerd.stage.eventually(lambda: listener.poll() is None and containerd.code("version") == 0)
    time.sleep(0.5)
    containerd("run", "--rm", "--runtime", RUNTIME, NAME, name, "true")
    containerd.stage.eventually(lambda: "/tasks/delete" in log.read_text())
    topics = re.findall(r"/tasks/\w+", log.read_text())
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    containerd.stage.stop(listener)


def test_a_shim_that_is_killed_is_cleaned_up_after(containerd: Containerd, name: str) -> None:
    containerd.run(name, "sleep", "1000")
    pid = int(re.findall(rf"^{name}\s+(\d+)", containerd("task", "ls"), re.M)[0])
    shim = int(containerd.stage.out("sh", "-c", f"grep PPid: /proc/{pid}/status").split()[1])
    containerd.stage.run("kill", "-9", str(shim))
    containerd.stage.eventually(lambda: not containerd.status(name), why="the task goes")
    containerd.stage.eventually(lambda: containerd.stage.run("test", "-e", f"/proc/{pid}", check=False).returncode == 1)
    containerd("container", "rm", name)
    assert name not in containerd.stage.out("cat", "/proc/mounts")
    assert name not in containerd.stage.out("find", "/sys/fs/cgroup", "-name", name)


def test_the_death_of_the_spawner_is_not_noticed(containerd: Containerd, name: str) -> None:
    containerd.run(name, "sleep", "1000")
    for pid in containerd.stage.out("pgrep", "-f", "boxship.daemon.spawner").split():
        if containerd.stage.out("cat", f"/proc/{pid}/comm") != "containerd-shim":
            containerd.stage.run("kill", "-9", pid, check=False)
    assert containerd.code("task", "exec", "--exec-id", "still", name, "true") == 0
    containerd("run", "--rm", "--runtime", RUNTIME, NAME, f"{name}-2", "true")
    containerd.remove(name)


@pytest.mark.parametrize("binary", ["runc", "crun"])
def test_with_another_runtime_by_name(containerd: Containerd, name: str, binary: str) -> None:
    needs(binary)
    words = ["--runtime", "io.containerd.runc.v2", "--runc-binary", binary]
    done = containerd.stage.run("ctr", "--address", containerd.socket, "run", "--rm", *words, NAME, name, "sh", "-c", "echo hello; exit 4",
                                check=False)
    if "cgroups in hybrid mode not supported" in done.stderr:
        pytest.skip("crun does not run here: it refuses a v2 hierarchy with controllers beside v1's")
    assert (done.returncode, done.stdout) == (4, "hello\n"), done


def test_a_checkpoint_without_a_working_criu_is_refused_and_the_container_runs_on(containerd: Containerd, name: str) -> None:
    check = containerd.stage.run("criu", "check", check=False)
    if check.returncode == 0:
        pytest.skip("criu works here: test_containerd.py makes a checkpoint")
    containerd.run(name, "sleep", "1000")
    done = containerd.stage.run("ctr", "--address", containerd.socket, "task", "checkpoint", name, check=False)
    assert done.returncode != 0
    assert "OCI runtime checkpoint failed" in done.stderr
    assert containerd.status(name) == "RUNNING"
    containerd.remove(name)
