"""A ttRPC server in an epoll loop, whose answers may come later.

Runs in: the shim, single-threaded.
Spec: ttRPC protocol 1.2; the texts of errors are those of Go's server. Calls with one answer only: nothing in the shim's API
streams, and a call that wants to is refused.
"""

from __future__ import annotations

import _socket

from google.protobuf.message import DecodeError

from boxship.api.task import pb
from boxship.api.ttrpc import wire
from boxship.kit.errors import BoxshipError, FailedPrecondition, Internal, InvalidArgument, Unsupported
from boxship.kit.loop import BROKEN, IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from boxship.kit.loop import Later, Loop

    Handler = Callable[[Any], Later]

_READ = 65536
_BACKLOG_MAX = 64 << 20
"""Bytes that wait for a peer that does not read; then it is dropped."""


class Service:
    """A service's methods: `requests` are the classes of their requests, `find` gives the function for a name, which returns a
    Later whose value is the answer."""

    def __init__(self, requests: Mapping[str, tuple[Any, Any]], find: Callable[[str], Handler]) -> None:
        self.requests = requests
        self.find = find


class Server:
    """Answers on a listening Unix socket, which it takes."""

    def __init__(self, loop: Loop, listener: _socket.socket, services: Mapping[str, Service]) -> None:
        self.loop = loop
        self.services = services
        self.connections: set[_Connection] = set()
        self._listener = listener
        listener.setblocking(False)
        loop.add(listener.fileno(), IN, self._accept)

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        conn.setblocking(False)
        self.connections.add(_Connection(self, conn))

    def find(self, service: str, method: str) -> tuple[Any, Handler]:
        """Raises Unsupported."""
        known = self.services.get(service)
        if known is None:
            raise Unsupported(f"service {service}")
        found = known.requests.get(method)
        if found is None:
            raise Unsupported(f"method {method}")
        return found[0], known.find(method)

    def fileno(self) -> int:
        """The descriptor that it listens at."""
        return self._listener.fileno()

    def pending(self) -> set[str]:
        """The methods of all calls that wait for their answers, "" for one that is not whole yet in either direction."""
        return {name for connection in self.connections for name in connection.pending()}

    def adopt(self, fd: int, last: int, calls: list[tuple[int, bytes]]) -> None:
        """Go on with a connection of another server that served the same: the last stream of it, and its `calls`."""
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        connection = _Connection(self, conn, last)
        self.connections.add(connection)
        for stream, payload in calls:
            connection.call(stream, 0, payload)

    def close(self) -> None:
        """Take no more connections, and close those there are."""
        self.loop.remove(self._listener.fileno())
        self._listener.close()
        for connection in list(self.connections):
            connection.flush()
            connection.close()


class _Connection:
    """Attributes:
        last: the newest stream.
        calls: those that were not answered yet, stream → (method, message).
    """

    def __init__(self, server: Server, conn: _socket.socket, last: int = 0) -> None:
        self._server = server
        self._conn = conn
        self.last = last
        self.calls: dict[int, tuple[str, bytes]] = {}
        self._frames = wire.Frames()
        self._out = bytearray()
        self._writing = False
        server.loop.add(conn.fileno(), IN, self._ready)

    def _ready(self, events: int) -> None:
        if events & OUT:
            self.flush()
        if events & (IN | BROKEN):
            try:
                data = self._conn.recv(_READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            for stream, kind, flags, payload in self._frames.feed(data):
                self._frame(stream, kind, flags, payload)

    def _frame(self, stream: int, kind: int, flags: int, payload: bytes | None) -> None:
        try:
            if kind == wire.REQUEST:
                self._request(stream, flags, payload)
            elif kind == wire.DATA:
                raise InvalidArgument("StreamID is no longer active")
            # Responses are a server's: one from a client means nothing.
        except BoxshipError as error:
            self.send(wire.failure(stream, error))

    def _request(self, stream: int, flags: int, payload: bytes | None) -> None:
        if stream % 2 == 0:
            raise InvalidArgument("StreamID must be odd for client initiated streams")
        if stream <= self.last:
            raise InvalidArgument("StreamID cannot be re-used and must increment")
        self.last = stream
        if payload is None:
            raise wire.too_long(wire.DATA_MAX + 1)
        self.call(stream, flags, payload)

    def call(self, stream: int, flags: int, payload: bytes) -> None:
        """Begin to answer. Raises BoxshipError."""
        try:
            envelope = pb.ttrpc.Request.FromString(payload)
        except DecodeError:
            raise InvalidArgument("unmarshal request: no message") from None
        kind, function = self._server.find(envelope.service, envelope.method)
        if flags & (wire.REMOTE_OPEN | wire.REMOTE_CLOSED):
            raise FailedPrecondition(f"{envelope.service}/{envelope.method} does not stream")
        try:
            message = kind.FromString(envelope.payload)
        except DecodeError:
            raise InvalidArgument(f"{envelope.service}/{envelope.method}: the request is no {kind.DESCRIPTOR.name}") from None
        self.calls[stream] = envelope.method, payload
        function(message).then(lambda later: self._answer(stream, later))

    def pending(self) -> list[str]:
        """See `Server`."""
        return [method for method, _ in self.calls.values()] + [""] * (bool(self._out) or not self._frames.is_empty)

    def fileno(self) -> int:
        """The descriptor, -1 when it is closed."""
        return self._conn.fileno()

    def _answer(self, stream: int, later: Later) -> None:
        del self.calls[stream]
        error = later.error
        if error is None:
            self.send(wire.response(stream, later.value.SerializeToString()))  # type: ignore[attr-defined]
        elif isinstance(error, (BoxshipError, OSError)):
            self.send(wire.failure(stream, error))
        else:
            import traceback

            text = "".join(traceback.format_exception(error))
            self.send(wire.failure(stream, Internal(f"internal error: {text}")))

    def send(self, data: bytes) -> None:
        """Queue and try to send; nothing happens when the connection is gone."""
        if self._conn.fileno() < 0:
            return
        self._out += data
        self.flush()

    def flush(self) -> None:
        """Send as much as the peer takes."""
        if self._conn.fileno() < 0:
            return
        try:
            while self._out:
                del self._out[: self._conn.send(self._out[:1 << 18], _socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if len(self._out) > _BACKLOG_MAX:
            self.close()
        elif bool(self._out) != self._writing:
            self._writing = bool(self._out)
            self._server.loop.want(self._conn.fileno(), IN | (OUT if self._writing else 0))

    def close(self) -> None:
        """The peer is gone, or shall be."""
        if self._conn.fileno() >= 0:
            self._server.loop.remove(self._conn.fileno())
            self._conn.close()
        self._server.connections.discard(self)
