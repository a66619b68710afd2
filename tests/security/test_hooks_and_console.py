"""Programs that the runtime starts for the configuration, and the terminal that it opens: neither is the container's to choose."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machine import Bundle, Machine, compile_c

KINDS = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]
TELL = "cat > {out}/state; env > {out}/env; ls -l /proc/self/fd > {out}/fd; echo {who} >> {out}/who"


def script(path: Path, who: str, out: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + TELL.format(out=out, who=who) + "\n")
    path.chmod(0o755)


@pytest.fixture
def out(bundle: Bundle) -> Path:
    """A folder of the host in which hooks leave what they saw; the container has it on /mnt."""
    folder = bundle.path / "out"
    folder.mkdir()
    bundle.bind(folder, "/mnt", "rw")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_host_are_never_looked_for_in_the_container(machine: Machine, bundle: Bundle, out: Path, kind: str) -> None:
    """CVE-2019-14271's class: the image has a program of the hook's name, and a PATH, library path and interpreter of its own."""
    hook = machine.folder / f"hooks-{kind}" / "hook"
    script(hook, "host", str(out))
    script(bundle.rootfs / str(hook).lstrip("/"), "image", "/mnt")
    bundle.process["env"] = [f"PATH=/evil:{'/bin'}", "LD_PRELOAD=/evil.so", "HOME=/"]
    bundle.spec["hooks"] = {kind: [{"path": str(hook)}]}
    bundle.process["args"] = ["true"]
    machine.ok("run", "-b", bundle.write(), machine.name(), env={"SECRET": "canary"})
    assert (out / "who").read_text() == "host\n"
    environ = dict(line.partition("=")[::2] for line in (out / "env").read_text().splitlines())
    assert set(environ) <= {"PWD", "SHLVL", "_", "OLDPWD"}, "of the environment a hook has what the configuration gives it"
    state = json.loads((out / "state").read_text())
    assert state["bundle"] == str(bundle.path)


def test_a_hook_of_the_container_is_never_looked_for_on_the_host(machine: Machine, bundle: Bundle, out: Path) -> None:
    """startContainer runs inside: a path of the host's is not found there."""
    hook = machine.folder / "start-hook" / "hook"
    script(hook, "host", str(out))
    bundle.spec["hooks"] = {"startContainer": [{"path": str(hook)}]}
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 1, done
    assert not (out / "who").exists()


@pytest.mark.parametrize("kind", [*KINDS[:3], "startContainer"])
def test_a_hook_that_hangs_or_fails_ends_the_start_and_is_not_left(machine: Machine, bundle: Bundle, kind: str) -> None:
    """A timeout kills the hook; the container is undone. The leak check looks for both."""
    shell = "/bin/sh"
    for arguments, timeout in ((["sh", "-c", "exec sleep 1000"], 1), (["sh", "-c", "exit 3"], 0)):
        bundle.spec["hooks"] = {kind: [{"path": shell, "args": arguments, **({"timeout": timeout} if timeout else {})}]}
        container = machine.name()
        begun = time.monotonic()
        done = machine("run", "-d", "-b", bundle.write(), container, timeout=20)
        assert done.code == 1 and kind in done.err, done
        assert time.monotonic() - begun < 10
        assert machine("state", container).code == 1


@pytest.mark.parametrize("path", ["relative/hook", "hook", "", "../hook", "./hook"])
def test_a_hook_has_an_absolute_path(machine: Machine, bundle: Bundle, path: str) -> None:
    """What it is relative to would be the caller's folder, or worse, the container's."""
    shutil.copy(bundle.rootfs / "bin/busybox", bundle.path / "hook")
    bundle.spec["hooks"] = {"createRuntime": [{"path": path}]}
    done = machine("run", "-b", bundle.write(), machine.name(), cwd=str(bundle.path))
    assert done.code == 1, done


