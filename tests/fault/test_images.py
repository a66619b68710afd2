"""Pulls and loads that are killed at any moment, or run out of disk: no blob is half there, and the next attempt succeeds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.archives import Layout, layer
from support.moving import FileStore
from support.registry import Registry

LAYERS = tuple(layer(data=os.urandom(size)) for size in (4_000_000, 2_000_000, 700_000, 10))
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    """A registry in a thread of its own, which takes its time."""
    started, ended = threading.Event(), threading.Event()
    registry = Registry()

    async def slowly(request: object) -> None:
        await asyncio.sleep(random.random() * 0.03)

    async def serve() -> None:
        async with registry:
            registry.hooks.append(slowly)
            registry.add_image("lib/app", "latest", LAYERS)
            started.set()
            while not ended.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    yield registry
    ended.set()
    thread.join()


def move(root: Path, what: str, source: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "support.moving", str(root), what, source], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def check(root: Path) -> int:
    """Every blob is its digest; returns how many there are."""
    count = 0
    for algorithm in (root / "blobs").iterdir():
        for path in algorithm.iterdir():
            assert hashlib.new(algorithm.name, path.read_bytes()).hexdigest() == path.name
            count += 1
    return count


@pytest.mark.parametrize("what", ["pull-to-continue", "load"])
def test_killed_at_random_moments(registry: Registry, tmp_path: Path, what: str) -> None:
    source = f"{registry.address}/lib/app"
    blobs = len(LAYERS) + 2
    if what == "load":
        layout = Layout()
        layout.name(layout.image(list(LAYERS)), "app:1")
        source = str(tmp_path / "archive.tar")
        Path(source).write_bytes(layout.tar())
        blobs += 1
    root = tmp_path / "store"
    killed = 0
    for _ in range(12):
        process = move(root, what, source)
        time.sleep(random.random() * 0.15)
        killed += process.poll() is None
        process.kill()
        process.wait()
        if root.exists():
            check(root)
    assert killed
    process = move(root, what, source)
    assert process.wait(30) == 0
    assert check(root) == blobs
    store = FileStore(str(root))
    left = {status.ref for status in store.statuses()}
    # What a killed load had under names of its own is the collector's; what has a digest was continued or replaced.
    assert not {ref for ref in left if ref.startswith(("layer-", "config-", "manifest-"))}


def test_a_full_disk(registry: Registry, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    root = tmp_path / "store"
    root.mkdir()
    script = f"mount -t tmpfs -o size=3m tmpfs {root} && exec sleep 60"
    holder = subprocess.Popen(["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", script])
    try:
        inside = ("nsenter", f"--target={_child(holder)}", "--mount", "--")
        process = move(root, "pull", f"{registry.address}/lib/app", inside)
        out, _ = process.communicate(timeout=30)
        told = json.loads(out)
        assert told["error"] == "ResourceExhausted" and "no space left" in told["text"], told
        seen = subprocess.run([*inside, "find", str(root), "-type", "f"], capture_output=True, text=True, check=True).stdout.split()
        assert not [path for path in seen if "/ingest/" in path], seen
        registry.add_image("lib/small", "latest", (b"small",))
        process = move(root, "pull", f"{registry.address}/lib/small", inside)
        assert process.wait(30) == 0
    finally:
        holder.kill()
        holder.wait()


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process behind unshare, once it has its mount."""
    for _ in range(200):
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if pids and Path(f"/proc/{pids[0]}/comm").read_text() == "sleep\n":
            return int(pids[0])
        time.sleep(0.02)
    raise AssertionError("the tmpfs was not mounted")
