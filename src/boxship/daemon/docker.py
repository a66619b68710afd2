"""The Docker engine in the daemon: its settings out of the configuration, its application on its socket.

Runs in: the daemon, on its event loop.
Settings: the table [engine] (namespace, snapshotter, default_runtime, cgroup_parent, init, cdi_directories, and [engine.runtimes]
with NAME = "runtime" or ["runtime", "binary"]); registries as in [images] and [registry]; [network] has the fields of
boxship.network.Settings.
"""

from __future__ import annotations

import dataclasses
import grp
import hashlib
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from boxship import engine
from boxship.api.containerd.services import Containerd
from boxship.daemon.config import ROOT, Config, Docker
from boxship.daemon.remote import Remote
from boxship.images.configuration import configure
from boxship.kit.errors import InvalidArgument
from boxship.kit.user import user_of
from boxship.network import Settings as NetworkSettings

log = logging.getLogger("boxship.engine")

NEEDS = {"containers", "content", "diff", "events", "images", "leases", "namespaces", "snapshots", "tasks"}
"""Services without which there is no engine."""
LISTS = {"cdi_directories"}
BACKLOG = 4096
"""Clients that may wait to be accepted: past that, one that does not wait is refused."""
TEXTS = ("namespace", "snapshotter", "default_runtime", "cgroup_parent", "init")


def settings(table: Mapping[str, Any], address: str) -> engine.Settings:
    """The engine's settings; `address` is where containerd is. Raises InvalidArgument, which names the key."""
    values: dict[str, Any] = {"address": address, "rootless": user_of(os.environ) != 0}
    for key, value in table.items():
        if key in TEXTS:
            if not isinstance(value, str):
                raise InvalidArgument(f"engine.{key} is not a text")
            values[key] = value
        elif key in LISTS:
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise InvalidArgument(f"engine.{key} is not a list of texts")
            values[key] = tuple(value)
        elif key == "runtimes" and isinstance(value, dict):
            values[key] = dict(engine.Settings().runtimes)
            for name, what in value.items():
                words = [what] if isinstance(what, str) else what
                if not isinstance(words, list) or not 1 <= len(words) <= 2 or not all(isinstance(word, str) for word in words):
                    raise InvalidArgument(f"engine.runtimes.{name} is no runtime, nor a runtime and its binary")
                values[key][name] = (words[0], words[1] if len(words) == 2 else "")
        else:
            raise InvalidArgument(f"unknown key engine.{key}")
    return engine.Settings(**values)


def network(table: Mapping[str, Any], root: str) -> NetworkSettings:
    """The table [network]; with another root than the usual one the names of devices are others too. Raises InvalidArgument."""
    known = {each.name: each for each in dataclasses.fields(NetworkSettings) if each.name != "instance"}
    values: dict[str, Any] = {"bridge": "none"} if user_of(os.environ) else {}  # links to the machine are for its root to make
    for key, value in table.items():
        if key not in known:
            raise InvalidArgument(f"unknown key network.{key}")
        default = known[key].default
        if isinstance(default, tuple):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise InvalidArgument(f"network.{key} is not a list of texts")
            value = tuple(value)
        elif type(value) is not type(default):
            raise InvalidArgument(f"network.{key} is not of the kind of {default!r}")
        values[key] = value
    instance = "" if root == ROOT else hashlib.sha256(root.encode()).hexdigest()[:8]
    return NetworkSettings(**values, instance=instance)


def _warned(host: str, text: str) -> None:
    log.warning("%s: %s", host, text)


class Served:
    """The engine on its socket."""

    def __init__(self, runner: web.AppRunner, path: str, own: bool, remote: Remote | None) -> None:
        self._runner = runner
        self._path = path
        self._own = own
        self._remote = remote

    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._runner.server.connections) if self._runner.server else 0

    def reload(self, config: Config) -> None:
        """Take the registries of the configuration. Raises InvalidArgument."""
        self._runner.app[engine.ENGINE].reload(configure(config.table("images"), config.table("registry"), _warned).registries)

    async def close(self) -> None:
        """End it; the socket goes when it is not systemd's."""
        if self._remote is not None:
            self._remote.close()
        await self._runner.cleanup()
        if self._own:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass


def _give(path: str, settings: Docker) -> None:
    """The owner and the group of the socket. Raises OSError."""
    gid = settings.gid
    if gid < 0 and settings.group and user_of(os.environ) == 0:
        try:
            gid = grp.getgrnam(settings.group).gr_gid
        except KeyError:
            pass  # then it is root's alone
    if settings.uid >= 0 or gid >= 0:
        os.chown(path, settings.uid, gid)


async def serve(containerd: Containerd, config: Config, listener: socket.socket | None) -> Served:
    """Open the engine and answer on its socket (`listener`, when somebody opened it before). Raises BoxshipError, OSError."""
    chosen = settings(config.table("engine"), config.containerd.remote or config.containerd_socket)
    chosen = chosen._replace(network=network(config.table("network"), config.root))
    registries = configure(config.table("images"), config.table("registry"), _warned).registries
    runner = engine.runner(engine.app(containerd, config.root, config.state, settings=chosen, registries=registries))
    await runner.setup()
    path = config.docker_socket
    try:
        if listener is not None:
            await web.SockSite(runner, listener, backlog=BACKLOG).start()
        else:
            os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
            before = os.umask(0o777 & ~config.docker.mode)
            try:
                await web.UnixSite(runner, path, backlog=BACKLOG).start()
            finally:
                os.umask(before)
            os.chmod(path, config.docker.mode)
            _give(path, config.docker)
        remote = Remote(config.docker, path) if config.docker.tcp else None
        if remote is not None:
            await remote.listen()
    except BaseException:
        await runner.cleanup()
        raise
    return Served(runner, path, listener is None, remote)
