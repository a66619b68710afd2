"""Snapshot drivers that are killed, and what is there afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boxship.containerd.snapshots.driver import COMMITTED, VIEW
from boxship.containerd.snapshots.erofs import IMAGE, ErofsDriver
from boxship.images.layers.diff import header
from boxship.linux import mounts

pytestmark = pytest.mark.root

WORK = """
import os, sys
sys.path[:0] = eval(sys.argv[3])
from boxship.containerd import diff
from boxship.containerd.snapshots.erofs import ErofsDriver
from boxship.kit import failpoint
failpoint.load()
driver = ErofsDriver(sys.argv[1])
service = diff.Diff(None, [driver])
blob = os.open(sys.argv[2], os.O_RDONLY)
print("ready", flush=True)
for number in range(1000):
    parent = f"layer-{number - 1}" if number % 4 else ""
    driver.prepare(f"key-{number}", parent)
    service.apply(blob, "application/vnd.oci.image.layer.v1.tar", driver.mounts(f"key-{number}"))
    driver.commit(f"layer-{number}", f"key-{number}")
    print(number, flush=True)
    driver.view(f"view-{number}", f"layer-{number}")
    driver.remove(f"view-{number}")
    if number % 4 == 3:
        for gone in range(number, number - 2, -1):
            driver.remove(f"layer-{gone}")
"""


def layer(path: Path) -> bytes:
    data = os.urandom(200_000)
    path.write_bytes(header(b"file", b"0", len(data)) + data + bytes(-len(data) % 512) + header(b"d/", b"5", 0) + bytes(1024))
    return data


def start(tmp_path: Path, failpoint: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", WORK, str(tmp_path / "root"), str(tmp_path / "layer"), repr(sys.path)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"BOXSHIP_FAILPOINT": failpoint})


def check(tmp_path: Path, data: bytes, committed: int) -> None:
    """What a driver finds after the other was killed is whole, and nothing else is there."""
    driver = ErofsDriver(str(tmp_path / "root"))
    try:
        found = {info.name: info for info in driver.walk()}
        for info in found.values():
            if info.kind == COMMITTED:
                driver.view("look", info.name)
                entry = driver.mounts("look")[0]
                with os.scandir(f"/proc/self/fd/{(fd := mounts.detached(entry.type, entry.source, entry.options))}") as entries:
                    assert sorted(each.name for each in entries) == ["d", "file"]
                with open(f"/proc/self/fd/{fd}/file", "rb") as file:
                    assert file.read() == data
                os.close(fd)
                driver.remove("look")
        if committed >= 0 and committed % 4 < 2:
            assert f"layer-{committed}" in found
        on_disk = set(os.listdir(tmp_path / "root/snapshots"))
        assert len(on_disk) == len(found)
        assert not [name for name in on_disk if not name.isdigit()]
        for info in reversed(list(found.values())):
            driver.remove(info.name)
        assert os.listdir(tmp_path / "root/snapshots") == os.listdir(tmp_path / "root/layers") == []
    finally:
        driver.close()
    with open("/proc/self/mountinfo") as table:
        assert str(tmp_path) not in table.read()


@pytest.mark.parametrize("point", [
    "snapshot.made", "layer.written", "snapshot.adopt", "snapshot.commit", "snapshot.remove", *(f"count:{n}" for n in (9, 14, 23)),
])
def test_killed_at_a_step(tmp_path: Path, point: str) -> None:
    data = layer(tmp_path / "layer")
    plan = f"*={point}" if point.startswith("count") else f"{point}=kill"
    process = start(tmp_path, plan)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    numbers = [int(line) for line in out.split() if line.isdigit()]
    check(tmp_path, data, numbers[-1] if numbers else -1)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    data = layer(tmp_path / "layer")
    chance = random.Random(os.getpid())
    for _ in range(6):
        process = start(tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        out = process.stdout.read()
        process.stdout.close()
        process.wait()
        numbers = [int(line) for line in out.split()]
        check(tmp_path, data, numbers[-1] if numbers else -1)


def test_what_was_handed_out_before_a_kill_is_mounted_after_it(tmp_path: Path) -> None:
    """A shim that got its mounts from a daemon that is killed then carries them out while the next one runs."""
    data = layer(tmp_path / "layer")
    driver = ErofsDriver(str(tmp_path / "root"))
    from boxship.containerd import diff

    fd = os.open(tmp_path / "layer", os.O_RDONLY)
    driver.prepare("key")
    diff.Diff(None, [driver]).apply(fd, "application/vnd.oci.image.layer.v1.tar", driver.mounts("key"))  # type: ignore[arg-type]
    os.close(fd)
    driver.commit("layer", "key")
    handed = driver.view("view", "layer")[0]
    driver.close()  # unmounts, as a restart of the machine does
    with open("/proc/self/mountinfo") as table:
        assert str(tmp_path) not in table.read()
    again = ErofsDriver(str(tmp_path / "root"))
    assert Path(handed.source, "file").read_bytes() == data
    assert again.stat("view").kind == VIEW
    assert (tmp_path / "root/snapshots/1" / IMAGE).exists()
    again.remove("view")
    again.remove("layer")
    again.close()
