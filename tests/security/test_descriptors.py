"""Descriptors, folders and processes of the runtime that a container could take hold of on its way in."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from support.machine import Bundle, Machine, compile_c

LIST = r"""
#include <stdio.h>
#include <string.h>
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/stat.h>
/* Every open descriptor and where it leads; then what can be reached through each folder's "..". */
int main(void)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *e;
	while ((e = readdir(dir))) {
		char link[4096] = "", path[300];
		struct stat info;
		int fd = 0;
		if (sscanf(e->d_name, "%d", &fd) != 1 || fd == dirfd(dir))
			continue;
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		readlink(path, link, sizeof link - 1);
		fstat(fd, &info);
		printf("%d %s %s\n", fd, S_ISDIR(info.st_mode) ? "DIRECTORY" : "file", link);
	}
	return 0;
}
"""


def listed(text: str) -> dict[int, str]:
    return {int(line.split()[0]): line.split(None, 1)[1] for line in text.splitlines() if line[:1].isdigit()}


@pytest.fixture
def lister(bundle: Bundle) -> Bundle:
    """A bundle with /list, which tells what descriptors it was given."""
    (bundle.rootfs / "list").write_bytes(compile_c(LIST).read_bytes())
    (bundle.rootfs / "list").chmod(0o755)
    return bundle


def open_on_the_host() -> None:
    """What a careless caller leaves open: folders of the host, without close-on-exec, on low and on high numbers."""
    for number in (3, 5, 7, 9, 20, 600):
        os.dup2(os.open("/", os.O_RDONLY | os.O_DIRECTORY), number)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_process_is_given_its_three_descriptors_and_no_more(machine: Machine, lister: Bundle, warm: bool) -> None:
    """CVE-2024-21626: neither the runtime's own descriptors nor its caller's reach `run`, `create` or `exec`."""
    if warm:
        machine.warm_up()
    lister.process["args"] = ["/list"]
    handed = {"before": open_on_the_host, "close_fds": False, "warm": warm}
    assert set(listed(machine.ok("run", "-b", lister.write(), machine.name(), **handed))) == {0, 1, 2}

    created = machine.name()
    creating = machine.begin("create", "-b", lister.write(), created, **handed)
    assert creating.wait().code == 0
    machine.ok("start", created, **handed)
    deadline = time.monotonic() + 10
    while machine.state(created)["status"] != "stopped" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(listed(creating.output())) == {0, 1, 2}
    machine.ok("delete", created)

    lister.process["args"] = ["sleep", "1000"]
    running = machine.name()
    machine.ok("run", "-d", "-b", lister.write(), running, **handed)
    assert set(listed(machine.ok("exec", running, "/list", **handed))) == {0, 1, 2}
    machine.ok("delete", "-f", running)


@pytest.mark.parametrize("kind", ["startContainer", "createContainer", "createRuntime", "poststop"])
def test_a_hook_is_given_its_state_and_no_descriptor_more(machine: Machine, lister: Bundle, kind: str) -> None:
    """CVE-2024-21626 by way of hooks: those run inside the container, or are programs that trust their surroundings."""
    program = str(lister.rootfs / "list") if kind != "startContainer" else "/list"
    out = lister.path / "out"
    out.mkdir()
    lister.bind(out, "/mnt", "rw")
    shell = "/bin/sh" if kind == "startContainer" else str(lister.rootfs / "bin/sh")
    where = "/mnt/fds" if kind == "startContainer" else f"{out}/fds"
    lister.spec["hooks"] = {kind: [{"path": shell, "args": ["sh", "-c", f"{program} > {where}"]}]}
    lister.process["args"] = ["true"]
    machine.ok("run", "-b", lister.write(), machine.name(), before=open_on_the_host, close_fds=False)
    assert set(listed((out / "fds").read_text())) == {0, 1, 2}


@pytest.mark.parametrize("through", ["", "/tempting"], ids=["path", "symlink"])
def test_no_descriptor_is_a_way_to_a_working_directory_outside(machine: Machine, bundle: Bundle, through: str) -> None:
    """CVE-2024-21626: cwd is /proc/self/fd/N, or an image's link to it (WORKDIR), for every N that the runtime may use."""
    bundle.process["args"] = ["sh", "-c", "ls"]
    for number in [*range(3, 20), 64, 512, 1000, 1001]:
        target = f"/proc/self/fd/{number}{'/..' if number % 2 else ''}"
        if through:
            link = bundle.rootfs / "tempting"
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        bundle.process["cwd"] = through or target
        done = machine("run", "-b", bundle.write(), machine.name(), before=open_on_the_host, close_fds=False)
        assert done.code == 1, (number, done)
        assert done.out == "", (number, done)


