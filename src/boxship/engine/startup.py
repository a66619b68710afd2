"""What is put together just before a container starts: its user, its namespaces, the files of its /etc, its mounts.

Runs in: the daemon.
Spec: dockerd's behaviour at ContainerStart; the specification itself is made by boxship.engine.spec.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from typing import Any

from boxship.abi import mount as m
from boxship.api.containerd.pb import tasks, types
from boxship.engine import devices, networking, spec, volumes
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.engine.create import init_program
from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, from_os_error
from boxship.linux import mounts as linux
from boxship.linux.roots import Root
from boxship.network import files
from boxship.oci import users

_ETC = ("resolv.conf", "hostname", "hosts")


class Accounts:
    """passwd and group of containers' roots; those of an image are read once."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._images: dict[str, dict[str, str]] = {}

    async def find(self, container: Container, wanted: str) -> users.User:
        """The user that `wanted` names in the container. Raises NotFound, InvalidArgument."""
        files = self._images.get(container.image_id) if container.fresh else None
        if files is None:
            files = await self._read(container)
            if container.fresh:
                self._images[container.image_id] = files
        user = users.find(wanted, lambda path: files.get(path, ""))
        for name in container.host["GroupAdd"] or []:
            number = int(name) if name.isdigit() else users.find(f"0:{name}", lambda path: files.get(path, "")).gid
            if number not in user.groups:
                user.groups.append(number)
        return user

    async def _read(self, container: Container) -> dict[str, str]:
        running = await running_root(self._core, container)
        mounts = await self._core.snapshots.mounts(container.id) if running is None else None

        def work() -> dict[str, str]:
            with running or Root(mounts, read_only=True) as root:
                return {path: root.read(path) for path in ("/etc/passwd", "/etc/group")}

        return await asyncio.get_running_loop().run_in_executor(None, work)


async def running_root(core: Core, container: Container) -> Root | None:
    """The root that a running container sees, its volumes included; None when it does not run.

    Its process may have ended, and its number may be another's, before the engine hears of it: so containerd is asked once the
    root is open. The shim is the parent, and a number is free for others only when the shim knows of the end.
    """
    pid = container.state.pid
    if not container.state.running or not pid:
        return None
    try:
        root = Root(path=f"/proc/{pid}/root")
    except NotFound:
        return None
    try:
        found = (await core.containerd.tasks.Get(tasks.GetRequest(container_id=container.id), core.call)).process
        if found.pid == pid and found.status in (types.RUNNING, types.PAUSED, types.PAUSING):
            return root
    except NotFound:
        pass
    except BaseException:
        root.close()
        raise
    root.close()
    return None


async def specification(core: Core, accounts: Accounts, container: Container) -> dict[str, Any]:
    """The container's config.json. Raises what dockerd refuses a start for."""
    config, host = container.config, container.host
    user = await accounts.find(container, config["User"])
    namespaces = _namespaces(core, container)
    for point in container.mounts:
        if point["Type"] == "volume":
            await core.volumes.mount(point["Name"])
    core.announce_volumes(container, "mount")
    hostname = config["Hostname"] if namespaces["uts"] is not None else os.uname().nodename
    mode = host["NetworkMode"]
    if mode.startswith("container:"):
        hostname = _joined(core, mode, "network").config["Hostname"]
    write_files(core, container, hostname)
    config = {**config, "Env": [*networking.link_environment(core, container), *(config["Env"] or [])]}
    inputs = spec.Inputs(
        uid=user.uid, gid=user.gid, groups=user.groups, home=user.home, mounts=await _mounts(core, container),
        namespaces=namespaces,
        hostname=hostname, cgroups_path=_cgroups_path(core, container),
        shm_path=_shared_memory(core, container),
        init=init_program(core) if host["Init"] and not host["PidMode"] else "", rootless=core.settings.rootless)
    made = spec.build(config, host, [container.path, *container.args], inputs)
    devices.add(made, host["DeviceRequests"] or [], core.settings.cdi_directories)
    return made


def _cgroups_path(core: Core, container: Container) -> str:
    """Rootless without a parent it is the runtime's choice, which forgives that a user may make no group."""
    parent = container.host["CgroupParent"]
    if not parent and core.settings.rootless:
        return ""
    return f"{parent or core.settings.cgroup_parent}/{container.id}"


