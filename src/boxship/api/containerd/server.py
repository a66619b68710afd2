"""The server side of containerd's gRPC API: services of this process on a Unix socket.

Runs in: the daemon, on its event loop.
Spec: containerd API v1; grpc.health.v1; messages up to 16 MiB each way. Errors of boxship.kit.errors become gRPC codes.
Not here: ttRPC (boxship.api.containerd.ttrpc), and what the services do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from boxship.api.containerd import pb
from boxship.api.containerd.call import LEASE_HEADER, NAMESPACE_HEADER, Call
from boxship.api.containerd.services import Containerd, Method, Missing, descriptor_of, methods_of
from boxship.api.grpc import server as grpc
from boxship.api.grpc.server import Stream
from boxship.kit.errors import BoxshipError, Internal, NotFound, from_os_error

log = logging.getLogger("boxship.grpc")
CODES = ("OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists", "PermissionDenied",
         "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented", "Internal", "Unavailable",
         "DataLoss", "Unauthenticated")
"""By number, as Go's metrics have them."""
TTRPC_ONLY = {"ttrpc_events"}
_LOOK_S = 0.01
_BACKLOG = 1024


class Observer(Protocol):
    """Is told of every call, for metrics and spans. `kind` is unary, client_stream, server_stream or bidi_stream."""

    def started(self, kind: str, service: str, method: str) -> object:
        """A call came in; what is returned is handed to `handled`."""

    def handled(self, token: object, kind: str, service: str, method: str, code: str) -> None:
        """The call was answered with the gRPC code of that name (`OK`, `NotFound`, as Go writes them)."""


class _Silent:
    def started(self, kind: str, service: str, method: str) -> object:
        return None

    def handled(self, token: object, kind: str, service: str, method: str, code: str) -> None:
        return None


def as_error(error: BaseException, where: str) -> BoxshipError:
    """What the peer is told about an exception of a service; one that is not ours is logged with its trace."""
    if isinstance(error, BoxshipError):
        return error
    if isinstance(error, OSError):
        log.warning("%s failed", where, exc_info=error)
        return from_os_error(error, where.rpartition("/")[2].lower())
    log.error("%s failed", where, exc_info=error)
    return BoxshipError(f"{type(error).__name__}: {error}")


def code_name(code: int) -> str:
    """The name of a gRPC code as Go's metrics have it: `NotFound`, `OK`."""
    return CODES[code]


def _call_of(stream: Stream) -> Call:
    headers = stream.headers
    return Call(headers.get(NAMESPACE_HEADER, ""), headers.get(LEASE_HEADER, ""), agent=headers.get("user-agent", ""))


def _method(function: Callable[..., Any], service: str, method: Method, observer: Observer) -> grpc.Method:
    kind = {
        (False, False): "unary", (False, True): "server_stream", (True, False): "client_stream", (True, True): "bidi_stream",
    }[method.client_streaming, method.server_streaming]
    where = f"{service}/{method.name}"
    name = method.name

    def decode(message: bytes) -> Any:
        try:
            return method.request.FromString(message)
        except DecodeError:
            raise Internal(f"{where}: the request is no {method.request.DESCRIPTOR.name}") from None

    async def requests(stream: Stream) -> AsyncIterator[Any]:
        while (message := await stream.receive()) is not None:
            yield decode(message)

    def request(stream: Stream) -> Any:
        if method.client_streaming:
            return requests(stream)
        if not stream.messages:
            raise Internal(f"{where}: there is no request")
        return decode(stream.messages.popleft())

    async def answered(stream: Stream, work: Callable[[Stream], Awaitable[None]]) -> None:
        token = observer.started(kind, service, name)
        try:
            await work(stream)
        except (asyncio.CancelledError, GeneratorExit):
            observer.handled(token, kind, service, name, "Canceled")
            raise
        except BaseException as error:  # noqa: BLE001 - reported to the peer
            known = as_error(error, where)
            observer.handled(token, kind, service, name, code_name(known.code))
            stream.fail(known.code, str(known))
        else:
            observer.handled(token, kind, service, name, "OK")
            stream.finish()

    async def one(stream: Stream) -> None:
        response = await function(request(stream), _call_of(stream))
        stream.send(response.SerializeToString())

    async def several(stream: Stream) -> None:
        responses = function(request(stream), _call_of(stream))
        try:
            async for response in responses:
                stream.send(response.SerializeToString())
                if stream.is_behind:
                    await stream.sent()
        finally:
            # What a generator of a service holds (a subscription, a lock) ends with the call and not with the garbage collector.
            if hasattr(responses, "aclose"):
                await responses.aclose()

    work = several if method.server_streaming else one
    return grpc.Method(lambda stream: answered(stream, work), at_end=not method.client_streaming)


