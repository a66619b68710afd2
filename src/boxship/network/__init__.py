"""Networks of containers: bridges and their neighbours, addresses, namespaces, published ports.

Runs in: the daemon.
Spec: what Docker's clients see of libnetwork: the drivers bridge, host, null, macvlan and ipvlan; Docker Engine API, Network.

    manager     what there is, in memory and in ROOT/network/network.db; the one door of this package
    ├── ipam    pools and addresses                    (pure)
    ├── ports   which host port goes to whom
    ├── rules   the text of our nftables table         (pure)
    ├── links   bridges, pairs, routes: netlink
    └── sandbox namespaces below STATE/netns, some made ahead
    files       hosts and resolv.conf                  (pure)
    proxy, dns  what is served by a process of its own (`python -m boxship.network.proxy`)

SIGKILL is harmless because a record is written before what it is about is made in the kernel, and removed after that is gone:
`Networks.sweep` takes away what has no record, and the engine `release`s what has one and no running container.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.network.manager import Networks
    from boxship.network.model import Attachment, Endpoint, Network, Pool, Published, Sandbox, Settings

__all__ = ["Attachment", "Endpoint", "Network", "Networks", "Pool", "Published", "Sandbox", "Settings"]


def __getattr__(name: str) -> object:
    """At first use: the process of `proxy` and `dns` is in this package too, and does without all of these."""
    if name not in __all__:
        raise AttributeError(name)
    from boxship.network import manager, model

    return getattr(manager if name == "Networks" else model, name)
