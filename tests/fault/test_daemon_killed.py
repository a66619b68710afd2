"""SIGKILL of the daemon, the spawner and shims at random moments of a mixed load: nothing is lost, nothing stays behind.

BOXSHIP_KILLS=N takes another number of kills than the few that the time of a test run allows.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest

from boxship.containerd.events import Exchange
from boxship.containerd.metadata.store import Metadata
from boxship.containerd.snapshots.probe import open_drivers
from support import image
from support.daemon import daemon, processes_of

pytestmark = [
    pytest.mark.root, pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("ctr"), reason="ctr is missing: apt-get install containerd"),
]
KILLS = int(os.environ.get("BOXSHIP_KILLS", "5"))


def quietly(d, namespace, *words, timeout=30):
    """A command of ctr that may fail: the daemon may be gone at any moment."""
    try:
        return subprocess.run(["timeout", str(timeout), "ctr", "--connect-timeout", "2s", "--address", d.socket, "--namespace", namespace, *words],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


class Load:
    """Clients that create, run, look and remove, as long as they are let."""

    def __init__(self, d, namespace, archive):
        self.d, self.namespace, self.archive = d, namespace, archive
        self.end = threading.Event()
        self.done = 0
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.runs, self.runs, self.detached, self.images)]
        for thread in self.threads:
            thread.start()

    def ctr(self, *words):
        done = quietly(self.d, self.namespace, *words)
        self.done += done.returncode == 0
        return done

    def runs(self):
        while not self.end.is_set():
            name = f"r{uuid.uuid4().hex[:8]}"
            self.ctr("run", "--rm", image.NAME, name, "true")

    def detached(self):
        while not self.end.is_set():
            name = f"d{uuid.uuid4().hex[:8]}"
            self.ctr("run", "--detach", image.NAME, name, "sleep", "1000")
            self.ctr("task", "exec", "--exec-id", "e", name, "true")
            self.ctr("task", "rm", "--force", name)
            self.ctr("container", "rm", name)

    def images(self):
        while not self.end.is_set():
            self.ctr("images", "import", "--snapshotter", "erofs", str(self.archive))
            self.ctr("images", "tag", image.NAME, f"t{uuid.uuid4().hex[:8]}:1")
            self.ctr("content", "ls")
            for name in self.ctr("images", "ls", "-q").stdout.split():
                if name != image.NAME:
                    self.ctr("images", "rm", name)

    def stop(self):
        self.end.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def spawner_of(d):
    """The process that listens on the spawner's socket, None when there is none."""
    inodes = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()
              if line.endswith(f" {d.state}/spawner/socket") and line.split()[3] == "00010000"}
    for pid in processes_of(d.folder):
        try:
            if any(os.readlink(fd) in {f"socket:[{inode}]" for inode in inodes} for fd in Path(f"/proc/{pid}/fd").iterdir()):
                return pid
        except OSError:
            continue
    return None


def shims(d):
    """Our shims: forks of the spawner, by their own name or still by its."""
    found = []
    for pid in processes_of(d.folder):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"containerd-shim-boxship-v1") or (b"boxship.daemon.spawner" in line and pid != spawner_of(d)):
            found.append(pid)
    return found


def groups_of(namespace):
    """Control groups below the namespace's."""
    return [path for path in Path("/sys/fs/cgroup").glob(f"*/{namespace}/*") if path.is_dir()] + \
        [path for path in Path("/sys/fs/cgroup").glob(f"{namespace}/*") if path.is_dir()]


@pytest.fixture
def namespace():
    """A namespace of its own, whose control groups are empty and gone afterwards."""
    name = f"bk{uuid.uuid4().hex[:6]}"
    yield name
    for group in groups_of(name):
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    end = time.monotonic() + 5
    while groups_of(name) and time.monotonic() < end:
        for group in groups_of(name):
            try:
                group.rmdir()
            except OSError:
                time.sleep(0.05)


def until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not (last := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return last


def remove_everything(d, namespace):
    for name in d.ctr("task", "ls", "-q", namespace=namespace).split():
        quietly(d, namespace, "task", "rm", "--force", name)
    for name in d.ctr("containers", "ls", "-q", namespace=namespace).split():
        d.ctr("containers", "rm", name, namespace=namespace)
    for snapshotter in ("overlayfs", "erofs"):
        for line in d.ctr("snapshots", "--snapshotter", snapshotter, "ls", namespace=namespace).splitlines()[1:]:
            if line.split()[-1] == "Active":
                d.ctr("snapshots", "--snapshotter", snapshotter, "rm", line.split()[0], namespace=namespace)
    for lease in d.ctr("leases", "ls", "-q", namespace=namespace).split():
        quietly(d, namespace, "leases", "rm", lease)


async def check(root):
    """What is wrong with the store."""
    metadata = Metadata(root, Exchange(), open_drivers(root))
    try:
        return await asyncio.to_thread(metadata.check)
    finally:
        await metadata.close()


@pytest.mark.timeout(120 + KILLS * 10)
def test_killed_at_random_moments(tmp_path, namespace):
    archive = tmp_path / "image.tar"
    image.write_archive(archive)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    with daemon() as d:
        d.start()
        d.ctr("images", "import", str(archive), namespace=namespace)
        d.ctr("run", "--detach", image.NAME, "witness", "sleep", "100000", namespace=namespace)
        [witness] = [int(line.split()[1]) for line in d.ctr("task", "ls", namespace=namespace).splitlines()[1:]]
        keeper = int(Path(f"/proc/{witness}/stat").read_text().rpartition(")")[2].split()[1])
        load = Load(d, namespace, archive)
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.05, 1.5))
            kind = chance.choice(["daemon", "daemon", "daemon", "spawner", "shim"])
            if kind == "daemon":
                d.stop(signal.SIGKILL)
                time.sleep(chance.choice([0, 0, 0.5]))
                d.start()
                continue
            found = [pid for pid in shims(d) if pid != keeper] if kind == "shim" else [spawner_of(d)]
            if found and found[0]:
                try:
                    os.kill(chance.choice(found), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        load.stop()
        assert load.done > KILLS, f"seed {seed}: the load did not get to anything"

        # What lived before all of it lives, and its exit is told.
        assert "witness" in d.ctr("task", "ls", "-q", namespace=namespace), f"seed {seed}"
        assert Path(f"/proc/{witness}").exists()
        d.ctr("task", "kill", "--signal", "SIGKILL", "witness", namespace=namespace)
        until(lambda: "STOPPED" in d.ctr("task", "ls", namespace=namespace), "the witness does not stop")

        remove_everything(d, namespace)
        bundles = d.state / "io.containerd.runtime.v2.task" / namespace
        until(lambda: not list(bundles.iterdir()), f"seed {seed}: bundles stay: {list(bundles.iterdir())}")
        until(lambda: not shims(d), f"seed {seed}: shims stay: {shims(d)}")
        assert not groups_of(namespace), f"seed {seed}"
        for name in d.ctr("images", "ls", "-q", namespace=namespace).split():
            d.ctr("images", "rm", "--sync", name, namespace=namespace)
        assert d.stop() == 0
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1].startswith(f"{d.folder}/")]
        assert not mounts, f"seed {seed}"
        for database in d.root.rglob("*.db"):
            with sqlite3.connect(database) as rows:
                assert rows.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"seed {seed}: {database}"
        assert asyncio.run(check(str(d.root))) == [], f"seed {seed}"
        work = d.root / "io.containerd.runtime.v2.task" / namespace
        assert not work.exists() or not list(work.iterdir()), f"seed {seed}"
