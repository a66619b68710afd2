"""ttRPC on the event loop: the daemon's side of it, as a server (events of shims) and as a client (of shims).

Runs in: the daemon. The shims' own side, without asyncio, is boxship.api.ttrpc.
Spec: containerd/ttrpc PROTOCOL.md. A frame is a header of ten bytes and its data:

    u32 length of data | u32 stream | u8 type: 1 request, 2 response, 3 data | u8 flags: 1 remote closed, 2 remote open, 4 no data

A server answers `Response` to what is unary and to what fails, `Data` frames to what streams. Data longer than 4 MiB is skipped
and answered with ResourceExhausted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

from google.protobuf.message import DecodeError

from boxship.api.containerd.call import LEASE_HEADER, TTRPC_NAMESPACE_HEADER, Call
from boxship.api.containerd.services import Containerd, Method, descriptor_of, methods_of
from boxship.api.task import pb
from boxship.api.ttrpc import wire
from boxship.api.ttrpc.wire import DATA, DATA_MAX, HEADER, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE
from boxship.kit.errors import BoxshipError, DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, from_code

log = logging.getLogger("boxship.ttrpc")

CLOSED = "ttrpc: closed"


class Frames(asyncio.Protocol):
    """Cuts what comes in into frames and hands each to `frame`; too long ones to `oversized`."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._frames = wire.Frames()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        # uvloop's are of no class of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        """Of asyncio.Protocol: the peer reads too slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Of asyncio.Protocol."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        for stream, kind, flags, payload in self._frames.feed(data):
            if payload is None:
                self.oversized(stream)
            else:
                self.frame(stream, kind, flags, payload)

    def frame(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        """A whole frame came."""
        raise NotImplementedError

    def oversized(self, stream: int) -> None:
        """A frame that is too long came and was thrown away."""
        raise NotImplementedError

    def send(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        """Queue a frame; nothing happens when the connection is gone."""
        if not self.transport.is_closing():
            self.transport.write(HEADER.pack(len(payload), stream, kind, flags) + payload)

    async def drain(self) -> None:
        """Wait until the peer has taken enough of what was queued."""
        await self._writable.wait()


# --- client ---------------------------------------------------------------------------------------------------------


class Connection(Frames):
    """A client's connection: unary calls, as many at once as one likes. Made by `dial`."""

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._next = 1
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._on_close = on_close
        self.closed = False

    async def call(self, service: str, method: str, request: Any, response: Any, call: Call | None = None) -> Any:
        """One unary call: `request` is a message, `response` the class of the answer.

        Raises the error that the peer answered, Unavailable when the connection is or gets closed, DeadlineExceeded after
        `call.timeout` seconds.
        """
        if self.closed:
            raise Unavailable(CLOSED)
        envelope = pb.ttrpc.Request(service=service, method=method, payload=request.SerializeToString())
        if call is not None:
            if call.namespace:
                envelope.metadata.add(key=TTRPC_NAMESPACE_HEADER, value=call.namespace)
            if call.timeout is not None:
                envelope.timeout_nano = int(call.timeout * 1e9)
        payload = envelope.SerializeToString()
        if len(payload) > DATA_MAX:
            raise ResourceExhausted(f"message length {len(payload)} exceeds maximum message size of {DATA_MAX}")
        stream = self._next
        self._next += 2
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = future
        self.send(stream, REQUEST, 0, payload)
        try:
            if call is None or call.timeout is None:
                data = await future
            else:
                data = await asyncio.wait_for(future, call.timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"{method.lower()}: no answer within {call.timeout if call else 0:g} s") from None
        finally:
            self._waiting.pop(stream, None)
        answer = pb.ttrpc.Response.FromString(data)
        if answer.HasField("status") and answer.status.code != 0:
            raise from_code(answer.status.code, answer.status.message)
        return response.FromString(answer.payload)

    def close(self) -> None:
        """Close the connection; calls that wait fail, `on_close` is called."""
        self.transport.close()

    def abandon(self) -> None:
        """Close the connection without calling `on_close`."""
        self._on_close = None
        self.transport.close()

    def frame(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        """Of Frames."""
        future = self._waiting.get(stream)
        if kind == RESPONSE and future is not None and not future.done():
            future.set_result(payload)

    def oversized(self, stream: int) -> None:
        """Of Frames."""
        future = self._waiting.get(stream)
        if future is not None and not future.done():
            future.set_exception(ResourceExhausted("message length exceeds maximum message size"))

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self.closed = True
        self._writable.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(CLOSED))
        if self._on_close is not None:
            self._on_close()


async def dial(address: str, on_close: Callable[[], None] | None = None) -> Connection:
    """Connect to `unix://PATH`, a path, or (without a slash at its beginning) an abstract socket. Raises Unavailable."""
    path = address.removeprefix("unix://")
    if not path.startswith("/"):
        path = "\0" + path.removeprefix("@").removeprefix("\0")
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_unix_connection(lambda: Connection(on_close), path)
    except OSError as error:
        raise Unavailable(f"dial unix {path}: {(error.strerror or str(error)).lower()}") from None
    return connection


# --- server ---------------------------------------------------------------------------------------------------------


class _Stream:
    """A call with a stream in at least one direction."""

    def __init__(self, open: bool) -> None:  # noqa: A002 - the protocol's word
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.open = open
        if not open:
            self.requests.put_nowait(None)


class _Served(Frames):
    """A client's connection at the server."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._last = 0
        self._streams: dict[int, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._writable.set()
        for task in self._tasks:
            task.cancel()

    def oversized(self, stream: int) -> None:
        self._fail(stream, ResourceExhausted(f"message length exceeds maximum message size of {DATA_MAX}"))

    def _fail(self, stream: int, error: BoxshipError) -> None:
        status = pb.status.Status(code=error.code, message=str(error))
        self.send(stream, RESPONSE, 0, pb.ttrpc.Response(status=status).SerializeToString())

    def frame(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        if kind == REQUEST:
            if stream % 2 == 0 or stream <= self._last:
                self._fail(stream, InvalidArgument("StreamID must be odd for client initiated streams" if stream % 2 == 0 else
                                                   "StreamID cannot be re-used and must increment"))
                return
            self._last = stream
            if flags & (REMOTE_OPEN | REMOTE_CLOSED):
                # Before the call itself begins: its data may be in the same packet.
                self._streams[stream] = _Stream(bool(flags & REMOTE_OPEN))
            task = asyncio.get_running_loop().create_task(self._serve(stream, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == DATA:
            running = self._streams.get(stream)
            if running is None or not running.open:
                self._fail(stream, InvalidArgument("StreamID is no longer active"))
                return
            if not flags & NO_DATA:
                running.requests.put_nowait(payload)
            if flags & REMOTE_CLOSED:
                running.open = False
                running.requests.put_nowait(None)

    async def _serve(self, stream: int, payload: bytes) -> None:
        where = "request"
        try:
            envelope = pb.ttrpc.Request.FromString(payload)
            where = f"{envelope.service}/{envelope.method}"
            function, method = self._server.find(envelope.service, envelope.method)
            call = _call_of(envelope.metadata)
            limit = envelope.timeout_nano / 1e9 if envelope.timeout_nano > 0 else None
            async with asyncio.timeout(limit):
                if method.client_streaming or method.server_streaming:
                    await self._streaming(stream, function, method, envelope.payload, call)
                    return
                answer = await function(method.request.FromString(envelope.payload), call)
            data = pb.ttrpc.Response(payload=answer.SerializeToString()).SerializeToString()
            if len(data) > DATA_MAX:
                raise ResourceExhausted(f"message length {len(data)} exceeds maximum message size of {DATA_MAX}")
            self.send(stream, RESPONSE, 0, data)
        except TimeoutError:
            self._fail(stream, DeadlineExceeded("context deadline exceeded"))
        except DecodeError as error:
            self._fail(stream, InvalidArgument(f"unmarshal: {error}"))
        except Exception as error:  # noqa: BLE001 - reported to the peer
            self._fail(stream, self._server.as_error(error, where))
        finally:
            self._streams.pop(stream, None)

    async def _streaming(
        self, stream: int, function: Callable[..., Any], method: Method, payload: bytes, call: Call,
    ) -> None:
        running = self._streams.setdefault(stream, _Stream(False))

        async def requests() -> AsyncIterator[Any]:
            while (data := await running.requests.get()) is not None:
                yield method.request.FromString(data)

        given = requests() if method.client_streaming else method.request.FromString(payload)
        if not method.server_streaming:
            answer = await function(given, call)
            self.send(stream, RESPONSE, 0, pb.ttrpc.Response(payload=answer.SerializeToString()).SerializeToString())
            return
        responses = function(given, call)
        try:
            async for response in responses:
                self.send(stream, DATA, 0, response.SerializeToString())
                await self.drain()
        finally:
            await responses.aclose()
        self.send(stream, DATA, REMOTE_CLOSED | NO_DATA, b"")


def _call_of(metadata: Iterable[Any]) -> Call:
    namespace = lease = ""
    for pair in metadata:
        if pair.key == TTRPC_NAMESPACE_HEADER:
            namespace = pair.value
        elif pair.key == LEASE_HEADER:
            lease = pair.value
    return Call(namespace, lease)


class Server:
    """A ttRPC server of those services of a bundle that are named."""

    def __init__(
        self, containerd: Containerd, attributes: Iterable[str], as_error: Callable[[BaseException, str], BoxshipError],
    ) -> None:
        self._methods: dict[tuple[str, str], tuple[Callable[..., Any], Method]] = {}
        self._services = set()
        self.as_error = as_error
        self.connections: set[_Served] = set()
        self._server: asyncio.Server | None = None
        for attribute in attributes:
            descriptor = descriptor_of(attribute)
            self._services.add(descriptor.full_name)
            for method in methods_of(descriptor):
                function = getattr(getattr(containerd, attribute), method.name, None)
                if function is not None:
                    self._methods[descriptor.full_name, method.name] = (function, method)

    def find(self, service: str, method: str) -> tuple[Callable[..., Any], Method]:
        """The function that answers; raises Unsupported in the words of Go's server."""
        found = self._methods.get((service, method))
        if found is None:
            text = f"method {method}" if service in self._services else f"service {service}"
            raise from_code(12, text)
        return found

    async def listen(self, path: str, mode: int = 0o660, uid: int = -1, gid: int = -1) -> None:
        """Answer on the Unix socket `path`, in place of what is there. Raises OSError."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        before = os.umask(0o777 & ~mode)
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: _Served(self), path)
        finally:
            os.umask(before)
        os.chmod(path, mode)
        if uid >= 0 or gid >= 0:
            os.chown(path, uid, gid)

    async def serve(self, listener: socket.socket) -> None:
        """Answer on a socket that listens already."""
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Served(self), sock=listener)

    async def stop(self) -> None:
        """Take no new connections, and close those there are."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.transport.close()
