"""podman, with conmon between it and the runtime: create, start, exec and attach through files and sockets.

What it asks of a runtime beyond the OCI's words: the exact exit codes, a pid file, a console socket, `--log-format json` for
conmon, `state` for every inspection, `kill` and `delete` of what has ended, `pause`, `update --resources`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs, peer_directories
from support.stage import Stage


@dataclass
class Podman:
    """podman with storage and state of its own."""

    stage: Stage
    options: list[str | Path]

    @property
    def environment(self) -> dict[str, str]:
        return {"CONTAINERS_CONF": str(self.stage.directory / "containers.conf"), "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}

    def __call__(self, *words: str | Path, **options: object) -> str:
        """What it prints; a failure fails the test."""
        return self.stage.out("podman", *self.options, *words, env=self.environment, **options)

    def code(self, *words: str | Path) -> int:
        """Its exit code."""
        return self.stage.run("podman", *self.options, *words, env=self.environment, check=False).returncode

    def inspect(self, name: str, template: str) -> str:
        """A value of the container's record."""
        return self("container", "inspect", "--format", template, name)

    def pid(self, name: str) -> int:
        """The container's process 1, by the stage's number."""
        return int(self.inspect(name, "{{.State.Pid}}"))


@pytest.fixture(scope="module")
def podman(stage: Stage, runtime: Path, archive: Path) -> Podman:
    needs("podman", "conmon")
    directory = stage.directory
    helpers = [path.parent / name / "podman" for path in peer_directories() for name in ("libexec", "lib")]
    (directory / "containers.conf").write_text("[engine]\nhelper_binaries_dir = " + json.dumps(
        [*map(str, helpers), "/usr/libexec/podman", "/usr/lib/podman"]) + "\n")
    podman = Podman(stage, [
        "--root", directory / "root", "--runroot", directory / "run", "--tmpdir", directory / "tmp", "--storage-driver", "overlay",
        "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", runtime])
    podman("load", "--input", archive)
    return podman


@pytest.fixture
def sleeper(podman: Podman, name: str) -> Iterator[str]:
    """A container that stays until it is stopped."""
    podman("run", "--detach", "--network=none", "--name", name, NAME, "sleep", "1000")
    yield name
    podman("rm", "--force", "--time", "0", name)


def test_run_gives_the_command_its_output_and_a_network_of_its_own(podman: Podman) -> None:
    assert podman("run", "--rm", "--network=none", "--hostname", "inside", NAME, "hostname") == "inside"
    assert podman("run", "--rm", "--network=none", NAME, "sh", "-c", "echo $$; ls /sys/class/net").split() == ["1", "lo"]


def test_input_arrives_and_its_end_too(podman: Podman) -> None:
    assert podman("run", "--rm", "--network=none", "--interactive", NAME, "sort", text="b\na\n") == "a\nb"


@pytest.mark.parametrize(("command", "code"), [
    (["sh", "-c", "exit 7"], 7),
    (["/nothing/here"], 127),
    (["/etc/passwd"], 126),
], ids=["own", "no-such-file", "not-executable"])
def test_the_exit_code_tells_what_happened(podman: Podman, command: list[str], code: int) -> None:
    assert podman.code("run", "--rm", "--network=none", NAME, *command) == code


def test_exec_runs_beside_process_1_with_its_own_code_user_and_directory(podman: Podman, sleeper: str) -> None:
    assert "sleep" in podman("exec", sleeper, "cat", "/proc/1/cmdline")
    seen = podman("exec", "--user", "nobody", "--workdir", "/tmp", "--env", "X=y", sleeper, "sh", "-c", "id -u; pwd; echo $X")
    assert seen.split() == ["65534", "/tmp", "y"]
    assert podman.code("exec", sleeper, "sh", "-c", "exit 9") == 9
    assert podman.code("exec", sleeper, "/nothing/here") == 127


def test_exec_fills_a_pipe_to_its_last_byte(podman: Podman, sleeper: str) -> None:
    assert len(podman("exec", sleeper, "sh", "-c", "yes | head -c 1000000")) == 999_999  # without the last line feed


def test_logs_keep_both_streams(podman: Podman, name: str) -> None:
    podman("run", "--name", name, "--network=none", NAME, "sh", "-c", "echo out; echo err >&2")
    logs = podman.stage.run("podman", *podman.options, "logs", name, env=podman.environment)
    assert (logs.stdout, logs.stderr) == ("out\n", "err\n")
    podman("rm", name)


def test_stop_asks_first_and_kills_what_does_not_listen(podman: Podman, name: str) -> None:
    podman("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c",
           "trap 'echo asked; exit 3' TERM; echo ready; while true; do sleep 0.05; done")
    podman.stage.eventually(lambda: "ready" in podman("logs", name))
    podman("stop", "--time", "10", name)
    assert podman.inspect(name, "{{.State.ExitCode}}") == "3"
    assert "asked" in podman("logs", name)
    podman("rm", name)


def test_stop_kills_what_does_not_listen(podman: Podman, sleeper: str) -> None:
    podman("stop", "--time", "1", sleeper)  # process 1 without a handler never gets SIGTERM
    assert podman.inspect(sleeper, "{{.State.Status}} {{.State.ExitCode}}") == "exited 137"
    podman("start", sleeper)
    assert podman.inspect(sleeper, "{{.State.Status}}") == "running"


