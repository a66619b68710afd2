"""Root file systems and volumes that lead the runtime astray while it makes a container's mounts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.machine import Bundle, Machine, compile_c

EXCHANGE = r"""
#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/syscall.h>
/* exchange A B: for ever, but not at full speed: the runtime shall have a turn on each side. */
int main(int argc, char **argv)
{
	for (unsigned i = 0;; i++) {
		syscall(SYS_renameat2, AT_FDCWD, argv[1], AT_FDCWD, argv[2], 2 /* RENAME_EXCHANGE */);
		if (i % 64 == 0)
			usleep(1 + i / 64 % 97);
	}
}
"""


@contextmanager
def exchanging(first: Path, second: Path) -> Iterator[None]:
    """Two names change places again and again."""
    process = subprocess.Popen([compile_c(EXCHANGE), first, second])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder of the host: kinds, modes, owners, contents."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        info = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = f"{info.st_mode:o} {info.st_uid}:{info.st_gid} {info.st_rdev} {content}"
    return found


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host, which is the same after the test as it was before."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "file").write_text("the host's")
    (folder / "null").write_text("the host's")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


@pytest.mark.parametrize("leads", ["absolute", "upwards"])
def test_a_mount_point_that_becomes_a_link_is_never_followed_to_the_host(
    machine: Machine, bundle: Bundle, victim: Path, tmp_path: Path, leads: str
) -> None:
    """CVE-2021-30465 and CVE-2024-45310: another container exchanges a folder of a shared volume for a link.

    Mount points lie in the folder: some are there, some (nested ones) the runtime has to make. Each mount of a container
    that starts is inside its root, where it counts them; nothing is made in the victim.
    """
    machine.warm_up()
    volume = tmp_path / "volume"
    (volume / "dir" / "sub").mkdir(parents=True)
    link = str(victim) if leads == "absolute" else "../" * 20 + str(victim).lstrip("/")
    (volume / "link").symlink_to(link)
    bundle.bind(volume, "/volume", "rw")
    for i in range(6):
        (volume / "dir" / f"there{i}").mkdir()
        bundle.mounts.append({"type": "tmpfs", "source": "racer", "destination": f"/volume/dir/there{i}", "options": ["nosuid"]})
        bundle.mounts.append({"type": "tmpfs", "source": "racer", "destination": f"/volume/dir/made{i}/deep/er", "options": []})
    bundle.bind("/bin", "/volume/dir/sub", "ro")
    bundle.bind("/etc/hostname", "/volume/dir/file", "ro")
    # The same path inside the container: there the link may lead.
    inner = bundle.rootfs / str(victim).lstrip("/")
    inner.mkdir(parents=True)
    bundle.writable()
    bundle.shell("grep -c ' - tmpfs racer ' /proc/self/mountinfo")
    path = bundle.write()
    started = 0
    with exchanging(volume / "dir", volume / "link"):
        for _ in range(40):
            done = machine("run", "-b", path, machine.name())
            if done.code == 0:
                started += 1
                assert done.out.strip() == "12"
            else:
                assert done.code == 1 and "Traceback" not in done.err, done
    assert started >= 3, "a race that nobody ever wins proves nothing"
    assert list(inner.rglob("er")), "the link was met, and led into the container's own root"


def test_a_volume_exchanged_while_devices_and_masks_are_made(
    machine: Machine, bundle: Bundle, victim: Path, tmp_path: Path
) -> None:
    """The same root cause for everything else that is made by path: /dev, device nodes, masked and read-only paths, cwd."""
    volume = tmp_path / "volume"
    (volume / "dir").mkdir(parents=True)
    (volume / "link").symlink_to("../" * 20 + str(victim).lstrip("/"))
    (bundle.rootfs / str(victim).lstrip("/")).mkdir(parents=True)
    bundle.bind(volume, "/volume", "rw")
    bundle.writable()
    bundle.linux["devices"] = [
        {"path": f"/volume/dir/sub{i}/node", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 7, "gid": 7} for i in range(4)
    ]
    bundle.linux["maskedPaths"] = ["/volume/dir/file", "/volume/dir/sub"]
    bundle.linux["readonlyPaths"] = ["/volume/dir/null", "/volume/dir"]
    bundle.process["cwd"] = "/volume/dir/work/ing"
    bundle.process["args"] = ["true"]
    path = bundle.write()
    started = 0
    with exchanging(volume / "dir", volume / "link"):
        for _ in range(35):
            done = machine("run", "-b", path, machine.name())
            started += done.code == 0
            assert "Traceback" not in done.err, done
    assert started >= 3


@pytest.mark.parametrize("where", ["proc", "sys"])
def test_proc_and_sys_are_mounted_on_ordinary_directories_only(machine: Machine, bundle: Bundle, tmp_path: Path, where: str) -> None:
    """CVE-2019-19921, CVE-2023-27561, CVE-2023-28642, CVE-2025-54867: /proc or /sys of the image is a link."""
    (bundle.rootfs / where).rmdir()
    (bundle.rootfs / "elsewhere").mkdir()
    for to in ("elsewhere", "/elsewhere", "/tmp/../elsewhere", "../../../etc", "missing"):
        (bundle.rootfs / where).unlink(missing_ok=True)
        (bundle.rootfs / where).symlink_to(to)
        done = machine("run", "-b", bundle.write(), machine.name())
        assert done.code == 1, (to, done)
        assert "must be mounted on ordinary directory" in done.err, (to, done)
    (bundle.rootfs / where).unlink()
    (bundle.rootfs / where).write_text("")
    assert machine("run", "-b", bundle.write(), machine.name()).code == 1


def test_proc_exchanged_for_a_link_during_the_start_is_refused_or_real(
    machine: Machine, bundle: Bundle, victim: Path
) -> None:
    """CVE-2019-19921, as a race: whichever moment it was, a container that starts has a procfs on its /proc."""
    (bundle.rootfs / "link").symlink_to(victim)
    bundle.shell("stat -f -c %T /proc; ls /proc/self/status")
    path = bundle.write()
    started = 0
    with exchanging(bundle.rootfs / "proc", bundle.rootfs / "link"):
        for _ in range(40):
            done = machine("run", "-b", path, machine.name())
            started += done.code == 0
            # After the start the name may be exchanged again, under the mount; then the link leads nowhere.
            assert set(done.out.split()) <= {"proc", "/proc/self/status"}, done
    assert started


@pytest.mark.parametrize(
    "mount",
    [
        {"type": "tmpfs", "source": "tmpfs", "destination": "/proc"},
        {"type": "bind", "source": "FAKE", "destination": "/proc", "options": ["bind"]},
        {"type": "bind", "source": "FAKE", "destination": "/proc/self/attr", "options": ["bind"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/proc/sys"},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/way/../proc/sys/../sys"},
        {"type": "bind", "source": "FAKE", "destination": "/way/to/self/attr", "options": ["bind"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/way/to/acpi"},
        {"type": "bind", "source": "FAKE", "destination": "/way/thread/attr", "options": ["bind"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/way/to/1/attr"},
        {"type": "cgroup", "source": "cgroup", "destination": "/way/to/irq"},
        {"type": "cgroup", "source": "cgroup", "destination": "/proc"},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/proc", "options": ["tmpcopyup"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/way/to/irq", "options": ["tmpcopyup"]},
        {"type": "bind", "source": "FAKE", "destination": "/way/to/sysrq-trigger", "options": ["bind"]},
    ],
    ids=lambda mount: f"{mount['type']}-{mount['destination']}",
)
def test_nothing_is_mounted_over_or_into_proc(
    machine: Machine, bundle: Bundle, tmp_path: Path, mount: dict[str, object]
) -> None:
    """CVE-2019-16884, CVE-2025-52881: a volume over /proc, or reached through the image's links, would fake labels and sysctls."""
    fake = tmp_path / "fake"
    (fake / "self/attr").mkdir(parents=True)
    for name in ("exec", "current", "keycreate"):
        (fake / "self/attr" / name).write_text("")
    (bundle.rootfs / "way").mkdir()
    (bundle.rootfs / "way/to").symlink_to("/proc")
    (bundle.rootfs / "way/thread").symlink_to("../proc/thread-self")
    bundle.mounts.append({k: str(fake) if v == "FAKE" else v for k, v in mount.items()})
    bundle.process["apparmorProfile"] = "canary"
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 1, done
    assert all(path.read_text() == "" for path in (fake / "self/attr").iterdir())


