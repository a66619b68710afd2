"""Tests that are made for any machine: they hold on this one too, where CRIU runs, and cgroups are v2's alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from support.guest import ENOUGH_S, RUN_TIMEOUT_S


@pytest.mark.timeout(100)
@pytest.mark.lane("plain")
@pytest.mark.parametrize("path", ["linux/test_cgroups.py", "test_linux_primitives.py"])
def test_kernel_primitives(path: str) -> None:
    run(f"tests/integration/{path}")


@pytest.mark.timeout(400)
@pytest.mark.lane("plain")
@pytest.mark.parametrize(
    "words",
    [
        # The only place where checkpoint and restore are tested wherever the tests run: Debian's CRIU needs Debian's kernel.
        # Each point of being killed takes seconds here; one stands for all.
        ["test_checkpoint.py", "-k", "not killed or post-restore"],
        # One of the two ways to the runtime: an interpreter's start takes a second here.
        ["test_lifecycle.py", "test_exec.py", "test_hooks.py", "-k", "not cold"],
    ],
    ids=["checkpoint", "verbs"],
)
def test_the_runtime(words: list[str]) -> None:
    run(*(f"tests/integration/runtime/{word}" if word.endswith(".py") else word for word in words))


@pytest.mark.timeout(100)
@pytest.mark.lane("systemd")
def test_the_dbus_client_against_the_machines_daemon() -> None:
    run("tests/integration/linux/test_dbus.py")


def run(*words: str) -> None:
    """pytest in pytest."""
    with open("/proc/uptime") as file:
        uptime = float(file.read().split()[0])
    if uptime > ENOUGH_S:
        pytest.skip(f"the guest has been running for more than {ENOUGH_S} s")
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *words]
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as running:
            try:
                code = running.wait(timeout=RUN_TIMEOUT_S - 90 - uptime)
            except subprocess.TimeoutExpired:
                running.kill()
                code = -1
        output.seek(0)
        said = output.read()
    progress = "".join(line.split("[")[0] for line in said.splitlines() if set(line.split(" [")[0]) <= set(".sFEx"))
    if code < 0 and not set("FE") & set(progress):
        pytest.skip(f"a slow machine: {progress.count('.')} tests have passed, then the guest's time was up")
    assert code == 0, said[-20000:]
