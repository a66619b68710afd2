"""The streaming service: streams that a client opens under a name, to be found again by the service that is told the name.

Runs in: the daemon's event loop.
Spec: containerd API, services/streaming/v1 and types/transfer/streaming; containerd docs/transfer.md. The client's first message
is StreamInit, which is answered by an empty one when the stream can be found; what both sides send after that is theirs.

Bytes travel as Data messages, of which the receiver allows so many bytes by WindowUpdate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from boxship.api.any import pack, unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.kit.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable

WINDOW = 1 << 20
"""Bytes that a sender may be ahead of us."""
DATA_MAX = 32 << 10
"""Bytes of one Data message that we send, as containerd's clients expect."""

_WAITING = 16
_INIT_S = 10.0


class _Channel:
    """A short queue with an end. One side puts, the other takes; whoever has to wait is woken by the other or by the end."""

    def __init__(self) -> None:
        self._values: deque[AnyMessage] = deque()
        self._ended = False
        self._taker: asyncio.Future[None] | None = None
        self._putter: asyncio.Future[None] | None = None

    async def put(self, value: AnyMessage) -> bool:
        """False when it has ended and nobody takes any more."""
        while len(self._values) >= _WAITING and not self._ended:
            self._putter = asyncio.get_running_loop().create_future()
            await self._putter
        if self._ended:
            return False
        self._values.append(value)
        _wake(self._taker)
        return True

    async def take(self) -> AnyMessage | None:
        """None at the end, after everything that was put before."""
        while not self._values:
            if self._ended:
                return None
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        _wake(self._putter)
        return self._values.popleft()

    def end(self) -> None:
        self._ended = True
        _wake(self._taker)
        _wake(self._putter)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class Stream:
    """The server's end of one stream."""

    def __init__(self) -> None:
        self._incoming = _Channel()
        self._outgoing = _Channel()

    async def send(self, message: Message) -> None:
        """Send a message. Raises Unavailable when the stream is closed, by whichever side."""
        if not await self._outgoing.put(pack(message)):
            raise Unavailable("the stream is closed")

    async def receive(self) -> Message | None:
        """The client's next message; None when it sends no more. One of an unknown type is passed over."""
        while (value := await self._incoming.take()) is not None:
            try:
                message = unpack(value)
            except DecodeError:
                raise InvalidArgument(f"a message on the stream is no {value.type_url}") from None
            if message is not None:
                return message
        return None

    def close(self) -> None:
        """End the stream; what was sent before still goes out."""
        self._outgoing.end()
        self._incoming.end()

    async def serve(self, requests: AsyncIterator[AnyMessage]) -> AsyncIterator[AnyMessage]:
        """For the service: take what the client sends, yield what goes to it, until the stream is closed."""

        async def pump() -> None:
            try:
                async for request in requests:
                    if not await self._incoming.put(request):
                        return
            finally:
                # The client's end is no end of ours: a sender of bytes closes its side and waits.
                self._incoming.end()

        pumping = asyncio.ensure_future(pump())
        try:
            while (message := await self._outgoing.take()) is not None:
                yield message
        finally:
            self.close()
            pumping.cancel()


class Streams:
    """The streams that are open, by namespace and name."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], Stream] = {}

    def get(self, name: str, call: Call) -> Stream:
        """Raises NotFound."""
        stream = self._streams.get((call.namespace, name))
        if stream is None:
            raise NotFound(f'stream "{name}" not found: not found')
        return stream

    def register(self, name: str, call: Call) -> Stream:
        """A new stream. Raises AlreadyExists."""
        if (call.namespace, name) in self._streams:
            raise AlreadyExists(f'stream "{name}": already exists')
        stream = self._streams[call.namespace, name] = Stream()
        return stream

    def remove(self, name: str, call: Call) -> None:
        """Forget a stream that has ended."""
        self._streams.pop((call.namespace, name), None)


class Streaming:
    """containerd.services.streaming.v1.Streaming."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def Stream(self, requests: AsyncIterator[AnyMessage], call: Call) -> AsyncIterator[AnyMessage]:
        """Open a stream and keep it until either side ends it."""
        try:
            async with asyncio.timeout(_INIT_S):
                first = await anext(requests)
            start = unpack(first)
        except (StopAsyncIteration, TimeoutError, DecodeError):
            start = None
        if not isinstance(start, pb.streaming.StreamInit) or not start.id:
            raise InvalidArgument("the first message of a stream must be StreamInit: invalid argument")
        stream = self._streams.register(start.id, call)
        try:
            yield pack(Empty())
            async for message in stream.serve(requests):
                yield message
        finally:
            self._streams.remove(start.id, call)


async def received(stream: Stream) -> AsyncIterator[bytes]:
    """The bytes that the client sends, until it ends its side."""
    allowed = 0
    while True:
        if allowed <= WINDOW // 2:
            try:
                await stream.send(pb.transfer_streaming.WindowUpdate(update=WINDOW))
            except Unavailable:
                # What the client sent before it left is still to be read.
                pass
            allowed += WINDOW
        message = await stream.receive()
        if message is None:
            return
        if isinstance(message, pb.transfer_streaming.Data):
            allowed -= len(message.data)
            yield message.data


class ByteSender:
    """Sends bytes to a client, no more than it allows."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._allowed = 0
        self._more = asyncio.Event()
        self._updates = asyncio.ensure_future(self._take_updates())

    async def write(self, data: bytes) -> None:
        """Raises Unavailable when the client has gone."""
        view = memoryview(data)
        while view:
            while self._allowed <= 0:
                if self._updates.done():
                    raise Unavailable("the client has closed the stream")
                self._more.clear()
                more = asyncio.ensure_future(self._more.wait())
                await asyncio.wait([more, self._updates], return_when=asyncio.FIRST_COMPLETED)
                more.cancel()
            size = min(len(view), DATA_MAX, self._allowed)
            await self._stream.send(pb.transfer_streaming.Data(data=bytes(view[:size])))
            self._allowed -= size
            view = view[size:]

    def close(self) -> None:
        """The end of the bytes."""
        self._updates.cancel()
        self._stream.close()

    async def _take_updates(self) -> None:
        while (message := await self._stream.receive()) is not None:
            if isinstance(message, pb.transfer_streaming.WindowUpdate):
                self._allowed += message.update
                self._more.set()
