"""HTTP/1.1 to the engine over `_socket`: requests on one kept connection, chunked bodies both ways, hijacked streams.

Runs in: the boxship command.
Spec: RFC 9112 as far as an engine uses it; Docker Engine API ("Attach to a container": the upgrade to a raw stream).
Not here: which engine (`boxship.cli.http.where`), what the frames of a hijacked stream mean (`boxship.cli.http.stream`).
"""

from __future__ import annotations

import _socket
import os

from boxship.kit.errors import BoxshipError
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

_CHUNK = 65536
_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")


class ConnectFailed(BoxshipError):
    """No engine answers at the address."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.errno = code


class ApiError(BoxshipError):
    """The engine's refusal: its own words and the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"Error response from daemon: {message}")
        self.status = status
        self.message = message


def quote(value: str) -> str:
    """`value` as a part of a path or a query."""
    return "".join(c if c in _SAFE else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape")) for c in value)


def path(base: str, query: Mapping[str, object] | None = None) -> str:
    """`base?a=b`: None is left out, True is 1, False is left out, a list is repeated, a dict is JSON."""
    words = []
    for name, value in (query or {}).items():
        if value is None or value is False:
            continue
        if isinstance(value, dict):
            if value:
                words.append(f"{name}={quote(text.dumps(value))}")
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words.append(f"{name}={quote('1' if each is True else str(each)).replace('/', '%2F')}")
    return f"{base}?{'&'.join(words)}" if words else base


class Response:
    """An answer whose body is read once: whole, or piece by piece."""

    def __init__(self, connection: Connection, status: int, headers: dict[str, str]) -> None:
        self.connection = connection
        self.status = status
        self.headers = headers
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        self._left = int(length) if length is not None and not self._chunked else -1
        self._done = status in (101, 204, 304) or self._left == 0 or connection.head

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises ConnectFailed when the connection breaks in the middle."""
        connection = self.connection
        while not self._done:
            if self._chunked:
                size = int(connection.line().partition(b";")[0] or b"0", 16)
                if size == 0:
                    while connection.line():
                        pass
                    self._done = True
                    return
                while size:
                    piece = connection.some(size)
                    size -= len(piece)
                    yield piece
                connection.line()
            elif self._left > 0:
                piece = connection.some(self._left)
                self._left -= len(piece)
                self._done = self._left == 0
                yield piece
            else:
                piece = connection.some(_CHUNK, end=True)
                if not piece:
                    self._done = True
                    connection.close()
                    return
                yield piece

    def read(self) -> bytes:
        """All of the body."""
        return b"".join(self.pieces())

    def lines(self) -> Iterator[bytes]:
        """The body's lines, for streams of JSON messages."""
        rest = b""
        for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line for line in whole if line.strip())
        if rest.strip():
            yield rest

    def json(self) -> Any:
        """The body as JSON; None when there is none."""
        body = self.read()
        return text.loads(body, "the engine's answer") if body.strip() else None


class Certificates:
    """The files of TLS: ca.pem, cert.pem and key.pem in a folder; `verify`: the engine must prove who it is."""

    __slots__ = ("folder", "verify")

    def __init__(self, folder: str, *, verify: bool) -> None:
        self.folder = folder
        self.verify = verify