def _joined(core: Core, mode: str, kind: str) -> Container:
    """The running container whose namespace is joined."""
    try:
        other = core.get(mode.removeprefix("container:"))
    except NotFound as error:
        raise NotFound(f"joining {kind} namespace of container: {error}") from None
    if not other.state.running or not other.state.pid:
        raise FailedPrecondition(
            f"cannot join {kind} namespace of a non running container: container {other.name} is not running")
    if other.state.restarting:
        raise FailedPrecondition(f"cannot join {kind} namespace of container: container {other.id} is restarting")
    return other


def _namespaces(core: Core, container: Container) -> dict[str, str | None]:
    host = container.host
    found: dict[str, str | None] = {"mount": "", "network": "", "uts": "", "pid": "", "ipc": ""}
    for kind, key, proc in (("network", "NetworkMode", "net"), ("pid", "PidMode", "pid"), ("ipc", "IpcMode", "ipc")):
        mode = host[key]
        if mode.startswith("container:"):
            found[kind] = f"/proc/{_joined(core, mode, kind).state.pid}/ns/{proc}"
        elif mode == "host":
            found[kind] = None
    if (sandbox := core.networks.sandbox(container.id)) is not None:
        found["network"] = sandbox.path
    if host["UTSMode"] == "host":
        found["uts"] = None
    if host["CgroupnsMode"] == "private":
        found["cgroup"] = ""
    if host["UsernsMode"] == "private":
        found["user"] = ""
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def write_files(core: Core, container: Container, hostname: str) -> None:
    """hosts, hostname and resolv.conf in the container's directory; anew when it is connected while it runs."""
    host = container.host
    mode = host["NetworkMode"]
    if mode.startswith("container:"):
        return
    sandbox = core.networks.sandbox(container.id)
    addresses, extra = networking.host_lines(core, container)
    for entry in host["ExtraHosts"] or []:
        name, separator, address = entry.partition("=" if "=" in entry else ":")
        if not separator or not address:
            raise InvalidArgument(f'bad format for add-host: "{entry}"')
        if address == "host-gateway":
            address = core.networks.host_gateway
            if not address:
                raise InvalidArgument("unable to derive the IP value for host-gateway")
        extra.append((address.strip("[]"), name))
    domain = container.config["Domainname"]
    names = f"{hostname}.{domain} {hostname}" if domain else hostname
    if mode == "host":
        hosts = files.hosts([], names, extra, base=_read("/etc/hosts"))
    else:
        hosts = files.hosts(addresses, names, extra)
    resolv = _read("/etc/resolv.conf")
    dns = (host["Dns"] or [], host["DnsSearch"] or [], host["DnsOptions"] or [])
    if sandbox is not None or any(dns):
        resolv = files.resolv(resolv, dns=dns[0], search=dns[1], options=dns[2],
            resolver=sandbox is not None and core.networks.resolves(sandbox), keep_local=sandbox is None,
            v6=sandbox is not None and any(each.ipv6 for each in sandbox.endpoints))
    for name, text in (("hosts", hosts), ("hostname", f"{hostname}\n"), ("resolv.conf", resolv)):
        # Written in place: a running container that shares it has the very file mounted.
        try:
            with open(container.file(name), "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
            os.chmod(container.file(name), 0o644)
        except OSError as error:
            raise from_os_error(error, "writing") from None


async def _mounts(core: Core, container: Container) -> list[dict[str, Any]]:
    host = container.host
    made: list[dict[str, Any]] = []
    try:
        if container.machine:
            root = await core.snapshots.mounts(container.id)
            made = core.images.builtin.mounts(root, container.file("machine"), read_only=host["ReadonlyRootfs"])
    except OSError as error:
        raise from_os_error(error, "making room for what the container writes") from None
    taken = {point["Destination"] for point in container.mounts}
    for path, options in (host["Tmpfs"] or {}).items():
        words = [word for word in str(options).split(",") if word]
        given = {word.partition("=")[0] for word in words}
        defaults = [word for word, other in (("noexec", "exec"), ("nosuid", "suid"), ("nodev", "dev")) if other not in given]
        made.append({"destination": os.path.normpath(path), "type": "tmpfs", "source": "tmpfs",
                     "options": [*dict.fromkeys([*defaults, "rprivate", *words])]})
    for point in container.mounts:
        made.append(volumes.as_spec(point, _source(core, container, point)))
    owner = container
    if host["NetworkMode"].startswith("container:"):
        owner = core.get(host["NetworkMode"][10:])
    for name in _ETC:
        if f"/etc/{name}" not in taken and os.path.exists(owner.file(name)):
            options = ["rbind", "rprivate", *(["ro"] if host["ReadonlyRootfs"] else [])]
            made.append({"destination": f"/etc/{name}", "type": "bind", "source": owner.file(name), "options": options})
    return made


def _source(core: Core, container: Container, point: dict[str, Any]) -> str:
    if point["Type"] == "volume":
        core.volumes.get(point["Name"])
        path = core.volumes.path(point["Name"])
        return _part(container, path, point) if point.get("_subpath") else path
    source = str(point["Source"])
    if point["Type"] == "bind" and point.get("_create") and not os.path.lexists(source):
        try:
            os.makedirs(source, mode=0o755)
        except OSError as error:
            raise from_os_error(error, f"error while creating mount source path '{source}'") from None
    _check_shared(source, str(point.get("Propagation") or ""))
    return source


def _check_shared(source: str, propagation: str) -> None:
    """Raise InvalidArgument when mounts cannot propagate as asked for, because of the mount that the source lies on."""
    wanted = {"shared": ("shared:",), "slave": ("shared:", "master:")}.get(propagation.removeprefix("r"))
    if wanted is None:
        return
    real = os.path.realpath(source)
    best, fields = "", [b""]
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            words = line.partition(b" - ")[0].split(b" ")
            point = os.fsdecode(words[4].decode("unicode_escape").encode("latin-1"))
            if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                best, fields = point, words[6:]
    if not any(field.decode().startswith(wanted) for field in fields):
        kind = "shared" if len(wanted) == 1 else "shared or slave"
        raise InvalidArgument(f"path {source} is mounted on {best} but it is not a {kind} mount")


def _part(container: Container, volume: str, point: dict[str, Any]) -> str:
    """A part of a volume, mounted in the container's directory: what another container does to the volume's links meanwhile
    cannot lead the runtime elsewhere. Raises NotFound, InvalidArgument."""
    part = str(point["_subpath"])
    try:
        with Root(path=volume) as root:
            fd = root.open_beneath(part)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ELOOP):
            raise InvalidArgument(f"subpath {part} leads out of the volume") from None
        raise NotFound(f"cannot access path {volume}/{part}: {(error.strerror or '').lower()}") from None
    place = container.file(f"parts/{hashlib.sha256(point['Destination'].encode()).hexdigest()[:16]}")
    try:
        volumes.unmount(place)
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.makedirs(place, exist_ok=True)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        tree = linux.open_tree(fd, "", m.OPEN_TREE_CLONE | m.AT_EMPTY_PATH)
        try:
            linux.move_mount(tree, m.AT_FDCWD, place)
        finally:
            os.close(tree)
    except OSError as error:
        raise from_os_error(error, f"mounting {part}") from None
    finally:
        os.close(fd)
    return place


