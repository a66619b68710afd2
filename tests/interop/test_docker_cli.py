"""The docker CLI against the engine: over a real containerd with the runtime of BOXSHIP_INTEROP_RUNTIME (default: boxrun), and in
`boxship daemon` over our own containerd, shims and runtime.

BOXSHIP_INTEROP_ENGINE=dockerd runs the same tests against dockerd, so that they are known to ask for what Docker does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.image import ENDS, NAME
from support.peers import needs
from support.stage import Stage

BELOW = os.environ.get("BOXSHIP_INTEROP_ENGINE", "containerd boxship").split()
"""What the engine runs on; `dockerd` takes its place."""


@dataclass
class Docker:
    """The docker CLI against an engine of the stage."""

    stage: Stage
    socket: Path
    log: Path
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    options: list[str | Path] = field(default_factory=list)

    def __call__(self, *words: str | Path, **options: object) -> str:
        """What it prints; a failure fails the test."""
        return self.stage.out("docker", *self.options, *words, **options)

    def run(self, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Code and output, whatever they are."""
        return self.stage.run("docker", *self.options, *words, check=False, **options)  # type: ignore[arg-type]

    def code(self, *words: str | Path) -> int:
        """Its exit code."""
        return self.run(*words).returncode

    def inspect(self, name: str, template: str) -> str:
        """A value of the container's record."""
        return self("container", "inspect", "--format", template, name)

    def box(self, *words: str | Path, **options: object) -> str:
        """docker run --rm --network=none."""
        return self("run", "--rm", "--network=none", *words, **options)

    def answers(self) -> None:
        """Wait until the engine answers."""
        self.stage.eventually(lambda: self.code("version") == 0, timeout=40, why=f"the engine answering, see {self.log}")

    def kill_engine(self) -> None:
        """SIGKILL."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture(scope="module", params=BELOW)
def docker(stage: Stage, runtime: Path, archive: Path, request: pytest.FixtureRequest) -> Iterator[Docker]:
    needs("docker", "docker" if request.param == "boxship" else request.param)
    folder = stage.directory / request.param
    folder.mkdir(mode=0o755)
    socket, log = folder / "docker.sock", folder / "log"
    containerd = folder / "containerd.sock"
    if request.param == "boxship":

        def start() -> subprocess.Popen[bytes]:
            return stage.start(
                Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, "--log-level", "debug",
                log=log)
    elif request.param == "dockerd":
        (folder / "daemon.json").write_text("{}")

        def start() -> subprocess.Popen[bytes]:
            return stage.start(
                "dockerd", "--config-file", folder / "daemon.json", "--host", f"unix://{socket}", "--data-root", folder / "data",
                "--exec-root", folder / "exec", "--pidfile", folder / "pid", "--bridge", "none", "--iptables=false", "--live-restore",
                "--ip-forward=false", "--add-runtime", f"under-test={runtime}", "--default-runtime", "under-test", log=log)
    else:
        (folder / "config.toml").write_text(
            f'version = 2\nroot = "{folder}/c/root"\nstate = "{folder}/c/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{containerd}"\n')
        stage.start("containerd", "--config", folder / "config.toml", log=folder / "containerd.log")
        stage.eventually(containerd.exists, timeout=20, why="containerd's socket")

        def start() -> subprocess.Popen[bytes]:
            return stage.start(
                sys.executable, "-m", "support.engine", containerd, folder / "root", folder / "state", socket, log=log, env={
                    "PYTHONPATH": str(Path(__file__).parents[1]), "BOXSHIP_ENGINE_RUNTIME": str(runtime)})

    docker = Docker(stage, socket, log, start, start(), ["--host", f"unix://{socket}", "--config", stage.directory / "client"])
    docker.answers()
    docker("load", "--input", archive)
    yield docker
    text = log.read_text()
    stage.stop(docker.process)
    assert "Traceback" not in text, text[-4000:]


@pytest.fixture
def sleeper(docker: Docker, name: str) -> Iterator[str]:
    """A container that stays until it is stopped."""
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sleep", "1000")
    yield name
    docker.run("rm", "--force", name)


# run


def test_run_gives_the_command_its_output_its_host_name_and_a_network_of_its_own(docker: Docker) -> None:
    assert docker.box("--hostname", "inside", NAME, "hostname") == "inside"
    assert docker.box(NAME, "sh", "-c", "echo $$; ls /sys/class/net").split() == ["1", "lo"]


def test_output_and_errors_stay_apart(docker: Docker) -> None:
    done = docker.run("run", "--rm", "--network=none", NAME, "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_input_arrives_and_its_end_too(docker: Docker) -> None:
    assert docker.box("--interactive", NAME, "sort", text="b\na\n") == "a\nb"


def test_a_mebibyte_of_input_comes_back_unchanged(docker: Docker) -> None:
    text = "0123456789abcde\n" * 65536
    assert docker.run("run", "--rm", "--network=none", "--interactive", NAME, "cat", text=text).stdout == text


@pytest.mark.parametrize(("command", "code"), ENDS.values(), ids=ENDS)
def test_the_exit_code_tells_what_happened(docker: Docker, command: list[str], code: int) -> None:
    assert docker.code("run", "--rm", "--network=none", NAME, *command) == code


def test_what_run_removes_is_gone(docker: Docker, name: str) -> None:
    docker.box("--name", name, "--volume", "/anonymous", NAME, "true")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={name}") == ""
    assert docker("volume", "ls", "--quiet", "--filter", "dangling=true") == ""


def test_an_image_that_is_not_there_ends_with_125(docker: Docker) -> None:
    done = docker.run("run", "--rm", "127.0.0.1:1/no/such:image")
    assert done.returncode == 125
    assert "Unable to find image '127.0.0.1:1/no/such:image' locally" in done.stderr


def test_a_terminal_has_its_size_and_its_exit_code(docker: Docker) -> None:
    code, screen = docker.stage.typing("docker", *docker.options, "run", "--rm", "--network=none", "-it", NAME,
                                       types="tty; echo $((6*7)); exit 5\n", until="/ #")
    assert code == 5
    assert "/dev/pts/0" in screen
    assert "42" in screen


def test_the_detach_keys_leave_the_container_running(docker: Docker, name: str) -> None:
    try:
        code, _ = docker.stage.typing("docker", *docker.options, "run", "--network=none", "--name", name, "-it", NAME,
                                      types="\x10\x11", until="/ #")
        assert code == 0
        assert docker.inspect(name, "{{.State.Running}}") == "true"
    finally:
        docker.run("rm", "--force", name)


def test_limits_arrive_in_the_cgroup(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--memory", "64m", "--pids-limit", "50", "--cpus", "0.5", NAME, "sleep",
           "1000")
    try:
        pid = int(docker.inspect(name, "{{.State.Pid}}"))
        assert docker.stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
        docker("update", "--memory", "80m", "--memory-swap", "160m", name)
        assert docker.stage.group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(80 << 20)
    finally:
        docker("rm", "--force", name)


def test_users_capabilities_and_devices_are_as_docker_gives_them(docker: Docker) -> None:
    assert docker.box("--user", "nobody", NAME, "id").startswith("uid=65534(nobody) gid=65534")
    assert docker.code("run", "--rm", "--network=none", "--user", "nobody-here", NAME, "true") == 125
    assert "CapEff:\t00000000a80425fb" in docker.box(NAME, "grep", "Cap", "/proc/self/status")
    assert "CapEff:\t0000000000000000" in docker.box("--cap-drop", "ALL", NAME, "grep", "Cap", "/proc/self/status")
    assert docker.box("--device", "/dev/null:/dev/other", NAME, "ls", "/dev/other") == "/dev/other"
    assert docker.code("run", "--rm", "--network=none", NAME, "mount", "-t", "tmpfs", "none", "/tmp") != 0
    assert docker.code("run", "--rm", "--network=none", "--privileged", NAME, "mount", "-t", "tmpfs", "none", "/tmp") == 0


def test_containers_share_namespaces(docker: Docker, sleeper: str) -> None:
    assert "sleep" in docker("run", "--rm", "--network", f"container:{sleeper}", "--pid", f"container:{sleeper}", NAME, "ps")
    own = docker("exec", sleeper, "readlink", "/proc/self/ns/net")
    assert docker("run", "--rm", "--network", f"container:{sleeper}", NAME, "readlink", "/proc/self/ns/net") == own
    assert docker("run", "--rm", "--network", "host", NAME, "readlink", "/proc/self/ns/net") != own


# life


def test_stop_asks_first_and_kills_then(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
    docker("stop", "--time", "10", name)
    assert docker.inspect(name, "{{.State.ExitCode}} {{.State.Status}}") == "3 exited"
    docker("rm", name)
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    began = time.monotonic()
    docker("stop", "--time", "1", name)
    assert 0.9 < time.monotonic() - began < 8
    assert docker.inspect(name, "{{.State.ExitCode}}") == "137"
    docker("rm", name)


def test_start_runs_it_again_on_the_same_files(docker: Docker, name: str) -> None:
    docker("run", "--network=none", "--name", name, NAME, "sh", "-c", "echo x >> /count; cat /count")
    assert docker("start", "--attach", name) == "x\nx"
    assert docker("logs", name) == "x\nx\nx"
    docker("rm", name)


def test_wait_gives_the_exit_code(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "sleep 0.3; exit 4")
    assert docker("wait", name) == "4"
    docker("rm", name)


def test_a_restart_policy_starts_it_again_as_often_as_it_says(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--restart", "on-failure:2", NAME, "sh", "-c", "exit 3")
    docker.stage.eventually(lambda: docker.inspect(name, "{{.RestartCount}} {{.State.Status}}") == "2 exited", why="two restarts")
    docker("rm", name)


def test_what_was_stopped_by_hand_stays_stopped(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--restart", "always", NAME, "sleep", "1000")
    docker("kill", name)
    time.sleep(0.5)
    assert docker.inspect(name, "{{.State.Running}}") == "false"
    docker("rm", name)


def test_always_means_after_a_restart_of_the_engine_too(docker: Docker, name: str) -> None:
    for policy in ("always", "unless-stopped"):
        docker("run", "--detach", "--network=none", "--name", f"{name}-{policy}", "--restart", policy, NAME, "sleep", "1000")
        docker("stop", "--time", "0", f"{name}-{policy}")
    docker.kill_engine()
    docker.process = docker.start()
    docker.answers()
    docker.stage.eventually(lambda: docker.inspect(f"{name}-always", "{{.State.Status}}") == "running")
    assert docker.inspect(f"{name}-unless-stopped", "{{.State.Status}}") == "exited"
    docker("rm", "--force", f"{name}-always", f"{name}-unless-stopped")


def test_init_passes_signals_on_and_buries_orphans(docker: Docker, name: str) -> None:
    # The orphan ends at once; a program that buries nobody would leave a zombie.
    words = ["sh", "-c", "sh -c 'sleep 0.1 &'; sleep 1000"]
    docker("run", "--detach", "--network=none", "--init", "--name", name, NAME, *words)
    docker.stage.eventually(lambda: docker("exec", name, "sh", "-c", "grep -l '(sleep)' /proc/[0-9]*/stat").count("stat") == 1)
    assert "docker-init" in docker("exec", name, "cat", "/proc/1/cmdline")
    docker("kill", "--signal", "TERM", name)
    assert docker("wait", name) == "143"
    docker("rm", name)
    assert docker.code("run", "--rm", "--network=none", "--init", NAME, "sh", "-c", "exit 9") == 9
    assert docker.code("run", "--rm", "--network=none", "--init", NAME, "not-there") == 127


def test_pause_and_unpause(docker: Docker, sleeper: str) -> None:
    docker("pause", sleeper)
    assert docker.inspect(sleeper, "{{.State.Status}}") == "paused"
    assert docker.code("exec", sleeper, "true") != 0
    docker("unpause", sleeper)
    assert docker("exec", sleeper, "echo", "again") == "again"


def test_a_health_check_becomes_healthy(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, "--health-cmd", "test -e /ok", "--health-interval", "200ms",
           "--health-retries", "2", NAME, "sh", "-c", "sleep 0.5; touch /ok; sleep 1000")
    assert docker.inspect(name, "{{.State.Health.Status}}") == "starting"
    docker.stage.eventually(lambda: docker.inspect(name, "{{.State.Health.Status}}") == "healthy", why="a healthy container")
    assert "(healthy)" in docker("ps", "--filter", f"name={name}", "--format", "{{.Status}}")
    docker("rm", "--force", name)


def test_what_runs_is_removed_by_force_only(docker: Docker, sleeper: str) -> None:
    assert "remove" in docker.run("rm", sleeper).stderr
    docker("rm", "--force", sleeper)
    assert docker.code("inspect", sleeper) == 1


def test_names_are_unique_and_can_be_changed(docker: Docker, sleeper: str) -> None:
    done = docker.run("create", "--name", sleeper, NAME)
    assert "is already in use by container" in done.stderr
    docker("rename", sleeper, f"{sleeper}-other")
    assert docker("ps", "--quiet", "--filter", f"name={sleeper}-other") != ""
    docker("rename", f"{sleeper}-other", sleeper)


# exec, attach, logs


def test_exec_has_its_own_user_directory_environment_and_code(docker: Docker, sleeper: str) -> None:
    assert "sleep" in docker("exec", sleeper, "cat", "/proc/1/cmdline")
    seen = docker("exec", "--user", "nobody", "--workdir", "/tmp", "--env", "X=y", sleeper, "sh", "-c", "id -u; pwd; echo $X")
    assert seen.split() == ["65534", "/tmp", "y"]
    assert docker.code("exec", sleeper, "sh", "-c", "exit 9") == 9
    assert docker.code("exec", sleeper, "/nothing/here") in (126, 127)
    assert docker("exec", "--interactive", sleeper, "sort", text="b\na\n") == "a\nb"


def test_exec_on_a_terminal(docker: Docker, sleeper: str) -> None:
    code, screen = docker.stage.typing("docker", *docker.options, "exec", "-it", sleeper, "sh", types="tty; exit 6\n", until="/ #")
    assert code == 6
    assert "/dev/pts/0" in screen


def test_attach_joins_the_output_and_ends_with_the_exit_code(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "sleep 1; echo late; exit 3")
    done = docker.run("attach", name)
    assert (done.stdout, done.returncode) == ("late\n", 3)
    docker("rm", name)


def test_logs_tail_timestamps_and_follow(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "for i in 1 2 3; do echo $i; done; sleep 0.5; echo end")
    assert docker("logs", "--follow", name).split() == ["1", "2", "3", "end"]
    assert docker("logs", "--tail", "2", name).split() == ["3", "end"]
    stamp, _, word = docker("logs", "--timestamps", "--tail", "1", name).partition(" ")
    assert word == "end"
    assert len(stamp) == len("2026-11-24T23:53:55.686126815Z")
    assert docker("logs", "--since", stamp, name) == "end"
    docker("rm", name)


def test_logs_rotate(docker: Docker, name: str) -> None:
    docker("run", "--network=none", "--name", name, "--log-opt", "max-size=20k", "--log-opt", "max-file=3", NAME, "sh", "-c",
           "i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done")
    lines = docker("logs", name).splitlines()
    assert lines[-1] == "line 999"
    assert 100 < len(lines) < 1000
    assert lines == [f"line {i}" for i in range(1000 - len(lines), 1000)]
    docker("rm", name)


def test_top_and_stats(docker: Docker, sleeper: str) -> None:
    assert "sleep 1000" in docker("top", sleeper)
    row = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", sleeper))
    assert row["PIDs"] == "1"
    assert row["MemUsage"].split()[0] != "0B"


# files


def test_cp_goes_both_ways_also_when_it_does_not_run(docker: Docker, name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("content\n")
    (tmp_path / "in" / "link").symlink_to("file")
    docker("create", "--name", name, "--network=none", "--volume", f"{name}-v:/v", NAME, "cat", "/in/file", "/v/in/file")
    docker("cp", tmp_path / "in", f"{name}:/")
    docker("cp", tmp_path / "in", f"{name}:/v")
    assert docker("start", "--attach", name) == "content\ncontent"
    docker("cp", f"{name}:/in", tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "content\n"
    assert os.readlink(tmp_path / "out" / "link") == "file"
    assert "Could not find" in docker.run("cp", f"{name}:/nothing", tmp_path / "x").stderr or "No such" in docker.run(
        "cp", f"{name}:/nothing", tmp_path / "x").stderr
    docker("rm", name)
    docker("volume", "rm", f"{name}-v")


def test_diff_shows_what_changed(docker: Docker, name: str) -> None:
    docker("run", "--network=none", "--name", name, NAME, "sh", "-c", "echo x > /root/new; rm /bin/yes; echo y >> /etc/passwd")
    assert docker("diff", name).splitlines() == [
        "C /bin", "D /bin/yes", "C /etc", "C /etc/passwd", "C /root", "A /root/new"]
    docker("rm", name)


def test_volumes_are_filled_from_the_image_and_stay(docker: Docker, name: str) -> None:
    docker.box("--volume", f"{name}:/etc", NAME, "sh", "-c", "grep -q root /etc/passwd && echo kept > /etc/mine")
    assert docker.box("--volume", f"{name}:/v:ro", NAME, "cat", "/v/mine") == "kept"
    assert docker.code("run", "--rm", "--network=none", "--volume", f"{name}:/v:ro", NAME, "touch", "/v/x") != 0
    assert name in docker("volume", "ls", "--quiet")
    docker("volume", "rm", name)


def test_a_volume_that_is_a_file_system_is_mounted_while_it_is_used(docker: Docker, name: str) -> None:
    docker("volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=1m,mode=0700", name)
    point = docker("volume", "inspect", "--format", "{{.Mountpoint}}", name)
    words = ["run", "--detach", "--network=none", "--volume", f"{name}:/v", NAME, "sleep", "1000"]
    one, other = docker(*words), docker(*words)
    docker("exec", one, "sh", "-c", "echo shared > /v/f")
    assert docker("exec", other, "cat", "/v/f") == "shared"
    assert docker("exec", other, "grep", " /v ", "/proc/mounts").split()[0] == "tmpfs"
    docker("rm", "--force", one)
    assert docker("exec", other, "cat", "/v/f") == "shared"
    docker("rm", "--force", other)
    docker.stage.eventually(lambda: point not in docker.stage.out("cat", "/proc/1/mounts"))
    assert docker.box("--volume", f"{name}:/v", NAME, "ls", "/v") == ""
    docker("volume", "rm", name)
    assert docker.code("volume", "create", "--opt", "device=tmpfs", name) == 1


def test_binds_and_tmpfs(docker: Docker, tmp_path: Path) -> None:
    folder = docker.stage.directory / f"bind-{tmp_path.name}"
    folder.mkdir()
    (folder / "f").write_text("seen\n")
    assert docker.box("--volume", f"{folder}:/b:ro", NAME, "cat", "/b/f") == "seen"
    assert docker.box("--mount", f"type=bind,source={folder},target=/b", NAME, "sh", "-c", "echo back > /b/g; cat /b/f") == "seen"
    assert (folder / "g").read_text() == "back\n"
    assert "tmpfs" in docker.box("--tmpfs", "/t:size=1m", NAME, "grep", " /t ", "/proc/mounts")


# images


def test_export_import_commit_save_load(docker: Docker, name: str, tmp_path: Path) -> None:
    docker("run", "--network=none", "--name", name, NAME, "sh", "-c", "echo data > /new")
    docker("commit", "--change", 'CMD ["cat", "/new"]', name, f"{name}:c")
    assert docker.box(f"{name}:c") == "data"
    docker("save", "--output", tmp_path / "saved.tar", f"{name}:c")
    before = docker("images", "--quiet", f"{name}:c")
    docker("rmi", f"{name}:c")
    assert f"Loaded image: {name}:c" in docker("load", "--input", tmp_path / "saved.tar")
    assert docker("images", "--quiet", f"{name}:c") == before
    assert docker.box(f"{name}:c") == "data"
    docker("export", "--output", tmp_path / "export.tar", name)
    docker("import", "--change", "CMD cat /new", tmp_path / "export.tar", f"{name}:i")
    assert docker.box("--env", "PATH=/bin", "--entrypoint", "cat", f"{name}:i", "/new") == "data"
    docker("rm", name)
    docker("rmi", f"{name}:c", f"{name}:i")


def test_tags_come_and_go_and_what_is_used_stays(docker: Docker, sleeper: str) -> None:
    docker("tag", NAME, "other/name:2")
    assert docker("images", "--quiet", "other/name") == docker("images", "--quiet", NAME)
    assert "Untagged: other/name:2" in docker("rmi", "other/name:2")
    assert "conflict" in docker.run("rmi", NAME).stderr
    assert json.loads(docker("image", "inspect", NAME))[0]["RepoTags"] == [NAME]
    assert "tests" in docker("history", "--no-trunc", NAME)


def test_info_version_df_events(docker: Docker, sleeper: str) -> None:
    info = json.loads(docker("info", "--format", "{{json .}}"))
    assert info["ContainersRunning"] >= 1
    assert json.loads(docker("version", "--format", "{{json .Server}}"))["MinAPIVersion"]
    assert "Images" in docker("system", "df")
    docker("exec", sleeper, "true")
    time.sleep(1.1)  # the client's until is in whole seconds
    events = docker("events", "--since", "1m", "--until", "0s", "--filter", f"container={sleeper}", "--format", "{{.Action}}").split("\n")
    assert {"create", "start", "exec_create: true ", "exec_start: true "} <= set(events)


def test_an_image_goes_to_a_registry_and_comes_back(docker: Docker, name: str) -> None:
    needs("docker-registry")
    folder = docker.stage.directory / f"registry-{docker.socket.parent.name}"
    folder.mkdir()
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: '127.0.0.1:5000'}}\n")
    registry = docker.stage.start("docker-registry", "serve", folder / "config.yml", log=folder / "log")
    try:
        docker("tag", NAME, f"127.0.0.1:5000/{name}/b:1")
        docker.stage.eventually(lambda: docker.code("push", f"127.0.0.1:5000/{name}/b:1") == 0, why="a push")
        pushed = docker("push", f"127.0.0.1:5000/{name}/b:1")
        assert "Layer already exists" in pushed
        digest = next(word for word in pushed.split() if word.startswith("sha256:"))
        docker("rmi", f"127.0.0.1:5000/{name}/b:1")
        pulled = docker("pull", f"127.0.0.1:5000/{name}/b:1")
        assert f"Digest: {digest}" in pulled
        assert f"Status: Downloaded newer image for 127.0.0.1:5000/{name}/b:1" in pulled
        assert "Image is up to date" in docker("pull", f"127.0.0.1:5000/{name}/b:1")
        assert docker.box(f"127.0.0.1:5000/{name}/b@{digest}", "echo", "by digest") == "by digest"
        missing = docker.run("pull", f"127.0.0.1:5000/{name}/b:2")
        assert missing.returncode == 1
        assert "not found" in missing.stderr
        docker("rmi", f"127.0.0.1:5000/{name}/b:1")
    finally:
        docker.stage.stop(registry)


# the engine's death


def test_sigkill_of_the_engine_loses_no_container_no_output_and_no_exit(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c",
           "i=0; while [ ! -e /end ]; do echo $i; i=$((i+1)); sleep 0.1; done; exit 5")
    docker("run", "--detach", "--network=none", "--name", f"{name}-stays", NAME, "sleep", "1000")
    pid = docker.inspect(f"{name}-stays", "{{.State.Pid}}")
    time.sleep(0.5)
    docker.kill_engine()
    time.sleep(1)
    docker.process = docker.start()
    docker.answers()
    assert docker.inspect(f"{name}-stays", "{{.State.Pid}}") == pid
    assert docker("exec", f"{name}-stays", "echo", "well") == "well"
    docker("exec", name, "touch", "/end")
    assert docker("wait", name) == "5"
    lines = docker("logs", name).split()
    assert len(lines) > 15
    assert lines == [str(i) for i in range(len(lines))]
    docker("rm", "--force", name, f"{name}-stays")


def test_an_exit_while_no_engine_runs_is_known_afterwards(docker: Docker, name: str) -> None:
    docker("run", "--detach", "--network=none", "--name", name, NAME, "sh", "-c", "sleep 1; echo late; exit 5")
    docker("run", "--detach", "--network=none", "--rm", "--name", f"{name}-rm", NAME, "sleep", "1")
    docker.kill_engine()
    time.sleep(2)
    docker.process = docker.start()
    docker.answers()
    docker.stage.eventually(lambda: docker.inspect(name, "{{.State.Status}} {{.State.ExitCode}}") == "exited 5", why="the exit")
    docker.stage.eventually(lambda: docker.code("inspect", f"{name}-rm") == 1, why="the removal")
    if docker.socket.parent.name == "boxship":  # containerd's own shim lets go of what nobody has read yet
        assert docker("logs", name) == "late"
    docker("rm", name)
