"""Networks: network create, connect, disconnect, ls, rm.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /networks/….
"""

from __future__ import annotations

from boxship.cli.command import LISTING, MANY, Command
from boxship.cli.http.client import ApiError, path, quote
from boxship.cli.show.table import Listing, write
from boxship.cli.verbs.create import labels, pairs
from boxship.cli.verbs.volumes import natural
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call

HEADINGS = {
    "ID": "NETWORK ID",
    "Name": "NAME",
    "Driver": "DRIVER",
    "Scope": "SCOPE",
    "IPv4": "IPV4",
    "IPv6": "IPV6",
    "Internal": "INTERNAL",
    "Labels": "LABELS",
    "CreatedAt": "CREATED AT",
}


def _ls(call: Call) -> int:
    listing = Listing(
        call.format(), ["ID", "Name", "Driver", "Scope"], HEADINGS, quiet="ID" if call.on("quiet") else "",
        go_type="*network.networkContext",
    )
    found = call.engine.send("GET", path("/networks", {"filters": call.filters()})).json() or []
    full = call.on("no-trunc")

    def fields(network: dict[str, Any]) -> dict[str, object]:
        return {
            "ID": network["Id"] if full else network["Id"][:12],
            "Name": network["Name"],
            "Driver": network["Driver"],
            "Scope": network["Scope"],
            "IPv4": str(bool(network.get("EnableIPv4"))).lower(),
            "IPv6": str(bool(network.get("EnableIPv6"))).lower(),
            "Internal": str(bool(network.get("Internal"))).lower(),
            "Labels": ",".join(f"{name}={value}" for name, value in sorted((network.get("Labels") or {}).items())),
            "CreatedAt": lambda: _moment(network["Created"]),
        }

    listing.show([fields(network) for network in sorted(found, key=lambda network: natural(network["Name"]))])
    return 0


def _moment(text: str) -> str:
    """As Go prints a time."""
    day, _, rest = text.partition("T")
    if rest.endswith("Z"):
        return f"{day} {rest[:-1]} +0000 UTC"
    offset = rest[-6:].replace(":", "")
    return f"{day} {rest[:-6]} {offset} {offset}"


def _strings(call: Call, name: str) -> list[str]:
    return [each for word in call.all(name) for each in word.split(",")]


def _ipam(call: Call) -> list[dict[str, Any]]:
    """The pools: each with the range, gateway and other addresses that lie in it. Raises BoxshipError."""
    subnets, ranges, gateways = (_strings(call, name) for name in ("subnet", "ip-range", "gateway"))
    auxiliary = pairs(call.all("aux-address"))
    if len(subnets) < len(ranges) or len(subnets) < len(gateways):
        raise BoxshipError("every ip-range or gateway must have a corresponding subnet")
    if len(subnets) < 2 and not (ranges or gateways or auxiliary):
        return [{"Subnet": text} for text in subnets]
    from ipaddress import ip_address, ip_network

    def parse(text: str) -> Any:
        try:
            return ip_network(text, strict=False)
        except ValueError:
            raise BoxshipError(f"invalid CIDR address: {text}") from None

    pools = {text: parse(text) for text in subnets}
    seen: list[Any] = []
    for pool in pools.values():
        if any(pool.version == other.version and pool.overlaps(other) for other in seen):
            raise BoxshipError("multiple overlapping subnet configuration is not supported")
        seen.append(pool)
    found: dict[str, dict[str, Any]] = {text: {"Subnet": text} for text in pools}

    def home(address: Any, what: str, text: str) -> dict[str, Any]:
        for name, pool in pools.items():
            if pool.version == address.version and address in pool:
                return found[name]
        raise BoxshipError(f"no matching subnet for {what} {text}")

    def address(text: str) -> Any:
        try:
            return ip_address(text)
        except ValueError:
            raise BoxshipError(f"invalid address: {text}") from None

    for text in ranges:
        entry = home(parse(text).network_address, "range", text)
        if entry.get("IPRange"):
            both = f"({text}, {entry['IPRange']})"
            raise BoxshipError(f"cannot configure multiple ranges {both} on the same subnet ({entry['Subnet']})")
        entry["IPRange"] = text
    for text in gateways:
        entry = home(address(text), "gateway", text)
        if entry.get("Gateway"):
            both = f"({text}, {entry['Gateway']})"
            raise BoxshipError(f"cannot configure multiple gateways {both} for the same subnet ({entry['Subnet']})")
        entry["Gateway"] = text
    for name, text in auxiliary.items():
        home(address(text), "aux-address", text).setdefault("AuxiliaryAddresses", {})[name] = text
    return [*found.values()]


