"""dockerd, which starts a containerd of its own and is told of the runtime by `--add-runtime`.

Beyond containerd's: `exec -it`, `update` with every limit, `--init`, user namespaces with a remapped root, healthy errors
(126 and 127 by the words of the runtime's message), restart policies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import ENDS, NAME
from support.peers import needs
from support.stage import Stage


@dataclass
class Docker:
    """The docker CLI against a dockerd of the stage."""

    stage: Stage
    socket: Path

    @property
    def options(self) -> list[str | Path]:
        return ["--host", f"unix://{self.socket}", "--config", self.stage.directory / "client"]

    def __call__(self, *words: str | Path, **options: object) -> str:
        """What it prints; a failure fails the test."""
        return self.stage.out("docker", *self.options, *words, **options)

    def code(self, *words: str | Path) -> int:
        """Its exit code."""
        return self.stage.run("docker", *self.options, *words, check=False).returncode

    def inspect(self, name: str, template: str) -> str:
        """A value of the container's record."""
        return self("container", "inspect", "--format", template, name)

    def pid(self, name: str) -> int:
        """The container's process 1, by the stage's number."""
        return int(self.inspect(name, "{{.State.Pid}}"))


def start_daemon(stage: Stage, runtime: Path, archive: Path, label: str, *more: str) -> Iterator[Docker]:
    """A dockerd with state of its own, and the image loaded."""
    needs("dockerd", "docker", "containerd")
    directory = stage.directory / label
    directory.mkdir()
    directory.chmod(0o755)
    docker = Docker(stage, directory / "docker.sock")
    (directory / "daemon.json").write_text("{}")
    daemon = stage.start(
        "dockerd", "--config-file", directory / "daemon.json", "--host", f"unix://{docker.socket}", "--data-root", directory / "data",
        "--exec-root", directory / "exec", "--pidfile", directory / "pid", "--bridge", "none", "--iptables=false", "--ip-forward=false",
        "--add-runtime", f"under-test={runtime}", "--default-runtime", "under-test", *more, log=directory / "dockerd.log")
    try:
        stage.eventually(lambda: docker.code("version") == 0, timeout=40, why="dockerd answering")
    except AssertionError:
        pytest.fail(f"dockerd did not start:\n{(directory / 'dockerd.log').read_text()[-3000:]}")
    docker("load", "--input", archive)
    yield docker
    stage.stop(daemon)


@pytest.fixture(scope="module")
def docker(stage: Stage, runtime: Path, archive: Path) -> Iterator[Docker]:
    yield from start_daemon(stage, runtime, archive, "d")


@pytest.fixture
def sleeper(docker: Docker, name: str) -> Iterator[str]:
    """A container that stays until it is stopped."""
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sleep", "1000")
    yield name
    docker("rm", "--force", name)


def test_run_gives_the_command_its_output_and_a_network_of_its_own(docker: Docker) -> None:
    assert docker("run", "--rm", "--network=none", "--hostname", "inside", NAME, "hostname") == "inside"
    assert docker("run", "--rm", "--network=none", NAME, "sh", "-c", "echo $$; ls /sys/class/net").split() == ["1", "lo"]


def test_the_runtime_is_the_one_that_runs(docker: Docker, sleeper: str) -> None:
    assert docker.inspect(sleeper, "{{.HostConfig.Runtime}}") == "under-test"
    assert "under-test" in json.loads(docker("info", "--format", "{{json .Runtimes}}"))


def test_input_arrives_and_its_end_too(docker: Docker) -> None:
    assert docker("run", "--rm", "--network=none", "--interactive", NAME, "sort", text="b\na\n") == "a\nb"


@pytest.mark.parametrize(("command", "code"), ENDS.values(), ids=ENDS)
def test_the_exit_code_tells_what_happened(docker: Docker, command: list[str], code: int) -> None:
    assert docker.code("run", "--rm", "--network=none", NAME, *command) == code


