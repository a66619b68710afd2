"""Volumes: volume create, ls, rm.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /volumes/….
"""

from __future__ import annotations

from boxship.cli.command import LISTING, MANY, Command, each
from boxship.cli.http.client import path, quote
from boxship.cli.show.table import Listing, write
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call

HEADINGS = {
    "Driver": "DRIVER",
    "Name": "VOLUME NAME",
    "Scope": "SCOPE",
    "Mountpoint": "MOUNTPOINT",
    "Labels": "LABELS",
    "Links": "LINKS",
    "Size": "SIZE",
    "Availability": "AVAILABILITY",
    "Group": "GROUP",
    "Status": "STATUS",
}


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which names are sorted as docker does: numbers in them by what they count."""
    found: list[tuple[int, int, str]] = []
    digits = ""
    for char in f"{name}\0":
        if char.isdigit():
            digits += char
            continue
        if digits:
            found.append((0, int(digits), digits))
            digits = ""
        found.append((1, ord(char), ""))
    return found


def _ls(call: Call) -> int:
    from boxship.cli.show import units

    listing = Listing(
        call.format(), ["Driver", "Name"], HEADINGS, quiet="Name" if call.on("quiet") else "", go_type="*formatter.volumeContext"
    )
    found = call.engine.send("GET", path("/volumes", {"filters": call.filters()})).json()["Volumes"] or []

    def fields(volume: dict[str, Any]) -> dict[str, object]:
        usage = volume.get("UsageData")
        return {
            "Driver": volume["Driver"],
            "Name": volume["Name"],
            "Scope": volume["Scope"],
            "Mountpoint": volume["Mountpoint"],
            "Labels": ",".join(f"{name}={value}" for name, value in sorted((volume.get("Labels") or {}).items())),
            "Links": str(usage["RefCount"]) if usage else "N/A",
            "Size": units.size(usage["Size"]) if usage else "N/A",
            "Availability": "N/A",
            "Group": "N/A",
            "Status": "N/A",
        }

    listing.show([fields(volume) for volume in sorted(found, key=lambda volume: natural(volume["Name"]))])
    return 0


def _create(call: Call) -> int:
    from boxship.cli.verbs.create import labels, pairs

    name = call.text("name")
    if call.words and name:
        raise BoxshipError("conflicting options: cannot specify a volume-name through both --name and as a positional arg")
    body = {
        "Name": call.words[0] if call.words else name,
        "Driver": call.text("driver") or "local",
        "DriverOpts": pairs(call.all("opt")),
        "Labels": labels(call),
    }
    write(f"{call.engine.send('POST', '/volumes/create', body).json()['Name']}\n")
    return 0


def _rm(call: Call) -> int:
    return each(
        call, call.words,
        lambda name: call.engine.send("DELETE", path(f"/volumes/{quote(name)}", {"force": call.on("force")})).read(),
    )


COMMANDS = {
    "volume create": Command(
        " [OPTIONS] [VOLUME]",
        "Create a volume",
        _create,
        """
d,driver string | Specify volume driver name (default "local")
label list | Set metadata for a volume
label-file list |
name string |
o,opt list | Set driver specific options
""",
        most=1,
    ),
    "volume ls": Command(
        " [OPTIONS]",
        "List volumes",
        _ls,
        LISTING
        + """
f,filter filter | Provide filter values (e.g. "dangling=true")
q,quiet | Only display volume names
""",
    ),
    "volume rm": Command(
        " [OPTIONS] VOLUME [VOLUME...]",
        "Remove one or more volumes",
        _rm,
        "f,force | Force the removal of one or more volumes\n",
        least=1,
        most=MANY,
    ),
}
