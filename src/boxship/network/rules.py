"""Our table of nftables: what is published, who goes out under the host's address, and which networks cannot reach each other.

Runs in: the daemon; the text is made without I/O, `apply` gives it to nft(8).
Spec: nft(8); what dockerd does with iptables, in one table of the family inet.

The text is a function of the state, and replaces the whole table in one transaction of the kernel: there is no moment without
rules and nothing to undo after a crash. A published port is an element of a map: ten thousand of them cost a packet one look.

    prerouting, output  ──► published: the maps ──► destination is the container
    forward             ──► established or published: yes · within one bridge: as its network says · into one of ours: no
    postrouting         ──► out of a subnet of ours, or back into the bridge it came from: under the host's address
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from boxship.kit.errors import BoxshipError, Unsupported
from boxship.linux.nftables import Element
from boxship.network.model import Published

_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}

_HEAD = """\
table inet {table} {{}}
delete table inet {table}
table inet {table} {{
	set bridges {{ type ifname;{bridges} }}
	map ports4 {{ type inet_proto . inet_service : ipv4_addr . inet_service;{ports4} }}
	map ports4_at {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service;{ports4_at} }}
	map ports6 {{ type inet_proto . inet_service : ipv6_addr . inet_service;{ports6} }}
	map ports6_at {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service;{ports6_at} }}
	chain published {{
		dnat ip to ip daddr . meta l4proto . th dport map @ports4_at
		dnat ip to meta l4proto . th dport map @ports4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6_at
		dnat ip6 to meta l4proto . th dport map @ports6
	}}
	chain nat_prerouting {{
		type nat hook prerouting priority -100; policy accept;
		fib daddr type local jump published
	}}
	chain nat_output {{
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.0/8 return
		ip6 daddr ::1 return
		fib daddr type local jump published
	}}
	chain nat_postrouting {{
		type nat hook postrouting priority 100; policy accept;
{postrouting}	}}
	chain filter_forward {{
		type filter hook forward priority 0; policy accept;
		iifname != @bridges oifname != @bridges {others}
		ct state established,related accept
		ct status dnat accept
{forward}		oifname @bridges drop
	}}
}}
"""


class Bridge(NamedTuple):
    """What the rules need to know of a network."""

    device: str
    subnets: tuple[str, ...]
    masquerade: bool
    icc: bool
    internal: bool
    source: str = ""
    """Host address to go out under; "" for that of the way out."""


def in_kernel(port: Published) -> bool:
    """Whether the kernel can lead this port to the container; the host's own loopback needs the proxy."""
    return (
        (":" in port.host_ip) == (":" in port.container_ip)
        and bool(port.container_ip)
        and not port.host_ip.startswith("127.")
        and port.host_ip != "::1"
    )


def _elements(pairs: Iterable[str]) -> str:
    words = sorted(set(pairs))
    return f" elements = {{ {', '.join(words)} }};" if words else ""


def element(port: Published) -> tuple[str, str]:
    """(map, element) of a published port that `in_kernel` is true for."""
    family = "6" if ":" in port.container_ip else "4"
    target = f"{port.container_ip} . {port.container_port}"
    if port.host_ip in ("0.0.0.0", "::", ""):
        return f"ports{family}", f"{port.protocol} . {port.host_port} : {target}"
    return f"ports{family}_at", f"{port.host_ip} . {port.protocol} . {port.host_port} : {target}"


def map_element(port: Published) -> Element:
    """The same for the kernel itself."""
    family = socket.AF_INET6 if ":" in port.container_ip else socket.AF_INET
    name, _ = element(port)
    number, target = port.host_port.to_bytes(2, "big"), port.container_port.to_bytes(2, "big")
    key = [bytes([_PROTOCOLS[port.protocol]]), number]
    if name.endswith("_at"):
        key.insert(0, socket.inet_pton(family, port.host_ip))
    return Element(name, key, [socket.inet_pton(family, port.container_ip), target])


def render(table: str, bridges: Iterable[Bridge], ports: Iterable[Published], *, strict: bool) -> str:
    """The whole table for nft -f.

    With `strict` nothing is forwarded between other devices: for when it was us who let the kernel forward.
    """
    bridges = sorted(bridges)
    maps: dict[str, list[str]] = {"ports4": [], "ports4_at": [], "ports6": [], "ports6_at": []}
    for port in filter(in_kernel, ports):
        name, words = element(port)
        maps[name].append(words)
    postrouting, forward = "", ""
    for each in bridges:
        for subnet in each.subnets:
            family = "ip6" if ":" in subnet else "ip"
            if each.masquerade:
                how = f"snat ip to {each.source}" if each.source and family == "ip" else "masquerade"
                postrouting += f'\t\t{family} saddr {subnet} oifname != "{each.device}" {how}\n'
            postrouting += f'\t\t{family} saddr {subnet} oifname "{each.device}" ct status dnat masquerade\n'
        forward += f'\t\tiifname "{each.device}" oifname "{each.device}" {"accept" if each.icc else "drop"}\n'
        if each.internal:
            forward += f'\t\tiifname "{each.device}" drop\n'
    return _HEAD.format(
        table=table,
        bridges=_elements(f'"{each.device}"' for each in bridges),
        postrouting=postrouting,
        forward=forward,
        others="drop" if strict else "accept",
        **{name: _elements(words) for name, words in maps.items()},
    )


def removal(table: str) -> str:
    """What takes the table away, there or not."""
    return f"table inet {table} {{}}\ndelete table inet {table}\n"


def apply(text: str) -> None:
    """Have the kernel take `text`, all of it or nothing. Raises Unsupported without nft(8), BoxshipError with its words."""
    try:
        done = subprocess.run(["nft", "-f", "-"], input=text.encode(), capture_output=True, check=False, timeout=60)
    except FileNotFoundError:
        raise Unsupported("nft is not installed", "install the package nftables") from None
    if done.returncode:
        raise BoxshipError(f"nft: {done.stderr.decode(errors='replace').strip()}")
