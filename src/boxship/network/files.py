"""hosts and resolv.conf of a container.

Runs in: the daemon. Texts in, texts out.
Spec: hosts(5), resolv.conf(5); libnetwork: servers of the host's loopback are of no use in a container.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LOCAL = (
    "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\n"
    "ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
)
DEFAULT_SERVERS = ("8.8.8.8", "8.8.4.4")
RESOLVER = "127.0.0.11"


def hosts(own: Sequence[str], names: str, extra: Iterable[tuple[str, str]] = (), *, base: str = LOCAL) -> str:
    """/etc/hosts: `base`, then `extra` (address, names), then each address of the container with its names."""
    lines = [f"{address}\t{name}\n" for address, name in extra]
    lines += [f"{address}\t{names}\n" for address in own]
    return base + "".join(lines)


def servers(text: str) -> list[str]:
    """The name servers of a resolv.conf."""
    return [words[1] for line in text.splitlines() if len(words := line.split()) > 1 and words[0] == "nameserver"]


def local(address: str) -> bool:
    """Whether it is an address of the loopback."""
    return address.startswith("127.") or address == "::1"


def resolv(
    host: str,
    *,
    dns: Sequence[str] = (),
    search: Sequence[str] = (),
    options: Sequence[str] = (),
    resolver: bool = False,
    v6: bool = False,
    keep_local: bool = False,
) -> str:
    """/etc/resolv.conf after the host's. With `resolver` the only server is ours, which asks the others.

    `keep_local` is for who has the host's network, where the servers of its loopback can be reached.
    """
    kept, found_search, found_options = [], "", ""
    for line in host.splitlines():
        word = line.split(None, 1)[:1]
        if word in (["search"], ["domain"]):
            found_search = line.strip()
        elif word == ["options"]:
            found_options = line.strip()
    if resolver:
        kept.append(f"nameserver {RESOLVER}")
    else:
        usable = list(dns) or [each for each in servers(host) if keep_local or (not local(each) and (v6 or ":" not in each))]
        kept += [f"nameserver {each}" for each in usable or DEFAULT_SERVERS]
    if list(search) != ["."]:
        if search:
            found_search = "search " + " ".join(search)
        if found_search:
            kept.append(found_search)
    if options:
        found_options = "options " + " ".join(options)
    if resolver and "ndots:" not in found_options:
        found_options = f"{found_options or 'options'} ndots:0"
    if found_options:
        kept.append(found_options)
    return "\n".join(kept) + "\n"


def external(host: str) -> list[str]:
    """The host's servers, for our resolver to ask."""
    return servers(host) or list(DEFAULT_SERVERS)


def host_resolv() -> str:
    """The host's resolv.conf; "" when there is none."""
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
