"""Tests that are made for any machine: they hold on this one too, where CRIU runs, and cgroups are v2's alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.guest import ENOUGH_S


@pytest.mark.timeout(100)
@pytest.mark.lane("plain")
@pytest.mark.parametrize("path", ["linux/test_cgroups.py", "test_linux_primitives.py"])
def test_kernel_primitives(path: str) -> None:
    run(f"tests/integration/{path}")


@pytest.mark.timeout(300)
@pytest.mark.lane("plain")
@pytest.mark.parametrize(
    "words",
    [
        # The only place where checkpoint and restore are tested wherever the tests run: Debian's CRIU needs Debian's kernel.
        ["test_checkpoint.py"],
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
        if float(file.read().split()[0]) > ENOUGH_S:
            pytest.skip(f"the guest has been running for more than {ENOUGH_S} s")
    done = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *words], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:]
