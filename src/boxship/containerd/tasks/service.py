"""The tasks service: running containers, each reached through its shim.

Runs in: the daemon, on its event loop.
Spec: containerd.services.tasks.v1. Methods take the namespace of the call and raise NotFound for a task that is not there.
Not here: the records of containers (the containers service), which a task is made from.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Awaitable
from typing import Any, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from boxship.api.any import unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call, check_identifier
from boxship.api.containerd.services import Containerd
from boxship.api.task import pb as shim_pb
from boxship.containerd.filters import parse_all
from boxship.containerd.tasks.launch import Endpoint
from boxship.containerd.tasks.shims import Shim, Shims
from boxship.images.service import ServiceBlobs
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, Unavailable, Unsupported

log = logging.getLogger("boxship.tasks")

STATE_TIMEOUT_S = 2.0
CHECKPOINT = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CHECKPOINT_CONFIG = "application/vnd.containerd.container.checkpoint.config.v1+proto"
T = TypeVar("T")


class Tasks:
    """containerd.services.tasks.v1.Tasks."""

    def __init__(self, services: Containerd, shims: Shims) -> None:
        """`services` gives records of containers, sandboxes and content; `shims` is where tasks live."""
        self._services = services
        self._shims = shims

    # --- life

    async def Create(self, request: Any, call: Call) -> Any:
        """Start a shim and create the container in it. Raises NotFound without a record, AlreadyExists with a task."""
        return await self._whole(self._create(request, call))

    async def _create(self, request: Any, call: Call) -> Any:
        namespace = call.required_namespace()
        container = await self._container(request.container_id, call)
        options = request.options if request.options.value else container.runtime.options
        address, version = request.task_api_address, request.task_api_version
        join = await self._sandbox_endpoint(container.sandbox, address, version, call) if container.sandbox else None
        shim = await self._shims.start(
            namespace, request.container_id, container.spec.value or None, request.runtime_path or container.runtime.name,
            options if options.type_url else None, join, container.sandbox)
        try:
            create = shim_pb.task.CreateTaskRequest(
                id=request.container_id, bundle=shim.bundle.path, rootfs=request.rootfs, terminal=request.terminal,
                stdin=request.stdin, stdout=request.stdout, stderr=request.stderr,
                checkpoint=await self._restored(request, shim.bundle.file("checkpoint"), call))
            if options.type_url:
                create.options.CopyFrom(options)
            created = await shim.call("Create", create)
        except BaseException as error:
            await self._shims.abandon(shim)
            if isinstance(error, BoxshipError):
                raise type(error)(f"failed to create shim task: {error}") from None
            raise
        return pb.tasks.CreateTaskResponse(container_id=request.container_id, pid=created.pid)

    async def Start(self, request: Any, call: Call) -> Any:
        """Start the container's process or an added one; the answer has its pid."""
        shim = self._task(request, call)
        started = await shim.call("Start", shim_pb.task.StartRequest(id=request.container_id, exec_id=request.exec_id))
        return pb.tasks.StartResponse(pid=started.pid)

    async def Delete(self, request: Any, call: Call) -> Any:
        """Delete a stopped container, and its shim with the last one; the answer has the exit status."""
        return await self._whole(self._delete(request, call))

    async def _delete(self, request: Any, call: Call) -> Any:
        await self._container(request.container_id, call)
        shim = self._task(request, call)
        try:
            exited = await shim.call("Delete", shim_pb.task.DeleteRequest(id=request.container_id))
        except NotFound:
            # The shim lives and has no such container: what is left is ours.
            await self._shims.remove(shim)
            raise
        except Unavailable:
            # It died: what its clean-up found out is the answer.
            exited = await asyncio.wait_for(asyncio.shield(shim.exit), 30)
        else:
            await self._shims.remove(shim)
        return pb.tasks.DeleteResponse(
            id=request.container_id, pid=exited.pid, exit_status=exited.exit_status, exited_at=exited.exited_at)

    async def DeleteProcess(self, request: Any, call: Call) -> Any:
        """Forget an added process that has ended; the answer has its exit status."""
        shim = self._task(request, call)
        exited = await shim.call("Delete", shim_pb.task.DeleteRequest(id=request.container_id, exec_id=request.exec_id))
        return pb.tasks.DeleteResponse(
            id=request.exec_id, pid=exited.pid, exit_status=exited.exit_status, exited_at=exited.exited_at)

    async def Exec(self, request: Any, call: Call) -> Empty:
        """Add a process, which Start starts. Raises InvalidArgument, AlreadyExists."""
        if not request.exec_id:
            raise InvalidArgument("exec id cannot be empty")
        check_identifier(request.exec_id)
        shim = self._task(request, call)
        await shim.call("Exec", shim_pb.task.ExecProcessRequest(
            id=request.container_id, exec_id=request.exec_id, terminal=request.terminal,
            stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, spec=request.spec))
        return Empty()

    async def Kill(self, request: Any, call: Call) -> Empty:
        """Send a signal to the process, or to all of the container."""
        shim = self._task(request, call)
        await shim.call("Kill", shim_pb.task.KillRequest(
            id=request.container_id, exec_id=request.exec_id, signal=request.signal, all=request.all))
        return Empty()

    async def Wait(self, request: Any, call: Call) -> Any:
        """Wait until the process has ended. The exit is told also when the shim died meanwhile."""
        shim = self._task(request, call)
        exited = await self._shims.unless_leaving(self._exit(shim, request))
        return pb.tasks.WaitResponse(exit_status=exited.exit_status, exited_at=exited.exited_at)

    async def _exit(self, shim: Shim, request: Any) -> Any:
        try:
            return await shim.call("Wait", shim_pb.task.WaitRequest(id=request.container_id, exec_id=request.exec_id))
        except Unavailable:
            if self._shims.closing:
                raise
            return await asyncio.shield(shim.exit)

    async def Pause(self, request: Any, call: Call) -> Empty:
        """Freeze the container."""
        await self._task(request, call).call("Pause", shim_pb.task.PauseRequest(id=request.container_id))
        return Empty()

    async def Resume(self, request: Any, call: Call) -> Empty:
        """Let it go on."""
        await self._task(request, call).call("Resume", shim_pb.task.ResumeRequest(id=request.container_id))
        return Empty()

    async def Update(self, request: Any, call: Call) -> Empty:
        """Change the limits of resources."""
        await self._task(request, call).call("Update", shim_pb.task.UpdateTaskRequest(
            id=request.container_id, resources=request.resources, annotations=dict(request.annotations)))
        return Empty()

    # --- stdio

    async def ResizePty(self, request: Any, call: Call) -> Empty:
        """Change the size of the terminal."""
        await self._task(request, call).call("ResizePty", shim_pb.task.ResizePtyRequest(
            id=request.container_id, exec_id=request.exec_id, width=request.width, height=request.height))
        return Empty()

    async def CloseIO(self, request: Any, call: Call) -> Empty:
        """With `stdin`: the process reads the end of its input."""
        shim = self._task(request, call)
        if request.stdin:
            await shim.call("CloseIO", shim_pb.task.CloseIORequest(id=request.container_id, exec_id=request.exec_id, stdin=True))
        return Empty()

    # --- looking

    async def Get(self, request: Any, call: Call) -> Any:
        """State of the container's process, or of an added one."""
        shim = self._task(request, call)
        return pb.tasks.GetResponse(process=await self._process(shim, request.exec_id))

    async def List(self, request: Any, call: Call) -> Any:
        """State of all tasks of the namespace; one whose shim does not answer in time is left out."""
        shims = self._shims.all(call.required_namespace())
        states = await asyncio.gather(*(self._process(shim, "") for shim in shims), return_exceptions=True)
        response = pb.tasks.ListTasksResponse()
        for shim, state in zip(shims, states, strict=True):
            if not isinstance(state, BaseException):
                response.tasks.append(state)
            elif not isinstance(state, BoxshipError):
                raise state
            elif not isinstance(state, NotFound):
                log.error("state of %s: %s", shim.bundle.id, state)
        return response

    async def ListPids(self, request: Any, call: Call) -> Any:
        """Processes of the container."""
        found = await self._task(request, call).call("Pids", shim_pb.task.PidsRequest(id=request.container_id))
        return pb.tasks.ListPidsResponse(processes=found.processes)

    async def Metrics(self, request: Any, call: Call) -> Any:
        """Figures of the tasks of the namespace that pass one of the filters (`id`, `namespace`)."""
        accept = parse_all(request.filters)
        response = pb.tasks.MetricsResponse()
        shims = [
            shim for shim in self._shims.all(call.required_namespace())
            if accept(lambda path, shim=shim: {"id": shim.bundle.id, "namespace": shim.bundle.namespace}.get(path[0]))  # type: ignore[misc]
        ]
        requests = (shim.call("Stats", shim_pb.task.StatsRequest(id=shim.bundle.id), STATE_TIMEOUT_S) for shim in shims)
        for shim, stats in zip(shims, await asyncio.gather(*requests, return_exceptions=True), strict=True):
            if isinstance(stats, BoxshipError):
                if not isinstance(stats, NotFound):
                    log.error("metrics of %s: %s", shim.bundle.id, stats)
            elif isinstance(stats, BaseException):
                raise stats
            else:
                metric = response.metrics.add(id=shim.bundle.id, data=stats.stats)
                metric.timestamp.GetCurrentTime()
        return response

    # --- checkpoint and restore

    async def Checkpoint(self, request: Any, call: Call) -> Any:
        """Write the state of the processes: to the folder that the options name, or to the content store."""
        container = await self._container(request.container_id, call)
        shim = self._task(request, call)
        options = unpack(request.options) if request.options.type_url else None
        path = getattr(options, "image_path", "")
        if path:
            await self._checkpoint(shim, path, request.options)
            return pb.tasks.CheckpointTaskResponse()
        scratch = tempfile.mkdtemp(prefix="boxship-checkpoint-")
        try:
            image = os.path.join(scratch, "image")
            os.mkdir(image, 0o700)
            await self._checkpoint(shim, image, request.options)
            archive = os.path.join(scratch, "image.tar")
            await asyncio.to_thread(_pack, image, archive)
            with open(archive, "rb") as file:
                criu = await self._store(call, CHECKPOINT, f"checkpoint-{request.container_id}-{os.path.basename(scratch)}", file)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        config = tempfile.TemporaryFile()
        with config:
            config.write(container.spec.SerializeToString())
            config.seek(0)
            spec = await self._store(call, CHECKPOINT_CONFIG, f"checkpoint-spec-{os.path.basename(scratch)}", config)
        return pb.tasks.CheckpointTaskResponse(descriptors=[criu, spec])

    async def _checkpoint(self, shim: Shim, path: str, options: AnyMessage) -> None:
        request = shim_pb.task.CheckpointTaskRequest(id=shim.bundle.id, path=path)
        if options.type_url:
            request.options.CopyFrom(options)
        await shim.call("Checkpoint", request)

    async def _store(self, call: Call, media_type: str, ref: str, file: Any) -> Any:
        blobs = ServiceBlobs(self._services.content, call)
        size = os.fstat(file.fileno()).st_size
        async with await blobs.writer(ref, size) as writer:
            while chunk := file.read(1 << 20):
                await writer.write(chunk)
            digest = await writer.commit(size)
        return pb.types.Descriptor(media_type=media_type, digest=digest, size=size)

    async def _restored(self, request: Any, folder: str, call: Call) -> str:
        """The folder of the checkpoint to start from, "" for none; one of the content store is unpacked into `folder`.

        The runtime reads it when the task is started, so it goes with the bundle.
        """
        options = unpack(request.options) if request.options.type_url else None
        path = getattr(options, "criu_image_path", "")
        if path or not request.HasField("checkpoint"):
            return str(path)
        given = request.checkpoint
        if given.media_type != CHECKPOINT:
            raise InvalidArgument(f'unsupported checkpoint type "{given.media_type}"')
        os.mkdir(folder, 0o700)
        archive = folder + ".tar"
        with open(archive, "wb") as file:
            async for chunk in ServiceBlobs(self._services.content, call).stream(given.digest):
                file.write(chunk)
        await asyncio.to_thread(_unpack, archive, folder)
        os.unlink(archive)
        return folder

    # --- within

    async def _whole(self, work: Awaitable[T]) -> T:
        """Do `work` to its end also when the caller goes away: half a container is nobody's."""
        return await asyncio.shield(asyncio.ensure_future(work))

    async def _container(self, id: str, call: Call) -> Any:  # noqa: A002 - the standard's word
        response = await self._services.containers.Get(pb.containers.GetContainerRequest(id=id), call)
        return response.container

    def _task(self, request: Any, call: Call) -> Shim:
        return self._shims.get(call.required_namespace(), request.container_id)

    async def _process(self, shim: Shim, exec_id: str) -> Any:
        state = await shim.call("State", shim_pb.task.StateRequest(id=shim.bundle.id, exec_id=exec_id), STATE_TIMEOUT_S)
        return pb.types.Process(
            id=exec_id or shim.bundle.id, pid=state.pid, status=state.status, stdin=state.stdin, stdout=state.stdout,
            stderr=state.stderr, terminal=state.terminal, exit_status=state.exit_status, exited_at=state.exited_at)

    async def _sandbox_endpoint(self, sandbox: str, address: str, version: int, call: Call) -> Endpoint | None:
        """Where the shim of the container's sandbox listens, None for one that holds no pods by itself."""
        try:
            await self._services.sandbox_store.Get(pb.sandbox.StoreGetRequest(sandbox_id=sandbox), call)
        except (NotFound, Unsupported):
            return None
        if address:
            protocol, plus, rest = address.partition("+")
            if not plus:
                raise InvalidArgument("the scheme of sandbox address should be in  the form of <protocol>+<unix|vsock|tcp>, "
                                      "i.e. ttrpc+unix or grpc+vsock")
            found = Endpoint(rest, version, protocol)
        else:
            shim = self._shims.get(call.namespace, sandbox)
            found = Endpoint(shim.endpoint.address, shim.endpoint.version, shim.endpoint.protocol)
        return found if found.version >= 3 else None


def _pack(folder: str, archive: str) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(folder, arcname=".")


def _unpack(archive: str, folder: str) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
