"""Making containers and removing them.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, ContainerCreate and ContainerDelete.

The order makes SIGKILL harmless: containerd's record first (labelled as this engine's), then the snapshot that it keeps from
being collected, then the engine's own record. What has the label and no record is taken away at the next start; a removal leaves
the record to the end.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import shutil
from typing import Any

from boxship.api.containerd.pb import containers, runc_options
from boxship.engine import networking, shapes, times, validate, volumes
from boxship.engine.container import Container
from boxship.engine.core import LABEL, RUNC_V2, Core, packed
from boxship.engine.images import Image
from boxship.engine.spec import DEFAULT_PATH
from boxship.images import platforms
from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, from_os_error
from boxship.linux.mounts import umount_below
from boxship.linux.roots import Root
from boxship.oci.image import Platform

SPEC_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_ADJECTIVES = (
    "able", "amber", "bold", "brave", "bright", "brisk", "calm", "clever", "cosmic", "crisp", "deft", "eager", "early",
    "epic", "fair", "fancy", "fleet", "fond", "frank", "gentle", "glad", "golden", "grand", "happy", "hardy", "honest",
    "jolly", "keen", "kind", "lively", "lucid", "lunar", "merry", "mighty", "mild", "noble", "patient", "polite", "proud",
    "quick", "quiet", "rapid", "ready", "regal", "robust", "rosy", "serene", "sharp", "shiny", "silent", "smart", "snug",
    "solar", "solid", "steady", "sunny", "swift", "tidy", "tough", "upbeat", "vivid", "warm", "wise", "witty", "young",
    "zesty",
)
_NAMES = (
    "albatross", "anchor", "barge", "beacon", "bilge", "binnacle", "bowline", "brig", "buoy", "capstan", "caravel", "clipper",
    "compass", "coxswain", "crane", "current", "cutter", "deck", "dinghy", "dock", "dory", "ferry", "fjord", "frigate",
    "galleon", "gannet", "harbor", "hawser", "helm", "heron", "hull", "jetty", "junk", "keel", "ketch", "knot", "lagoon",
    "lantern", "ledger", "lighter", "lock", "lugger", "mast", "mooring", "packet", "pelican", "petrel", "pier", "pilot",
    "pinnace", "prow", "quay", "rudder", "sail", "schooner", "sextant", "skiff", "sloop", "sounding", "spar", "stern",
    "tender", "tide", "tiller", "trawler", "tug", "wharf", "winch", "yawl",
)


def _random_name(core: Core) -> str:
    taken = {each.name for each in core.containers()}
    for attempt in range(100):
        name = f"{random.choice(_ADJECTIVES)}_{random.choice(_NAMES)}" + ("" if attempt < 10 else str(random.randrange(10000)))
        if name not in taken:
            return name
    return secrets.token_hex(16)


def merge(config: dict[str, Any], image: Image) -> None:
    """Fill what the user left open from the image's configuration."""
    defaults = image.container_config
    config["User"] = config["User"] or defaults.get("User", "")
    config["WorkingDir"] = config["WorkingDir"] or defaults.get("WorkingDir") or ""
    named = {word.partition("=")[0] for word in config["Env"] or []}
    config["Env"] = [*(config["Env"] or []), *(word for word in defaults.get("Env") or [] if word.partition("=")[0] not in named)]
    if not config["Entrypoint"]:
        if not config["Cmd"]:
            config["Cmd"] = defaults.get("Cmd")
            config["ArgsEscaped"] = bool(defaults.get("ArgsEscaped"))
        if config["Entrypoint"] is None:
            config["Entrypoint"] = defaults.get("Entrypoint")
    if config["Entrypoint"] == [""]:
        config["Entrypoint"] = None
    for key in ("ExposedPorts", "Volumes"):
        if defaults.get(key):
            config[key] = {**defaults[key], **(config[key] or {})}
    config["Labels"] = {**(defaults.get("Labels") or {}), **(config["Labels"] or {})}
    config["StopSignal"] = config["StopSignal"] or defaults.get("StopSignal", "")
    config["Shell"] = config["Shell"] or defaults.get("Shell")
    config["OnBuild"] = None
    inherited = defaults.get("Healthcheck")
    if inherited:
        inherited = shapes.shape(inherited, shapes.HEALTHCHECK, "Healthcheck")
        if config["Healthcheck"] is None:
            config["Healthcheck"] = inherited
        else:
            own = config["Healthcheck"]
            config["Healthcheck"] = {key: own[key] or inherited[key] for key in own}


