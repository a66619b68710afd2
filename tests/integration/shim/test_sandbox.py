"""A shim holds a pod: there before its first container, and until it is told to go."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from boxship.api.task.services import SANDBOX, SANDBOXES
from boxship.kit.errors import AlreadyExists, FailedPrecondition, NotFound, Unsupported
from support.shim import NAMESPACE, SHIM, Client, Daemon, Task, eventually

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not SHIM.exists():
        pytest.fail("the shim is not built: make build")
    daemon = Daemon(os.environ.get("BOXSHIP_TEST_SHIM", SHIM))
    yield daemon
    assert daemon.close() == []


def ask(client: Client | None, method: str, name: str, **fields: Any) -> Any:
    assert client is not None
    request, response = SANDBOXES[method]
    return client.call(SANDBOX, method, request(sandbox_id=name, **fields), response, namespace=NAMESPACE, timeout_s=20)


def in_pod(daemon: Daemon, pod: str, name: str, *words: str) -> Task:
    return daemon.task(name, *words, change=lambda config: config.update(annotations={"io.kubernetes.cri.sandbox-id": pod}))


def test_a_pod_lives_and_ends_with_its_shim(daemon: Daemon) -> None:
    pod = in_pod(daemon, "sbpod", "sbpod")
    pod.start_shim()
    with pytest.raises(NotFound):
        ask(pod.client, "StartSandbox", "sbpod")
    ask(pod.client, "CreateSandbox", "sbpod", bundle_path=str(pod.bundle))
    with pytest.raises(AlreadyExists):
        ask(pod.client, "CreateSandbox", "sbpod", bundle_path=str(pod.bundle))
    assert ask(pod.client, "SandboxStatus", "sbpod").state == NOT_READY
    started = ask(pod.client, "StartSandbox", "sbpod")
    assert b"containerd-shim-boxship-v1" in Path(f"/proc/{started.pid}/cmdline").read_bytes()
    assert started.created_at.seconds > 0
    assert ask(pod.client, "Platform", "sbpod").platform.os == "linux"
    ask(pod.client, "PingSandbox", "sbpod")
    with pytest.raises(NotFound):
        ask(pod.client, "PingSandbox", "another")
    with pytest.raises(Unsupported):
        ask(pod.client, "SandboxMetrics", "sbpod")

    ends: list[Any] = []
    waiting = threading.Thread(target=lambda: ends.append(ask(Client(pod.address), "WaitSandbox", "sbpod")))
    waiting.start()
    first, second = in_pod(daemon, "sbpod", "sbone", "sleep", "1000"), in_pod(daemon, "sbpod", "sbtwo", "sh", "-c", "exit 4")
    for task in (first, second):
        task.run()
        assert task.address == pod.address
    assert second.wait() == 4
    # Idle now: what the next worker knows was handed over, and who waits goes on waiting.
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    eventually(lambda: children.read_text().split() == [str(first.pid)], f"a worker that stays: {children.read_text()}")
    status = ask(pod.client, "SandboxStatus", "sbpod", verbose=True)
    assert (status.state, status.pid, dict(status.info)) == (READY, started.pid, {first.id: "running", second.id: "stopped"})
    second.delete()
    assert ask(pod.client, "SandboxStatus", "sbpod").state == READY, "a Shutdown for a container ends the pod"
    assert not ends

    ask(pod.client, "StopSandbox", "sbpod")
    assert first.wait() == 137
    waiting.join(20)
    assert len(ends) == 1
    assert ends[0].exited_at.seconds >= started.created_at.seconds
    ask(pod.client, "StopSandbox", "sbpod")
    assert ask(pod.client, "SandboxStatus", "sbpod").state == NOT_READY
    with pytest.raises(FailedPrecondition):
        ask(pod.client, "StartSandbox", "sbpod")
    ask(pod.client, "ShutdownSandbox", "sbpod")
    eventually(lambda: not Path(pod.address.removeprefix("unix://")).exists(), "the shim stays")
    eventually(lambda: daemon.events.topics[-2:] == ["exit", "delete"], "the end of the first container is not told")


def test_a_pod_without_containers_stays_until_it_is_shut_down(daemon: Daemon) -> None:
    pod = daemon.task("sbempty")
    pod.start_shim()
    ask(pod.client, "CreateSandbox", "sbempty", bundle_path=str(pod.bundle))
    pod.call("Shutdown")
    pid = ask(pod.client, "StartSandbox", "sbempty").pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    eventually(lambda: children.read_text() == "", f"a worker that stays: {children.read_text()}")
    assert ask(pod.client, "SandboxStatus", "sbempty").state == READY
    ask(pod.client, "ShutdownSandbox", "sbempty")
    eventually(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(), "the shim stays")
