"""Containers on an older kernel: what that kernel does in another way, and what only works there (CRIU of the same Debian)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.boxrun import Boxrun, eventually, open_to_all, read, said
from support.machine import Bundle, Done

pytestmark = pytest.mark.lane("plain")

MAP = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def with_ids(bundle: Bundle, ids: list[dict[str, int]] = MAP) -> None:
    """A user namespace of its own."""
    bundle.linux["namespaces"] = [*bundle.linux["namespaces"], {"type": "user"}]  # type: ignore[misc]
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = ids
    open_to_all(bundle)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A directory on the disk, where the kernel can shift ids."""
    folder = Path("/var/tmp") / tmp_path.name
    folder.mkdir()
    (folder / "file").write_text("from the host\n")
    os.chown(folder / "file", 1000, 1000)
    os.chown(folder, 1000, 1000)
    folder.chmod(0o777)
    yield folder
    said("rm", "-rf", str(folder))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, where this kernel cannot shift ids."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    said("mount", "-t", "tmpfs", "tmpfs", str(folder))
    yield folder
    said("umount", str(folder))


def test_masks_cover_files_and_directories(boxrun: Boxrun, bundle: Bundle) -> None:
    for name in ("secrets", "other", "open"):
        (bundle.rootfs / name).mkdir()
        (bundle.rootfs / name / "file").write_text("secret\n")
    (bundle.rootfs / "key").write_text("secret\n")
    bundle.linux["maskedPaths"] = [*bundle.linux["maskedPaths"], "/secrets", "/other", "/key", "/nothing"]  # type: ignore[misc]
    bundle.linux["readonlyPaths"] = [*bundle.linux["readonlyPaths"], "/open"]  # type: ignore[misc]
    bundle.writable()
    script = (
        "ls -A /secrets /other; cat /key; cat /open/file; echo x >/open/file; echo x >/secrets/new; cat /proc/kcore | wc -c;"
        " ls -A /sys/firmware; echo 1 >/proc/sys/kernel/domainname; grep -c ' /secrets .*tmpfs' /proc/self/mountinfo"
    )
    bundle.shell(script)
    done = boxrun("run", "--bundle", bundle.write(), boxrun.name())
    assert done.out == "/other:\n\n/secrets:\nsecret\n0\n1\n"
    assert done.err.count("Read-only file system") == 3


def test_masks_hold_in_a_user_namespace_too(boxrun: Boxrun, bundle: Bundle) -> None:
    (bundle.rootfs / "secrets").mkdir()
    (bundle.rootfs / "secrets/file").write_text("secret\n")
    bundle.linux["maskedPaths"] = [*bundle.linux["maskedPaths"], "/secrets"]  # type: ignore[misc]
    with_ids(bundle)
    assert boxrun.output(bundle, "ls -A /secrets; cat /proc/kcore | wc -c; id -u").split() == ["0", "0"]


def test_ids_are_mapped(boxrun: Boxrun, bundle: Bundle) -> None:
    with_ids(bundle, [{"containerID": 0, "hostID": 100000, "size": 10}, {"containerID": 10, "hostID": 200000, "size": 5}])
    bundle.process["user"] = {"uid": 12, "gid": 3, "additionalGids": [11]}
    name = boxrun.run(bundle)
    status = Path(f"/proc/{boxrun.pid(name)}/status").read_text()
    found = {line.split(":")[0]: line.split()[1:] for line in status.splitlines()}
    assert (found["Uid"][0], found["Gid"][0], found["Groups"]) == ("200002", "100003", ["200001"])
    assert boxrun.shell(name, "cat /proc/self/uid_map").split() == ["0", "100000", "10", "10", "200000", "5"]


def test_a_mount_shows_the_containers_ids(boxrun: Boxrun, bundle: Bundle, ext4: Path) -> None:
    with_ids(bundle)
    bundle.mounts.append({
        "destination": "/mnt", "type": "bind", "source": str(ext4), "options": ["bind"],
        "uidMappings": [{"containerID": 1000, "hostID": 100007, "size": 1}],
        "gidMappings": [{"containerID": 1000, "hostID": 100008, "size": 1}],
    })
    assert boxrun.output(bundle, "stat -c %u:%g /mnt/file; cat /mnt/file").split("\n")[:2] == ["7:8", "from the host"]


def test_a_mount_takes_the_containers_own_map(boxrun: Boxrun, bundle: Bundle, ext4: Path) -> None:
    with_ids(bundle)
    bundle.mounts.append({"destination": "/mnt", "type": "bind", "source": str(ext4), "options": ["bind", "idmap"]})
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    assert boxrun.output(bundle, "stat -c %u:%g /mnt/file; echo new >/mnt/new; stat -c %u /mnt/new").split() == ["1000:1000", "1000"]
    assert os.stat(ext4 / "new").st_uid == 1000


def test_where_ids_cannot_be_shifted_it_is_said(boxrun: Boxrun, bundle: Bundle, tmpfs: Path) -> None:
    with_ids(bundle)
    bundle.mounts.append({"destination": "/mnt", "type": "bind", "source": str(tmpfs), "options": ["bind", "idmap"]})
    done = boxrun("run", "--bundle", bundle.write(), boxrun.name())
    assert done.code == 1
    assert f"failed to set MOUNT_ATTR_IDMAP on {tmpfs}: invalid argument (maybe the filesystem used doesn't support idmap mounts" in done.err


