"""Processes beside a container's first one: docker exec, and the checks of health.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API (ExecConfig, ExecInspect); containerd's Tasks.Exec. An exec is remembered until its container ends.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from typing import Any

from boxship.api.containerd.pb import tasks
from boxship.engine import spec as specs
from boxship.engine.attach import chosen, serve
from boxship.engine.container import Container
from boxship.engine.core import Core, packed
from boxship.engine.errors import Failed
from boxship.engine.hijack import Connection
from boxship.engine.startup import Accounts
from boxship.engine.stdio import Streams
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound, from_os_error
from boxship.oci.text import dumps

PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_DRAIN_S = 2.0


class Exec:
    """One process."""

    def __init__(self, core: Core, container: Container, config: dict[str, Any], detach_keys: bytes) -> None:
        self.id = secrets.token_hex(32)
        self.container = container
        self.config = config
        self.detach_keys = detach_keys
        self.running = False
        self.started = False
        self.pid = 0
        self.exit_code: int | None = None
        self.streams = Streams(f"{core.stdio}/{container.id}/{self.id}", stdin=config["AttachStdin"], terminal=config["Tty"])
        self.over = asyncio.Event()

    def gone(self) -> None:
        """The container ended, and this with it."""
        if self.started and not self.over.is_set():
            self.running = False
            if self.exit_code is None:
                self.exit_code = 137
            self.streams.close()
            self.over.set()
        shutil.rmtree(self.streams.directory, ignore_errors=True)

    def shown(self) -> dict[str, Any]:
        """For answers."""
        config = self.config
        words = config["Cmd"] or [""]
        return {
            "ID": self.id, "Running": self.running, "ExitCode": self.exit_code,
            "ProcessConfig": {
                "tty": config["Tty"], "entrypoint": words[0], "arguments": words[1:], "privileged": config["Privileged"],
                **({"user": config["User"]} if config["User"] else {})},
            "OpenStdin": config["AttachStdin"], "OpenStderr": config["AttachStderr"], "OpenStdout": config["AttachStdout"],
            "CanRemove": False, "ContainerID": self.container.id,
            "DetachKeys": list(self.detach_keys) and _base64(self.detach_keys),
            "Pid": self.pid,
        }


def _said(words: list[str]) -> str:
    """A command in an event: the program, a space, the arguments."""
    return f"{words[0]} {' '.join(words[1:])}"


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


class Execs:
    """All of them."""

    def __init__(self, core: Core, accounts: Accounts, spawn: Any) -> None:
        self._core = core
        self._accounts = accounts
        self._spawn = spawn
        self._by_id: dict[str, Exec] = {}

    def get(self, exec_id: str) -> Exec:
        """Raises NotFound."""
        found = self._by_id.get(exec_id)
        if found is None or (found.container.id not in self._core.by_id):
            raise NotFound(f"No such exec instance: {exec_id}")
        return found

    def create(self, container: Container, config: dict[str, Any], detach_keys: bytes) -> Exec:
        """Register one. Raises FailedPrecondition when the container does not run."""
        if not config["Cmd"]:
            raise InvalidArgument("No exec command specified")
        self._require(container)
        made = Exec(self._core, container, config, detach_keys)
        self._by_id[made.id] = made
        container.execs[made.id] = made
        self._core.announce(container, f"exec_create: {_said(config['Cmd'])}", execID=made.id)
        return made

    @staticmethod
    def _require(container: Container) -> None:
        if not container.state.running:
            raise FailedPrecondition(f"container {container.id} is not running")
        if container.state.paused:
            raise FailedPrecondition(f"container {container.name} is paused, unpause the container before exec")
        if container.state.restarting:
            raise FailedPrecondition(f"Container {container.id} is restarting, wait until the container is running")

    async def start(self, found: Exec, size: list[int] | None) -> None:
        """Start the process. Raises Failed, FailedPrecondition."""
        if found.exit_code is not None:
            raise FailedPrecondition(f"exec command {found.id} has already run")
        if found.started:
            raise FailedPrecondition(f"exec command {found.id} is already running")
        container = found.container
        self._require(container)
        found.started = True
        core = self._core
        try:
            process = await self._process(found, size)
            found.streams.create()
            found.streams.open()
            await core.containerd.tasks.Exec(tasks.ExecProcessRequest(
                container_id=container.id, exec_id=found.id, stdin=found.streams.stdin, stdout=found.streams.stdout,
                stderr=found.streams.stderr, terminal=found.streams.terminal, spec=packed(PROCESS_URL, dumps(process).encode())),
                core.call)
            try:
                answer = await core.containerd.tasks.Start(tasks.StartRequest(container_id=container.id, exec_id=found.id),
                    core.call)
            except BoxshipError:
                await self._forget(found)
                raise
        except (BoxshipError, OSError) as error:
            failure = Failed.of(error if isinstance(error, BoxshipError) else from_os_error(error, "starting"), doing="")
            found.exit_code = failure.exit_code
            if found.exit_code == 128:
                found.exit_code = 126
            found.streams.close()
            found.over.set()
            raise failure from None
        found.streams.started.set()
        found.pid = answer.pid
        found.running = found.exit_code is None
        core.announce(container, f"exec_start: {_said(found.config['Cmd'])}", execID=found.id)

    async def _process(self, found: Exec, size: list[int] | None) -> dict[str, Any]:
        container, config = found.container, found.config
        user = await self._accounts.find(container, config["User"] or container.config["User"])
        inputs = specs.Inputs(user.uid, user.gid, user.groups, user.home, [], {}, container.config["Hostname"], "", "", "")
        host = container.host
        capabilities = specs.capability_set(
            host["CapAdd"] or [], host["CapDrop"] or [], privileged=config["Privileged"] or host["Privileged"])
        env = specs.environment({**container.config, "Tty": config["Tty"], "Env": [
            *(container.config["Env"] or []), *(config["Env"] or [])]}, inputs)
        process: dict[str, Any] = {
            "terminal": config["Tty"], "user": specs.user(inputs), "args": config["Cmd"], "env": env,
            "cwd": config["WorkingDir"] or container.config["WorkingDir"] or "/",
            "capabilities": specs.process_capabilities(capabilities, user.uid),
        }
        size = size or config["ConsoleSize"]
        if config["Tty"] and size and any(size):
            process["consoleSize"] = {"height": size[0], "width": size[1]}
        if "no-new-privileges" in (host["SecurityOpt"] or []) or "no-new-privileges=true" in (host["SecurityOpt"] or []):
            process["noNewPrivileges"] = True
        return process

    def exited(self, container: Container, exec_id: str, code: int) -> None:
        """containerd's event."""
        found = container.execs.get(exec_id)
        if found is not None and found.exit_code is None:
            found.exit_code = code
            self._spawn(self._finish(found, code))

    async def _finish(self, found: Exec, code: int) -> None:
        await found.streams.drain(_DRAIN_S)
        await self._forget(found)
        found.running = False
        found.streams.close()
        shutil.rmtree(found.streams.directory, ignore_errors=True)
        found.over.set()
        self._core.announce(found.container, "exec_die", execID=found.id, exitCode=str(code))

    async def _forget(self, found: Exec) -> None:
        try:
            await self._core.containerd.tasks.DeleteProcess(
                tasks.DeleteProcessRequest(container_id=found.container.id, exec_id=found.id), self._core.call)
        except BoxshipError:
            pass  # gone with the container

    async def attach(self, found: Exec, connection: Connection, subscriber: Any, *, multiplexed: bool) -> None:
        """Serve a client at the process's streams until either is over."""

        async def end_stdin() -> None:
            found.streams.close_stdin()
            try:
                await self._core.containerd.tasks.CloseIO(tasks.CloseIORequest(
                    container_id=found.container.id, exec_id=found.id, stdin=True), self._core.call)
            except BoxshipError:
                pass  # the process is over

        detached = await serve(
            connection, found.streams, subscriber, stdin=found.config["AttachStdin"], multiplexed=multiplexed,
            detach=found.detach_keys, close_stdin=end_stdin)
        if detached:
            self._core.announce(found.container, "exec_detach", execID=found.id)
        elif not connection.lost.is_set():
            # The client asks for the exit code as soon as the stream ends: let it find one.
            try:
                await asyncio.wait_for(found.over.wait(), 5)
            except TimeoutError:
                pass

    async def resize(self, found: Exec, width: int, height: int) -> None:
        """Resize its terminal. Raises FailedPrecondition."""
        if not found.running:
            raise FailedPrecondition(f"exec process is not started: {found.id}" if not found.started
                else "exec process is not running")
        await self._core.containerd.tasks.ResizePty(tasks.ResizePtyRequest(
            container_id=found.container.id, exec_id=found.id, width=width, height=height), self._core.call)

    async def run(self, container: Container, words: list[str], limit: float) -> tuple[int, str]:
        """Run a command to its end, at most `limit` seconds: (exit code, output). For the checks of health."""
        config = {
            "User": "", "Privileged": False, "Tty": False, "ConsoleSize": None, "AttachStdin": False, "AttachStderr": True,
            "AttachStdout": True, "DetachKeys": "", "Env": [], "WorkingDir": "", "Cmd": words, "Detach": False,
        }
        found = self.create(container, config, b"")
        subscriber = found.streams.subscribe(chosen(stdout=True, stderr=True))
        parts: list[bytes] = []

        async def collect() -> None:
            size = 0
            while (piece := await subscriber.get()) is not None:
                if size < 4096:
                    parts.append(piece[1])
                    size += len(piece[1])

        try:
            await self.start(found, None)
            try:
                await asyncio.wait_for(collect(), limit)
                await asyncio.wait_for(found.over.wait(), 5)
            except TimeoutError:
                await self._core.containerd.tasks.Kill(
                    tasks.KillRequest(container_id=container.id, exec_id=found.id, signal=9), self._core.call)
                return -1, f"Health check exceeded timeout ({limit:g}s)"
            return found.exit_code if found.exit_code is not None else -1, b"".join(parts).decode("utf-8", "replace")
        finally:
            found.streams.unsubscribe(subscriber)
            container.execs.pop(found.id, None)
            self._by_id.pop(found.id, None)


