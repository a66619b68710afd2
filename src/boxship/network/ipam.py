"""Addresses: which subnet a new network gets, and which address a new endpoint.

Runs in: the daemon. No I/O: what is taken comes in.
Spec: libnetwork's default IPAM: addresses are given in order, one that was returned comes late again; its words for refusals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from boxship.network.model import Pool

Subnet = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

DEFAULT_POOLS = (
    ("172.17.0.0/16", 16),
    ("172.18.0.0/16", 16),
    ("172.19.0.0/16", 16),
    ("172.20.0.0/14", 16),
    ("172.24.0.0/14", 16),
    ("172.28.0.0/14", 16),
    ("192.168.0.0/16", 20),
)
_OVERLAP = "invalid pool request: Pool overlaps with other one on this address space"


def subnet_of(text: str) -> Subnet:
    """A subnet by its text; host bits are masked off. Raises InvalidArgument."""
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise InvalidArgument(f"invalid subnet {text}: invalid CIDR block notation") from None


def address_of(text: str) -> Address:
    """An address by its text. Raises InvalidArgument."""
    try:
        return ip_address(text)
    except ValueError:
        raise InvalidArgument(f"invalid IP address: {text}") from None


def parse_pools(texts: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """`BASE/PREFIX,SIZE` of the configuration. Raises InvalidArgument."""
    made = []
    for each in texts:
        base, comma, size = each.partition(",")
        network = subnet_of(base)
        if not comma or not size.isdigit() or not network.prefixlen <= int(size) <= network.max_prefixlen:
            raise InvalidArgument(f"{each!r} is not BASE/PREFIX,SIZE")
        made.append((str(network), int(size)))
    return tuple(made)


def overlaps(one: Subnet, other: Subnet) -> bool:
    """Whether they share an address."""
    return one.version == other.version and one.overlaps(other)


def check_free(wanted: Subnet, used: Iterable[Subnet]) -> None:
    """Raise PermissionDenied, as dockerd answers, when another network has some of it."""
    if any(overlaps(wanted, each) for each in used):
        raise PermissionDenied(_OVERLAP)


def choose_subnet(used: Iterable[Subnet], pools: Iterable[tuple[str, int]] = DEFAULT_POOLS) -> Subnet:
    """The first subnet of the IPv4 pools that overlaps nothing used. Raises NotFound when there is none."""
    taken = [each for each in used if each.version == 4]
    for base, size in pools:
        network = ip_network(base)
        if network.version != 4:
            continue
        for candidate in network.subnets(new_prefix=size):
            if not any(overlaps(candidate, each) for each in taken):
                return candidate
    raise NotFound("all predefined address pools have been fully subnetted")


def choose_subnet6(used: Iterable[Subnet], machine: str) -> Subnet:
    """The first /64 that is free of the unique local /48 which belongs to `machine` (RFC 4193)."""
    taken = [each for each in used if each.version == 6]
    prefix = int.from_bytes(b"\xfd" + hashlib.sha256(machine.encode()).digest()[:5], "big") << 80
    for number in range(1 << 16):
        candidate = IPv6Network((prefix | number << 64, 64))
        if not any(overlaps(candidate, each) for each in taken):
            return candidate
    raise NotFound("all predefined address pools have been fully subnetted")


def check_pool(pool: Pool) -> Pool:
    """The pool with its texts in their normal form. Raises InvalidArgument for what contradicts itself."""
    if "/" not in pool.subnet:
        raise InvalidArgument(f"invalid subnet {pool.subnet}: invalid CIDR block notation")
    network = subnet_of(pool.subnet)
    if address_of(pool.subnet.partition("/")[0]) != network.network_address:
        raise InvalidArgument(f"invalid subnet {pool.subnet}: it should be {network}")
    made = Pool(str(network), pool.gateway, pool.ip_range, dict(pool.auxiliary))
    if pool.ip_range:
        try:
            part = ip_network(pool.ip_range, strict=False)
        except ValueError:
            raise InvalidArgument(f"invalid ip-range {pool.ip_range}: invalid CIDR block notation") from None
        if part.version != network.version or not part.subnet_of(network):  # type: ignore[arg-type]
            raise InvalidArgument(f"invalid ip-range {part}: parent subnet {network} doesn't contain ip-range")
        made.ip_range = str(part)
    named = [(f"auxiliary address {name}", each) for name, each in pool.auxiliary.items()]
    for what, text in [("gateway", pool.gateway), *named]:
        if text:
            try:
                address = ip_address(text.partition("/")[0])
            except ValueError:
                raise InvalidArgument(f"invalid {what} address: {text}") from None
            if address.version != network.version or address not in network:
                raise InvalidArgument(f"invalid {what} {text}: parent subnet {network} doesn't contain this address")
    made.gateway = pool.gateway.partition("/")[0]
    return made


class Space:
    """The addresses of one pool. Who keeps them for good is the store; this knows what is taken and what comes next."""

    def __init__(self, pool: Pool) -> None:
        self.subnet = subnet_of(pool.subnet)
        part = subnet_of(pool.ip_range) if pool.ip_range else self.subnet
        base, size = int(part.network_address), part.num_addresses
        last = base + size - 1
        # Neither the network's own address nor IPv4's broadcast address; /31 and /32 have neither (RFC 3021).
        whole = self.subnet.max_prefixlen - self.subnet.prefixlen > 1
        self._low = base + 1 if whole and base == int(self.subnet.network_address) else base
        self._high = last - 1 if whole and self.subnet.version == 4 and last == int(self.subnet.broadcast_address) else last
        self._next = self._low
        self._taken: set[int] = set()

    def __contains__(self, address: Address) -> bool:
        return address in self.subnet

    def take(self, wanted: str) -> str:
        """This very address. Raises InvalidArgument when it is outside, PermissionDenied when it is in use."""
        address = address_of(wanted)
        if address not in self.subnet:
            raise InvalidArgument(f"address {wanted} is not in subnet {self.subnet}")
        if int(address) in self._taken:
            raise PermissionDenied("Address already in use")
        self._taken.add(int(address))
        return str(address)

    def give(self) -> str:
        """The next free address. Raises FailedPrecondition when there is none."""
        for number in self._candidates():
            if number not in self._taken:
                self._taken.add(number)
                self._next = number + 1 if number < self._high else self._low
                return str(self._address(number))
        raise FailedPrecondition(
            "no available IPv4 addresses on this network's address pools"
            if self.subnet.version == 4
            else "no available IPv6 addresses on this network's address pools"
        )

    def _candidates(self) -> Iterator[int]:
        # One more than what is taken is enough to find a free one, however large the subnet is.
        yield from range(self._next, min(self._high, self._next + len(self._taken)) + 1)
        yield from range(self._low, min(self._next, self._low + len(self._taken) + 1))

    def _address(self, number: int) -> Address:
        return IPv4Address(number) if self.subnet.version == 4 else IPv6Address(number)

    def release(self, address: str) -> None:
        """It may be given again."""
        self._taken.discard(int(ip_address(address)))
