"""What the daemon and the helper say to each other.

Runs in: the daemon, and the helper.
Spec: unix(7), SOCK_SEQPACKET: each message is one JSON object, each has one answer, in the same order; a bound socket may come
with `publish` (SCM_RIGHTS). An answer has what was asked for, or {"error": text, "code": the number of its class in kit.errors}.

    {"do": "hello"}                                 → {"version": VERSION, "instance": which helper this is, "pid": …}
    {"do": "begin", "what": "ports" or "names"}     all there is to be follows
    {"do": "end", "what": …}                        what was not named since `begin` is dropped
    {"do": "publish", "port": PortMapping}          once answered, it listens
    {"do": "withdraw", "port": PortMapping}         once answered, it is free, and its connections are closed
    {"do": "network", "network": id, "name": …}     {"do": "forget", "network": id}
    {"do": "join", "network": id, "endpoint": id, "names": […], "addresses": […]}       {"do": "leave", "endpoint": id}
    {"do": "attach", "sandbox": id, "netns": path, "networks": [[id, {alias: name}], …], "servers": [[address, in the host's
     namespace], …], "ndots": whether the container's resolv.conf says so}              {"do": "detach", "sandbox": id}
    {"do": "stop"}
"""

from __future__ import annotations

import os

VERSION = 1
MESSAGE_MAX = 128 << 10
SOCKET, LOCK, LOG = "socket", "lock", "log"
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


class PortMapping(tuple[str, str, int, str, int]):
    """A port of the host that leads to one of a container. A plain tuple in messages.

    Not a NamedTuple: the helper does without typing and collections, which are half of what it would have to import.
    """

    __slots__ = ()

    def __new__(cls, protocol: str, host_ip: str, host_port: int, container_ip: str, container_port: int) -> PortMapping:
        """The container's address may be of another family than the host's."""
        return super().__new__(cls, (protocol, host_ip, host_port, container_ip, container_port))

    @property
    def protocol(self) -> str:
        """tcp, udp or sctp."""
        return self[0]

    @property
    def host_ip(self) -> str:
        """An address of the host, 0.0.0.0 or :: for all of that family."""
        return self[1]

    @property
    def host_port(self) -> int:
        """From 1."""
        return self[2]

    @property
    def container_ip(self) -> str:
        """IPv4 or IPv6."""
        return self[3]

    @property
    def container_port(self) -> int:
        """From 1."""
        return self[4]

    def __str__(self) -> str:
        host = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip
        container = f"[{self.container_ip}]" if ":" in self.container_ip else self.container_ip
        return f"{host}:{self.host_port}:{container}:{self.container_port}/{self.protocol}"


def folder(state_dir: str) -> str:
    """Where the helper's socket, its lock and its log are."""
    return os.path.join(state_dir, "network")


def address(folder_fd: int) -> str:
    """The socket in that folder as an address; a path of any length fits this way."""
    return f"/proc/self/fd/{folder_fd}/{SOCKET}"