def test_pause_stops_the_clock_of_the_container_and_unpause_starts_it(podman: Podman, name: str) -> None:
    podman("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "while true; do echo x; sleep 0.02; done")
    podman.stage.eventually(lambda: "x" in podman("logs", name))
    podman("pause", name)
    assert podman.inspect(name, "{{.State.Status}}") == "paused"
    assert podman("logs", name) == podman("logs", name)
    assert podman.code("exec", name, "true") != 0
    podman("unpause", name)
    before = podman("logs", name)
    podman.stage.eventually(lambda: podman("logs", name) != before)
    podman("rm", "--force", "--time", "0", name)


def test_limits_are_in_the_cgroup_and_update_changes_them(podman: Podman, name: str) -> None:
    podman("run", "--detach", "--network=none", "--name", name, "--memory", "64m", "--pids-limit", "33", "--cpu-shares", "512",
           NAME, "sleep", "1000")
    stage, pid = podman.stage, podman.pid(name)
    assert stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert stage.group_file(pid, "pids", "pids.max", "pids.max") == "33"
    assert stage.group_file(pid, "cpu", "cpu.shares", "cpu.weight") in ("512", "20", "59")
    podman("update", "--memory", "128m", "--cpus", "0.5", name)
    assert stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(128 << 20)
    assert stage.group_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    podman("rm", "--force", "--time", "0", name)


def test_the_pids_limit_bites(podman: Podman) -> None:
    done = podman.stage.run("podman", *podman.options, "run", "--rm", "--network=none", "--pids-limit", "8", NAME,
                            "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait", env=podman.environment, check=False)
    assert "can't fork" in done.stderr


def test_a_terminal_is_one_and_has_a_size(podman: Podman) -> None:
    code, screen = podman.stage.typing("podman", *podman.options, "run", "--rm", "--network=none", "-it", NAME, env=podman.environment,
                                       types="tty; stty size; echo $((6*7)); exit 5\n", until="/ #")
    assert code == 5
    assert "/dev/pts/0" in screen
    assert "42" in screen


def test_exec_on_a_terminal(podman: Podman, sleeper: str) -> None:
    code, screen = podman.stage.typing("podman", *podman.options, "exec", "-it", sleeper, "sh", env=podman.environment,
                                       types="tty && echo $((6*7)); exit 4\n", until="/ #")
    assert code == 4
    assert "/dev/pts/" in screen and "42" in screen


def test_health_checks_run_in_the_container(podman: Podman, name: str) -> None:
    podman("run", "--detach", "--network=none", "--name", name, "--health-cmd", "test -e /tmp/well", "--health-retries", "1",
           "--health-interval", "disable", NAME, "sleep", "1000")
    assert podman.code("healthcheck", "run", name) == 1
    podman("exec", name, "touch", "/tmp/well")
    assert podman.code("healthcheck", "run", name) == 0
    assert podman.inspect(name, "{{.State.Health.Status}}") == "healthy"
    podman("rm", "--force", "--time", "0", name)


def test_containers_of_a_pod_share_their_namespaces(podman: Podman, name: str) -> None:
    needs("catatonit")
    podman("pod", "create", "--name", name, "--network=none", "--share", "net,ipc,uts,pid")
    podman("run", "--detach", "--pod", name, "--name", f"{name}-1", NAME, "sleep", "1000")
    look = "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done"
    first = podman("exec", f"{name}-1", "sh", "-c", look).split()
    assert len(first) == 4
    assert podman("run", "--rm", "--pod", name, NAME, "sh", "-c", look).split() == first
    podman("pod", "stop", "--time", "0", name)
    podman("pod", "rm", "--force", name)


def test_init_reaps_for_the_command(podman: Podman) -> None:
    needs("catatonit")
    seen = podman("run", "--rm", "--network=none", "--init", NAME, "sh", "-c", "cat /proc/1/comm; echo $$").split()
    assert seen[0] in ("catatonit", "podman-init", "tini")
    assert seen[1] != "1"


def test_volumes_read_only_roots_and_tmpfs(podman: Podman, stage: Stage) -> None:
    shared = stage.directory / "shared"
    shared.mkdir()
    (shared / "from-outside").write_text("hello\n")
    seen = podman("run", "--rm", "--network=none", "--read-only", "--tmpfs", "/scratch", "--volume", f"{shared}:/data", NAME, "sh", "-c",
                  "cat /data/from-outside; echo back >/data/from-inside; touch /x 2>/dev/null && echo bad; touch /scratch/x && echo good")
    assert seen.split() == ["hello", "good"]
    assert (shared / "from-inside").read_text() == "back\n"


def test_capabilities_user_namespaces_and_seccomp(podman: Podman) -> None:
    seen = podman("run", "--rm", "--network=none", "--cap-drop=all", "--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000",
                  "--security-opt", "no-new-privileges", NAME, "sh", "-c",
                  "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status; cat /proc/self/uid_map")
    fields = seen.split()
    assert fields[:6] == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert fields[6:] == ["0", "100000", "1000"]


def test_top_and_stats_know_the_processes(podman: Podman, sleeper: str) -> None:
    assert "sleep 1000" in podman("top", sleeper, "args")
    stats = json.loads(podman("stats", "--no-stream", "--format", "json", sleeper))
    assert int(stats[0]["pids"]) == 1


def test_restart_and_removal_leave_nothing(podman: Podman, name: str) -> None:
    podman("run", "--detach", "--network=none", "--name", name, NAME, "sleep", "1000")
    first = podman.pid(name)
    podman("restart", "--time", "0", name)
    assert podman.pid(name) != first
    podman("rm", "--force", "--time", "0", name)
    assert podman("ps", "--all", "--quiet", "--filter", f"name={name}") == ""
    assert "libpod-" not in podman.stage.out("find", "/sys/fs/cgroup", "-path", "*libpod_parent*", "-name", "libpod-*")
