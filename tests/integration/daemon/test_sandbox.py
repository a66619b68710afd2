"""A pod over the daemon's API: its shim holds it, takes its containers, and outlives the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.api.any import SPEC
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.client import connect
from boxship.kit.errors import NotFound
from boxship.oci.defaults import default_spec
from support import image
from support.daemon import Daemon, daemon

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

CALL = Call("pods")
POD = {"sandbox_id": "pod", "sandboxer": "shim"}
RUNTIME = "io.containerd.boxship.v1"
s = pb.sandbox


@pytest.fixture
def d() -> Iterator[Daemon]:
    with daemon() as made:
        yield made


def shims(d: Daemon) -> set[int]:
    """Holders: shims whose parent is none."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if line.startswith(b"containerd-shim-boxship-v1") and str(d.folder).encode() in line:
                found[int(entry.name)] = parent
    return {pid for pid, parent in found.items() if parent not in found}


async def begin(d: Daemon) -> None:
    record = pb.types.Sandbox(sandbox_id="pod", sandboxer="shim")
    record.runtime.name = RUNTIME
    async with connect(d.socket) as containerd:
        await containerd.sandbox_store.Create(s.StoreCreateRequest(sandbox=record), CALL)
        await containerd.sandbox_controller.Create(s.ControllerCreateRequest(sandbox=record, **POD), CALL)
        started = await containerd.sandbox_controller.Start(s.ControllerStartRequest(**POD), CALL)
        assert shims(d) == {started.pid}
        assert started.version == 3
        for name in ("one", "two"):
            config = default_spec()
            config["process"].update(args=["sleep", "1000"], terminal=False)  # type: ignore[attr-defined]
            config["root"] = {"path": "rootfs"}
            config["linux"]["cgroupsPath"] = f"/{d.folder.name}/{name}"  # type: ignore[index]
            container = pb.containers.Container(id=name, sandbox="pod")
            container.runtime.name = RUNTIME
            container.spec.type_url, container.spec.value = SPEC, json.dumps(config).encode()
            await containerd.containers.Create(pb.containers.CreateContainerRequest(container=container), CALL)
            mount = pb.types.Mount(type="bind", source=str(d.folder / name), options=["rbind", "rw"])
            await containerd.tasks.Create(pb.tasks.CreateTaskRequest(container_id=name, rootfs=[mount]), CALL)
            await containerd.tasks.Start(pb.tasks.StartRequest(container_id=name), CALL)
        assert shims(d) == {started.pid}


async def end(d: Daemon) -> None:
    async with connect(d.socket) as containerd:
        status = await containerd.sandbox_controller.Status(s.ControllerStatusRequest(verbose=True, **POD), CALL)
        assert (status.state, dict(status.info)) == ("SANDBOX_READY", {"one": "running", "two": "running"})
        [pid] = shims(d)
        assert status.pid == pid
        await containerd.tasks.Kill(pb.tasks.KillRequest(container_id="one", signal=signal.SIGKILL), CALL)
        assert (await containerd.tasks.Wait(pb.tasks.WaitRequest(container_id="one"), CALL)).exit_status == 137
        await containerd.tasks.Delete(pb.tasks.DeleteTaskRequest(container_id="one"), CALL)
        assert shims(d) == {pid}, "the pod ended with one of its containers"
        waiting = asyncio.ensure_future(containerd.sandbox_controller.Wait(s.ControllerWaitRequest(**POD), CALL))
        await containerd.sandbox_controller.Stop(s.ControllerStopRequest(**POD), CALL)
        await asyncio.wait_for(waiting, 20)
        assert (await containerd.tasks.Wait(pb.tasks.WaitRequest(container_id="two"), CALL)).exit_status == 137
        await containerd.tasks.Delete(pb.tasks.DeleteTaskRequest(container_id="two"), CALL)
        await containerd.sandbox_controller.Shutdown(s.ControllerShutdownRequest(**POD), CALL)
        with pytest.raises(NotFound):
            await containerd.sandbox_controller.Shutdown(s.ControllerShutdownRequest(**POD), CALL)


def test_a_pod_has_one_shim_and_outlives_the_daemon(d: Daemon) -> None:
    for name in ("one", "two"):
        image.unpack(d.folder / name)
    d.start()
    asyncio.run(begin(d))
    d.stop(signal.SIGKILL)
    d.start()
    asyncio.run(end(d))
    assert d.stop() == 0
    assert shims(d) == set()
    assert list((d.state / "io.containerd.runtime.v2.task" / "pods").iterdir()) == []
    groups = [*Path("/sys/fs/cgroup").glob(f"*/{d.folder.name}"), *Path("/sys/fs/cgroup").glob(d.folder.name)]
    for group in groups:
        group.rmdir()