def _shared_memory(core: Core, container: Container) -> str:
    """The host's directory of a /dev/shm that is shared; "" when the container has one for itself."""
    mode = container.host["IpcMode"]
    if mode == "host":
        return "/dev/shm"
    if mode.startswith("container:"):
        other = _joined(core, mode, "IPC")
        if other.host["IpcMode"] not in ("shareable", "host"):
            raise FailedPrecondition(
                f"cannot join IPC namespace of container {other.name}: non-shareable IPC (hint: use IpcMode:shareable for the"
                " donor container)")
        return "/dev/shm" if other.host["IpcMode"] == "host" else other.file("shm")
    if mode != "shareable":
        return ""
    path = container.file("shm")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if not container.shm_mounted and not os.path.ismount(path):
            linux.mount("shm", path, "tmpfs", m.MS_NOSUID | m.MS_NOEXEC | m.MS_NODEV,
                f"mode=1777,size={container.host['ShmSize']}")
        container.shm_mounted = True
    except OSError as error:
        raise from_os_error(error, "mounting the shared memory") from None
    return path


def release(core: Core, container: Container) -> None:
    """Unmount what was mounted for a container that does not run any more, by this daemon or a former one."""
    if container.host["IpcMode"] == "shareable":
        volumes.unmount(container.file("shm"))
    container.shm_mounted = False
    if os.path.isdir(parts := container.file("parts")):
        for name in os.listdir(parts):
            volumes.unmount(f"{parts}/{name}")
    core.release_volumes(container)
    core.announce_volumes(container, "unmount")
