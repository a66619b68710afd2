"""Bridges, pairs and sub-interfaces in the kernel.

Runs in: the network thread of the daemon, which may visit other namespaces; blocking.
Spec: rtnetlink(7). One batch of requests in the host's namespace and one in the container's bring an endpoint up.
"""

from __future__ import annotations

import os
import secrets

from boxship.abi import netlink as abi
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, Unsupported
from boxship.linux import rtnetlink as rt
from boxship.linux.namespaces import identity, owner_of
from boxship.linux.netlink import Message, Socket, attribute, number
from boxship.linux.netns import Inside
from boxship.network.model import OPTION_INHIBIT_IPV4, Endpoint, Network
from boxship.network.sandbox import sysctl

CAP_NET_ADMIN = 12


class Links:
    """The host's side, with one netlink socket of its namespace."""

    def __init__(self) -> None:
        self._route = Socket()
        self._bridges: dict[str, int] = {}

    def close(self) -> None:
        """Close the socket."""
        self._route.close()

    # devices of networks

    def ensure(self, network: Network) -> None:
        """Make the device of a network when it is not there. Raises an error of the tree."""
        if network.driver == "bridge":
            self._ensure_bridge(network)
        elif network.driver in ("macvlan", "ipvlan") and not network.internal:
            self._parent(network)

    def _ensure_bridge(self, network: Network) -> int:
        name = network.device
        if (index := self._bridges.get(network.id)) is not None:
            return index
        found = rt.find_link(self._route, name)
        if found is None:
            # With an address of its own its MAC does not change with its ports.
            mac = "02:42:" + secrets.token_bytes(4).hex(":")
            self._route.run([rt.new_link(name, "bridge", mac=mac, mtu=network.mtu)])
            found = rt.find_link(self._route, name)
            if found is None:
                raise NotFound(f"the bridge {name} is gone")
        elif found.kind != "bridge":
            raise InvalidArgument(f"{name} is not a bridge")
        messages: list[Message] = []
        v6 = False
        for pool in network.pools:
            v6 = v6 or pool.v6
            if pool.gateway and (pool.v6 or not network.option(OPTION_INHIBIT_IPV4, default=False)):
                messages.append(rt.add_address(found.index, pool.gateway, int(pool.subnet.partition("/")[2])))
        try:
            sysctl(f"ipv6/conf/{name}/disable_ipv6", "0" if v6 else "1")
            if v6:
                sysctl(f"ipv6/conf/{name}/accept_ra", "0")
        except FileNotFoundError:
            if v6:
                raise Unsupported("the kernel has no IPv6") from None
        messages.append(rt.set_link(found.index, up=True, mtu=network.mtu))
        self._route.run(messages)
        self._bridges[network.id] = found.index
        return found.index

    def forget(self, network: Network) -> None:
        """Look at a network's device again before the next use."""
        self._bridges.pop(network.id, None)

    def _parent(self, network: Network) -> int:
        """Index of the device that sub-interfaces sit on, a VLAN of `eth0.50` made when it is not there."""
        name = network.device
        if not name:
            # Without a parent it is a network of its own, as with --internal.
            name = f"dm-{network.id[:12]}"
            if (found := rt.find_link(self._route, name)) is None:
                self._route.run(
                    [rt.new_link(name, "dummy", up=True, doing="making a dummy device for a network without a parent")]
                )
                found = rt.find_link(self._route, name)
        else:
            found = rt.find_link(self._route, name)
        if found is None and "." in name:
            below, _, tag = name.rpartition(".")
            lower = rt.find_link(self._route, below)
            if lower is not None and tag.isdigit() and 0 < int(tag) < 4095:
                data = attribute(abi.IFLA_VLAN_ID, int(tag).to_bytes(2, "little"))
                self._route.run([rt.new_link(name, "vlan", lower=lower.index, data=data, up=True)])
                found = rt.find_link(self._route, name)
        if found is None:
            raise InvalidArgument(f"invalid subinterface vlan name {name}, example formatting is eth0.10")
        return found.index

    def remove(self, network: Network) -> None:
        """Remove a network's own device. Raises an error of the tree."""
        self._bridges.pop(network.id, None)
        if network.driver == "bridge":
            self._route.run([rt.delete_link(name=network.device)])
        elif network.driver in ("macvlan", "ipvlan"):
            self._route.run([rt.delete_link(name=f"dm-{network.id[:12]}")])

    def ports_of(self, devices: set[str]) -> dict[str, str]:
        """The ports of these bridges: device by name → bridge."""
        found = rt.links(self._route)
        bridges = {each.index: each.name for each in found if each.name in devices}
        return {each.name: bridges[each.master] for each in found if each.master in bridges}

    def present(self) -> set[str]:
        """Names of all devices."""
        return {each.name for each in rt.links(self._route)}

    # endpoints

    def attach(self, network: Network, endpoint: Endpoint, namespace: int, *, hairpin: bool, default_route: bool) -> None:
        """Bring an endpoint up in `namespace` (a descriptor, borrowed). Raises an error of the tree; nothing is left then."""
        try:
            if network.driver == "bridge":
                self._attach_bridge(network, endpoint, namespace, hairpin=hairpin)
            else:
                self._attach_sub(network, endpoint, namespace)
            with Inside(namespace):
                self._configure(network, endpoint, default_route=default_route)
        except BaseException:
            if endpoint.host_link:
                self._route.run([rt.delete_link(name=endpoint.host_link)])
            raise

    def _attach_bridge(self, network: Network, endpoint: Endpoint, namespace: int, *, hairpin: bool) -> None:
        for again in (True, False):
            messages = [
                rt.new_veth(
                    endpoint.host_link,
                    master=self._ensure_bridge(network),
                    mtu=network.mtu,
                    peer=endpoint.interface,
                    peer_mac=endpoint.mac,
                    peer_namespace=namespace,
                )
            ]
            if hairpin or not network.icc:
                messages.append(rt.set_port(endpoint.host_link, hairpin=hairpin, isolated=not network.icc))
            try:
                self._route.run(messages)
                return
            except BoxshipError:
                # The bridge that we know may be gone: somebody removed it by hand.
                if not again or rt.find_link(self._route, network.device) is not None:
                    raise
                self.forget(network)

    def _attach_sub(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        modes = abi.MACVLAN_MODES if network.driver == "macvlan" else abi.IPVLAN_MODES
        chosen = network.options.get(f"{network.driver}_mode") or ("bridge" if network.driver == "macvlan" else "l2")
        if chosen not in modes:
            raise InvalidArgument(f"requested {network.driver} mode '{chosen}' is not valid")
        if network.driver == "macvlan":
            data = number(abi.IFLA_MACVLAN_MODE, modes[chosen])
        else:
            flag = network.options.get("ipvlan_flag") or "bridge"
            data = attribute(abi.IFLA_IPVLAN_MODE, modes[chosen].to_bytes(2, "little"))
            data += attribute(abi.IFLA_IPVLAN_FLAGS, abi.IPVLAN_FLAGS.get(flag, 0).to_bytes(2, "little"))
        self._route.run(
            [
                rt.new_link(
                    endpoint.interface,
                    network.driver,
                    lower=self._parent(network),
                    namespace=namespace,
                    mac=endpoint.mac if network.driver == "macvlan" else "",
                    mtu=network.mtu,
                    data=data,
                )
            ]
        )

    @staticmethod
    def _configure(network: Network, endpoint: Endpoint, *, default_route: bool) -> None:
        """In the container's namespace: addresses, up, routes."""
        name = endpoint.interface
        if endpoint.ipv6:
            try:
                sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
            except FileNotFoundError:
                raise Unsupported("the kernel has no IPv6") from None
        for word in filter(None, endpoint.driver_options.get("com.docker.network.endpoint.sysctls", "").split(",")):
            key, _, value = word.partition("=")
            path = key.replace("IFNAME", name).removeprefix("net.").replace(".", "/")
            if ".." in key or key.count("IFNAME") != 1:
                raise InvalidArgument(f"invalid endpoint sysctl {word}")
            try:
                sysctl(path, value)
            except OSError as error:
                raise InvalidArgument(f"setting {word}: {(error.strerror or '').lower()}") from None
        with Socket() as there:
            found = rt.find_link(there, name)
            if found is None:
                raise NotFound(f"the network device {name} is gone")
            messages = []
            for address, prefix in ((endpoint.ipv4, endpoint.prefix4), (endpoint.ipv6, endpoint.prefix6)):
                if address:
                    messages.append(rt.add_address(found.index, address, prefix))
            messages.append(rt.set_link(found.index, up=True))
            if default_route:
                messages += default_routes(found.index, network, endpoint)
            there.run(messages)

    def detach(self, endpoint: Endpoint) -> None:
        """Remove a pair; it may be gone. Raises an error of the tree."""
        if endpoint.host_link:
            self._route.run([rt.delete_link(name=endpoint.host_link)])

    def detach_all(self, names: list[str]) -> None:
        """Remove devices by name; they may be gone. Raises an error of the tree."""
        self._route.run([rt.delete_link(name=name) for name in names])


def leave(endpoint: Endpoint, namespace: int) -> None:
    """Remove an endpoint's device from a running container. Raises an error of the tree."""
    with Inside(namespace), Socket() as there:
        there.run([rt.delete_link(name=endpoint.interface)])


def default_routes(index: int, network: Network, endpoint: Endpoint) -> list[Message]:
    """The default routes over a device."""
    made = []
    if network.driver == "ipvlan" and network.options.get("ipvlan_mode") in ("l3", "l3s"):
        return [rt.route(index), *([rt.route(index, v6=True)] if endpoint.ipv6 else [])]
    if endpoint.gateway4:
        made.append(rt.route(index, gateway=endpoint.gateway4))
    if endpoint.gateway6:
        made.append(rt.route(index, gateway=endpoint.gateway6, v6=True))
    return made


def reroute(network: Network, endpoint: Endpoint, namespace: int) -> None:
    """Make an endpoint's gateway that of the container. Raises an error of the tree."""
    with Inside(namespace), Socket() as there:
        found = rt.find_link(there, endpoint.interface)
        if found is not None:
            there.run(default_routes(found.index, network, endpoint))


def used_subnets() -> list[str]:
    """Networks that the machine has a way to, by its routes and addresses."""
    with Socket() as route:
        found = [f"{address}/{prefix}" for address, prefix in rt.routes(route)]
        return found + [f"{address}/{prefix}" for _, address, prefix in rt.addresses(route)]


def permitted() -> bool:
    """Whether this process may make devices in its network namespace: it has the capability, and where the namespace was made."""
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next((int(line.split()[1], 16) for line in file if line.startswith("CapEff:")), 0)
    if not effective >> CAP_NET_ADMIN & 1:
        return False
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return owner_of(own) == identity("user")
    finally:
        os.close(own)
