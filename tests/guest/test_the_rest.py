"""The tests that are made for any machine hold on this one too."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMITS = "limit or first_of_its_own or every_namespace or read_only_means or killed_boxship"


def run(*words: str) -> None:
    """pytest in pytest."""
    done = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *words], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:]


@pytest.mark.timeout(150)
@pytest.mark.lane("plain")
@pytest.mark.parametrize("path", ["linux", "test_linux_primitives.py", "runtime/test_lifecycle.py", "runtime/test_exec.py"])
def test_without_systemd(path: str) -> None:
    run(f"tests/integration/{path}", "-k", "not warm")


@pytest.mark.timeout(150)
@pytest.mark.lane("systemd")
@pytest.mark.parametrize("path", ["linux/test_dbus.py", "runtime/test_hooks.py"])
def test_with_systemd(path: str) -> None:
    run(f"tests/integration/{path}", "-k", "not warm")


@pytest.mark.timeout(150)
@pytest.mark.lane("systemd")
def test_boxship_run() -> None:
    run("tests/integration/test_run_host.py", "-k", LIMITS)