def _create(call: Call) -> int:
    body: dict[str, Any] = {
        "Name": call.words[0],
        "Driver": call.text("driver") or "bridge",
        "Options": pairs(call.all("opt")),
        "IPAM": {"Driver": call.text("ipam-driver") or "default", "Config": _ipam(call), "Options": pairs(call.all("ipam-opt"))},
        "Internal": call.on("internal"),
        "Ingress": call.on("ingress"),
        "Attachable": call.on("attachable"),
        "ConfigOnly": call.on("config-only"),
        "Scope": call.text("scope"),
        "Labels": labels(call),
    }
    if call.text("config-from"):
        body["ConfigFrom"] = {"Network": call.text("config-from")}
    for flag in ("ipv4", "ipv6"):
        if flag in call.parsed.given:
            body[f"EnableIP{flag[2:]}"] = call.on(flag)
    answer = call.engine.send("POST", "/networks/create", body).json()
    if answer.get("Warning"):
        write(f"WARNING: {answer['Warning']}\n", 2)
    write(f"{answer['Id']}\n")
    return 0


def _rm(call: Call) -> int:
    failed = False
    for name in call.words:
        try:
            call.engine.send("DELETE", f"/networks/{quote(name)}").read()
        except ApiError as error:
            if call.on("force") and error.status == 404:
                continue
            failed = True
            write(f"{error}\n", 2)
            continue
        write(f"{name}\n")
    if failed:
        write("exit status 1\n", 2)  # docker's own last word
    return int(failed)


def _connect(call: Call) -> int:
    addresses: dict[str, Any] = {
        key: call.text(flag) for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address")) if call.text(flag)
    }
    if call.all("link-local-ip"):
        addresses["LinkLocalIPs"] = _strings(call, "link-local-ip")
    endpoint: dict[str, Any] = {
        "IPAMConfig": addresses,
        "Links": call.all("link") or None,
        "Aliases": _strings(call, "alias") or None,
        "DriverOpts": pairs(_strings(call, "driver-opt")),
        "GwPriority": call.number("gw-priority") or 0,
    }
    body = {"Container": call.words[1], "EndpointConfig": endpoint}
    call.engine.send("POST", f"/networks/{quote(call.words[0])}/connect", body).read()
    return 0


def _disconnect(call: Call) -> int:
    body = {"Container": call.words[1], "Force": call.on("force")}
    call.engine.send("POST", f"/networks/{quote(call.words[0])}/disconnect", body).read()
    return 0


COMMANDS = {
    "network connect": Command(
        " [OPTIONS] NETWORK CONTAINER",
        "Connect a container to a network",
        _connect,
        """
alias list | Add network-scoped alias for the container
driver-opt list | Driver options for the network
gw-priority int | Highest gw-priority provides the default gateway
ip string | IPv4 address (e.g., "172.30.100.104")
ip6 string | IPv6 address (e.g., "2001:db8::33")
link list | Add link to another container
link-local-ip list | Add a link-local address for the container
""",
        least=2,
        most=2,
    ),
    "network create": Command(
        " [OPTIONS] NETWORK",
        "Create a network",
        _create,
        """
attachable | Enable manual container attachment
aux-address list | Auxiliary addresses of the network, which no container gets (name=address)
config-from string | The network from which to copy the configuration
config-only | Create a configuration only network
d,driver string | Driver to manage the network (default "bridge")
gateway list | IPv4 or IPv6 gateway for the subnet
ingress | Create swarm routing-mesh network
internal | Restrict external access to the network
ip-range list | Allocate container ip from a sub-range
ipam-driver string | IP address management driver (default "default")
ipam-opt list | Set IPAM driver specific options
ipv4 | Enable or disable IPv4 address assignment (default true)
ipv6 | Enable or disable IPv6 address assignment
label list | Set metadata on a network
label-file list |
o,opt list | Set driver specific options
scope string | Control the network's scope
subnet list | Subnet in CIDR format that represents a network segment
""",
        least=1,
        most=1,
    ),
    "network disconnect": Command(
        " [OPTIONS] NETWORK CONTAINER",
        "Disconnect a container from a network",
        _disconnect,
        "f,force | Force the container to disconnect from a network\n",
        least=2,
        most=2,
    ),
    "network ls": Command(
        " [OPTIONS]",
        "List networks",
        _ls,
        LISTING
        + """
f,filter filter | Provide filter values (e.g. "driver=bridge")
no-trunc | Do not truncate the output
q,quiet | Only display network IDs
""",
    ),
    "network rm": Command(
        " NETWORK [NETWORK...]",
        "Remove one or more networks",
        _rm,
        "f,force | Do not error if the network does not exist\n",
        least=1,
        most=MANY,
    ),
}