@pytest.mark.parametrize("through", ["", "/tempting"], ids=["path", "symlink"])
def test_exec_enters_no_working_directory_outside(machine: Machine, bundle: Bundle, through: str) -> None:
    """CVE-2024-21626, `exec --cwd`: the process would sit in a folder of the host."""
    container = machine.name()
    for number in [*range(3, 20), 64, 512, 1000, 1001]:
        (bundle.rootfs / f"tempting{number}").symlink_to(f"/proc/self/fd/{number}/..")
    machine.ok("run", "-d", "-b", bundle.write(), container)
    for number in [*range(3, 20), 64, 512, 1000, 1001]:
        cwd = f"{through}{number}" if through else f"/proc/self/fd/{number}"
        done = machine("exec", "--cwd", cwd, container, "ls", before=open_on_the_host, close_fds=False)
        assert done.code == 255, (number, done)
        assert done.out == "", (number, done)
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize("command", ["run", "exec"])
def test_no_program_of_the_host_is_started_through_a_descriptor(machine: Machine, bundle: Bundle, command: str) -> None:
    """CVE-2024-21626, third attack: args[0] leads through a descriptor of the runtime to a program of the host."""
    program = machine.folder / f"evil-{command}/busybox"  # which goes by its name
    program.parent.mkdir()
    program.write_bytes(Path("/bin/busybox" if os.path.exists("/bin/busybox") else "/usr/bin/busybox").read_bytes())
    program.chmod(0o755)
    me = os.getpid()
    container = machine.name()
    if command == "exec":
        machine.ok("run", "-d", "-b", bundle.write(), container)
    for number in [*range(3, 20), 1000]:
        fd = f"/proc/self/fd/{number}"
        # Along another process's root; below the folder; and up from where the host's file system is mounted.
        for way in (f"{fd}/{me}/root{program}", f"{fd}{program}", f"{fd}/..{program}", f"{fd}/../../../..{program}"):
            if command == "exec":
                done = machine("exec", container, way, "echo", "HOST")
            else:
                bundle.process["args"] = [way, "echo", "HOST"]
                done = machine("run", "-b", bundle.write(), machine.name())
            assert "HOST" not in done.out, (way, done)
            assert done.code != 0
    if command == "exec":
        machine.ok("delete", "-f", container)


@pytest.mark.parametrize("command", ["run", "exec"])
def test_home_is_never_read_from_a_file_of_the_host(machine: Machine, bundle: Bundle, command: str) -> None:
    """The same root cause by another way: the image's /etc/passwd is a link through a descriptor of the runtime."""
    canary = machine.folder / "passwd"
    canary.write_text("evil:x:0:0::/CANARY:/bin/sh\n")
    me = os.getpid()
    for number in range(3, 16):
        link = bundle.rootfs / "etc/passwd"
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/self/fd/{number}/{me}/root{canary}")
        container = machine.name()
        if command == "run":
            bundle.shell("echo $HOME")
            done = machine("run", "-b", bundle.write(), container)
        else:
            bundle.process["args"] = ["sleep", "1000"]
            machine.ok("run", "-d", "-b", bundle.write(), container)
            done = machine("exec", container, "sh", "-c", "echo $HOME")
            machine.ok("delete", "-f", container)
        assert "CANARY" not in done.out, number