SWAP = r"""
#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/stat.h>
/* swap DIR VICTIM MISSING: DIR/console is a file, a link to VICTIM, one to MISSING, nothing, a FIFO, and again. */
int main(int argc, char **argv)
{
	int dir = open(argv[1], O_PATH | O_DIRECTORY);
	for (unsigned i = 0;; i++) {
		close(openat(dir, "new", O_CREAT | O_RDWR, 0666));
		renameat(dir, "new", dir, "console");
		usleep(i % 83);
		symlinkat(argv[2 + i % 2], dir, "new");
		renameat(dir, "new", dir, "console");
		usleep(i % 97);
		if (i % 5 == 0) {
			unlinkat(dir, "console", 0);
			mkfifoat(dir, "console", 0666);
			usleep(i % 41);
		}
	}
}
"""


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of the host that stays as it is."""
    path = tmp_path / "victim"
    path.write_text("the host's")
    os.chown(path, 7, 7)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == "the host's"
    assert (after.st_mode, after.st_uid, after.st_ino, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_ino, before.st_mtime_ns)


def test_the_console_is_bound_to_no_path_that_somebody_exchanges(machine: Machine, bundle: Bundle, victim: Path) -> None:
    """CVE-2025-52565, crun's CVE-2026-88265: /dev/console changes its kind all the time while a terminal is set up."""
    import subprocess

    bundle.without("/dev", "/dev/shm", "/dev/mqueue")
    bundle.writable()
    bundle.process["terminal"] = True
    bundle.process["user"] = {"uid": 4242, "gid": 4242}
    bundle.shell("echo hello; tty")
    path = bundle.write()
    up = os.path.relpath(victim, bundle.rootfs / "dev")
    swapping = subprocess.Popen([compile_c(SWAP), bundle.rootfs / "dev", up, f"{up}-missing"])
    started = 0
    try:
        for _ in range(40):
            done = machine("run", "-b", path, machine.name(), timeout=20)
            started += "hello" in done.out
            assert "Traceback" not in done.err
    finally:
        swapping.kill()
        swapping.wait()
    assert started
    assert sorted(p.name for p in victim.parent.iterdir()) == ["bundle", "victim"]


@pytest.mark.parametrize("ptmx", ["file", "link-out", "fifo", "null", "link-self", "folder", "missing"])
def test_a_false_ptmx_gives_no_terminal_and_harms_nobody(machine: Machine, bundle: Bundle, victim: Path, tmp_path: Path, ptmx: str) -> None:
    """CVE-2025-52565: another container's folder lies on /dev/pts, with a ptmx of its own making."""
    pts = tmp_path / "pts"
    pts.mkdir()
    if ptmx == "file":
        (pts / "ptmx").write_text("")
    elif ptmx == "link-out":
        (pts / "ptmx").symlink_to("../" * 20 + str(victim).lstrip("/"))
    elif ptmx == "fifo":
        os.mkfifo(pts / "ptmx")
    elif ptmx == "null":
        os.mknod(pts / "ptmx", 0o20666, os.makedev(1, 3))
    elif ptmx == "link-self":
        (pts / "ptmx").symlink_to("/proc/self/fd/0")
    elif ptmx == "folder":
        (pts / "ptmx").mkdir()
    bundle.without("/dev/pts")
    bundle.bind(pts, "/dev/pts", "rw")
    bundle.process["terminal"] = True
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name(), timeout=20)
    assert done.code == 1 and "terminal" in done.err, done


def test_an_image_without_devpts_uses_no_terminal_of_the_host(machine: Machine, bundle: Bundle) -> None:
    """A terminal number of the container's is none of the host's: nothing of the host's /dev/pts changes."""
    before = {entry.name: os.stat(entry.path).st_uid for entry in os.scandir("/dev/pts")}
    bundle.process["terminal"] = True
    bundle.process["user"] = {"uid": 4242, "gid": 4242}
    bundle.shell("tty; stat -c %u /dev/console $(tty)")
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.out.split() == ["/dev/pts/0", "4242", "4242"], done
    after = {entry.name: os.stat(entry.path).st_uid for entry in os.scandir("/dev/pts")}
    assert all(after.get(name, owner) == owner for name, owner in before.items())