def test_exec_runs_beside_process_1_with_its_own_code_user_and_directory(docker: Docker, sleeper: str) -> None:
    assert "sleep" in docker("exec", sleeper, "cat", "/proc/1/cmdline")
    seen = docker("exec", "--user", "nobody", "--workdir", "/tmp", "--env", "X=y", sleeper, "sh", "-c", "id -u; pwd; echo $X")
    assert seen.split() == ["65534", "/tmp", "y"]
    assert docker.code("exec", sleeper, "sh", "-c", "exit 9") == 9
    assert docker.code("exec", sleeper, "/nothing/here") in (126, 127)


def test_terminals(docker: Docker, sleeper: str) -> None:
    code, screen = docker.stage.typing("docker", *docker.options, "run", "--rm", "--network=none", "-it", NAME,
                                       types="tty; echo $((6*7)); exit 5\n", until="/ #")
    assert code == 5
    assert "/dev/pts/0" in screen and "42" in screen
    code, screen = docker.stage.typing("docker", *docker.options, "exec", "-it", sleeper, "sh",
                                       types="tty; echo $((6*7)); exit 4\n", until="/ #")
    assert code == 4
    assert "/dev/pts/" in screen and "42" in screen


def test_stats_count_the_processes(docker: Docker, sleeper: str) -> None:
    stats = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", sleeper))
    assert stats["PIDs"] == "1"
    assert not stats["MemUsage"].startswith("0B")


