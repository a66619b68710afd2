"""The process that keeps the metadata is killed at any moment: nothing that was answered is lost, nothing is half there or left over."""

import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.kit.errors import NotFound, ResourceExhausted
from support.metadata import CALL, Daemon, container

LOAD = Path(__file__).parent.parent / "support" / "metadata_load.py"
POINTS = ["content-begin", "content-write", "content-commit", "content-committed", "metadata-snapshot-made",
          "metadata-snapshot-committed", "snapshot.made", "snapshot.commit", "snapshot.remove", "gc-rows"]


def work(root: Path, seed: int, plan: str = "", after_s: float = 0.0) -> tuple[list[list[str]], int]:
    """Let a process work until it dies; what it said, and how it ended."""
    environment = os.environ | ({"BOXSHIP_FAILPOINT": plan} if plan else {})
    process = subprocess.Popen([sys.executable, LOAD, root, str(seed)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    if after_s:
        time.sleep(after_s)
        process.kill()
    said += process.stdout.read().splitlines()
    return [line.decode().split() for line in said], process.wait(60)


def holds(root: Path, said: list[list[str]]) -> None:
    """Open what is left, as the next start does, and look whether all that was said is so, and no more than that is there."""
    images, containers, snapshots = {}, set(), set()
    for verb, *words in said:
        if verb == "image":
            images[words[0]] = words[1:]
        elif verb in ("going", "gone"):
            images.pop(words[0], None)
        elif verb == "container":
            containers.add(words[0])
        elif verb == "snapshot":
            snapshots.add(words[0])

    async def look() -> None:
        daemon = Daemon(str(root))
        try:
            daemon.collector.reconcile()
            assert daemon.metadata.check() == []
            daemon.collector.collect()
            assert daemon.metadata.check() == []
            for name, (manifest, layer, namespace) in images.items():
                found = (await daemon.images.Get(pb.images.GetImageRequest(name=name), Call(namespace))).image
                assert found.target.digest == manifest
                store = daemon.content.store(Call(namespace))
                assert store.info(layer).size == os.stat(store.path(layer)).st_size
            for name in containers:
                found = (await daemon.containers.Get(pb.containers.GetContainerRequest(id=name), CALL)).container
                request = pb.snapshots.MountsRequest(snapshotter="native", key=found.snapshot_key)
                [mount] = (await daemon.snapshots.Mounts(request, CALL)).mounts
                assert os.path.isdir(mount.source)
            for name in snapshots:
                request = pb.snapshots.StatSnapshotRequest(snapshotter="native", key=name)
                assert (await daemon.snapshots.Stat(request, CALL)).info.kind == pb.snapshots.COMMITTED
            leftovers(daemon)
        finally:
            await daemon.metadata.close()

    asyncio.run(look())


def leftovers(daemon: Daemon) -> None:
    with daemon.database.reading() as rows:
        assert daemon.blobs() == {row[0] for row in rows.execute("SELECT digest FROM blobs")}
        assert {each.ref for each in daemon.files.statuses()} <= {row[0] for row in rows.execute("SELECT key FROM ingests")}
        known = {row[0] for row in rows.execute("SELECT driver_key FROM snapshots")}
        assert rows.execute("SELECT * FROM commits").fetchall() == []
    driver = daemon.metadata.drivers["native"]
    assert {info.name for info in driver.walk()} == known
    folders = os.listdir(f"{driver.root}/snapshots")
    assert len(folders) == len(known)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_each_point_of_the_way_loses_nothing(tmp_path, point):
    said, code = work(tmp_path, 1, f"{point}=kill")
    assert code == -9, f"{point} was not passed"
    holds(tmp_path, said)


def test_kills_at_any_point_one_after_another_lose_nothing(tmp_path):
    chance, all_said = random.Random(7), []
    for seed in range(1, 9):
        said, code = work(tmp_path, seed, f"*=count:{chance.randrange(1, 150)}")
        assert code in (-9, 0)
        all_said += said
        holds(tmp_path, all_said)


def test_kills_at_any_moment_one_after_another_lose_nothing(tmp_path):
    chance, all_said = random.Random(11), []
    for seed in range(1, 9):
        said, _ = work(tmp_path, seed, after_s=chance.uniform(0.01, 0.4))
        all_said += said
        holds(tmp_path, all_said)


def test_a_half_written_ingest_is_resumed_by_the_next_process(tmp_path):
    said, _ = work(tmp_path, 3, after_s=0.3)

    async def look() -> None:
        daemon = Daemon(str(tmp_path))
        try:
            daemon.collector.reconcile()
            store = daemon.content.store(CALL)
            for status in store.statuses():
                writer = store.writer(status.ref)
                assert writer.offset == status.offset
                writer.write(b"x")
                digest = writer.digest()
                writer.commit()
                assert store.info(digest).size == status.offset + 1
                with pytest.raises(NotFound):
                    store.status(status.ref)
        finally:
            await daemon.metadata.close()

    assert said[0] == ["ready"]
    asyncio.run(look())


@pytest.fixture
def small_disk(tmp_path):
    """Six mebibytes."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_an_error_and_everything_goes_on_when_there_is_room(small_disk):
    root = {"containerd.io/gc.root": "1"}

    async def fill() -> None:
        daemon = Daemon(str(small_disk))
        try:
            daemon.collector.reconcile()
            kept = daemon.put(b"k" * 100_000, labels=root)
            store = daemon.content.store(CALL)
            writer = store.writer("large", 10 << 20)
            with pytest.raises(ResourceExhausted, match="no space left on device"):
                for _ in range(100):
                    writer.write(b"x" * 100_000)
            assert writer.offset == store.status("large").offset
            full = 0
            for number in range(200):
                try:
                    await daemon.containers.Create(container(f"c{number}", labels={"l": "x" * 4000}), CALL)
                except ResourceExhausted:
                    full += 1
            assert full > 0
            assert daemon.metadata.check() == []
            with pytest.raises(ResourceExhausted):
                daemon.put(b"y" * 500_000)
            writer.close()
            store.abort("large")
            digest = daemon.put(b"y" * 500_000, labels=root)
            await daemon.containers.Create(container("again"), CALL)
            daemon.collector.collect()
            assert daemon.blobs() == {kept, digest}
            assert daemon.metadata.check() == []
        finally:
            await daemon.metadata.close()

    asyncio.run(fill())
