"""What the helper process is told about a container: its ports, its names, its name server.

Runs in: the threads of the manager; calls block.
Not here: the helper itself (boxship.network.proxy, boxship.network.dns), which outlives the daemon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from boxship.network import files
from boxship.network.dns.client import Dns, Member, Resolver, Server
from boxship.network.model import Endpoint, Network, Published, Sandbox
from boxship.network.ports import Ports
from boxship.network.proxy.client import PortMapping, Proxy


def _mapping(port: Published) -> PortMapping:
    return PortMapping(port.protocol, port.host_ip, port.host_port, port.container_ip, port.container_port)


def _named(endpoint: Endpoint) -> bool:
    """Whether it is on a network that a user made, where names are resolved."""
    return bool(endpoint.dns_names)


def resolves(sandbox: Sandbox) -> bool:
    """Whether its name server is ours."""
    return any(map(_named, sandbox.endpoints))


class Serving:
    """Tells the helper; a helper that is not needed is not started. Calls raise BoxshipError."""

    def __init__(self, state: str, ports: Ports, networks: Mapping[str, Network], *, proxied: bool) -> None:
        self._proxy = Proxy(state)
        self._dns = Dns(self._proxy)
        self._ports = ports
        self._networks = networks
        self._proxied = proxied

    def _resolver(self, sandbox: Sandbox) -> Resolver:
        places = [each for each in sandbox.endpoints if _named(each)]
        places.sort(key=lambda each: (-each.priority, self._networks[each.network].name))
        if all(self._networks[each.network].internal for each in sandbox.endpoints):
            servers = []
        elif sandbox.dns:
            servers = [Server(address) for address in sandbox.dns]
        else:
            # The host's own servers are asked from the host, whose loopback they may be on.
            servers = [Server(address, in_host=files.local(address)) for address in files.external(files.host_resolv())]
        links = {each.network: {alias: name for name, alias in each.links} for each in places}
        return Resolver(sandbox.id, sandbox.path, links, servers, sandbox.ndots)

    @staticmethod
    def _member(endpoint: Endpoint) -> Member:
        addresses = [address for address in (endpoint.ipv4, endpoint.ipv6) if address]
        return Member(endpoint.network, endpoint.id, endpoint.dns_names, addresses)

    def names(self, sandbox: Sandbox, endpoints: Iterable[Endpoint]) -> None:
        """These endpoints of a container are there, or have other names; its own server knows of them."""
        found = [each for each in endpoints if _named(each)]
        for endpoint in found:
            self._dns.network(endpoint.network, self._networks[endpoint.network].name)
            self._dns.join(self._member(endpoint))
        if resolves(sandbox):
            self._dns.attach(self._resolver(sandbox))
        else:
            self._dns.detach(sandbox.id)

    def no_names(self, endpoints: Iterable[Endpoint], sandbox_id: str = "") -> None:
        """These endpoints are gone, and with `sandbox_id` the whole container is."""
        found = [each for each in endpoints if _named(each)]
        for endpoint in found:
            self._dns.leave(endpoint.id)
        if sandbox_id and found:
            self._dns.detach(sandbox_id)

    def forget(self, network: Network) -> None:
        """A network that is gone."""
        self._dns.forget(network.id)

    def publish(self, ports: Iterable[Published]) -> None:
        """Listen on ports of the host; the sockets that held them are closed."""
        for port in ports if self._proxied else ():
            self._proxy.publish(_mapping(port), self._ports.held(port))
            self._ports.let_go(port)

    def withdraw(self, ports: Iterable[Published]) -> None:
        """Listen no more."""
        for port in ports:
            if self._proxied:
                self._proxy.withdraw(_mapping(port))
            self._ports.left(port)

    def sync(self, sandboxes: Iterable[Sandbox]) -> None:
        """After a start of the daemon: exactly what these need, which the helper mostly has."""
        sandboxes = list(sandboxes)
        endpoints = [each for sandbox in sandboxes for each in sandbox.endpoints]
        for each in endpoints if self._proxied else ():
            for port in each.published:
                self._ports.let_go(port)
        self._proxy.sync(_mapping(port) for each in endpoints for port in each.published if self._proxied)
        named = [each for each in endpoints if _named(each)]
        titles = {each.network: self._networks[each.network].name for each in named}
        self._dns.sync(titles, map(self._member, named), (self._resolver(each) for each in sandboxes if resolves(each)))
        self._proxy.watch()

    def close(self) -> None:
        """The helper goes on with what it serves."""
        self._proxy.close()
