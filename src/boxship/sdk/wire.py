"""HTTP/1.1 to the engine over asyncio: one connection a request, chunked bodies, hijacked streams.

Runs in: the caller's program, on its event loop.
Spec: RFC 9112 as far as an engine uses it. aiohttp keeps a hijacked connection to itself, so it is of no use here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from boxship.kit.errors import Unavailable
from boxship.oci import text
from boxship.sdk.errors import refusal

_CHUNK = 65536
_LINE_LIMIT = 16 << 20


class Answer:
    """An answer whose body is read once."""

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.status = status
        self.headers = headers
        self.reader = reader
        self.writer = writer

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.status in (204, 304):
            return
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while size := int((await self.reader.readline()).partition(b";")[0] or b"0", 16):
                    while size:
                        piece = await self.reader.read(min(size, _CHUNK))
                        if not piece:
                            raise Unavailable("the engine went away in the middle of an answer")
                        size -= len(piece)
                        yield piece
                    await self.reader.readline()
                return
            left = int(self.headers.get("content-length", -1))
            while left:
                piece = await self.reader.read(_CHUNK if left < 0 else min(left, _CHUNK))
                if not piece:
                    return
                left -= len(piece) if left > 0 else 0
                yield piece
        except (ConnectionError, ValueError):
            raise Unavailable("the engine went away in the middle of an answer") from None

    async def read(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def lines(self) -> AsyncIterator[bytes]:
        """Its lines."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                if line.strip():
                    yield line
        if rest.strip():
            yield rest

    def close(self) -> None:
        """Let go of the connection."""
        self.writer.close()


async def send(
    address: str, method: str, target: str, body: object = None, *, upload: bytes | None = None, upgrade: bool = False,
) -> Answer:
    """Ask. Raises the typed error of a refusal, Unavailable."""
    kind, _, where = address.partition("://")
    try:
        if kind == "unix":
            reader, writer = await asyncio.open_unix_connection(where, limit=_LINE_LIMIT)
        else:
            host, _, port = where.rstrip("/").rpartition(":")
            reader, writer = await asyncio.open_connection(host.strip("[]") or "127.0.0.1", int(port), limit=_LINE_LIMIT)
    except OSError as error:
        raise Unavailable(f"no engine answers at {address}: {error.strerror or error}") from None
    try:
        return await _exchange(reader, writer, method, target, body, upload, upgrade)
    except BaseException as error:
        writer.close()
        if isinstance(error, (ConnectionError, asyncio.IncompleteReadError)):
            raise Unavailable("the engine closed the connection") from None
        raise


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, target: str, body: object, upload: bytes | None,
    upgrade: bool,
) -> Answer:
    lines = [f"{method} {target} HTTP/1.1", "Host: boxship", "User-Agent: boxship"]
    data = b""
    if body is not None:
        data = text.dumps(body).encode("utf-8", "surrogateescape")
        lines.append("Content-Type: application/json")
    elif upload is not None:
        data = upload
        lines.append("Content-Type: application/x-tar")
    if data or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(data)}")
    lines += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
    writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + data)
    await writer.drain()
    words = (await reader.readline()).split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise Unavailable("what answers is no engine")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.lower()] = value.strip()
    answer = Answer(int(words[1]), headers, reader, writer)
    if answer.status >= 400:
        raw = await answer.read()
        message = raw.decode("utf-8", "replace").strip()
        if message.startswith("{"):
            document = text.loads(raw, "the engine's answer")
            message = str(document.get("message") or message) if isinstance(document, dict) else message
        raise refusal(answer.status, message)
    return answer
