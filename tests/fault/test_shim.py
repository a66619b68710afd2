"""The shim and the spawner are killed at every point of a task's life: `delete` removes what is left, and tells how it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.api.task import pb
from boxship.kit.errors import BoxshipError
from support.shim import SHIM, Daemon, Task, eventually

POINTS = (
    "shim.create.begin", "shim.create.mounted", "create.cgroup", "create.ready", "shim.create.gone", "shim.create.made",
    "shim.create.done", "shim.start.begin", "start.opened", "start.word", "shim.start.done", "shim.exit.seen", "shim.exit.kept",
    "shim.delete.begin", "delete.begin", "delete.cgroup", "shim.delete.gone", "shim.delete.unmounted",
)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not SHIM.exists():
        pytest.fail("the shim is not built: make build")
    daemon = Daemon()
    yield daemon
    assert daemon.close() == []


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that nobody has waited for yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def traces(task: Task) -> list[str]:
    """What there is of a task outside of its bundle."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if task.id in line]
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        found += [str(path) for path in hierarchy.glob(task.id)]
    runtime = Path(task.daemon.options.root)
    found += [str(path) for path in runtime.glob(f"*/{task.id}")]
    return found


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(daemon: Daemon, point: str) -> None:
    daemon.environ["BOXSHIP_FAILPOINT"] = f"{point}=kill"
    task = daemon.task("point", "sh", "-c", "exit 5").start_shim()
    try:
        task.create()
        task.start()
        ended = task.wait()
        assert ended == 5
        task.call("Delete")
        reached = False
    except BoxshipError:
        reached = True
    assert reached, "the point was not passed"
    daemon.environ.clear()
    deleted = task.delete_shim()
    # A part of the work is done by forks: killing one of those is an error of the call, and the shim lives.
    assert deleted.exit_status in ((5,) if point.startswith(("shim.exit.kept", "shim.delete", "delete")) else (5, 137))
    assert eventually(lambda: traces(task) == [], f"left: {traces(task)}")
    assert task.delete_shim().exit_status == deleted.exit_status, "once more, the same"


def test_a_killed_shim_takes_its_container_along_at_delete(daemon: Daemon) -> None:
    task = daemon.task("killed").run()
    pid = task.call("State").pid
    os.kill(task.shim_pid(), signal.SIGKILL)
    deleted = task.delete_shim()
    assert (deleted.exit_status, deleted.pid) == (137, pid)
    eventually(lambda: not is_running(pid))
    assert traces(task) == []
    assert not Path(task.address.removeprefix("unix://")).exists()


def test_an_exit_that_nobody_heard_of_is_told_by_delete(daemon: Daemon) -> None:
    task = daemon.task("unheard", "sh", "-c", "exit 33").run()
    daemon.events.down()
    task.wait()
    os.kill(task.shim_pid(), signal.SIGKILL)
    assert task.delete_shim().exit_status == 33


def test_the_spawner_is_killed_and_shims_live(daemon: Daemon) -> None:
    task = daemon.task("spawner").run()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            name = (entry / "comm").read_text()
        except OSError:
            continue
        if b"boxship.daemon.spawner" in words and name != "containerd-shim\n" and os.fsencode(SHIM.parent) in words[0]:
            os.kill(int(entry.name), signal.SIGKILL)
    assert task.exec("e", "sh", "-c", "exit 3") > 0
    assert task.wait("e") == 3
    other = daemon.task("after").run()
    assert other.call("State").status == task.call("State").status


def test_a_caller_that_goes_away_leaves_nothing(daemon: Daemon) -> None:
    """The connection of a client that is killed in the middle of a call."""
    task = daemon.task("caller").run()
    assert task.client is not None
    task.client.begin("containerd.task.v2.Task", "Wait", pb.task.WaitRequest(id=task.id))
    task.client.close()
    task.connect()
    task.call("Kill", signal=9)
    assert task.wait() == 137
