"""A container that tries to change the runtime which started it (CVE-2019-5736)."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import boxship
from support.machine import Bundle, Machine, compile_c

SEALED = "/memfd:boxrun-init (deleted)"

# Everything by which a program that is somebody's /proc/PID/exe may be changed; prints what worked.
OVERWRITE = r"""
#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/stat.h>
int main(int argc, char **argv)
{
	char path[64], link[256] = "";
	snprintf(path, sizeof path, "/proc/%s/exe", argv[1]);
	readlink(path, link, sizeof link - 1);
	printf("exe %s\n", link);
	int ways[] = {O_WRONLY, O_RDWR, O_WRONLY | O_TRUNC, O_RDWR | O_APPEND};
	for (int i = 0; i < 4; i++) {
		int fd = open(path, ways[i]);
		if (fd < 0)
			continue;
		if (write(fd, "owned", 5) > 0) printf("CHANGED by write %d\n", i);
		if (ftruncate(fd, 3) == 0) printf("CHANGED by truncate\n");
		if (fallocate(fd, 0, 0, 1 << 20) == 0) printf("CHANGED by fallocate\n");
		if (mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED) printf("CHANGED by mmap\n");
	}
	int fd = open(path, O_PATH);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	fd = open(path, O_WRONLY);
	if (fd >= 0 && write(fd, "owned", 5) > 0) printf("CHANGED by reopening\n");
	printf("done\n");
}
"""


def runtime_files(machine: Machine) -> Iterator[Path]:
    """All that a change of would be the host's loss: the native entry, the interpreter, the package."""
    yield Path(machine.exe)
    yield Path(os.path.realpath(sys.executable))
    for path in Path(boxship.__file__).parent.rglob("*"):
        if path.suffix in (".so", ".py") or path.name == "_init":
            yield path


def digests(machine: Machine) -> dict[str, tuple[str, int]]:
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mode) for p in runtime_files(machine)}


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("how", ["/proc/self/exe", "/script"])
def test_the_runtime_as_entrypoint_is_a_sealed_copy(machine: Machine, bundle: Bundle, how: str, warm: bool) -> None:
    """CVE-2019-5736: an image whose entrypoint is /proc/self/exe, or a script that names it as its interpreter.

    The program that starts is the runtime's own; it is kept waiting, so that another process of the container may try
    all it can on it.
    """
    if warm:
        machine.warm_up()
    (bundle.rootfs / "script").write_text("#!/proc/self/exe\n")
    (bundle.rootfs / "script").chmod(0o755)
    (bundle.rootfs / "overwrite").write_bytes(compile_c(OVERWRITE).read_bytes())
    (bundle.rootfs / "overwrite").chmod(0o755)
    container = machine.name()
    before = digests(machine)
    machine.ok("run", "-d", "-b", bundle.write(), container, warm=warm)
    # Descriptors 3 and 4 as the runtime's program wants them: so it waits for a word instead of ending at once.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create("area")
    high = [os.dup(theirs.fileno()), os.dup(memory)]
    moved = [os.dup2(fd, 800 + i) for i, fd in enumerate(high)]

    def in_place() -> None:
        os.dup2(moved[0], 3)
        os.dup2(moved[1], 4)

    pid_file = bundle.path / "pid"
    entered = machine.begin(
        "exec", "--preserve-fds", "2", "--pid-file", str(pid_file), container, how, warm=warm, before=in_place, pass_fds=(3, 4)
    )
    for fd in (*high, *moved, memory):
        os.close(fd)
    theirs.close()
    deadline = time.monotonic() + 20
    pid = 0
    while time.monotonic() < deadline and entered.process.poll() is None:
        if pid_file.exists():
            pid = int(pid_file.read_text())
            if os.readlink(f"/proc/{pid}/exe") == SEALED and b"boxrun-init" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                break
        time.sleep(0.01)
    assert pid and entered.process.poll() is None
    inner = next(line.split()[-1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid"))
    attack = machine.ok("exec", container, "/overwrite", inner, warm=warm)
    assert f"exe {SEALED}" in attack and "done" in attack
    assert "CHANGED" not in attack
    ours.close()
    assert entered.wait().code != 0
    assert digests(machine) == before
    assert "fine" in machine.ok("exec", container, "echo", "fine", warm=warm), "later starts use the same copy"
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize("how", ["/proc/self/exe", "/script"])
def test_the_runtime_as_entrypoint_of_a_new_container_just_ends(machine: Machine, bundle: Bundle, how: str) -> None:
    """CVE-2019-5736, the image's side: nothing of the runtime is started again, let alone changed."""
    (bundle.rootfs / "script").write_text("#!/proc/self/exe\n")
    (bundle.rootfs / "script").chmod(0o755)
    bundle.process["args"] = [how]
    before = digests(machine)
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 125, done
    assert digests(machine) == before


WATCH = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>
int main(void)
{
	/* Opens every other process's exe for writing, again and again; says so when it was more than a container's file. */
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("watching\n");
	for (;;) {
		DIR *dir = opendir("/proc");
		struct dirent *e;
		while ((e = readdir(dir))) {
			char path[300], link[256];
			if (atoi(e->d_name) <= 1 || atoi(e->d_name) == getpid())
				continue;
			snprintf(path, sizeof path, "/proc/%s/exe", e->d_name);
			ssize_t n = readlink(path, link, sizeof link - 1);
			if (n <= 0)
				continue;
			link[n] = 0;
			if (strcmp(link, "/bin/busybox") && strcmp(link, "/memfd:boxrun-init (deleted)"))
				printf("SAW %s\n", link);
			int fd = open(path, O_WRONLY);
			if (fd >= 0 && write(fd, "owned", 5) > 0 && strcmp(link, "/bin/busybox"))
				printf("CHANGED %s\n", link);
			close(fd);
		}
		closedir(dir);
	}
}
"""


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_no_program_of_the_host_is_seen_from_inside_while_exec_enters(machine: Machine, bundle: Bundle, warm: bool) -> None:
    """CVE-2019-5736, as the published exploit goes: a process of the container watches for the runtime to come in."""
    (bundle.rootfs / "watch").write_bytes(compile_c(WATCH).read_bytes())
    (bundle.rootfs / "watch").chmod(0o755)
    container = machine.name()
    bundle.process["args"] = ["/watch"]
    before = digests(machine)
    watching = machine.begin("run", "-b", bundle.write(), container, warm=warm)
    deadline = time.monotonic() + 10
    while "watching" not in watching.output() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(15 if warm else 5):
        machine.ok("exec", container, "true", warm=warm)
    machine.ok("delete", "-f", container)
    said = watching.wait().out
    assert said.strip() == "watching"
    assert digests(machine) == before
