"""Host ports: what was asked for, what is free, who has it.

Runs in: the daemon.
Spec: Docker Engine API (PortMap, PublishAllPorts); libnetwork's port allocator: a range gives its first free port, no port the
next one of the kernel's own range; a port that is meant for all addresses is the same one in IPv4 and IPv6.

Each port is held by a bound socket, so that no other program gets it, until the proxy listens there itself.
"""

from __future__ import annotations

import errno
import re
import socket
from typing import Any, NamedTuple

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.network.model import Published

_FALLBACK = (49153, 65535)
_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, 132),
}
_PORT = re.compile(r"(\d+)(?:-(\d+))?(?:/(tcp|udp|sctp))?\Z")
ANY = ("0.0.0.0", "::")


class Wanted(NamedTuple):
    """One binding: a container's port, and the host's from `low` to `high` (both 0: any)."""

    protocol: str
    container_port: int
    host_ip: str
    """"" for all addresses."""
    low: int
    high: int


def container_port(text: str) -> tuple[int, str]:
    """`80/tcp` as (80, "tcp"). Raises InvalidArgument."""
    found = _PORT.match(text)
    if not found or found[2] or not 0 < int(found[1]) <= 65535:
        raise InvalidArgument(f"invalid port specification: {text}")
    return int(found[1]), found[3] or "tcp"


def _host_range(text: str, where: str) -> tuple[int, int]:
    if not text:
        return 0, 0
    low, dash, high = text.partition("-")
    if not low.isdigit() or (dash and not high.isdigit()) or int(low) > 65535 or (dash and not int(low) <= int(high) <= 65535):
        raise InvalidArgument(f"invalid port specification: {text!r} for {where}".replace("'", '"'))
    return int(low), int(high) if dash else int(low)


def wanted(
    bindings: dict[str, Any] | None, exposed: dict[str, Any] | None, *, publish_all: bool, default_ip: str
) -> list[Wanted]:
    """The bindings of a container. Raises InvalidArgument for what is none."""
    made: list[Wanted] = []
    for key, choices in (bindings or {}).items():
        port, protocol = container_port(key)
        for choice in choices or [{}]:
            if not isinstance(choice, dict):
                raise InvalidArgument(f"invalid port binding for {key}")
            host_ip = str(choice.get("HostIp") or "")
            if host_ip:
                try:
                    socket.inet_pton(socket.AF_INET6 if ":" in host_ip else socket.AF_INET, host_ip.strip("[]"))
                except OSError:
                    raise InvalidArgument(f"invalid IP address: {host_ip}") from None
            made.append(
                Wanted(protocol, port, host_ip.strip("[]") or default_ip, *_host_range(str(choice.get("HostPort") or ""), key))
            )
    if publish_all:
        bound = {(each.container_port, each.protocol) for each in made}
        for key in exposed or {}:
            if (found := container_port(key)) not in bound:
                made.append(Wanted(found[1], found[0], default_ip, 0, 0))
    # Those who want a certain port first, so that nobody who takes any takes theirs.
    return sorted(made, key=lambda each: (not each.low, each.low != each.high, each.container_port))


def _ephemeral() -> tuple[int, int]:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            low, high = map(int, file.read().split())
            return low, high
    except (OSError, ValueError):
        return _FALLBACK


def _bind(protocol: str, address: str, port: int) -> socket.socket:
    kind, number = _KINDS[protocol]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, kind | socket.SOCK_CLOEXEC, number)
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol != "udp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        if protocol == "tcp":
            # Two sockets with SO_REUSEADDR may both be bound as long as neither listens.
            made.listen(1)
    except BaseException:
        made.close()
        raise
    return made


