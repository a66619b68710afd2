"""The gRPC server, spoken to frame by frame: what clients may send, and what they must not."""

from __future__ import annotations

import asyncio
import struct

import hpack
import pytest

from boxship.api.grpc import hpack_block
from boxship.api.grpc import server as h2
from boxship.api.grpc.server import Connection, Method, Stream, frame

PATH = "/test.Echo/Say"
REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x"), ("content-type", "application/grpc"),
           ("te", "trailers")]


class Wire(asyncio.Transport):
    """What the server writes, taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.data += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """(kind, flags, stream, payload) of what came since the last time."""
        found = []
        while self.data:
            size = int.from_bytes(self.data[:3], "big")
            kind, flags, stream = self.data[3], self.data[4], int.from_bytes(self.data[5:9], "big")
            found.append((kind, flags, stream, self.data[9 : 9 + size]))
            self.data = self.data[9 + size :]
        return found


class Peer:
    """A client, and the server's side of its connection."""

    def __init__(self) -> None:
        self.begun: list[Stream] = []
        self.cancelled = 0
        self.wire = Wire()
        self.connection = Connection(self.find, set())
        self.encoder = hpack.Encoder()
        self.connection.connection_made(self.wire)
        self.connection.data_received(h2.PREFACE + frame(h2.SETTINGS, 0, 0))

    def find(self, path: str) -> Method:
        return Method(self.echo, at_end=path == PATH)

    async def echo(self, stream: Stream) -> None:
        """Every message back; `wait` waits for ever, `fail` fails."""
        self.begun.append(stream)
        try:
            while (message := await stream.receive()) is not None:
                if message == b"wait":
                    await asyncio.Event().wait()
                if message == b"fail":
                    stream.fail(5, "no such thing: 100 % ü\n")
                    return
                stream.send(message)
                await stream.sent()
            stream.finish()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def headers(self, stream: int, flags: int = h2.END_HEADERS, fields: list[tuple[str, str]] = REQUEST) -> None:
        self.connection.data_received(frame(h2.HEADERS, flags, stream, self.encoder.encode(fields)))

    def message(self, stream: int, message: bytes, flags: int = h2.END_STREAM) -> None:
        data = b"\0" + struct.pack(">I", len(message)) + message
        for at in range(0, len(data), h2.FRAME_MAX):
            last = at + h2.FRAME_MAX >= len(data)
            self.connection.data_received(frame(h2.DATA, flags if last else 0, stream, data[at : at + h2.FRAME_MAX]))

    async def settle(self) -> list[tuple[int, int, int, bytes]]:
        for _ in range(5):
            await asyncio.sleep(0)
        return self.wire.frames()

    def status(self, frames: list[tuple[int, int, int, bytes]]) -> dict[str, str]:
        """The fields of the last header block."""
        block = [payload for kind, _, _, payload in frames if kind == h2.HEADERS][-1]
        return {str(name): str(value) for name, value in hpack.Decoder().decode(block)}


def run(work):
    async def within():
        peer = Peer()
        await peer.settle()
        await work(peer)

    asyncio.run(within())


def test_a_call_is_answered_with_headers_message_and_status():
    async def work(peer):
        peer.headers(1)
        peer.message(1, b"hello")
        frames = await peer.settle()
        assert [(kind, flags) for kind, flags, _, _ in frames] == [(h2.HEADERS, 4), (h2.DATA, 0), (h2.HEADERS, 5)]
        assert frames[1][3] == b"\0\0\0\0\5hello"
        assert peer.status(frames) == {"grpc-status": "0"}
        assert not peer.connection.streams

    run(work)


def test_frames_may_be_cut_anywhere():
    async def work(peer):
        block = peer.encoder.encode(REQUEST)
        data = (frame(h2.HEADERS, 0, 1, block[:4]) + frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[4:])
                + frame(h2.DATA, h2.PADDED, 1, b"\3\0\0\0\0\2ab\0\0\0") + frame(h2.DATA, h2.END_STREAM, 1) + frame(h2.PING, 0, 0, b"12345678"))
        for byte in data:
            peer.connection.data_received(bytes([byte]))
        frames = await peer.settle()
        assert (h2.DATA, 0, 1, b"\0\0\0\0\2ab") in frames
        assert (h2.PING, h2.ACK, 0, b"12345678") in frames

    run(work)


def test_an_error_alone_is_one_block_with_a_message_that_headers_can_hold():
    async def work(peer):
        peer.headers(1)
        peer.message(1, b"fail")
        frames = await peer.settle()
        assert len(frames) == 1
        status = peer.status(frames)
        assert (status[":status"], status["grpc-status"]) == ("200", "5")
        assert status["grpc-message"] == "no such thing: 100 %25 %C3%BC%0A"

    run(work)


def test_an_answer_waits_for_the_windows_and_its_trailers_for_it():
    async def work(peer):
        large = bytes(200_000)
        peer.headers(1)
        peer.message(1, large)
        frames = await peer.settle()
        assert sum(len(payload) for kind, _, _, payload in frames if kind == h2.DATA) == 65535
        assert not any(flags & h2.END_STREAM for kind, flags, _, _ in frames if kind == h2.HEADERS)
        peer.connection.data_received(frame(h2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 20)))
        assert not [payload for kind, _, _, payload in await peer.settle() if kind == h2.DATA]
        peer.connection.data_received(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 20)))
        frames = await peer.settle()
        assert sum(len(payload) for kind, _, _, payload in frames if kind == h2.DATA) == 200_005 - 65535
        assert frames[-1][:2] == (h2.HEADERS, h2.END_HEADERS | h2.END_STREAM)

    run(work)


