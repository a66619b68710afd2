"""A process that carries out many commands, a warm worker or a program that uses the library, keeps nothing of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.machine import Bundle, Machine

Ask = Callable[[Callable[[], object]], object]


@pytest.fixture
def workers(machine: Machine) -> Callable[[], set[int]]:
    """The waiting workers, once there are as many as there shall be."""
    machine.warm_up()

    def settled() -> set[int]:
        before: set[int] = set()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            now = set(machine.warm_workers())
            if now == before and len(now) > 1:
                return now
            before = now
            time.sleep(0.1)
        pytest.fail("the workers do not settle")

    return settled


def test_a_worker_goes_on_to_the_next_command(
    machine: Machine, bundle: Bundle, box: str, workers: Callable[[], set[int]], tmp_path: Path, eventually: Ask
) -> None:
    """Whatever the command was: with a log file as containerd calls it, a pid file, a seccomp filter, hooks."""
    bundle.spec["hooks"] = {"createRuntime": [{"path": "/bin/true"}], "startContainer": [{"path": "/bin/true"}]}
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["bdflush"], "action": "SCMP_ACT_ERRNO"}]}
    bundle.bind(tmp_path, "/mnt")
    path = bundle.write()
    before = workers()
    log = ["--log", str(tmp_path / "log"), "--log-format", "json"]
    for words in (
        ["--version"], ["create", "--pid-file", str(tmp_path / "pid"), "--bundle", path, box], ["state", box], ["start", box], ["ps", box],
        ["exec", box, "true"], ["exec", box, "false"], ["exec", "--detach", box, "sleep", "100"], ["list"], ["events", "--stats", box],
        ["update", "--pids-limit", "50", box], ["pause", box], ["resume", box], ["kill", box, "KILL"], ["features"],
        ["delete", "--force", box],
    ):
        done = machine(*log, *words)
        assert done.code == (words[-1] == "false"), done
        assert workers() == before, f"a worker did not go on after {words}"
    bundle.process["args"] = ["true"]
    machine.ok(*log, "run", "--bundle", bundle.write(), box)
    assert workers() == before, "a worker did not go on after a run in the foreground"


def test_after_an_error_a_worker_ends(machine: Machine, workers: Callable[[], set[int]]) -> None:
    """An exception may hold anything."""
    before = workers()
    assert machine("state", "no-such-container").code == 1
    after = workers()
    assert len(before - after) == 1 and len(after) >= 2


def test_a_worker_holds_no_folder_and_no_stream_of_a_caller(machine: Machine, workers: Callable[[], set[int]], tmp_path: Path) -> None:
    workers()
    for _ in range(6):
        with open(tmp_path / "output", "w") as output:
            machine.start([machine.exe, "list"], stdout=output, cwd=str(tmp_path)).wait()
    for pid in workers():
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [link for link in links if str(tmp_path) in link]


def test_when_many_come_at_once_all_are_served_and_few_workers_stay(machine: Machine, workers: Callable[[], set[int]]) -> None:
    workers()
    begun = [machine.begin("list") for _ in range(40)]
    assert {running.wait().code for running in begun} == {0}
    assert len(workers()) <= 6


def test_a_command_that_waits_keeps_nobody_else_waiting(machine: Machine, bundle: Bundle, workers: Callable[[], set[int]]) -> None:
    """Each run in the foreground holds a worker for as long as the container lives."""
    path = bundle.write()
    workers()
    boxes = [machine.name() for _ in range(6)]
    waiting = [machine.begin("run", "--bundle", path, box) for box in boxes]
    deadline = time.monotonic() + 20
    while len(json.loads(machine.ok("list", "--format", "json")) or []) < len(boxes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = time.monotonic()
    machine.ok("list")
    assert time.monotonic() - begun < 2
    for box in boxes:
        machine.ok("delete", "--force", box)
    assert {running.wait().code for running in waiting} == {137}


LIBRARY = """
import os, sys
from boxship.runtime import lifecycle
from boxship.runtime.context import Context
from boxship.runtime.options import CreateOptions

context, bundle, box = Context(), sys.argv[1], sys.argv[2]

def descriptors():
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}

for turn in range(3):
    assert lifecycle.run(context, box, bundle) == 0
    lifecycle.create(context, box, bundle).close()
    lifecycle.start(context, box)
    lifecycle.delete(context, box, force=True)
    if turn == 0:
        before = descriptors()
assert len(descriptors()) == len(before), (before, descriptors())
"""


def test_a_program_that_uses_the_library_keeps_no_descriptor(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.process["args"] = ["true"]
    done = machine.start([sys.executable, "-I", "-c", LIBRARY, bundle.write(), box], stderr=subprocess.STDOUT).wait()
    assert done.code == 0, done