class Ports:
    """Who has which port of the host."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], set[str]] = {}
        self._held: dict[tuple[str, str, int], socket.socket] = {}
        self._leaving: set[tuple[str, str, int]] = set()
        """Released, but the proxy may still listen."""
        self._next = 0

    def allocate(self, choices: list[Wanted], addresses: tuple[str, ...], target: str = "") -> list[Published]:
        """Take a port for each; `addresses` are those that "all" means, `target` is the container's, for messages.

        Raises BoxshipError in dockerd's words; nothing is taken then.
        """
        made: list[Published] = []
        try:
            for each in choices:
                targets = (
                    (each.host_ip,)
                    if each.host_ip not in ("", *ANY)
                    else tuple(address for address in addresses if each.host_ip in ("", address)) or (each.host_ip,)
                )
                made += self._take(each, targets, target)
        except BaseException:
            for port in made:
                self.release(port)
            raise
        return made

    def _take(self, each: Wanted, targets: tuple[str, ...], target: str) -> list[Published]:
        if each.low:
            candidates = list(range(each.low, each.high + 1))
        else:
            low, high = _ephemeral()
            start = self._next if low <= self._next <= high else low
            candidates = [*range(start, high + 1), *range(low, start)]
        failure = BoxshipError("all ports are allocated")
        for port in candidates:
            try:
                self._claim(each.protocol, targets, port, f"{target}:{each.container_port}")
            except BoxshipError as error:
                failure = error
                continue
            if not each.low:
                self._next = port + 1
            return [Published(each.protocol, address, port, each.container_port, "") for address in targets]
        if each.low != each.high:
            raise BoxshipError(f"Bind for {targets[0]}:{each.low}-{each.high} failed: all ports are allocated")
        raise failure

    def _claim(self, protocol: str, targets: tuple[str, ...], port: int, target: str) -> None:
        taken = self._taken.get((protocol, port), set())
        for address in targets:
            every = "::" if ":" in address else "0.0.0.0"
            same = {each for each in taken if (":" in each) == (":" in address)}
            if address in same or every in same or (address == every and same):
                raise BoxshipError(f"Bind for {address}:{port} failed: port is already allocated")
        held = {}
        try:
            for address in targets:
                key = (protocol, address, port)
                if key not in self._leaving:
                    held[key] = _bind(*key)
        except OSError as error:
            for each in held.values():
                each.close()
            reason = "cannot assign requested address" if error.errno == errno.EADDRNOTAVAIL else (error.strerror or "").lower()
            raise BoxshipError(f"failed to bind host port for {address}:{port}:{target}/{protocol}: {reason}") from None
        self._held |= held
        self._taken.setdefault((protocol, port), set()).update(targets)

    def adopt(self, port: Published) -> None:
        """Take in a port that a former daemon gave."""
        self._taken.setdefault((port.protocol, port.host_port), set()).add(port.host_ip)

    def hold(self, port: Published) -> None:
        """Keep others from it; somebody may have it already, the proxy for one."""
        key = (port.protocol, port.host_ip, port.host_port)
        if key not in self._held:
            try:
                self._held[key] = _bind(*key)
            except OSError:
                pass  # whoever has it keeps it from others

    def held(self, port: Published) -> socket.socket | None:
        """The socket that holds it, borrowed."""
        return self._held.get((port.protocol, port.host_ip, port.host_port))

    def leave(self, port: Published) -> None:
        """It may be given again, but the proxy may still listen there, until `left`."""
        self.release(port)
        self._leaving.add((port.protocol, port.host_ip, port.host_port))

    def left(self, port: Published) -> None:
        """The proxy listens there no more."""
        self._leaving.discard((port.protocol, port.host_ip, port.host_port))

    def let_go(self, port: Published) -> None:
        """Close the socket that holds it; the port stays taken."""
        held = self._held.pop((port.protocol, port.host_ip, port.host_port), None)
        if held is not None:
            held.close()

    def release(self, port: Published) -> None:
        """It may be given again."""
        self.let_go(port)
        key = (port.protocol, port.host_port)
        if (taken := self._taken.get(key)) is not None:
            taken.discard(port.host_ip)
            if not taken:
                del self._taken[key]
