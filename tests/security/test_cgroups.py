"""A container and the control groups of its host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.oci.defaults import to_rootless
from support.command import public_copy, public_interpreter
from support.machine import PREFIX, Bundle, Machine


def hierarchies() -> list[Path]:
    """The folders in which host-wide files of control groups are."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.procs").exists():
        return [top]
    return [path for path in top.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink()]


def agents() -> dict[str, str]:
    return {str(p / "release_agent"): (p / "release_agent").read_text() for p in hierarchies() if (p / "release_agent").exists()}


ESCAPES = """
for d in /sys/fs/cgroup /sys/fs/cgroup/*; do
  mkdir $d/escape && echo ESCAPED $d/escape
  echo $$ > $d/cgroup.procs && echo ESCAPED $d/cgroup.procs
  echo 0 > $d/tasks && echo ESCAPED $d/tasks
  for f in release_agent notify_on_release devices.allow memory.limit_in_bytes memory.max pids.max cgroup.subtree_control cgroup.freeze; do
    [ -e $d/$f ] && echo 1 > $d/$f && echo ESCAPED $d/$f
  done
  for up in $d/.. $d/../.. $d/../../..; do
    [ -e $up/cgroup.procs ] && [ ! $up -ef $d ] && echo REACHED $up
  done
done
mount -t cgroup -o memory cgroup /tmp && echo ESCAPED mount
mount -t cgroup2 cgroup /tmp && echo ESCAPED mount2
mount -o remount,rw /sys/fs/cgroup && echo ESCAPED remount
umount /sys/fs/cgroup && echo ESCAPED umount
echo done
"""


@pytest.mark.parametrize("own", [False, True], ids=["shared-cgroupns", "own-cgroupns"])
@pytest.mark.parametrize("userns", [False, True], ids=["root", "userns"])
def test_control_groups_of_the_host_cannot_be_changed_from_inside(machine: Machine, bundle: Bundle, own: bool, userns: bool) -> None:
    """CVE-2022-0492, CVE-2023-25809: what is mounted for the container is read-only, and is its own group only."""
    if own:
        bundle.linux["namespaces"].append({"type": "cgroup"})  # type: ignore[attr-defined]
    if userns:
        bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
        for kind in ("uidMappings", "gidMappings"):
            bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    before = agents()
    bundle.shell(ESCAPES)
    bundle.writable()
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.out.strip() == "done", done
    assert agents() == before


def test_a_writable_group_ends_at_the_containers_own(machine: Machine, bundle: Bundle) -> None:
    """CVE-2022-0492: given its group to write to, with a namespace of its own, the host's release_agent is not in it."""
    bundle.linux["namespaces"].append({"type": "cgroup"})  # type: ignore[attr-defined]
    for mount in bundle.mounts:
        if mount["destination"] == "/sys/fs/cgroup":
            mount["options"] = ["nosuid", "noexec", "nodev"]
    before = agents()
    bundle.shell("""
        for d in /sys/fs/cgroup/*; do
            [ -e $d/release_agent ] && echo ESCAPED $d
            [ -L $d ] || [ -e $d/cgroup.procs ] && ! grep -qx $$ $d/cgroup.procs && echo FOREIGN $d
        done
        mkdir /sys/fs/cgroup/pids/inner /sys/fs/cgroup/inner 2>/dev/null && echo made; echo done""")
    done = machine("run", "-b", bundle.write(), machine.name())
    assert "done" in done.out and "ESCAPED" not in done.out and "FOREIGN" not in done.out, done
    assert agents() == before


@pytest.fixture
def public(machine: Machine) -> Iterator[Path]:
    """A folder that ordinary users can reach, with a boxrun of its own in bin/, whose files they can read."""
    interpreter = public_interpreter()
    if interpreter is None:
        pytest.skip("there is no interpreter that an ordinary user can reach")
    folder = Path("/tmp", f"{PREFIX}public")
    try:
        with public_copy() as package:
            subprocess.run([interpreter, "-m", "venv", "--without-pip", folder], check=True)
            next(folder.glob("lib/python*/site-packages")).joinpath("boxship.pth").write_text(package + "\n")
            shutil.copy(machine.exe, folder / "bin/boxrun")
            subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
            yield folder
    finally:
        shutil.rmtree(folder)


def test_without_a_namespace_a_rootless_container_cannot_write_to_groups(machine: Machine, public: Path) -> None:
    """CVE-2023-25809: an ordinary user's container without a cgroup namespace had the host's hierarchy to write to."""
    box = Bundle(public / "bundle")
    to_rootless(box.spec)
    for kind in ("uidMappings", "gidMappings"):
        box.linux[kind] = [{"containerID": 0, "hostID": 4242, "size": 1}]
    box.shell(ESCAPES)
    path = box.write()
    runtime = public / "run"
    runtime.mkdir()
    os.chown(runtime, 4242, 4242)

    def become() -> None:
        os.setgroups([])
        os.setresgid(4242, 4242, 4242)
        os.setresuid(4242, 4242, 4242)

    before = agents()
    words = [str(public / "bin/boxrun"), "run", "-b", path, machine.name()]
    done = machine.start(words, env={"XDG_RUNTIME_DIR": str(runtime)}, before=become).wait()
    assert done.out.strip() == "done", done
    assert agents() == before


@pytest.fixture
def neighbour(machine: Machine) -> Iterator[tuple[str, int]]:
    """A control group of somebody else's, with a process in it."""
    name = f"{PREFIX}neighbour"
    folders = [p / name for p in hierarchies()]
    process = subprocess.Popen(["sleep", "1000"])
    for folder in folders:
        folder.mkdir()
        if folder.parent.name == "cpuset":
            for file in ("cpuset.cpus", "cpuset.mems"):
                (folder / file).write_text((folder.parent / file).read_text())
        (folder / "cgroup.procs").write_text(str(process.pid))
    yield f"/{name}", process.pid
    assert process.poll() is None, "the neighbour lives"
    process.kill()
    process.wait()
    for folder in folders:
        for _ in range(200):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.01)


@pytest.mark.parametrize("point", ["", "create.folder", "create.record", "create.config", "create.fifo"])
def test_a_group_that_is_in_use_is_neither_entered_nor_killed(
    machine: Machine, bundle: Bundle, neighbour: tuple[str, int], point: str
) -> None:
    """cgroupsPath names somebody else's group: create refuses, and `delete --force` of what a killed create left spares it."""
    path, pid = neighbour
    bundle.linux["cgroupsPath"] = path
    container = machine.name()
    done = machine("create", "-b", bundle.write(), container, env={"BOXSHIP_FAILPOINT": f"{point}=kill"} if point else {})
    if point in ("create.folder", "create.record", "create.config", "create.fifo"):
        assert done.code == -signal.SIGKILL
    else:
        assert done.code == 1, done
        assert "not empty" in done.err
    machine.ok("delete", "--force", container)
    os.kill(pid, 0)
    assert all((folder / path.strip("/")).exists() for folder in hierarchies())
