"""Elements of nftables' maps by netlink: what nft(8) needs a process of some milliseconds for.

Runs in: any process with CAP_NET_ADMIN over its network namespace.
Spec: Linux include/uapi/linux/netfilter/nf_tables.h. A batch is one transaction: all of it or nothing.
Not here: tables, chains and rules, whose text nft(8) compiles.
"""

from __future__ import annotations

from _struct import Struct

from boxship.abi import netlink as abi
from boxship.kit.errors import from_os_error
from boxship.linux.netlink import Socket, aligned, attribute, check, nested, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_GENERIC = Struct(">BBH")  # struct nfgenmsg {u8 family, version; be16 res_id}


class Element:
    """One element of the map `name`: its key, and what it stands for; each a sequence of fields in network byte order."""

    __slots__ = ("key", "name", "value")

    def __init__(self, name: str, key: Iterable[bytes], value: Iterable[bytes]) -> None:
        self.name = name
        self.key = _padded(key)
        self.value = _padded(value)


def _padded(fields: Iterable[bytes]) -> bytes:
    """A concatenation as the kernel keeps it: each field begins at a multiple of four."""
    return b"".join(field.ljust(aligned(len(field)), b"\0") for field in fields)


def change(table: str, *, add: Iterable[Element] = (), remove: Iterable[Element] = ()) -> None:
    """Add and remove elements of maps of the inet table. Raises an error of the tree; nothing is changed then."""
    changes = [(abi.NFT_MSG_DELSETELEM, 0, each) for each in remove]
    changes += [(abi.NFT_MSG_NEWSETELEM, abi.NLM_F_CREATE, each) for each in add]
    if not changes:
        return
    with Socket(abi.NETLINK_NETFILTER) as sock:
        begin = _GENERIC.pack(0, 0, abi.NFNL_SUBSYS_NFTABLES)
        messages = [(abi.NFNL_MSG_BATCH_BEGIN, 0, begin)]
        for kind, flags, element in changes:
            body = _GENERIC.pack(abi.NFPROTO_INET, 0, 0) + text(abi.NFTA_SET_ELEM_LIST_TABLE, table)
            body += text(abi.NFTA_SET_ELEM_LIST_SET, element.name)
            item = nested(abi.NFTA_SET_ELEM_KEY, attribute(abi.NFTA_DATA_VALUE, element.key))
            item += nested(abi.NFTA_SET_ELEM_DATA, attribute(abi.NFTA_DATA_VALUE, element.value))
            body += nested(abi.NFTA_SET_ELEM_LIST_ELEMENTS, nested(abi.NFTA_LIST_ELEM, item))
            messages.append((abi.NFNL_SUBSYS_NFTABLES << 8 | kind, flags | abi.NLM_F_ACK, body))
        messages.append((abi.NFNL_MSG_BATCH_END, 0, begin))
        try:
            for error, answer_flags in sock.transaction(messages, len(changes)):
                check(error, answer_flags, 0)
        except OSError as error:
            raise from_os_error(error, f"changing the maps of the table {table}") from None
