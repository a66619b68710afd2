"""Port 53 of 127.0.0.11 leads to the ports that our sockets have, so that the container may have port 53 itself.

Runs in: the helper, in a container's network namespace.
Spec: Linux include/uapi/linux/netfilter/nf_tables.h. As dockerd does, but without NAT: the ports are changed in the packets
themselves, so that the kernel need not track every connection that the container has.

Where the container tracks connections itself, it sees port 53 both ways: questions are changed after that, answers before.
"""

from __future__ import annotations

import _socket
from _struct import Struct

from boxship.abi import netlink as abi
from boxship.linux.netlink import Socket, attribute, check, nested, text

TABLE = "boxship-dns"
_GENERIC = Struct(">BBH")  # struct nfgenmsg {u8 family, version; be16 res_id}
_UDP, _TCP = 17, 6
_BEFORE, _AFTER = -300, 300
"""Priorities: tracking has -200."""
_FROM, _TO = 12, 16
"""Where an IPv4 header has its addresses."""
_SOURCE, _DESTINATION = 0, 2
"""Where the headers of UDP and TCP have their ports."""
_CHECKSUM = {_UDP: 6, _TCP: 16}


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big", signed=value < 0))


def _expression(name: str, *data: bytes) -> bytes:
    return nested(abi.NFTA_LIST_ELEM, text(abi.NFTA_EXPR_NAME, name), nested(abi.NFTA_EXPR_DATA, *data))


def _value(kind: int, value: bytes) -> bytes:
    return nested(kind, attribute(abi.NFTA_DATA_VALUE, value))


def _load(base: int, offset: int, size: int) -> bytes:
    return _expression(
        "payload", _number(abi.NFTA_PAYLOAD_DREG, abi.NFT_REG_1), _number(abi.NFTA_PAYLOAD_BASE, base),
        _number(abi.NFTA_PAYLOAD_OFFSET, offset), _number(abi.NFTA_PAYLOAD_LEN, size),
    )


def _is(value: bytes) -> bytes:
    return _expression(
        "cmp", _number(abi.NFTA_CMP_SREG, abi.NFT_REG_1), _number(abi.NFTA_CMP_OP, abi.NFT_CMP_EQ),
        _value(abi.NFTA_CMP_DATA, value),
    )


def _change(address: bytes, at: int, protocol: int, port: int, former: int, to: int) -> bytes:
    """The expressions of: packets of that protocol whose address at `at` is `address` and whose port at `port` is `former`."""
    return nested(
        abi.NFTA_RULE_EXPRESSIONS,
        _load(abi.NFT_PAYLOAD_NETWORK_HEADER, at, 4),
        _is(address),
        _expression("meta", _number(abi.NFTA_META_DREG, abi.NFT_REG_1), _number(abi.NFTA_META_KEY, abi.NFT_META_L4PROTO)),
        _is(bytes((protocol,))),
        _load(abi.NFT_PAYLOAD_TRANSPORT_HEADER, port, 2),
        _is(former.to_bytes(2)),
        _expression(
            "immediate", _number(abi.NFTA_IMMEDIATE_DREG, abi.NFT_REG_1), _value(abi.NFTA_IMMEDIATE_DATA, to.to_bytes(2))
        ),
        _expression(
            "payload", _number(abi.NFTA_PAYLOAD_SREG, abi.NFT_REG_1),
            _number(abi.NFTA_PAYLOAD_BASE, abi.NFT_PAYLOAD_TRANSPORT_HEADER), _number(abi.NFTA_PAYLOAD_OFFSET, port),
            _number(abi.NFTA_PAYLOAD_LEN, 2), _number(abi.NFTA_PAYLOAD_CSUM_TYPE, abi.NFT_PAYLOAD_CSUM_INET),
            _number(abi.NFTA_PAYLOAD_CSUM_OFFSET, _CHECKSUM[protocol]),
        ),
    )


def _chain(name: str, priority: int) -> bytes:
    hook = nested(
        abi.NFTA_CHAIN_HOOK, _number(abi.NFTA_HOOK_HOOKNUM, abi.NF_INET_LOCAL_OUT), _number(abi.NFTA_HOOK_PRIORITY, priority)
    )
    return text(abi.NFTA_CHAIN_TABLE, TABLE) + text(abi.NFTA_CHAIN_NAME, name) + hook + text(abi.NFTA_CHAIN_TYPE, "filter")


def _rule(chain: str, expressions: bytes) -> bytes:
    return text(abi.NFTA_RULE_TABLE, TABLE) + text(abi.NFTA_RULE_CHAIN, chain) + expressions


def redirect(address: str, port: int, udp_port: int, tcp_port: int) -> None:
    """From now on `port` of `address` is those two, in place of what was there of ours. Raises OSError."""
    packed = _socket.inet_aton(address)
    changes = [(abi.NFT_MSG_NEWTABLE, _TABLE)]
    for name, priority in (("answers", _BEFORE), ("questions", _AFTER)):
        changes.append((abi.NFT_MSG_NEWCHAIN, _chain(name, priority)))
    for protocol, own in ((_UDP, udp_port), (_TCP, tcp_port)):
        changes.append((abi.NFT_MSG_NEWRULE, _rule("answers", _change(packed, _FROM, protocol, _SOURCE, own, port))))
        changes.append((abi.NFT_MSG_NEWRULE, _rule("questions", _change(packed, _TO, protocol, _DESTINATION, port, own))))
    try:
        _commit(changes)
    except FileExistsError:
        # A killed helper's. To remove something takes the kernel forty times as long, so it is not tried first.
        _commit([(abi.NFT_MSG_DELTABLE, _TABLE), *changes])


def undo() -> None:
    """No port leads elsewhere. Raises OSError. Takes the kernel up to some ten milliseconds."""
    _commit([(abi.NFT_MSG_DELTABLE, _TABLE)])


_TABLE = text(abi.NFTA_TABLE_NAME, TABLE)


def _commit(changes: list[tuple[int, bytes]]) -> None:
    """All of it or nothing."""
    frame = _GENERIC.pack(0, 0, abi.NFNL_SUBSYS_NFTABLES)
    head = _GENERIC.pack(abi.NFPROTO_IPV4, 0, 0)
    messages = [(abi.NFNL_MSG_BATCH_BEGIN, 0, frame)]
    for kind, body in changes:
        flags = abi.NLM_F_ACK | (abi.NLM_F_CREATE_EXCL if kind != abi.NFT_MSG_DELTABLE else 0)
        messages.append((abi.NFNL_SUBSYS_NFTABLES << 8 | kind, flags, head + body))
    messages.append((abi.NFNL_MSG_BATCH_END, 0, frame))
    with Socket(abi.NETLINK_NETFILTER) as sock:
        for error, answer_flags in sock.transaction(messages, len(changes)):
            check(error, answer_flags, 0)
