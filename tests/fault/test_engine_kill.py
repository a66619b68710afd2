"""`boxship daemon` killed at random moments while docker clients create, run, stop and remove: all is accounted for afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import image
from support.image import NAME
from support.peers import needs
from support.stage import Stage, open_stage

KILLS = int(os.environ.get("BOXSHIP_KILLS", "8"))
CLIENTS = 3


@pytest.fixture
def stage() -> Iterator[Stage]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    needs("ip", "docker")
    stage = open_stage()
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.timeout(300)
def test_kills_of_the_daemon_leave_every_container_accounted_for(stage: Stage, tmp_path: Path) -> None:
    folder = stage.directory / "d"
    folder.mkdir()
    docker = ["docker", "--host", f"unix://{folder}/docker.sock", "--config", str(stage.directory / "client")]

    def start() -> subprocess.Popen[bytes]:
        return stage.start(
            Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder / "state", log=folder / "log")

    docker[2] = f"unix://{folder}/state/docker.sock"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return stage.run(*docker, *words, check=False, timeout=60)

    def answers() -> None:
        stage.eventually(lambda: run("version").returncode == 0, timeout=60, why="the daemon answering")

    daemon = start()
    answers()
    image.write_archive(tmp_path / "image.tar")
    assert run("load", "--input", str(tmp_path / "image.tar")).returncode == 0
    assert run("run", "--detach", "--network=none", "--name", "stays", NAME, "sleep", "10000").returncode == 0
    pid = run("inspect", "--format", "{{.State.Pid}}", "stays").stdout
    end = threading.Event()
    made: set[str] = set()

    def load(number: int) -> None:
        count = 0
        while not end.is_set():
            name = f"c{number}-{count}"
            count += 1
            made.add(name)
            run("run", "--network=none", "--detach", "--volume", "/v", "--name", name, NAME, "sh", "-c", "echo out; sleep 0.2; exit 3")
            run("run", "--network=none", "--rm", NAME, "true")
            if count % 2:
                run("rm", "--force", "--volumes", name)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(KILLS):
            time.sleep(random.uniform(0.2, 1.5))
            for child in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            daemon.wait(10)
            daemon = start()
            answers()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    # What ran is the same process as before, and every other container has come to its end.
    assert run("inspect", "--format", "{{.State.Pid}}", "stays").stdout == pid

    def settled() -> bool:
        rows = [json.loads(line) for line in run("ps", "--all", "--format", "{{json .}}").stdout.splitlines()]
        return all(row["State"] in ("exited", "created") or row["Names"] == "stays" for row in rows)

    stage.eventually(settled, timeout=30, why="all containers at their ends")
    names = run("ps", "--all", "--format", "{{.Names}}").stdout.split()
    assert "stays" in names
    # A container that was to be removed at its end can be there only when the client itself never started it.
    for name in set(names) - made - {"stays"}:
        assert run("inspect", "--format", "{{.State.Status}}", name).stdout.strip() == "created"
    for name in names:
        state = json.loads(run("inspect", "--format", "{{json .State}}", name).stdout)
        if name in made and state["Status"] == "exited" and state["ExitCode"] == 3:
            assert run("logs", name).stdout == "out\n"
    assert run("rm", "--force", "--volumes", *names).returncode == 0
    # And nothing is left: no process, mount, folder, snapshot, volume.
    assert run("ps", "--all", "--quiet").stdout == ""
    assert run("volume", "prune", "--force").returncode == 0
    assert run("volume", "ls", "--quiet").stdout == ""
    stage.eventually(lambda: os.listdir(folder / "root/engine/containers") == [], why="no folders of containers")
    stage.eventually(lambda: os.listdir(folder / "state/engine/stdio") == [], why="no FIFOs")
    stage.eventually(lambda: "sleep 10000" not in stage.out("ps", "-ef"), why="no processes")
    assert [line for line in stage.out("cat", "/proc/mounts").splitlines() if f"{folder}/" in line and "/rootfs" in line] == []
    assert run("run", "--rm", "--network=none", NAME, "echo", "well").stdout == "well\n"
    stage.stop(daemon)
    assert "Traceback" not in (folder / "log").read_text()
