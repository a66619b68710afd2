"""What is not in use, removed: container prune, image prune, system prune.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, POST /containers/prune and the other kinds'.
"""

from __future__ import annotations

import os

from boxship.cli import values
from boxship.cli.command import Command, Exit
from boxship.cli.http.client import ApiError, path
from boxship.cli.show import units
from boxship.cli.show.table import write
from boxship.kit.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call


def _confirm(call: Call, text: str, what: str) -> None:
    """Ask, unless --force. Raises Exit when the answer is no."""
    if call.on("force"):
        return
    write(f"{text} [y/N] ")
    answer = b""
    while not answer.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            write("\n")
            break
        answer += piece
    if answer.strip().lower() not in (b"y", b"yes"):
        raise Exit(1, f"{what} prune has been cancelled")


def _prune(call: Call, kind: str, filters: dict[str, dict[str, bool]]) -> tuple[dict[str, Any], int]:
    found = call.engine.send("POST", path(f"/{kind}/prune", {"filters": filters})).json() or {}
    return found, int(found.get("SpaceReclaimed") or 0)


def _containers(call: Call) -> int:
    found, space = _prune(call, "containers", call.filters())
    deleted = found.get("ContainersDeleted") or []
    if deleted:
        write("Deleted Containers:\n" + "".join(f"{name}\n" for name in deleted) + "\n")
    return space


def _images(call: Call, *, everything: bool) -> int:
    found, space = _prune(call, "images", {**call.filters(), "dangling": {"false" if everything else "true": True}})
    deleted = found.get("ImagesDeleted") or []
    if deleted:
        write(
            "Deleted Images:\n"
            + "".join(f"{word.lower()}: {item[word]}\n" for item in deleted for word in ("Untagged", "Deleted") if item.get(word))
            + "\n"
        )
    return space


def container_prune(call: Call) -> int:
    """`boxship container prune`."""
    _confirm(call, "WARNING! This will remove all stopped containers.\nAre you sure you want to continue?", "container")
    write(f"Total reclaimed space: {units.size(_containers(call))}\n")
    return 0


def image_prune(call: Call) -> int:
    """`boxship image prune`."""
    what = "images without at least one container associated to them" if call.on("all") else "dangling images"
    _confirm(call, f"WARNING! This will remove all {what}.\nAre you sure you want to continue?", "image")
    write(f"Total reclaimed space: {units.size(_images(call, everything=call.on('all')))}\n")
    return 0


def network_prune(call: Call) -> int:
    """`boxship network prune`."""
    text = "WARNING! This will remove all custom networks not used by at least one container.\nAre you sure you want to continue?"
    _confirm(call, text, "network")
    found, _ = _prune(call, "networks", call.filters())
    if found.get("NetworksDeleted"):
        write("Deleted Networks:\n" + "".join(f"{name}\n" for name in found["NetworksDeleted"]) + "\n")
    return 0


def volume_prune(call: Call) -> int:
    """`boxship volume prune`."""
    filters = call.filters()
    if call.on("all"):
        if "all" in filters:
            raise InvalidArgument("conflicting options: cannot specify both --all and --filter all=1")
        filters["all"] = {"true": True}
    what = "all" if call.on("all") else "anonymous"
    text = f"WARNING! This will remove {what} local volumes not used by at least one container."
    _confirm(call, f"{text}\nAre you sure you want to continue?", "volume")
    found, space = _prune(call, "volumes", filters)
    if found.get("VolumesDeleted"):
        write("Deleted Volumes:\n" + "".join(f"{name}\n" for name in found["VolumesDeleted"]) + "\n")
    write(f"Total reclaimed space: {units.size(space)}\n")
    return 0


def system_prune(call: Call) -> int:
    """`boxship system prune`."""
    images = "all images without at least one container associated to them" if call.on("all") else "all dangling images"
    items = ["all stopped containers", "all networks not used by at least one container"]
    if call.on("volumes"):
        items.append("all anonymous volumes not used by at least one container")
    items += [images, "unused build cache"]
    _confirm(
        call,
        "WARNING! This will remove:\n" + "".join(f"  - {item}\n" for item in items) + "\nAre you sure you want to continue?",
        "system",
    )
    space = _containers(call)
    space += _others(call, "networks", "NetworksDeleted", "Deleted Networks:")
    if call.on("volumes"):
        space += _others(call, "volumes", "VolumesDeleted", "Deleted Volumes:")
    space += _images(call, everything=call.on("all"))
    space += _others(call, "build", "CachesDeleted", "Deleted build cache objects:")
    write(f"Total reclaimed space: {units.size(space)}\n")
    return 0


def build_prune(call: Call) -> int:
    """`boxship builder prune`."""
    _confirm(call, "WARNING! This will remove all build cache.\n\nAre you sure you want to continue?", "builder")
    keep = values.size(call.text("keep-storage")) if call.text("keep-storage") else None
    query = {"filters": call.filters(), "all": "1" if call.on("all") else None, "keep-storage": keep}
    found = call.engine.send("POST", path("/build/prune", query)).json() or {}
    if found.get("CachesDeleted"):
        write("Deleted build cache objects:\n" + "".join(f"{name}\n" for name in found["CachesDeleted"]) + "\n")
    write(f"Total reclaimed space: {units.size(int(found.get('SpaceReclaimed') or 0))}\n")
    return 0


def _others(call: Call, kind: str, key: str, title: str) -> int:
    try:
        found, space = _prune(call, kind, call.filters())
    except ApiError as error:
        if error.status in (404, 501):
            return 0  # an engine that has no such things
        raise
    if found.get(key):
        write(f"{title}\n" + "".join(f"{name}\n" for name in found[key]) + "\n")
    return space


_FLAGS = """
filter filter | Provide filter values (e.g. "until=<timestamp>")
f,force | Do not prompt for confirmation
"""
COMMANDS = {
    "container prune": Command(" [OPTIONS]", "Remove all stopped containers", container_prune, _FLAGS),
    "image prune": Command(
        " [OPTIONS]", "Remove unused images", image_prune, _FLAGS + "a,all | Remove all unused images, not just dangling ones\n"
    ),
    "network prune": Command(" [OPTIONS]", "Remove all unused networks", network_prune, _FLAGS),
    "volume prune": Command(
        " [OPTIONS]",
        "Remove unused local volumes",
        volume_prune,
        _FLAGS + "a,all | Remove all unused volumes, not just anonymous ones\n",
    ),
    "system prune": Command(
        " [OPTIONS]",
        "Remove unused data",
        system_prune,
        _FLAGS
        + """
a,all | Remove all unused images not just dangling ones
volumes | Prune anonymous volumes
""",
    ),
}
