"""The tasks service with everything around it that it needs, and records of containers that are just kept in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from boxship.api.any import SPEC, pack
from boxship.api.containerd import pb, ttrpc
from boxship.api.containerd.call import Call
from boxship.api.containerd.server import as_error
from boxship.api.containerd.services import Containerd
from boxship.containerd.events import Exchange, TtrpcEvents
from boxship.containerd.tasks.launch import Programs
from boxship.containerd.tasks.service import Tasks
from boxship.containerd.tasks.shims import Shims
from boxship.kit.errors import NotFound


class Containers:
    """Records of containers in memory: what Tasks asks the containers service for."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Any] = {}

    async def Get(self, request: Any, call: Call) -> Any:
        found = self.records.get((call.namespace, request.id))
        if found is None:
            raise NotFound(f'container "{request.id}" in namespace "{call.namespace}": not found')
        return pb.containers.GetContainerResponse(container=found)


def specification(root: Path, args: list[str], cgroup: str, **linux: Any) -> dict[str, Any]:
    """A configuration that runs `args` of the root file system at `root`."""
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": str(root), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
                  "cgroupsPath": cgroup, **linux},
    }


class Daemon:
    """As much of the daemon as tasks need. `async with`; leaving it is its end, shims live on."""

    def __init__(self, folder: Path, containers: Containers | None = None) -> None:
        self.root, self.state = str(folder / "root"), str(folder / "state")
        self.containers = containers or Containers()
        self.exchange = Exchange()
        self.events = self.exchange.subscribe()
        self.address = os.path.join(self.state, "containerd.sock")

    async def __aenter__(self) -> Daemon:
        os.makedirs(self.root, exist_ok=True)
        os.makedirs(self.state, exist_ok=True)
        self.server = ttrpc.Server(Containerd({"ttrpc_events": TtrpcEvents(self.exchange)}), ["ttrpc_events"], as_error)
        await self.server.listen(self.address + ".ttrpc")
        programs = Programs(self.address, self.address + ".ttrpc", "/bin/true")
        services = Containerd({"containers": self.containers})

        async def runtime_of(namespace: str, name: str) -> str:
            response = await self.containers.Get(pb.containers.GetContainerRequest(id=name), Call(namespace))
            return str(response.container.runtime.name)

        self.shims = Shims(self.root, self.state, self.exchange, lambda runtime: programs, runtime_of)
        self.tasks = Tasks(services, self.shims)
        await self.shims.load()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.shims.close()
        await self.server.stop()

    def record(self, name: str, spec: dict[str, Any], namespace: str = "ns", runtime: str = "io.containerd.runc.v2",
               **options: Any) -> None:
        """Keep a container; its runtime keeps its state below the folder of the test."""
        container = pb.containers.Container(id=name, spec=AnyMessage(type_url=SPEC, value=json.dumps(spec).encode()))
        container.runtime.name = runtime
        container.runtime.options.CopyFrom(pack(pb.runc_options.Options(root=os.path.join(self.state, "runc"), **options)))
        self.containers.records[namespace, name] = container

    def topics(self) -> list[str]:
        """Topics of the events that came since the last look."""
        found = [envelope.topic for envelope in self.events._queue]
        self.events._queue.clear()
        return found
