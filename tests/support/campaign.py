"""SIGKILL of the daemon, the spawner and shims at random moments of a mixed load, in rounds; after each, a look at what is left.

    python tests/support/campaign.py KILLS [SEED]       prints a line for each round; ends with 1 at the first thing that is wrong

A round: the clients of `Load` work, processes are killed; then the clients end, what they made is removed, and everything that a
kill may leave is looked for. Containers that were there before the first kill (`Witness`) have to live through all rounds, with
every line that they wrote.

Needs: root, ctr, docker (the command), docker-registry, iproute2.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from boxship.containerd.metadata import check
from support import image
from support.daemon import Daemon, daemon, processes_of

ROUND = 25
"""Kills between two looks."""
NEEDS = ("ctr", "docker", "docker-registry", "ip", "nsenter")
COUNTER = 'i=0; while :; do echo "line $i"; i=$((i+1)); sleep 0.1; done'


class Wrong(AssertionError):
    """Something that a kill must not do."""


def until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 60) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Wrong(what())
        time.sleep(0.1)


class Clients:
    """Commands against the daemon, in the network namespace of the campaign. Each may fail: the daemon is gone now and then."""

    def __init__(self, d: Daemon, namespace: str, net: list[str]) -> None:
        self.d, self.namespace, self.net = d, namespace, net
        self.names: set[str] = set()
        """Ids of containers that were ever asked for, of both kinds."""
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def run(self, words: list[str], seconds: int = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.net, "timeout", "--kill-after=5", str(seconds), *words], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace")

    def ctr(self, *words: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
        done = self.run(["ctr", "--connect-timeout", "2s", "--address", self.d.socket, "--namespace", self.namespace, *words], seconds)
        self._count(f"ctr {words[0]} {words[1]}" if words[0] in ("images", "task", "content") else f"ctr {words[0]}", done)
        return done

    def docker(self, *words: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
        done = self.run(["docker", "--config", str(self.d.folder / "client"), "--host", f"unix://{self.d.state}/docker.sock", *words], seconds)
        self._count(f"docker {words[0]}", done)
        return done

    def _count(self, what: str, done: subprocess.CompletedProcess[str]) -> None:
        (self.refused if done.returncode else self.done)[what] += 1


class Load:
    """Clients that create, run, look, pull and remove, as long as they are let."""

    def __init__(self, clients: Clients, archive: Path, pulled: str) -> None:
        self.clients, self.archive, self.pulled = clients, archive, pulled
        self.end = threading.Event()
        work = (self.runs, self.runs, self.detached, self.images, self.engine, self.engine, self.pulls)
        self.threads = [threading.Thread(target=self._repeat, args=(one,), daemon=True) for one in work]
        for thread in self.threads:
            thread.start()

    def _repeat(self, work: Callable[[str], None]) -> None:
        while not self.end.is_set():
            name = f"c{uuid.uuid4().hex[:8]}"
            self.clients.names.add(name)
            work(name)
            if not self.clients.d.ready:
                time.sleep(0.2)  # some shall come to a daemon that starts, and not keep it from starting

    def runs(self, name: str) -> None:
        self.clients.ctr("run", "--rm", image.NAME, name, "true")

    def detached(self, name: str) -> None:
        ctr = self.clients.ctr
        ctr("run", "--detach", image.NAME, name, "sleep", "1000")
        ctr("task", "exec", "--exec-id", "e", name, "true", seconds=20)
        ctr("task", "pause", name)
        ctr("task", "resume", name)
        ctr("task", "rm", "--force", name)
        ctr("containers", "rm", name)

    def images(self, name: str) -> None:
        ctr = self.clients.ctr
        ctr("images", "import", "--snapshotter", "erofs", str(self.archive))
        ctr("images", "tag", image.NAME, f"{name}:1")
        ctr("content", "ls")
        for other in ctr("images", "ls", "-q").stdout.split():
            if other != image.NAME:
                ctr("images", "rm", other)

    def engine(self, name: str) -> None:
        docker = self.clients.docker
        made = docker("run", "--network=none", "--detach", "--volume", "/v", "--name", name, image.NAME, "sh", "-c", "echo out; sleep 0.2; exit 3")
        self.clients.names.add(made.stdout.strip())
        docker("run", "--network=none", "--rm", image.NAME, "true", seconds=30)
        docker("exec", name, "true", seconds=20)
        logs = docker("logs", name)
        if logs.returncode == 0 and logs.stdout not in ("", "out\n"):
            raise Wrong(f"docker logs {name}: {logs.stdout!r}")
        docker("rm", "--force", "--volumes", name)

    def pulls(self, name: str) -> None:
        self.clients.docker("pull", "--quiet", self.pulled)
        self.clients.docker("rmi", self.pulled)

    def stop(self) -> None:
        self.end.set()
        for thread in self.threads:
            thread.join(120)
            if thread.is_alive():
                raise Wrong("a client hangs")


class Witness:
    """A container from before the first kill: its process, its shim, and what it has written."""

    def __init__(self, name: str, pid: int, lines: Callable[[], str]) -> None:
        self.name, self.pid, self._lines = name, pid, lines
        self.shim = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        self.seen = 0

    def look(self) -> None:
        if not Path(f"/proc/{self.pid}").exists():
            raise Wrong(f"the container {self.name} is dead")
        numbers = [int(number) for number in re.findall(r"line (\d+)\n", self._lines())]
        if numbers != list(range(len(numbers))):
            gap = next(index for index, number in enumerate(numbers) if index != number)
            raise Wrong(f"the log of {self.name} has a gap at {gap}: {numbers[gap - 2:gap + 3]}")
        if len(numbers) <= self.seen:
            raise Wrong(f"the log of {self.name} does not grow beyond {self.seen}")
        self.seen = len(numbers)


def spawner_of(d: Daemon) -> int:
    """The process that listens on the spawner's socket, 0 when there is none."""
    for pid in processes_of(d.folder):
        try:
            # The process's own table: sockets are shown by network namespace.
            inodes = {f"socket:[{line.split()[6]}]" for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()
                      if line.endswith(f" {d.state}/spawner/socket") and line.split()[3] == "00010000"}
            if any(os.readlink(fd) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir()):
                return pid
        except OSError:
            continue
    return 0


