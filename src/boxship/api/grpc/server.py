"""A gRPC server on asyncio: HTTP/2 with prior knowledge, as containerd's clients speak it on a Unix socket.

Runs in: the daemon, on its event loop.
Spec: RFC 9113; gRPC over HTTP/2. No TLS, no compression of messages (it is refused as unimplemented), no priorities, no push.

grpcio's server takes 0.5 ms of two threads for each call, 0.2 ms for each message of a stream, and 10 MiB of memory; a `ctr run`
makes 36 calls.

What a peer can make this process keep is bounded: `WINDOW` bytes of a call's messages that nobody reads, one message of at most
`MESSAGE_MAX`, `STREAMS_MAX` calls, one header block, and what waits to be written (nothing is read while that is much).

Not here: services (`boxship.api.containerd.server`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable
from struct import Struct
from typing import NamedTuple

from boxship.api.grpc import hpack_block

__all__ = ["MESSAGE_MAX", "Connection", "Method", "Stream"]

log = logging.getLogger("boxship.grpc")

MESSAGE_MAX = 16 << 20
WINDOW = 4 << 20
STREAMS_MAX = 1 << 16
FRAME_MAX = 1 << 14
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 0x20
_MAX_CONCURRENT, _INITIAL_WINDOW, _MAX_FRAME, _HEADER_LIST = 3, 4, 5, 6
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL, STREAM_CLOSED, FRAME_SIZE, REFUSED, CANCEL, COMPRESSION = 0, 1, 3, 5, 6, 7, 8, 9
CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 1, 4, 8, 12, 13

_DEFAULT_WINDOW = (1 << 16) - 1
_WINDOW_LAST = (1 << 31) - 1
_SETTING = Struct(">HI")
_WORD = Struct(">I")
_PIECE = 1 << 16
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])\Z")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, _WORD.pack(stream), payload)


class _Broken(Exception):
    """The peer broke the protocol: the end of the connection."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Method(NamedTuple):
    """What answers calls of one path: `answer` is begun when the first message can be read, with `at_end` when the last can."""

    answer: Callable[[Stream], Awaitable[None]]
    at_end: bool


