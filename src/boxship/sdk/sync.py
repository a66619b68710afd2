"""The API for programs that wait: each call blocks until the engine has answered.

Runs in: the caller's program, in any thread; each call has a connection of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from boxship.cli.http.client import ApiError, ConnectFailed, Connection, Response
from boxship.cli.http.where import address, connect
from boxship.kit.errors import NotFound, Unavailable
from boxship.sdk import steps
from boxship.sdk.errors import CommandFailed, refusal
from boxship.sdk.models import ExecResult, Image, Network, State, Volume

if TYPE_CHECKING:
    from typing import Unpack

    from boxship.sdk.options import Options

T = TypeVar("T")
_SHUT_WR = 1


class Client:
    """An engine: the one of BOXSHIP_HOST or DOCKER_HOST, or this user's daemon, which is started when none runs.

    `address` as unix://PATH or tcp://HOST:PORT names another. Raises Unavailable from every call that reaches no engine.
    """

    def __init__(self, address: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._address, self._variables = address, environ
        self.images = Images(self)
        self.volumes = Volumes(self)
        self.networks = Networks(self)
        self.containers = Containers(self)

    def run(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Container:
        """Make and start a container; it runs on. As a context manager it is removed at the end.

        Raises StartFailed (the container is removed), NotFound for the image, InvalidArgument.
        """
        container = self.create(image, command, **options)
        try:
            container.start()
        except BaseException:
            container.close()
            raise
        return container

    def create(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Container:
        """Make a container, pulling the image if need be."""
        return Container(self, self._do(steps.create(image, command, options, address(self._environ)[1])))

    def check_output(self, image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> str:
        """What a command prints; the container is removed. Raises CommandFailed when it ends with another code than 0."""
        with self.run(image, command, **options) as container:
            code = container.wait()
            out, err = container.logs(stderr=False), container.logs(stdout=False)
        if code:
            raise CommandFailed([command] if isinstance(command, str) else list(command or [image]), code, out, err)
        return out

    def version(self) -> Mapping[str, Any]:
        """The engine's versions."""
        found: Mapping[str, Any] = self._do(steps.plain("GET", "/version"))
        return found

    def info(self) -> Mapping[str, Any]:
        """What the engine says of itself and its machine."""
        found: Mapping[str, Any] = self._do(steps.plain("GET", "/info"))
        return found

    def events(self) -> Iterator[Mapping[str, Any]]:
        """What happens from now on."""
        with self._stream("GET", "/events") as response:
            for line in response.lines():
                yield steps.document(line)

    # how

    @property
    def _environ(self) -> Mapping[str, str]:
        return {**self._variables, "BOXSHIP_HOST": self._address} if self._address else self._variables

    def _connection(self) -> Connection:
        try:
            return connect(self._environ)
        except ConnectFailed as error:
            raise Unavailable(str(error)) from None

    def _do(self, work: steps.Steps[T], timeout_s: float | None = None) -> T:
        answer: Any = None
        try:
            ask = next(work)
            while True:
                try:
                    answer = self._answer(ask, timeout_s)
                except ApiError as error:
                    ask = work.throw(refusal(error.status, error.message))
                else:
                    ask = work.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    def _answer(self, ask: steps.Ask, timeout_s: float | None) -> Any:
        connection = self._connection()
        try:
            connection.open().settimeout(timeout_s)
            response = connection.send(
                ask.method, ask.target, ask.body, headers=ask.headers, upload=None if ask.upload is None else [ask.upload])
            if ask.answer == "lines":
                return [steps.document(line) for line in response.lines()]
            return response.json() if ask.answer == "json" else response.read()
        except ConnectFailed as error:
            raise Unavailable(str(error)) from None
        finally:
            connection.close()

    @contextmanager
    def _stream(self, method: str, target: str, body: object = None, *, upgrade: bool = False) -> Generator[Response, None, None]:
        connection = self._connection()
        try:
            yield connection.send(method, target, body, upgrade=upgrade)
        except ApiError as error:
            raise refusal(error.status, error.message) from None
        except ConnectFailed as error:
            raise Unavailable(str(error)) from None
        finally:
            connection.close()


