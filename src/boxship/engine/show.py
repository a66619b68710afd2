"""Containers as answers have them: in lists and inspected.

Runs in: the daemon.
Spec: Docker Engine API (ContainerSummary, ContainerInspectResponse), filters of ContainerList.
"""

from __future__ import annotations

from typing import Any

from boxship.engine import networking, shapes, times
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.engine.events import Filters, labelled, truth
from boxship.engine.volumes import shown_points
from boxship.kit.errors import InvalidArgument, NotFound

LIST_FILTERS = frozenset((
    "ancestor", "before", "expose", "exited", "health", "id", "is-task", "isolation", "label", "name", "network", "publish",
    "since",
    "status", "volume",
))
_STATUSES = frozenset(("created", "restarting", "running", "removing", "paused", "exited", "dead"))


def inspect(core: Core, container: Container, version: tuple[int, int]) -> dict[str, Any]:
    """As `docker inspect` shows it."""
    state = container.state.shown()
    if container.health is not None:
        state["Health"] = container.health.shown()
    running_execs = [each.id for each in container.execs.values() if each.exit_code is None]
    return {
        "Id": container.id, "Created": container.created, "Path": container.path, "Args": container.args, "State": state,
        "Image": container.image_id, "ResolvConfPath": container.file("resolv.conf"), "HostnamePath": container.file("hostname"),
        "HostsPath": container.file("hosts"), "LogPath": container.log_path if container.log_driver == "json-file" else "",
        "Name": f"/{container.name}", "RestartCount": container.restart_count, "Driver": container.snapshotter,
        "Platform": "linux",
        "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": "", "ExecIDs": running_execs or None,
        "HostConfig": shapes.shown_host(container.host), "GraphDriver": {"Data": None, "Name": container.snapshotter},
        "Mounts": shown_points(container.mounts), "Config": shapes.shown_config(container.config),
        "NetworkSettings": networking.settings(core, container),
    }


def _command(container: Container) -> str:
    """Path and arguments as `docker ps` quotes them."""
    args = [f"'{word}'" if any(letter in word for letter in " \t\n\"'") else word for word in container.args]
    return " ".join([container.path, *args])


def summary(core: Core, container: Container) -> dict[str, Any]:
    """As in the list of containers."""
    return {
        "Id": container.id, "Names": [f"/{container.name}"], "Image": container.image_name, "ImageID": container.image_id,
        "Command": _command(container), "Created": times.nanoseconds(container.created) // 1_000_000_000,
        "Ports": networking.port_rows(core, container),
        "Labels": container.labels, "State": container.state.status, "Status": container.state.summary(container.health_status),
        "HostConfig": {"NetworkMode": container.host["NetworkMode"]},
        "NetworkSettings": {"Networks": networking.shown_networks(core, container)},
        "Mounts": shown_points(container.mounts),
    }


async def listed(core: Core, filters: Filters, *, everything: bool, limit: int, with_size: bool = False) -> list[dict[str, Any]]:
    """The list, youngest first. Raises InvalidArgument, NotFound for filters that make no sense."""
    chosen = sorted(core.containers(), key=lambda each: each.created, reverse=True)
    everything = everything or limit > 0 or any(name in filters for name in ("status", "exited", "before", "since"))
    for name, keep in (("before", -1), ("since", 1)):
        for text in filters.get(name, []):
            at = core.get(text).created
            chosen = [each for each in chosen if (each.created < at if keep < 0 else each.created > at)]
    for text in filters.get("status", []):
        if text not in _STATUSES:
            raise InvalidArgument(
                f"invalid filter 'status={text}': invalid value for state ({text}): must be one of created, running, paused, "
                "restarting, removing, exited, dead")
    codes: list[int] = []
    for text in filters.get("exited", []):
        if not text.lstrip("-").isdigit():
            raise InvalidArgument(f"invalid filter 'exited={text}': strconv.Atoi: parsing \"{text}\": invalid syntax")
        codes.append(int(text))
    for text in filters.get("health", []):
        if text not in ("starting", "healthy", "unhealthy", "none"):
            raise InvalidArgument(
                f"invalid filter 'health={text}': invalid value for health ({text}): must be one of none, starting, healthy, "
                "unhealthy")
    ancestors: set[str] = set()
    for text in filters.get("ancestor", []):
        try:
            ancestors.add((await core.images.get(text)).id)
        except (NotFound, InvalidArgument):
            ancestors.add(text)
    chosen = [each for each in chosen if (everything or each.state.running) and _wanted(core, each, filters, codes, ancestors)]
    if limit > 0:
        chosen = chosen[:limit]
    rows = [summary(core, each) for each in chosen]
    if with_size:
        for row, each in zip(rows, chosen, strict=True):
            row |= await sizes(core, each)
    return rows


async def sizes(core: Core, container: Container) -> dict[str, int]:
    """SizeRw and SizeRootFs."""
    try:
        own = await core.snapshots.usage(container.id)
    except NotFound:
        own = 0
    try:
        image = await core.images.size(await core.images.get(container.image_id))
    except NotFound:
        image = 0
    return ({"SizeRw": own} if own else {}) | {"SizeRootFs": own + image}


def _wanted(core: Core, container: Container, filters: Filters, codes: list[int], ancestors: set[str]) -> bool:
    import re

    if "id" in filters and not any(container.id.startswith(text) for text in filters["id"]):
        return False
    if "name" in filters:
        names = (container.name, f"/{container.name}")
        try:
            if not any(re.search(text, name) for text in filters["name"] for name in names):
                return False
        except re.error as error:
            raise InvalidArgument(f"invalid filter 'name': {error}") from None
    if "label" in filters and not labelled(container.labels, filters["label"]):
        return False
    if "status" in filters and container.state.status not in filters["status"]:
        return False
    if codes and (container.state.running or container.state.exit_code not in codes):
        return False
    if "health" in filters and (container.health_status or "none") not in filters["health"]:
        return False
    if ancestors and container.image_id not in ancestors and container.image_name not in ancestors:
        return False
    if "volume" in filters and not any(
            text in (point.get("Name"), point["Destination"]) for text in filters["volume"] for point in container.mounts):
        return False
    if "network" in filters and not any(
            text == name or (each["NetworkID"] and each["NetworkID"].startswith(text))
            for name, each in networking.shown_networks(core, container).items() for text in filters["network"]):
        return False
    if truth(filters, "is-task", default=False):
        return False
    return networking.has_port(core, container, filters)
