"""The name servers in the containers' network namespaces.

Runs in: the helper, on its loop; that thread visits other network namespaces, between which and coming back nothing else runs.
Spec: RFC 1035, RFC 7766; what libnetwork's resolver answers:

    A, AAAA     of a name that is known: its addresses of that family, any of them first; none when it has none
    PTR         of an address that is known: NAME.NETWORK
    MX          of a name that is known: none; so SVCB and HTTPS, which would lead to somebody else of that name
    all others  from the servers outside, which are none on internal networks: SERVFAIL

What a container sends is never trusted: only well-formed questions of the class IN are passed on, to the servers that the daemon
named, so many at a time for each container.
"""

from __future__ import annotations

import _socket
import _thread
import os
import time

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.kit.loop import IN, Loop
from boxship.linux.netns import Inside
from boxship.network.dns import message, redirect
from boxship.network.dns.forward import Forward
from boxship.network.dns.names import Names, Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from boxship.kit.loop import Timer
    from boxship.network.dns.message import Query

ADDRESS, PORT = "127.0.0.11", 53
TTL_S = 600
FORWARDS_MAX, STREAMS_MAX = 256, 32
"""Per container."""
FORWARDS_TOTAL = 4096
STREAM_IDLE_S = 10.0
_TURN = 32
_BACKLOG = 64
_OWN = (message.A, message.AAAA, message.MX, message.SVCB, message.HTTPS)

