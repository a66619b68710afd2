"""Containers and networks: what a container asked for, its place on them while it runs, and how answers show it.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API (NetworkingConfig, EndpointSettings, NetworkSettings), dockerd's words for what it refuses.
Not here: networks themselves (boxship.network); the routes of /networks (boxship.engine.routes.networks).

`Container.networks` has what was asked for, by the network's name: the wish stays while addresses come and go with each run.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any

from boxship.engine import shapes
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.engine.events import Filters
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from boxship.network import Attachment, Endpoint, Network, Sandbox, ports
from boxship.network.manager import Subject
from boxship.network.model import PREDEFINED

ENDPOINT = {
    "IPAMConfig": "map?",
    "Links": "[]string",
    "Aliases": "[]string",
    "MacAddress": "string",
    "DriverOpts": "map?",
    "GwPriority": "int",
    "NetworkID": "string",
}
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}\Z")
_PRIVATE = "container cannot be connected to multiple networks with one of the networks in private (none) mode"
_SHARED = "container sharing network namespace with another container or host cannot be connected to any other network"


# what was asked for


def asked(core: Core, networking: Any, config: dict[str, Any], host: dict[str, Any]) -> dict[str, Any]:
    """`Container.networks` of a create request; fills in the network mode. Raises InvalidArgument."""
    if host["NetworkMode"] in ("default", ""):
        host["NetworkMode"] = core.networks.default_mode
    mode = host["NetworkMode"]
    named = shapes.member(networking, "EndpointsConfig") or {}
    if not isinstance(named, dict):
        raise InvalidArgument("invalid NetworkingConfig")
    if mode.startswith("container:"):
        _check_joined(config, host)
        return {}
    if config["NetworkDisabled"]:
        return {}
    if mode == "host" and config["MacAddress"]:
        raise InvalidArgument("conflicting options: mac-address and the network mode")
    found = {
        _name(core, key if key != "default" else core.networks.default_mode): _endpoint(value) for key, value in named.items()
    }
    own = _name(core, mode)
    if mode in ("host", "none") and set(found) - {own}:
        raise InvalidArgument(
            _SHARED if mode == "host" else _PRIVATE
        )
    made = {own: found.pop(own, None) or _endpoint({}), **found}
    if config["MacAddress"]:
        given = made[own]["MacAddress"]
        if given and given != config["MacAddress"]:
            raise InvalidArgument(
                "the container-wide MAC address must match the endpoint-specific MAC address for the main network,"
                " or be left empty"
            )
        made[own]["MacAddress"] = config["MacAddress"]
    for name, endpoint in made.items():
        try:
            _check_endpoint(core, name, endpoint)
        except InvalidArgument as error:
            raise InvalidArgument(f"invalid config for network {name}: {error}") from None
    for text in host["Links"] or []:
        try:
            core.get(_link(text)[0])
        except NotFound as error:
            raise InvalidArgument(f"could not get container for {_link(text)[0]}: {error}") from None
    # Read for its errors: what no port can be is refused now.
    _ports(config, host)
    return made


def _check_joined(config: dict[str, Any], host: dict[str, Any]) -> None:
    for wrong, words in (
        (host["PortBindings"] or host["PublishAllPorts"], "port publishing and the container type network mode"),
        (config["Hostname"], "hostname and the network mode"),
        (config["ExposedPorts"], "port exposing and the container type network mode"),
        (host["Links"], "container type network can't be used with links. This would result in undefined behavior"),
        (host["Dns"], "dns and the network mode"),
        (host["ExtraHosts"], "custom host-to-IP mapping and the network mode"),
        (config["MacAddress"], "mac-address and the network mode"),
    ):
        if wrong:
            raise InvalidArgument(f"conflicting options: {words}")


def _name(core: Core, text: str) -> str:
    """The name of a network that is given by name or id; of one that is not there, what was given."""
    try:
        return core.networks.get(text).name
    except (NotFound, InvalidArgument):
        return text


def _endpoint(value: Any) -> dict[str, Any]:
    made = shapes.shape({} if value is None else value, ENDPOINT, "EndpointSettings")
    made["NetworkID"] = ""
    return made


def _check_endpoint(core: Core, name: str, endpoint: dict[str, Any]) -> None:
    """Raise InvalidArgument for what the network cannot give; one that is not there yet is asked at the start."""
    try:
        network: Network | None = core.networks.get(name)
    except (NotFound, InvalidArgument):
        network = None
    config = endpoint["IPAMConfig"] or {}
    addresses = [(version, config.get(f"IPv{version}Address", "")) for version in (4, 6)]
    problems = [f"invalid IPv{version} address: {text}" for version, text in addresses if text and _version(text) != version]
    if any(text for _, text in addresses):
        if name in PREDEFINED:
            problems.append("user specified IP address is supported on user defined networks only")
        if network is not None and not network.chosen:
            problems.append(
                "user specified IP address is supported only when connecting to networks with user configured subnets"
            )
        elif network is not None:
            problems += [
                f"no configured subnet or ip-range contain the IP address {text}"
                for _, text in addresses
                if text and not (_version(text) and network.holds(text))
            ]
    if name in PREDEFINED and endpoint["Aliases"]:
        problems.append("network-scoped alias is supported only for containers in user defined networks")
    if endpoint["MacAddress"] and not _MAC.match(endpoint["MacAddress"]):
        problems.append(f"invalid MAC address: {endpoint['MacAddress']}")
    if problems:
        shown = problems[0] if len(problems) == 1 else "\n".join(f"* {each}" for each in problems)
        raise InvalidArgument(f"invalid endpoint settings:\n{shown}")


def _version(address: str) -> int:
    try:
        return ip_address(address).version
    except ValueError:
        return 0


def _ports(config: dict[str, Any], host: dict[str, Any]) -> list[ports.Wanted]:
    for key in config["ExposedPorts"] or {}:
        ports.container_port(key)
    return ports.wanted(host["PortBindings"], config["ExposedPorts"], publish_all=host["PublishAllPorts"], default_ip="")


def _link(text: str) -> tuple[str, str]:
    """`name:alias`, as well as `/name:/own/alias` of older answers."""
    name, _, alias = text.partition(":")
    name = name.removeprefix("/")
    return name, alias.rpartition("/")[2] or name


def _attachment(container: Container, name: str, endpoint: dict[str, Any]) -> Attachment:
    config = endpoint["IPAMConfig"] or {}
    links = [_link(text) for text in endpoint["Links"] or []]
    if name == container.host["NetworkMode"] and name != "bridge":
        links += [_link(text) for text in container.host["Links"] or []]
    return Attachment(
        name,
        config.get("IPv4Address", ""),
        config.get("IPv6Address", ""),
        endpoint["MacAddress"].lower().replace("-", ":"),
        list(endpoint["Aliases"] or []),
        links,
        dict(endpoint["DriverOpts"] or {}),
        endpoint["GwPriority"],
    )


def subject(container: Container) -> Subject:
    """The container as the networks know it."""
    options = container.host["DnsOptions"] or []
    return Subject(
        container.id,
        container.name,
        container.config["Hostname"],
        _ports(container.config, container.host),
        container.host["Dns"] or [],
        any(option.startswith("ndots:") for option in options),
    )


def own_namespace(core: Core, container: Container) -> bool:
    """Whether it gets a namespace of ours: not one without any network, another container's or the host's."""
    mode = container.host["NetworkMode"]
    return not mode.startswith("container:") and mode not in ("none", "host") and not container.config["NetworkDisabled"]


# its life


async def prepare(core: Core, container: Container) -> Sandbox | None:
    """Choose addresses and ports for a start. Raises what dockerd refuses a start for."""
    if not own_namespace(core, container):
        for name in container.networks:
            container.networks[name]["NetworkID"] = core.networks.get(name).id
        return None
    wanted = [_attachment(container, name, endpoint) for name, endpoint in container.networks.items()]
    try:
        for name, endpoint in container.networks.items():
            core.networks.get(name)
            _check_endpoint(core, name, endpoint)
        sandbox = await core.networks.prepare(subject(container), wanted)
    except (NotFound, InvalidArgument, PermissionDenied, FailedPrecondition) as error:
        raise type(error)(f"failed to set up container networking: {error}") from None
    for place in sandbox.endpoints:
        network = core.networks.get(place.network)
        _note(container, network, place)
        _announce(core, "connect", network, container)
    return sandbox


def _note(container: Container, network: Network, place: Endpoint) -> None:
    """What answers show of a network even after the container has ended."""
    container.networks[network.name] |= {"NetworkID": network.id, "DNSNames": place.dns_names or None}


def release(core: Core, container: Container) -> None:
    """It has ended, or did not start."""
    sandbox = core.networks.sandbox(container.id)
    if sandbox is None:
        return
    names = [endpoint.network for endpoint in sandbox.endpoints]
    core.networks.release(container.id)
    for network_id in names:
        try:
            _announce(core, "disconnect", core.networks.get(network_id), container)
        except NotFound:
            continue


def _announce(core: Core, action: str, network: Network, container: Container) -> None:
    core.events.publish("network", action, network.id, {"container": container.id, "name": network.name, "type": network.driver})


async def connect(core: Core, network: Network, container: Container, settings: Any) -> None:
    """NetworkConnect. Raises as dockerd does."""
    endpoint = _endpoint(settings)
    mode = container.host["NetworkMode"]
    if container.state.removing or container.state.dead:
        raise FailedPrecondition(
            f"container {container.id} is marked for removal and cannot be connected or disconnected to the network"
        )
    if mode == "host" or mode.startswith("container:"):
        raise InvalidArgument(_SHARED)
    if network.name == "host":
        raise InvalidArgument("cannot connect container to host network - container must be created in host network mode")
    if "none" in container.networks or (network.name == "none" and container.networks):
        raise InvalidArgument(_PRIVATE)
    _check_endpoint(core, network.name, endpoint)
    if network.name in container.networks:
        if core.networks.sandbox(container.id) is not None:
            raise PermissionDenied(f"endpoint with name {container.name} already exists in network {network.name}")
        container.networks[network.name] = endpoint
        core.save(container)
        return
    wanted = _attachment(container, network.name, endpoint)
    async with container.lock:
        if core.networks.sandbox(container.id) is not None:
            place = await core.networks.connect(subject(container), wanted)
            container.networks[network.name] = endpoint
            _note(container, network, place)
            _announce(core, "connect", network, container)
        container.networks[network.name] = endpoint
        core.save(container)


async def disconnect(core: Core, network: Network, container: Container, *, force: bool) -> None:
    """NetworkDisconnect. Raises as dockerd does."""
    if container.host["NetworkMode"] == "host" and network.name == "host":
        raise InvalidArgument("cannot disconnect container from host network - container was created in host network mode")
    async with container.lock:
        if network.name not in container.networks:
            raise BoxshipError(f"container {container.id} is not connected to network {network.name}")
        if core.networks.sandbox(container.id) is not None:
            await core.networks.disconnect(subject(container), network)
            _announce(core, "disconnect", network, container)
        elif container.state.running and not force and own_namespace(core, container):
            raise BoxshipError(f"container {container.id} is not connected to network {network.name}")
        del container.networks[network.name]
        core.save(container)


def unlink(core: Core, path: str) -> None:
    """Take a link from a container: `CONTAINER/ALIAS`. Raises NotFound, InvalidArgument."""
    name, _, alias = path.removeprefix("/").rpartition("/")
    if not name:
        raise InvalidArgument("Conflict, cannot remove the default link name of the container")
    container = core.get(name)
    links = container.host["Links"] or []
    kept = [text for text in links if _link(text)[1] != alias]
    if len(kept) == len(links):
        raise NotFound(f"Cannot get parent /{container.name} for link name /{container.name}/{alias}")
    container.host["Links"] = kept or None
    core.save(container)


# answers


def host_lines(core: Core, container: Container) -> tuple[list[str], list[tuple[str, str]]]:
    """(its addresses, what links on the default bridge add) for /etc/hosts."""
    sandbox = core.networks.sandbox(container.id)
    if sandbox is None:
        return [], []
    own = [address for each in sandbox.endpoints for address in (each.ipv4, each.ipv6) if address]
    extra = []
    if container.host["NetworkMode"] == "bridge":
        for text in container.host["Links"] or []:
            name, alias = _link(text)
            other = core.get(name)
            place = core.networks.sandbox(other.id)
            if place is None:
                raise FailedPrecondition(f"Cannot link to a non running container: /{other.name} AS /{container.name}/{alias}")
            address = next((each.ipv4 for each in place.endpoints if core.networks.get(each.network).name == "bridge"), "")
            if address:
                names = dict.fromkeys((alias, other.config["Hostname"], other.name))
                extra.append((address, " ".join(names)))
    return own, extra


def link_environment(core: Core, container: Container) -> list[str]:
    """The variables that links on the default bridge give, as `DB_PORT_80_TCP_ADDR`."""
    made: list[str] = []
    if container.host["NetworkMode"] != "bridge":
        return made
    for text in container.host["Links"] or []:
        name, alias = _link(text)
        other = core.get(name)
        place = core.networks.sandbox(other.id)
        if place is None or not place.endpoints:
            continue
        address, prefix = place.endpoints[0].ipv4, alias.upper().replace("-", "_")
        known = {**(other.config["ExposedPorts"] or {}), **(other.host["PortBindings"] or {})}
        made += _link_ports(address, prefix, sorted({ports.container_port(key) for key in known}))
        made.append(f"{prefix}_NAME=/{container.name}/{alias}")
        given = [word.partition("=") for word in other.config["Env"] or []]
        made += [f"{prefix}_ENV_{name}={value}" for name, _, value in given if name not in ("HOME", "PATH")]
    return made


def _link_ports(address: str, prefix: str, exposed: list[tuple[int, str]]) -> list[str]:
    made = []
    for index, (port, protocol) in enumerate(exposed):
        if not index:
            made.append(f"{prefix}_PORT={protocol}://{address}:{port}")
        name = f"{prefix}_PORT_{port}_{protocol.upper()}"
        made += [f"{name}={protocol}://{address}:{port}", f"{name}_ADDR={address}"]
        made += [f"{name}_PORT={port}", f"{name}_PROTO={protocol}"]
    # Ports in a row are described once more as a range.
    for protocol in dict.fromkeys(kind for _, kind in exposed):
        numbers = [port for port, kind in exposed if kind == protocol]
        for first in (port for port in numbers if port - 1 not in numbers):
            last = first
            while last + 1 in numbers:
                last += 1
            if last > first:
                name = f"{prefix}_PORT_{first}_{protocol.upper()}"
                made += [
                    f"{name}_START={protocol}://{address}:{first}",
                    f"{name}_PORT_START={first}",
                    f"{name}_END={protocol}://{address}:{last}",
                    f"{name}_PORT_END={last}",
                ]
    return made


def shown_networks(core: Core, container: Container) -> dict[str, Any]:
    """NetworkSettings.Networks."""
    sandbox = core.networks.sandbox(container.id)
    places = {core.networks.get(each.network).name: each for each in sandbox.endpoints} if sandbox is not None else {}
    made = {}
    for name, endpoint in container.networks.items():
        made[name] = _shown(endpoint, places.get(name))
    return made


def _shown(asked_for: dict[str, Any], place: Endpoint | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "IPAMConfig": asked_for["IPAMConfig"],
        "Links": asked_for["Links"],
        "Aliases": asked_for["Aliases"],
        "MacAddress": asked_for["MacAddress"],
        "DriverOpts": asked_for["DriverOpts"],
        "GwPriority": asked_for["GwPriority"],
        "NetworkID": asked_for["NetworkID"],
        "EndpointID": "",
        "Gateway": "",
        "IPAddress": "",
        "IPPrefixLen": 0,
        "IPv6Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "DNSNames": asked_for.get("DNSNames"),
    }
    if place is not None:
        shown |= {
            "MacAddress": place.mac,
            "EndpointID": place.id,
            "Gateway": place.gateway4,
            "IPAddress": place.ipv4,
            "IPPrefixLen": place.prefix4,
            "IPv6Gateway": place.gateway6,
            "GlobalIPv6Address": place.ipv6,
            "GlobalIPv6PrefixLen": place.prefix6,
            "DNSNames": place.dns_names or None,
        }
    return shown


def settings(core: Core, container: Container) -> dict[str, Any]:
    """NetworkSettings as `docker inspect` shows it."""
    networks = shown_networks(core, container)
    sandbox = core.networks.sandbox(container.id)
    main = networks.get("bridge") or {
        "EndpointID": "",
        "Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "IPAddress": "",
        "IPPrefixLen": 0,
        "IPv6Gateway": "",
        "MacAddress": "",
    }
    return {
        "Bridge": "",
        "SandboxID": sandbox.id if sandbox is not None else "",
        "SandboxKey": sandbox.path if sandbox is not None else "",
        "Ports": _port_map(container, sandbox),
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        **{
            key: main[key]
            for key in (
                "EndpointID",
                "Gateway",
                "GlobalIPv6Address",
                "GlobalIPv6PrefixLen",
                "IPAddress",
                "IPPrefixLen",
                "IPv6Gateway",
                "MacAddress",
            )
        },
        "Networks": networks,
    }


def _port_map(container: Container, sandbox: Sandbox | None) -> dict[str, Any]:
    if sandbox is None:
        return {}
    made: dict[str, Any] = {}
    for key in {**(container.config["ExposedPorts"] or {}), **(container.host["PortBindings"] or {})}:
        port, protocol = ports.container_port(key)
        made[f"{port}/{protocol}"] = None
    for endpoint in sandbox.endpoints:
        for each in endpoint.published:
            key = f"{each.container_port}/{each.protocol}"
            made[key] = [*(made.get(key) or []), {"HostIp": each.host_ip, "HostPort": str(each.host_port)}]
    return made


def port_rows(core: Core, container: Container) -> list[dict[str, Any]]:
    """Ports as the list of containers has them."""
    rows: list[dict[str, Any]] = []
    for key, bindings in _port_map(container, core.networks.sandbox(container.id)).items():
        port, protocol = ports.container_port(key)
        rows += [
            {"IP": each["HostIp"], "PrivatePort": port, "PublicPort": int(each["HostPort"]), "Type": protocol}
            for each in bindings or []
        ]
        if not bindings:
            rows.append({"PrivatePort": port, "Type": protocol})
    return rows


def has_port(core: Core, container: Container, filters: Filters) -> bool:
    """Whether it has a port of the filters `publish` and `expose`, as 80, 80/udp or 80-90/tcp. Raises InvalidArgument."""
    rows = port_rows(core, container) if "publish" in filters else []
    exposed = [ports.container_port(key) for key in container.config["ExposedPorts"] or {}]
    for name, present in (
        ("publish", [(row["PublicPort"], row["Type"]) for row in rows if "PublicPort" in row]),
        ("expose", exposed),
    ):
        wanted = []
        for text in filters.get(name, []):
            numbers, _, protocol = text.partition("/")
            low, _, high = numbers.partition("-")
            if not low.isdigit() or (high and not high.isdigit()):
                raise InvalidArgument(f"invalid filter '{name}={text}'")
            wanted.append((int(low), int(high or low), protocol or "tcp"))
        if wanted and not any(
            low <= port <= high and kind == protocol for low, high, protocol in wanted for port, kind in present
        ):
            return False
    return True


def shown_network(core: Core, network: Network, *, with_containers: bool = True) -> dict[str, Any]:
    """A network as answers have it."""
    config = [
        {
            "Subnet": pool.subnet,
            **({"IPRange": pool.ip_range} if pool.ip_range else {}),
            **({"Gateway": pool.gateway} if pool.gateway and not pool.implied else {}),
            **({"AuxiliaryAddresses": pool.auxiliary} if pool.auxiliary else {}),
        }
        for pool in network.pools
    ]
    users: dict[str, Any] = {}
    if with_containers:
        for each in core.networks.endpoints_on(network):
            users[each.container] = {
                "Name": each.name,
                "EndpointID": each.id,
                "MacAddress": each.mac,
                "IPv4Address": f"{each.ipv4}/{each.prefix4}" if each.ipv4 else "",
                "IPv6Address": f"{each.ipv6}/{each.prefix6}" if each.ipv6 else "",
            }
        if network.name in ("host", "none"):
            users = {
                each.id: {"Name": each.name, "EndpointID": "", "MacAddress": "", "IPv4Address": "", "IPv6Address": ""}
                for each in core.containers()
                if each.host["NetworkMode"] == network.name and each.state.running
            }
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": network.created,
        "Scope": "local",
        "Driver": network.driver,
        "EnableIPv4": network.enable_ipv4,
        "EnableIPv6": network.enable_ipv6,
        "IPAM": {
            "Driver": "default",
            "Options": network.ipam_options or None,
            "Config": config if config or not network.predefined else None,
        },
        "Internal": network.internal,
        "Attachable": network.attachable,
        "Ingress": False,
        "ConfigFrom": {"Network": network.config_from},
        "ConfigOnly": network.config_only,
        "Containers": users,
        "Options": network.options,
        "Labels": network.labels,
    }


def unused(core: Core, network: Network) -> bool:
    """Whether no running container is on it."""
    return not core.networks.endpoints_on(network)


def refused(error: BoxshipError) -> BoxshipError:
    """A failure of a container's network in dockerd's words."""
    text = str(error)
    return error if text.startswith("failed to set up") else type(error)(f"failed to set up container networking: {text}")