def shims(d: Daemon, keepers: set[int]) -> list[int]:
    """Our shims: forks of the spawner, by their own name or still by its; without those that are to live, and their workers."""
    found, spawner = [], spawner_of(d)
    for pid in processes_of(d.folder):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        is_shim = line.startswith(b"containerd-shim-boxship-v1") or (b"boxship.daemon.spawner" in line and pid != spawner)
        if is_shim and pid not in keepers and parent not in keepers:
            found.append(pid)
    return found


def groups_of(namespace: str) -> list[Path]:
    """Control groups below the namespace's, in every hierarchy."""
    top = Path("/sys/fs/cgroup")
    return [path for pattern in (f"*/{namespace}/*", f"{namespace}/*") for path in top.glob(pattern) if path.is_dir()]


class Campaign:
    """One daemon with its store, killed again and again."""

    def __init__(self, d: Daemon, seed: int) -> None:
        self.d, self.seed = d, seed
        self.chance = random.Random(seed)
        self.namespace = f"bk{uuid.uuid4().hex[:6]}"
        self.kills: Counter[str] = Counter()
        self.witnesses: list[Witness] = []
        self.registry: subprocess.Popen[bytes] | None = None
        self.slowest_s = 0.0
        """From the start of a daemon after a kill to its readiness."""

    # --- the stage

    def open(self) -> None:
        """The daemon's network namespace, a registry in it, the image, and the witnesses."""
        d, namespace = self.d, self.namespace
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        self.net = ["nsenter", f"--net=/run/netns/{namespace}"]
        subprocess.run([*self.net, "ip", "link", "set", "lo", "up"], check=True)
        d.prefix = self.net
        self.archive = d.folder / "image.tar"
        image.write_archive(self.archive)
        settings = d.folder / "registry.yml"
        settings.write_text(f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {d.folder}/registry}}}}\n"
                            "http: {addr: 127.0.0.1:5000}\n")
        with open(d.folder / "registry.log", "wb") as log:
            self.registry = subprocess.Popen([*self.net, "docker-registry", "serve", str(settings)], stdout=log, stderr=log)
        self.start()
        self.clients = Clients(d, namespace, self.net)
        pulled = "127.0.0.1:5000/test/busybox:1"
        self.must("ctr", "images", "import", str(self.archive))
        self.must("docker", "load", "--input", str(self.archive))
        self.must("docker", "tag", image.NAME, pulled)
        until(lambda: self.clients.docker("push", pulled).returncode == 0, lambda: "the registry does not answer")
        self.must("docker", "rmi", pulled)
        self.pulled = pulled
        self.clients.done.clear()
        self.clients.refused.clear()

        logged = d.folder / "witness.log"
        self.must("ctr", "run", "--detach", "--log-uri", f"file://{logged}", image.NAME, "witness-log", "sh", "-c", COUNTER)
        self.must("ctr", "run", "--detach", image.NAME, "witness", "sleep", "1000000")
        pids = {line.split()[0]: int(line.split()[1]) for line in self.must("ctr", "task", "ls").splitlines()[1:]}
        # The second writes nothing, so it has nothing to lose: it is looked at as if it did.
        count = iter(range(1 << 30))
        self.witnesses = [
            Witness("witness-log", pids["witness-log"], logged.read_text),
            Witness("witness", pids["witness"], lambda: "".join(f"line {number}\n" for number in range(next(count) + 1))),
        ]
        self.must("docker", "run", "--network=none", "--detach", "--name", "witness", image.NAME, "sh", "-c", COUNTER)
        pid = int(self.must("docker", "inspect", "--format", "{{.State.Pid}}", "witness"))
        self.witnesses.append(Witness("witness of the engine", pid, lambda: self.must("docker", "logs", "witness")))

    def start(self) -> None:
        at = time.monotonic()
        self.d.start("--log-level", "debug", config=f'[engine]\nnamespace = "{self.namespace}e"\ncgroup_parent = "/{self.namespace}"\n')
        if self.kills:
            self.slowest_s = max(self.slowest_s, time.monotonic() - at)

    def must(self, which: str, *words: str) -> str:
        """What a command prints, which has to succeed."""
        done = (self.clients.ctr if which == "ctr" else self.clients.docker)(*words)
        if done.returncode:
            raise Wrong(f"{which} {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Take away what even a failed campaign made outside of the daemon's folder."""
        if self.registry is not None:
            self.registry.kill()
            self.registry.wait()
        for group in groups_of(self.namespace):
            for pid in (group / "cgroup.procs").read_text().split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        end = time.monotonic() + 5
        while groups_of(self.namespace) and time.monotonic() < end:
            for group in groups_of(self.namespace):
                try:
                    group.rmdir()
                except OSError:
                    time.sleep(0.05)
        for group in [*Path("/sys/fs/cgroup").glob(f"*/{self.namespace}"), *Path("/sys/fs/cgroup").glob(self.namespace)]:
            group.rmdir()
        for suffix in ("", "e"):
            shutil.rmtree(f"/run/boxship/runtime/{self.namespace}{suffix}", ignore_errors=True)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False)

    # --- kills

    def round(self, kills: int) -> None:
        """So many kills under load, then the look. Raises Wrong."""
        load = Load(self.clients, self.archive, self.pulled)
        keepers = {witness.shim for witness in self.witnesses}
        before = sum(self.clients.done.values())
        try:
            for _ in range(kills):
                time.sleep(self.chance.uniform(0.05, 1.5))
                kind = self.chance.choice(["daemon", "daemon", "daemon", "spawner", "shim"])
                if kind == "daemon":
                    self.d.stop(signal.SIGKILL)
                    self.kills[kind] += 1
                    time.sleep(self.chance.choice([0, 0, 0.5]))
                    self.start()
                    continue
                found = shims(self.d, keepers) if kind == "shim" else [spawner_of(self.d)]
                if found and found[0]:
                    try:
                        os.kill(self.chance.choice(found), signal.SIGKILL)
                        self.kills[kind] += 1
                    except ProcessLookupError:
                        pass
        finally:
            load.stop()
        if sum(self.clients.done.values()) - before < kills:
            raise Wrong("the clients did not get to anything")
        self.settle()
        self.look()

    def settle(self) -> None:
        """Remove what the clients of the load made and could not remove."""
        ctr, docker = self.clients.ctr, self.clients.docker
        for name in self.must("ctr", "task", "ls", "-q").split():
            if not name.startswith("witness"):
                ctr("task", "rm", "--force", name)
        for name in self.must("ctr", "containers", "ls", "-q").split():
            if not name.startswith("witness"):
                self.must("ctr", "containers", "rm", name)
        for name in self.must("docker", "ps", "--all", "--format", "{{.Names}}").split():
            if name != "witness":
                self.must("docker", "rm", "--force", "--volumes", name)
        self.must("docker", "volume", "prune", "--force", "--all")
        docker("rmi", self.pulled)
        for name in self.must("ctr", "leases", "ls", "-q").split():
            ctr("leases", "rm", name)
        for snapshotter in ("overlayfs", "erofs"):
            for line in self.must("ctr", "snapshots", "--snapshotter", snapshotter, "ls").splitlines()[1:]:
                if line.split()[-1] == "Active" and not line.startswith("witness"):
                    ctr("snapshots", "--snapshotter", snapshotter, "rm", line.split()[0])

    # --- the look

    def look(self) -> None:
        """Raises Wrong for the first thing that is not as it should be."""
        d = self.d
        for witness in self.witnesses:
            witness.look()
        keepers = {witness.shim for witness in self.witnesses}
        until(lambda: not shims(d, keepers), lambda: f"shims stay: {_named(set(shims(d, keepers)))}")
        for what, found in (("bundles", self.bundles), ("work folders", self.work), ("control groups", self.groups),
                            ("records of the runtime", self.records), ("sockets", self.dead_sockets)):
            until(lambda found=found: not found(), lambda what=what, found=found: f"{what} stay: {found()}")  # type: ignore[misc]
        containers = d.root / "engine/containers"
        until(lambda: len(os.listdir(containers)) == 1, lambda: f"folders of the engine's containers stay: {os.listdir(containers)}")
        until(lambda: len(os.listdir(d.state / "engine/stdio")) <= 1, lambda: f"FIFOs stay: {os.listdir(d.state / 'engine/stdio')}")
        until(lambda: not self.mounts(), lambda: f"mounts stay: {self.mounts()}")
        until(lambda: not self.processes(), lambda: f"processes stay: {self.processes()}")
        self.consistent()
        if self.clients.ctr("run", "--rm", image.NAME, "look", "echo", "well").stdout != "well\n":
            raise Wrong("the image does not run any more")
        if self.clients.docker("run", "--rm", "--network=none", image.NAME, "echo", "well").stdout != "well\n":
            raise Wrong("the engine's image does not run any more")

    def _folders(self, top: Path) -> list[str]:
        return [str(path) for namespace in top.glob("*") for path in namespace.iterdir()
                if not path.name.startswith("witness") and path.name not in self._engine_witness()]

    def _engine_witness(self) -> set[str]:
        done = self.clients.docker("ps", "--no-trunc", "--quiet", "--filter", "name=witness") if self.witnesses else None
        return set(done.stdout.split()) if done else set()

    def bundles(self) -> list[str]:
        return self._folders(self.d.state / "io.containerd.runtime.v2.task")

    def work(self) -> list[str]:
        return self._folders(self.d.root / "io.containerd.runtime.v2.task")

    def groups(self) -> list[str]:
        alive = self._engine_witness()
        return [str(path) for path in groups_of(self.namespace) if not path.name.startswith("witness") and path.name not in alive]

    def records(self) -> list[str]:
        alive = self._engine_witness()
        return [str(path) for suffix in ("", "e") for path in Path(f"/run/boxship/runtime/{self.namespace}{suffix}").glob("*")
                if not path.name.startswith(("witness", "@")) and path.name not in alive]

    def dead_sockets(self) -> list[str]:
        """Of shims of containers that were asked for here."""
        found = []
        for name in self.clients.names:
            for suffix in ("", "e"):
                path = f"/run/containerd/s/{sha256(f'{self.d.socket}/{self.namespace}{suffix}/{name}'.encode()).hexdigest()}"
                if os.path.lexists(path):
                    found.append(f"{path} ({name})")
        return found

    def mounts(self) -> list[str]:
        """Mounts below the daemon's folder that neither a witness nor a snapshot's image has."""
        alive = self._engine_witness()
        found = []
        for line in Path("/proc/self/mounts").read_text().splitlines():
            point = line.split()[1]
            if not point.startswith(f"{self.d.folder}/"):
                continue
            names = point.split("/")
            if point.endswith("/rootfs") and (names[-2].startswith("witness") or names[-2] in alive):
                continue
            if names[-2] == "layers" and (Path(point).parents[1] / "snapshots" / names[-1]).is_dir():
                continue
            found.append(point)
        return found

    def processes(self) -> list[str]:
        """Processes in the campaign's network namespace, or naming its folder, that are none of those that belong there."""
        mine = {self.d.process.pid if self.d.process else 0, self.registry.pid if self.registry else 0, spawner_of(self.d),
                *(witness.shim for witness in self.witnesses), *(witness.pid for witness in self.witnesses)}
        net = os.stat(f"/run/netns/{self.namespace}").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in mine:
                continue
            try:
                line = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                inside = os.stat(entry / "ns/net").st_ino == net or str(self.d.folder).encode() in line
            except OSError:
                continue
            # A witness's own children come and go.
            if inside and parent not in mine and line:
                found.append(f"{entry.name}: {line.replace(bytes(1), b' ').decode(errors='replace')}")
        return found

    def consistent(self) -> None:
        """The databases and what they say is on the disk."""
        for database in self.d.root.rglob("*.db"):
            with sqlite3.connect(database) as rows:
                said = rows.execute("PRAGMA integrity_check").fetchall()
            if said != [("ok",)]:
                raise Wrong(f"{database}: {said}")
        said = check.root(str(self.d.root))
        if said:
            raise Wrong(f"boxship system check: {said}")

    def end(self) -> None:
        """The witnesses go too, and the daemon: then nothing is left at all. Raises Wrong."""
        ctr, d = self.clients.ctr, self.d
        for name in ("witness", "witness-log"):
            self.must("ctr", "task", "kill", "--signal", "SIGKILL", name)
        until(lambda: "RUNNING" not in ctr("task", "ls").stdout, lambda: "the witnesses do not stop")
        for name in ("witness", "witness-log"):
            ctr("task", "rm", name)  # ends with the exit code of the task
            self.must("ctr", "containers", "rm", name)
        self.must("docker", "rm", "--force", "--volumes", "witness")
        self.witnesses = []
        for what, found in (("bundles", self.bundles), ("work folders", self.work), ("control groups", self.groups),
                            ("records of the runtime", self.records)):
            until(lambda found=found: not found(), lambda what=what, found=found: f"{what} stay: {found()}")  # type: ignore[misc]
        until(lambda: not shims(d, set()), lambda: f"shims stay: {_named(set(shims(d, set())))}")
        for name in self.must("ctr", "images", "ls", "-q").split():
            self.must("ctr", "images", "rm", "--sync", name)
        code = d.stop()
        if code:
            raise Wrong(f"the daemon ended with {code}")
        left = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1].startswith(f"{d.folder}/")]
        if left:
            raise Wrong(f"mounts stay: {left}")
        self.consistent()
        if "Traceback" in d.log.read_text():
            raise Wrong("the daemon's log has a traceback")

    def report(self) -> dict[str, Any]:
        """What was done."""
        return {"seed": self.seed, "kills": dict(self.kills), "done": dict(self.clients.done), "refused": dict(self.clients.refused),
                "lines": [witness.seen for witness in self.witnesses], "slowest start in s": round(self.slowest_s, 2)}


