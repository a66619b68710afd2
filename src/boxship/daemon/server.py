"""The daemon: containerd's services on their sockets, from the lock on its folders to the last goodbye.

Runs in: the process of `boxship daemon` (boxshipd), one event loop.

    start    lock STATE → services opened, living shims found → sockets bound → READY=1
    SIGHUP   configuration read again: the log takes it at once, the rest with the next start
    SIGTERM  (SIGINT too) no new calls, streams end, calls under way get some seconds; containers and their shims live on
    SIGKILL  at any moment: what is on disk is whole, the next daemon finds the shims

Sockets that systemd opened are used in place of our own.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import boxship
from boxship.api.containerd import ttrpc
from boxship.api.containerd.server import Observer, Server, as_error
from boxship.api.containerd.services import Containerd
from boxship.containerd import service
from boxship.containerd.tasks.launch import Launcher, Programs
from boxship.daemon import config as configuration
from boxship.daemon import logs, metrics, spawning, systemd
from boxship.daemon.config import Config
from boxship.kit import failpoint
from boxship.kit.errors import AlreadyExists, BoxshipError

log = logging.getLogger("boxship.daemon")

GRACE_S = 3.0
IDLE_LOOK_S = 1.0
TTRPC_SERVICES = ("ttrpc_events",)


class Lock:
    """One daemon for a folder: held as long as the process lives."""

    def __init__(self, folder: str) -> None:
        """Raises AlreadyExists when another daemon has the folder, OSError."""
        path = os.path.join(folder, "boxshipd.lock")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._fd, 32).decode(errors="replace").strip()
            os.close(self._fd)
            raise AlreadyExists(f"another daemon (pid {owner or 'unknown'}) uses {folder}") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go."""
        os.close(self._fd)


class Daemon:
    """What runs, in the order in which it was started; it is stopped in the other one."""

    def __init__(self, config: Config, reread: Callable[[], Config]) -> None:
        self.config = config
        self._reread = reread
        self._end = asyncio.Event()
        self._calls = metrics.Calls()
        self._undo: list[Callable[[], Any]] = []
        self._reloaded: list[Callable[[Config], None]] = []
        """Parts that take another configuration while they run."""
        self._last_use = time.monotonic()
        self._running: Callable[[], int] = lambda: 0
        self._clients: Callable[[], int] = lambda: 0

    # --- start

    async def run(self) -> None:
        """From the start to a signal, or to idleness. Raises BoxshipError, OSError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            await self._start()
            systemd.notify("READY=1")
            log.info("ready", extra={"version": boxship.__version__, "address": self.config.containerd_socket})
            if self.config.idle_exit_s:
                await self._until_idle()
            await self._end.wait()
            systemd.notify("STOPPING=1")
            log.info("stopping")
        finally:
            for undo in reversed(self._undo):
                try:
                    result = undo()
                    if asyncio.iscoroutine(result):
                        await result
                except (BoxshipError, OSError) as error:
                    log.error("stop: %s", error)

    async def _start(self) -> None:
        config = self.config
        os.makedirs(config.root, 0o711, exist_ok=True)
        os.makedirs(config.state, 0o711, exist_ok=True)
        for folder in {config.root, config.state}:
            self._undo.append(Lock(folder).release)
        inherited = systemd.listening()
        observer = self._observer()
        containerd = await self._services()
        self._undo.append(containerd.close)
        self._reloaded.append(lambda config: containerd.reload(config.parts))
        self._running = containerd.running
        if config.containerd.enabled and not config.containerd.remote:
            await self._serve_ttrpc(containerd, inherited.pop(config.containerd_socket + ".ttrpc", None))
            await self._serve_grpc(containerd, observer, inherited.pop(config.containerd_socket, None))
        if config.docker.enabled:
            await self._serve_docker(containerd, inherited.pop(config.docker_socket, None))
        if config.metrics.address:
            endpoint = metrics.Endpoint([self._calls.lines, metrics.process, self._gauges])
            await endpoint.listen(config.metrics.address)
            self._undo.append(endpoint.close)
        for name, listener in inherited.items():
            log.warning("the socket %s was handed in, and nothing here listens there", name)
            listener.close()

    async def _services(self) -> Containerd:
        config = self.config
        if config.containerd.remote:
            # gRPC's own handlers of fork are of no use here, where children are only ever vforked and exec'ed.
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
            os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
            from boxship.api.containerd.client import connect  # grpcio is not for a daemon that is no client

            return connect(config.containerd.remote)
        return await service.open(config.root, config.state, self._launchers(), config.parts)

    def _gauges(self) -> list[str]:
        return metrics.gauge("boxship_tasks", "Tasks that this daemon looks after.", [({}, self._running())])

    def _observer(self) -> Observer:
        if not self.config.tracing.endpoint:
            return self._calls
        from boxship.daemon.tracing import Spans

        spans = Spans(self.config.tracing, self._calls)
        self._undo.append(spans.close)
        return spans

    def _launchers(self) -> Callable[[str], Launcher]:
        address = self.config.containerd_socket
        common = (address, address + ".ttrpc", program("boxshipd"), self.config.log.level == "debug")
        programs: Launcher = Programs(*common)
        own = programs
        if os.path.exists(program(spawning.SHIM)):
            own = spawning.Own(program(spawning.SHIM), os.path.join(self.config.state, "spawner", "socket"), *common)
        names = {*self.config.runtimes.own, program(spawning.SHIM)}
        return lambda runtime: own if runtime in names else programs

    async def _serve_grpc(self, containerd: Containerd, observer: Observer, listener: socket.socket | None) -> None:
        settings, path = self.config.containerd, self.config.containerd_socket
        server = Server(containerd, observer)
        if listener is not None:
            server.take(listener)
        else:
            os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
            server.listen(path, settings.mode, settings.uid, settings.gid)
            self._undo.append(lambda: _unlink(path))
        await server.start()

        async def stop() -> None:
            # What never ends by itself would use the whole time of grace up.
            containerd.leave()
            await server.stop(GRACE_S)

        self._undo.append(stop)

    async def _serve_ttrpc(self, containerd: Containerd, listener: socket.socket | None) -> None:
        settings, path = self.config.containerd, self.config.containerd_socket + ".ttrpc"
        server = ttrpc.Server(containerd, TTRPC_SERVICES, as_error)
        if listener is not None:
            await server.serve(listener)
        else:
            await server.listen(path, settings.mode, settings.uid, settings.gid)
            self._undo.append(lambda: _unlink(path))
        self._undo.append(server.stop)

    async def _serve_docker(self, containerd: Containerd, listener: socket.socket | None) -> None:
        from boxship.daemon import docker  # aiohttp is not for a daemon without the engine

        missing = docker.NEEDS - set(containerd.present())
        if missing:
            log.warning("no engine: it needs %s", ", ".join(sorted(missing)))
            return
        served = await docker.serve(containerd, self.config, listener)
        self._clients = served.connections
        self._reloaded.append(served.reload)
        self._undo.append(served.close)

    # --- while it runs

    def _reload(self) -> None:
        systemd.notify(systemd.reloading())
        try:
            config = self._reread()
            for part in self._reloaded:
                part(config)
        except (BoxshipError, OSError) as error:
            log.error("the configuration was not read again: %s", error)
        else:
            logs.configure(config.log)
            log.info("configuration read again")
        systemd.notify("READY=1")

    async def _until_idle(self) -> None:
        while not self._end.is_set():
            try:
                async with asyncio.timeout(IDLE_LOOK_S):
                    await self._end.wait()
            except TimeoutError:
                pass
            if self._calls.open or self._running() or self._clients():
                self._last_use = time.monotonic()
            used = max(self._last_use, self._calls.last)
            if time.monotonic() - used > self.config.idle_exit_s:
                log.info("nobody has asked for anything for %g s", self.config.idle_exit_s)
                self._end.set()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def program(name: str) -> str:
    """The path of a program of this package, which lies beside the interpreter that runs this."""
    return os.path.join(os.path.dirname(sys.executable), name)


def serve(config: Config, reread: Callable[[], Config]) -> None:
    """Run the daemon until it is told to end. Raises BoxshipError, OSError when it cannot start."""
    logs.configure(config.log)
    failpoint.load()
    try:
        import uvloop
    except ImportError:
        asyncio.run(Daemon(config, reread).run())
        return

    async def run() -> None:
        await Daemon(config, reread).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


HELP = """Usage:  boxshipd [OPTIONS]            (also: boxship daemon)
        boxshipd [--address PATH] publish --topic TOPIC --namespace NAMESPACE

