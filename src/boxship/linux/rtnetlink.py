"""Links, addresses and routes as messages of a batch, and what there is of them.

Runs in: any process; the namespace is that of the socket (`boxship.linux.netlink.Socket`).
Spec: rtnetlink(7), veth(4); Linux include/uapi/linux/if_link.h.
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import netlink as abi
from boxship.kit.errors import from_os_error
from boxship.linux.netlink import NUMBER, Message, Socket, attribute, attributes, nested, number, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_LINK = Struct("=BxHiII")  # struct ifinfomsg {u8 family; u16 type; int index; unsigned flags, change}
_ADDRESS = Struct("=BBBBI")  # struct ifaddrmsg {u8 family, prefixlen, flags, scope; u32 index}
_ROUTE = Struct("=BBBBBBBBI")  # struct rtmsg {u8 family, dst_len, src_len, tos, table, protocol, scope, type; u32 flags}
_AF_BRIDGE = 7
_DUMPS = 8


class Link:
    """A network device as it is."""

    __slots__ = ("index", "kind", "mac", "master", "mtu", "name", "up")

    def __init__(self, index: int, name: str, kind: str, master: int, mac: str, mtu: int, up: bool) -> None:
        self.index = index
        self.name = name
        self.kind = kind
        """ "bridge", "veth" …; "" for a physical one."""
        self.master = master
        """Index of the bridge that it is a port of; 0 for none."""
        self.mac = mac
        self.mtu = mtu
        self.up = up


def mac_bytes(mac: str) -> bytes:
    """ "02:42:ac:11:00:02" as six bytes."""
    return bytes.fromhex(mac.replace(":", "").replace("-", ""))


def _up(up: bool | None) -> tuple[int, int]:
    return (abi.IFF_UP if up else 0, abi.IFF_UP if up is not None else 0)


def _link_attributes(mac: str, mtu: int, master: int) -> bytes:
    made = b""
    if mac:
        made += attribute(abi.IFLA_ADDRESS, mac_bytes(mac))
    if mtu:
        made += number(abi.IFLA_MTU, mtu)
    if master:
        made += number(abi.IFLA_MASTER, master)
    return made


def new_link(
    name: str,
    kind: str,
    *,
    mac: str = "",
    mtu: int = 0,
    master: int = 0,
    up: bool | None = None,
    lower: int = 0,
    namespace: int = -1,
    index: int = 0,
    data: bytes = b"",
    doing: str = "",
) -> Message:
    """Make a device; `lower` is the index of the one that it sits on, `namespace` a descriptor of where it goes."""
    body = _LINK.pack(0, 0, index, *_up(up)) + text(abi.IFLA_IFNAME, name) + _link_attributes(mac, mtu, master)
    if lower:
        body += number(abi.IFLA_LINK, lower)
    if namespace >= 0:
        body += number(abi.IFLA_NET_NS_FD, namespace)
    body += nested(
        abi.IFLA_LINKINFO, attribute(abi.IFLA_INFO_KIND, kind.encode()), *([nested(abi.IFLA_INFO_DATA, data)] if data else [])
    )
    return Message(abi.RTM_NEWLINK, abi.NLM_F_CREATE_EXCL, body, doing or f"making the {kind} {name}")


def new_veth(
    name: str,
    *,
    master: int,
    mtu: int,
    peer: str,
    peer_mac: str,
    peer_namespace: int,
    peer_index: int = 0,
    up: bool = True,
) -> Message:
    """Make a pair: `name` here, `peer` in the namespace (a descriptor), all in one step."""
    body = _LINK.pack(0, 0, peer_index, 0, 0) + text(abi.IFLA_IFNAME, peer) + _link_attributes(peer_mac, mtu, 0)
    body += number(abi.IFLA_NET_NS_FD, peer_namespace)
    return new_link(name, "veth", mtu=mtu, master=master, up=up, data=attribute(abi.VETH_INFO_PEER | abi.NLA_F_NESTED, body))


def set_link(
    index: int,
    *,
    up: bool | None = None,
    name: str = "",
    mac: str = "",
    mtu: int = 0,
    master: int = 0,
    doing: str = "",
) -> Message:
    """Change a device."""
    body = _LINK.pack(0, 0, index, *_up(up)) + (text(abi.IFLA_IFNAME, name) if name else b"") + _link_attributes(mac, mtu, master)
    return Message(abi.RTM_NEWLINK, 0, body, doing or "setting up a network device")


def set_port(name: str, *, hairpin: bool | None = None, isolated: bool | None = None) -> Message:
    """Change how a bridge treats its port `name`."""
    flags = b"".join(
        attribute(kind, bytes([value]))
        for kind, value in ((abi.IFLA_BRPORT_MODE, hairpin), (abi.IFLA_BRPORT_ISOLATED, isolated))
        if value is not None
    )
    body = _LINK.pack(0, 0, 0, 0, 0) + text(abi.IFLA_IFNAME, name)
    body += nested(abi.IFLA_LINKINFO, attribute(abi.IFLA_INFO_SLAVE_KIND, b"bridge"), nested(abi.IFLA_INFO_SLAVE_DATA, flags))
    return Message(abi.RTM_NEWLINK, 0, body, f"setting up the bridge's port {name}")


def delete_link(index: int = 0, name: str = "") -> Message:
    """Remove a device; it may be gone."""
    body = _LINK.pack(0, 0, index, 0, 0) + (text(abi.IFLA_IFNAME, name) if name else b"")
    return Message(abi.RTM_DELLINK, 0, body, f"removing the network device {name or index}", (errno.ENODEV,))


def _packed(address: str) -> tuple[int, bytes]:
    import _socket

    family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
    return family, _socket.inet_pton(family, address)


def add_address(index: int, address: str, prefix: int, *, doing: str = "") -> Message:
    """Give a device an address, without duplicate address detection; it may have it."""
    family, raw = _packed(address)
    v6 = ":" in address
    body = _ADDRESS.pack(family, prefix, abi.IFA_F_NODAD if v6 else 0, 0, index) + attribute(abi.IFA_LOCAL, raw)
    body += attribute(abi.IFA_ADDRESS, raw)
    if not v6 and prefix < 31:
        high = int.from_bytes(raw, "big") | (1 << (32 - prefix)) - 1
        body += attribute(abi.IFA_BROADCAST, high.to_bytes(4, "big"))
    return Message(
        abi.RTM_NEWADDR, abi.NLM_F_CREATE_EXCL, body, doing or f"giving a network device the address {address}", (errno.EEXIST,)
    )


def delete_address(index: int, address: str, prefix: int) -> Message:
    """Take an address away; it may be gone."""
    family, raw = _packed(address)
    body = _ADDRESS.pack(family, prefix, 0, 0, index) + attribute(abi.IFA_LOCAL, raw) + attribute(abi.IFA_ADDRESS, raw)
    return Message(abi.RTM_DELADDR, 0, body, f"taking the address {address} away", (errno.EADDRNOTAVAIL, errno.ENODEV))


def route(
    index: int, *, gateway: str = "", destination: str = "", prefix: int = 0, v6: bool = False, remove: bool = False
) -> Message:
    """Add a route over a device, replacing one to the same place, or remove it; without `destination` the default."""
    import _socket

    family = _socket.AF_INET6 if v6 else _socket.AF_INET
    scope = abi.RT_SCOPE_UNIVERSE if gateway or v6 else abi.RT_SCOPE_LINK
    body = _ROUTE.pack(family, prefix, 0, 0, abi.RT_TABLE_MAIN, abi.RTPROT_BOOT, scope, abi.RTN_UNICAST, 0)
    body += number(abi.RTA_OIF, index)
    if destination:
        body += attribute(abi.RTA_DST, _packed(destination)[1])
    if gateway:
        body += attribute(abi.RTA_GATEWAY, _packed(gateway)[1])
    shown = f"{destination}/{prefix}" if destination else "default"
    if remove:
        return Message(abi.RTM_DELROUTE, 0, body, f"removing the {shown} route", (errno.ESRCH,))
    return Message(
        abi.RTM_NEWROUTE, abi.NLM_F_CREATE | abi.NLM_F_REPLACE, body, f"adding the {shown} route by {gateway or index}"
    )


# what there is


def _dump(sock: Socket, kind: int, body: bytes, doing: str) -> list[bytes]:
    for last in range(_DUMPS, -1, -1):
        try:
            return list(sock.request(kind, abi.NLM_F_DUMP, body))
        except InterruptedError as error:
            if not last:
                raise from_os_error(error, doing) from None
        except OSError as error:
            raise from_os_error(error, doing) from None
    return []


def _parse_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body[_LINK.size :])
    info = attributes(found.get(abi.IFLA_LINKINFO, b""))
    return Link(
        index,
        os.fsdecode(found.get(abi.IFLA_IFNAME, b"").rstrip(b"\0")),
        info.get(abi.IFLA_INFO_KIND, b"").rstrip(b"\0").decode(),
        NUMBER.unpack(found[abi.IFLA_MASTER])[0] if abi.IFLA_MASTER in found else 0,
        found.get(abi.IFLA_ADDRESS, b"").hex(":"),
        NUMBER.unpack(found[abi.IFLA_MTU])[0] if abi.IFLA_MTU in found else 0,
        bool(flags & abi.IFF_UP),
    )


def links(sock: Socket) -> list[Link]:
    """All devices. Raises an error of the tree."""
    return [_parse_link(body) for body in _dump(sock, abi.RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0), "listing network devices")]


def find_link(sock: Socket, name: str) -> Link | None:
    """The device with that name. Raises an error of the tree."""
    try:
        for body in sock.request(abi.RTM_GETLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(abi.IFLA_IFNAME, name)):
            return _parse_link(body)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise from_os_error(error, f"looking for the network device {name}") from None
    return None


def addresses(sock: Socket) -> Iterator[tuple[int, str, int]]:
    """(index of the device, address, prefix) of all addresses. Raises an error of the tree."""
    import _socket

    for body in _dump(sock, abi.RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0), "listing addresses"):
        family, prefix, _, _, index = _ADDRESS.unpack_from(body)
        found = attributes(body[_ADDRESS.size :])
        raw = found.get(abi.IFA_LOCAL) or found.get(abi.IFA_ADDRESS)
        if raw and family in (_socket.AF_INET, _socket.AF_INET6):
            yield index, _socket.inet_ntop(family, raw), prefix


def routes(sock: Socket) -> Iterator[tuple[str, int]]:
    """(network, prefix) that the main table has a way to, without the default. Raises an error of the tree."""
    import _socket

    body = _ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
    for each in _dump(sock, abi.RTM_GETROUTE, body, "listing routes"):
        family, prefix, _, _, table, *_rest = _ROUTE.unpack_from(each)
        raw = attributes(each[_ROUTE.size :]).get(abi.RTA_DST)
        if raw and prefix and table == abi.RT_TABLE_MAIN and family in (_socket.AF_INET, _socket.AF_INET6):
            yield _socket.inet_ntop(family, raw), prefix
