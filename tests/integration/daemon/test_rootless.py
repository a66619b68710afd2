"""The daemon of an ordinary user: everything but limits of resources, without a right of root."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import image
from support.command import PATH, public_environment

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")]

UID, RANGE = 64977, 700000
"""The user, and the first of the subordinate ids; both are nobody's else."""


class User:
    """One user with a home, a runtime folder, and perhaps a range of ids, on a /etc of the tests' own."""

    def __init__(self, environment: str, folder: Path, *, ranges: bool) -> None:
        self.bin, self.folder = f"{environment}/bin", folder
        for name in ("home", "run"):
            (folder / name).mkdir(mode=0o700)
            os.chown(folder / name, UID, UID)
        (folder / "passwd").write_text(Path("/etc/passwd").read_text() + f"boxshiptest:x:{UID}:{UID}::{folder}/home:/bin/sh\n")
        (folder / "sub").write_text(f"boxshiptest:{RANGE}:65536\n" if ranges else "")
        self.state = folder / "run" / "boxship"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.environ = {"PATH": f"{self.bin}:{PATH}", "HOME": f"{folder}/home", "XDG_RUNTIME_DIR": f"{folder}/run"}

    def words(self, *argv: str) -> list[str]:
        """As that user, where /etc knows about him."""
        files = (("passwd", "passwd"), ("sub", "subuid"), ("sub", "subgid"))
        binds = " && ".join(f"mount --bind {self.folder}/{mine} /etc/{there}" for mine, there in files)
        script = f'mount --make-rslave / && {binds} && exec setpriv --reuid {UID} --regid {UID} --clear-groups "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *argv]

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(*argv), env=self.environ, cwd="/", capture_output=True, text=True, timeout=60)

    def docker(self, *argv: str) -> str:
        done = self.run("docker", "--host", f"unix://{self.state}/docker.sock", *argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            offset = log.tell()
            self.daemon = subprocess.Popen(self.words(f"{self.bin}/boxshipd"), env=self.environ, cwd="/", stdout=log, stderr=log)
        end = time.monotonic() + 60
        while b"msg=ready" not in (text := (self.folder / "log").read_bytes()[offset:]):
            assert self.daemon.poll() is None and time.monotonic() < end, text.decode()
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(30)
        self.daemon = None
        return code

    def processes(self) -> dict[int, str]:
        """What runs as the user, or as one of his other ids."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    uid, line = entry.stat().st_uid, (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if line and (uid == UID or RANGE <= uid < RANGE + 65536):
                    found[int(entry.name)] = line.replace(bytes(1), b" ").decode()
        return found


@contextmanager
def user(environment: str, *, ranges: bool) -> Iterator[User]:
    folder = Path("/tmp") / f"br-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o755)
    made = User(environment, folder, ranges=ranges)
    try:
        yield made
    finally:
        if made.daemon is not None:
            made.daemon.kill()
            made.daemon.wait()
        for pid in made.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def environment() -> Iterator[str]:
    with public_environment() as folder:
        if folder is None:
            pytest.skip("no Python of the version that runs the tests which ordinary users can run: apt-get install python3")
        yield folder


needs_docker = pytest.mark.skipif(not shutil.which("docker"), reason="docker is missing: apt-get install docker.io")
needs_newuidmap = pytest.mark.skipif(not shutil.which("newuidmap"), reason="newuidmap is missing: apt-get install uidmap")


@needs_docker
@needs_newuidmap
def test_containers_of_an_ordinary_user_live_through_his_daemon(environment: str) -> None:
    with user(environment, ranges=True) as one:
        one.start()
        assert os.stat(one.state / "docker.sock").st_uid == UID
        image.write_archive(one.folder / "image.tar")
        os.chmod(one.folder / "image.tar", 0o644)
        one.docker("load", "--input", f"{one.folder}/image.tar")
        assert "rootless" in one.docker("info", "--format", "{{.SecurityOptions}}")
        script = "id -u; id -g; echo written > /file; cat /file; stat -c %u /etc/passwd; ls /sys/class/net; test -c /dev/null && echo device"
        said = one.docker("run", "--rm", "--network=none", "--user=33:33", image.NAME, "sh", "-c", script.replace("> /file", "> /tmp/file")
                          .replace("cat /file", "cat /tmp/file"))
        assert said.split() == ["33", "33", "written", "0", "lo", "device"]
        assert one.docker("run", "--rm", "--network=host", image.NAME, "sh", "-c", "echo > /file && ls -d /sys/class/net/lo").strip()
        # What it cannot have is said.
        refused = one.run("docker", "--host", f"unix://{one.state}/docker.sock", "run", "--rm", "--network=none", "--memory=20m",
                          image.NAME, "true")
        if refused.returncode:
            assert "cgroup" in refused.stderr

        one.docker("run", "--detach", "--network=none", "--name=stays", image.NAME, "sh", "-c", "echo first; sleep 1000")
        pid = int(one.docker("inspect", "--format", "{{.State.Pid}}", "stays"))
        assert os.stat(f"/proc/{pid}").st_uid == UID
        note = (one.state / "namespaces").read_text()
        one.stop(signal.SIGKILL)
        one.start()
        assert (one.state / "namespaces").read_text() == note, "the second daemon has other namespaces"
        assert int(one.docker("inspect", "--format", "{{.State.Pid}}", "stays")) == pid
        assert one.docker("exec", "stays", "cat", "/proc/self/uid_map").split() == ["0", str(UID), "1", "1", str(RANGE), "65536"]
        assert one.docker("logs", "stays") == "first\n"
        one.docker("rm", "--force", "stays")
        assert one.docker("ps", "--all", "--quiet") == ""
        assert one.stop() == 0
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{one.folder}/" in line]
        assert not mounts


@needs_docker
def test_without_a_range_of_ids_there_is_root_alone(environment: str) -> None:
    with user(environment, ranges=False) as one:
        one.start()
        image.write_archive(one.folder / "image.tar")
        os.chmod(one.folder / "image.tar", 0o644)
        one.docker("load", "--input", f"{one.folder}/image.tar")
        said = one.docker("run", "--rm", "--network=none", image.NAME, "cat", "/proc/self/uid_map")
        assert said.split() == ["0", str(UID), "1"]
        assert one.stop() == 0


def test_the_folder_of_another_user_is_not_used(environment: str) -> None:
    with user(environment, ranges=False) as one:
        os.chown(one.folder / "run", 0, 0)
        done = one.run(f"{one.bin}/boxshipd")
        assert done.returncode == 1
        assert "run is not a folder of this user alone" in done.stderr
