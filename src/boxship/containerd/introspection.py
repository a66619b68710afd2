"""The introspection service: which parts the server has, who it is, and what a runtime says about itself.

Runs in: the daemon.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from boxship.api.any import pack, unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.filters import Filter, parse_all
from boxship.kit.errors import FailedPrecondition, NotFound, Unsupported
from boxship.kit.files import write_atomic


def plugin(kind: str, name: str, *, platforms: Iterable[Any] = (), capabilities: Iterable[str] = (),
           exports: Mapping[str, str] | None = None) -> Any:
    """A part of the server; `kind` without its frame, as `snapshotter` for io.containerd.snapshotter.v1."""
    kind = kind if kind.startswith("io.") else f"io.containerd.{kind}.v1"
    return pb.introspection.Plugin(
        type=kind, id=name, platforms=platforms, capabilities=capabilities, exports=dict(exports or {}))


def server_uuid(root: str) -> str:
    """The identity of the store at `root`, made at the first call. Raises OSError."""
    path = os.path.join(root, "uuid")
    try:
        with open(path) as file:
            return str(uuid.UUID(file.read().strip()))
    except (FileNotFoundError, ValueError):
        made = str(uuid.uuid4())
        write_atomic(path, made.encode(), 0o644)
        return made


class Introspection:
    """containerd.services.introspection.v1.Introspection."""

    def __init__(
        self, root: str, plugins: Callable[[], list[Any]], runtime_info: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        """`plugins` tells the parts there are; `runtime_info` answers a RuntimeRequest by a RuntimeInfo."""
        self._uuid = server_uuid(root)
        self._plugins = plugins
        self._runtime_info = runtime_info

    async def Plugins(self, request: Any, call: Call) -> Any:
        """The parts that match one of the filters (`type`, `id`). Raises InvalidArgument."""
        wanted: Filter = parse_all(request.filters)
        return pb.introspection.PluginsResponse(plugins=[
            each for each in self._plugins() if wanted(lambda path, each=each: {  # type: ignore[misc]
                "type": each.type or None, "id": each.id or None}.get(path[0] if path else ""))
        ])

    async def Server(self, request: Any, call: Call) -> Any:
        """Identity, process and PID namespace of the server."""
        pid_namespace = os.stat("/proc/self/ns/pid").st_ino
        return pb.introspection.ServerResponse(uuid=self._uuid, pid=os.getpid(), pidns=pid_namespace)

    async def PluginInfo(self, request: Any, call: Call) -> Any:
        """One part; with `options` what it tells beyond that. Raises NotFound, Unsupported."""
        found = [each for each in self._plugins() if each.type == request.type and each.id == request.id]
        if not found:
            raise NotFound(f"plugin {request.type}.{request.id} not found: not found")
        response = pb.introspection.PluginInfoResponse(plugin=found[0])
        if request.HasField("options"):
            options = unpack(request.options)
            if self._runtime_info is None or not request.type.startswith("io.containerd.runtime.v2"):
                raise Unsupported("plugin does not provided extra information: not implemented")
            if not isinstance(options, pb.types.RuntimeRequest):
                raise FailedPrecondition(f"unknown request type {request.options.type_url}: not implemented")
            extra: AnyMessage = pack(await self._runtime_info(options))
            response.extra.CopyFrom(extra)
        return response
