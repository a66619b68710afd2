"""The drivers of a rootless daemon: the same suite, in a user namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from boxship.containerd import diff
from boxship.containerd.snapshots.overlay import OverlayDriver

pytestmark = pytest.mark.root

SUITE = Path(__file__).with_name("test_drivers.py")


def in_user_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as root of a user namespace that has the first 65,536 ids, with mounts of its own."""
    process = subprocess.Popen(
        ["unshare", "--user", "--mount", "sh", "-c", 'echo ready; read _; exec "$@"', "sh", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"BOXSHIP_TEST_ROOTLESS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536\n")
    out, _ = process.communicate("go\n", timeout=110)
    return subprocess.CompletedProcess(command, process.returncode, out)


def test_the_suite_holds_in_a_user_namespace(tmp_path: Path) -> None:
    done = in_user_namespace(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"), str(SUITE))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "40 passed" in done.stdout


def test_whiteouts_of_layers_are_seen_by_the_overlay(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from boxship.containerd import diff
from boxship.containerd.snapshots import probe
from boxship.images.layers.diff import header
drivers = probe.open_drivers({str(tmp_path / "root")!r})
print(list(drivers))
driver = drivers["overlayfs"]
service = diff.Diff(None, [driver])
def layer(name, parent, *members):
    fd = os.memfd_create(name)
    os.write(fd, b"".join(members) + bytes(1024))
    entries = driver.prepare(name + "-x", parent)
    service.apply(fd, "application/vnd.oci.image.layer.v1.tar", entries)
    driver.commit(name, name + "-x")
directory = header(b"d/", b"5", 0, mode=0o755)
layer("one", "", header(b"a", b"0", 0), header(b"b", b"0", 0), directory, header(b"d/old", b"0", 0, uid=1000), header(b"dev", b"3", 0, device=(1, 3)))
layer("two", "one", header(b".wh.a", b"0", 0), directory, header(b"d/.wh..wh..opq", b"0", 0), header(b"d/new", b"0", 0))
with diff.shown(driver.view("look", "two")) as root:
    print(sorted(os.listdir(root)), os.listdir(root + "/d"))
with diff.shown(driver.view("look1", "one")) as root:
    print(os.stat(root + "/d/old").st_uid)
"""
    done = in_user_namespace(sys.executable, "-I", "-c", code)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["['overlayfs', 'native']", "['b', 'd'] ['new']", "1000"]


def test_a_form_is_chosen_by_the_mounts(tmp_path: Path) -> None:
    for userxattr, form in ((False, "trusted.overlay.opaque"), (True, "user.overlay.opaque")):
        driver = OverlayDriver(str(tmp_path / form), userxattr=userxattr)
        driver.prepare("key")
        driver.commit("one", "key")
        place = diff.writable(driver.prepare("two", "one"))
        assert place is not None
        assert place[1] == form
        assert place[2].paths == [str(tmp_path / form / "snapshots/1/fs")]
        driver.close()
