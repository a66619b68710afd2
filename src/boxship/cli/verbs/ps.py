"""`boxship ps`.

Runs in: the boxship command.
Spec: docker ps; Docker Engine API, GET /containers/json.
"""

from __future__ import annotations

from boxship.cli.command import LISTING, Command
from boxship.cli.http.client import path
from boxship.cli.show import units
from boxship.cli.show.table import Listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from boxship.cli.command import Call

DEFAULT = ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names")
HEADINGS = {
    "ID": "CONTAINER ID",
    "Names": "NAMES",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "CreatedAt": "CREATED AT",
    "RunningFor": "CREATED",
    "Ports": "PORTS",
    "State": "STATE",
    "Status": "STATUS",
    "Size": "SIZE",
    "Labels": "LABELS",
    "Mounts": "MOUNTS",
    "LocalVolumes": "LOCAL VOLUMES",
    "Networks": "NETWORKS",
    "Platform": "PLATFORM",
}


def ports(entries: Sequence[dict[str, Any]]) -> str:
    """ "0.0.0.0:80->80/tcp, 443/tcp"; adjacent ports that are published alike are one range."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    order: list[tuple[str, str] | str] = []
    singles = sorted(
        entries, key=lambda e: (e.get("PrivatePort", 0), e.get("IP") or "", e.get("PublicPort", 0), e.get("Type") or "")
    )
    shown: list[str] = []
    for entry in singles:
        private, public, kind, address = (
            entry["PrivatePort"],
            entry.get("PublicPort") or 0,
            entry.get("Type") or "tcp",
            entry.get("IP") or "",
        )
        if public and public != private:
            shown.append(f"{_bracketed(address)}:{public}->{private}/{kind}")
            continue
        key = (address if public else "", kind)
        if key not in groups:
            groups[key] = []
            order.append(key)
        ranges = groups[key]
        if ranges and private == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], private)
        elif not ranges or private > ranges[-1][1]:
            ranges.append((private, private))
    grouped = []
    for address, kind in (key for key in order if isinstance(key, tuple)):
        for first, last in groups[address, kind]:
            span = str(first) if first == last else f"{first}-{last}"
            grouped.append(f"{_bracketed(address)}:{span}->{span}/{kind}" if address else f"{span}/{kind}")
    return ", ".join(sorted(grouped, key=lambda text: int(text.rpartition("->")[2].partition("/")[0].partition("-")[0])) + shown)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def container(c: dict[str, Any], *, full: bool = False) -> dict[str, object]:
    """The fields of one container in a list."""

    def image() -> str:
        name = c.get("Image") or "<no image>"
        identity = str(c.get("ImageID") or "")
        if not full:
            if name == identity or name == identity.removeprefix("sha256:"):
                return name.removeprefix("sha256:")[:12]
            name = str(name).partition("@")[0] if "@" in name else name
        return str(name)

    def command() -> str:
        text = str(c.get("Command") or "")
        text = text if full else units.shorten(text, 20)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'

    def size() -> str:
        text = units.size(c.get("SizeRw") or 0, 3)
        return f"{text} (virtual {units.size(c['SizeRootFs'], 3)})" if c.get("SizeRootFs") else text

    def names() -> str:
        return ",".join(name.removeprefix("/") for name in c.get("Names") or [] if full or "/" not in name.removeprefix("/"))

    def mounts() -> str:
        found = [str(m.get("Name") or m.get("Source") or "") for m in c.get("Mounts") or []]
        return ",".join(name if full else units.shorten(name, 15) for name in found)

    labels = c.get("Labels") or {}
    return {
        "ID": c["Id"] if full else c["Id"][:12],
        "Names": names,
        "Image": image,
        "Command": command,
        "CreatedAt": lambda: units.local(c["Created"]),
        "RunningFor": lambda: units.ago(c["Created"]),
        "Ports": lambda: ports(c.get("Ports") or []),
        "State": c.get("State") or "",
        "Status": c.get("Status") or "",
        "Size": size,
        "Labels": lambda: ",".join(f"{key}={labels[key]}" for key in sorted(labels)),
        "Mounts": mounts,
        "LocalVolumes": lambda: str(sum(1 for m in c.get("Mounts") or [] if m.get("Driver") == "local")),
        "Networks": lambda: ",".join(sorted((c.get("NetworkSettings") or {}).get("Networks") or {})),
        "Platform": c.get("ImageManifestDescriptor", {}).get("platform") if c.get("ImageManifestDescriptor") else None,
    }


def _ps(call: Call) -> int:
    default = (*DEFAULT, "Size") if call.on("size") else DEFAULT
    listing = Listing(
        call.format(), default, HEADINGS, quiet="ID" if call.on("quiet") else "", go_type="*formatter.ContainerContext"
    )
    limit = call.number("last")
    query = {
        "all": call.on("all") or call.on("latest") or (limit or -1) > 0,
        "limit": 1 if call.on("latest") else limit if (limit or -1) > 0 else None,
        "size": call.on("size") or listing.needs("Size"),
        "filters": call.filters(),
    }
    found = call.engine.send("GET", path("/containers/json", query)).json()
    listing.show([container(c, full=call.on("no-trunc")) for c in found])
    return 0


COMMANDS = {
    "ps": Command(
        " [OPTIONS]",
        "List containers",
        _ps,
        LISTING
        + """
a,all | Show all containers (default: those that run)
f,filter filter | Filter output based on conditions
n,last int | Show the n last created containers, in whatever state
l,latest | Show the latest created container, in whatever state
no-trunc | Don't truncate output
q,quiet | Only display container IDs
s,size | Display sizes of files
""",
    )
}