def test_sysctls_and_labels_go_to_the_kernel_whatever_the_container_has_at_proc(
    machine: Machine, bundle: Bundle
) -> None:
    """CVE-2025-52881, CVE-2019-16884: an image with a false /proc, in a container for which none is mounted."""
    fake = bundle.rootfs / "proc/sys/net/ipv4/ip_forward"
    fake.parent.mkdir(parents=True)
    fake.write_text("fake")
    (bundle.rootfs / "proc/self/attr").mkdir(parents=True)
    (bundle.rootfs / "proc/self/attr/exec").write_text("fake")
    bundle.writable()
    bundle.without("/proc")
    bundle.linux["maskedPaths"], bundle.linux["readonlyPaths"] = [], []
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    bundle.process["apparmorProfile"] = "unconfined"
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    assert fake.read_text() == "fake"
    assert (bundle.rootfs / "proc/self/attr/exec").read_text() == "fake"
    pid = str(machine.state(container)["pid"])
    assert machine.host("nsenter", "-n", "-t", pid, "cat", "/proc/sys/net/ipv4/ip_forward") == "1\n"
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize(
    "key",
    [
        "net/../kernel/core_pattern", "net/ipv4/../../kernel/core_pattern", "net.//.kernel/core_pattern", "net/./../kernel/core_pattern",
        "net.ipv4./../../kernel/core_pattern", "fs.mqueue./../../kernel/core_pattern", "fs/mqueue/../../kernel/core_pattern",
        "kernel/shmmax/../core_pattern", "net//../kernel/core_pattern", "/kernel/core_pattern", "net/../../self/oom_score_adj",
    ],
)
def test_a_sysctl_key_names_nothing_outside_its_namespace(machine: Machine, bundle: Bundle, key: str) -> None:
    """CVE-2025-52881's result by a plainer way: a key that begins as a permitted one, and leads to core_pattern."""
    path = Path("/proc/sys/kernel/core_pattern")
    before = path.read_text()
    bundle.linux["sysctl"] = {key: before.strip() + "-canary"}
    bundle.process["args"] = ["true"]
    try:
        done = machine("run", "-b", bundle.write(), machine.name())
        assert path.read_text() == before
        assert done.code == 1
    finally:
        path.write_text(before)