class Container:
    """A container of the engine. As a context manager it is killed and removed, with its anonymous volumes, at the end."""

    def __init__(self, client: Client, identity: str) -> None:
        self._client = client
        self.id = identity

    def __repr__(self) -> str:
        return f"<Container {self.id[:12]}>"

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill and remove it; that it is gone already is no error."""
        try:
            self.remove(force=True, volumes=True)
        except NotFound:
            pass

    def inspect(self) -> Mapping[str, Any]:
        """All that the engine knows of it."""
        found: Mapping[str, Any] = self._client._do(steps.inspect(self.id))
        return found

    @property
    def name(self) -> str:
        """Its name, asked for each time: it can change."""
        return str(self.inspect()["Name"]).removeprefix("/")

    @property
    def state(self) -> State:
        """How it is now."""
        return State.of(self.inspect())

    def start(self) -> None:
        """Start it. Raises StartFailed."""
        self._client._do(steps.start(self.id))

    def stop(self, timeout_s: int | None = None) -> None:
        """Ask it to end, and kill it after `timeout_s` seconds (10 as usual)."""
        self._client._do(steps.act(self.id, "stop", t=timeout_s))

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal. Raises FailedPrecondition when it does not run."""
        self._client._do(steps.act(self.id, "kill", signal=signal))

    def pause(self) -> None:
        """Freeze its processes."""
        self._client._do(steps.act(self.id, "pause"))

    def unpause(self) -> None:
        """Let them go on."""
        self._client._do(steps.act(self.id, "unpause"))

    def restart(self, timeout_s: int | None = None) -> None:
        """Stop and start."""
        self._client._do(steps.act(self.id, "restart", t=timeout_s))

    def remove(self, *, force: bool = False, volumes: bool = False) -> None:
        """Remove it; `force` kills it before. Raises FailedPrecondition when it runs."""
        self._client._do(steps.remove(self.id, force, volumes))

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, when it has ended. Raises TimeoutError."""
        return self._client._do(steps.waiting(self.id), timeout_s)

    def port(self, inside: int | str) -> tuple[str, int]:
        """(address, port) of the machine where 80 or "53/udp" of the container is published. Raises NotFound."""
        return self._client._do(steps.port(self.id, inside))

    def put(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Write a file; its folder is there."""
        self._client._do(steps.put(self.id, path, data.encode() if isinstance(data, str) else data, mode))

    def get(self, path: str) -> bytes:
        """Read a file."""
        return self._client._do(steps.get(self.id, path))

    @overload
    def logs(
        self, *, stream: Literal[True], stdout: bool = True, stderr: bool = True, tail: int | None = None,
        timestamps: bool = False,
    ) -> Iterator[str]: ...
    @overload
    def logs(
        self, *, stream: Literal[False] = False, stdout: bool = True, stderr: bool = True, tail: int | None = None,
        timestamps: bool = False,
    ) -> str: ...
    def logs(
        self, *, stream: bool = False, stdout: bool = True, stderr: bool = True, tail: int | None = None, timestamps: bool = False
    ) -> str | Iterator[str]:
        """What it has printed; with `stream` its lines as they come, until it ends."""
        target = steps.logs_target(self.id, follow=stream, stdout=stdout, stderr=stderr, tail=tail, timestamps=timestamps)
        lines = self._lines(target)
        return lines if stream else "".join(f"{line}\n" for line in lines)

    def _lines(self, target: str) -> Iterator[str]:
        output = steps.Output(framed=not self.inspect()["Config"]["Tty"])
        with self._client._stream("GET", target) as response:
            for piece in response.pieces():
                yield from output.lines(piece)
        yield from output.last()

    @overload
    def exec(
        self, command: str | Iterable[str], *, stream: Literal[True], env: Mapping[str, str] | None = None, user: str = "",
        workdir: str = "", tty: bool = False, privileged: bool = False,
    ) -> Iterator[str]: ...
    @overload
    def exec(
        self, command: str | Iterable[str], *, stream: Literal[False] = False, check: bool = False,
        input: bytes | str | None = None, env: Mapping[str, str] | None = None,
        user: str = "", workdir: str = "", tty: bool = False, privileged: bool = False,
    ) -> ExecResult: ...
    def exec(
        self, command: str | Iterable[str], *, stream: bool = False, check: bool = False,
        input: bytes | str | None = None,  # noqa: A002 - subprocess.run's word
        env: Mapping[str, str] | None = None, user: str = "", workdir: str = "", tty: bool = False, privileged: bool = False,
    ) -> ExecResult | Iterator[str]:
        """Run a command beside the first; with `stream` the lines that it prints, as they come.

        Raises CommandFailed with `check`, FailedPrecondition when the container does not run.
        """
        words = [command] if isinstance(command, str) else list(command)
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        identity = self._client._do(steps.exec_create(
            self.id, words, variables, User=user, WorkingDir=workdir, Tty=tty, Privileged=privileged,
            AttachStdin=input is not None))
        if stream:
            return self._exec_lines(identity, tty)
        data = input.encode() if isinstance(input, str) else input
        found = {1: b"", 2: b""}
        output = steps.Output(framed=not tty)
        for piece in self._hijacked(identity, tty, data):
            for number, part in output.feed(piece):
                found[number] += part
        code = self._client._do(steps.exec_code(identity))
        out, err = (found[number].decode("utf-8", "replace") for number in (1, 2))
        if check and code:
            raise CommandFailed(words, code, out, err)
        return ExecResult(code, out, err)

    def _exec_lines(self, identity: str, tty: bool) -> Iterator[str]:
        output = steps.Output(framed=not tty)
        for piece in self._hijacked(identity, tty, None):
            yield from output.lines(piece)
        yield from output.last()

    def _hijacked(self, identity: str, tty: bool, data: bytes | None) -> Iterator[bytes]:
        with self._client._stream("POST", f"/exec/{identity}/start", {"Detach": False, "Tty": tty}, upgrade=True) as response:
            sock, early = response.connection.take()
            if data is not None:
                # Beside, because the command may print before it has read all.
                threading.Thread(target=_send, args=(sock, data), daemon=True).start()
            try:
                if early:
                    yield early
                while piece := sock.recv(65536):
                    yield piece
            finally:
                sock.close()


