"""A build whose daemon is killed, or whose client goes away: nothing is left, and the cache is right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, daemon
from support.image import NAME, write_archive

pytestmark = pytest.mark.root
COMMAND = [sys.executable, "-c", "import sys, os; from boxship.cli.main import main; sys.exit(main(sys.argv[1:], os.environ))"]


@pytest.fixture
def engine() -> Iterator[Daemon]:
    with daemon() as made:
        made.start()
        write_archive(made.folder / "image.tar")
        box(made, "load", "-q", "-i", made.folder / "image.tar")
        yield made


def environ(engine: Daemon) -> dict[str, str]:
    return {**os.environ, "BOXSHIP_HOST": f"unix://{engine.state}/docker.sock"}


def box(engine: Daemon, *words: str | Path, code: int = 0) -> str:
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, timeout=100, env=environ(engine))
    text = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == code, text
    return text


def begun(engine: Daemon, context: Path, mark: str) -> subprocess.Popen[bytes]:
    """A build that is in the middle of a step."""
    process = subprocess.Popen(
        [*COMMAND, "build", str(context)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ(engine),
        # What runs these tests in the background may have them ignore it, and so what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: PLW1509
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == mark.encode():
            return process
    raise AssertionError("the step did not begin")


def eventually(what: object, why: str) -> None:
    assert callable(what)
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError(why)


def left(engine: Daemon) -> list[str]:
    """What of steps is left: directories, tasks, mounts, processes."""
    found = [str(each) for name in ("engine/stdio", "engine/build") if (engine.state / name).is_dir()
             for each in (engine.state / name).iterdir()]
    found += engine.ctr("tasks", "ls", "-q", namespace="moby").split()
    found += engine.ctr("containers", "ls", "-q", namespace="moby").split()
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{engine.state}/engine/build" in line]
    return found


def test_a_daemon_that_is_killed_in_a_step(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "Dockerfile").write_text(f"""FROM {NAME}
RUN echo kept > /kept
RUN --mount=type=bind,target=/ctx echo half > /half; echo in the middle; test -e /go || sleep 300
""")
    process = begun(engine, tmp_path, "in the middle")
    assert engine.process is not None
    engine.stop(signal.SIGKILL)
    assert process.wait(30) != 0
    engine.start()
    eventually(lambda: not left(engine), f"left: {left(engine)}")
    (tmp_path / "Dockerfile").write_text(f"FROM {NAME}\nRUN echo kept > /kept\nRUN test ! -e /half && cat /kept\n")
    said = box(engine, "build", tmp_path)
    assert said.count("Using cache") == 1 and "\nkept\n" in said
    eventually(lambda: not snapshots(engine), f"active snapshots are left: {snapshots(engine)}")
    assert "Traceback" not in engine.log.read_text()


def snapshots(engine: Daemon) -> list[str]:
    """Active snapshots."""
    rows = engine.ctr("snapshots", "--snapshotter", "erofs", "ls", namespace="moby", check=False).splitlines()
    return [row for row in rows if row.endswith("Active")]


def test_a_client_that_goes_away_ends_its_build(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {NAME}\nRUN echo in the middle; sleep 300\n")
    process = begun(engine, tmp_path, "in the middle")
    process.send_signal(signal.SIGINT)
    process.wait(30)
    eventually(lambda: not left(engine), f"left: {left(engine)}")
    assert not snapshots(engine)
    (tmp_path / "Dockerfile").write_text(f"FROM {NAME}\nRUN echo again\n")
    assert "again" in box(engine, "build", tmp_path)
    assert "Traceback" not in engine.log.read_text()