def _check_platform(image: Image, name: str, wanted: str) -> None:
    """Raise NotFound for an image of another platform than the one that was asked for."""
    if not wanted:
        return
    try:
        parsed = platforms.parse(wanted)
    except InvalidArgument:
        raise InvalidArgument(f'"{wanted}": cannot parse platform specifier: invalid argument') from None
    found = Platform(os=image.config.get("os", ""), architecture=image.config.get("architecture", ""),
                               variant=image.config.get("variant", ""))
    if (found.os, found.architecture) != (parsed.os, parsed.architecture) or (
            parsed.variant and found.variant and parsed.variant != found.variant):
        raise NotFound(
            f"image with reference {name} was found but its platform ({found.os}/{found.architecture}) does not match the "
            f"specified platform ({wanted})")


def _check_joined(core: Core, host: dict[str, Any]) -> None:
    """Raise InvalidArgument for containers that are to be joined and are not there."""
    names = [host[key].partition(":")[2] for key in ("PidMode", "IpcMode") if host[key].startswith("container:")]
    names += [source.partition(":")[0] for source in host["VolumesFrom"] or []]
    try:
        for name in names:
            core.get(name)
    except NotFound as error:
        raise InvalidArgument(str(error)) from None


async def create(core: Core, body: Any, name: str, platform: str = "") -> tuple[Container, list[str]]:
    """Make a container of a ContainerCreate body.

    Returns it and warnings. Raises NotFound, InvalidArgument, FailedPrecondition.
    """
    if not isinstance(body, dict):
        raise InvalidArgument("config cannot be empty in order to create a container")
    config = shapes.shape(body, shapes.CONTAINER_CONFIG, "Config")
    host = shapes.shape(shapes.member(body, "HostConfig") or {}, shapes.HOST_CONFIG, "HostConfig")
    # docker-py's low-level client has it beside HostConfig, where Docker itself never looks.
    host["Runtime"] = host["Runtime"] or str(shapes.member(body, "Runtime") or "")
    name = validate.name(name) if name else _random_name(core)
    warnings = validate.check(config, host)
    networks = networking.asked(core, shapes.member(body, "NetworkingConfig"), config, host)
    if host["NetworkMode"] == "host" and host["PortBindings"]:
        warnings.append("Published ports are discarded when using host network mode")
    _check_joined(core, host)
    core.runtime(host["Runtime"])
    host["Runtime"] = host["Runtime"] or core.settings.default_runtime
    host["CgroupnsMode"] = host["CgroupnsMode"] or ("private" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "host")
    core.check_name(name)
    if not config["Image"]:
        raise InvalidArgument("config cannot be empty in order to create a container")
    image = await core.images.get(config["Image"])
    _check_platform(image, config["Image"], platform)
    merge(config, image)
    words = [*(config["Entrypoint"] or []), *(config["Cmd"] or [])]
    if not words or not words[0]:
        raise InvalidArgument("no command specified")
    container_id = secrets.token_hex(32)
    config["Hostname"] = config["Hostname"] or (container_id[:12] if host["NetworkMode"] != "host" else os.uname().nodename)
    points = _mount_points(core, config, host)
    container = Container({
        "id": container_id, "name": name, "created": times.now(), "config": config, "host": host, "path": words[0],
        "args": words[1:],
        "image_id": image.id, "image_name": config["Image"], "snapshotter": core.snapshots.snapshotter, "mounts": points,
        "fresh": True, "networks": networks, "machine": core.images.builtin.made_here(image.diff_ids),
    }, f"{core.directory}/containers/{container_id}")
    try:
        await _make(core, container, image)
    except BaseException:
        for point in points:
            if point.get("_anonymous"):
                core.volumes.remove(point["Name"])
        raise
    core.announce(container, "create")
    return container, warnings


def _mount_points(core: Core, config: dict[str, Any], host: dict[str, Any]) -> list[dict[str, Any]]:
    """All mount points by what was asked for; later kinds give way to earlier ones, as in dockerd. Makes the volumes."""
    points: dict[str, dict[str, Any]] = {}
    for source in host["VolumesFrom"] or []:
        name, _, mode = source.partition(":")
        if mode not in ("", "ro", "rw", "z", "Z"):
            raise InvalidArgument(f"invalid mode for volumes-from: {mode}")
        for point in core.get(name).mounts:
            points[point["Destination"]] = point | {"RW": point["RW"] and mode != "ro", "_from": True}
    asked: list[dict[str, Any]] = [volumes.parse_bind(text) for text in host["Binds"] or []]
    asked += [volumes.parse_mount(mount) for mount in host["Mounts"] or []]
    seen: set[str] = set()
    for point in asked:
        if point["Destination"] in seen or point["Destination"] in (host["Tmpfs"] or {}):
            raise InvalidArgument(f"Duplicate mount point: {point['Destination']}")
        seen.add(point["Destination"])
        points[point["Destination"]] = point
    for path in config["Volumes"] or {}:
        destination = os.path.normpath(path)
        if not destination.startswith("/") or destination == "/":
            raise InvalidArgument(f"invalid volume specification: '{path}'")
        if destination not in points and destination not in (host["Tmpfs"] or {}):
            points[destination] = volumes.parse_bind(destination)
    for point in points.values():
        if point["Type"] == "volume" and not point.get("_from"):
            anonymous = not point.get("Name")
            record = core.volumes.create(
                point.get("Name", ""), point.get("_driver", "local"), point.get("_options"), point.get("_labels"),
                anonymous=anonymous)
            point["Name"] = record["Name"]
            point["Source"] = core.volumes.path(record["Name"])
            point["_anonymous"] = anonymous
            if anonymous:
                point["Mode"] = ""
    ordered = ["Type", "Name", "Source", "Destination", "Driver", "Mode", "RW", "Propagation"]
    return [
        {key: point[key] for key in ordered if key in point} | {key: value for key, value in point.items() if key not in ordered}
        for point in points.values()
    ]


