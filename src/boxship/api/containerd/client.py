"""A client of containerd's gRPC API, ours or the real one, with the methods that the services have in-process.

Runs in: the daemon (a real containerd by address), tools and tests. An event loop must run.
Spec: containerd API v1; messages up to 16 MiB each way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from boxship.api.containerd.call import LEASE_HEADER, NAMESPACE_HEADER, Call
from boxship.api.containerd.services import SERVICES, Containerd, Method, descriptor_of, methods_of
from boxship.api.grpc.server import MESSAGE_MAX
from boxship.kit.errors import BoxshipError, from_code

OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.max_send_message_length", MESSAGE_MAX),
    # Paths of sockets are no host names, and some servers refuse what is made of them.
    ("grpc.default_authority", "localhost"),
    # A proxy of the environment is for other things than a socket beside us.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 3000),
]


def connect(address: str) -> Containerd:
    """A bundle of services at `address` (a path, `unix://PATH`, or HOST:PORT), to be used in `async with`.

    Connects at the first call; calls raise the classes of boxship.kit.errors, Unavailable when nobody listens.
    """
    target = f"unix:{address}" if address.startswith("/") else address
    channel = grpc.aio.insecure_channel(target, options=OPTIONS)
    services = {attribute: stub(channel, attribute) for attribute in SERVICES}

    async def close() -> None:
        await channel.close()

    return Containerd(services, close)


class Stub:
    """A service at the other end of a channel; its methods are attributes made at construction."""


def stub(channel: grpc.aio.Channel, attribute: str) -> Stub:
    """The client of the service `attribute`."""
    service = descriptor_of(attribute)
    made = Stub()
    for method in methods_of(service):
        setattr(made, method.name, _method(channel, f"/{service.full_name}/{method.name}", method))
    return made


def _metadata(call: Call | None) -> list[tuple[str, str]]:
    if call is None:
        return []
    pairs = [(NAMESPACE_HEADER, call.namespace), (LEASE_HEADER, call.lease)]
    return [pair for pair in pairs if pair[1]]


def _error(error: grpc.aio.AioRpcError) -> BoxshipError:
    return from_code(error.code().value[0], error.details() or error.code().name.lower().replace("_", " "))


def _method(channel: grpc.aio.Channel, path: str, method: Method) -> Callable[..., Any]:
    kinds = {
        (False, False): channel.unary_unary, (False, True): channel.unary_stream,
        (True, False): channel.stream_unary, (True, True): channel.stream_stream,
    }
    remote = kinds[method.client_streaming, method.server_streaming](
        path, request_serializer=method.request.SerializeToString, response_deserializer=method.response.FromString)

    async def single(request: Any, call: Call | None = None) -> Any:
        try:
            return await remote(request, metadata=_metadata(call), timeout=call.timeout if call else None)
        except grpc.aio.AioRpcError as error:
            raise _error(error) from None

    async def stream(request: Any, call: Call | None = None) -> AsyncIterator[Any]:
        running = remote(request, metadata=_metadata(call), timeout=call.timeout if call else None)
        try:
            async for response in running:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _error(error) from None
        finally:
            running.cancel()

    chosen: Callable[..., Awaitable[Any] | AsyncIterator[Any]] = stream if method.server_streaming else single
    chosen.__name__ = method.name
    return chosen
