"""The API for programs on asyncio: the calls of `boxship.sdk.sync`, awaited. No threads, but to start a daemon.

Runs in: the caller's program, on its event loop; each call has a connection of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from boxship.cli.http.client import ConnectFailed
from boxship.cli.http.where import address, certificates, connect
from boxship.kit.errors import BoxshipError, NotFound, Unavailable, Unsupported
from boxship.sdk import steps, wire
from boxship.sdk.errors import CommandFailed
from boxship.sdk.models import ExecResult, Image, Network, State, Volume

if TYPE_CHECKING:
    from typing import Unpack

    from boxship.sdk.options import Options

T = TypeVar("T")


class Client:
    """An engine: the one of BOXSHIP_HOST or DOCKER_HOST, or this user's daemon, which is started when none runs.

    `address` as unix://PATH or tcp://HOST:PORT names another. Raises Unavailable from every call that reaches no engine.
    """

    def __init__(self, address: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._address, self._variables = address, environ
        self._started = False
        self.images = Images(self)
        self.volumes = Volumes(self)
        self.networks = Networks(self)
        self.containers = Containers(self)

    def run(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Running:
        """Make and start a container: `async with aio.run(…) as c`, at whose end it is removed, or `c = await aio.run(…)`.

        Raises StartFailed (the container is removed), NotFound for the image, InvalidArgument.
        """
        return Running(self, image, command, options)

    async def create(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Container:
        """Make a container, pulling the image if need be."""
        return Container(self, await self._do(steps.create(image, command, options, address(self._environ)[1])))

    async def check_output(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> str:
        """What a command prints; the container is removed. Raises CommandFailed when it ends with another code than 0."""
        async with self.run(image, command, **options) as container:
            code = await container.wait()
            out, err = await container.logs(stderr=False), await container.logs(stdout=False)
        if code:
            raise CommandFailed([command] if isinstance(command, str) else list(command or [image]), code, out, err)
        return out

    async def version(self) -> Mapping[str, Any]:
        """The engine's versions."""
        found: Mapping[str, Any] = await self._do(steps.plain("GET", "/version"))
        return found

    async def info(self) -> Mapping[str, Any]:
        """What the engine says of itself and its machine."""
        found: Mapping[str, Any] = await self._do(steps.plain("GET", "/info"))
        return found

    async def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """What happens from now on."""
        async with self._stream("GET", "/events") as answer:
            async for line in answer.lines():
                yield steps.document(line)

    # how

    @property
    def _environ(self) -> Mapping[str, str]:
        return {**self._variables, "BOXSHIP_HOST": self._address} if self._address else self._variables

    async def _where(self) -> str:
        where, own = address(self._environ)
        if not where.startswith("unix:") and certificates(self._environ) is not None:
            raise Unsupported("boxship.aio does not speak TLS", "boxship.Client does")
        if own and not self._started:
            try:
                (await asyncio.to_thread(connect, self._environ)).close()
            except ConnectFailed as error:
                raise Unavailable(str(error)) from None
            self._started = True
        return where

    async def _do(self, work: steps.Steps[T]) -> T:
        try:
            ask = next(work)
            while True:
                try:
                    answer = await self._answer(ask)
                except BoxshipError as error:
                    ask = work.throw(error)
                else:
                    ask = work.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _answer(self, ask: steps.Ask) -> Any:
        try:
            answer = await wire.send(await self._where(), ask.method, ask.target, ask.body, upload=ask.upload)
        except Unavailable:
            self._started = False  # a daemon that was started for an earlier call may have left
            answer = await wire.send(await self._where(), ask.method, ask.target, ask.body, upload=ask.upload)
        try:
            if ask.answer == "lines":
                return [steps.document(line) async for line in answer.lines()]
            data = await answer.read()
            return data if ask.answer == "bytes" else steps.document(data) if data.strip() else None
        finally:
            answer.close()

    @asynccontextmanager
    async def _stream(
        self, method: str, target: str, body: object = None, *, upgrade: bool = False
    ) -> AsyncGenerator[wire.Answer, None]:
        answer = await wire.send(await self._where(), method, target, body, upgrade=upgrade)
        try:
            yield answer
        finally:
            answer.close()


class Running:
    """A container that is being started: awaited, or entered."""

    def __init__(self, client: Client, image: str, command: str | Iterable[str] | None, options: Options) -> None:
        self._client = client
        self._image, self._command, self._options = image, command, options
        self._container: Container | None = None

    async def _start(self) -> Container:
        container = await self._client.create(self._image, self._command, **self._options)
        try:
            await container.start()
        except BaseException:
            await container.close()
            raise
        return container

    def __await__(self) -> Generator[Any, None, Container]:
        return self._start().__await__()

    async def __aenter__(self) -> Container:
        self._container = await self._start()
        return self._container

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._container is not None:
            await self._container.close()