def test_mounts_of_every_kind_are_there(boxrun: Boxrun, bundle: Bundle, ext4: Path) -> None:
    bundle.bind(ext4, "/mnt/rw")
    bundle.bind(ext4, "/mnt/ro", "ro", "nosuid", "nodev", "noexec")
    bundle.bind(ext4 / "file", "/mnt/file", "ro")
    bundle.mounts.append({"destination": "/mnt/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=700", "nr_inodes=9"]})
    bundle.mounts.append({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]})
    (bundle.rootfs / "etc/file").write_text("from the image\n")
    bundle.writable()
    script = (
        "echo a >/mnt/rw/new && cat /mnt/ro/new; echo b >/mnt/ro/new || echo no; cat /mnt/file /etc/file; stat -c %a /mnt/tmp;"
        " grep ' /mnt/ro ' /proc/self/mountinfo | cut -d' ' -f6; echo c >/etc/file; cat /etc/file"
    )
    lines = boxrun.output(bundle, script).splitlines()
    assert lines[:5] == ["a", "no", "from the host", "from the image", "700"]
    assert set(lines[5].split(",")) >= {"ro", "nosuid", "nodev", "noexec"}
    assert lines[6] == "c"
    assert (bundle.rootfs / "etc/file").read_text() == "from the image\n"


def test_a_filter_of_system_calls_holds(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    }
    bundle.writable()
    bundle.shell("mkdir /tmp/new")
    done = boxrun("run", "--bundle", bundle.write(), boxrun.name())
    assert done.code == 1
    assert "not supported" in done.err.lower()


def test_all_eight_namespaces_at_once(boxrun: Boxrun, bundle: Bundle) -> None:
    with_ids(bundle)
    bundle.linux["namespaces"] = [*bundle.linux["namespaces"], {"type": "time"}]  # type: ignore[misc]
    bundle.linux["timeOffsets"] = {"boottime": {"secs": 1000000}}
    name = boxrun.run(bundle)
    own = Path(f"/proc/{boxrun.pid(name)}/ns")
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
    assert [kind for kind in kinds if os.readlink(own / kind) == os.readlink(f"/proc/self/ns/{kind}")] == []
    assert float(boxrun.shell(name, "cut -d' ' -f1 /proc/uptime")) > 1000000


def test_a_terminal_works(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.process["terminal"] = True
    bundle.shell("tty; stty size 2>/dev/null; test -t 0 && echo terminal")
    words = f"{boxrun.exe} run --bundle {bundle.write()} {boxrun.name()}"
    shown = subprocess.run(["script", "-qec", words, "/dev/null"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown
    assert "/dev/pts/0" in shown.stdout and "terminal" in shown.stdout


def test_a_root_file_system_of_overlay(boxrun: Boxrun, bundle: Bundle, tmp_path: Path) -> None:
    said("modprobe", "overlay")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    said("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={bundle.rootfs},upperdir={tmp_path}/upper,workdir={tmp_path}/work",
         str(tmp_path / "merged"))
    try:
        bundle.spec["root"] = {"path": str(tmp_path / "merged")}
        assert boxrun.output(bundle, "echo x >/tmp/new; cat /tmp/new").strip() == "x"
        assert read(tmp_path / "upper/tmp/new") == "x"
        assert not (bundle.rootfs / "tmp/new").exists()
    finally:
        said("umount", str(tmp_path / "merged"))


# --- checkpoint and restore -------------------------------------------------------------------------------------------


@pytest.fixture
def counting(boxrun: Boxrun, bundle: Bundle) -> str:
    """A container that counts seconds in a file."""
    pytest.importorskip("boxship.runtime.checkpoint")
    bundle.mounts.append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": []})
    bundle.shell("n=0; while :; do n=$((n+1)); echo $n >/mnt/new; mv /mnt/new /mnt/count; sleep 0.2; done")
    name = boxrun.name()
    with open("/dev/null", "w") as null:
        done = boxrun("run", "-d", "--bundle", bundle.write(), name, stdout=null, stderr=null)
    assert done.code == 0
    eventually((Path(f"/proc/{boxrun.pid(name)}/root/mnt/count")).exists, "it counts")
    return name


def count(boxrun: Boxrun, name: str) -> int:
    return int(Path(f"/proc/{boxrun.pid(name)}/root/mnt/count").read_text())


def succeeded(done: Done, images: Path) -> None:
    """Fail with what CRIU and boxrun have written down."""
    if done.code:
        pytest.fail(f"{done}\n" + "\n".join(f"{log}:\n{log.read_text()[-4000:]}" for log in images.glob("*.log")))


@pytest.mark.timeout(120)
def test_a_checkpoint_goes_on_where_it_was(boxrun: Boxrun, bundle: Bundle, counting: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    done = boxrun("checkpoint", "--image-path", str(images), "--work-path", str(images), counting)
    succeeded(done, images)
    assert boxrun("state", counting).code == 1
    with open("/dev/null", "w") as null:
        done = boxrun(
            "--log", str(images / "boxrun.log"), "restore", "-d", "--bundle", str(bundle.path), "--image-path", str(images),
            "--work-path", str(images), counting, stdout=null, stderr=null,
        )
    succeeded(done, images)
    assert boxrun.state(counting)["status"] == "running"
    before = count(boxrun, counting)
    assert before > 1
    eventually(lambda: count(boxrun, counting) > before, "it counts again")
    assert boxrun.shell(counting, "cat /proc/self/cgroup").strip() == "0::/"
    boxrun.ok("kill", counting, "KILL")
    eventually(lambda: boxrun.state(counting)["status"] == "stopped", "it stops")


@pytest.mark.timeout(120)
def test_a_checkpoint_can_leave_it_running(boxrun: Boxrun, counting: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    done = boxrun("checkpoint", "--leave-running", "--image-path", str(images), "--work-path", str(images), counting)
    succeeded(done, images)
    assert boxrun.state(counting)["status"] == "running"
    before = count(boxrun, counting)
    eventually(lambda: count(boxrun, counting) > before, "it goes on")
    assert (images / "inventory.img").exists()
