"""The sandbox controller: pods that a shim holds whole, through the shim's sandbox service.

Runs in: the daemon, on its event loop.
Spec: containerd.services.sandbox.v1.Controller, sandboxer `shim`. The records of sandboxes are the store's.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from boxship.api.any import SPEC
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.task import pb as shim_pb
from boxship.containerd.events import Exchange
from boxship.containerd.tasks.shims import Shim, Shims
from boxship.kit.errors import AlreadyExists, BoxshipError, InvalidArgument, NotFound, Unavailable

SANDBOXER = "shim"
messages = shim_pb.sandbox
answers = pb.sandbox


class Controller:
    """containerd.services.sandbox.v1.Controller."""

    def __init__(self, shims: Shims, exchange: Exchange) -> None:
        self._shims = shims
        self._exchange = exchange

    async def Create(self, request: Any, call: Call) -> Any:
        """Start the sandbox's shim and let it make the sandbox. Raises AlreadyExists, InvalidArgument, NotFound."""
        namespace = self._namespace(request, call)
        name = request.sandbox_id or request.sandbox.sandbox_id
        if not name:
            raise InvalidArgument("sandbox id must not be empty: invalid argument")
        record = request.sandbox
        if not record.runtime.name:
            raise InvalidArgument("sandbox has no runtime: invalid argument")
        try:
            self._shims.get(namespace, name)
        except NotFound:
            pass
        else:
            raise AlreadyExists(f"sandbox {name} already running: already exists")
        options = record.runtime.options if record.runtime.options.type_url else None
        config = record.spec.value if record.spec.type_url in ("", SPEC) else b""
        shim = await self._shims.start(namespace, name, config or None, record.runtime.name, options, host=SANDBOXER)
        create = messages.CreateSandboxRequest(
            sandbox_id=name, bundle_path=shim.bundle.path, rootfs=request.rootfs, netns_path=request.netns_path,
            annotations=dict(request.annotations))
        if request.options.type_url:
            create.options.CopyFrom(request.options)
        try:
            await shim.sandbox("CreateSandbox", create, messages.CreateSandboxResponse)
        except BoxshipError as error:
            await self._end(shim)
            raise type(error)(f"failed to create sandbox {name}: {error}") from None
        self._exchange.publish(namespace, "/sandboxes/create", pb.sandbox_events.SandboxCreate(sandbox_id=name))
        return answers.ControllerCreateResponse(sandbox_id=name)

    async def Start(self, request: Any, call: Call) -> Any:
        """Start the sandbox; the answer tells where its shim takes containers. A sandbox that does not start is ended."""
        shim = self._shim(request, call)
        started = messages.StartSandboxRequest(sandbox_id=request.sandbox_id)
        try:
            answer = await shim.sandbox("StartSandbox", started, messages.StartSandboxResponse)
        except BoxshipError as error:
            await self._end(shim)
            raise type(error)(f'failed to start sandbox "{request.sandbox_id}": {error}') from None
        self._exchange.publish(call.namespace, "/sandboxes/start", pb.sandbox_events.SandboxStart(sandbox_id=request.sandbox_id))
        response = answers.ControllerStartResponse(
            sandbox_id=request.sandbox_id, pid=answer.pid, created_at=answer.created_at, **_endpoint(shim))
        if answer.HasField("spec"):
            response.spec.CopyFrom(answer.spec)
        return response

    async def Platform(self, request: Any, call: Call) -> Any:
        """What the sandbox's containers are to be built for."""
        answer = await self._shim(request, call).sandbox(
            "Platform", messages.PlatformRequest(sandbox_id=request.sandbox_id), messages.PlatformResponse)
        return answers.ControllerPlatformResponse(platform=answer.platform)

    async def Stop(self, request: Any, call: Call) -> Any:
        """Stop the sandbox; one that is not there is stopped."""
        try:
            await self._shim(request, call).sandbox(
                "StopSandbox", messages.StopSandboxRequest(sandbox_id=request.sandbox_id, timeout_secs=request.timeout_secs),
                messages.StopSandboxResponse)
        except (NotFound, Unavailable):
            pass
        return answers.ControllerStopResponse()

    async def Wait(self, request: Any, call: Call) -> Any:
        """Wait until the sandbox has ended, also by the death of its shim."""
        answer = await self._shims.unless_leaving(self._exit(self._shim(request, call)))
        self._exchange.publish(call.namespace, "/sandboxes/exit", pb.sandbox_events.SandboxExit(
            sandbox_id=request.sandbox_id, exit_status=answer.exit_status, exited_at=answer.exited_at))
        return answers.ControllerWaitResponse(exit_status=answer.exit_status, exited_at=answer.exited_at)

    async def _exit(self, shim: Shim) -> Any:
        request = messages.WaitSandboxRequest(sandbox_id=shim.bundle.id)
        try:
            return await shim.sandbox("WaitSandbox", request, messages.WaitSandboxResponse)
        except Unavailable:
            if self._shims.closing:
                raise
            return await asyncio.shield(shim.exit)

    async def Status(self, request: Any, call: Call) -> Any:
        """State of the sandbox; one whose shim is gone has exited."""
        try:
            shim = self._shim(request, call)
        except NotFound:
            gone = answers.ControllerStatusResponse(sandbox_id=request.sandbox_id)
            gone.exited_at.FromNanoseconds(time.time_ns())
            return gone
        answer = await shim.sandbox(
            "SandboxStatus", messages.SandboxStatusRequest(sandbox_id=request.sandbox_id, verbose=request.verbose),
            messages.SandboxStatusResponse)
        return answers.ControllerStatusResponse(
            sandbox_id=answer.sandbox_id or request.sandbox_id, pid=answer.pid, state=answer.state, info=dict(answer.info),
            created_at=answer.created_at, exited_at=answer.exited_at, extra=answer.extra, **_endpoint(shim))

    async def Shutdown(self, request: Any, call: Call) -> Any:
        """End the sandbox and its shim, and remove its bundle. Raises NotFound."""
        await self._end(self._shim(request, call))
        return answers.ControllerShutdownResponse()

    async def Metrics(self, request: Any, call: Call) -> Any:
        """Figures of the sandbox."""
        answer = await self._shim(request, call).sandbox(
            "SandboxMetrics", messages.SandboxMetricsRequest(sandbox_id=request.sandbox_id), messages.SandboxMetricsResponse)
        return answers.ControllerMetricsResponse(metrics=answer.metrics)

    async def Update(self, request: Any, call: Call) -> Any:
        """Nothing of a sandbox that a shim holds can be changed while it runs; the record is the store's."""
        self._shim(request, call)
        return answers.ControllerUpdateResponse()

    async def _end(self, shim: Shim) -> None:
        try:
            request = messages.ShutdownSandboxRequest(sandbox_id=shim.bundle.id)
            await shim.sandbox("ShutdownSandbox", request, messages.ShutdownSandboxResponse)
        except Unavailable:
            pass  # it went before it answered
        finally:
            await self._shims.remove(shim, shutdown=False)

    def _namespace(self, request: Any, call: Call) -> str:
        if not request.sandboxer:
            raise InvalidArgument("sandbox controller name can not be empty: invalid argument")
        if request.sandboxer != SANDBOXER:
            raise NotFound(f"failed to get sandbox controller by {request.sandboxer}: not found")
        return call.required_namespace()

    def _shim(self, request: Any, call: Call) -> Shim:
        return self._shims.get(self._namespace(request, call), request.sandbox_id)


def _endpoint(shim: Shim) -> dict[str, Any]:
    return {"address": f"{shim.endpoint.protocol}+{shim.endpoint.address}", "version": shim.endpoint.version}
