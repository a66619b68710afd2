"""Debian's ctr against our socket: every command of it that containerd's own server answers, answered alike.

Each test runs on the real containerd too (`server` = containerd), so what it asks for is what ctr gets there.
"""

from __future__ import annotations

import json
import re
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

NOTHING = "sha256:" + "0" * 64


class Server:
    """A server of containerd's API on the stage, and ctr for it."""

    def __init__(self, stage: Stage, kind: str) -> None:
        self.stage = stage
        self.kind = kind
        self.directory = stage.directory / kind
        self.directory.mkdir()
        self.state = self.directory / "state"
        self.socket = self.state / "containerd.sock"
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.kind == "boxship":
            words: list[str | Path] = [sys.executable, "-c", ENTRY, "--root", self.directory / "root", "--state", self.state]
        else:
            config = self.directory / "config.toml"
            config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
            words = ["containerd", "--config", config, "--address", self.socket, "--root", self.directory / "root", "--state", self.state]
        self.process = self.stage.start(*words, log=self.log)
        self.stage.eventually(lambda: self.run("version").returncode == 0, why=f"{self.kind} answering ({self.log})")

    def stop(self) -> None:
        assert self.process is not None
        self.stage.stop(self.process)

    def kill(self) -> None:
        """SIGKILL to the server itself, which is nsenter's child."""
        assert self.process is not None
        [pid] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", pid], check=True)
        self.process.wait(10)
        self.stage.started.remove(self.process)

    def run(self, *words: str | Path, namespace: str = "default", **options: object) -> subprocess.CompletedProcess[str]:
        return self.stage.run("ctr", "--address", self.socket, "--namespace", namespace, *words, check=False, **options)  # type: ignore[arg-type]

    def __call__(self, *words: str | Path, namespace: str = "default", **options: object) -> str:
        """What ctr prints; a failure fails the test."""
        return self.stage.out("ctr", "--address", self.socket, "--namespace", namespace, *words, **options)

    def background(self, *words: str | Path, namespace: str = "default", limit: str = "30") -> subprocess.Popen[str]:
        command = self.stage._command(["timeout", limit, "ctr", "--address", self.socket, "--namespace", namespace, *words])
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **self.stage._options(None))  # type: ignore[call-overload,no-any-return]

    def status(self, name: str) -> str:
        """What the task is: RUNNING, PAUSED, STOPPED or nothing."""
        found = re.search(rf"^{re.escape(name)}\s+\d+\s+(\w+)", self("task", "ls"), re.M)
        return found[1] if found else ""


@pytest.fixture(scope="module", params=["boxship", "containerd"])
def ctr(request: pytest.FixtureRequest, stage: Stage, archive: Path) -> Iterator[Server]:
    needs("ctr", *(["containerd"] if request.param == "containerd" else []))
    server = Server(stage, request.param)
    server.start()
    try:
        server("images", "import", archive)
        yield server
    finally:
        server.stop()


@pytest.fixture
def sleeper(ctr: Server, name: str) -> Iterator[str]:
    """A container that stays until it is killed."""
    ctr("run", "--detach", NAME, name, "sleep", "1000")
    yield name
    ctr.run("task", "kill", "--signal", "SIGKILL", name)
    ctr.stage.eventually(lambda: ctr.run("task", "rm", name).returncode == 0 or not ctr.status(name))
    ctr("container", "rm", name)


def rows(table: str) -> list[list[str]]:
    """The lines of a table below its heading."""
    return [line.split() for line in table.splitlines()[1:]]


# --- the server itself


def test_version_and_plugins(ctr: Server) -> None:
    assert re.search(r"UUID: [0-9a-f-]{36}", ctr("version"))
    plugins = {(row[0], row[1]): row[-1] for row in rows(ctr("plugins", "ls"))}
    for kind, name in (("snapshotter.v1", "overlayfs"), ("snapshotter.v1", "native"), ("runtime.v2", "task"), ("content.v1", "content"),
                       ("grpc.v1", "tasks"), ("grpc.v1", "images"), ("gc.v1", "scheduler"), ("differ.v1", "walking")):
        assert plugins[f"io.containerd.{kind}", name] == "ok"
    assert "overlayfs" in ctr("plugins", "ls", "id==overlayfs")


def test_namespaces(ctr: Server) -> None:
    ctr("namespaces", "create", "one", "a=b")
    assert ["one", "a=b"] in rows(ctr("namespaces", "ls"))
    again = ctr.run("namespaces", "create", "one")
    assert again.returncode != 0 and "already exists" in again.stderr
    ctr("namespaces", "label", "one", "a=", "c=d")
    assert ["one", "c=d"] in rows(ctr("namespaces", "ls"))
    assert ctr("namespaces", "rm", "one") == "one"
    assert "one" not in ctr("namespaces", "ls")
    bad = ctr.run("namespaces", "create", "a/b")
    assert bad.returncode != 0 and "must match" in bad.stderr


