"""Who is called what on which network.

Runs in: the helper. No I/O.
Spec: libnetwork: a container is known on its networks by its name, its short id and its aliases; one alias may be many
containers'; NAME.NETWORK names one network's; links are names of one container's own.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Place = tuple[str, dict[str, str]]
"""A network's id, and links on it: own name → name there."""


class _Network:
    __slots__ = ("named", "owners", "records", "title")

    def __init__(self) -> None:
        self.title = ""
        """In lower case."""
        self.named = 0
        self.records: dict[str, dict[str, tuple[str, ...]]] = {}
        """Name → endpoint → addresses."""
        self.owners: dict[str, str] = {}
        """Address → the first name of who has it."""


class _Endpoint:
    __slots__ = ("addresses", "named", "names", "network")

    def __init__(self, network: str, names: tuple[str, ...], addresses: tuple[str, ...], named: int) -> None:
        self.network = network
        self.names = names
        self.addresses = addresses
        self.named = named


class Names:
    """All names of all networks."""

    def __init__(self) -> None:
        self._networks: dict[str, _Network] = {}
        self._endpoints: dict[str, _Endpoint] = {}
        self._round = 0

    def begin(self) -> None:
        """What is not named again until `end` is gone then."""
        self._round += 1

    def end(self) -> None:
        """See `begin`."""
        for identity, endpoint in list(self._endpoints.items()):
            if endpoint.named != self._round:
                self.leave(identity)
        for identity, network in list(self._networks.items()):
            if network.named != self._round:
                del self._networks[identity]

    def network(self, identity: str, title: str) -> None:
        """A network, and what it is called."""
        found = self._networks.setdefault(identity, _Network())
        found.title = title.lower()
        found.named = self._round

    def forget(self, identity: str) -> None:
        """The network is no more."""
        for each in [key for key, endpoint in self._endpoints.items() if endpoint.network == identity]:
            self.leave(each)
        self._networks.pop(identity, None)

    def join(self, network: str, identity: str, names: Sequence[str], addresses: Sequence[str]) -> None:
        """An endpoint of a network, in place of what was known of it. The first name is the one that its address is told as."""
        self.leave(identity)
        place = self._networks.setdefault(network, _Network())
        place.named = self._round
        made = _Endpoint(network, tuple(dict.fromkeys(each.lower() for each in names)), tuple(addresses), self._round)
        self._endpoints[identity] = made
        for name in made.names:
            place.records.setdefault(name, {})[identity] = made.addresses
        if names:
            for address in made.addresses:
                place.owners[address] = names[0]

    def leave(self, identity: str) -> None:
        """The endpoint is no more; nothing happens when it is not known."""
        gone = self._endpoints.pop(identity, None)
        place = None if gone is None else self._networks.get(gone.network)
        if gone is None or place is None:
            return
        for name in gone.names:
            known = place.records[name]
            del known[identity]
            if not known:
                del place.records[name]
        for address in gone.addresses:
            place.owners.pop(address, None)

    def find(self, places: Iterable[Place], name: str) -> list[str] | None:
        """All addresses of a name (in lower case), from the first network that has it; None when none has."""
        places = list(places)
        for identity, links in places:
            network = self._networks.get(identity)
            found = None if network is None else network.records.get(_linked(links, name))
            if found:
                return [address for addresses in found.values() for address in addresses]
        short, dot, title = name.rpartition(".")
        while dot:
            # Names of networks may have dots too.
            for identity, links in places:
                network = self._networks.get(identity)
                if network is not None and network.title == title and (found := network.records.get(_linked(links, short))):
                    return [address for addresses in found.values() for address in addresses]
            short, dot, rest = short.rpartition(".")
            title = f"{rest}.{title}"
        return None

    def reverse(self, places: Iterable[Place], address: str) -> str:
        """NAME.NETWORK of who has the address; "" when nobody has."""
        for identity, _ in places:
            network = self._networks.get(identity)
            if network is not None and (owner := network.owners.get(address)):
                return f"{owner}.{network.title}" if network.title else owner
        return ""


def _linked(links: Mapping[str, str], name: str) -> str:
    return links.get(name, name)
