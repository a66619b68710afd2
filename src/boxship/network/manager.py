"""All networks and all containers' places on them: the one door of this package.

Runs in: the daemon, on its event loop; what the kernel is asked for runs in two threads, one that brings endpoints up and one
that takes them down, so that nobody's start waits for somebody's end.
Spec: what dockerd does and says at NetworkCreate, NetworkConnect, ContainerStart.

    prepare   addresses, ports and a name are chosen and recorded                      (event loop)
    realize   namespace, pair, addresses, routes, rules                                (thread)
    release   ports are free at once; the pair goes, then its addresses are free again (thread)
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from boxship.kit.errors import (
    AlreadyExists,
    BoxshipError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unsupported,
    from_os_error,
)
from boxship.linux import netns, nftables
from boxship.network import ipam, links, model, rules
from boxship.network.links import Links
from boxship.network.model import Attachment, Endpoint, Network, Pool, Published, Sandbox, Settings
from boxship.network.ports import ANY, Ports, Wanted
from boxship.network.sandbox import Pool as Namespaces
from boxship.network.serving import Serving, resolves
from boxship.network.store import Store

log = logging.getLogger("boxship.network")

_IN_USE = "Address already in use"


class Subject(NamedTuple):
    """A container, as far as networks are concerned."""

    id: str
    name: str
    hostname: str
    ports: list[Wanted]
    dns: list[str] = []  # a NamedTuple's default is never changed
    """Name servers that the user chose."""
    ndots: bool = False
    """Whether the user chose ndots."""


class Networks:
    """Made, then `open` and `sweep`; what containers had that run no more is then `release`d. `close` leaves all as it is."""

    def __init__(self, root: str, state: str, settings: Settings, machine: str, announce: Callable[[str, Network], None]) -> None:
        self.settings = settings
        self._announce = announce
        self._machine = machine
        self._store = Store(f"{root}/network")
        self._namespaces = Namespaces(f"{state}/netns")
        self._forwarding = f"{state}/netns.forwarding"
        self._table = f"boxship{settings.instance}"
        self._pools = ipam.parse_pools(settings.pools) or ipam.DEFAULT_POOLS
        self._by_id: dict[str, Network] = {}
        self._spaces: dict[str, list[ipam.Space]] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        self._ending: dict[str, tuple[Sandbox, asyncio.Future[None]]] = {}
        self._active: set[str] = set()
        """Networks whose device is there, so that the rules speak of it."""
        self._ports = Ports()
        self._serving = Serving(state, self._ports, self._by_id, proxied=settings.userland_proxy)
        self._up = ThreadPoolExecutor(1, "network-up")
        self._down = ThreadPoolExecutor(1, "network-down")
        self._links: Links | None = None
        self._down_links: Links | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.usable = links.permitted()
        """Whether the kernel lets this daemon make networks; without, containers have none or the host's."""

    # the daemon's own start and end

    def open(self) -> None:
        """Read what there is. Raises BoxshipError for a configuration that cannot be."""
        for network in self._store.networks():
            self._take_in(network)
        for name, driver in (("host", "host"), ("none", "null")):
            if self._named(name) is None:
                self._add(Network(secrets.token_hex(32), name, _now(), driver))
        if self.bridging:
            self._default_bridge()
        for sandbox in self._store.sandboxes():
            self._sandboxes[sandbox.container] = sandbox
            for endpoint in sandbox.endpoints:
                self._claim_again(endpoint)

    @property
    def bridging(self) -> bool:
        """Whether there is a default bridge."""
        return self.usable and self.settings.bridge != "none"

    @property
    def default_mode(self) -> str:
        """The network of a container that asks for none."""
        return "bridge" if self.bridging else "none"

    @property
    def host_gateway(self) -> str:
        """The address that `host-gateway` means; "" for none."""
        if self.settings.host_gateway:
            return self.settings.host_gateway
        bridge = self._named("bridge") if self.bridging else None
        return next((pool.gateway for pool in bridge.pools if not pool.v6), "") if bridge is not None else ""

    def resolves(self, sandbox: Sandbox) -> bool:
        """Whether names are resolved for it by our own server: on networks that users made."""
        return resolves(sandbox)

    def _default_bridge(self) -> None:
        settings = self.settings
        options = {
            model.OPTION_DEFAULT_BRIDGE: "true",
            model.OPTION_ICC: _word(settings.icc),
            model.OPTION_MASQUERADE: _word(settings.ip_masq),
            model.OPTION_HOST_BINDING: settings.ip or "0.0.0.0",
            model.OPTION_NAME: settings.bridge or (f"bs{settings.instance}" if settings.instance else "boxship0"),
            model.OPTION_MTU: str(settings.mtu or 1500),
        }
        network = self._named("bridge")
        pools = self._default_pools(network)
        if network is None:
            self._add(Network(secrets.token_hex(32), "bridge", _now(), options=options, pools=pools, enable_ipv6=settings.ipv6))
        elif network.options != options or network.pools != pools or network.enable_ipv6 != settings.ipv6:
            network.options, network.pools, network.enable_ipv6 = options, pools, settings.ipv6
            self._store.put_network(network)
            self._take_in(network)

    def _default_pools(self, present: Network | None) -> list[Pool]:
        settings = self.settings
        made = []
        if settings.bip:
            address, _, prefix = settings.bip.partition("/")
            if not prefix:
                raise InvalidArgument(f"network.bip: {settings.bip!r} is not ADDRESS/PREFIX")
            made.append(Pool(str(ipam.subnet_of(settings.bip)), str(ipam.address_of(address)), settings.fixed_cidr))
        elif present is not None and any(not each.v6 for each in present.pools):
            pool = next(each for each in present.pools if not each.v6)
            made.append(Pool(pool.subnet, pool.gateway, settings.fixed_cidr))
        else:
            subnet = ipam.choose_subnet(self._used(), self._pools)
            made.append(Pool(str(subnet), str(subnet[1]), settings.fixed_cidr))
        if settings.ipv6:
            if settings.bip6:
                made.append(Pool(str(ipam.subnet_of(settings.bip6)), settings.bip6.partition("/")[0]))
            elif present is not None and any(each.v6 for each in present.pools):
                made.append(next(each for each in present.pools if each.v6))
            else:
                subnet = ipam.choose_subnet6(self._used(), self._machine)
                made.append(Pool(str(subnet), str(subnet[1])))
        return [ipam.check_pool(each) for each in made]

    def _used(self) -> list[ipam.Subnet]:
        found = [ipam.subnet_of(pool.subnet) for network in self._by_id.values() for pool in network.pools]
        return found + [ipam.subnet_of(text) for text in links.used_subnets()]

    def _take_in(self, network: Network) -> None:
        self._by_id[network.id] = network
        spaces = self._spaces[network.id] = [ipam.Space(pool) for pool in network.pools]
        for pool, space in zip(network.pools, spaces, strict=True):
            for address in (pool.gateway, *pool.auxiliary.values()):
                if address:
                    space.take(address)

    def _claim_again(self, endpoint: Endpoint) -> None:
        """What a former daemon gave stays given."""
        for address in (endpoint.ipv4, endpoint.ipv6):
            for space in self._spaces.get(endpoint.network, ()):
                if address and ipam.address_of(address) in space:
                    try:
                        space.take(address)
                    except BoxshipError:
                        pass  # two dead containers' records may name one address
        for port in endpoint.published:
            self._ports.adopt(port)

    async def sweep(self) -> None:
        """Take away what a killed daemon left of which there is no record. Before any container starts."""
        if not self.usable:
            return
        known = {endpoint.host_link for each in self._sandboxes.values() for endpoint in each.endpoints}
        await self._call(self._up, self._look, {each.path for each in self._sandboxes.values()}, known)
        if self._active:
            await self._sync_rules()

    def _look(self, paths: set[str], known: set[str]) -> None:
        links = self._up_links()
        present = links.present()
        self._active = {each.id for each in self._by_id.values() if each.driver == "bridge" and each.device in present}
        self._namespaces.sweep(paths)
        devices = {self._by_id[each].device for each in self._active if not self._foreign(self._by_id[each])}
        links.detach_all([name for name in links.ports_of(devices) if name not in known and name.startswith("veth")])

    def containers(self) -> list[str]:
        """Ids of containers that have a namespace of ours."""
        return list(self._sandboxes)

    async def resume(self) -> None:
        """Once it is known which containers run on after a start of the daemon: their ports and names are served."""
        for sandbox in self._sandboxes.values():
            for endpoint in sandbox.endpoints:
                for port in endpoint.published:
                    self._ports.hold(port)
        if self.usable:
            try:
                await self._call(self._up, self._serving.sync, list(self._sandboxes.values()))
            except BoxshipError as error:
                log.error("%s", error)

    @staticmethod
    def _foreign(network: Network) -> bool:
        """Whether the bridge was named by the user, so that there may be others' ports on it."""
        return not network.device.startswith(("br-", "bs", "boxship"))

    async def close(self) -> None:
        """End what is under way; networks of running containers stay as they are."""
        await self._ended()
        await asyncio.gather(*self._tasks, return_exceptions=True)

        def work() -> None:
            self._serving.close()
            self._namespaces.close()
            for each in (self._links, self._down_links):
                if each is not None:
                    each.close()

        await self._call(self._up, work)
        self._up.shutdown()
        self._down.shutdown()
        self._store.close()

    # threads

    async def _call(self, executor: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *args)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _up_links(self) -> Links:
        if self._links is None:
            self._links = Links()
        return self._links

    # networks

    def all(self) -> list[Network]:
        """All networks."""
        return list(self._by_id.values())

    def _named(self, name: str) -> Network | None:
        return next((each for each in self._by_id.values() if each.name == name), None)

    def get(self, name: str) -> Network:
        """By id, name, or beginning of an id. Raises NotFound, InvalidArgument."""
        if name in self._by_id:
            return self._by_id[name]
        if (found := self._named("bridge" if name == "default" else name)) is not None:
            return found
        matches = [each for each in self._by_id.values() if each.id.startswith(name)] if name else []
        if len(matches) > 1:
            raise InvalidArgument(f"network {name} is ambiguous ({len(matches)} matches found based on ID prefix)")
        if not matches:
            raise NotFound(f"network {name} not found")
        return matches[0]

    def endpoints_on(self, network: Network) -> list[Endpoint]:
        """Endpoints of running containers."""
        return [each for sandbox in self._sandboxes.values() for each in sandbox.endpoints if each.network == network.id]

    def sandbox(self, container_id: str) -> Sandbox | None:
        """A running container's namespace; None when it has none of ours."""
        return self._sandboxes.get(container_id)

    def _add(self, network: Network) -> None:
        self._store.put_network(network)
        self._take_in(network)

    async def create(self, network: Network) -> Network:
        """Make a network of what was asked for; pools that are not chosen are chosen here. Raises as dockerd does."""
        if network.driver not in model.DRIVERS:
            raise NotFound(f'plugin "{network.driver}" not found')
        if network.driver in ("host", "null"):
            raise PermissionDenied(f'only one instance of "{network.driver}" network is allowed')
        if not self.usable and not network.config_only:
            raise Unsupported("this daemon may not make networks", "run it as root, or use the networks none or host")
        if self._named(network.name) is not None:
            raise AlreadyExists(f"network with name {network.name} already exists")
        if network.config_from:
            self._configure_from(network)
        self._check_options(network)
        self._choose_pools(network)
        if network.driver == "bridge":
            network.options.setdefault(model.OPTION_NAME, "")
            if not network.options[model.OPTION_NAME]:
                del network.options[model.OPTION_NAME]
        self._add(network)
        if not network.config_only:
            try:
                await self._activate(network)
            except (BoxshipError, OSError) as error:
                self._forget(network)
                raise (
                    error if isinstance(error, BoxshipError) else from_os_error(error, f"making the network {network.name}")
                ) from None
        self._announce("create", network)
        return network

    def _configure_from(self, network: Network) -> None:
        source = self._named(network.config_from)
        if source is None or not source.config_only:
            raise NotFound(f'configuration network "{network.config_from}" does not exist')
        if network.pools or network.options:
            raise InvalidArgument(
                "user specified configurations are not supported if the network depends on a configuration network"
            )
        network.pools = [Pool(**vars(each)) for each in source.pools]
        network.options, network.labels = dict(source.options), network.labels or dict(source.labels)
        network.enable_ipv6, network.internal = source.enable_ipv6, source.internal

    def _check_options(self, network: Network) -> None:
        options = network.options
        for name in (model.OPTION_MASQUERADE, model.OPTION_ICC, model.OPTION_INHIBIT_IPV4):
            value = options.get(name, "")
            if value.lower() not in ("", "0", "1", "t", "f", "true", "false"):
                problem = f'strconv.ParseBool: parsing "{value}": invalid syntax'
                raise InvalidArgument(f"failed to parse {name} value: {value} ({problem})")
        mtu = options.get(model.OPTION_MTU, "")
        if mtu and not (mtu.isdigit() and int(mtu) < 1 << 16):
            raise InvalidArgument(
                f'failed to parse {model.OPTION_MTU} value: {mtu} (strconv.Atoi: parsing "{mtu}": invalid syntax)'
            )
        if network.driver == "bridge":
            device = options.get(model.OPTION_NAME, "")
            if len(device) > 15 or "/" in device or any(letter.isspace() for letter in device):
                raise InvalidArgument(f"invalid bridge name {device}: a network device's name has at most 15 characters")
            if device and any(each.driver == "bridge" and each.device == device for each in self._by_id.values()):
                raise PermissionDenied(
                    f"cannot create network {network.id} ({device}): conflicts with network with the same bridge name"
                )
        elif network.driver in ("macvlan", "ipvlan"):
            modes = model.MODES[network.driver]
            mode = options.get(f"{network.driver}_mode", "") or options.get("mode", "")
            if mode and mode not in modes:
                raise InvalidArgument(
                    f"requested {network.driver} mode '{mode}' is not valid, '{modes[0]}' mode is the driver default"
                )

    def _choose_pools(self, network: Network) -> None:
        used = [ipam.subnet_of(pool.subnet) for each in self._by_id.values() if not each.config_only for pool in each.pools]
        made = []
        for pool in network.pools:
            if not (network.enable_ipv6 if pool.v6 else network.enable_ipv4):
                network.enable_ipv6 = network.enable_ipv6 or pool.v6
            try:
                checked = ipam.check_pool(pool)
            except InvalidArgument as error:
                raise InvalidArgument(f"invalid network config:\n{error}") from None
            if not network.config_only:
                ipam.check_free(ipam.subnet_of(checked.subnet), used)
                used.append(ipam.subnet_of(checked.subnet))
            made.append(checked)
        if not network.config_only:
            asked = list(made)
            machine = [ipam.subnet_of(text) for text in links.used_subnets()]
            if network.enable_ipv4 and not any(not each.v6 for each in made):
                made.insert(0, Pool(str(ipam.choose_subnet([*used, *machine], self._pools))))
            if network.enable_ipv6 and not any(each.v6 for each in made):
                made.append(Pool(str(ipam.choose_subnet6([*used, *machine], self._machine))))
            for pool in made:
                if not pool.gateway and not (network.internal and network.driver != "bridge"):
                    space = ipam.Space(pool)
                    for address in pool.auxiliary.values():
                        space.take(address)
                    pool.gateway = space.give()
                    pool.implied = any(each is pool for each in asked)
        network.pools = made

    async def _activate(self, network: Network) -> None:
        """The device of a network, and the rules that speak of it."""
        await self._call(self._up, self._ensure, network)
        if network.driver == "bridge" and network.id not in self._active:
            self._active.add(network.id)
            await self._sync_rules()

    def _ensure(self, network: Network) -> None:
        self._up_links().ensure(network)
        if network.driver == "bridge" and self.settings.ip_forward and not network.internal:
            self._forward("ipv4/ip_forward")
            if network.enable_ipv6:
                self._forward("ipv6/conf/all/forwarding")

    def _forward(self, name: str) -> None:
        path = f"/proc/sys/net/{name}"
        with open(path, encoding="ascii") as file:
            if file.read().strip() == "1":
                return
        # Noted first: a machine that forwards because of us forwards for nobody else.
        with open(self._forwarding, "w", encoding="ascii") as file:
            file.write("1\n")
        with open(path, "w", encoding="ascii") as file:
            file.write("1")

    async def remove(self, network: Network) -> None:
        """Remove a network. Raises PermissionDenied when it is predefined or in use."""
        if network.predefined:
            raise PermissionDenied(f"{network.name} is a pre-defined network and cannot be removed")
        if network.config_only and any(each.config_from == network.name for each in self._by_id.values()):
            raise PermissionDenied(f"configuration network {network.name!r} is in use".replace("'", '"'))
        if found := self.endpoints_on(network):
            shown = ", ".join(f'name:"{each.name}" id:"{each.id[:12]}"' for each in found)
            raise PermissionDenied(f"error while removing network: network {network.name} has active endpoints ({shown})")
        await self._ended()
        was = network.id in self._active
        self._active.discard(network.id)
        if not network.config_only:
            await self._call(self._up, lambda: self._up_links().remove(network))
            await self._call(self._up, self._serving.forget, network)
        self._forget(network)
        if was:
            await self._sync_rules()
        self._announce("destroy", network)

    def _forget(self, network: Network) -> None:
        self._store.delete_network(network.id)
        self._by_id.pop(network.id, None)
        self._spaces.pop(network.id, None)
        self._active.discard(network.id)

    # rules

    def _render(self) -> str:
        bridges = [
            rules.Bridge(
                each.device,
                tuple(pool.subnet for pool in each.pools),
                each.masquerade,
                each.icc,
                each.internal,
                each.options.get("com.docker.network.host_ipv4", ""),
            )
            for each in self._by_id.values()
            if each.id in self._active
        ]
        ports = [port for sandbox in self._sandboxes.values() for endpoint in sandbox.endpoints for port in endpoint.published]
        return rules.render(self._table, bridges, ports, strict=os.path.exists(self._forwarding))

    async def _sync_rules(self) -> None:
        await self._call(self._up, self._apply_rules)

    def _apply_rules(self) -> None:
        # Rendered here, so that of many waiting changes the last one has them all. Only whole records are looked at.
        rules.apply(self._render())

    def _map(self, endpoints: list[Endpoint], gone: list[Published]) -> None:
        """Lead the ports of these endpoints to them, and those that are gone nowhere: a small change, without a process."""
        ports = [port for each in endpoints for port in each.published]
        try:
            nftables.change(
                self._table,
                add=[rules.map_element(port) for port in ports if rules.in_kernel(port)],
                remove=[rules.map_element(port) for port in gone if rules.in_kernel(port)],
            )
        except BoxshipError:
            self._apply_rules()  # the table is not as we left it

    # containers

    async def prepare(self, subject: Subject, wanted: list[Attachment]) -> Sandbox:
        """Choose and record everything for a container that is about to start. Raises as dockerd does; nothing is taken then."""
        if (left := self._ending.get(subject.id)) is not None and any(each.ipv4 or each.ipv6 or each.mac for each in wanted):
            await asyncio.wait([left[1]])
        networks = [self.get(each.network) for each in wanted]
        self.release(subject.id)  # what a former run left, when the daemon was killed in it
        try:
            return self._prepare(subject, wanted, networks)
        except (FailedPrecondition, PermissionDenied):
            # Perhaps what is missing is just being given back.
            if not self._ending:
                raise
            await self._ended()
            return self._prepare(subject, wanted, networks)

    def _prepare(self, subject: Subject, wanted: list[Attachment], networks: list[Network]) -> Sandbox:
        sandbox_id = self._namespaces.take()
        sandbox = Sandbox(sandbox_id or secrets.token_hex(32), subject.id, "")
        sandbox.path = self._namespaces.path(sandbox.id)
        sandbox.dns, sandbox.ndots = list(subject.dns), subject.ndots
        try:
            for attachment, network in zip(wanted, networks, strict=True):
                sandbox.endpoints.append(self._endpoint(subject, attachment, network, sandbox))
            self._publish(subject, sandbox)
            self._store.put_sandbox(sandbox)
        except BaseException:
            for endpoint in sandbox.endpoints:
                self._give_back(endpoint)
            if sandbox_id:
                self._down.submit(netns.remove, sandbox.path)
            raise
        self._sandboxes[subject.id] = sandbox
        return sandbox

    def _endpoint(self, subject: Subject, wanted: Attachment, network: Network, sandbox: Sandbox) -> Endpoint:
        if network.config_only:
            raise PermissionDenied(f"cannot attach to network {network.name}: it is a configuration network")
        if not self.usable:
            raise Unsupported("this daemon may not make networks", "run it as root, or use the networks none or host")
        used = {each.interface for each in sandbox.endpoints}
        prefix = network.options.get(model.OPTION_PREFIX) or "eth"
        interface = wanted.driver_options.get(model.OPTION_INTERFACE) or next(
            name for number in range(1 << 16) if (name := f"{prefix}{number}") not in used
        )
        endpoint = Endpoint(
            id=secrets.token_hex(32),
            network=network.id,
            container=subject.id,
            name=subject.name,
            interface=interface,
            host_link=f"veth{secrets.token_hex(4)[:7]}" if network.driver == "bridge" else "",
            mac=wanted.mac,
            aliases=list(wanted.aliases),
            links=[list(each) for each in wanted.links],
            driver_options=dict(wanted.driver_options),
            priority=wanted.priority,
            static_mac=bool(wanted.mac),
        )
        if network.name not in model.PREDEFINED:
            names = [subject.name, *wanted.aliases, subject.id[:12], subject.hostname]
            endpoint.dns_names = [*dict.fromkeys(name for name in names if name)]
        try:
            for v6, enabled, static in ((False, network.enable_ipv4, wanted.ipv4), (True, network.enable_ipv6, wanted.ipv6)):
                if enabled and network.pools:
                    self._address(network, endpoint, v6=v6, static=static)
                elif static:
                    raise InvalidArgument(f"no configured subnet contains IP address {static}")
        except BaseException:
            self._give_back(endpoint)
            raise
        if not endpoint.mac and network.driver != "ipvlan":
            if endpoint.ipv4:
                endpoint.mac = "02:42:" + ":".join(f"{int(part):02x}" for part in endpoint.ipv4.split("."))
            else:
                endpoint.mac = "02:42:" + secrets.token_bytes(4).hex(":")
        return endpoint

    def _address(self, network: Network, endpoint: Endpoint, *, v6: bool, static: str) -> None:
        spaces = [(pool, space) for pool, space in zip(network.pools, self._spaces[network.id], strict=True) if pool.v6 == v6]
        if not spaces:
            return
        chosen: tuple[Pool, str] | None = None
        if static:
            for pool, space in spaces:
                if ipam.address_of(static) in space:
                    chosen = pool, space.take(static)
                    break
            else:
                raise InvalidArgument(f"no configured subnet or ip-range contain the IP address {static}")
        else:
            failure: BoxshipError | None = None
            for pool, space in spaces:
                try:
                    chosen = pool, space.give()
                    break
                except FailedPrecondition as error:
                    failure = error
            if chosen is None:
                assert failure is not None
                raise failure
        pool, address = chosen
        prefix, gateway = int(pool.subnet.partition("/")[2]), "" if network.internal else pool.gateway
        if v6:
            endpoint.ipv6, endpoint.prefix6, endpoint.gateway6 = address, prefix, gateway
        else:
            endpoint.ipv4, endpoint.prefix4, endpoint.gateway4 = address, prefix, gateway

    def _give_back(self, endpoint: Endpoint) -> None:
        for address in (endpoint.ipv4, endpoint.ipv6):
            for space in self._spaces.get(endpoint.network, ()):
                if address and ipam.address_of(address) in space:
                    space.release(address)
        for port in endpoint.published:
            self._ports.release(port)

    def gateway(self, sandbox: Sandbox) -> Endpoint | None:
        """The endpoint whose gateway is the container's: the highest priority, then the first network by name."""
        ways = [each for each in sandbox.endpoints if each.gateway4 or each.gateway6]
        return min(ways, key=lambda each: (-each.priority, self._by_id[each.network].name), default=None)

    def _publish(self, subject: Subject, sandbox: Sandbox) -> None:
        endpoint = self.gateway(sandbox)
        if not subject.ports or endpoint is None or self._by_id[endpoint.network].driver != "bridge":
            return
        binding = self._by_id[endpoint.network].options.get(model.OPTION_HOST_BINDING, "")
        choices = [each._replace(host_ip=each.host_ip or ("" if binding in ANY else binding)) for each in subject.ports]
        # IPv6 of the host leads to a container without it only by the proxy.
        both = (endpoint.ipv6 or self.settings.userland_proxy) and os.path.exists("/proc/net/if_inet6")
        addresses = ANY if both else ANY[:1]
        try:
            found = self._ports.allocate(choices, addresses, endpoint.ipv4 or f"[{endpoint.ipv6}]")
        except BoxshipError as error:
            raise BoxshipError(
                "failed to set up container networking: driver failed programming external connectivity on endpoint"
                f" {subject.name} ({endpoint.id}): {error}"
            ) from None
        endpoint.published = [_to(port, endpoint) for port in found]

    async def realize(self, sandbox: Sandbox) -> None:
        """Bring everything up that `prepare` chose. Raises an error of the tree; the caller then calls `release`."""
        fresh = [network for each in sandbox.endpoints if (network := self._by_id[each.network]).id not in self._active]
        for network in fresh:
            await self._activate(network)
        publishes = any(each.published for each in sandbox.endpoints)
        try:
            await self._call(self._up, self._bring_up, sandbox, publishes)
        except OSError as error:
            raise from_os_error(error, "failed to set up container networking") from None
        finally:
            self._down.submit(self._refill)

    def _refill(self) -> None:
        try:
            self._namespaces.refill()
        except (BoxshipError, OSError) as error:
            log.warning("making network namespaces ahead: %s", error)

    def _bring_up(self, sandbox: Sandbox, publishes: bool) -> None:
        if not os.path.exists(sandbox.path):
            self._namespaces.make_at(sandbox.path)
        gateway = self.gateway(sandbox)
        fd = os.open(sandbox.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for endpoint in sandbox.endpoints:
                self._up_links().attach(
                    self._by_id[endpoint.network],
                    endpoint,
                    fd,
                    hairpin=bool(endpoint.published),
                    default_route=endpoint is gateway,
                )
        finally:
            os.close(fd)
        if publishes:
            self._map(sandbox.endpoints, [])
        self._serving.names(sandbox, sandbox.endpoints)
        self._serving.publish(port for each in sandbox.endpoints for port in each.published)

    def release(self, container_id: str) -> asyncio.Future[None] | None:
        """A container that has ended: its ports are free now, its addresses when the future is done (None: there was nothing)."""
        sandbox = self._sandboxes.pop(container_id, None)
        if sandbox is None:
            return None
        published: list[Published] = []
        for endpoint in sandbox.endpoints:
            for port in endpoint.published:
                published.append(port)
                self._ports.leave(port)
            endpoint.published = []
        done: asyncio.Future[None] = asyncio.ensure_future(self._end(sandbox, published))
        self._ending[sandbox.id] = (sandbox, done)
        return done

    async def _end(self, sandbox: Sandbox, published: list[Published]) -> None:
        try:
            await self._call(self._up, self._silence, sandbox, published)
            await self._call(self._down, self._take_down, sandbox)
        except (BoxshipError, OSError) as error:
            # The record stays, so that the next start of the daemon tries again.
            log.error("taking the network of %s down: %s", sandbox.container[:12], error)
            return
        finally:
            self._ending.pop(sandbox.id, None)
        self._store.delete_sandbox(sandbox)
        for endpoint in sandbox.endpoints:
            self._give_back(endpoint)

    def _silence(self, sandbox: Sandbox, published: list[Published]) -> None:
        if published:
            self._map([], published)
            self._serving.withdraw(published)
        self._serving.no_names(sandbox.endpoints, sandbox.id)

    def _take_down(self, sandbox: Sandbox) -> None:
        if self._down_links is None:
            self._down_links = Links()
        self._down_links.detach_all([each.host_link for each in sandbox.endpoints if each.host_link])
        netns.remove(sandbox.path)

    async def _ended(self) -> None:
        """Wait until all that is being taken down is gone."""
        while waiting := [future for _, future in self._ending.values()]:
            await asyncio.wait(waiting)

    # containers that run

    async def connect(self, subject: Subject, wanted: Attachment) -> Endpoint:
        """Put a running container on one more network. Raises as dockerd does."""
        sandbox = self._sandboxes[subject.id]
        network = self.get(wanted.network)
        if any(each.network == network.id for each in sandbox.endpoints):
            raise PermissionDenied(f"endpoint with name {subject.name} already exists in network {network.name}")
        endpoint = self._endpoint(subject, wanted, network, sandbox)
        before = self.gateway(sandbox)
        try:
            self._store.put_sandbox(replace(sandbox, endpoints=[endpoint]))
        except BaseException:
            self._give_back(endpoint)
            raise
        sandbox.endpoints.append(endpoint)
        try:
            if network.id not in self._active:
                await self._activate(network)
            await self._call(self._up, self._attach_one, sandbox, endpoint)
        except (BoxshipError, OSError) as error:
            sandbox.endpoints.remove(endpoint)
            self._store.delete_endpoint(endpoint.id)
            self._give_back(endpoint)
            raise error if isinstance(error, BoxshipError) else from_os_error(error, "connecting the container") from None
        if self.gateway(sandbox) is endpoint and before is not endpoint:
            await self._move_ports(subject, sandbox, before)
        return endpoint

    def _attach_one(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        fd = os.open(sandbox.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._up_links().attach(
                self._by_id[endpoint.network], endpoint, fd, hairpin=False, default_route=self.gateway(sandbox) is endpoint
            )
        finally:
            os.close(fd)
        self._serving.names(sandbox, [endpoint])

    async def _move_ports(self, subject: Subject, sandbox: Sandbox, before: Endpoint | None) -> None:
        """Published ports go where the gateway is."""
        after = self.gateway(sandbox)
        published = list(before.published) if before is not None else []
        if before is not None:
            before.published = []
        gone = published
        if after is not None and self._by_id[after.network].driver == "bridge":
            if published:
                after.published = [_to(port, after) for port in published]
            else:
                self._publish(subject, sandbox)
        else:
            for port in published:
                self._ports.leave(port)
        self._store.put_sandbox(sandbox)
        if published or (after is not None and after.published):
            await self._call(self._up, self._lead, gone, list(after.published) if after is not None else [])

    def _lead(self, gone: list[Published], ports: list[Published]) -> None:
        self._serving.withdraw(gone)
        self._apply_rules()
        self._serving.publish(ports)

    async def disconnect(self, subject: Subject, network: Network) -> None:
        """Take a running container from a network. Raises BoxshipError when it is not on it."""
        sandbox = self._sandboxes.get(subject.id)
        endpoint = next((each for each in sandbox.endpoints if each.network == network.id), None) if sandbox is not None else None
        if sandbox is None or endpoint is None:
            raise BoxshipError(f"container {subject.id} is not connected to network {network.name}")
        was_gateway = self.gateway(sandbox) is endpoint
        sandbox.endpoints.remove(endpoint)
        await self._call(self._up, self._detach_one, sandbox, endpoint)
        if was_gateway:
            await self._move_ports(subject, sandbox, endpoint)
        self._store.delete_endpoint(endpoint.id)
        self._give_back(endpoint)

    def _detach_one(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        if endpoint.host_link:
            self._up_links().detach(endpoint)
        else:
            fd = os.open(sandbox.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                links.leave(endpoint, fd)
            finally:
                os.close(fd)
        self._serving.no_names([endpoint])
        self._serving.names(sandbox, [])
        after = self.gateway(sandbox)
        if after is not None:
            fd = os.open(sandbox.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                links.reroute(self._by_id[after.network], after, fd)
            finally:
                os.close(fd)

    def rename(self, container_id: str, former: str, name: str) -> None:
        """A container has another name now."""
        sandbox = self._sandboxes.get(container_id)
        if sandbox is None:
            return
        for endpoint in sandbox.endpoints:
            endpoint.name = name
            endpoint.dns_names = [name if each == former else each for each in endpoint.dns_names]
        self._store.put_sandbox(sandbox)
        self._up.submit(self._serving.names, sandbox, sandbox.endpoints)


def _to(port: Published, endpoint: Endpoint) -> Published:
    """The port, led to this endpoint."""
    address = endpoint.ipv6 if ":" in port.host_ip and endpoint.ipv6 else endpoint.ipv4 or endpoint.ipv6
    return Published(port.protocol, port.host_ip, port.host_port, port.container_port, address)


def _word(value: bool) -> str:
    return "true" if value else "false"


def _now() -> str:
    ns = time.time_ns()
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ns % 1_000_000_000:09d}Z"
