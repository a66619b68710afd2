"""The engine as an aiohttp application.

Runs in: the daemon, on its event loop.

    app = boxship.engine.app(containerd, root, state)          containerd: ours in-process or a client of a real one
    runner = boxship.engine.runner(app); await runner.setup(); await web.UnixSite(runner, path).start()
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from boxship.api.containerd.pb import namespaces, tasks
from boxship.api.containerd.services import Containerd
from boxship.engine import http, networking, times
from boxship.engine.builds import Builds
from boxship.engine.container import Container
from boxship.engine.core import Core, Settings
from boxship.engine.events import Filters, labelled, truth
from boxship.engine.execs import Execs
from boxship.engine.images import DANGLING, shown_names
from boxship.engine.lifecycle import Lifecycle
from boxship.engine.routes import builds, containers, files, images, networks, system
from boxship.engine.startup import Accounts, write_files
from boxship.engine.transfers import Transfers
from boxship.images.hosts import Configuration
from boxship.images.transfer import Config, Images
from boxship.kit.errors import AlreadyExists, BoxshipError
from boxship.network import Network


class Engine:
    """All parts, wired. Made by `open`, ended by `close`."""

    core: Core
    accounts: Accounts
    life: Lifecycle
    execs: Execs
    transfers: Transfers
    builds: Builds

    def __init__(self, containerd: Containerd, root: str, state: str, settings: Settings, registries: Configuration) -> None:
        self._containerd = containerd
        self._root = root
        self._state = state
        self._settings = settings
        self._registries = registries
        self.started = time.time_ns()

    async def open(self) -> None:
        """Connect the parts, and find again what a former engine left running."""
        from boxship.api.containerd.call import Call

        settings = self._settings
        call = Call(settings.namespace)
        try:
            await self._containerd.namespaces.Create(
                namespaces.CreateNamespaceRequest(namespace=namespaces.Namespace(name=settings.namespace)), call)
        except AlreadyExists:
            pass
        mover = self._mover = Images(self._containerd, Config(registries=self._registries, snapshotter=settings.snapshotter))
        snapshotter = await mover.snapshotter(call)
        self.core = Core(self._containerd, self._root, self._state, settings, mover, snapshotter)
        self.accounts = Accounts(self.core)
        self.life = Lifecycle(self.core, self.accounts)
        self.execs = Execs(self.core, self.accounts, self.life.spawn)
        self.life.exec_exited = self.execs.exited
        self.life.checker.run = self.execs.run
        self.transfers = Transfers(self.core)
        self.builds = Builds(self.core, self.transfers)
        await self.life.open()

    def reload(self, registries: Configuration) -> None:
        """Go by these registries from now on; what is under way goes on as it began."""
        self._mover.config = Config(registries=registries, snapshotter=self._settings.snapshotter)

    async def close(self) -> None:
        """End; containers run on."""
        await self.life.close()

    async def close_stdin(self, container: Container) -> None:
        """Tell the shim that a container's input is at its end."""
        try:
            await self.core.containerd.tasks.CloseIO(tasks.CloseIORequest(container_id=container.id, stdin=True), self.core.call)
        except BoxshipError:
            pass  # it is over

    async def connect(self, network: Network, container: Container, settings: Any) -> None:
        """Put a container on a network, now when it runs. Raises as dockerd does."""
        await networking.connect(self.core, network, container, settings)
        self._rewrite(container)

    async def disconnect(self, network: Network, container: Container, *, force: bool) -> None:
        """Take a container from a network. Raises as dockerd does."""
        await networking.disconnect(self.core, network, container, force=force)
        self._rewrite(container)

    def _rewrite(self, container: Container) -> None:
        if self.core.networks.sandbox(container.id) is not None:
            write_files(self.core, container, container.config["Hostname"])

    async def prune_containers(self, filters: Filters) -> tuple[list[str], int]:
        """Remove the stopped containers that match: (ids, bytes)."""
        limits = [times.moment(text) for text in filters.get("until", [])]
        deleted, space = [], 0
        for container in self.core.containers():
            if container.state.running or any(times.nanoseconds(container.created) >= limit for limit in limits):
                continue
            if not labelled(container.labels, filters.get("label", [])) or any(
                    labelled(container.labels, [text]) for text in filters.get("label!", [])):
                continue
            try:
                space += await self.core.snapshots.usage(container.id)
                await self.life.remove(container, force=False, with_volumes=False)
            except BoxshipError:
                continue  # started or removed in the meantime
            deleted.append(container.id)
        self.core.events.publish("container", "prune", "", {"reclaimed": str(space)})
        return deleted, space

    async def prune_images(self, filters: Filters) -> tuple[list[dict[str, str]], int]:
        """Remove the unused images, those without a name only unless `dangling` is false: (steps, bytes)."""
        core = self.core
        everything = not truth(filters, "dangling", default=True)
        limits = [times.moment(text) for text in filters.get("until", [])]
        used = core.image_users()
        deleted: list[dict[str, str]] = []
        space = 0
        for image, records in (await core.images.all()).values():
            if used.get(image.id) or (not everything and shown_names(records)[0]):
                continue
            labels: dict[str, Any] = image.container_config.get("Labels") or {}
            if any(image.created >= limit for limit in limits) or not labelled(labels, filters.get("label", [])) or any(
                    labelled(labels, [text]) for text in filters.get("label!", [])):
                continue
            if not everything and not all(each.name.startswith(DANGLING) for each in records):
                continue
            space += await core.images.size(image)
            deleted += await core.images.delete(image.id, force=True, users=[])
        core.events.publish("image", "prune", "", {"reclaimed": str(space)})
        return deleted, space


ENGINE = web.AppKey("engine", Engine)
"""Where the application has its engine."""


def app(
    containerd: Containerd, root: str, state: str, *, settings: Settings | None = None, registries: Configuration | None = None,
) -> web.Application:
    """The application; it is opened at the server's start and closed at its end."""
    engine = Engine(containerd, root, state, settings or Settings(), registries or Configuration())
    routes = http.Routes()
    for part in (system.routes, networks.routes, containers.routes, files.routes, images.routes, builds.routes):
        routes.extend(part)
    made = web.Application(client_max_size=http.BODY_MAX)
    made[ENGINE] = engine
    made.router.add_route("*", "/{tail:.*}", http.dispatcher(engine, routes))

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        await engine.open()
        yield
        await engine.close()

    made.cleanup_ctx.append(lifetime)
    return made


def runner(application: web.Application) -> web.AppRunner:
    """The server side as the engine needs it: a handler ends when its client goes away."""
    return web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=2.0, keepalive_timeout=3600)