class Container:
    """A container of the engine. As a context manager it is killed and removed, with its anonymous volumes, at the end."""

    def __init__(self, client: Client, identity: str) -> None:
        self._client = client
        self.id = identity

    def __repr__(self) -> str:
        return f"<Container {self.id[:12]}>"

    async def __aenter__(self) -> Container:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill and remove it; that it is gone already is no error."""
        try:
            await self.remove(force=True, volumes=True)
        except NotFound:
            pass

    async def inspect(self) -> Mapping[str, Any]:
        """All that the engine knows of it."""
        found: Mapping[str, Any] = await self._client._do(steps.inspect(self.id))
        return found

    async def name(self) -> str:
        """Its name, asked for each time: it can change."""
        return str((await self.inspect())["Name"]).removeprefix("/")

    async def state(self) -> State:
        """How it is now."""
        return State.of(await self.inspect())

    async def start(self) -> None:
        """Start it. Raises StartFailed."""
        await self._client._do(steps.start(self.id))

    async def stop(self, timeout_s: int | None = None) -> None:
        """Ask it to end, and kill it after `timeout_s` seconds (10 as usual)."""
        await self._client._do(steps.act(self.id, "stop", t=timeout_s))

    async def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal. Raises FailedPrecondition when it does not run."""
        await self._client._do(steps.act(self.id, "kill", signal=signal))

    async def pause(self) -> None:
        """Freeze its processes."""
        await self._client._do(steps.act(self.id, "pause"))

    async def unpause(self) -> None:
        """Let them go on."""
        await self._client._do(steps.act(self.id, "unpause"))

    async def restart(self, timeout_s: int | None = None) -> None:
        """Stop and start."""
        await self._client._do(steps.act(self.id, "restart", t=timeout_s))

    async def remove(self, *, force: bool = False, volumes: bool = False) -> None:
        """Remove it; `force` kills it before. Raises FailedPrecondition when it runs."""
        await self._client._do(steps.remove(self.id, force, volumes))

    async def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, when it has ended. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self._client._do(steps.waiting(self.id))

    async def port(self, inside: int | str) -> tuple[str, int]:
        """(address, port) of the machine where 80 or "53/udp" of the container is published. Raises NotFound."""
        return await self._client._do(steps.port(self.id, inside))

    async def put(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Write a file; its folder is there."""
        await self._client._do(steps.put(self.id, path, data.encode() if isinstance(data, str) else data, mode))

    async def get(self, path: str) -> bytes:
        """Read a file."""
        return await self._client._do(steps.get(self.id, path))

    async def logs(
        self, *, stdout: bool = True, stderr: bool = True, tail: int | None = None, timestamps: bool = False
    ) -> str:
        """What it has printed."""
        target = steps.logs_target(self.id, stdout=stdout, stderr=stderr, tail=tail, timestamps=timestamps)
        return "".join([f"{line}\n" async for line in self._lines(target)])

    def follow(
        self, *, stdout: bool = True, stderr: bool = True, tail: int | None = None, timestamps: bool = False
    ) -> AsyncIterator[str]:
        """The lines that it prints, as they come, until it ends."""
        return self._lines(steps.logs_target(
            self.id, follow=True, stdout=stdout, stderr=stderr, tail=tail, timestamps=timestamps))

    async def _lines(self, target: str) -> AsyncIterator[str]:
        output = steps.Output(framed=not (await self.inspect())["Config"]["Tty"])
        async with self._client._stream("GET", target) as answer:
            async for piece in answer.pieces():
                for line in output.lines(piece):
                    yield line
        for line in output.last():
            yield line

    async def exec(
        self, command: str | Iterable[str], *, check: bool = False,
        input: bytes | str | None = None,  # noqa: A002 - subprocess.run's word
        env: Mapping[str, str] | None = None, user: str = "", workdir: str = "", tty: bool = False, privileged: bool = False,
    ) -> ExecResult:
        """Run a command beside the first. Raises CommandFailed with `check`, FailedPrecondition when it does not run."""
        words = [command] if isinstance(command, str) else list(command)
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        identity = await self._client._do(steps.exec_create(
            self.id, words, variables, User=user, WorkingDir=workdir, Tty=tty, Privileged=privileged,
            AttachStdin=input is not None))
        found = {1: b"", 2: b""}
        output = steps.Output(framed=not tty)
        async for piece in self._hijacked(identity, tty, input.encode() if isinstance(input, str) else input):
            for number, part in output.feed(piece):
                found[number] += part
        code = await self._client._do(steps.exec_code(identity))
        out, err = (found[number].decode("utf-8", "replace") for number in (1, 2))
        if check and code:
            raise CommandFailed(words, code, out, err)
        return ExecResult(code, out, err)

    async def _hijacked(self, identity: str, tty: bool, data: bytes | None) -> AsyncIterator[bytes]:
        body = {"Detach": False, "Tty": tty}
        async with self._client._stream("POST", f"/exec/{identity}/start", body, upgrade=True) as answer:
            # Beside, because the command may print before it has read all.
            sending = None if data is None else asyncio.ensure_future(_send(answer.writer, data))
            try:
                while piece := await answer.reader.read(65536):
                    yield piece
            finally:
                if sending is not None:
                    sending.cancel()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
        writer.write(data)
        await writer.drain()
        writer.write_eof()
    except OSError:
        pass  # it ended without reading it


class Containers:
    """The engine's containers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self, name: str) -> Container:
        """By name or id. Raises NotFound."""
        return Container(self._client, (await self._client._do(steps.inspect(name)))["Id"])

    async def list(self, *, all: bool = False, filters: steps.Filters | None = None) -> Sequence[Container]:  # noqa: A002 - docker's word
        """Those that run, or all."""
        return [Container(self._client, each) for each in await self._client._do(steps.containers(all, filters))]


class Images:
    """The engine's images."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self, name: str) -> Image:
        """By name or id. Raises NotFound."""
        return await self._client._do(steps.image(name))

    async def list(self, *, filters: steps.Filters | None = None) -> Sequence[Image]:
        """All."""
        return await self._client._do(steps.images(filters))

    async def pull(self, name: str, *, platform: str | None = None) -> Image:
        """Fetch from its registry. Raises NotFound."""
        return await self._client._do(steps.pulled(name, platform))

    async def tag(self, name: str, new: str) -> None:
        """Give it another name."""
        await self._client._do(steps.image_tag(name, new))

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it, or the name."""
        await self._client._do(steps.image_remove(name, force))

    async def load(self, archive: bytes) -> tuple[str, ...]:
        """Load an archive as `save` makes it: the names that are in it."""
        return tuple(await self._client._do(steps.image_load(archive)))

    async def save(self, *names: str) -> bytes:
        """An archive (tar) of images."""
        return await self._client._do(steps.image_save([*names]))


class Volumes:
    """The engine's volumes."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self, name: str) -> Volume:
        """By name. Raises NotFound."""
        return await self._client._do(steps.volume(name))

    async def list(self, *, filters: steps.Filters | None = None) -> Sequence[Volume]:
        """All."""
        return await self._client._do(steps.volumes(filters))

    async def create(
        self, name: str = "", *, driver: str = "local", options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make one; without a name the engine chooses it."""
        return await self._client._do(steps.volume_create(name, driver, options or {}, labels or {}))

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it with what is in it. Raises FailedPrecondition while a container has it."""
        await self._client._do(steps.volume_remove(name, force))


class Networks:
    """The engine's networks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self, name: str) -> Network:
        """By name or id. Raises NotFound."""
        return await self._client._do(steps.network(name))

    async def list(self, *, filters: steps.Filters | None = None) -> Sequence[Network]:
        """All."""
        return await self._client._do(steps.networks(filters))

    async def create(
        self, name: str, *, driver: str = "bridge", subnet: str = "", internal: bool = False,
        options: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None,
    ) -> Network:
        """Make one. Raises AlreadyExists."""
        return await self._client._do(steps.network_create(name, driver, subnet, options or {}, labels or {}, internal))

    async def remove(self, name: str) -> None:
        """Remove it. Raises PermissionDenied while containers are on it."""
        await self._client._do(steps.network_remove(name))

    async def connect(self, name: str, container: Container, *, aliases: Iterable[str] = ()) -> None:
        """Put a container on it."""
        await self._client._do(steps.network_act(name, "connect", container.id, EndpointConfig={"Aliases": [*aliases]}))

    async def disconnect(self, name: str, container: Container, *, force: bool = False) -> None:
        """Take a container off it."""
        await self._client._do(steps.network_act(name, "disconnect", container.id, Force=force))


_default = Client()
images: Images = _default.images
volumes: Volumes = _default.volumes
networks: Networks = _default.networks
containers: Containers = _default.containers


def run(image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Running:
    """`Client().run`: make and start a container of the usual engine."""
    return _default.run(image, command, **options)


async def check_output(image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> str:
    """`Client().check_output`: what a command prints in a container that is gone afterwards."""
    return await _default.check_output(image, command, **options)
