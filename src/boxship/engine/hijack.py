"""Connections that stop being HTTP: attach and exec, bytes both ways.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, "Attach to a container": 101 with Upgrade: tcp, or 200 and raw bytes for clients that did not ask for an
upgrade; frames of 8 bytes of header (stream, three zeros, length) unless there is a terminal.

aiohttp's protocol would close the connection when the client shuts down its sending side, which is how a client says that stdin
is at its end; so the transport gets a protocol of ours.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
import time
from collections import deque
from typing import Any

from aiohttp import web

HEADERS: Any = web.RequestKey("headers", dict) if hasattr(web, "RequestKey") else "headers"
"""In a request: the headers that every answer has."""

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
_HIGH = 1 << 16
_HEAD_S = 0.05


class Connection(asyncio.Protocol):
    """The raw connection: `read` until b"", `write` and `drain`, `close`."""

    def __init__(self, transport: asyncio.Transport, former: Any) -> None:
        self._transport = transport
        self._former = former
        self._received: deque[bytes] = deque()
        self._size = 0
        self._eof = False
        self._wake = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.lost = asyncio.Event()

    # what the transport calls

    def data_received(self, data: bytes) -> None:
        """From the client."""
        self._received.append(bytes(data))
        self._size += len(data)
        if self._size > _HIGH:
            self._transport.pause_reading()
        self._wake.set()

    def eof_received(self) -> bool:
        """The client sends no more; it still reads."""
        self._eof = True
        self._wake.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._eof = True
        self._wake.set()
        self._writable.set()
        self.lost.set()
        self._former.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It reads again."""
        self._writable.set()

    # what the engine calls

    async def read(self) -> bytes:
        """The next bytes from the client; b"" at the end."""
        while not self._received:
            if self._eof:
                return b""
            self._wake.clear()
            await self._wake.wait()
        data = b"".join(self._received)
        self._received.clear()
        if self._size > _HIGH and not self._eof:
            self._transport.resume_reading()
        self._size = 0
        return data

    def write(self, data: bytes) -> None:
        """Queue bytes for the client; nothing happens when it is gone."""
        if not self.lost.is_set():
            self._transport.write(data)

    async def settled(self) -> None:
        """Wait until the client has taken the head of the answer off its socket, a twentieth of a second at most.

        docker-py reads the head through a buffer and the stream beside it: what arrives together with the head is lost to it.
        """
        socket = self._transport.get_extra_info("socket")
        end = time.monotonic() + _HEAD_S
        while not self.lost.is_set() and time.monotonic() < end:
            unread = bytearray(4)
            try:
                fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, unread)  # of a Unix socket: what the other side has not read
            except OSError:
                return  # closed meanwhile
            if not any(unread) and not self._transport.get_write_buffer_size():
                return
            await asyncio.sleep(0.0005)

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        await self._writable.wait()

    def close(self) -> None:
        """End the connection after what is queued."""
        self._transport.close()


class Done(web.StreamResponse):
    """What a handler returns when the connection is no longer HTTP's: aiohttp has nothing to send."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing."""

    @property
    def keep_alive(self) -> bool:
        """Never."""
        return False


def hijack(request: web.Request, content_type: str) -> Connection:
    """Answer the request and take its connection. Raises ConnectionResetError when the client is gone."""
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client is gone")
    former = request.protocol
    connection = Connection(transport, former)
    early = getattr(former, "_message_tail", b"")
    transport.set_protocol(connection)
    if request.headers.get("Upgrade"):
        head = f"HTTP/1.1 101 UPGRADED\r\nContent-Type: {content_type}\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
    else:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n"
    extra = "".join(f"{name}: {value}\r\n" for name, value in request[HEADERS].items())
    transport.write(f"{head}{extra}\r\n".encode())
    if early:
        connection.data_received(early)
    return connection


def frame(stream: int, data: bytes) -> bytes:
    """One multiplexed frame."""
    return stream.to_bytes(1, "big") + b"\0\0\0" + len(data).to_bytes(4, "big") + data


_NAMED = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31}


def detach_keys(text: str) -> bytes:
    """The bytes of a sequence such as `ctrl-p,ctrl-q`; raises ValueError."""
    keys = bytearray()
    for word in text.split(","):
        if len(word) == 1:
            keys += word.encode()
        elif word.startswith("ctrl-") and len(word) == 6:
            letter = word[5]
            if "a" <= letter <= "z":
                keys.append(ord(letter) - 96)
            elif letter in _NAMED:
                keys.append(_NAMED[letter])
            else:
                raise ValueError(f"Unknown character: '{word}'")
        else:
            raise ValueError(f"Unknown character: '{word}'")
    return bytes(keys)


class Detacher:
    """Looks for the detach keys in what a client types. What could be their beginning is held back."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the keys were typed."""
        if not self._keys:
            return data, False
        data = self._held + data
        index = data.find(self._keys)
        if index >= 0:
            self._held = b""
            return data[:index], True
        keep = next((n for n in range(min(len(self._keys) - 1, len(data)), 0, -1) if self._keys.startswith(data[-n:])), 0)
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep], False