class Connection:
    """One connection to the engine at `address` (`unix://PATH` or `tcp://HOST:PORT`, with `certificates` by TLS)."""

    def __init__(self, address: str, certificates: Certificates | None = None) -> None:
        self.address = address
        self.certificates = certificates
        self.head = False
        self._socket: _socket.socket | None = None
        self._buffer = b""

    def open(self) -> _socket.socket:
        """The connected socket. Raises ConnectFailed."""
        if self._socket is None:
            kind, _, where = self.address.partition("://")
            try:
                if kind == "unix":
                    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
                    try:
                        sock.connect(where)
                    except OSError:
                        sock.close()
                        raise
                elif kind in ("tcp", "http"):
                    sock = _connect_tcp(where)
                    if self.certificates is not None:
                        from boxship.cli.http.tls import secure

                        sock = secure(sock, where, self.certificates)
                else:
                    raise BoxshipError(f"unable to parse docker host `{self.address}`")
            except OSError as error:
                if error.errno == 13:
                    raise ConnectFailed(
                        f"permission denied while trying to connect to the docker API at {self.address}", error.errno
                    ) from None
                raise ConnectFailed(
                    f"Cannot connect to the Docker daemon at {self.address}. Is the docker daemon running?", error.errno or 0
                ) from None
            self._socket = sock
            self._buffer = b""
        return self._socket

    def close(self) -> None:
        """Let go of the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        upload: Iterable[bytes] | None = None,
        upgrade: bool = False,
    ) -> Response:
        """Ask. `body` is sent as JSON, `upload` as a chunked body. Raises ApiError for a refusal, ConnectFailed."""
        fresh = self._socket is None
        sock = self.open()
        lines = [f"{method} {target} HTTP/1.1", "Host: boxship", "User-Agent: boxship"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        data = b""
        if upgrade:
            lines += ["Connection: Upgrade", "Upgrade: tcp"]
        if body is not None:
            data = text.dumps(body).encode("utf-8", "surrogateescape")
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        elif upload is not None:
            lines += ["Transfer-Encoding: chunked"]
            if not headers or "Content-Type" not in headers:
                lines += ["Content-Type: application/x-tar"]
        elif method in ("POST", "PUT"):
            lines += ["Content-Length: 0"]
        self.head = method == "HEAD"
        try:
            sock.sendall("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + data)
            if upload is not None:
                self._upload(sock, upload)
            response = self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            if fresh or upload is not None:
                raise ConnectFailed("the daemon closed the connection") from None
            # A kept connection may have been closed meanwhile: nothing of the request was taken.
            return self.send(method, target, body, headers=headers, upgrade=upgrade)
        if response.status >= 400:
            raise _refusal(response)
        return response

    def _upload(self, sock: _socket.socket, upload: Iterable[bytes]) -> None:
        try:
            for piece in upload:
                if piece:
                    sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            sock.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the engine had seen enough: its answer tells why

    def _answer(self) -> Response:
        while True:
            status = self.line(first=True)
            words = status.split(b" ", 2)
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise ConnectFailed("what answers is no HTTP server")
            headers = {}
            while line := self.line():
                name, _, value = line.decode("utf-8", "replace").partition(":")
                headers[name.strip().lower()] = value.strip()
            if words[1] != b"100":
                return Response(self, int(words[1]), headers)

    def line(self, *, first: bool = False) -> bytes:
        """A line without its end."""
        while b"\n" not in self._buffer:
            self._fill(first=first)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def some(self, limit: int, *, end: bool = False) -> bytes:
        """At most `limit` bytes; none only at the `end`, if that is allowed."""
        if not self._buffer:
            try:
                self._fill()
            except ConnectFailed:
                if end:
                    return b""
                raise
        piece, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return piece

    def _fill(self, *, first: bool = False) -> None:
        assert self._socket is not None
        got = self._socket.recv(_CHUNK)
        if not got:
            if first:
                raise ConnectionResetError
            self.close()
            raise ConnectFailed("unexpected EOF")
        self._buffer += got

    def take(self) -> tuple[_socket.socket, bytes]:
        """The socket of a hijacked connection, and what has been read of it already."""
        assert self._socket is not None
        sock, rest = self._socket, self._buffer
        self._socket, self._buffer = None, b""
        return sock, rest


def _refusal(response: Response) -> ApiError:
    body = response.read()
    message = ""
    if body.strip().startswith(b"{"):
        document = text.loads(body, "the engine's answer")
        if isinstance(document, dict):
            message = str(document.get("message") or "").strip()
    message = message or body.decode("utf-8", "replace").strip()
    return ApiError(response.status, message or f"request returned status {response.status}")


def _connect_tcp(where: str) -> _socket.socket:
    host, _, port = where.rstrip("/").rpartition(":")
    failure: OSError | None = None
    for family, kind, protocol, _, address in _socket.getaddrinfo(
        host.strip("[]") or "127.0.0.1", int(port), 0, _socket.SOCK_STREAM
    ):
        sock = _socket.socket(family, kind | _socket.SOCK_CLOEXEC, protocol)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
            continue
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        return sock
    raise failure or OSError(0, os.strerror(0))