class Stream:
    """One call.

    Attributes:
        headers: of the request, by name.
        messages: those that have come and were not taken.
        ended_in, ended_out: whether the peer, and we, have said all.
    """

    __slots__ = ("_buffer", "_connection", "_owed", "_room", "_started", "_timer", "_waiting", "ended_in", "ended_out", "headers",
                 "id", "messages", "method", "out", "task", "trailers", "window")

    def __init__(self, connection: Connection, id: int, headers: dict[str, str], method: Method) -> None:  # noqa: A002
        self._connection = connection
        self.id = id
        self.headers = headers
        self.method = method
        self.messages: deque[bytes] = deque()
        self.ended_in = self.ended_out = False
        self.window = connection.initial_window
        self.out: deque[memoryview] = deque()
        self.trailers = b""
        self.task: asyncio.Task[None] | None = None
        self._buffer = bytearray()
        self._owed = 0
        self._started = False
        self._waiting: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- in

    async def receive(self) -> bytes | None:
        """The next message, None after the last."""
        while not self.messages:
            if self.ended_in:
                return None
            self._credit()
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        message = self.messages.popleft()
        if not self.messages:
            self._credit()
        return message

    def feed(self, data: bytes, size: int) -> None:
        """Bytes of messages, of a frame that counts as `size`."""
        self._owed += size
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 5:
            end = 5 + int.from_bytes(buffer[1:5], "big")
            if buffer[0]:
                self.fail(UNIMPLEMENTED, "compressed messages are not implemented")
                return
            if end > MESSAGE_MAX + 5:
                self.fail(RESOURCE_EXHAUSTED, f"received message larger than max ({end - 5} vs. {MESSAGE_MAX})")
                return
            if len(buffer) < end:
                break
            self.messages.append(bytes(buffer[5:end]))
            del buffer[:end]
        if self.messages:
            self._wake()
            if self._owed > 2 * WINDOW:
                raise _Broken(FLOW_CONTROL, "more than the window of a stream")
        elif self._owed > WINDOW // 2:
            self._credit()  # a message that is larger than the window

    def end_in(self) -> None:
        """Nothing more comes."""
        self.ended_in = True
        if self._buffer:
            self.fail(INTERNAL, "the last message is not whole")
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _credit(self) -> None:
        if self._owed and not self.ended_in:
            self._connection.write(frame(WINDOW_UPDATE, 0, self.id, _WORD.pack(self._owed)))
            self._owed = 0

    # --- out

    def send(self, message: bytes) -> None:
        """A message of the answer; `sent` waits until there is room for more."""
        if not self.ended_out:
            self._start()
            self._connection.send(self, b"\0" + _WORD.pack(len(message)) + message)

    @property
    def is_behind(self) -> bool:
        """Whether the peer does not take what was sent."""
        return bool(self.out) or self._connection.is_full

    async def sent(self) -> None:
        """Wait while it `is_behind`."""
        while self.is_behind and not self.ended_out:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def room(self) -> None:
        """Let `sent` look again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def finish(self) -> None:
        """The answer is whole."""
        self._start()
        self._finish(hpack_block.OK)

    def fail(self, code: int, message: str) -> None:
        """The answer is an error; nothing happens when it is whole already. What of the request comes later is of no interest."""
        if self.ended_out:
            return
        block = hpack_block.failure(code, message)
        self._finish(block if self._started else hpack_block.ANSWER + block)

    def refuse(self, status: int) -> None:
        """Answer as HTTP does."""
        self._finish(hpack_block.refusal(status))

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._connection.write(frame(HEADERS, END_HEADERS, self.id, hpack_block.ANSWER))

    def _finish(self, block: bytes) -> None:
        if self.ended_out:
            return
        self.ended_out = True
        self.trailers = _headers(self.id, block)
        if not self.out:
            self._connection.done(self)

    # --- the end

    def limit(self, text: str) -> None:
        """The header grpc-timeout."""
        found = _TIMEOUT.match(text)
        if found is not None:
            delay = int(found[1]) * _UNITS[found[2]]
            self._timer = asyncio.get_running_loop().call_later(delay, self._late)

    def _late(self) -> None:
        self.fail(DEADLINE_EXCEEDED, "context deadline exceeded")
        self.cancel()

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """It is over."""
        self.ended_in = self.ended_out = True
        self.out.clear()
        self._wake()
        self.room()
        if self._timer is not None:
            self._timer.cancel()


def _headers(stream: int, block: bytes) -> bytes:
    """The frames of a block that ends the stream."""
    if len(block) <= FRAME_MAX:
        return frame(HEADERS, END_HEADERS | END_STREAM, stream, block)
    parts = [block[at : at + FRAME_MAX] for at in range(0, len(block), FRAME_MAX)]
    frames = [frame(CONTINUATION if number else HEADERS, 0 if number else END_STREAM, stream, part)
              for number, part in enumerate(parts[:-1])]
    return b"".join([*frames, frame(CONTINUATION, END_HEADERS, stream, parts[-1])])


class Connection(asyncio.Protocol):
    """One client's connection.

    Attributes:
        is_full: whether the peer does not take what is written.
        initial_window: of streams, as the peer wants it.
    """

    def __init__(self, find: Callable[[str], Method], connections: set[Connection]) -> None:
        """`find` gives the method for a path, also for one that is not known; `connections` is where it is while it is open."""
        self._find = find
        self._connections = connections
        self.streams: dict[int, Stream] = {}
        self.is_full = False
        self.initial_window = _DEFAULT_WINDOW
        self._window = _DEFAULT_WINDOW
        self._frame_max = FRAME_MAX
        self._decoder = hpack_block.Decoder()
        self._rest = PREFACE[:0]
        self._greeted = False
        self._last = 0
        self._block: tuple[int, int, bytes] | None = None
        """A header block that is not whole: stream, flags, what there is."""
        self._owed = 0
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._outbox_size = 0

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self._connections.add(self)
        settings = [(_MAX_CONCURRENT, STREAMS_MAX), (_INITIAL_WINDOW, WINDOW), (_HEADER_LIST, hpack_block.BLOCK_MAX)]
        self.write(frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in settings))
                   + frame(WINDOW_UPDATE, 0, 0, _WORD.pack(WINDOW)))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        offset, size = 0, len(data)
        try:
            if not self._greeted:
                if not data.startswith(PREFACE[:size]):
                    raise _Broken(PROTOCOL_ERROR, "no HTTP/2")
                if size < len(PREFACE):
                    self._rest = data
                    return
                self._greeted = True
                offset = len(PREFACE)
            while size - offset >= 9:
                length = int.from_bytes(data[offset : offset + 3], "big")
                if length > FRAME_MAX:
                    raise _Broken(FRAME_SIZE, "a frame that is too long")
                end = offset + 9 + length
                if end > size:
                    break
                stream = _WORD.unpack_from(data, offset + 5)[0] & 0x7FFFFFFF
                self._frame(data[offset + 3], data[offset + 4], stream, data[offset + 9 : end])
                offset = end
            self._rest = data[offset:]
        except _Broken as error:
            log.debug("connection ended: %s", error)
            self._rest = b""
            self.write(frame(GOAWAY, 0, 0, _WORD.pack(self._last) + _WORD.pack(error.code) + str(error).encode()))
            self._end()

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        for stream in list(self.streams.values()):
            stream.close()
            stream.cancel()
        self.streams.clear()

    def pause_writing(self) -> None:
        self.is_full = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        for stream in list(self.streams.values()):
            stream.room()

    # --- frames

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise _Broken(PROTOCOL_ERROR, "a header block is not continued")
        if kind == DATA:
            self._data(flags, number, payload)
        elif kind == HEADERS:
            payload = _unpadded(flags, payload)
            if flags & PRIORITIZED:
                payload = payload[5:]
            self._headers(number, flags, payload)
        elif kind == CONTINUATION:
            if self._block is None or self._block[0] != number:
                raise _Broken(PROTOCOL_ERROR, "nothing to continue")
            self._headers(number, self._block[1] | flags & END_HEADERS, self._block[2] + payload)
        elif kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING:
            if len(payload) != 8:
                raise _Broken(FRAME_SIZE, "a ping has 8 bytes")
            if not flags & ACK:
                self.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == RST_STREAM:
            stream = self.streams.pop(number, None)
            if stream is not None:
                stream.close()
                stream.cancel()
                self._look()
        elif kind == PUSH_PROMISE:
            raise _Broken(PROTOCOL_ERROR, "clients do not push")
        # PRIORITY means nothing here, GOAWAY that no new calls will come; kinds that are not known are passed over.

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            return
        if len(payload) % _SETTING.size:
            raise _Broken(FRAME_SIZE, "settings of another size")
        for key, value in _SETTING.iter_unpack(payload):
            if key == _INITIAL_WINDOW:
                if value > _WINDOW_LAST:
                    raise _Broken(FLOW_CONTROL, "a window that is too large")
                change, self.initial_window = value - self.initial_window, value
                for stream in list(self.streams.values()):
                    stream.window += change
                    self._pump(stream)
            elif key == _MAX_FRAME:
                self._frame_max = max(FRAME_MAX, min(value, 1 << 20))
        self.write(frame(SETTINGS, ACK, 0))

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Broken(FRAME_SIZE, "an update of a window has 4 bytes")
        more = _WORD.unpack(payload)[0] & 0x7FFFFFFF
        if number:
            stream = self.streams.get(number)
            if stream is not None:
                stream.window += more
                if stream.window > _WINDOW_LAST:
                    raise _Broken(FLOW_CONTROL, "a window that is too large")
                self._pump(stream)
            return
        self._window += more
        if self._window > _WINDOW_LAST:
            raise _Broken(FLOW_CONTROL, "a window that is too large")
        for stream in list(self.streams.values()):
            if self._window <= 0:
                break
            if stream.out:
                self._pump(stream)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._owed += size
        if self._owed > WINDOW // 2:
            # What a stream keeps is bounded by its own window.
            self.write(frame(WINDOW_UPDATE, 0, 0, _WORD.pack(self._owed)))
            self._owed = 0
        stream = self.streams.get(number)
        if stream is None or stream.ended_in:
            if number > self._last or not number:
                raise _Broken(PROTOCOL_ERROR, "data of a stream that was not opened")
            return  # it was closed here, and they did not know yet
        if not stream.ended_out:
            stream.feed(_unpadded(flags, payload), size)
        self._begin(stream, flags)

    def _headers(self, number: int, flags: int, block: bytes) -> None:
        if len(block) > hpack_block.BLOCK_MAX:
            raise _Broken(PROTOCOL_ERROR, "a header block that is too long")
        if not flags & END_HEADERS:
            self._block = number, flags, block
            return
        self._block = None
        try:
            headers = self._decoder.decode(block)
        except ValueError as error:
            raise _Broken(COMPRESSION, str(error)) from None
        stream = self.streams.get(number)
        if stream is not None:
            self._begin(stream, flags)  # trailers
            return
        if number % 2 == 0:
            raise _Broken(PROTOCOL_ERROR, "a client's streams have odd numbers")
        if number <= self._last:
            return  # trailers of one that was closed here
        self._last = number
        if self._leaving or len(self.streams) >= STREAMS_MAX:
            self.write(frame(RST_STREAM, 0, number, _WORD.pack(REFUSED)))
            return
        stream = Stream(self, number, headers, self._find(headers.get(":path", "")))
        self.streams[number] = stream
        if headers.get(":method") != "POST" or not headers.get("content-type", "").startswith("application/grpc"):
            stream.refuse(415)
            return
        if "grpc-timeout" in headers:
            stream.limit(headers["grpc-timeout"])
        self._begin(stream, flags)

    def _begin(self, stream: Stream, flags: int) -> None:
        """A frame of a stream was taken: note its end, and begin to answer when it is time to."""
        if flags & END_STREAM:
            stream.end_in()
        if stream.task is None and not stream.ended_out and (stream.ended_in or not stream.method.at_end):
            stream.task = task = asyncio.get_running_loop().create_task(self._answer(stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if stream.ended_in and stream.ended_out and not stream.out:
            self.streams.pop(stream.id, None)

    async def _answer(self, stream: Stream) -> None:
        try:
            await stream.method.answer(stream)
        except asyncio.CancelledError:
            stream.fail(CANCELLED, "the call was cancelled")
        except Exception:
            log.exception("%s failed", stream.headers.get(":path"))
            stream.fail(INTERNAL, "internal error")

    # --- writing

    def write(self, data: bytes) -> None:
        """Frames, as they are. What is written in one turn of the loop goes out as one piece, and wakes the peer once."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)
        self._outbox_size += len(data)
        if self._outbox_size > _PIECE:
            self._flush()

    def _flush(self) -> None:
        outbox, self._outbox, self._outbox_size = self._outbox, [], 0
        if outbox and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(outbox))

    def send(self, stream: Stream, data: bytes) -> None:
        """A message with its prefix, in as many frames as it takes, when the windows allow it."""
        size = len(data)
        if not stream.out and size <= self._frame_max and size <= stream.window and size <= self._window:
            stream.window -= size
            self._window -= size
            self.write(frame(DATA, 0, stream.id, data))
        else:
            stream.out.append(memoryview(data))
            self._pump(stream)

    def _pump(self, stream: Stream) -> None:
        out = stream.out
        if not out:
            return
        while out:
            size = min(len(out[0]), self._frame_max, stream.window, self._window)
            if size <= 0:
                return
            stream.window -= size
            self._window -= size
            self.write(frame(DATA, 0, stream.id, bytes(out[0][:size])))
            if size == len(out[0]):
                out.popleft()
            else:
                out[0] = out[0][size:]
        stream.room()
        if stream.ended_out:
            self.done(stream)

    def done(self, stream: Stream) -> None:
        """Everything of the answer is written but the trailers."""
        trailers = stream.trailers
        if not stream.ended_in:
            trailers += frame(RST_STREAM, 0, stream.id, _WORD.pack(NO_ERROR))
        self.write(trailers)
        self.streams.pop(stream.id, None)
        stream.close()
        self._look()

    # --- the end

    def leave(self) -> None:
        """Take no new calls; close when those that run are answered."""
        if not self._leaving:
            self._leaving = True
            self.write(frame(GOAWAY, 0, 0, _WORD.pack(self._last) + _WORD.pack(NO_ERROR)))
            self._look()

    def _look(self) -> None:
        if self._leaving and not self.streams:
            self._end()

    def _end(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    async def abort(self) -> None:
        """End it now; returns when no call runs any more."""
        for stream in list(self.streams.values()):
            stream.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._end()


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _Broken(PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]
