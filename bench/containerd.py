"""boxshipd and containerd side by side, driven by the same ctr: prints the table of docs/performance.md.

Runs in: root, with containerd, ctr and docker-registry on PATH. The servers take turns in each figure, so that what else the
machine does meets them alike; every server has folders of its own, which are removed at the end.

    python -m bench.containerd [--rounds 10] [--only run,many,import,pull,list]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

NAMESPACE = "bench"
SMALL, LARGE = "bench.test/small:1", "bench.test/large:1"
NULL = subprocess.DEVNULL


def digest(data: bytes) -> str:
    """Of a blob."""
    return sha256(data).hexdigest()


def write_image(path: Path, name: str, layer: bytes) -> None:
    """An image of one layer as `docker save` writes it (also an OCI layout)."""
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": ["true"]},
                         "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest(layer)}"]}}).encode()

    def described(kind: str, data: bytes, **more: object) -> dict[str, object]:
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest(data)}", "size": len(data), **more}

    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described("config.v1+json", config), "layers": [described("layer.v1.tar", layer)],
    }).encode()
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    index = json.dumps({"schemaVersion": 2, "manifests": [described("manifest.v1+json", manifest, annotations=names)]}).encode()
    with tarfile.open(path, "w") as archive:
        for entry, data in [("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'), ("index.json", index),
                            *((f"blobs/sha256/{digest(blob)}", blob) for blob in (config, manifest, layer))]:
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def small_layer() -> bytes:
    """busybox."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("bin", "proc", "dev", "sys", "tmp"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        archive.add("/bin/busybox", "bin/busybox")
        for link in ("true", "sleep", "sh"):
            info = tarfile.TarInfo(f"bin/{link}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(info)
    return buffer.getvalue()


def large_layer() -> bytes:
    """100 MB in 5,000 files of random bytes, which no compression makes smaller."""
    chance = random.Random(1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in range(100):
            info = tarfile.TarInfo(f"data/{folder}")
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
            for file in range(50):
                data = chance.randbytes(20_000)
                info = tarfile.TarInfo(f"data/{folder}/{file}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pss_kib(pid: int) -> int:
    """Proportional set size of a process; 0 when it is over."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def rss_mib(pid: int) -> float:
    """Resident set size of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def parent(pid: int) -> int:
    """Of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers(pid: int, containers: set[int]) -> list[int]:
    """The children of a shim that are no containers."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if int(child) not in containers]


class Server:
    """A server, and ctr for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        self.socket = self.folder / "state" / "containerd.sock"
        root, state = self.folder / "root", self.folder / "state"
        if name == "boxship":
            program = str(Path(sys.executable).with_name("boxshipd"))
            words = [program, "--root", str(root), "--state", str(state), "--log-level", "warning"]
        else:
            config = self.folder / "config.toml"
            config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n')
            words = ["containerd", "--config", str(config), "--address", str(self.socket), "--root", str(root),
                     "--state", str(state), "--log-level", "warn"]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log)
        for _ in range(200):
            if subprocess.run(["ctr", "--address", str(self.socket), "version"], stdout=NULL, stderr=NULL).returncode == 0:
                return
            time.sleep(0.05)
        raise SystemExit(f"{name} does not answer: {(self.folder / 'log').read_text()}")

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ctr."""
        command = ["ctr", "--address", str(self.socket), "--namespace", NAMESPACE, *words]
        return subprocess.run(command, stdin=NULL, capture_output=True, text=True, check=False)

    def ctr(self, *words: str) -> str:
        """What a command prints; the end of everything when it fails."""
        done = self.call(*words)
        if done.returncode != 0:
            raise SystemExit(f"{self.name}: ctr {' '.join(words)}: {done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """End the server and what runs on it."""
        for line in self.call("task", "ls", "-q").stdout.split():
            self.call("task", "rm", "-f", line)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


class Bench:
    """The figures."""

    def __init__(self, servers: list[Server], folder: Path, rounds: int) -> None:
        self.servers = servers
        self.folder = folder
        self.rounds = rounds
        self.serial = 0
        self.rows: list[str] = []

    def name(self) -> str:
        """A container id that was not used yet."""
        self.serial += 1
        return f"b{self.serial}"

    def turns(self, work: Callable[[Server], float], rounds: int) -> dict[str, float]:
        """The median of `work`'s answers by server; one round goes before and does not count."""
        times: dict[str, list[float]] = {server.name: [] for server in self.servers}
        for number in range(rounds + 1):
            for server in self.servers:
                took = work(server)
                if number:
                    times[server.name].append(took)
        return {name: statistics.median(values) for name, values in times.items()}

    def row(self, title: str, values: dict[str, float], unit: str) -> None:
        """Print a line of the table."""
        ratio = values["boxship"] / values["containerd"]
        line = f"| {title} | {values['boxship']:.1f} {unit} | {values['containerd']:.1f} {unit} | {ratio:.2f} |"
        print(line, flush=True)

    def run(self) -> None:
        """`ctr run --rm` of true."""
        def work(server: Server) -> float:
            start = time.perf_counter()
            server.ctr("run", "--rm", SMALL, self.name(), "true")
            return (time.perf_counter() - start) * 1000

        self.row("`ctr run --rm` of true", self.turns(work, self.rounds), "ms")

    def many(self) -> None:
        """50 containers from 8 clients, and what they cost while they are idle."""
        took: dict[str, float] = {}
        memory: dict[str, float] = {}
        resident = {server.name: rss_mib(server.process.pid) for server in self.servers}
        self.row("RSS of the daemon, idle", resident, "MiB")
        for server in self.servers:
            names = [self.name() for _ in range(50)]
            start = time.perf_counter()
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda name, server=server: server.ctr("run", "--detach", SMALL, name, "sleep", "1000"), names))  # type: ignore[misc]
            took[server.name] = (time.perf_counter() - start) * 1000
            pids = [int(line.split()[1]) for line in server.ctr("task", "ls").splitlines()[1:]]
            time.sleep(1.5)  # being asked has woken them
            shims = {shim: None for pid in pids for shim in (parent(pid), *workers(parent(pid), set(pids)))}
            memory[server.name] = sum(pss_kib(shim) for shim in shims) / len(pids) / 1024
            resident[server.name] = rss_mib(server.process.pid)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda name, server=server: server.ctr("task", "rm", "-f", name), names))  # type: ignore[misc]
                list(pool.map(lambda name, server=server: server.ctr("container", "rm", name), names))  # type: ignore[misc]
        self.row("50 containers from 8 clients", took, "ms")
        self.row("PSS of the shims per idle container, 50 containers", memory, "MiB")
        self.row("RSS of the daemon with 50 containers", resident, "MiB")

    def load(self) -> None:
        """Import and unpack of an image of 100 MB in 5,000 files."""
        archive = self.folder / "large.tar"
        for snapshotter in ("overlayfs", "erofs"):
            def work(server: Server, snapshotter: str = snapshotter) -> float:
                chosen = snapshotter if server.name == "boxship" else "overlayfs"
                start = time.perf_counter()
                server.ctr("images", "import", "--snapshotter", chosen, str(archive))
                took = (time.perf_counter() - start) * 1000
                server.ctr("images", "rm", "--sync", LARGE)
                return took

            took = self.turns(work, max(3, self.rounds // 3))
            self.row(f"`ctr import` and unpack of 100 MB in 5,000 files, ours {snapshotter}", took, "ms")

    def pull(self) -> None:
        """Pull of the same from docker-registry."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = self.folder / "registry.yml"
        config.write_text(f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
                          f"storage: {{filesystem: {{rootdirectory: {self.folder}/registry}}}}\n")
        with open(self.folder / "registry.log", "wb") as log:
            registry = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
        try:
            time.sleep(1)
            name = f"127.0.0.1:{port}/large:1"
            peer = next(server for server in self.servers if server.name == "containerd")
            peer.ctr("images", "import", str(self.folder / "large.tar"))
            peer.ctr("images", "tag", LARGE, name)
            peer.ctr("images", "push", "--plain-http", name)
            peer.ctr("images", "rm", "--sync", LARGE, name)

            def work(server: Server) -> float:
                start = time.perf_counter()
                server.ctr("images", "pull", "--plain-http", name)
                took = (time.perf_counter() - start) * 1000
                server.ctr("images", "rm", "--sync", name)
                return took

            self.row("`ctr pull` of the same from docker-registry", self.turns(work, max(3, self.rounds // 3)), "ms")
        finally:
            registry.terminate()
            registry.wait(10)

    def listing(self) -> None:
        """`ctr c ls` with 1,000 containers."""
        from boxship.api.any import SPEC
        from boxship.api.containerd import pb
        from boxship.api.containerd.call import Call
        from boxship.api.containerd.client import connect

        async def fill(address: str) -> None:
            async with connect(address) as client:
                for number in range(1000):
                    container = pb.containers.Container(id=f"l{number}", image=SMALL)
                    container.runtime.name = "io.containerd.runc.v2"
                    container.spec.type_url, container.spec.value = SPEC, b"{}"
                    await client.containers.Create(pb.containers.CreateContainerRequest(container=container), Call("listing"))

        for server in self.servers:
            asyncio.run(fill(str(server.socket)))

        def work(server: Server) -> float:
            start = time.perf_counter()
            server.ctr("--namespace", "listing", "containers", "ls")
            return (time.perf_counter() - start) * 1000

        self.row("`ctr c ls` with 1,000 containers", self.turns(work, self.rounds), "ms")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.containerd", description="boxshipd against containerd")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="run,many,import,pull,list")
    options = parser.parse_args()
    # A path short enough for sockets, on the file system that /var is on.
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/var/tmp"))
    servers: list[Server] = []
    try:
        write_image(folder / "small.tar", SMALL, small_layer())
        write_image(folder / "large.tar", LARGE, large_layer())
        for name in ("boxship", "containerd"):
            servers.append(Server(name, folder))
            servers[-1].ctr("images", "import", str(folder / "small.tar"))
        bench = Bench(servers, folder, options.rounds)
        print("| | boxship | containerd | ratio |\n|---|---|---|---|")
        works = {"run": bench.run, "many": bench.many, "import": bench.load, "pull": bench.pull, "list": bench.listing}
        for chosen in options.only.split(","):
            works[chosen]()
    finally:
        for server in servers:
            server.stop()
        table = Path("/proc/self/mounts").read_text().splitlines()
        for line in reversed(table):
            if line.split()[1].startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