async def _make(core: Core, container: Container, image: Image) -> None:
    runtime, binary = core.runtime(container.host["Runtime"])
    made = containers.Container(
        id=container.id, image=container.image_name, snapshotter=container.snapshotter, snapshot_key=container.id,
        labels={LABEL: core.store.id}, spec=packed(SPEC_URL, b"{}"))
    made.runtime.name = runtime
    if runtime == RUNC_V2:
        options = runc_options.Options(binary_name=binary)
        made.runtime.options.CopyFrom(packed("containerd.runc.v1.Options", options.SerializeToString()))
    await core.containerd.containers.Create(containers.CreateContainerRequest(container=made), core.call)
    try:
        await core.snapshots.prepare(container.id, image, {LABEL: core.store.id})
        os.makedirs(container.directory, mode=0o710)
        await _fill_volumes(core, container)
        core.add(container)
    except OSError as error:
        await discard(core, container)
        raise from_os_error(error, "creating the container's directory") from None
    except BaseException:
        await asyncio.shield(discard(core, container))
        raise


async def _fill_volumes(core: Core, container: Container) -> None:
    """Empty volumes get what the image has at their place."""
    points = [point for point in container.mounts if point["Type"] == "volume" and point.get("_copy",
        True) and not point.get("_from")]
    for point in points:
        await core.volumes.mount(point["Name"])
    try:
        points = [point for point in points if not os.listdir(core.volumes.path(point["Name"]))]
        if not points:
            return
        mounts = await core.snapshots.mounts(container.id)

        def work() -> None:
            with Root(mounts, read_only=True) as root:
                for point in points:
                    volumes.populate(root, point["Destination"], core.volumes.path(point["Name"]))

        await asyncio.get_running_loop().run_in_executor(None, work)
    finally:
        core.release_volumes(container)


async def discard(core: Core, container: Container) -> None:
    """Take away what was made for a container, in the order that a next start can finish."""
    try:
        await core.containerd.containers.Delete(containers.DeleteContainerRequest(id=container.id), core.call)
    except NotFound:
        pass
    await core.snapshots.remove(container.id)
    sweep(container.directory, f"{core.stdio}/{container.id}")


def sweep(*folders: str) -> None:
    """Remove folders beside: nobody waits for the disk, and what a killed daemon leaves the next one finds."""

    def work() -> None:
        for folder in folders:
            if os.path.isdir(f"{folder}/parts"):
                umount_below(folder)  # else what is mounted there would be removed, and it is a volume's
            shutil.rmtree(folder, ignore_errors=True)

    asyncio.get_running_loop().run_in_executor(None, work)


async def remove(core: Core, container: Container, *, with_volumes: bool) -> None:
    """Remove a container that does not run. Its lock is held. Raises FailedPrecondition when that is under way already."""
    if container.state.removing:
        raise FailedPrecondition(f"removal of container {container.id} is already in progress")
    container.state.removing = True
    core.save(container)
    try:
        await discard(core, container)
    except BaseException:
        container.state.removing = False
        container.state.dead = True
        core.save(container)
        raise
    forget(core, container, with_volumes=with_volumes)


def forget(core: Core, container: Container, *, with_volumes: bool) -> None:
    """Forget a container, and its anonymous volumes when nobody else has them. Who waits for the removal learns of it."""
    core.forget(container)
    if container.streams is not None:
        container.streams.close()  # somebody attached, and it was never started
    if with_volumes:
        for point in container.mounts:
            name = point.get("Name", "")
            if point.get("_anonymous") and not core.used_by(name):
                try:
                    core.volumes.remove(name)
                except NotFound:
                    continue  # removed by hand
    core.announce(container, "destroy")
    container.wake(container.removed)


def init_program(core: Core) -> str:
    """The program that --init puts first: the one of the settings, or this package's own (src/native/reaper.c).

    Raises NotFound when there is none.
    """
    if not core.settings.init:
        return os.path.join(os.path.dirname(__file__), "docker-init")
    found = shutil.which(core.settings.init, path=f"/usr/libexec/docker:{DEFAULT_PATH}")
    if found is None:
        raise NotFound(f"the init program {core.settings.init} of the configuration is not there")
    return found
