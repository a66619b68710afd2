"""A docker-registry of its own for a test, on a Unix socket or on a port of loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path


class Server:
    """A docker-registry with a configuration, and files of its own."""

    def __init__(self, directory: Path, http: str = "", more: str = "", *, port: bool = False) -> None:
        """`http` and `more` go into its configuration; `port`: `address` is where it listens, otherwise `socket` is."""
        self.directory = directory
        self.socket = directory / "registry.sock"
        self.address = ""
        where = f"  net: unix\n  addr: {self.socket}\n"
        if port:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.address = f"127.0.0.1:{probe.getsockname()[1]}"
            where = f"  addr: {self.address}\n"
        config = directory / "registry.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {directory}/data}}\n  delete: {{enabled: true}}\n"
            f"http:\n{where}  relativeurls: true\n{http}{more}"
        )
        self.log = directory / "registry.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def _listens(self) -> bool:
        if not self.address:
            return self.socket.exists()
        host, _, port = self.address.partition(":")
        try:
            socket.create_connection((host, int(port))).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
