"""The warm server: nobody gets a worker that may more than himself, and no container gets near it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path

import pytest

from boxship.linux import _sys
from boxship.runtime.warm import VERSION
from support.machine import Bundle, Machine, compile_c

# A caller by hand: connects, introduces itself as boxrun does, and asks for `--version` with what it is now.
CALL = f"#define WARM_VERSION {VERSION}\n" + r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <grp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <linux/capability.h>

static int introduce(int s)
{
	int strings = memfd_create("x", 0), folder = open("/", O_PATH | O_DIRECTORY);
	write(strings, "boxrun\0--version", 17);
	int word[4] = {WARM_VERSION, 2, 0, 022}, fds[5] = {0, 1, 2, folder, strings};
	struct iovec vec = {word, sizeof word};
	char control[CMSG_SPACE(sizeof fds)];
	struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&msg);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fds);
	memcpy(CMSG_DATA(header), fds, sizeof fds);
	return sendmsg(s, &msg, MSG_NOSIGNAL);
}

static void drop(int effective, int permitted)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];
	syscall(SYS_capget, &header, data);
	if (effective) data[0].effective &= ~(1u << 5);
	if (permitted) data[0].permitted &= ~(1u << 5);
	syscall(SYS_capset, &header, data);
}

int main(int argc, char **argv)
{
	/* call SOCKET HOW */
	char *how = argv[2];
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	strcpy(address.sun_path, argv[1]);
	int s = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	if (!strcmp(how, "effective")) drop(1, 0);
	else if (!strcmp(how, "permitted")) drop(1, 1);
	else if (!strcmp(how, "bounding")) prctl(PR_CAPBSET_DROP, 5);
	else if (!strcmp(how, "uid")) { setgroups(0, 0); setresgid(1000, 1000, 1000); setresuid(1000, 1000, 1000); }
	else if (!strcmp(how, "euid")) seteuid(1000);
	else if (!strcmp(how, "gid")) setresgid(1000, 1000, 1000);
	else if (!strcmp(how, "groups")) { gid_t g[] = {0, 4, 1000}; setgroups(3, g); }
	else if (!strcmp(how, "nnp")) prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	else if (!strcmp(how, "seccomp")) {
		struct { unsigned short code; unsigned char jt, jf; unsigned k; } allow = {6, 0, 0, 0x7fff0000};
		struct { unsigned short len; void *filter; } program = {1, &allow};
		if (syscall(SYS_seccomp, 1, 0, &program)) return 3;
	}
	else if (!strcmp(how, "mnt")) unshare(CLONE_NEWNS);
	else if (!strcmp(how, "net")) unshare(CLONE_NEWNET);
	else if (!strcmp(how, "uts")) unshare(CLONE_NEWUTS);
	else if (!strcmp(how, "ipc")) unshare(CLONE_NEWIPC);
	else if (!strcmp(how, "cgroup")) unshare(CLONE_NEWCGROUP);
	else if (!strcmp(how, "user")) unshare(CLONE_NEWUSER);
	else if (!strcmp(how, "root")) { chroot("/run"); chdir("/"); memmove(address.sun_path, address.sun_path + 4, 100); }
	else if (!strcmp(how, "gone")) {
		/* Whoever connected is no more when the word comes: its number may be another's by then. */
		int up[2]; char byte;
		pipe(up);
		if (fork() == 0) { connect(s, (void *)&address, sizeof address); write(up[1], "x", 1); _exit(0); }
		read(up[0], &byte, 1);
		wait(0);
	}
	else if (strcmp(how, "same")) return 4;
	if (strcmp(how, "gone") && connect(s, (void *)&address, sizeof address)) {
		printf("connect: %s\n", strerror(errno));
		return 2;
	}
	introduce(s);
	int word[4];
	ssize_t got = recv(s, word, sizeof word, 0);
	printf("%s\n", got == sizeof word ? "SERVED" : "refused");
	return 0;
}
"""

WAYS = [
    "effective", "permitted", "bounding", "uid", "euid", "gid", "groups", "nnp", "seccomp", "mnt", "net", "uts", "ipc", "cgroup", "user", "root",
]


