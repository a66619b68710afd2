"""A shim without anything to do is its holder alone, and nobody can tell from outside but by its memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.api.task import pb
from boxship.api.task.services import TASK_V2
from boxship.kit.errors import Unavailable
from support.shim import SHIM, Daemon, Task, eventually


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not SHIM.exists():
        pytest.fail("the shim is not built: make build")
    daemon = Daemon(os.environ.get("BOXSHIP_TEST_SHIM", SHIM))
    yield daemon
    assert daemon.close() == []


def holder(task: Task) -> int:
    """The parent of the container."""
    assert task.pid
    return int(Path(f"/proc/{task.pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    """Of a process with one thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run(task: Task) -> Task:
    """Start it, and wait until there is no worker."""
    task.start_shim()
    task.create()
    task.start()
    asleep(task)
    return task


def asleep(task: Task) -> None:
    """Wait until the shim's only children are its containers' processes."""
    title = Path(f"/proc/{holder(task)}/cmdline").read_bytes()

    def is_asleep() -> bool:
        for child in children(holder(task)):
            try:
                if Path(f"/proc/{child}/cmdline").read_bytes() == title:
                    return False
            except FileNotFoundError:
                return False  # over since: look again
        return True

    eventually(is_asleep, "no worker")


def test_calls_and_an_exit_find_everything_as_it_was(daemon: Daemon) -> None:
    task = run(daemon.task("idle", "sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done"))
    assert task.client is not None
    waits = task.client.begin(TASK_V2, "Wait", pb.task.WaitRequest(id=task.id))
    asleep(task)
    state = task.call("State")
    assert (state.status, state.pid, state.bundle) == (pb.types.RUNNING, task.pid, str(task.bundle))
    assert task.shim_pid() == holder(task)
    asleep(task)
    task.exec("e", "sh", "-c", "sleep 0.6; exit 3")
    asleep(task)
    assert task.wait("e") == 3
    asleep(task)
    os.kill(task.pid, signal.SIGTERM)  # not by way of the shim, which sleeps
    assert task.client.finish(waits, pb.task.WaitResponse).exit_status == 5
    assert task.delete().exit_status == 5
    topics = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"]
    eventually(lambda: daemon.events.topics == topics, "every event once, in order")


def test_output_goes_on_without_a_worker(daemon: Daemon) -> None:
    task = daemon.task("talk", "sh", "-c", "read x; echo one; read x; head -c 300000 /dev/zero; echo end; exec sleep 1000")
    task.fifos("stdin", "stdout")
    run(task)
    os.write(task.fds["stdin"], b"\n")
    assert task.read("stdout", b"one\n") == b"one\n"
    asleep(task)
    os.write(task.fds["stdin"], b"\n")
    time.sleep(0.5)  # the FIFO is full: the rest waits
    assert len(task.read("stdout", b"end\n")) == 300004
    asleep(task)
    assert task.call("State").status == pb.types.RUNNING


def test_a_terminal_goes_on(daemon: Daemon) -> None:
    task = daemon.task("idletty", "sh", "-c", "read x; stty size; exit 4", terminal=True)
    task.fifos("stdin", "stdout")
    run(task)
    task.call("ResizePty", width=90, height=20)
    asleep(task)
    os.write(task.fds["stdin"], b"x\n")
    assert b"20 90" in task.read("stdout", b"20 90")
    assert task.wait() == 4


def test_lack_of_memory_wakes(daemon: Daemon) -> None:
    def small(config: dict) -> None:  # type: ignore[type-arg]
        config["linux"]["resources"] = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}

    task = daemon.task("idleoom", "sh", "-c", "read x; exec tail /dev/zero", change=small)
    task.fifos("stdin")
    run(task)
    os.write(task.fds["stdin"], b"\n")
    task.wait()
    eventually(lambda: "oom" in daemon.events.topics and daemon.events.topics[-1] == "exit", "an event of it before the exit")


def test_a_pod_is_held_whole(daemon: Daemon) -> None:
    def pod(config: dict) -> None:  # type: ignore[type-arg]
        config["annotations"] = {"io.kubernetes.cri.sandbox-id": "idlepod"}

    first = daemon.task("idlepod", change=pod)
    second = daemon.task("second", "sh", "-c", "sleep 0.8; exit 9", change=pod)
    first.start_shim()
    first.create()
    first.start()
    second.start_shim()
    second.create()
    second.start()
    asleep(first)
    assert second.wait() == 9
    asleep(first)
    assert second.call("State").exit_status == 9
    assert second.call("Delete").exit_status == 9
    assert first.call("State").status == pb.types.RUNNING


def test_a_signal_to_the_holder_is_the_shims(daemon: Daemon) -> None:
    """With containers it stays; without it ends and takes its socket along."""
    task = run(daemon.task("idleterm"))
    pid = holder(task)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert task.call("State").status == pb.types.RUNNING
    task.call("Kill", signal=9)
    task.wait()
    task.call("Delete")
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(task.address.removeprefix("unix://")).exists(), "the socket is gone")
    task.address = ""


def test_worker_and_holder_end_together(daemon: Daemon) -> None:
    task = run(daemon.task("idlekill"))
    pid = holder(task)
    task.call("State")
    worker = next(child for child in children(pid) if child != task.pid)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker goes with the holder")
    with pytest.raises(Unavailable):
        Task.connect(task)
    os.kill(task.pid, signal.SIGKILL)


def test_an_idle_shim_shares_its_memory(daemon: Daemon) -> None:
    task = run(daemon.task("idlesize"))
    private = 0
    for line in Path(f"/proc/{holder(task)}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            private = int(line.split()[1])
    assert private < 2048, f"{private} KiB are its own"
