"""Listening sockets of published ports, and what serves them.

Runs in: the helper.
Spec: ip(7), ipv6(7), tcp(7), udp(7), sctp(7); the texts are dockerd's.
"""

from __future__ import annotations

import _socket
import errno
import os

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.network.proxy import _relay
from boxship.network.proxy.control import PROTOCOLS, PortMapping

_BACKLOG = 4096
_KEEPALIVE = ((_socket.TCP_KEEPIDLE, 60), (_socket.TCP_KEEPINTVL, 15), (_socket.TCP_KEEPCNT, 9))
_WORKERS_MAX = 4
_IDLE_S = 90
"""When a client of a UDP port is forgotten, as by Docker's proxy."""
_IP_PKTINFO, _IPV6_RECVPKTINFO = 8, 49


class Served:
    """A port, served by the threads of `_relay`."""

    def __init__(self, listener: _socket.socket, mapping: PortMapping) -> None:
        """Takes the socket. Raises OSError."""
        listener.setblocking(False)
        if mapping.protocol != "udp":
            listener.listen(_BACKLOG)
        elif mapping.host_ip == "::":
            # Bound to all addresses, the kernel would answer from the one of the way back, which is not always the one asked.
            listener.setsockopt(_socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        elif mapping.host_ip == "0.0.0.0":
            listener.setsockopt(_socket.IPPROTO_IP, _IP_PKTINFO, 1)
        # Accepted sockets inherit these: two hops must not add a delay each, and who has vanished is not kept for ever.
        if mapping.protocol == "tcp":
            listener.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                listener.setsockopt(_socket.IPPROTO_TCP, option, value)
        _relay.start(min(_WORKERS_MAX, len(os.sched_getaffinity(0))))
        self._id = _relay.listen(
            listener.detach(), mapping.container_ip, mapping.container_port, PROTOCOLS[mapping.protocol], _IDLE_S
        )

    def connections(self) -> int:
        """How many are open; of a UDP port, how many clients are known."""
        return _relay.connections(self._id)

    def close(self) -> None:
        """The port is free, and its connections are closed."""
        _relay.withdraw(self._id)


def check(mapping: PortMapping) -> None:
    """Raises InvalidArgument for what is no mapping."""
    if mapping.protocol not in PROTOCOLS:
        raise InvalidArgument(f"{mapping.protocol}: no such protocol of ports")
    for address, port in ((mapping.host_ip, mapping.host_port), (mapping.container_ip, mapping.container_port)):
        try:
            _socket.inet_pton(_socket.AF_INET6 if ":" in address else _socket.AF_INET, address)
        except (OSError, ValueError):
            raise InvalidArgument(f"invalid IP address: {address}") from None
        if not 0 < port < 65536:
            raise InvalidArgument(f"invalid port: {port}")


def serve(mapping: PortMapping, listener: int = -1) -> Served:
    """Listen, on the descriptor `listener` (taken) or on a new socket, and serve. Raises BoxshipError."""
    check(mapping)
    try:
        made = _listen(mapping) if listener < 0 else _socket.socket(fileno=listener)
        try:
            return Served(made, mapping)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            lacks = "SCTP" if mapping.protocol == "sctp" else "IPv6" if ":" in mapping.host_ip else mapping.protocol
            raise Unsupported(
                f"failed to bind host port for {mapping}: the kernel has no {lacks}", "load its module if it has one"
            ) from None
        text = "cannot assign requested address" if error.errno == errno.EADDRNOTAVAIL else (error.strerror or "").lower()
        raise BoxshipError(f"failed to bind host port for {mapping}: {text}") from None


def _listen(mapping: PortMapping) -> _socket.socket:
    """A bound socket. Raises OSError."""
    v6 = ":" in mapping.host_ip
    made = _socket.socket(
        _socket.AF_INET6 if v6 else _socket.AF_INET,
        (_socket.SOCK_DGRAM if mapping.protocol == "udp" else _socket.SOCK_STREAM) | _socket.SOCK_CLOEXEC,
        PROTOCOLS[mapping.protocol],
    )
    try:
        if v6:
            # All IPv4 addresses are another mapping.
            made.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        if mapping.protocol != "udp":
            made.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        made.bind((mapping.host_ip, mapping.host_port))
    except BaseException:
        made.close()
        raise
    return made