def test_a_namespace_that_is_in_use_stays(ctr: Server, archive: Path) -> None:
    ctr("images", "import", archive, namespace="used")
    refused = ctr.run("namespaces", "rm", "used")
    assert refused.returncode != 0 and "must be empty" in refused.stderr
    ctr("images", "rm", "--sync", NAME, namespace="used")
    ctr.stage.eventually(lambda: ctr.run("namespaces", "rm", "used").returncode == 0, why="an empty namespace removed")


# --- images and content


def test_images_are_listed_checked_tagged_and_removed(ctr: Server) -> None:
    [row] = [row for row in rows(ctr("images", "ls")) if row[0] == NAME]
    assert row[2].startswith("sha256:")
    assert NAME in ctr("images", "ls", "-q", f"name=={NAME}")
    assert not ctr("images", "ls", "-q", "name==nothing")
    check = ctr("images", "check")
    assert "complete" in check and "true" in check
    ctr("images", "tag", NAME, "other:1")
    again = ctr.run("images", "tag", NAME, "other:1")
    assert again.returncode == 0 or "already exists" in again.stderr  # ctr 2 replaces the name
    ctr("images", "label", "other:1", "x=y")
    assert "x=y" in ctr("images", "ls", "name==other:1")
    assert ctr("images", "rm", "other:1") == "other:1"
    assert "other:1" not in ctr("images", "ls", "-q")
    assert "not found" in ctr.run("images", "tag", "nothing:1", "x:1").stderr


def test_an_image_goes_out_and_comes_back(ctr: Server) -> None:
    path = ctr.directory / "out.tar"
    ctr("images", "export", path, NAME)
    ctr("images", "import", path, namespace="back")
    assert NAME in ctr("images", "ls", "-q", namespace="back")
    digests = [{row[0]: row[2] for row in rows(ctr("images", "ls", namespace=n))}[NAME] for n in ("default", "back")]
    assert digests[0] == digests[1]


def test_content_can_be_read_labelled_written_and_removed(ctr: Server) -> None:
    digest = next(row for row in rows(ctr("images", "ls")) if row[0] == NAME)[2]
    listed = {row[0] for row in rows(ctr("content", "ls"))}
    assert digest in listed
    manifest = json.loads(ctr("content", "get", digest))
    assert manifest["schemaVersion"] == 2
    ctr("content", "label", digest, "mine=yes")
    assert "mine=yes" in next(line for line in ctr("content", "ls").splitlines() if digest in line)
    ctr("content", "label", digest, "mine=")
    assert "not found" in ctr.run("content", "get", NOTHING).stderr
    hello = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

    def written_and_read() -> bool:
        written = subprocess.run(
            ctr.stage._command(["ctr", "--address", ctr.socket, "content", "ingest", "--expected-size", "5", "some-ref"]),
            input=b"hello", capture_output=True, **ctr.stage._options(None))  # type: ignore[call-overload]
        assert written.returncode == 0, written.stderr
        return ctr.run("content", "get", hello).stdout == "hello"

    # ctr holds it by nothing: a collection may come in between.
    ctr.stage.eventually(written_and_read, why="a blob written and read")
    ctr.run("content", "rm", hello)
    assert "not found" in ctr.run("content", "get", hello).stderr
    wrong = subprocess.run(
        ctr.stage._command(["ctr", "--address", ctr.socket, "content", "ingest", "--expected-digest", NOTHING, "wrong-ref"]),
        input=b"hello", capture_output=True, **ctr.stage._options(None))  # type: ignore[call-overload]
    assert wrong.returncode != 0 and b"unexpected commit digest" in wrong.stderr


def test_an_image_is_converted(ctr: Server) -> None:
    ctr("images", "convert", "--uncompress", "--oci", NAME, "converted:1")
    assert "converted:1" in ctr("images", "ls", "-q")
    ctr("images", "rm", "converted:1")


# --- snapshots and leases


