"""A daemon with networks, on a stage of its own with a neighbour machine at 203.0.113.9, and the docker CLI for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import image
from support.image import NAME
from support.peers import needs
from support.stage import Stage, open_stage

HOST, NEIGHBOUR = "203.0.113.1", "203.0.113.9"


class Site:
    """The stage, the daemon, the docker CLI."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.folder = stage.directory / "d"
        self.folder.mkdir()
        self.config = ""
        self.flags: list[str | Path] = []
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon, and wait until it answers."""
        words: list[str | Path] = [Path(sys.executable).with_name("boxship"), "daemon", "--root", self.folder / "root", "--state",
                                   self.folder / "state", *self.flags]
        if self.config:
            (self.folder / "config.toml").write_text(self.config)
            words += ["--config", self.folder / "config.toml"]
        self.daemon = self.stage.start(*words, log=self.folder / "log")
        self.stage.eventually(lambda: self.code("version") == 0, timeout=60, why="the daemon answering")

    def kill(self) -> None:
        """SIGKILL the daemon, whose parent is the process that entered the stage."""
        assert self.daemon is not None
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), 9)
        self.daemon.wait(20)

    def _words(self, *words: str) -> list[str | Path]:
        return ["docker", "--host", f"unix://{self.folder}/state/docker.sock", "--config", self.folder / "client", *words]

    def __call__(self, *words: str) -> str:
        """What a docker command that succeeds prints."""
        return self.stage.out(*self._words(*words))

    def code(self, *words: str) -> int:
        """A docker command's exit code."""
        return self.stage.run(*self._words(*words), check=False).returncode

    def fails(self, *words: str) -> str:
        """What a docker command that fails says."""
        done = self.stage.run(*self._words(*words), check=False)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def inspect(self, name: str, kind: str = "container") -> Any:
        """The object."""
        return json.loads(self(kind, "inspect", name))[0]

    def run(self, name: str, *flags: str, command: tuple[str, ...] = ("sleep", "1000")) -> Any:
        """Start a container in the background; what inspect says of its networks."""
        self("run", "--detach", "--name", name, *flags, NAME, *command)
        return self.inspect(name)["NetworkSettings"]

    def serve(self, name: str, *flags: str) -> Any:
        """A container that answers its name on TCP port 80."""
        script = f"while :; do echo {name} | busybox nc -l -p 80 >/dev/null; done"
        found = self.run(name, *flags, command=("sh", "-c", script))
        self.stage.eventually(lambda: ":0050 " in self("exec", name, "cat", "/proc/net/tcp6", "/proc/net/tcp"), why="the server")
        return found

    def ask(self, where: str, address: str, port: int = 80) -> str:
        """What is answered there to a container (by name), to this "host" or to its "neighbour"; "" for nothing."""
        words: list[str | Path] = ["busybox", "nc", "-w", "2", address, str(port)]
        if where == "neighbour":
            words = ["nsenter", f"--net={self.folder}/neighbour", *words]
        elif where != "host":
            words = self._words("exec", where, "busybox", "nc", "-w", "2", address, str(port))
        return self.stage.run("timeout", "5", *words, check=False).stdout.strip()

    def kernel(self) -> dict[str, list[str]]:
        """What of ours there is in the kernel: devices, pinned namespaces, elements of the maps."""
        links = json.loads(self.stage.out("ip", "-j", "link"))
        rules = json.loads(self.stage.run("nft", "-j", "list", "ruleset").stdout)["nftables"]
        return {
            "veths": [each["ifname"] for each in links if each["ifname"].startswith("veth")],
            "bridges": [each["ifname"] for each in links if each["ifname"].startswith(("br-", "bs"))],
            "namespaces": [each.name for each in (self.folder / "state" / "netns").iterdir()],
            "ports": [str(each["map"]["elem"]) for each in rules if "map" in each and each["map"].get("elem")],
        }

    def clean(self) -> None:
        """Remove all containers and networks."""
        if ids := self("ps", "--all", "--quiet").split():
            self("rm", "--force", "--volumes", *ids)
        self("network", "prune", "--force")


@contextmanager
def open_site(config: str = "", flags: list[str | Path] | None = None) -> Iterator[Site]:
    """A site with the daemon started and the image loaded."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    needs("ip", "docker", "nft")
    stage = open_stage()
    try:
        site = Site(stage)
        site.config, site.flags = config, flags or []
        neighbour = site.folder / "neighbour"
        neighbour.touch()
        inside = ["nsenter", f"--net={neighbour}", "ip"]
        stage.run("unshare", f"--net={neighbour}", "ip", "link", "set", "lo", "up")
        for words in (
            ["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", str(neighbour)],
            ["ip", "address", "add", f"{HOST}/24", "dev", "up0"], ["ip", "link", "set", "up0", "up"],
            [*inside, "address", "add", f"{NEIGHBOUR}/24", "dev", "eth0"], [*inside, "link", "set", "eth0", "up"],
            ["ip", "route", "add", "default", "via", NEIGHBOUR],
        ):
            stage.run(*words)
        site.start()
        image.write_archive(site.folder / "image.tar")
        site("load", "--input", str(site.folder / "image.tar"))
        yield site
    finally:
        stage.close()