SPY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
/* spy PID: all the ways in which one process looks into another; prints those that worked. */
static void tell(const char *what, int ok) { printf("%s %s\n", ok ? "OPEN" : "shut", what); }
int main(int argc, char **argv)
{
	int pid = atoi(argv[1]);
	const char *files[] = {"exe", "mem", "environ", "maps", "root/", "cwd/", "fdinfo", "map_files", "auxv", "syscall",
		"ns/mnt", "pagemap", "stack", 0};
	for (const char **file = files; *file; file++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/%d/%s", pid, *file);
		int fd = open(path, O_RDONLY), ok = fd >= 0;
		if (ok) {
			/* Some open for anybody, and refuse the read. */
			char data[4096];
			DIR *dir = fdopendir(dup(fd));
			struct dirent *e;
			while (dir && (e = readdir(dir)) && e->d_name[0] == '.')
				;
			ok = dir ? e != NULL : read(fd, data, sizeof data) > 0 || strstr(*file, "ns/");
		}
		tell(*file, ok);
	}
	char path[64], link[256];
	for (int fd = 0; fd < 1100; fd++) {
		snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
		if (readlink(path, link, sizeof link) > 0)
			tell(path, 1);
		if (open(path, O_PATH) >= 0)
			tell(path, 1);
	}
	int handle = syscall(434, pid, 0);
	tell("pidfd_getfd", syscall(438, handle, 0, 0) >= 0);
	tell("setns", syscall(308, handle, 0x20000) == 0);
	char byte;
	struct iovec local = {&byte, 1}, remote = {(void *)0x200000000000, 1};
	tell("process_vm_readv", process_vm_readv(pid, &local, 1, &remote, 1, 0) == 1);
	tell("process_vm_writev", process_vm_writev(pid, &local, 1, &remote, 1, 0) == 1);
	tell("seize", ptrace(PTRACE_SEIZE, pid, 0, 0) == 0);
	tell("attach", ptrace(PTRACE_ATTACH, pid, 0, 0) == 0);
	printf("done\n");
	return 0;
}
"""


def _nspid(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[-1] for line in lines if line.startswith("NSpid"))


@pytest.mark.parametrize("user", ["root", "userns"])
@pytest.mark.parametrize("point", ["exec.born", "exec.entered", "exec.ready"])
def test_init_of_exec_cannot_be_looked_into(machine: Machine, bundle: Bundle, point: str, user: str) -> None:
    """CVE-2016-9962: while `exec` enters, root of the container finds every door of its process shut.

    In a user namespace it has all capabilities there, CAP_SYS_PTRACE too. The runtime is stopped at each step in turn, so
    that its process waits inside for as long as the spy wants.
    """
    (bundle.rootfs / "spy").write_bytes(compile_c(SPY).read_bytes())
    (bundle.rootfs / "spy").chmod(0o755)
    if user == "userns":
        bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
        for kind in ("uidMappings", "gidMappings"):
            bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]
        bundle.capable(*(f"CAP_{name}" for name in ("SYS_PTRACE", "SYS_ADMIN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "SETUID")))
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    assert "OPEN root/" in machine.ok("exec", container, "/spy", "1"), "the spy sees what may be seen"
    entering = machine.begin("exec", container, "true", env={"BOXSHIP_FAILPOINT": f"{point}=stop"})
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _letter(entering.pid) != "T":
        time.sleep(0.01)
    assert _letter(entering.pid) == "T"
    inside = [pid for pid in _children(entering.pid) if _in_same_pid_namespace(pid, machine.state(container)["pid"])]
    if point == "exec.born":
        assert not inside, "not in the container yet: nobody there can name it"
    else:
        assert len(inside) == 1
        seen = machine.ok("exec", container, "/spy", _nspid(inside[0]))
        assert "done" in seen
        assert "OPEN" not in seen, seen
    os.kill(entering.pid, signal.SIGCONT)
    assert entering.wait().code == 0
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize("point", ["create.born", "create.entered", "create.files", "create.root", "create.ready"])
def test_init_of_a_container_cannot_be_looked_into_from_a_shared_pid_namespace(
    machine: Machine, bundle: Bundle, tmp_path: Path, point: str
) -> None:
    """CVE-2016-9962 for `run`: a container that joins another's pid namespace is not to be taken over from there."""
    (bundle.rootfs / "spy").write_bytes(compile_c(SPY).read_bytes())
    (bundle.rootfs / "spy").chmod(0o755)
    spy = machine.name("spy")
    machine.ok("run", "-d", "-b", bundle.write(), spy)
    victim = Bundle(tmp_path / "victim", "true")
    for namespace in victim.linux["namespaces"]:  # type: ignore[attr-defined]
        if namespace["type"] == "pid":
            namespace["path"] = f"/proc/{machine.state(spy)['pid']}/ns/pid"
    victim.spec["hooks"] = {"createRuntime": [{"path": "/bin/true"}]}
    starting = machine.begin("run", "-b", victim.write(), machine.name(), env={"BOXSHIP_FAILPOINT": f"{point}=stop"})
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _letter(starting.pid) != "T":
        time.sleep(0.01)
    inside = [pid for pid in _children(starting.pid) if _in_same_pid_namespace(pid, machine.state(spy)["pid"])]
    assert bool(inside) == (point != "create.born")
    for pid in inside:
        seen = machine.ok("exec", spy, "/spy", _nspid(pid))
        assert "done" in seen
        assert "OPEN" not in seen, seen
    os.kill(starting.pid, signal.SIGCONT)
    assert starting.wait().code == 0
    machine.ok("delete", "-f", spy)


def test_the_console_socket_gets_the_terminal_and_nothing_else_is_passed(machine: Machine, bundle: Bundle) -> None:
    """One descriptor goes over the console socket, a master side; the process itself has the three of its terminal."""
    bundle.process["terminal"] = True
    bundle.shell("ls /proc/self/fd | wc -l; sleep 0.2")
    path = str(machine.folder / "console")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    container = machine.name()
    machine.ok("run", "-d", "--console-socket", path, "-b", bundle.write(), container, before=open_on_the_host, close_fds=False)
    connection, _ = listener.accept()
    _, fds, _, _ = socket.recv_fds(connection, 4096, 10)
    assert len(fds) == 1
    said = os.read(fds[0], 100)
    assert said.split() == [b"4"], "0, 1, 2, and the folder that ls itself reads"
    for fd in fds:
        os.close(fd)
    connection.close()
    listener.close()
    os.unlink(path)
    machine.ok("delete", "-f", container)


def _letter(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _in_same_pid_namespace(pid: int, other: object) -> bool:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat(f"/proc/{other}/ns/pid").st_ino


def test_a_record_is_read_by_its_owner_alone(machine: Machine, bundle: Bundle) -> None:
    """Configuration and state of a container may hold secrets in its environment."""
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    folder = Path(f"{machine.root}/run/boxship/boxrun")
    assert folder.stat().st_mode & 0o077 == 0
    for path in (folder / container).iterdir():
        assert path.stat().st_mode & 0o077 == 0 or path.name == "exec.fifo", path
    assert json.loads((folder / container / "state.json").read_text())["id"] == container
    machine.ok("delete", "-f", container)
