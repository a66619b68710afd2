"""The daemon as a process, on folders of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENTRY = "import sys; from boxship.daemon.entry import boxshipd; sys.exit(boxshipd())"


def program(folder: Path) -> str:
    """`boxshipd` of the interpreter that runs the tests, also where it is not installed as a script."""
    path = folder / "boxshipd"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{ENTRY}" "$@"\n')
    path.chmod(0o755)
    return str(path)


class Daemon:
    """A daemon that can be started, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root, self.state = folder / "root", folder / "state"
        self.socket = str(self.state / "containerd.sock")
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.prefix: list[str] = []
        """What starts it in a network namespace of its own, as `nsenter --net=…`."""

    def start(self, *flags: str, env: dict[str, str] | None = None, config: str = "") -> None:
        """Start, and wait until it answers."""
        words = [sys.executable, "-c", ENTRY, "--root", str(self.root), "--state", str(self.state), *flags]
        if self.prefix:
            words = [*self.prefix, *words]
        elif "--bridge" not in flags:
            words += ["--bridge", "none"]  # the machine's own network is none of a test's business
        if config:
            (self.folder / "config.toml").write_text(config)
            words += ["--config", str(self.folder / "config.toml")]
        with open(self.log, "ab") as log:
            offset = log.tell()
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=dict(os.environ, **(env or {})))
        for _ in range(3000):
            text = self.log.read_bytes()[offset:]
            if b"msg=ready" in text or b'"msg": "ready"' in text:
                self.ready = True
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the daemon did not start: {self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self.process is not None
        self.ready = False
        self.process.send_signal(number)
        code = self.process.wait(20)
        self.process = None
        return code

    def ctr(self, *words: str, namespace: str = "", check: bool = True, input: bytes | None = None) -> str:  # noqa: A002
        """Debian's ctr against it: what it printed."""
        flags = ["--namespace", namespace] if namespace else []
        done = subprocess.run(["ctr", "--address", self.socket, *flags, *words], capture_output=True, timeout=60, input=input)
        if check and done.returncode != 0:
            raise AssertionError(f"ctr {' '.join(words)}: {done.stderr.decode()}")
        return done.stdout.decode() if check else done.stdout.decode() + done.stderr.decode()


def processes_of(folder: Path) -> list[int]:
    """Pids of processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@contextmanager
def daemon() -> Iterator[Daemon]:
    """A daemon that is not started yet; whatever it leaves is taken away at the end."""
    # Paths of sockets are short.
    folder = Path("/tmp") / f"bd-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o755)
    made = Daemon(folder)
    try:
        yield made
    finally:
        if made.process is not None:
            made.process.kill()
            made.process.wait()
        clear(folder)


def clear(folder: Path) -> None:
    """End what runs below a daemon's folder, unmount what is mounted there, as images stay when their daemon ends, and remove it."""
    for pid in processes_of(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    table = Path("/proc/self/mounts").read_text().splitlines()
    for line in reversed(table):
        point = line.split()[1]
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", point])
    shutil.rmtree(folder)