class Health:
    """grpc.health.v1: the server and each of its services are there, from the first answer to `stop`."""

    def __init__(self, services: set[str]) -> None:
        self._services = services | {""}
        self._ended = asyncio.Event()

    def stop(self) -> None:
        """Tell those who watch that the server goes."""
        self._ended.set()

    def _status(self) -> Any:
        states = pb.health.HealthCheckResponse
        return states.NOT_SERVING if self._ended.is_set() else states.SERVING

    async def Check(self, request: Any, call: Call) -> Any:
        """SERVING for the server (an empty name) and its services; raises NotFound for another name."""
        if request.service not in self._services:
            raise NotFound("unknown service")
        return pb.health.HealthCheckResponse(status=self._status())

    async def List(self, request: Any, call: Call) -> Any:
        """The state of every service."""
        return pb.health.HealthListResponse(
            statuses={name: pb.health.HealthCheckResponse(status=self._status()) for name in self._services})

    async def Watch(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """The state now, and once more when the server stops."""
        if request.service not in self._services:
            yield pb.health.HealthCheckResponse(status=pb.health.HealthCheckResponse.SERVICE_UNKNOWN)
        else:
            yield pb.health.HealthCheckResponse(status=self._status())
        await self._ended.wait()
        yield pb.health.HealthCheckResponse(status=self._status())


class Server:
    """A gRPC server of a bundle of services on Unix sockets."""

    def __init__(self, containerd: Containerd, observer: Observer | None = None) -> None:
        self._methods: dict[str, grpc.Method] = {}
        self._services = {descriptor_of(attribute).full_name for attribute in containerd.present()} | {"grpc.health.v1.Health"}
        self._connections: set[grpc.Connection] = set()
        self._listeners: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self.health = Health(self._services)
        for attribute in containerd.present():
            if attribute not in TTRPC_ONLY:
                self._add(attribute, getattr(containerd, attribute), observer or _Silent())
        if isinstance(containerd.health, Missing):
            self._add("health", self.health, observer or _Silent())

    def _add(self, attribute: str, service: object, observer: Observer) -> None:
        descriptor = descriptor_of(attribute)
        for method in methods_of(descriptor):
            function = getattr(service, method.name, None)
            if function is not None:
                path = f"/{descriptor.full_name}/{method.name}"
                self._methods[path] = _method(function, descriptor.full_name, method, observer)

    def _find(self, path: str) -> grpc.Method:
        return self._methods.get(path) or self._unknown(path)

    def _unknown(self, path: str) -> grpc.Method:
        """Answers what no service takes, in the words of Go's server, which clients look for."""
        service, _, method = path.lstrip("/").rpartition("/")
        text = f"unknown method {method} for service {service}" if service in self._services else f"unknown service {service}"

        async def answer(stream: Stream) -> None:
            stream.fail(grpc.UNIMPLEMENTED, text)

        return grpc.Method(answer, at_end=False)

    def listen(self, path: str, mode: int = 0o660, uid: int = -1, gid: int = -1) -> None:
        """Bind the Unix socket `path` in place of what is there; call before `start`. Raises OSError.

        The socket has `mode` from its first moment on.
        """
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.umask(before)
        self.take(listener)
        os.chmod(path, mode)
        if uid >= 0 or gid >= 0:
            os.chown(path, uid, gid)

    def take(self, listener: socket.socket) -> None:
        """Answer at a socket that is bound; call before `start`."""
        listener.listen(_BACKLOG)
        self._listeners.append(listener)

    async def start(self) -> None:
        """Begin to answer."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            self._servers.append(await loop.create_unix_server(
                lambda: grpc.Connection(self._find, self._connections), sock=listener, backlog=_BACKLOG))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, give those that run `grace_s` seconds, then end them."""
        self.health.stop()
        for server in self._servers:
            server.close()
        end = asyncio.get_running_loop().time() + grace_s
        for connection in list(self._connections):
            connection.leave()
        while any(connection.streams for connection in self._connections) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_LOOK_S)
        for connection in list(self._connections):
            await connection.abort()
