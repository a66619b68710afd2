"""containerd with its own shim (containerd-shim-runc-v2), told to use the runtime under test, and with ours; driven by ctr.

What the shim asks of a runtime: `create --bundle --pid-file`, `start`, `exec --process --detach`, `kill`, `delete`,
`pause`, `resume`, `ps --format json`, `update`, `checkpoint`, `restore`, and error texts that it compares word by word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage


@dataclass
class Ctr:
    """ctr against a containerd of the stage."""

    stage: Stage
    runtime: Path
    socket: Path
    shim: str

    @property
    def runs(self) -> list[str | Path]:
        """The flags that choose shim and runtime."""
        own = self.shim == "io.containerd.boxship.v1" and self.runtime.name == "boxrun"
        return ["--runtime", self.shim, *([] if own else ["--runc-binary", self.runtime])]

    def __call__(self, *words: str | Path, **options: object) -> str:
        """What it prints; a failure fails the test."""
        return self.stage.out("ctr", "--address", self.socket, *words, **options)

    def code(self, *words: str | Path) -> int:
        """Its exit code."""
        return self.stage.run("ctr", "--address", self.socket, *words, check=False).returncode

    def container(self, *words: str | Path, **options: object) -> str:
        """`ctr run` with the runtime under test."""
        return self("run", *self.runs, *words, **options)

    def status(self, name: str) -> str:
        """What the task is: RUNNING, PAUSED, STOPPED or nothing."""
        found = re.search(rf"^{re.escape(name)}\s+\d+\s+(\w+)", self("task", "ls"), re.M)
        return found[1] if found else ""


@pytest.fixture(scope="module", params=["io.containerd.runc.v2", "io.containerd.boxship.v1"])
def ctr(stage: Stage, runtime: Path, archive: Path, request: pytest.FixtureRequest) -> Iterator[Ctr]:
    needs("containerd", "ctr")
    directory = stage.directory / request.param
    directory.mkdir()
    config = directory / "containerd.toml"
    config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
    ctr = Ctr(stage, runtime, directory / "containerd.sock", request.param)
    daemon = stage.start("containerd", "--config", config, "--address", ctr.socket, "--root", directory / "root",
                         "--state", directory / "state", log=directory / "containerd.log",
                         env={"PATH": f"{Path(sys.executable).parent}:{stage.search}"})
    stage.eventually(lambda: ctr.code("version") == 0, why=f"containerd answering ({directory}/containerd.log)")
    ctr("image", "import", archive)
    yield ctr
    stage.stop(daemon)


@pytest.fixture
def sleeper(ctr: Ctr, name: str) -> Iterator[str]:
    """A container that stays until it is killed."""
    ctr.container("--detach", NAME, name, "sleep", "1000")
    yield name
    ctr.stage.run("ctr", "--address", ctr.socket, "task", "kill", "--signal", "SIGKILL", name, check=False)
    ctr.stage.eventually(lambda: ctr.code("task", "rm", name) == 0 or not ctr.status(name))
    ctr("container", "rm", name)


def test_run_gives_the_command_its_output(ctr: Ctr, name: str) -> None:
    assert ctr.container("--rm", NAME, name, "sh", "-c", "echo $$ $(ls /sys/class/net)") == "1 lo"


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_exit_code_comes_back(ctr: Ctr, name: str, code: int) -> None:
    assert ctr.code("run", *ctr.runs, "--rm", NAME, name, "sh", "-c", f"exit {code}") == code


def test_a_missing_program_is_an_error_that_names_it(ctr: Ctr, name: str) -> None:
    done = ctr.stage.run("ctr", "--address", ctr.socket, "run", *ctr.runs, "--rm", NAME, name, "/nothing/here", check=False)
    assert done.returncode != 0
    assert "OCI runtime create failed" in done.stderr and "/nothing/here" in done.stderr
    assert not ctr.status(name)


def test_exec_runs_beside_process_1(ctr: Ctr, sleeper: str) -> None:
    assert "sleep" in ctr("task", "exec", "--exec-id", "look", sleeper, "cat", "/proc/1/cmdline")
    assert ctr.code("task", "exec", "--exec-id", "code", sleeper, "sh", "-c", "exit 9") == 9
    assert ctr("task", "exec", "--exec-id", "user", "--cwd", "/tmp", "--user", "65534", sleeper, "sh", "-c",
               "id -u; pwd").split() == ["65534", "/tmp"]


def test_exec_on_a_terminal(ctr: Ctr, sleeper: str) -> None:
    code, screen = ctr.stage.typing("ctr", "--address", ctr.socket, "task", "exec", "--tty", "--exec-id", "tty", sleeper, "sh",
                                    types="tty && echo $((6*7)); exit 4\n", until="/ #")
    assert code == 4
    assert "/dev/pts/" in screen and "42" in screen


def test_run_on_a_terminal(ctr: Ctr, name: str) -> None:
    code, screen = ctr.stage.typing("ctr", "--address", ctr.socket, "run", *ctr.runs, "--rm", "--tty", NAME, name, "sh", types="tty; echo $((6*7)); exit 5\n", until="/ #")
    assert code == 5
    assert "/dev/pts/0" in screen and "42" in screen


def test_pause_and_resume(ctr: Ctr, sleeper: str) -> None:
    ctr("task", "pause", sleeper)
    assert ctr.status(sleeper) == "PAUSED"
    assert ctr.code("task", "exec", "--exec-id", "paused", sleeper, "true") != 0
    ctr("task", "resume", sleeper)
    assert ctr.status(sleeper) == "RUNNING"
    assert ctr.code("task", "exec", "--exec-id", "resumed", sleeper, "true") == 0


def test_kill_ends_the_task_with_the_signal(ctr: Ctr, sleeper: str) -> None:
    ctr("task", "kill", "--signal", "SIGKILL", sleeper)
    ctr.stage.eventually(lambda: ctr.status(sleeper) == "STOPPED")
    done = ctr.stage.run("ctr", "--address", ctr.socket, "task", "kill", "--signal", "SIGKILL", sleeper, check=False)
    assert "process already finished" in done.stderr or "not found" in done.stderr
    removed = ctr.stage.run("ctr", "--address", ctr.socket, "task", "rm", sleeper, check=False)
    assert removed.returncode == 137 or "exit code 137" in removed.stderr  # ctr 2 and ctr 1


def test_ps_lists_all_processes(ctr: Ctr, sleeper: str) -> None:
    ctr("task", "exec", "--detach", "--exec-id", "second", sleeper, "sleep", "1001")
    lines = ctr("task", "ps", sleeper).splitlines()[1:]
    assert len(lines) == 2
    commands = [ctr.stage.out("cat", f"/proc/{line.split()[0]}/cmdline").strip("\0").split("\0") for line in lines]
    assert sorted(commands) == [["sleep", "1000"], ["sleep", "1001"]]


def test_metrics_count_the_processes(ctr: Ctr, sleeper: str) -> None:
    metrics = ctr("task", "metrics", sleeper)
    assert re.search(r"^pids.current\s+1\s*$", metrics, re.M)
    assert re.search(r"memory.usage(_in_bytes|\.usage)?\s+[1-9]", metrics, re.M)


def test_limits_reach_the_cgroup(ctr: Ctr, name: str) -> None:
    ctr.container("--detach", "--memory-limit", str(64 << 20), "--cpus", "0.5", NAME, name, "sleep", "1000")
    pid = int(re.findall(rf"^{name}\s+(\d+)", ctr("task", "ls"), re.M)[0])
    assert ctr.stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert ctr.stage.group_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    ctr("task", "kill", "--signal", "SIGKILL", name)
    ctr.stage.eventually(lambda: ctr.status(name) == "STOPPED")
    ctr.code("task", "rm", name)
    ctr("container", "rm", name)


def test_read_only_roots_mounts_and_seccomp(ctr: Ctr, name: str) -> None:
    shared = ctr.stage.directory / f"shared-{name}"
    shared.mkdir(exist_ok=True)
    (shared / "from-outside").write_text("hello\n")
    seen = ctr.container("--rm", "--read-only", "--seccomp", "--mount", f"type=bind,src={shared},dst=/tmp,options=rbind:ro", NAME, name,
                         "sh", "-c", "cat /tmp/from-outside; grep Seccomp: /proc/self/status; touch /x /tmp/x 2>/dev/null || echo ro")
    assert seen.split() == ["hello", "Seccomp:", "2", "ro"]


def test_checkpoint_and_restore(ctr: Ctr, name: str) -> None:
    needs("criu")
    check = ctr.stage.run("criu", "check", check=False)
    if check.returncode:
        pytest.skip(f"criu does not run on this kernel: {check.stderr.strip().splitlines()[0]}; a newer criu is needed (4.0 or later)")
    ctr.container("--detach", NAME, name, "sh", "-c", "echo alive >/tmp/mark; sleep 1000")
    ctr.stage.eventually(lambda: ctr.code("task", "exec", "--exec-id", "mark", name, "test", "-e", "/tmp/mark") == 0)
    ctr("container", "checkpoint", "--task", "--image", "--rw", name, "boxship.test/checkpoint:1", timeout=60)
    ctr("task", "kill", "--signal", "SIGKILL", name)
    ctr.stage.eventually(lambda: ctr.status(name) == "STOPPED")
    ctr.code("task", "rm", name)
    ctr("container", "rm", name)
    ctr("container", "restore", "--live", "--rw", name, "boxship.test/checkpoint:1", timeout=60)
    assert ctr.status(name) == "RUNNING"
    assert ctr("task", "exec", "--exec-id", "again", name, "cat", "/tmp/mark") == "alive"
    ctr("task", "kill", "--signal", "SIGKILL", name)
    ctr.stage.eventually(lambda: ctr.status(name) == "STOPPED")
    ctr.code("task", "rm", name)
    ctr("container", "rm", name)


def test_nothing_is_left(ctr: Ctr, name: str) -> None:
    ctr.container("--rm", NAME, name, "true")
    assert name not in ctr.stage.out("find", "/sys/fs/cgroup", "-name", name)
    assert name not in ctr.stage.out("cat", "/proc/mounts")
    assert name not in ctr.stage.out("ps", "-A", "-o", "args=")