class Resolvers:
    """All of them, and the names they know."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.names = Names()
        self.forwards = 0
        self._by_sandbox: dict[str, Resolver] = {}
        self._round = 0

    @property
    def serving(self) -> int:
        """How many there are."""
        return len(self._by_sandbox)

    def begin(self) -> None:
        """Everything there is to be follows."""
        self._round += 1
        self.names.begin()

    def end(self) -> None:
        """What was not named since `begin` is dropped."""
        self.names.end()
        for sandbox in [key for key, each in self._by_sandbox.items() if each.named != self._round]:
            self._by_sandbox.pop(sandbox).close()

    def command(self, command: dict[str, Any]) -> None:
        """A message of the daemon (`boxship.network.proxy.control`). Raises BoxshipError, OSError."""
        do = command["do"]
        if do == "network":
            self.names.network(command["network"], command["name"])
        elif do == "forget":
            self.names.forget(command["network"])
        elif do == "join":
            self.names.join(command["network"], command["endpoint"], command["names"], command["addresses"])
        elif do == "leave":
            self.names.leave(command["endpoint"])
        elif do == "attach":
            self._attach(command)
        else:
            gone = self._by_sandbox.pop(command["sandbox"], None)
            if gone is not None:
                gone.close()

    def _attach(self, command: dict[str, Any]) -> None:
        sandbox, path = command["sandbox"], command["netns"]
        resolver = self._by_sandbox.get(sandbox)
        if resolver is not None and not resolver.is_at(path):
            # The sandbox was made again.
            self._by_sandbox.pop(sandbox).close()
            resolver = None
        if resolver is None:
            resolver = self._by_sandbox[sandbox] = Resolver(self, path)
        resolver.places = [(identity, {key.lower(): name.lower() for key, name in links.items()})
                           for identity, links in command["networks"]]
        # In the container's namespace that address is this resolver itself.
        resolver.servers = [(address, host) for address, host in command["servers"] if host or address != ADDRESS]
        resolver.keeps_short = bool(command.get("ndots"))
        resolver.named = self._round


class Resolver:
    """The one of a container."""

    def __init__(self, owner: Resolvers, path: str) -> None:
        """Opens its sockets. Raises BoxshipError."""
        self.places: list[Place] = []
        self.servers: list[tuple[str, bool]] = []
        self.keeps_short = False
        """Names without a dot are not for the servers outside: the container's own search list is to come first."""
        self.named = 0
        self._owner = owner
        self._loop = owner.loop
        self._forwards: set[Forward] = set()
        self._streams: set[_Stream] = set()
        try:
            self._namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidArgument(f"network namespace {path}: {(error.strerror or '').lower()}") from None
        try:
            with Inside(self._namespace):
                self._datagrams, self._listener = _listen()
        except OSError as error:
            os.close(self._namespace)
            raise BoxshipError(f"name server of {path}: listen {ADDRESS}:{PORT}: {(error.strerror or '').lower()}") from None
        self._loop.add(self._datagrams.fileno(), IN, self._on_datagrams)
        self._loop.add(self._listener.fileno(), IN, self._on_listener)

    def is_at(self, path: str) -> bool:
        """Whether this is the namespace that the path leads to."""
        try:
            found, own = os.stat(path), os.fstat(self._namespace)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def close(self) -> None:
        """The container is gone."""
        for each in list(self._streams):
            each.close()
        for forward in list(self._forwards):
            forward.stop()
            self._over(forward)
        for served in (self._datagrams, self._listener):
            self._loop.remove(served.fileno())
            served.close()
        # Besides, because of what the kernel waits for meanwhile. The container may live on, and may be told so at once then.
        _thread.start_new_thread(_undo, (self._namespace,))

    def forget(self, stream: _Stream) -> None:
        """It has been closed."""
        self._streams.discard(stream)

    def _on_datagrams(self, events: int) -> None:
        served = self._datagrams
        for _ in range(_TURN):
            try:
                packet, address = served.recvfrom(message.MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError:
                continue

            def reply(answer: bytes, address: Any = address) -> None:
                try:
                    served.sendto(answer, address)
                except OSError:
                    pass  # it has gone, or does not read: it will ask again

            self.ask(packet, reply, stream=False)

    def _on_listener(self, events: int) -> None:
        for _ in range(_TURN):
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
            except OSError:
                return
            made = _socket.socket(fileno=fd)
            if len(self._streams) >= STREAMS_MAX:
                made.close()
                continue
            made.setblocking(False)
            self._streams.add(_Stream(self, self._loop, made))

    def ask(self, packet: bytes, reply: Callable[[bytes], None], *, stream: bool) -> None:
        """Have `packet` answered, now or later; what is no query may never be."""
        try:
            query = message.parse(packet)
        except message.Malformed as error:
            if error.answer:
                reply(error.answer)
            return
        limit = message.MESSAGE_MAX if stream else query.payload
        if query.klass != message.IN or query.kind in (message.AXFR, message.IXFR):
            reply(message.answer(query, code=message.REFUSED))
            return
        records = self._own(query)
        if records is not None:
            reply(message.answer(query, records, limit=limit))
            return
        short = self.keeps_short and query.kind in (message.A, message.AAAA) and "." not in query.name
        if short:
            reply(message.answer(query))
        elif not self.servers or len(self._forwards) >= FORWARDS_MAX or self._owner.forwards >= FORWARDS_TOTAL:
            reply(message.answer(query, code=message.SERVFAIL))
        else:
            self._forward(query, packet, reply, stream=stream)

    def _own(self, query: Query) -> list[bytes] | None:
        """The records of what is known here; None when it is for others to say."""
        if query.kind == message.PTR:
            address = message.address_of(query.name)
            name = self._owner.names.reverse(self.places, address) if address else ""
            return [message.pointer_record(name, TTL_S)] if name else None
        if query.kind not in _OWN or not query.name:
            return None
        found = self._owner.names.find(self.places, query.name)
        if found is None:
            return None
        wanted = [each for each in found if query.kind == (message.AAAA if ":" in each else message.A)]
        if len(wanted) > 1:
            # Clients take the first one.
            first = int.from_bytes(os.urandom(4)) % len(wanted)
            wanted = wanted[first:] + wanted[:first]
        return [message.address_record(each, TTL_S) for each in wanted]

    def _forward(self, query: Query, packet: bytes, reply: Callable[[bytes], None], *, stream: bool) -> None:
        def finish(answer: bytes | None) -> None:
            self._over(forward)
            reply(message.answer(query, code=message.SERVFAIL) if answer is None else answer)

        forward = Forward(
            self._loop, query, packet, stream=stream, servers=self.servers, make=self._make, finish=finish
        )
        self._forwards.add(forward)
        self._owner.forwards += 1
        forward.start()

    def _over(self, forward: Forward) -> None:
        self._forwards.discard(forward)
        self._owner.forwards -= 1

    def _make(self, family: int, kind: int, in_host: bool) -> _socket.socket:
        if in_host:
            return _made(family, kind)
        with Inside(self._namespace):
            return _made(family, kind)


def _listen() -> tuple[_socket.socket, _socket.socket]:
    """For datagrams and streams, in the present namespace, where ADDRESS:PORT leads to them. Raises OSError."""
    try:
        pair = _bound(0)
        try:
            redirect.redirect(ADDRESS, PORT, pair[0].getsockname()[1], pair[1].getsockname()[1])
        except BaseException:
            for each in pair:
                each.close()
            raise
        return pair
    except OSError:
        # A kernel without nftables: the port itself, which the container cannot have then.
        return _bound(PORT)


def _undo(namespace: int) -> None:
    """Takes the descriptor."""
    try:
        with Inside(namespace):
            redirect.undo()
    except OSError:
        pass  # it was not there: the kernel lacks nftables, or the container took it away
    os.close(namespace)


def _bound(port: int) -> tuple[_socket.socket, _socket.socket]:
    datagrams, listener = _made(_socket.AF_INET, _socket.SOCK_DGRAM), _made(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        datagrams.bind((ADDRESS, port))
        listener.bind((ADDRESS, port))
        listener.listen(_BACKLOG)
    except BaseException:
        datagrams.close()
        listener.close()
        raise
    return datagrams, listener


def _made(family: int, kind: int) -> _socket.socket:
    return _socket.socket(family, kind | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK, 0)


class _Stream:
    """A client that asks by TCP."""

    def __init__(self, resolver: Resolver, loop: Loop, connection: _socket.socket) -> None:
        self._resolver = resolver
        self._loop = loop
        self._connection = connection
        self._received = b""
        self._open = True
        self._used_s = time.monotonic()
        loop.add(connection.fileno(), IN, self._read)
        self._timer: Timer = loop.after(STREAM_IDLE_S, self._look)

    def close(self) -> None:
        """Nothing happens the second time."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        self._loop.remove(self._connection.fileno())
        self._connection.close()
        self._resolver.forget(self)

    def _read(self, events: int) -> None:
        try:
            data = self._connection.recv(message.MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._used_s = time.monotonic()
        self._received += data
        while self._open and len(self._received) >= 2:
            size = int.from_bytes(self._received[:2])
            if len(self._received) < 2 + size:
                return
            packet, self._received = self._received[2 : 2 + size], self._received[2 + size :]
            self._resolver.ask(packet, self._reply, stream=True)

    def _reply(self, answer: bytes) -> None:
        if not self._open:
            return
        data = len(answer).to_bytes(2) + answer
        try:
            sent = self._connection.send(data)
        except OSError:
            sent = 0
        if sent < len(data):
            self.close()  # it asks and does not read
        else:
            self._used_s = time.monotonic()

    def _look(self) -> None:
        left_s = self._used_s + STREAM_IDLE_S - time.monotonic()
        if left_s <= 0:
            self.close()
        else:
            self._timer = self._loop.after(left_s, self._look)
