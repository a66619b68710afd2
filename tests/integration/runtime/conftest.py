"""What the tests of boxrun share: a machine of their own, a bundle, a container that runs, and a look for leaks after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from support.machine import Bundle, Machine, bundle, machine, nothing_is_left  # noqa: F401


@pytest.fixture(params=["warm", "cold"])
def way(request: pytest.FixtureRequest, machine: Machine) -> bool:  # noqa: F811
    """Whether commands are served by a warm worker: for what each of the two ways does in its own code."""
    if request.param == "warm":
        machine.warm_up()
    return bool(request.param == "warm")


@pytest.fixture
def box(machine: Machine) -> Iterator[str]:  # noqa: F811
    """An id for a container, which is deleted after the test."""
    name = machine.name()
    yield name
    done = machine("delete", "--force", name)
    assert done.code == 0, done


@pytest.fixture
def running(machine: Machine, bundle: Bundle, box: str) -> str:  # noqa: F811
    """A container that runs `sleep`."""
    bundle.writable()
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    return box


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], object]:
    """Asks until the answer is true, and fails after some seconds."""

    def ask(question: Callable[[], object]) -> object:
        deadline = time.monotonic() + 30
        while not (answer := question()):
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.02)
        return answer

    return ask
