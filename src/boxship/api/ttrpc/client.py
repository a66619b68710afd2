"""A blocking ttRPC client: one call after the other.

Runs in: whoever has nothing else to do meanwhile: a shim's `delete`, tests, tools.
Not here: the daemon's client (`boxship.api.containerd.ttrpc`), the shim's forwarding of events (`boxship.shim.publisher`).
"""

from __future__ import annotations

import _socket

from boxship.api.ttrpc import wire
from boxship.kit.errors import DeadlineExceeded, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLOSED = "ttrpc: closed"


def socket_address(address: str) -> str | bytes:
    """What connect(2) takes for `unix://PATH`, a path, or (without a slash at its beginning) the name of an abstract socket."""
    path = address.removeprefix("unix://")
    return path if path.startswith("/") else b"\0" + path.removeprefix("@").removeprefix("\0").encode()


class Client:
    """A connection."""

    def __init__(self, address: str, timeout_s: float | None = None) -> None:
        """Connect. Raises Unavailable."""
        self._conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
        self._conn.settimeout(timeout_s)
        self._frames = wire.Frames()
        self._next = 1
        self._came: dict[int, bytes | None] = {}
        try:
            self._conn.connect(socket_address(address))
        except OSError as error:
            self._conn.close()
            raise Unavailable(f"dial unix {address}: {(error.strerror or str(error)).lower()}") from None

    def begin(self, service: str, method: str, request: Any, *, namespace: str = "", timeout_s: float | None = None) -> int:
        """Send a call, and return the stream to `finish` it with. Raises Unavailable."""
        stream = self._next
        self._next += 2
        try:
            self._conn.sendall(wire.request(stream, service, method, request.SerializeToString(), namespace, timeout_s))
        except OSError:
            raise Unavailable(CLOSED) from None
        return stream

    def finish(self, stream: int, response: Any) -> Any:
        """Wait for the answer, of the class `response`. Raises what the peer answered, Unavailable, DeadlineExceeded."""
        while stream not in self._came:
            try:
                data = self._conn.recv(65536)
            except TimeoutError:
                raise DeadlineExceeded("context deadline exceeded") from None
            except OSError:
                data = b""
            if not data:
                raise Unavailable(CLOSED)
            for came, kind, _, payload in self._frames.feed(data):
                if kind == wire.RESPONSE:
                    self._came[came] = payload
        return wire.result(self._came.pop(stream), response)

    def call(
        self, service: str, method: str, request: Any, response: Any, *, namespace: str = "", timeout_s: float | None = None,
    ) -> Any:
        """`begin` and `finish`. `timeout_s` bounds the wait too."""
        if timeout_s is not None:
            self._conn.settimeout(timeout_s)
        return self.finish(self.begin(service, method, request, namespace=namespace, timeout_s=timeout_s), response)

    def close(self) -> None:
        """End the connection."""
        self._conn.close()
