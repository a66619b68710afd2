"""The server side of containerd's gRPC API: services of this process on a Unix socket.

Runs in: the daemon, on its event loop.
Spec: containerd API v1; grpc.health.v1; messages up to 16 MiB each way. Errors of boxship.kit.errors become gRPC codes.
Not here: ttRPC (boxship.api.containerd.ttrpc), and what the services do.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from boxship.api.containerd import pb
from boxship.api.containerd.call import LEASE_HEADER, NAMESPACE_HEADER, Call
from boxship.api.containerd.client import MESSAGE_MAX
from boxship.api.containerd.services import Containerd, Method, Missing, descriptor_of, methods_of
from boxship.kit.errors import BoxshipError, NotFound, from_os_error

log = logging.getLogger("boxship.grpc")
CODES = {code.value[0]: code for code in grpc.StatusCode}
TTRPC_ONLY = {"ttrpc_events"}


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
    name = CODES[code].name
    special = {"OK": "OK", "CANCELLED": "Canceled"}
    return special.get(name) or "".join(part.capitalize() for part in name.split("_"))


def _call_of(context: grpc.aio.ServicerContext[Any, Any]) -> Call:
    namespace = lease = agent = ""
    for key, value in context.invocation_metadata() or ():
        if key == NAMESPACE_HEADER:
            namespace = value
        elif key == LEASE_HEADER:
            lease = value
        elif key == "user-agent":
            agent = value
    return Call(namespace, lease, agent=agent)


def _handler(function: Callable[..., Any], service: str, method: Method, observer: Observer) -> grpc.RpcMethodHandler[Any, Any]:
    kinds = {
        (False, False): ("unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("server_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("client_stream", grpc.stream_unary_rpc_method_handler),
        (True, True): ("bidi_stream", grpc.stream_stream_rpc_method_handler),
    }
    kind, make = kinds[method.client_streaming, method.server_streaming]
    where = f"{service}/{method.name}"

    async def failed(error: BaseException, context: grpc.aio.ServicerContext[Any, Any], token: object) -> None:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            observer.handled(token, kind, service, method.name, "Canceled")
            raise error
        if isinstance(error, grpc.aio.AbortError):
            raise error
        known = as_error(error, where)
        observer.handled(token, kind, service, method.name, code_name(known.code))
        await context.abort(CODES[known.code], str(known))

    async def single(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        token = observer.started(kind, service, method.name)
        try:
            response = await function(request, _call_of(context))
        except BaseException as error:  # noqa: BLE001 - reported to the peer
            await failed(error, context, token)
            return None
        observer.handled(token, kind, service, method.name, "OK")
        return response

    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        token = observer.started(kind, service, method.name)
        responses = function(request, _call_of(context))
        try:
            async for response in responses:
                yield response
        except BaseException as error:  # noqa: BLE001 - reported to the peer
            await failed(error, context, token)
            return
        finally:
            # What a generator of a service holds (a subscription, a lock) ends with the call and not with the garbage collector.
            if hasattr(responses, "aclose"):
                await responses.aclose()
        observer.handled(token, kind, service, method.name, "OK")

    return make(
        stream if method.server_streaming else single,
        request_deserializer=method.request.FromString, response_serializer=method.response.SerializeToString,
    )


class _Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers what no service takes, in the words of Go's server, which clients look for."""

    def __init__(self, services: set[str]) -> None:
        self._services = services

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        service, _, method = details.method.lstrip("/").partition("/")
        text = f"unknown method {method} for service {service}" if service in self._services else f"unknown service {service}"

        async def answer(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

        return grpc.stream_stream_rpc_method_handler(answer)


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
        options = [
            ("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.max_send_message_length", MESSAGE_MAX),
            # One server a socket: a second one must fail, not share it.
            ("grpc.so_reuseport", 0),
            # Go's clients ping while calls are idle; by default the C server would end their connections for it.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000), ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", 0),
        ]
        self._server = grpc.aio.server(options=options)
        present = {descriptor_of(attribute).full_name for attribute in containerd.present()} | {"grpc.health.v1.Health"}
        self.health = Health(present)
        for attribute in containerd.present():
            if attribute not in TTRPC_ONLY:
                self._add(attribute, getattr(containerd, attribute), observer or _Silent())
        if isinstance(containerd.health, Missing):
            self._add("health", self.health, observer or _Silent())
        self._server.add_generic_rpc_handlers((_Unknown(present),))

    def _add(self, attribute: str, service: object, observer: Observer) -> None:
        descriptor = descriptor_of(attribute)
        handlers = {}
        for method in methods_of(descriptor):
            function = getattr(service, method.name, None)
            if function is not None:
                handlers[method.name] = _handler(function, descriptor.full_name, method, observer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))

    def listen(self, path: str, mode: int = 0o660, uid: int = -1, gid: int = -1) -> None:
        """Bind the Unix socket `path` in place of what is there; call before `start`. Raises OSError.

        The socket has `mode` from its first moment on.
        """
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        before = os.umask(0o777 & ~mode)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {path}: {error}") from None
        finally:
            os.umask(before)
        os.chmod(path, mode)
        if uid >= 0 or gid >= 0:
            os.chown(path, uid, gid)

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, give those that run `grace_s` seconds, then end them."""
        self.health.stop()
        await self._server.stop(grace_s)
