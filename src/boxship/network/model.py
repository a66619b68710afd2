"""What the parts of this package talk about, and how it is recorded.

Runs in: the daemon.
Spec: Docker Engine API (Network, IPAMConfig, EndpointSettings); the names of options are libnetwork's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

PREDEFINED = ("bridge", "host", "none")
MODES = {"macvlan": ("bridge", "private", "vepa", "passthru"), "ipvlan": ("l2", "l3", "l3s")}
DRIVERS = ("bridge", "host", "null", "macvlan", "ipvlan")

_BRIDGE = "com.docker.network.bridge."
OPTION_NAME = f"{_BRIDGE}name"
OPTION_MASQUERADE = f"{_BRIDGE}enable_ip_masquerade"
OPTION_ICC = f"{_BRIDGE}enable_icc"
OPTION_HOST_BINDING = f"{_BRIDGE}host_binding_ipv4"
OPTION_DEFAULT_BRIDGE = f"{_BRIDGE}default_bridge"
OPTION_INHIBIT_IPV4 = f"{_BRIDGE}inhibit_ipv4"
OPTION_MTU = "com.docker.network.driver.mtu"
OPTION_PREFIX = "com.docker.network.container_iface_prefix"
OPTION_INTERFACE = "com.docker.network.endpoint.ifname"
OPTION_SYSCTLS = "com.docker.network.endpoint.sysctls"


@dataclass(frozen=True)
class Settings:
    """What the configuration decides (table [network])."""

    bridge: str = ""
    """Name of the default bridge's device; "" for one of ours, "none" for no default bridge."""
    bip: str = ""
    """Address and prefix of the default bridge, as 192.168.5.1/24."""
    bip6: str = ""
    fixed_cidr: str = ""
    """Part of its subnet that containers get addresses from."""
    ip_masq: bool = True
    icc: bool = True
    mtu: int = 0
    """Of the default bridge; 0 for 1500."""
    ip: str = ""
    """Host address that ports are published on; "" for all."""
    ip_forward: bool = True
    """Whether forwarding may be switched on in the kernel."""
    ipv6: bool = False
    """Whether the default bridge has IPv6."""
    pools: tuple[str, ...] = ()
    """BASE/PREFIX,SIZE of networks whose subnet nobody chose; () for Docker's."""
    userland_proxy: bool = True
    host_gateway: str = ""
    """What `host-gateway` stands for; "" for the default bridge's own address."""
    instance: str = ""
    """Tells the names of this daemon's devices and tables from those of others in the same namespace."""


@dataclass
class Pool:
    """One subnet of a network. All texts; "" for what is not set."""

    subnet: str
    gateway: str = ""
    ip_range: str = ""
    auxiliary: dict[str, str] = field(default_factory=dict)
    implied: bool = False
    """Whether its gateway is only what nobody chose; answers leave it out then."""

    @property
    def v6(self) -> bool:
        """Whether it is IPv6."""
        return ":" in self.subnet


@dataclass
class Network:
    """A network as it was made."""

    id: str
    name: str
    created: str
    driver: str = "bridge"
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    internal: bool = False
    attachable: bool = False
    config_only: bool = False
    config_from: str = ""
    ipam_options: dict[str, str] | None = None
    pools: list[Pool] = field(default_factory=list)
    chosen: bool = False
    """Whether the user chose a subnet, so that containers may ask for addresses of it."""
    options: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the store."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Network:
        """From the store."""
        return cls(**{**record, "pools": [Pool(**each) for each in record["pools"]]})

    @property
    def predefined(self) -> bool:
        """Whether it is there by itself and stays."""
        return self.name in PREDEFINED

    @property
    def device(self) -> str:
        """Name of its bridge, or of the device that its interfaces sit on."""
        if self.driver == "bridge":
            return self.options.get(OPTION_NAME) or f"br-{self.id[:12]}"
        return self.options.get("parent", "")

    @property
    def masquerade(self) -> bool:
        """Whether its containers go out under the host's address."""
        return self.driver == "bridge" and not self.internal and self.option(OPTION_MASQUERADE, default=True)

    @property
    def icc(self) -> bool:
        """Whether its containers may talk to each other."""
        return self.option(OPTION_ICC, default=True)

    def holds(self, address: str) -> bool:
        """Whether one of its subnets has the address, which must be one."""
        from ipaddress import ip_address, ip_network

        return any(pool.v6 == (":" in address) and ip_address(address) in ip_network(pool.subnet) for pool in self.pools)

    @property
    def mtu(self) -> int:
        """0 when nobody chose one."""
        return int(self.options.get(OPTION_MTU, "0") or 0)

    def option(self, name: str, *, default: bool) -> bool:
        """An option that is true or false."""
        value = self.options.get(name, "")
        return value.lower() in ("1", "t", "true") if value else default


@dataclass
class Attachment:
    """A container's wish to be on a network: what was asked for."""

    network: str
    """Name or id."""
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    aliases: list[str] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    """(name of the other container, alias)."""
    driver_options: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    """The highest one's gateway is the container's."""


@dataclass(frozen=True)
class Published:
    """A port of a container on the host."""

    protocol: str
    host_ip: str
    host_port: int
    container_port: int
    container_ip: str
    """"" as long as it is not known."""


@dataclass
class Endpoint:
    """A container's place on a network: everything that its network device is given."""

    id: str
    network: str
    """Id."""
    container: str
    """Id."""
    name: str
    """The container's name at that time."""
    interface: str
    host_link: str
    """The host's end; "" when there is none."""
    mac: str
    ipv4: str = ""
    prefix4: int = 0
    gateway4: str = ""
    ipv6: str = ""
    prefix6: int = 0
    gateway6: str = ""
    aliases: list[str] = field(default_factory=list)
    dns_names: list[str] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)
    driver_options: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    static_mac: bool = False
    published: list[Published] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For the store."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Endpoint:
        """From the store."""
        return cls(**{**record, "published": [Published(**each) for each in record["published"]]})


@dataclass
class Sandbox:
    """A container's network namespace."""

    id: str
    container: str
    path: str
    """Where it is pinned."""
    dns: list[str] = field(default_factory=list)
    """Name servers that the user chose; [] for the host's."""
    ndots: bool = False
    """Whether the user chose ndots in resolv.conf."""
    endpoints: list[Endpoint] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For the store, which keeps the endpoints apart."""
        return {"id": self.id, "container": self.container, "path": self.path, "dns": self.dns, "ndots": self.ndots}
