"""The images `host` and `python`, run by the docker CLI: nothing comes from a network, nothing private is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, clear

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")]
CANARY = "canary-7d3f1a"

Docker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    if shutil.which("docker") is None:
        pytest.skip("the docker CLI is not installed: apt-get install docker.io")
    # Upper folders of overlays cannot lie on every file system on which a temporary folder may.
    folder = tmp_path_factory.mktemp("builtin")
    daemon = Daemon(folder)
    daemon.start()
    socket = daemon.state / "docker.sock"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["docker", "-H", f"unix://{socket}", *words], capture_output=True, text=True, timeout=100)

    for _ in range(100):
        if run("version").returncode == 0:
            break
        time.sleep(0.1)
    yield run
    for name in run("ps", "-aq").stdout.split():
        run("rm", "-f", name)
    daemon.stop()
    clear(folder)


def out(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_host_is_the_machines_programs_and_none_of_its_secrets(docker: Docker) -> None:
    planted = [Path("/root/.boxship-canary"), Path("/etc/boxship-canary"), Path("/usr/local/etc/boxship-canary"), Path("/run/boxship-canary")]
    made = [path for path in planted if path.parent.is_dir()]
    try:
        for path in made:
            path.write_text(CANARY)
            path.chmod(0o644)
        seen = out(docker("run", "--rm", "--network", "none", "host", "sh", "-c",
                          "grep -rs canary-7d3f /root /home /etc /run /var /usr/local/etc; ls /etc/shadow /etc/ssh 2>&1; test -x /usr/bin/env && echo there"))
    finally:
        for path in made:
            path.unlink()
    assert CANARY not in seen
    assert "there" in seen
    assert seen.count("No such file") == 2


def test_what_is_written_stays_in_the_container(docker: Docker) -> None:
    name = out(docker("create", "--network", "none", "host", "sh", "-c", "cat /usr/mark 2>/dev/null; echo kept >/usr/mark")).strip()
    try:
        assert out(docker("start", "-a", name)) == ""
        assert out(docker("start", "-a", name)) == "kept\n"
    finally:
        docker("rm", "-f", name)
    assert not Path("/usr/mark").exists()


def test_what_is_written_over_the_machines_programs_is_a_change_like_others(docker: Docker) -> None:
    out(docker("image", "inspect", "host"))
    assert "host" in out(docker("images", "--format", "{{.Repository}}")).split()
    name = out(docker("create", "--network", "none", "host", "sh", "-c", "echo new >/usr/mark; rm /usr/bin/env")).strip()
    out(docker("start", "-a", name))
    assert {"A /usr/mark", "D /usr/bin/env"} <= set(out(docker("diff", name)).splitlines())
    assert "new" in out(docker("cp", f"{name}:/usr/mark", "-"))
    out(docker("commit", name, "mine"))
    out(docker("rm", name))
    seen = docker("run", "--rm", "--network", "none", "mine", "sh", "-c", "cat /usr/mark; ls /usr/bin/env /usr/local/etc")
    assert seen.stdout == "new\n/usr/local/etc:\n" and "/usr/bin/env" in seen.stderr
    out(docker("rmi", "mine"))


def test_python_needs_no_network_and_brings_its_libraries(docker: Docker) -> None:
    program = "import ssl, sqlite3, ctypes, lzma, bz2, zlib, hashlib, json; print('all there')"
    assert out(docker("run", "--rm", "--network", "none", "python", "python3", "-c", program)) == "all there\n"
    assert docker("run", "--rm", "--network", "none", "python", "sh").returncode == 127
