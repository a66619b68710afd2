"""The Docker API over TCP: each connection is passed on to the engine's own socket.

Runs in: the daemon, on its event loop.
Spec: Docker's daemon socket options (tlsverify, tlscacert, tlscert, tlskey): a client proves who it is by a certificate.

Whoever may use the API is root on the machine. So without TLS there is no such socket, unless the configuration says that it is
to be open; that is logged as a warning.

The bytes are decrypted here and not by asyncio's own transport: a client that ends its input (close_notify, or a FIN) still wants
the output of its container, and asyncio closes the connection then.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Protocol

from boxship.daemon.config import Docker
from boxship.kit.errors import InvalidArgument

log = logging.getLogger("boxship.engine")

HANDSHAKE_S = 10.0
_PORT_TLS, _PORT_OPEN = 2376, 2375
_CHUNK = 65536


def context(settings: Docker) -> ssl.SSLContext:
    """The TLS side of a server that demands a certificate of `tls_ca`. Raises InvalidArgument, which names the key."""
    for key in ("tls_ca", "tls_cert", "tls_key"):
        if not getattr(settings, key):
            raise InvalidArgument(
                f"docker.tcp is set without docker.{key}",
                "give tls_ca, tls_cert and tls_key, or say insecure = true and let everybody in")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.verify_mode = ssl.CERT_REQUIRED
    try:
        made.load_verify_locations(settings.tls_ca)
    except OSError as error:  # ssl.SSLError too
        raise InvalidArgument(f"docker.tls_ca: {settings.tls_ca}: {error}") from None
    try:
        made.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:
        raise InvalidArgument(f"docker.tls_cert and docker.tls_key: {settings.tls_cert}, {settings.tls_key}: {error}") from None
    return made


def address(text: str, *, tls: bool) -> tuple[str, int]:
    """(host, port) of `[tcp://]HOST[:PORT]`. Raises InvalidArgument."""
    host, separator, port = text.removeprefix("tcp://").rpartition(":")
    if not separator or port.endswith("]"):
        host, port = text.removeprefix("tcp://"), str(_PORT_TLS if tls else _PORT_OPEN)
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise InvalidArgument(f"docker.tcp is {text!r}, not HOST:PORT")
    return host.strip("[]"), int(port)


class _Pipe(Protocol):
    """Bytes to and from the client."""

    async def read(self) -> bytes: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class Plain:
    """A connection without TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        """b"" at the end of the client's input."""
        return await self._reader.read(_CHUNK)

    async def write(self, data: bytes) -> None:
        """Wait until the client takes more."""
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        """No more will come."""
        if self._writer.can_write_eof():
            self._writer.write_eof()


class Encrypted(Plain):
    """A connection with TLS; `handshake` first."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext) -> None:
        super().__init__(reader, writer)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await super().write(self._outgoing.read())

    async def _fill(self) -> None:
        data = await super().read()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def handshake(self) -> None:
        """Raises ssl.SSLError for a client that cannot prove who it is."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                await self._flush()  # the alert says why
                raise
            else:
                await self._flush()
                return

    async def read(self) -> bytes:
        """b"" at the end of the client's input: its close_notify, or its FIN."""
        while True:
            try:
                return self._tls.read(_CHUNK)
            except ssl.SSLWantReadError:
                await self._flush()  # an answer to a change of keys
                await self._fill()
            except ssl.SSLEOFError:
                return b""

    async def write(self, data: bytes) -> None:
        """Wait until the client takes more."""
        self._tls.write(data)
        await self._flush()

    async def end(self) -> None:
        """No more will come."""
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the client has not said goodbye; it does not have to
        await self._flush()
        await super().end()


class Remote:
    """Listens on a TCP port and passes on to the Unix socket at `path`."""

    def __init__(self, settings: Docker, path: str) -> None:
        """Raises InvalidArgument for settings that would let in everybody by accident."""
        self._tls = None if settings.insecure else context(settings)
        self._address = address(settings.tcp, tls=self._tls is not None)
        self._path = path
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def listen(self) -> None:
        """Begin. Raises OSError when the address is taken."""
        self._server = await asyncio.start_server(self._serve, *self._address)
        if self._tls is None:
            log.warning(
                "the Docker API on %s:%d is open: whoever reaches it is root on this machine", self._address[0] or "*", self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            client: _Pipe = Plain(reader, writer)
            if self._tls is not None:
                client = encrypted = Encrypted(reader, writer, self._tls)
                async with asyncio.timeout(HANDSHAKE_S):
                    await encrypted.handshake()
            await self._pass_on(client)
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            log.info("connection from %s: %s", peer, error)
        finally:
            writer.close()

    async def _pass_on(self, client: _Pipe) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(self._path)

        async def inward() -> None:
            while data := await client.read():
                inner_writer.write(data)
                await inner_writer.drain()
            inner_writer.write_eof()

        async def outward() -> None:
            while data := await inner_reader.read(_CHUNK):
                await client.write(data)
            await client.end()

        incoming, outgoing = asyncio.ensure_future(inward()), asyncio.ensure_future(outward())
        try:
            await asyncio.wait([incoming, outgoing], return_when=asyncio.FIRST_COMPLETED)
            if incoming.done():
                incoming.result()  # raises when the client is gone
            await outgoing
        finally:
            incoming.cancel()
            outgoing.cancel()
            await asyncio.gather(incoming, outgoing, return_exceptions=True)
            inner_writer.close()

    def close(self) -> None:
        """Take no more."""
        if self._server is not None:
            self._server.close()
