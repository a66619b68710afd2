"""Our containerd, put together: the services over one store, in one process.

Runs in: the daemon, on its event loop.
Not here: sockets (boxship.api.containerd.server), and which way shims are started (handed in).

    ROOT/                    metadata, content, snapshots; `uuid`
    STATE/                   bundles of running containers
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.containerd.diff import Diff
from boxship.containerd.events import Events, Exchange, TtrpcEvents
from boxship.containerd.introspection import Introspection, plugin
from boxship.containerd.metadata.gc import configured
from boxship.containerd.metadata.store import Metadata
from boxship.containerd.sandboxes import Controller
from boxship.containerd.snapshots.probe import open_drivers
from boxship.containerd.streaming import Streaming, Streams
from boxship.containerd.tasks.launch import Launcher
from boxship.containerd.tasks.service import Tasks
from boxship.containerd.tasks.shims import Shims
from boxship.containerd.transfer import Transfer
from boxship.containerd.version import Version
from boxship.images.configuration import configure
from boxship.images.transfer import Images

log = logging.getLogger("boxship.containerd")

GRPC_PLUGINS = {
    "containers": "containers", "content": "content", "diff": "diff", "events": "events", "images": "images",
    "introspection": "introspection", "leases": "leases", "mounts": "mounts", "namespaces": "namespaces",
    "sandbox_controller": "sandbox-controllers", "sandbox_store": "sandboxes", "snapshots": "snapshots", "streaming": "streaming",
    "tasks": "tasks", "transfer": "transfer", "version": "version", "health": "healthcheck",
}
"""Attribute of the bundle → how containerd calls the plugin."""


def _plugins(services: Containerd, metadata: Metadata) -> list[Any]:
    host = pb.types.Platform(os="linux", architecture=_architecture())
    found = [plugin("grpc", GRPC_PLUGINS[each]) for each in services.present() if each in GRPC_PLUGINS]
    found.append(plugin("grpc", "healthcheck"))
    found += [plugin("snapshotter", name, platforms=[host], exports={"root": driver.root})
              for name, driver in metadata.drivers.items()]
    found += [
        plugin("content", "content"),
        plugin("differ", "walking", platforms=[host]),
        plugin("event", "exchange"),
        plugin("gc", "scheduler"),
        plugin("lease", "manager"),
        plugin("metadata", "bolt"),
        plugin("io.containerd.runtime.v2", "task", platforms=[host], exports={"log-uri-schemes": "fifo,binary,file"}),
        plugin("streaming", "manager"),
        plugin("transfer", "local"),
        plugin("ttrpc", "events"),
    ]
    return found


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)


def _warned(host: str, text: str) -> None:
    log.warning("registry %s: %s", host, text)


async def open(  # noqa: A001 - as one opens a store
    root: str, state: str, launcher_for: Callable[[str], Launcher], tables: Mapping[str, Mapping[str, Any]] | None = None,
) -> Containerd:
    """The services over what is at `root` and `state`; living shims are found again. Raises OSError, BoxshipError.

    `launcher_for` gives the way to start the shims of a runtime; `tables` are the parts' tables of the configuration.
    The bundle's `close` lets go of everything; containers live on.
    """
    # Folders above bundles are passable for the root users of user namespaces.
    os.makedirs(root, 0o711, exist_ok=True)
    os.makedirs(state, 0o711, exist_ok=True)
    exchange = Exchange()
    metadata = Metadata(root, exchange, open_drivers(root), tables)
    services = Containerd({
        **metadata.services,
        "diff": Diff(metadata.services["content"], metadata.drivers.values()),
        "version": Version(),
        "events": Events(exchange),
        "ttrpc_events": TtrpcEvents(exchange),
    })

    async def runtime_of(namespace: str, id: str) -> str:  # noqa: A002 - the standard's word
        response = await services.containers.Get(pb.containers.GetContainerRequest(id=id), Call(namespace))
        return str(response.container.runtime.name)

    async def runtime_info(request: Any) -> Any:
        options = request.options if request.HasField("options") else None
        return await launcher_for(request.runtime_path).info(request.runtime_path, options)

    shims = Shims(root, state, exchange, launcher_for, runtime_of)
    services.tasks = Tasks(services, shims)
    services.sandbox_controller = Controller(shims, exchange)
    parts = tables or {}
    streams = Streams()
    services.streaming = Streaming(streams)
    moving = configure(parts.get("images", {}), parts.get("registry", {}), _warned)
    images = Images(services, moving)
    services.transfer = Transfer(images, streams)
    services.introspection = Introspection(root, lambda: _plugins(services, metadata), runtime_info)
    await metadata.start()
    await images.settle()
    await shims.load()

    async def close() -> None:
        exchange.close()
        await shims.close()
        await metadata.close()

    def leave() -> None:
        exchange.close()
        shims.leave()

    def reload(tables: Mapping[str, Any]) -> None:
        moving = configure(tables.get("images", {}), tables.get("registry", {}), _warned)
        schedule = configured(tables.get("gc", {}))
        # From here on nothing fails. What is under way goes on as it began.
        images.config = moving
        metadata.scheduler.change(schedule)

    services.on_close(close)
    services.reload = reload
    services.leave = leave
    services.running = lambda: len(shims.all(""))
    return services
