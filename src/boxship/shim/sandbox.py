"""The sandbox service: a shim that holds a whole pod, from before its first container to after its last.

Runs in: a worker of the shim, single-threaded, nothing here waits.
Spec: containerd.runtime.sandbox.v1. The sandbox is the shim itself: no container stands for it, and its process is the shim's.

    CreateSandbox → StartSandbox → containers, by the task service → StopSandbox (what runs is killed) → ShutdownSandbox
"""

from __future__ import annotations

import os
import time

from boxship.api.task import pb
from boxship.kit.errors import AlreadyExists, FailedPrecondition, NotFound, Unsupported
from boxship.kit.loop import Later
from boxship.shim.service import answering

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from boxship.shim.service import TaskService

    Step = Generator[Later, object, Any]

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


class SandboxService:
    """The service of one shim, which holds one sandbox or none."""

    def __init__(self, tasks: TaskService) -> None:
        self._tasks = tasks
        self._id = ""
        self._created_at = 0
        self._started = False
        self._exited_at = 0
        self._ended = Later()

    def find(self, name: str) -> Callable[[Any], Later]:
        """The function for a method of the service. For `boxship.api.ttrpc.server`."""
        return answering(getattr(self, name.lower()))

    def is_held(self) -> bool:
        """Whether the shim lives for a sandbox, also without containers."""
        return bool(self._id)

    def pack(self) -> list[object]:
        """For `unpack`, in the next worker."""
        return [self._id, self._created_at, self._started, self._exited_at]

    def unpack(self, packed: list[Any]) -> None:
        """Undo `pack`, with a fresh one."""
        self._id, self._created_at, self._started, self._exited_at = packed
        if self._exited_at:
            self._ended.set()

    def _check(self, request: Any) -> None:
        if not self._id or request.sandbox_id != self._id:
            raise NotFound(f"sandbox {request.sandbox_id}: not found")

    def createsandbox(self, request: Any) -> Any:
        """Be the sandbox's shim. Raises AlreadyExists."""
        if self._id:
            raise AlreadyExists(f"sandbox {self._id}: already exists")
        self._id, self._created_at = request.sandbox_id, time.time_ns()
        return pb.sandbox.CreateSandboxResponse()

    def startsandbox(self, request: Any) -> Any:
        """Take containers from now on."""
        self._check(request)
        if self._exited_at:
            raise FailedPrecondition(f"sandbox {self._id} was stopped: failed precondition")
        self._started = True
        response = pb.sandbox.StartSandboxResponse(pid=os.getppid())
        response.created_at.FromNanoseconds(self._created_at)
        return response

    def platform(self, request: Any) -> Any:
        """The machine's own."""
        self._check(request)
        machine = os.uname().machine
        architecture = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)
        return pb.sandbox.PlatformResponse(platform=pb.types.Platform(os="linux", architecture=architecture))

    def stopsandbox(self, request: Any) -> Step:
        """Kill what runs, and wait for its end. A sandbox that was stopped stays so."""
        self._check(request)
        yield from self._tasks.kill_all()
        self._stopped()
        return pb.sandbox.StopSandboxResponse()

    def _stopped(self) -> None:
        if not self._exited_at:
            self._exited_at = time.time_ns()
            self._ended.set()

    def waitsandbox(self, request: Any) -> Step:
        """Wait until it is stopped."""
        self._check(request)
        yield self._ended
        response = pb.sandbox.WaitSandboxResponse()
        response.exited_at.FromNanoseconds(self._exited_at)
        return response

    def sandboxstatus(self, request: Any) -> Any:
        """Its state and, `verbose`, its containers'."""
        self._check(request)
        running = self._started and not self._exited_at
        response = pb.sandbox.SandboxStatusResponse(sandbox_id=self._id, pid=os.getppid(), state=READY if running else NOT_READY)
        response.created_at.FromNanoseconds(self._created_at)
        if self._exited_at:
            response.exited_at.FromNanoseconds(self._exited_at)
        if request.verbose:
            for container in self._tasks.containers.values():
                response.info[container.id] = pb.types.Status.Name(container.status_of(container.init)).lower()
        return response

    def pingsandbox(self, request: Any) -> Any:
        """Say that it is there."""
        self._check(request)
        return pb.sandbox.PingResponse()

    def sandboxmetrics(self, request: Any) -> Any:
        """Raises Unsupported: the sandbox is no control group; its containers have their figures."""
        self._check(request)
        raise Unsupported("a sandbox without a container of its own has no metrics: not implemented")

    def shutdownsandbox(self, request: Any) -> Step:
        """End: containers that are left are removed, and then the shim goes."""
        self._check(request)
        yield from self._tasks.remove_all()
        self._stopped()
        self._id = ""
        self._tasks.leave()
        return pb.sandbox.ShutdownSandboxResponse()