def _send(sock: Any, data: bytes) -> None:
    try:
        sock.sendall(data)
        sock.shutdown(_SHUT_WR)
    except OSError:
        pass  # it ended without reading it


class Containers:
    """The engine's containers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Container:
        """By name or id. Raises NotFound."""
        return Container(self._client, self._client._do(steps.inspect(name))["Id"])

    def list(self, *, all: bool = False, filters: steps.Filters | None = None) -> Sequence[Container]:  # noqa: A002 - docker's word
        """Those that run, or all."""
        return [Container(self._client, each) for each in self._client._do(steps.containers(all, filters))]


class Images:
    """The engine's images."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Image:
        """By name or id. Raises NotFound."""
        return self._client._do(steps.image(name))

    def list(self, *, filters: steps.Filters | None = None) -> Sequence[Image]:
        """All."""
        return self._client._do(steps.images(filters))

    def pull(self, name: str, *, platform: str | None = None) -> Image:
        """Fetch from its registry. Raises NotFound."""
        return self._client._do(steps.pulled(name, platform))

    def tag(self, name: str, new: str) -> None:
        """Give it another name."""
        self._client._do(steps.image_tag(name, new))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it, or the name."""
        self._client._do(steps.image_remove(name, force))

    def load(self, archive: bytes) -> tuple[str, ...]:
        """Load an archive as `save` makes it: the names that are in it."""
        return tuple(self._client._do(steps.image_load(archive)))

    def save(self, *names: str) -> bytes:
        """An archive (tar) of images."""
        return self._client._do(steps.image_save([*names]))


class Volumes:
    """The engine's volumes."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Volume:
        """By name. Raises NotFound."""
        return self._client._do(steps.volume(name))

    def list(self, *, filters: steps.Filters | None = None) -> Sequence[Volume]:
        """All."""
        return self._client._do(steps.volumes(filters))

    def create(
        self, name: str = "", *, driver: str = "local", options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make one; without a name the engine chooses it."""
        return self._client._do(steps.volume_create(name, driver, options or {}, labels or {}))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove it with what is in it. Raises FailedPrecondition while a container has it."""
        self._client._do(steps.volume_remove(name, force))


class Networks:
    """The engine's networks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Network:
        """By name or id. Raises NotFound."""
        return self._client._do(steps.network(name))

    def list(self, *, filters: steps.Filters | None = None) -> Sequence[Network]:
        """All."""
        return self._client._do(steps.networks(filters))

    def create(
        self, name: str, *, driver: str = "bridge", subnet: str = "", internal: bool = False,
        options: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None,
    ) -> Network:
        """Make one. Raises AlreadyExists."""
        return self._client._do(steps.network_create(name, driver, subnet, options or {}, labels or {}, internal))

    def remove(self, name: str) -> None:
        """Remove it. Raises PermissionDenied while containers are on it."""
        self._client._do(steps.network_remove(name))

    def connect(self, name: str, container: Container, *, aliases: Iterable[str] = ()) -> None:
        """Put a container on it."""
        self._client._do(steps.network_act(name, "connect", container.id, EndpointConfig={"Aliases": [*aliases]}))

    def disconnect(self, name: str, container: Container, *, force: bool = False) -> None:
        """Take a container off it."""
        self._client._do(steps.network_act(name, "disconnect", container.id, Force=force))
