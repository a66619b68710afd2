"""Sandboxes in a shim that holds them: the controller's side of the shim's sandbox service, over a socket, with a daemon that comes back.

The shim is a stand-in that keeps the protocol; our own shim's side is tested in tests/integration/shim/test_sandbox.py.
"""

import asyncio
import shutil
import uuid
from pathlib import Path

import pytest

from boxship.api.any import SPEC
from boxship.api.containerd import pb, ttrpc
from boxship.api.containerd.call import Call
from boxship.api.containerd.server import as_error
from boxship.api.containerd.services import methods_of
from boxship.api.task import pb as shim_pb
from boxship.containerd.sandboxes import Controller
from boxship.containerd.tasks.launch import Endpoint
from boxship.kit.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from support.tasks import Daemon

s, m = pb.sandbox, shim_pb.sandbox
CALL = Call("ns")
ASK = {"sandbox_id": "pod", "sandboxer": "shim"}


class Shim:
    """A shim's sandbox service, and the launcher that starts it."""

    def __init__(self, folder):
        self.path = str(folder / "shim.sock")
        self.ended = asyncio.Event()
        self.calls = []
        self.connections = set()
        self.as_error = as_error
        self.server = None
        service = shim_pb.sandbox.DESCRIPTOR.services_by_name["Sandbox"]
        self.methods = {(service.full_name, method.name): (getattr(self, method.name), method)
                        for method in methods_of(service) if hasattr(self, method.name)}

    def find(self, service, method):
        if (service, method) not in self.methods:
            raise Unsupported(f"service {service}")
        return self.methods[service, method]

    async def start(self, launch):
        self.bundle = launch.bundle.path
        self.server = await asyncio.get_running_loop().create_unix_server(lambda: ttrpc._Served(self), self.path)
        return Endpoint(f"unix://{self.path}", 3)

    async def delete(self, launch):
        return shim_pb.task.DeleteResponse(exit_status=137)

    def die(self):
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()

    async def CreateSandbox(self, request, call):
        self.calls.append((call.namespace, request.sandbox_id, request.bundle_path, request.netns_path))
        if request.netns_path == "bad":
            raise InvalidArgument("no such namespace")
        return m.CreateSandboxResponse()

    async def StartSandbox(self, request, call):
        return m.StartSandboxResponse(pid=42)

    async def Platform(self, request, call):
        return m.PlatformResponse(platform=pb.types.Platform(os="linux", architecture="amd64"))

    async def SandboxStatus(self, request, call):
        return m.SandboxStatusResponse(sandbox_id=request.sandbox_id, pid=42, state="SANDBOX_READY")

    async def StopSandbox(self, request, call):
        self.ended.set()
        return m.StopSandboxResponse()

    async def WaitSandbox(self, request, call):
        await self.ended.wait()
        return m.WaitSandboxResponse(exit_status=3)

    async def ShutdownSandbox(self, request, call):
        asyncio.get_running_loop().call_soon(self.die)
        return m.ShutdownSandboxResponse()


@pytest.fixture
def folder():
    path = Path("/tmp") / f"bs-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def created(**more):
    request = s.ControllerCreateRequest(**ASK, **more)
    request.sandbox.sandbox_id = "pod"
    request.sandbox.runtime.name = "io.containerd.some.v1"
    request.sandbox.spec.type_url, request.sandbox.spec.value = SPEC, b'{"ociVersion": "1.0.2"}'
    return request


def opened(daemon, shim):
    daemon.shims._launcher_for = lambda runtime: shim
    return Controller(daemon.shims, daemon.exchange)


def bundles(folder):
    return list((folder / "state/io.containerd.runtime.v2.task/ns").iterdir())


def test_a_sandbox_lives_is_found_again_and_ends(folder):
    async def run():
        shim = Shim(folder)
        async with Daemon(folder) as daemon:
            controller = opened(daemon, shim)
            await controller.Create(created(netns_path="/n"), CALL)
            assert shim.calls == [("ns", "pod", shim.bundle, "/n")]
            assert Path(shim.bundle, "config.json").read_bytes() == b'{"ociVersion": "1.0.2"}'
            with pytest.raises(AlreadyExists):
                await controller.Create(created(), CALL)
            started = await controller.Start(s.ControllerStartRequest(**ASK), CALL)
            assert (started.pid, started.address, started.version) == (42, f"ttrpc+unix://{shim.path}", 3)
            platform = await controller.Platform(s.ControllerPlatformRequest(**ASK), CALL)
            assert platform.platform.architecture == "amd64"
            with pytest.raises(Unsupported):
                await controller.Metrics(s.ControllerMetricsRequest(**ASK), CALL)
            assert daemon.topics() == ["/sandboxes/create", "/sandboxes/start"]
        async with Daemon(folder) as daemon:
            controller = opened(daemon, shim)
            assert (await controller.Status(s.ControllerStatusRequest(**ASK), CALL)).state == "SANDBOX_READY"
            waiting = asyncio.ensure_future(controller.Wait(s.ControllerWaitRequest(**ASK), CALL))
            await asyncio.sleep(0.05)
            await controller.Stop(s.ControllerStopRequest(**ASK), CALL)
            assert (await asyncio.wait_for(waiting, 10)).exit_status == 3
            await controller.Shutdown(s.ControllerShutdownRequest(**ASK), CALL)
            assert (await controller.Status(s.ControllerStatusRequest(**ASK), CALL)).exited_at.seconds > 0
            await controller.Stop(s.ControllerStopRequest(**ASK), CALL)
            with pytest.raises(NotFound):
                await controller.Shutdown(s.ControllerShutdownRequest(**ASK), CALL)

    asyncio.run(run())
    assert bundles(folder) == []


def test_a_shim_that_dies_ends_the_wait(folder):
    async def run():
        shim = Shim(folder)
        async with Daemon(folder) as daemon:
            controller = opened(daemon, shim)
            await controller.Create(created(), CALL)
            waiting = asyncio.ensure_future(controller.Wait(s.ControllerWaitRequest(**ASK), CALL))
            await asyncio.sleep(0.05)
            shim.die()
            assert (await asyncio.wait_for(waiting, 10)).exit_status == 137

    asyncio.run(run())
    assert bundles(folder) == []


def test_what_cannot_be_is_refused_and_leaves_nothing(folder):
    async def run():
        async with Daemon(folder) as daemon:
            controller = opened(daemon, Shim(folder))
            with pytest.raises(InvalidArgument, match="name can not be empty"):
                await controller.Status(s.ControllerStatusRequest(sandbox_id="pod"), CALL)
            with pytest.raises(NotFound, match="podsandbox"):
                await controller.Start(s.ControllerStartRequest(sandbox_id="pod", sandboxer="podsandbox"), CALL)
            with pytest.raises(InvalidArgument, match="no runtime"):
                await controller.Create(s.ControllerCreateRequest(**ASK), CALL)
            with pytest.raises(InvalidArgument, match="failed to create sandbox pod: no such namespace"):
                await controller.Create(created(netns_path="bad"), CALL)

    asyncio.run(run())
    assert bundles(folder) == []
