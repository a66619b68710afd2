"""Questions that are for the servers outside: passed on as they came, and the answers as they are.

Runs in: the helper, on its loop.
Spec: RFC 1035 section 4.2; RFC 5452: an answer must come from whom was asked, to where it was asked from, under the number and
for the question asked. As libnetwork does: one server after the other, the next when one is silent, refuses or fails.
"""

from __future__ import annotations

import _socket
import errno
import os

from boxship.kit.loop import IN, OUT
from boxship.network.dns import message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from boxship.kit.loop import Loop, Timer

PATIENCE_S = 2.0
"""For one server. Clients give up after five seconds."""
SERVERS_MAX = 3
_PORT = 53

class Forward:
    """One question on its way. `finish` is called once, with the answer or None; until then `stop` ends it without a word."""

    def __init__(
        self, loop: Loop, query: message.Query, packet: bytes, *, stream: bool, servers: Sequence[tuple[str, bool]],
        make: Callable[[int, int, bool], _socket.socket], finish: Callable[[bytes | None], object],
    ) -> None:
        """`make(family, type, in the host's namespace)` makes a socket that does not block; `stream` is for what came by TCP."""
        self._loop = loop
        self._query = query
        self._packet = packet
        self._stream = stream
        self._servers = list(servers[:SERVERS_MAX])
        self._make = make
        self._finish = finish
        self._socket: _socket.socket | None = None
        self._timer: Timer | None = None
        self._number = 0
        self._unsent = b""
        self._received = b""
        self._refusal: bytes | None = None

    def start(self) -> None:
        """Ask the first one."""
        self._next()

    def stop(self) -> None:
        """Whoever asked is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _next(self) -> None:
        self.stop()
        while self._servers:
            address, in_host = self._servers.pop(0)
            try:
                self._ask(address, in_host)
            except OSError:
                self.stop()
                continue
            self._timer = self._loop.after(PATIENCE_S, self._next)
            return
        self._finish(self._refusal)

    def _ask(self, address: str, in_host: bool) -> None:
        family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
        made = self._make(family, _socket.SOCK_STREAM if self._stream else _socket.SOCK_DGRAM, in_host)
        self._socket = made
        # A number of ours and a port of the kernel's choice for each question: who cannot see it cannot guess both.
        self._number = int.from_bytes(os.urandom(2))
        self._received = b""
        packet = self._number.to_bytes(2) + self._packet[2:]
        if self._stream:
            code = made.connect_ex((address, _PORT))
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            self._unsent = len(packet).to_bytes(2) + packet
            self._loop.add(made.fileno(), OUT, self._on_stream)
        else:
            made.connect((address, _PORT))
            made.send(packet)
            self._loop.add(made.fileno(), IN, self._on_datagram)

    def _on_datagram(self, events: int) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(message.MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            self._next()  # nobody listens there
            return
        self._take(packet)

    def _on_stream(self, events: int) -> None:
        assert self._socket is not None
        try:
            if self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
                if not self._unsent:
                    self._loop.want(self._socket.fileno(), IN)
                return
            data = self._socket.recv(message.MESSAGE_MAX + 2)
        except BlockingIOError:
            return
        except OSError:
            self._next()
            return
        self._received += data
        size = int.from_bytes(self._received[:2])
        if len(self._received) >= 2 + size > 2:
            self._take(self._received[2 : 2 + size], last=True)
        elif not data:
            self._next()

    def _take(self, packet: bytes, last: bool = False) -> None:
        code = message.answers(self._query, self._number, packet)
        if code < 0:
            # Somebody else's: the right one may still come, but not after it in a stream.
            if last:
                self._next()
            return
        own = self._query.id.to_bytes(2) + packet[2:]
        if code in (message.SERVFAIL, message.REFUSED) and self._servers:
            self._refusal = own
            self._next()
            return
        self.stop()
        self._finish(own)