CONTENT = "cat /dev/null; ls -l /dev/null"


@pytest.mark.parametrize("link", ["absolute", "upwards"])
def test_dev_as_a_link_leads_nowhere_outside(machine: Machine, bundle: Bundle, victim: Path, link: str) -> None:
    """CVE-2026-41579, crun's CVE-2026-47766: no file system on /dev, and the image's /dev is a link to the host."""
    bundle.without("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
    bundle.writable()
    (bundle.rootfs / "dev").rmdir()
    (bundle.rootfs / "dev").symlink_to(victim if link == "absolute" else os.path.relpath(victim, bundle.rootfs))
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert "Traceback" not in done.err


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
@pytest.mark.parametrize("name", ["null", "console", "ptmx", "pts", "zero", "stdin", "shm", "core"])
@pytest.mark.parametrize("userns", [False, True], ids=["root", "userns"])
def test_links_in_dev_lead_nowhere_outside(
    machine: Machine, bundle: Bundle, victim: Path, name: str, terminal: bool, userns: bool
) -> None:
    """crun's CVE-2026-88264 and 88265, CVE-2025-52565: nothing is mounted on /dev, and a name there is a link."""
    if userns:
        bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
        for kind in ("uidMappings", "gidMappings"):
            bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    bundle.without("/dev", "/dev/shm", "/dev/mqueue", *(["/dev/pts"] if name != "pts" else []))
    bundle.writable()
    bundle.process["terminal"] = terminal
    bundle.process["args"] = ["sh", "-c", "echo x > /dev/null; echo x > /dev/console; echo x > /dev/ptmx; true"]
    for to in (victim / "file", victim / "missing", victim):
        link = bundle.rootfs / "dev" / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(to, bundle.rootfs / "dev"))
        done = machine("run", "-b", bundle.write(), machine.name())
        assert "Traceback" not in done.err, done


@pytest.mark.parametrize("name", ["null", "console", "ptmx", "zero", "tty"])
@pytest.mark.parametrize("userns", [False, True], ids=["root", "userns"])
def test_a_fifo_in_dev_makes_nobody_wait(machine: Machine, bundle: Bundle, name: str, userns: bool) -> None:
    """A runtime that opened it would hang in `create`, with the container locked."""
    if userns:
        bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
        for kind in ("uidMappings", "gidMappings"):
            bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    bundle.without("/dev", "/dev/shm", "/dev/mqueue")
    bundle.writable()
    os.mkfifo(bundle.rootfs / "dev" / name)
    bundle.process["terminal"] = True
    bundle.process["args"] = ["true"]
    begun = time.monotonic()
    machine("run", "-b", bundle.write(), machine.name(), timeout=20)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize("kind", ["fifo", "device", "huge"])
