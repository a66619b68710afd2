"""Everything that is about the engine itself, and volumes.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.51, System, Volume.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from aiohttp import web

import boxship
from boxship.engine import shapes, show, times
from boxship.engine.devices import known
from boxship.engine.events import event_filters, labelled, parse_filters, truth
from boxship.engine.http import API_MIN_VERSION, API_VERSION, VERSION, Routes, Stream, answer, body_of, encoded, flag, nothing
from boxship.engine.logs import DRIVERS
from boxship.engine.volumes import size_of
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound, Unavailable, Unsupported
from boxship.network.model import DRIVERS as NETWORK_DRIVERS

routes = Routes()

_USAGE = ("container", "image", "volume", "build-cache")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


# system


@routes.get("/_ping")
@routes.add("HEAD", "/_ping")
async def ping(engine: Any, request: web.Request) -> web.StreamResponse:
    return web.Response(text="OK", headers={
        "Builder-Version": "1", "Swarm": "inactive", "Cache-Control": "no-cache, no-store, must-revalidate",
        "Pragma": "no-cache"})


@routes.get("/version")
async def version(engine: Any, request: web.Request) -> web.StreamResponse:
    name = os.uname()
    architecture = _ARCHITECTURES.get(name.machine, name.machine)
    try:
        below = await engine.core.containerd.version.Version(_empty(), engine.core.call)
        containerd, revision = below.version, below.revision
    except BoxshipError:
        containerd, revision = "unknown", ""
    built = "1970-01-01T00:00:00.000000000+00:00"
    return answer({
        "Platform": {"Name": "boxship"},
        "Components": [
            {"Name": "Engine", "Version": boxship.__version__, "Details": {
                "ApiVersion": API_VERSION, "Arch": architecture, "BuildTime": built, "Experimental": "false", "GitCommit": "",
                "GoVersion": "", "KernelVersion": name.release, "MinAPIVersion": API_MIN_VERSION, "Os": "linux"}},
            {"Name": "containerd", "Version": containerd, "Details": {"GitCommit": revision}},
        ],
        "Version": boxship.__version__, "ApiVersion": API_VERSION, "MinAPIVersion": API_MIN_VERSION, "GitCommit": "",
        "GoVersion": "",
        "Os": "linux", "Arch": architecture, "KernelVersion": name.release, "BuildTime": built,
    })


def _empty() -> Any:
    from google.protobuf.empty_pb2 import Empty

    return Empty()


def _release() -> tuple[str, str]:
    """(pretty name, version) of the distribution."""
    found = {}
    try:
        with open("/etc/os-release", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.strip().partition("=")
                found[key] = value.strip('"')
    except OSError:
        pass
    return found.get("PRETTY_NAME", "Linux"), found.get("VERSION_ID", "")


def _memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


@routes.get("/info")
async def info(engine: Any, request: web.Request) -> web.StreamResponse:
    core = engine.core
    states = [each.state for each in core.containers()]
    paused = sum(state.running and state.paused for state in states)
    running = sum(state.running for state in states) - paused
    pretty, release = _release()
    unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
    name = os.uname()
    v1 = {each: unified or os.path.isdir(f"/sys/fs/cgroup/{each}") for each in ("memory", "cpu", "cpuset", "pids")}
    warnings: list[str] = []
    devices: list[str] = []
    try:
        devices = sorted(known(core.settings.cdi_directories))
    except BoxshipError as error:
        warnings.append(f"WARNING: {error}")
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as file:
        forwarding = file.read().strip() == "1"
    return answer({
        "ID": core.store.id, "Containers": len(states), "ContainersRunning": running, "ContainersPaused": paused,
        "ContainersStopped": len(states) - running - paused, "Images": len(await core.images.all()),
        "Driver": core.snapshots.snapshotter,
        "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
        "Plugins": {"Volume": ["local"], "Network": list(NETWORK_DRIVERS), "Authorization": None, "Log": list(DRIVERS)},
        "MemoryLimit": v1["memory"], "SwapLimit": v1["memory"], "CpuCfsPeriod": v1["cpu"], "CpuCfsQuota": v1["cpu"],
        "CPUShares": v1["cpu"], "CPUSet": v1["cpuset"], "PidsLimit": v1["pids"], "IPv4Forwarding": forwarding, "Debug": False,
        "NFd": len(os.listdir("/proc/self/fd")), "OomKillDisable": not unified, "NGoroutines": len(asyncio.all_tasks()),
        "SystemTime": times.now(), "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs",
        "CgroupVersion": "2" if unified else "1",
        "NEventsListener": core.events.listeners, "KernelVersion": name.release, "OperatingSystem": pretty, "OSVersion": release,
        "OSType": "linux", "Architecture": name.machine, "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "IndexConfigs": {
                "docker.io": {"Mirrors": list(core.settings.mirrors), "Name": "docker.io", "Official": True, "Secure": True},
                **{host: {"Mirrors": [], "Name": host, "Official": False,
                "Secure": False} for host in core.settings.insecure_registries}},
            "InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8"], "Mirrors": list(core.settings.mirrors) or None},
        "NCPU": os.cpu_count() or 1, "MemTotal": _memory(), "GenericResources": None, "DockerRootDir": core.root, "HttpProxy": "",
        "HttpsProxy": "", "NoProxy": "", "Name": name.nodename, "Labels": [], "ExperimentalBuild": False,
        "ServerVersion": boxship.__version__,
        "Runtimes": {key: {"path": binary or key} for key, (_, binary) in core.settings.runtimes.items()},
        "DefaultRuntime": core.settings.default_runtime,
        "Swarm": {"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "",
        "RemoteManagers": None},
        "LiveRestoreEnabled": True, "Isolation": "", "InitBinary": "docker-init", "ContainerdCommit": {"ID": ""},
        "RuncCommit": {"ID": ""}, "InitCommit": {"ID": ""},
        "SecurityOptions": ["name=seccomp,profile=builtin", *(["name=rootless"] if core.settings.rootless else [])],
        "CDISpecDirs": list(core.settings.cdi_directories),
        **({"DiscoveredDevices": [{"Source": "cdi", "ID": name} for name in devices]} if devices else {}),
        "Containerd": {"Address": core.settings.address, "Namespaces": {"Containers": core.settings.namespace, "Plugins": ""}},
        "Warnings": warnings or None,
    })


@routes.get("/events")
async def events(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = event_filters(request.query.get("filters", ""))
    since, until = times.moment(request.query.get("since", "")), times.moment(request.query.get("until", ""))
    if since and until and since > until:
        raise InvalidArgument(
            f"`since` time ({request.query['since']}) cannot be after `until` time ({request.query['until']})")
    stream = Stream(request, "application/json")
    await stream.begin()
    async for event in engine.core.events.listen(since, until, filters):
        await stream.send(encoded(event, html=True))
    return await stream.end()


@routes.post("/auth")
async def auth(engine: Any, request: web.Request) -> web.StreamResponse:
    config = shapes.shape(await body_of(request), shapes.AUTH_CONFIG, "AuthConfig")
    return answer(await engine.transfers.login(config))


@routes.get("/system/df")
async def usage(engine: Any, request: web.Request) -> web.StreamResponse:
    core = engine.core
    asked = request.query.getall("type", []) or list(_USAGE)
    for kind in asked:
        if kind not in _USAGE:
            raise InvalidArgument(f"unknown object type: {kind}")
    found: dict[str, Any] = {"LayersSize": 0}
    found |= {"Images": None, "Containers": None, "Volumes": None, "BuildCache": None}
    if "image" in asked:
        used = core.image_users()
        everything = (await core.images.all()).values()
        found["Images"] = [
            await core.images.summary(image, records, used.get(image.id, 0), shared=0) for image, records in everything]
        found["LayersSize"] = sum({image.chain: await core.images.size(image) for image, _ in everything}.values())
    if "container" in asked:
        found["Containers"] = await show.listed(core, {}, everything=True, limit=0, with_size=True)
    if "volume" in asked:
        found["Volumes"] = await _volume_rows(engine, with_usage=True)
    if "build-cache" in asked:
        found["BuildCache"] = await engine.builds.usage()
    return answer(found)


# volumes


async def _volume_rows(engine: Any, *, with_usage: bool) -> list[dict[str, Any]]:
    core = engine.core
    rows = core.volumes.all()
    for row in rows if with_usage else ():
        size = await asyncio.get_running_loop().run_in_executor(None, size_of, core.volumes.path(row["Name"]))
        row["UsageData"] = {"RefCount": len(core.used_by(row["Name"])), "Size": size}
    return rows  # type: ignore[no-any-return]


@routes.get("/volumes")
async def list_volumes(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), frozenset(("dangling", "driver", "label", "name")))
    rows = await _volume_rows(engine, with_usage=False)
    if "name" in filters:
        rows = [row for row in rows if any(text in row["Name"] for text in filters["name"])]
    if "driver" in filters:
        rows = [row for row in rows if row["Driver"] in filters["driver"]]
    if "label" in filters:
        rows = [row for row in rows if labelled(row["Labels"] or {}, filters["label"])]
    if "dangling" in filters:
        wanted = truth(filters, "dangling", default=False)
        rows = [row for row in rows if wanted != bool(engine.core.used_by(row["Name"]))]
    return answer({"Volumes": rows, "Warnings": None})


@routes.post("/volumes/create")
async def create_volume(engine: Any, request: web.Request) -> web.StreamResponse:
    body = shapes.shape(await body_of(request), shapes.VOLUME_CREATE, "VolumeCreateRequest")
    volumes = engine.core.volumes
    record = volumes.create(body["Name"], body["Driver"], body["DriverOpts"], body["Labels"])
    return answer(volumes.shown(record), 201)


@routes.post("/volumes/prune")
async def prune_volumes(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), frozenset(("label", "label!", "all")))
    everything = request[VERSION] < (1, 42) or truth(filters, "all", default=False)
    deleted, space = [], 0
    core = engine.core
    for row in core.volumes.all():
        name = row["Name"]
        record = core.volumes.get(name)
        if core.used_by(name) or not (everything or record.get("Anonymous")):
            continue
        labels = row["Labels"] or {}
        if not labelled(labels, filters.get("label", [])) or any(labelled(labels, [text]) for text in filters.get("label!", [])):
            continue
        space += await asyncio.get_running_loop().run_in_executor(None, size_of, core.volumes.path(name))
        core.volumes.remove(name)
        deleted.append(name)
    core.events.publish("volume", "prune", "", {"reclaimed": str(space)})
    return answer({"VolumesDeleted": deleted or None, "SpaceReclaimed": space})


@routes.get("/volumes/{name}")
async def inspect_volume(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    return answer(engine.core.volumes.shown(engine.core.volumes.get(name)))


@routes.delete("/volumes/{name}")
async def remove_volume(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    core = engine.core
    try:
        core.volumes.get(name)
    except NotFound:
        if flag(request, "force"):
            return nothing()
        raise
    if users := core.used_by(name):
        raise FailedPrecondition(f"remove {name}: volume is in use - [{', '.join(each.id for each in users)}]")
    core.volumes.remove(name)
    return nothing()


# what a daemon says that is in no swarm and has no plugins


def _swarm(path: str) -> None:
    async def refuse(engine: Any, request: web.Request, **_: str) -> web.StreamResponse:
        raise Unavailable(
            'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node'
            " to swarm and try again.")

    for method in ("GET", "POST", "DELETE"):
        routes.add(method, path)(refuse)
        routes.add(method, f"{path}/{{rest}}")(refuse)


@routes.post("/swarm/init")
@routes.post("/swarm/join")
async def no_swarm(engine: Any, request: web.Request) -> web.StreamResponse:
    raise Unsupported("swarms of engines", "for containers on many machines there is Kubernetes, through CRI")


@routes.post("/swarm/leave")
async def leave_swarm(engine: Any, request: web.Request) -> web.StreamResponse:
    raise Unavailable("This node is not part of a swarm")


for _path in ("/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"):
    _swarm(_path)


@routes.get("/plugins")
async def list_plugins(engine: Any, request: web.Request) -> web.StreamResponse:
    return answer([])


@routes.post("/plugins/pull")
@routes.post("/plugins/create")
@routes.get("/plugins/privileges")
async def no_plugins(engine: Any, request: web.Request) -> web.StreamResponse:
    raise Unsupported("plugins", "volumes are of the driver local, networks of the drivers that `docker info` lists")


@routes.get("/plugins/{name}/json")
@routes.delete("/plugins/{name}")
@routes.post("/plugins/{name}/enable")
@routes.post("/plugins/{name}/disable")
@routes.post("/plugins/{name}/set")
@routes.post("/plugins/{name}/upgrade")
@routes.post("/plugins/{name}/push")
async def no_plugin(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    raise NotFound(f'plugin "{name}" not found')