@pytest.mark.parametrize("how", WAYS)
def test_only_who_is_and_may_the_same_is_served(machine: Machine, how: str) -> None:
    """A process that lacks one right of the server's, or sees another part of the machine, is turned away: every single one."""
    machine.warm_up()
    path = machine.warm_socket().removeprefix(machine.root)
    said = machine.start([str(compile_c(CALL)), path, how]).wait()
    assert said.code in (0, 2), said
    assert "SERVED" not in said.out and "version" not in said.out, said
    again = machine.start([str(compile_c(CALL)), path, "same"]).wait()
    assert "SERVED" in again.out and "boxrun version" in again.out, "who is the same is served, also after the others"


def test_who_connected_and_is_gone_vouches_for_nobody(machine: Machine) -> None:
    """The connection is handed to another process, and its maker's number free for a third: nobody is served by it.

    The workers look only when all that has happened.
    """
    machine.warm_up()
    time.sleep(0.3)  # until all workers are there
    path = machine.warm_socket().removeprefix(machine.root)
    workers = machine.warm_workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    calling = machine.start([str(compile_c(CALL)), path, "gone"])
    time.sleep(0.3)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert calling.wait().out.strip() == "refused"


@pytest.mark.parametrize("how", ["effective", "bounding", "nnp", "net", "mnt", "gid"])
def test_boxrun_of_lesser_rights_works_for_itself(machine: Machine, bundle: Bundle, how: str) -> None:
    """The native entry does not meet the server of another identity; the container it makes has its own rights."""
    machine.warm_up()
    server = machine.warm_server()

    def lesser() -> None:
        if how == "bounding":
            _sys.syscall(157, 24, 5, 0, 0, 0)
        elif how == "nnp":
            _sys.syscall(157, 38, 1, 0, 0, 0)
        elif how == "net":
            _sys.syscall(272, 0x40000000)
        elif how == "mnt":
            _sys.syscall(272, 0x20000)
        elif how == "gid":
            os.setgroups([0, 77])
        elif how == "effective":
            header, data = struct.pack("=Ii", 0x20080522, 0), bytearray(24)
            _sys.syscall(125, header, data)
            data[0] &= ~(1 << 5)
            data[4] &= ~(1 << 5)
            _sys.syscall(126, header, data)

    bundle.capable("CAP_KILL", "CAP_CHOWN")
    bundle.process["args"] = ["cat", "/proc/self/status"]
    done = machine("run", "-b", bundle.write(), machine.name(), before=lesser)
    assert done.code == 0, done
    seen = dict(line.split(":\t", 1) for line in done.out.splitlines() if ":\t" in line)
    if how in ("bounding",):
        assert int(seen["CapBnd"], 16) == 1, "CAP_KILL is not given by whom it was taken from"
    assert machine.warm_server() == server


def test_the_socket_is_its_users_alone(machine: Machine) -> None:
    """Folder 0700, socket and lock 0600, nothing in the abstract namespace (CVE-2020-15257's class)."""
    machine.warm_up()
    path = Path(machine.warm_socket())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) & 0o077 == 0
    listening = Path("/proc/net/unix").read_text()
    assert not [line for line in listening.splitlines() if "@" in line and "box" in line]


def test_a_container_with_the_hosts_run_is_not_served(machine: Machine, bundle: Bundle) -> None:
    """An engine that mounts /run into a container does not give it a runtime with the host's rights."""
    machine.warm_up()
    (bundle.rootfs / "call").write_bytes(compile_c(CALL).read_bytes())
    (bundle.rootfs / "call").chmod(0o755)
    path = machine.warm_socket().removeprefix(machine.root)
    bundle.bind("/run", "/mnt", "rw")
    bundle.process["args"] = ["/call", f"/mnt{path.removeprefix('/run')}", "same"]
    out = machine.ok("run", "-b", bundle.write(), machine.name())
    assert out.strip() == "refused"


def test_a_container_sees_neither_server_nor_its_memory(machine: Machine, bundle: Bundle) -> None:
    """No process, socket or mapping of the warm server appears in a container."""
    machine.warm_up()
    bundle.shell("ls -d /proc/[0-9]*; cat /proc/net/unix; cat /proc/self/maps; ls /run 2>&1; true")
    out = machine.ok("run", "-b", bundle.write(), machine.name())
    assert "boxship" not in out and "boxrun" not in out and "memfd" not in out
    assert {line for line in out.splitlines() if line.startswith("/proc/")} <= {"/proc/1", "/proc/2", "/proc/3"}