def _named(pids: set[int]) -> dict[int, str]:
    """What they are, and what they wait for."""
    found = {}
    for pid in pids:
        entry = Path(f"/proc/{pid}")
        try:
            line = (entry / "cmdline").read_bytes().replace(bytes(1), b" ").decode(errors="replace").strip()
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            files = {name.name: os.readlink(name) for name in (entry / "fd").iterdir()}
            found[pid] = (f"{line}, child of {parent}, children {(entry / 'task' / str(pid) / 'children').read_text()!r},"
                          f" in {(entry / 'stack').read_text().splitlines()[:3]}, system call {(entry / 'syscall').read_text()}, {files}")
        except OSError:
            found[pid] = "gone"
    return found


def main(kills: int, seed: int) -> int:
    """Returns the exit code."""
    with daemon() as d:
        campaign = Campaign(d, seed)
        try:
            campaign.open()
            while (done := campaign.kills.total()) < kills:
                at = time.monotonic()
                campaign.round(min(ROUND, kills - done))
                print(json.dumps({"at": time.strftime("%H:%M:%S"), "seconds": round(time.monotonic() - at), **campaign.report()}), flush=True)
            campaign.end()
        except Wrong as wrong:
            print(f"WRONG after {campaign.kills.total()} kills, seed {seed}: {wrong}", flush=True)
            shutil.copyfile(d.log, f"campaign-{seed}.log")
            return 1
        finally:
            campaign.close()
    print("all is well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)))