def test_a_reset_or_a_lost_connection_ends_the_work():
    async def work(peer):
        for number in (1, 3):
            peer.headers(number)
            peer.message(number, b"wait")
        await peer.settle()
        peer.connection.data_received(frame(h2.RST_STREAM, 0, 1, struct.pack(">I", h2.CANCEL)))
        await peer.settle()
        assert peer.cancelled == 1
        peer.connection.connection_lost(None)
        await peer.settle()
        assert peer.cancelled == 2

    run(work)


def test_a_deadline_is_kept():
    async def work(peer):
        peer.headers(1, fields=[*REQUEST, ("grpc-timeout", "20m")])
        peer.message(1, b"wait")
        await asyncio.sleep(0.1)
        assert peer.status(await peer.settle())["grpc-status"] == "4"
        assert peer.cancelled == 1

    run(work)


def test_a_sender_whose_messages_nobody_takes_gets_no_more_window():
    async def work(peer):
        peer.headers(1, fields=[*REQUEST[:2], (":path", "/test.Echo/Stream"), *REQUEST[3:]])
        peer.message(1, b"wait", 0)
        await peer.settle()
        for _ in range(20):
            peer.message(1, bytes(100_000), 0)
        updates = [frame for frame in await peer.settle() if frame[0] == h2.WINDOW_UPDATE and frame[2] == 1]
        assert sum(int.from_bytes(update[3], "big") for update in updates) <= 100
        with_more = h2.WINDOW * 2 // 100_000
        for _ in range(with_more):
            peer.message(1, bytes(100_000), 0)
        assert peer.wire.closed, "who sends more than the window is no client"

    run(work)


def test_calls_that_run_end_before_the_server_leaves():
    async def work(peer):
        peer.headers(1, fields=[*REQUEST[:2], (":path", "/test.Echo/Stream"), *REQUEST[3:]])
        peer.message(1, b"a", 0)
        await peer.settle()
        peer.connection.leave()
        peer.headers(3)
        frames = await peer.settle()
        assert [kind for kind, *_ in frames] == [h2.GOAWAY, h2.RST_STREAM]
        assert not peer.wire.closed
        peer.message(1, b"b")
        frames = await peer.settle()
        assert peer.status(frames) == {"grpc-status": "0"}
        assert peer.wire.closed

    run(work)


def test_what_is_no_grpc_is_refused():
    async def work(peer):
        peer.headers(1, h2.END_HEADERS | h2.END_STREAM, [(":method", "GET"), *REQUEST[1:]])
        assert peer.status(await peer.settle()) == {":status": "415"}
        peer.headers(3)
        peer.connection.data_received(frame(h2.DATA, h2.END_STREAM, 3, b"\1\0\0\0\1x"))
        assert peer.status(await peer.settle())["grpc-status"] == "12"
        peer.headers(5)
        peer.connection.data_received(frame(h2.DATA, 0, 5, b"\0\xff\0\0\0x"))
        assert peer.status(await peer.settle())["grpc-status"] == "8"
        assert not peer.connection.streams

    run(work)


@pytest.mark.parametrize(("data", "code"), [
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.DATA, 0, 1, b"x"), h2.PROTOCOL_ERROR),
    (h2.PREFACE + b"\xff\xff\xff\0\0\0\0\0\1", h2.FRAME_SIZE),
    (h2.PREFACE + frame(h2.HEADERS, 4, 2, b"\x82"), h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"), h2.COMPRESSION),
    (h2.PREFACE + frame(h2.HEADERS, 0, 1, b"\x82") + frame(h2.PING, 0, 0, bytes(8)), h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.HEADERS, 0, 1) + frame(h2.CONTINUATION, 0, 1, bytes(h2.FRAME_MAX)) * 5, h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.CONTINUATION, 4, 1, b"\x82"), h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2, h2.FLOW_CONTROL),
    (h2.PREFACE + frame(h2.SETTINGS, 0, 0, b"x"), h2.FRAME_SIZE),
    (h2.PREFACE + frame(h2.PUSH_PROMISE, 4, 1, b""), h2.PROTOCOL_ERROR),
    (h2.PREFACE + frame(h2.DATA, h2.PADDED, 1, b""), h2.PROTOCOL_ERROR),
])
def test_who_breaks_the_rules_is_told_and_left(data, code):
    async def work():
        wire = Wire()
        connection = Connection(lambda path: Method(None, at_end=True), set())
        connection.connection_made(wire)
        connection.data_received(data)
        kind, _, _, payload = wire.frames()[-1]
        assert (kind, int.from_bytes(payload[4:8], "big")) == (h2.GOAWAY, code)
        assert wire.closed

    asyncio.run(work())


def test_header_blocks_that_come_again_mean_the_same_until_the_table_changes():
    encoder, decoder = hpack.Encoder(), hpack_block.Decoder()
    fields = [(":method", "POST"), ("x", "1"), ("y", "2")]
    first = decoder.decode(encoder.encode(fields))
    again = encoder.encode(fields)
    assert decoder.decode(again) == decoder.decode(again) == first
    decoder.decode(encoder.encode([("z", "3")]))
    assert decoder.decode(encoder.encode(fields)) == first
    assert decoder.decode(again) != first, "the numbers of the table have moved on"


def test_a_long_message_of_an_error_has_a_length_of_several_bytes():
    for size in (126, 127, 128, 300, 20_000):
        decoded = dict(hpack.Decoder(max_header_list_size=1 << 16).decode(hpack_block.failure(3, "x" * size)))
        assert decoded == {"grpc-status": "3", "grpc-message": "x" * size}


def test_nothing_is_read_while_much_waits_to_be_written():
    async def work(peer):
        peer.connection.pause_writing()
        assert not peer.wire.reading
        peer.connection.resume_writing()
        assert peer.wire.reading

    run(work)
