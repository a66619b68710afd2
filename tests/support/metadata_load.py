"""A process that works on the metadata at ROOT until it is killed, and says what was answered: `python metadata_load.py ROOT SEED`.

A line is written after each answer: what a line says must hold after any kill that follows.

    image NAME DIGEST      the image is there, with its content and what that refers to
    gone NAME              it is not any more
    container NAME KEY     with its snapshot
    snapshot NAME          the committed snapshot is there
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from boxship.api.containerd import pb
from boxship.kit import failpoint
from support.metadata import CALL, OTHER, Daemon, container, image


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())


async def bring(daemon: Daemon, chance: random.Random, number: int) -> None:
    name, call = f"i{number}", chance.choice([CALL, OTHER])
    lease = f"l{number}"
    await daemon.leases.Create(pb.leases.CreateRequest(id=lease), call)
    leased = type(call)(call.namespace, lease)
    layer = await asyncio.to_thread(daemon.put, chance.randbytes(chance.choice([10, 5000])), leased)
    manifest = daemon.put(f"manifest {name}".encode(), leased, {"containerd.io/gc.ref.content.0": layer})
    await daemon.images.Create(image(name, manifest), call)
    say("image", name, manifest, layer, call.namespace)
    await daemon.leases.Delete(pb.leases.DeleteRequest(id=lease, sync=chance.random() < 0.3), call)


async def unpack(daemon: Daemon, chance: random.Random, number: int) -> None:
    key, name = f"k{number}", f"s{number}"
    labels = {"containerd.io/gc.root": "1"}
    await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key=key, labels=labels), CALL)
    await daemon.snapshots.Commit(pb.snapshots.CommitSnapshotRequest(snapshotter="native", key=key, name=name, labels=labels), CALL)
    say("snapshot", name)
    await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(
        snapshotter="native", key=f"c{number}", parent=name, labels=labels), CALL)
    await daemon.containers.Create(container(f"c{number}", f"c{number}"), CALL)
    say("container", f"c{number}")


async def remove(daemon: Daemon, chance: random.Random, number: int) -> None:
    listed = (await daemon.images.List(pb.images.ListImagesRequest(), CALL)).images
    if listed:
        name = chance.choice(listed).name
        say("going", name)
        await daemon.images.Delete(pb.images.DeleteImageRequest(name=name, sync=chance.random() < 0.5), CALL)
        say("gone", name)


async def discard(daemon: Daemon, chance: random.Random, number: int) -> None:
    key = f"t{number}"
    labels = {"containerd.io/gc.root": "1"}
    await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key=key, labels=labels), CALL)
    await daemon.snapshots.Remove(pb.snapshots.RemoveSnapshotRequest(snapshotter="native", key=key), CALL)


async def leave(daemon: Daemon, chance: random.Random, number: int) -> None:
    writer = daemon.content.store(CALL).writer(f"half-{number}", 100)
    writer.write(chance.randbytes(50))
    writer.close()


async def main(root: str, seed: int) -> None:
    chance = random.Random(seed)
    daemon = Daemon(root, {"gc": {"startup_delay": "1ms", "pause_threshold": 0.5}})
    await daemon.metadata.start()
    failpoint.load()
    say("ready")
    for number in range(seed * 1000, seed * 1000 + 400):
        await chance.choice([bring, bring, unpack, remove, discard, leave])(daemon, chance, number)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
