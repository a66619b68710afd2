"""Moving a network device into another network namespace, with its addresses.

Runs in: the runtime, in the host's network namespace, as root; single-threaded while it visits the other namespace.
Spec: rtnetlink(7); runtime-spec 1.3.0, config-linux.md "Network Devices".

    note addresses ─► down ─► one RTM_NEWLINK {index, new name, namespace} ─► in there: addresses, up

Name and namespace change in one request, so that the device never stands under either name in the wrong place. MTU, MAC
address and the like move along by themselves; addresses the kernel drops. When the namespace ends, the kernel gives
physical devices back to the host.
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import netlink as abi
from boxship.kit.errors import AlreadyExists, BoxshipError, NotFound, from_os_error
from boxship.linux.netlink import NUMBER, Socket, attribute, attributes, text
from boxship.linux.netns import Inside

_LINK = Struct("=BxHiII")  # struct ifinfomsg {u8 family; u16 type; int index; unsigned flags, change}
_ADDRESS = Struct("=BBBBI")  # struct ifaddrmsg {u8 family, prefixlen, flags, scope; u32 index}
_TRIES = 5


class Address:
    """One address of a device, as it came: `attributes` are those of the message that made it."""

    __slots__ = ("attributes", "family", "flags", "prefix", "scope")

    def __init__(self, family: int, prefix: int, flags: int, scope: int, attributes: dict[int, bytes]) -> None:
        self.family = family
        self.prefix = prefix
        self.flags = flags
        self.scope = scope
        self.attributes = attributes

    def moves(self) -> bool:
        """Whether it is the user's to keep: neither given for a time only, nor one that means this machine or link."""
        return bool(self.flags & abi.IFA_F_PERMANENT) and self.scope == abi.RT_SCOPE_UNIVERSE


def move(name: str, namespace: int, new_name: str = "", path: str = "") -> None:
    """Move the device `name` of our network namespace into `namespace` (a descriptor, borrowed), as `new_name`.

    `path` names the namespace in messages. Raises an error of the tree in runc's words; the device is then where it was,
    or in the namespace without addresses, from where the end of the namespace brings it back.
    """
    new_name = new_name or name
    path = path or f"/proc/self/fd/{namespace}"
    moving = f"fail to move network device {name} to network namespace {path}"
    here = _Route()
    try:
        there = _route_in(namespace)
        try:
            index = here.index(name)
            if not index:
                raise NotFound(f"link not found for interface {name} on runtime namespace: Link {name} not found")
            if there.index(new_name):
                # Asked first, because the kernel moves and then fails to rename.
                raise AlreadyExists(f"{moving}: file exists")
            # Before the device goes down, which costs it its IPv6 addresses.
            addresses = here.addresses(index)
            here.set_up(index, False, "fail to set link down")
            changes = {abi.IFLA_IFNAME: os.fsencode(new_name) + b"\0", abi.IFLA_NET_NS_FD: NUMBER.pack(namespace)}
            here.change(index, changes, moving)
            _settle(there, new_name, addresses, path)
        finally:
            there.close()
    finally:
        here.close()


def _settle(there: _Route, name: str, addresses: list[Address], path: str) -> None:
    index = there.index(name)
    if not index:
        raise NotFound(f"link not found for interface {name} on namespace {path} : Link {name} not found")
    for address in addresses:
        if address.moves():
            there.add(index, address, f"fail to set up address {describe(address)} on namespace {path}")
    there.set_up(index, True, f"fail to set up interface {name} on namespace {path}")


def _route_in(namespace: int) -> _Route:
    """A socket that was made in another network namespace belongs to it for good: be there for just that moment."""
    with Inside(namespace):
        return _Route()


def describe(address: Address) -> str:
    """ "192.0.2.1/24"."""
    import _socket

    raw = address.attributes.get(abi.IFA_LOCAL) or address.attributes.get(abi.IFA_ADDRESS, b"")
    return f"{_socket.inet_ntop(address.family, raw)}/{address.prefix}"


class _Route(Socket):
    """A routing netlink socket: one request at a time."""

    def index(self, name: str) -> int:
        """Of the device with that name; 0 if there is none."""
        request = _LINK.pack(0, 0, 0, 0, 0) + text(abi.IFLA_IFNAME, name)
        try:
            for body in self.request(abi.RTM_GETLINK, 0, request):
                return int(_LINK.unpack_from(body)[2])
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise from_os_error(error, f"fail to look up network device {name}") from None
        return 0

    def set_up(self, index: int, up: bool, doing: str) -> None:
        """Administratively up or down."""
        self._do(abi.RTM_NEWLINK, 0, _LINK.pack(0, 0, index, abi.IFF_UP if up else 0, abi.IFF_UP), doing)

    def change(self, index: int, attributes: dict[int, bytes], doing: str) -> None:
        """Set attributes of a link, all or none."""
        request = _LINK.pack(0, 0, index, 0, 0) + b"".join(attribute(kind, data) for kind, data in attributes.items())
        self._do(abi.RTM_NEWLINK, 0, request, doing)

    def addresses(self, index: int) -> list[Address]:
        """All addresses of a link, IPv4 and IPv6. Asked for anew when they changed meanwhile."""
        for _ in range(_TRIES):
            try:
                found = list(self.request(abi.RTM_GETADDR, abi.NLM_F_DUMP, _ADDRESS.pack(0, 0, 0, 0, index)))
            except InterruptedError:
                continue
            except OSError as error:
                raise from_os_error(error, "fail to get ip addresses") from None
            return [address for owner, address in map(_parse_address, found) if owner == index]
        raise BoxshipError("fail to get ip addresses: they keep changing")

    def add(self, index: int, address: Address, doing: str) -> None:
        """Give an address to a link."""
        flags = abi.IFA_F_PERMANENT | address.flags & abi.IFA_F_NOPREFIXROUTE
        request = _ADDRESS.pack(address.family, address.prefix, flags & 0xFF, address.scope, index)
        for kind in (abi.IFA_ADDRESS, abi.IFA_LOCAL, abi.IFA_BROADCAST):
            if kind in address.attributes:
                request += attribute(kind, address.attributes[kind])
        request += attribute(abi.IFA_FLAGS, NUMBER.pack(flags))
        self._do(abi.RTM_NEWADDR, abi.NLM_F_CREATE_EXCL, request, doing)

    def _do(self, kind: int, flags: int, request: bytes, doing: str) -> None:
        try:
            for _ in self.request(kind, flags | abi.NLM_F_ACK, request):
                pass
        except OSError as error:
            raise from_os_error(error, doing) from None


def _parse_address(body: bytes) -> tuple[int, Address]:
    family, prefix, flags, scope, index = _ADDRESS.unpack_from(body)
    found = attributes(body[_ADDRESS.size :])
    if abi.IFA_FLAGS in found:
        (flags,) = NUMBER.unpack(found[abi.IFA_FLAGS])
    return index, Address(family, prefix, flags, scope, found)