@pytest.mark.parametrize("words", [b"", b"x", b"\0" * 16, b"\1\0\0\0" + b"\xff" * 12, b"\1\0\0\0" + b"\0" * 12, b"x" * 60000])
def test_nonsense_ends_one_worker_and_no_more(machine: Machine, words: bytes) -> None:
    """A caller of the right identity that talks rubbish, or hangs up in the middle of a sentence."""
    machine.warm_up()
    server = machine.warm_server()
    program = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({machine.warm_socket().removeprefix(machine.root)!r})
try:
    s.send({words!r})
    s.recv(100)
except (BrokenPipeError, ConnectionResetError):
    pass
"""
    machine.host("/usr/bin/python3" if os.path.exists("/usr/bin/python3") else "python3", "-c", program)
    assert "boxrun version" in machine.ok("--version")
    assert machine.warm_server() == server


def test_callers_that_say_nothing_keep_nobody_from_working(machine: Machine, bundle: Bundle) -> None:
    """Connections that are held open take a worker each; others are served meanwhile."""
    machine.warm_up()
    held = []
    folder = os.open(os.path.dirname(machine.warm_socket()), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(12):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.settimeout(5)
            s.connect(f"/proc/self/fd/{folder}/{os.path.basename(machine.warm_socket())}")
            held.append(s)
        begun = time.monotonic()
        bundle.process["args"] = ["true"]
        machine.ok("run", "-b", bundle.write(), machine.name())
        assert time.monotonic() - begun < 5
    finally:
        for s in held:
            s.close()
        os.close(folder)


def test_another_users_socket_is_not_spoken_to(machine: Machine, tmp_path: Path) -> None:
    """Who can make the socket would get the caller's descriptors and environment: its maker must be the caller."""
    interpreter = "/usr/bin/python3"
    if not os.path.exists(interpreter):
        pytest.skip("needs a Python that any user can run")
    machine.warm_up()
    real = machine.warm_socket()
    server = machine.warm_server()
    os.kill(server, 9)
    os.unlink(real)
    program = f"""
import os, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind({real.removeprefix(machine.root)!r})
os.chown({real.removeprefix(machine.root)!r}, 4242, 4242)
os.setresuid(4242, 4242, 4242)
s.listen()
print("listening", flush=True)
c, _ = s.accept()
data = c.recv(100)
print("GOT", data, flush=True)
"""
    impostor = machine.start([interpreter, "-c", program])
    deadline = time.monotonic() + 10
    while "listening" not in impostor.output() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert "boxrun version" in machine.ok("--version")
    finally:
        impostor.process.kill()
        said = impostor.wait().out
    assert "GOT b'\\x01" not in said


def test_a_closed_standard_stream_is_not_mistaken(machine: Machine, bundle: Bundle) -> None:
    """Without descriptors 0, 1, 2 nothing of the runtime's own slips into their places in the container."""
    machine.warm_up()
    bundle.shell("ls -l /proc/self/fd > /mnt/out 2>&1")
    (bundle.path / "out").mkdir()
    bundle.bind(bundle.path / "out", "/mnt", "rw")

    def close() -> None:
        for fd in range(3):
            os.close(fd)

    for warm in (True, False):
        machine("run", "-b", bundle.write(), machine.name(), warm=warm, before=close)
        links = [line.split(" -> ")[1] for line in (bundle.path / "out/out").read_text().splitlines() if " -> " in line]
        assert [link for link in links if not link.startswith("/proc/")] == ["/dev/null", "/mnt/out", "/mnt/out"] or set(links) <= {
            "/dev/null", "/mnt/out"
        } | {link for link in links if link.startswith("/proc/")}, links


def test_the_executor_that_many_containers_share_cannot_be_changed(machine: Machine) -> None:
    """The sealed copy in the server's hands: neither it nor what its workers inherit can be written to."""
    machine.warm_up()
    copies = []
    for pid in (machine.warm_server(), *machine.warm_workers()):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path) == "/memfd:boxrun-init (deleted)":
                copies.append(entry.path)
    assert copies
    for path in copies:
        for flags in (os.O_WRONLY, os.O_RDWR):
            try:
                fd = os.open(path, flags)
            except OSError:
                continue
            with pytest.raises(PermissionError):
                os.write(fd, b"owned")
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 1)
            os.close(fd)
    assert subprocess.run(["cmp", copies[0], Path(_sys.__file__).parent.parent / "runtime/_init"]).returncode == 0