def test_snapshots(ctr: Server) -> None:
    committed = [row[0] for row in rows(ctr("snapshots", "ls")) if row[-1] == "Committed"]
    assert committed
    base = committed[0]
    mounts = ctr("snapshots", "prepare", "--target", str(ctr.directory / "m"), "active", base)
    assert "mount -t overlay" in mounts
    assert ctr("snapshots", "mounts", str(ctr.directory / "m"), "active") == mounts
    assert "already exists" in ctr.run("snapshots", "prepare", "active", base).stderr
    ctr("snapshots", "view", "look", base)
    info = json.loads(ctr("snapshots", "info", "active"))
    assert (info["Kind"], info["Parent"]) == ("Active", base)
    ctr("snapshots", "label", "active", "a=b")
    assert json.loads(ctr("snapshots", "info", "active"))["Labels"]["a"] == "b"
    refused = ctr.run("snapshots", "rm", base)
    assert refused.returncode != 0 and "cannot remove snapshot with child" in refused.stderr
    ctr("snapshots", "commit", "mine", "active")
    assert json.loads(ctr("snapshots", "info", "mine"))["Kind"] == "Committed"
    assert "mine" in ctr("snapshots", "usage", "mine")
    ctr.run("snapshots", "rm", "look")  # ctr keeps views by nothing: a collection may have been quicker
    ctr("snapshots", "rm", "mine")
    assert "not found" in ctr.run("snapshots", "info", "mine").stderr
    assert "not found" in ctr.run("snapshots", "prepare", "x", "nothing").stderr
    assert base in ctr("snapshots", "tree")


def test_the_native_snapshotter(ctr: Server, archive: Path, name: str) -> None:
    done = ctr.run("images", "import", "--snapshotter", "native", archive, namespace="native")
    if ctr.kind == "containerd" and "no unpack platforms defined" in done.stderr:
        pytest.skip("this containerd unpacks for the snapshotter of its configuration alone")
    assert done.returncode == 0, done.stderr
    assert ctr("run", "--rm", "--snapshotter", "native", NAME, name, "echo", "native", namespace="native") == "native"


def test_leases(ctr: Server) -> None:
    lease = ctr("leases", "create", "--id", "mine", "a=b")
    assert lease == "mine"
    assert "a=b" in ctr("leases", "ls")
    assert "already exists" in ctr.run("leases", "create", "--id", "mine").stderr
    ctr("leases", "rm", "mine")
    assert "mine" not in ctr("leases", "ls", "-q")
    assert "not found" in ctr.run("leases", "rm", "mine").stderr


# --- containers and tasks


def test_containers_without_tasks(ctr: Server) -> None:
    ctr("containers", "create", NAME, "idle", "true")
    assert ["idle", NAME, "io.containerd.runc.v2"] in rows(ctr("containers", "ls"))
    assert "already exists" in ctr.run("containers", "create", NAME, "idle", "true").stderr
    info = json.loads(ctr("containers", "info", "idle"))
    assert info["Spec"]["process"]["args"] == ["true"]
    ctr("containers", "label", "idle", "a=b")
    assert ctr("containers", "ls", "-q", "labels.a==b") == "idle"
    assert ctr("containers", "ls", "-q", "labels.a==c") == ""
    ctr("containers", "rm", "idle")
    assert "not found" in ctr.run("containers", "info", "idle").stderr


def test_run_prints_and_gives_the_exit_code(ctr: Server, name: str) -> None:
    assert ctr("run", "--rm", NAME, name, "sh", "-c", "echo $$ $(ls /sys/class/net)") == "1 lo"
    assert ctr.run("run", "--rm", NAME, name, "sh", "-c", "exit 7").returncode == 7
    assert name not in ctr("containers", "ls", "-q")


def test_run_reads_its_input(ctr: Server, name: str) -> None:
    assert ctr("run", "--rm", NAME, name, "head", "-n", "1", text="to and fro\n") == "to and fro"


def test_run_on_a_terminal(ctr: Server, name: str) -> None:
    code, screen = ctr.stage.typing("ctr", "--address", ctr.socket, "run", "--rm", "--tty", NAME, name, "sh",
                                    types="tty; echo $((6*7)); exit 5\n", until="/ #")
    assert code == 5
    assert "/dev/pts/0" in screen and "42" in screen


def test_a_missing_program_is_named(ctr: Server, name: str) -> None:
    done = ctr.run("run", "--rm", NAME, name, "/nothing/here")
    assert done.returncode != 0
    assert "/nothing/here" in done.stderr and "no such file or directory" in done.stderr
    assert not ctr.status(name)


@pytest.mark.parametrize("binary", ["runc", "crun"])
def test_other_runtimes(ctr: Server, name: str, binary: str) -> None:
    needs(binary)
    done = ctr.run("run", "--rm", "--runc-binary", binary, NAME, name, "echo", "other")
    if "cgroups in hybrid mode not supported" in done.stderr:
        pytest.skip("crun refuses this machine's cgroups")
    assert done.stdout == "other\n", done.stderr
    ctr("run", "--detach", "--runc-binary", binary, NAME, name, "sleep", "1000")
    assert ctr.run("task", "exec", "--exec-id", "e", name, "sh", "-c", "exit 3").returncode == 3
    ctr.run("task", "rm", "--force", name)
    ctr("container", "rm", name)


