"""Nothing is set up beforehand: the first command starts the daemon, which leaves when nobody needs it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import image

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
BOXSHIP = str(Path(sys.executable).with_name("boxship"))


class Own:
    """The command on folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.env = {**os.environ, "BOXSHIP_STATE": str(self.state), "BOXSHIP_ROOT": str(folder / "root"), "BOXSHIP_IDLE_EXIT": "600", "HOME": str(folder)}
        for name in ("DOCKER_HOST", "BOXSHIP_HOST"):
            self.env.pop(name, None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([BOXSHIP, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env)

    def run(self, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run([BOXSHIP, *words], input=data, capture_output=True, env=self.env, timeout=60)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def out(self, *words: str, data: bytes = b"") -> str:
        done = self.run(*words, data=data)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def daemons(self) -> list[int]:
        """Processes that serve this state folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"boxship.daemon" in words and os.fsencode(self.state) in words:
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        for pid in self.daemons():
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not self.daemons())


def eventually(what: Callable[[], object], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def own() -> Iterator[Own]:
    folder = Path(tempfile.mkdtemp(prefix="bc-"))
    own = Own(folder)
    try:
        yield own
    finally:
        if own.daemons():
            for name in own.run("ps", "-aq").stdout.split():
                own.run("rm", "-f", name)
            own.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_commands_at_once_start_one_daemon(own: Own) -> None:
    commands = [own.start("ps", "-q") for _ in range(4)]
    for command in commands:
        out, err = command.communicate(timeout=60)
        assert (command.returncode, out, err) == (0, "", "")
    assert len(own.daemons()) == 1


def test_a_daemon_that_was_killed_is_replaced(own: Own) -> None:
    own.out("ps")
    (old,) = own.daemons()
    os.kill(old, signal.SIGKILL)
    eventually(lambda: old not in own.daemons())
    assert (own.state / "docker.sock").exists()
    own.out("ps")
    assert own.daemons() and old not in own.daemons()


def test_a_daemon_leaves_when_it_is_idle_and_without_containers(own: Own) -> None:
    if not image.BUSYBOX.exists():
        pytest.skip("/bin/busybox is missing: apt-get install busybox-static")
    own.env["BOXSHIP_IDLE_EXIT"] = "2"
    own.out("import", "-", "busybox", data=image.layer())
    own.out("run", "-d", "--network=none", "--name", "stays", "busybox", "sleep", "600")
    time.sleep(5)
    assert own.daemons(), "it left with a container that runs"
    own.out("rm", "-f", "stays")
    eventually(lambda: not own.daemons())
    assert own.out("images", "-q")  # and is there again


def test_a_daemon_that_cannot_start_says_why(own: Own) -> None:
    own.env["BOXSHIP_ROOT"] = "/proc/nowhere"
    for words, code in ((["ps"], 1), (["run", "busybox"], 125)):
        done = own.run(*words)
        assert done.returncode == code
        assert "the daemon does not start: " in done.stderr and "/proc/nowhere" in done.stderr
    assert not own.daemons()


def test_only_the_daemon_of_the_caller_is_started(own: Own) -> None:
    own.env["DOCKER_HOST"] = f"unix://{own.state}/docker.sock"
    assert own.run("ps").returncode == 1
    assert not own.daemons()


def test_a_containers_life_from_the_command_line(own: Own, tmp_path: Path) -> None:
    if not image.BUSYBOX.exists():
        pytest.skip("/bin/busybox is missing: apt-get install busybox-static")
    own.out("import", "-c", 'CMD ["sh"]', "-", "busybox", data=image.layer())
    assert own.out("run", "--rm", "--network=none", "busybox", "echo", "hello") == "hello"
    assert own.out("run", "--rm", "-i", "--network=none", "busybox", "cat", data=b"typed") == "typed"
    failed = own.run("run", "--network=none", "--name", "failed", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (failed.returncode, failed.stdout, failed.stderr.splitlines()[-1]) == (7, "out\n", "err")
    assert own.run("logs", "failed").stdout == "out\n"
    assert own.run("run", "--rm", "--network=none", "busybox", "nosuch").returncode == 127
    own.out("run", "-d", "--network=none", "--name", "up", "busybox", "sleep", "600")
    assert own.out("ps", "--format", "{{.Names}} {{.Image}}") == "up busybox"
    assert own.run("exec", "up", "sh", "-c", "exit 5").returncode == 5
    (tmp_path / "file").write_text("content")
    own.out("cp", str(tmp_path / "file"), "up:/tmp/there")
    assert own.out("exec", "up", "cat", "/tmp/there") == "content"
    own.out("cp", "up:/tmp/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "content"
    assert "A /tmp/there" in own.out("diff", "up").splitlines()
    assert own.out("commit", "up", "with:file").startswith("sha256:")
    assert own.out("run", "--rm", "--network=none", "with:file", "cat", "/tmp/there") == "content"
    assert "PID" in own.out("top", "up")
    assert "up" in own.out("stats", "--no-stream", "up")
    own.out("pause", "up")
    assert "(Paused)" in own.out("ps", "--format", "{{.Status}}")
    own.out("unpause", "up")
    own.out("rename", "up", "down")
    own.out("stop", "-t", "0", "down")
    assert own.out("wait", "down") == "137"
    saved = subprocess.run([BOXSHIP, "save", "busybox"], capture_output=True, env=own.env, check=True).stdout
    assert "manifest.json" in tarfile.open(fileobj=io.BytesIO(saved)).getnames()
    exported = subprocess.run([BOXSHIP, "export", "down"], capture_output=True, env=own.env, check=True).stdout
    assert "tmp/there" in tarfile.open(fileobj=io.BytesIO(exported)).getnames()
    own.out("rm", "down", "failed")
    own.out("rmi", "with:file", "busybox")
    assert "Loaded image" in own.out("load", data=saved)
    assert "down" in own.out("events", "--since", "10m", "--until", "0s")
    own.out("system", "prune", "-af")
    assert own.out("images", "-q") == own.out("ps", "-aq") == ""


def test_the_machines_own_image_goes_by_the_daemon_and_without_one_where_there_can_be_none(own: Own) -> None:
    script = 'echo $$; ls /sys/class/net; test -e /etc/shadow || echo none'
    assert own.out("run", "--rm", "host", "--", "sh", "-c", script) == "1\nlo\nnone"
    assert len(own.daemons()) == 1
    assert own.out("ps", "-aq") == ""
    own.end()
    own.env["BOXSHIP_ROOT"] = "/proc/nowhere"
    assert own.out("run", "--rm", "host", "--", "sh", "-c", script) == "1\nlo\nnone"
    assert not own.daemons()
    # What only an engine can do is not left out silently.
    assert own.run("run", "--rm", "-p", "80", "host", "true").returncode == 125


def test_the_machines_own_image_runs_where_the_daemon_does_not_start(own: Own) -> None:
    own.state.mkdir()
    (own.state / "docker.sock").mkdir()
    own.env["BOXSHIP_DEBUG"] = "1"
    done = own.run("run", "--rm", "host", "echo", "there")
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr
    assert "the container is run without a daemon" in done.stderr