def test_update_changes_the_limits_of_a_running_container(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--memory", "64m", "--pids-limit", "33", "--cpu-shares", "512",
           NAME, "sleep", "1000")
    stage, pid = docker.stage, docker.pid(name)
    assert stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert stage.group_file(pid, "pids", "pids.max", "pids.max") == "33"
    docker("update", "--memory", "128m", "--memory-swap", "256m", "--pids-limit", "44", "--cpus", "0.5", "--cpuset-cpus", "0", name)
    assert stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(128 << 20)
    assert stage.group_file(pid, "pids", "pids.max", "pids.max") == "44"
    assert stage.group_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert stage.group_file(pid, "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    docker("rm", "--force", name)


def test_pause_and_unpause(docker: Docker, sleeper: str) -> None:
    docker("pause", sleeper)
    assert docker.inspect(sleeper, "{{.State.Status}}") == "paused"
    assert docker.code("exec", sleeper, "true") != 0
    docker("unpause", sleeper)
    assert docker.inspect(sleeper, "{{.State.Status}}") == "running"
    assert docker.code("exec", sleeper, "true") == 0


def test_top_lists_the_processes(docker: Docker, sleeper: str) -> None:
    docker("exec", "--detach", sleeper, "sleep", "1001")
    top = docker("top", sleeper, "-o", "pid,args")
    assert "sleep 1000" in top and "sleep 1001" in top


def test_restart_gives_a_new_process(docker: Docker, sleeper: str) -> None:
    first = docker.pid(sleeper)
    docker("restart", "--time", "0", sleeper)
    assert docker.pid(sleeper) not in (first, 0)
    assert docker.code("exec", sleeper, "true") == 0


def test_a_restart_policy_starts_it_again(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--restart", "on-failure:2", "--name", name, NAME, "sh", "-c", "exit 3")
    docker.stage.eventually(lambda: docker.inspect(name, "{{.RestartCount}} {{.State.Status}}") == "2 exited")
    assert docker.inspect(name, "{{.State.ExitCode}}") == "3"
    docker("rm", name)


def test_init_reaps_for_the_command(docker: Docker) -> None:
    needs("docker-init")
    seen = docker("run", "--rm", "--network=none", "--init", NAME, "sh", "-c", "cat /proc/1/comm; echo $$").split()
    assert seen[0] == "docker-init"
    assert seen[1] != "1"


def test_logs_keep_both_streams(docker: Docker, name: str) -> None:
    docker("run", "--name", name, "--network=none", NAME, "sh", "-c", "echo out; echo err >&2; yes | head -c 100000")
    logs = docker.stage.run("docker", *docker.options, "logs", name)
    assert (logs.stdout[:4], len(logs.stdout), logs.stderr) == ("out\n", 100_004, "err\n")
    docker("rm", name)


def test_stop_asks_first_and_kills_what_does_not_listen(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c",
           "trap 'echo asked; exit 3' TERM; echo ready; while true; do sleep 0.05; done")
    docker.stage.eventually(lambda: "ready" in docker("logs", name))
    docker("stop", "--time", "10", name)
    assert docker.inspect(name, "{{.State.ExitCode}}") == "3"
    docker("rm", name)
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sleep", "1000")
    docker("stop", "--time", "1", name)
    assert docker.inspect(name, "{{.State.Status}} {{.State.ExitCode}}") == "exited 137"
    docker("rm", name)


def test_out_of_memory_is_reported(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--memory", "16m", "--memory-swap", "16m", NAME, "sh", "-c",
           "tail /dev/zero")
    docker("wait", name)
    assert docker.inspect(name, "{{.State.ExitCode}}") == "137"
    docker("rm", name)


def test_volumes_read_only_roots_and_tmpfs(docker: Docker, stage: Stage) -> None:
    shared = stage.directory / "docker-shared"
    shared.mkdir()
    (shared / "from-outside").write_text("hello\n")
    seen = docker("run", "--rm", "--network=none", "--read-only", "--tmpfs", "/scratch", "--volume", f"{shared}:/data", NAME, "sh", "-c",
                  "cat /data/from-outside; echo back >/data/from-inside; touch /x 2>/dev/null && echo bad; touch /scratch/x && echo good")
    assert seen.split() == ["hello", "good"]
    assert (shared / "from-inside").read_text() == "back\n"


def test_the_default_profile_confines(docker: Docker) -> None:
    status = docker("run", "--rm", "--network=none", "--security-opt", "no-new-privileges", NAME, "grep", "-E",
                    "^(CapEff|NoNewPrivs|Seccomp):", "/proc/self/status").split()
    assert status == ["CapEff:", "00000000a80425fb", "NoNewPrivs:", "1", "Seccomp:", "2"]


def test_privileged_containers_get_what_the_machine_has(docker: Docker, runtime: Path) -> None:
    mine = int(docker.stage.out("sed", "-n", "s/^CapBnd:\\t//p", "/proc/self/status"), 16)
    last = int(docker.stage.out("cat", "/proc/sys/kernel/cap_last_cap"))
    if mine != (2 << last) - 1 and docker.stage.out(runtime, "--version").startswith(("runc ", "crun ")):
        pytest.skip("this machine withholds capabilities, and runc and crun then refuse to start a privileged container")
    status = docker("run", "--rm", "--network=none", "--privileged", NAME, "grep", "-E", "^(CapEff|Seccomp):", "/proc/self/status").split()
    assert status[2:] == ["Seccomp:", "0"]
    got = int(status[1], 16)
    assert got & ~mine == 0
    assert got | 7 << 38 | ~mine == -1  # all that there are; docker 20.10 does not know the last three yet


def test_a_remapped_root_is_nobody_outside(stage: Stage, runtime: Path, archive: Path) -> None:
    for file, line in {"passwd": "remapped:x:64000:64000::/:/bin/false", "group": "remapped:x:64000:",
                       "subuid": "remapped:100000:65536", "subgid": "remapped:100000:65536"}.items():
        copy = stage.directory / file  # the machine's own files stay as they are
        copy.write_text((Path("/etc") / file).read_text() + line + "\n")
        stage.run("mount", "--bind", copy, f"/etc/{file}")
    for docker in start_daemon(stage, runtime, archive, "u", "--userns-remap", "remapped"):
        docker("run", "--detach", "--network=none", "--name", "remapped", NAME, "sh", "-c", "echo x >/tmp/mine && sleep 1000")
        assert docker("exec", "remapped", "id", "-u") == "0"
        assert docker("exec", "remapped", "cat", "/proc/self/uid_map").split()[:2] == ["0", "100000"]
        assert stage.out("stat", "-c", "%u", f"/proc/{docker.pid('remapped')}") == "100000"
        docker("rm", "--force", "remapped")