def test_another_shim_by_its_path(ctr: Server, name: str) -> None:
    needs("containerd-shim-runc-v2")
    path = ctr.stage.out("sh", "-c", "command -v containerd-shim-runc-v2")
    ctr("run", "--detach", "--runtime", path, NAME, name, "sleep", "1000")
    assert "containerd-shim-runc-v2" in ctr.stage.out("ps", "-eo", "args")
    assert ctr("task", "exec", "--exec-id", "e", name, "echo", "in") == "in"
    ctr.run("task", "rm", "--force", name)
    ctr("container", "rm", name)
    unknown = ctr.run("run", "--rm", "--runtime", "io.containerd.nothing.v7", NAME, name, "true")
    assert unknown.returncode != 0 and "containerd-shim-nothing-v7" in unknown.stderr
    ctr("container", "rm", name) if name in ctr("containers", "ls", "-q") else None


def test_exec(ctr: Server, sleeper: str) -> None:
    assert "sleep" in ctr("task", "exec", "--exec-id", "look", sleeper, "cat", "/proc/1/cmdline")
    assert ctr.run("task", "exec", "--exec-id", "code", sleeper, "sh", "-c", "exit 9").returncode == 9
    code, screen = ctr.stage.typing("ctr", "--address", ctr.socket, "task", "exec", "--tty", "--exec-id", "tty", sleeper, "sh",
                                    types="tty && echo $((6*7)); exit 4\n", until="/ #")
    assert code == 4
    assert "/dev/pts/" in screen and "42" in screen


def test_tasks_are_listed_paused_measured_and_killed(ctr: Server, sleeper: str) -> None:
    assert ctr.status(sleeper) == "RUNNING"
    ctr("task", "pause", sleeper)
    assert ctr.status(sleeper) == "PAUSED"
    ctr("task", "resume", sleeper)
    assert ctr.status(sleeper) == "RUNNING"
    assert len(rows(ctr("task", "ps", sleeper))) == 1
    assert "memory" in ctr("task", "metrics", sleeper)
    ctr("task", "kill", "--signal", "SIGKILL", sleeper)
    ctr.stage.eventually(lambda: ctr.status(sleeper) == "STOPPED", why="a killed task stopped")
    removed = ctr.run("task", "rm", sleeper)
    assert "137" in removed.stderr + removed.stdout
    assert "not found" in ctr.run("task", "kill", sleeper).stderr


def test_attach_gets_what_comes_next(ctr: Server, name: str) -> None:
    ctr("run", "--detach", NAME, name, "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; echo came; exit 6")
    attached = ctr.background("task", "attach", name)
    time.sleep(0.5)
    ctr("task", "exec", "--exec-id", "go", name, "touch", "/tmp/go")
    output, _ = attached.communicate(timeout=20)
    assert attached.returncode == 6
    assert output.strip() == "came"
    ctr("task", "rm", name) if ctr.status(name) else None
    ctr("container", "rm", name)


def test_events_are_told_in_order(ctr: Server, name: str) -> None:
    listening = ctr.background("events", limit="6")
    time.sleep(0.5)
    ctr("run", "--rm", NAME, name, "true")
    output, _ = listening.communicate(timeout=20)
    topics = [line.split()[5] for line in output.splitlines() if name in line]
    wanted = ["/snapshot/prepare", "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete",
              "/containers/delete", "/snapshot/remove"]
    assert [topic for topic in topics if topic in wanted and topic != "/snapshot/remove"] == wanted[:-1]
    assert "/snapshot/remove" in topics


def test_a_killed_server_comes_back_and_knows_its_containers(ctr: Server, name: str) -> None:
    ctr("run", "--detach", NAME, name, "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 8")
    ctr("run", "--detach", NAME, f"{name}-2", "sleep", "1000")
    ctr.kill()
    ctr.start()
    assert ctr.status(name) == "RUNNING"
    ctr("task", "exec", "--exec-id", "go", name, "touch", "/tmp/go")
    ctr.stage.eventually(lambda: ctr.status(name) == "STOPPED", why="the task stopped")
    assert "8" in (removed := ctr.run("task", "rm", name)).stderr + removed.stdout
    ctr("task", "kill", "--signal", "SIGKILL", f"{name}-2")
    ctr.stage.eventually(lambda: ctr.status(f"{name}-2") == "STOPPED", why="the other task stopped")
    ctr.run("task", "rm", f"{name}-2")
    ctr("container", "rm", name, f"{name}-2")
    assert NAME in ctr("images", "ls", "-q")
