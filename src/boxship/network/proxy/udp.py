"""Datagrams of a published port: a socket of its own for each client, so that answers find back.

Runs in: the helper, on its loop.
Spec: udp(7), IP_PKTINFO in ip(7), IPV6_RECVPKTINFO in ipv6(7). Docker's proxy forgets a client after 90 s of silence; so do we.
"""

from __future__ import annotations

import _socket
import time
from _struct import Struct

from boxship.kit.loop import IN
from boxship.network.proxy.control import PortMapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.kit.loop import Loop

IDLE_S = 90.0
CLIENTS_MAX = 4096
"""Per port; the one that has been silent for longest makes place for a new one."""
_TURN = 64
_SIZE = 65536
_SWEEP_S = 15.0
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50
_PKTINFO4 = Struct("=i4s4s")
"""struct in_pktinfo: interface, local address, destination address."""
_PKTINFO6 = Struct("=16si")
_CONTROL = _socket.CMSG_SPACE(_PKTINFO6.size)

Ancillary = list[tuple[int, int, bytes]]


class _Client:
    __slots__ = ("address", "key", "socket", "source", "used")

    def __init__(self, key: object, made: _socket.socket, address: Any, source: Ancillary) -> None:
        self.key = key
        self.socket = made
        self.address = address
        self.source = source
        """Which of our addresses the client knows us by."""
        self.used = 0.0


class Datagrams:
    """A UDP port. Raises OSError when made."""

    def __init__(self, loop: Loop, listener: _socket.socket, mapping: PortMapping) -> None:
        """Takes the bound socket."""
        self._loop = loop
        self._listener = listener
        self._target = (mapping.container_ip, mapping.container_port)
        self._family = _socket.AF_INET6 if ":" in mapping.container_ip else _socket.AF_INET
        self._clients: dict[object, _Client] = {}
        # Bound to all addresses, the kernel would answer from the one of the way back, which is not always the one asked.
        self._any = mapping.host_ip in ("0.0.0.0", "::")
        if self._any and ":" in mapping.host_ip:
            listener.setsockopt(_socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        elif self._any:
            listener.setsockopt(_socket.IPPROTO_IP, _IP_PKTINFO, 1)
        loop.add(listener.fileno(), IN, self._from_clients)
        self._timer = loop.after(_SWEEP_S, self._sweep)

    def connections(self) -> int:
        """How many clients are known."""
        return len(self._clients)

    def close(self) -> None:
        """The port is free."""
        self._timer.cancel()
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for client in list(self._clients.values()):
            self._forget(client)

    def _from_clients(self, events: int) -> None:
        now_s = time.monotonic()
        for _ in range(_TURN):
            source: Ancillary = []
            try:
                if self._any:
                    data, control, _, address = self._listener.recvmsg(_SIZE, _CONTROL)
                    source = [_back(each) for each in control if each[1] in (_IP_PKTINFO, _IPV6_PKTINFO)]
                    key: object = (address, source[0][2] if source else b"")
                else:
                    data, address = self._listener.recvfrom(_SIZE)
                    key = address
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an answer that nobody waited for
            client = self._clients.pop(key, None)
            if client is None:
                try:
                    client = self._meet(key, address, source)
                except OSError:
                    continue  # the container cannot be reached, or there is no descriptor: datagrams get lost
            self._clients[key] = client  # the last one is the one used last
            client.used = now_s
            _send(client.socket, data)

    def _meet(self, key: object, address: Any, source: Ancillary) -> _Client:
        if len(self._clients) >= CLIENTS_MAX:
            self._forget(next(iter(self._clients.values())))
        made = _socket.socket(self._family, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK, 0)
        try:
            made.connect(self._target)
        except BaseException:
            made.close()
            raise
        client = _Client(key, made, address, source)
        self._loop.add(made.fileno(), IN, lambda events: self._from_container(client))
        return client

    def _from_container(self, client: _Client) -> None:
        client.used = time.monotonic()
        for _ in range(_TURN):
            try:
                data = client.socket.recv(_SIZE)
            except BlockingIOError:
                return
            except OSError:
                continue  # the port in the container is closed: said once for each datagram
            try:
                if client.source:
                    self._listener.sendmsg([data], client.source, 0, client.address)
                else:
                    self._listener.sendto(data, client.address)
            except OSError:
                pass  # the client cannot be reached, or the buffer is full: datagrams get lost

    def _sweep(self) -> None:
        self._timer = self._loop.after(_SWEEP_S, self._sweep)
        limit = time.monotonic() - IDLE_S
        for client in [each for each in self._clients.values() if each.used < limit]:
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        self._clients.pop(client.key, None)
        self._loop.remove(client.socket.fileno())
        client.socket.close()


def _send(to: _socket.socket, data: bytes) -> None:
    for _ in range(2):
        try:
            to.send(data)
            return
        except ConnectionRefusedError:
            continue  # said of the one before; this one has not been sent
        except OSError:
            return


def _back(control: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
    """What arrived at an address, as what is to leave from it."""
    level, kind, data = control
    if kind == _IP_PKTINFO:
        _, _, address = _PKTINFO4.unpack(data)
        return level, kind, _PKTINFO4.pack(0, address, bytes(4))
    address, interface = _PKTINFO6.unpack(data)
    # Link-local addresses mean something with their interface alone.
    return level, kind, _PKTINFO6.pack(address, interface if address[:2] == b"\xfe\x80" else 0)
