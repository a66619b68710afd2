"""The daemon's side of the name servers: who is on which network, and which container is to be served.

Runs in: the daemon, in any thread.

It shares the connection, and the helper, of `boxship.network.proxy.client.Proxy`, and remembers what is to be as that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from boxship.network.proxy.client import Message, Proxy

SERVER = "127.0.0.11"
"""What the container's resolv.conf says; `boxship.network.dns.resolvers` listens there."""


@dataclass(frozen=True)
class Member:
    """An endpoint of a network, by whatever it is called there."""

    network: str
    """The network's id."""
    endpoint: str
    """The endpoint's id."""
    names: Sequence[str]
    """The container's name first (PTR tells it), then its short id, its aliases, its host name."""
    addresses: Sequence[str]
    """IPv4 and IPv6, without prefix."""

    def _message(self) -> Message:
        return {
            "do": "join", "network": self.network, "endpoint": self.endpoint, "names": list(self.names),
            "addresses": list(self.addresses),
        }


@dataclass(frozen=True)
class Server:
    """A server outside that questions are passed on to."""

    address: str
    in_host: bool = False
    """Asked from the host's namespace: for a server on the host's own loopback, from the host's own resolv.conf, and no other."""


@dataclass(frozen=True)
class Resolver:
    """What a container is to be served."""

    sandbox: str
    """The sandbox's id."""
    netns: str
    """The path of its network namespace."""
    networks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The networks it is on, by id, the one whose names come first first; with the links on each: own name → the name there."""
    servers: Sequence[Server] = ()
    """None for a container that is on internal networks only."""
    ndots: bool = False
    """Whether the user chose ndots: names without a dot are then not passed on."""

    def _message(self) -> Message:
        return {
            "do": "attach", "sandbox": self.sandbox, "netns": self.netns, "ndots": self.ndots,
            "networks": [[key, dict(links)] for key, links in self.networks.items()],
            "servers": [[each.address, each.in_host] for each in self.servers],
        }


class Dns:
    """All name servers. Thread-safe. Every call raises BoxshipError when the helper cannot do it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._networks: dict[str, str] = {}
        self._members: dict[str, Member] = {}
        self._resolvers: dict[str, Resolver] = {}
        proxy.also_tell(self._all)

    def network(self, identity: str, name: str) -> None:
        """A network whose names are served. Tells the helper with the next `join` when there is none yet."""
        with self._proxy.lock:
            self._networks[identity] = name
            if self._proxy.running():
                self._proxy.call({"do": "network", "network": identity, "name": name})

    def forget(self, identity: str) -> None:
        """The network is no more."""
        with self._proxy.lock:
            self._networks.pop(identity, None)
            self._members = {key: each for key, each in self._members.items() if each.network != identity}
            if self._proxy.running():
                self._proxy.call({"do": "forget", "network": identity})

    def join(self, member: Member) -> None:
        """An endpoint is on its network, or has other names now."""
        with self._proxy.lock:
            self._members[member.endpoint] = member
            if self._proxy.running():
                self._proxy.call(member._message())

    def leave(self, endpoint: str) -> None:
        """It is on it no more. Nothing happens when it is not known."""
        with self._proxy.lock:
            self._members.pop(endpoint, None)
            if self._proxy.running():
                self._proxy.call({"do": "leave", "endpoint": endpoint})

    def attach(self, resolver: Resolver) -> None:
        """Serve a container: 127.0.0.11:53 answers when this returns. For one that is served it is an update."""
        with self._proxy.lock:
            before = self._resolvers.get(resolver.sandbox)
            self._resolvers[resolver.sandbox] = resolver
            try:
                self._proxy.ensure()
                self._proxy.call(resolver._message())
            except BaseException:
                if before is None:
                    del self._resolvers[resolver.sandbox]
                raise

    def detach(self, sandbox: str) -> None:
        """Serve it no more. Nothing happens when it is not served."""
        with self._proxy.lock:
            self._resolvers.pop(sandbox, None)
            if self._proxy.running():
                self._proxy.call({"do": "detach", "sandbox": sandbox})

    def sync(self, networks: Mapping[str, str], members: Iterable[Member], resolvers: Iterable[Resolver]) -> None:
        """Exactly these; `networks` are names by id. What cannot be served is logged."""
        with self._proxy.lock:
            self._networks = dict(networks)
            self._members = {each.endpoint: each for each in members}
            self._resolvers = {each.sandbox: each for each in resolvers}
            if self._resolvers or self._proxy.running():
                self._proxy.tell(self._all())

    def _all(self) -> list[Message]:
        return [
            {"do": "begin", "what": "names"},
            *({"do": "network", "network": key, "name": name} for key, name in self._networks.items()),
            *(each._message() for each in self._members.values()),
            *(each._message() for each in self._resolvers.values()),
            {"do": "end", "what": "names"},
        ]