def test_no_file_of_the_image_makes_the_runtime_wait_or_grow(machine: Machine, bundle: Bundle, name: str, kind: str) -> None:
    """CVE-2026-47262's class: /etc/passwd is a FIFO, an endless device, or 10 GB long."""
    path = bundle.rootfs / "etc" / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o20666, os.makedev(1, 5))
    else:
        with open(path, "w") as file:
            file.truncate(10 << 30)
    bundle.shell("echo HOME=$HOME")
    begun = time.monotonic()
    done = machine("run", "-b", bundle.write(), machine.name(), timeout=20)
    assert done.out == "HOME=/\n", done
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("null", ["link", "file", "device", "missing"])
def test_masks_are_the_hosts_null_whatever_the_container_has_for_one(
    machine: Machine, bundle: Bundle, tmp_path: Path, null: str
) -> None:
    """CVE-2025-31133: a container that fills its own /dev puts a link to core_pattern where /dev/null should be."""
    dev = tmp_path / "dev"
    dev.mkdir()
    if null == "link":
        (dev / "null").symlink_to("/proc/sys/kernel/core_pattern")
    elif null == "file":
        (dev / "null").write_text("attacker's")
    elif null == "device":
        os.mknod(dev / "null", 0o20666, os.makedev(1, 5))
    bundle.without("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
    bundle.bind(dev, "/dev", "rw")
    (bundle.rootfs / "secret").write_text("secret")
    bundle.linux["maskedPaths"] += ["/secret", "/proc/sys/kernel/hostname"]  # type: ignore[operator]
    bundle.shell("cat /secret; cat /proc/sys/kernel/hostname; stat -c %t:%T /secret; [ -c /proc/kcore ] || [ ! -e /proc/kcore ]; echo $?")
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 0, done
    assert done.out.split() == ["1:3", "0"]


def test_masked_folders_are_empty_and_stay_so(machine: Machine, bundle: Bundle) -> None:
    """CVE-2025-62161's class: what hides a folder takes nothing in, and each folder has its own."""
    for name in ("one", "two"):
        (bundle.rootfs / name).mkdir()
        (bundle.rootfs / name / "secret").write_text("secret")
    bundle.linux["maskedPaths"] += ["/one", "/two"]  # type: ignore[operator]
    bundle.writable()
    bundle.shell("ls /one /two; touch /one/x; touch /two/x; echo over > /one/secret; ls -a /one")
    done = machine("run", "-b", bundle.write(), machine.name())
    assert "secret" not in done.out.replace("/one", "")
    assert done.out.split() == ["/one:", "/two:", ".", ".."]
    assert done.err.count("Read-only file system") == 3


@pytest.mark.parametrize("kind", ["loop", "through-file", "unreadable"])
def test_a_mask_that_cannot_be_placed_is_an_error(machine: Machine, bundle: Bundle, kind: str) -> None:
    """A path to be masked is passed over when it is not there; anything else that is wrong with it ends the start."""
    path = {"loop": "/loop/secret", "through-file": "/file/secret", "unreadable": "/proc/self/fd/0"}[kind]
    (bundle.rootfs / "loop").symlink_to("loop")
    (bundle.rootfs / "file").write_text("")
    bundle.linux["maskedPaths"] = [path]
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    # Nothing can be behind a file: that is "not there".
    assert done.code == (0 if kind == "through-file" else 1), done


@pytest.mark.parametrize("link", [False, True], ids=["path", "link"])
def test_the_root_itself_may_not_be_mounted_over(machine: Machine, bundle: Bundle, link: bool) -> None:
    """crun's CVE-2019-18837: a mount whose destination is the root, by its name or by a link, hides what was made before."""
    (bundle.rootfs / "top").symlink_to("/")
    bundle.mounts.append({"type": "tmpfs", "source": "tmpfs", "destination": "/top" if link else "/x/.."})
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert "Traceback" not in done.err
    if not link:
        assert done.code == 1 and "on the top of rootfs" in done.err


def test_a_root_that_is_a_link_is_the_folder_it_leads_to(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    """crun's CVE-2019-18837: a root path with links is resolved once, and writing stays inside what it led to."""
    link = tmp_path / "link"
    link.symlink_to(bundle.rootfs)
    bundle.spec["root"] = {"path": str(link)}
    bundle.shell("echo x > /written; ls /")
    path = bundle.write()
    machine.ok("run", "-b", path, machine.name())
    assert (bundle.rootfs / "written").read_text() == "x\n"


@pytest.mark.parametrize("propagation", ["", "private", "slave", "shared", "rshared", "rslave", "unbindable", "runbindable"])
def test_no_mount_reaches_the_host_unless_it_is_asked_for(
    machine: Machine, bundle: Bundle, tmp_path: Path, propagation: str
) -> None:
    """Whatever rootfsPropagation says: mounts of the start and of the container stay inside. The leak check looks for them."""
    if propagation:
        bundle.linux["rootfsPropagation"] = propagation
    volume = tmp_path / "volume"
    volume.mkdir()
    bundle.bind(volume, "/mnt", "rw")
    bundle.capable("CAP_SYS_ADMIN", "CAP_SYS_CHROOT")
    bundle.process["noNewPrivileges"] = False
    bundle.writable()
    bundle.shell("mount -t tmpfs leak /mnt && mount -t tmpfs leak /tmp && mount -t tmpfs leak /sys && echo mounted; sleep 1000")
    container = machine.name()
    running = machine.begin("run", "-b", bundle.write(), container)
    deadline = time.monotonic() + 10
    while "mounted" not in running.output() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "mounted" in running.output(), running.wait(1)
    assert not [m for m in machine.look().mounts if "leak" in m or str(bundle.path) in m]
    machine.ok("delete", "-f", container)
    running.wait()