Serves containerd's API, and keeps what it knows in two folders.

Options:
      --config FILE         configuration (default /etc/boxship/config.toml)
      --root DIR            what stays: images, metadata (default /var/lib/boxship)
      --state DIR           what goes with a reboot: sockets, running containers (default /run/boxship)
      --address PATH        containerd's socket (default STATE/containerd.sock)
      --containerd ADDRESS  use the containerd at that socket in place of our own
      --log-level LEVEL     debug, info, warning or error (default info)
      --log-format FORMAT   text or json (default text)
      --bridge NAME         the device of the default network (default boxship0); none for no such network
      --metrics ADDRESS     HOST:PORT or a path for Prometheus (default none)
      --idle-exit SECONDS   leave after so long without a client (default 0: never)
  -v, --version             print the version
      --help                show this
"""
FLAGS = ("config", "root", "state", "address", "containerd", "log-level", "log-format", "bridge", "metrics", "idle-exit")


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """The command line; returns the exit code."""
    values: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            sys.stdout.write(HELP)
            return 0
        if word in ("--version", "-v"):
            sys.stdout.write(f"boxshipd version {boxship.__version__}\n")
            return 0
        if word == "publish":
            from boxship.daemon import publish

            return publish.main(values.get("address", "/run/boxship/containerd.sock"), words)
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-") or name not in FLAGS:
            kind = "flag" if word.startswith("-") else "command"
            sys.stderr.write(f"boxshipd: unknown {kind}: {word}\n\nSee 'boxshipd --help'.\n")
            return 125
        if not equals and not words:
            sys.stderr.write(f"boxshipd: flag needs an argument: {word}\n\nSee 'boxshipd --help'.\n")
            return 125
        values[name] = value if equals else words.pop(0)

    def read() -> Config:
        return configuration.with_flags(configuration.load(values.get("config", ""), environ), values)

    try:
        serve(read(), read)
    except (BoxshipError, OSError) as error:
        sys.stderr.write(f"boxshipd: {error}\n")
        return 1
    return 0
