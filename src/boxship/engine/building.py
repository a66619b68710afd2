"""The engine's part in building: it runs the containers of RUN steps.

Runs in: the daemon, on its event loop.
Spec: what dockerd gives a container that is made without options, and what the parameters of `POST /build` change of it.

A step's container is no container of the engine: it is in no list, has no log and no name. It has the engine's label at
containerd's, so that what a killed daemon leaves of it is taken away at the next start, with everything in its directory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from functools import partial
from typing import Any, NamedTuple

from boxship.api.containerd.pb import containers, runc_options, tasks
from boxship.build.layers import drop_untouched, in_thread, remove_stubs, upper_directory
from boxship.build.running import Output, Work
from boxship.build.tree import RootTree, normal, resolve
from boxship.engine import shapes, spec
from boxship.engine.core import LABEL, RUNC_V2, Core, packed
from boxship.engine.create import SPEC_URL
from boxship.engine.stdio import STDERR, STDOUT, Streams, Subscriber
from boxship.kit.errors import BoxshipError, DeadlineExceeded, InvalidArgument, NotFound, Unsupported, from_os_error
from boxship.linux.roots import Root
from boxship.network import Attachment, Sandbox, files
from boxship.network.manager import Subject
from boxship.oci import users
from boxship.oci.text import dumps

_HOSTNAME = "buildkitsandbox"
"""What programs that ask for it find in builds elsewhere."""


class _Before(NamedTuple):
    """What the root is like before a runtime makes places to mount on."""

    stubs: list[str]
    """Paths that are not there, with the directories above them."""
    folders: dict[str, tuple[int, int, int, int]]
    """The directories that they are made in: (mode, uid, gid, mtime)."""


class StepRunner:
    """Runs steps' containers (boxship.build.running.Runner)."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def run(self, work: Work, mounts: list[Any], output: Output) -> int:
        """See Runner."""
        core = self._core
        directory = f"{core.stdio}/{work.key}"
        streams = Streams(directory)
        attached = streams.subscribe(frozenset((STDOUT, STDERR)))
        shown: asyncio.Task[None] | None = None
        upper = upper_directory(mounts)
        before: _Before | None = None
        sandbox: Sandbox | None = None
        try:
            streams.create()
            sandbox = await self._connected(work)
            config, inputs, before = await in_thread(lambda: self._specification(work, mounts, directory, sandbox))
            await self._create(work, spec.build(config[0], config[1], list(work.args), inputs))
            try:
                streams.open()
                shown = asyncio.ensure_future(_passed_on(attached, output))
                code = await self._task(work, mounts, streams)
                await shown
                return code
            finally:
                await asyncio.shield(self._delete(work.key))
        finally:
            if shown is not None:
                shown.cancel()
            self._core.networks.release(work.key)
            streams.close()
            shutil.rmtree(directory, ignore_errors=True)
            if upper and before is not None:
                await in_thread(partial(_clean, upper, before))

    async def _connected(self, work: Work) -> Sandbox | None:
        """The step's place on its network; None for none and the host's. Raises what a container's start is refused for."""
        networks = self._core.networks
        mode = networks.default_mode if work.network in ("default", "") else work.network
        if mode in ("none", "host"):
            return None
        if mode.startswith("container:"):
            raise Unsupported(f"the network {mode} for a step", "use default, none, host, or a network by name")
        sandbox = await networks.prepare(Subject(work.key, work.key[:12], _HOSTNAME, []), [Attachment(mode)])
        await networks.realize(sandbox)
        return sandbox

    def _specification(
        self, work: Work, mounts: list[Any], directory: str, sandbox: Sandbox | None,
    ) -> tuple[Any, spec.Inputs, _Before]:
        core = self._core
        limits = work.limits
        config = shapes.shape({"Env": list(work.env), "WorkingDir": work.cwd}, shapes.CONTAINER_CONFIG, "Config")
        host = shapes.shape({
            "Privileged": work.insecure, "Memory": limits.memory, "MemorySwap": limits.memory_swap,
            "CpuShares": limits.cpu_shares, "CpuQuota": limits.cpu_quota, "CpuPeriod": limits.cpu_period,
            "CpusetCpus": limits.cpuset_cpus, "CpusetMems": limits.cpuset_mems, "ShmSize": limits.shm_size,
            "PidsLimit": limits.pids or None, "Ulimits": list(limits.ulimits),
        }, shapes.HOST_CONFIG, "HostConfig")
        namespaces: dict[str, str | None] = {"mount": "", "network": "", "uts": "", "pid": "", "ipc": ""}
        if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
            namespaces["cgroup"] = ""
        if work.network == "host":
            namespaces["network"] = None
        elif sandbox is not None:
            namespaces["network"] = sandbox.path
        etc = self._etc(directory, work, sandbox)
        if core.images.builtin.made_here(work.below):
            try:
                etc[:0] = core.images.builtin.mounts(mounts, f"{directory}/machine", read_only=False)
            except OSError as error:
                raise from_os_error(error, "making room for what the step writes") from None
        with Root(mounts, read_only=True) as root:
            user = users.find(work.user, root.read)
            inputs = spec.Inputs(
                uid=user.uid, gid=user.gid, groups=user.groups, home=user.home, mounts=[*etc, *work.mounts],
                namespaces=namespaces, hostname=_HOSTNAME,
                cgroups_path=f"{limits.cgroup_parent or core.settings.cgroup_parent}/{work.key}", shm_path="", init="")
            wanted = spec.build(config, host, list(work.args), inputs)
            before = _look(root, [each["destination"] for each in wanted["mounts"]])
        return (config, host), inputs, before

    def _etc(self, directory: str, work: Work, sandbox: Sandbox | None) -> list[dict[str, Any]]:
        """hosts and resolv.conf in the step's directory, and their mounts."""
        networks = self._core.networks
        extra = []
        for entry in work.hosts:
            name, separator, address = entry.partition("=" if "=" in entry else ":")
            if address == "host-gateway":
                address = networks.host_gateway
            if not separator or not name or not address:
                raise InvalidArgument(f'bad format for add-host: "{entry}"')
            extra.append((address.strip("[]"), name))
        own = [address for each in sandbox.endpoints for address in (each.ipv4, each.ipv6) if address] if sandbox else []
        if work.network == "host":
            hosts = files.hosts([], _HOSTNAME, extra, base=_read("/etc/hosts"))
        else:
            hosts = files.hosts(own, _HOSTNAME, extra)
        resolv = _read("/etc/resolv.conf")
        if sandbox is not None:
            resolv = files.resolv(
                resolv, resolver=networks.resolves(sandbox), keep_local=False, v6=any(each.ipv6 for each in sandbox.endpoints))
        made = []
        for name, text in (("hosts", hosts), ("resolv.conf", resolv)):
            path = f"{directory}/{name}"
            try:
                with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(text)
                os.chmod(path, 0o644)
            except OSError as error:
                raise from_os_error(error, "writing") from None
            made.append({"destination": f"/etc/{name}", "type": "bind", "source": path, "options": ["rbind", "rprivate"]})
        return made

    async def _create(self, work: Work, document: dict[str, Any]) -> None:
        core = self._core
        runtime, binary = core.runtime("")
        made = containers.Container(
            id=work.key, snapshotter=core.snapshots.snapshotter, snapshot_key=work.key, labels={LABEL: core.store.id},
            spec=packed(SPEC_URL, dumps(document).encode()))
        made.runtime.name = runtime
        if runtime == RUNC_V2:
            options = runc_options.Options(binary_name=binary)
            made.runtime.options.CopyFrom(packed("containerd.runc.v1.Options", options.SerializeToString()))
        await core.containerd.containers.Create(containers.CreateContainerRequest(container=made), core.call)

    async def _task(self, work: Work, mounts: list[Any], streams: Streams) -> int:
        service, call = self._core.containerd.tasks, self._core.call
        await service.Create(tasks.CreateTaskRequest(
            container_id=work.key, rootfs=mounts, stdout=streams.stdout, stderr=streams.stderr), call)
        try:
            await service.Start(tasks.StartRequest(container_id=work.key), call)
            limit = work.limits.seconds or None
            try:
                ended = await asyncio.wait_for(service.Wait(tasks.WaitRequest(container_id=work.key), call), limit)
            except TimeoutError:
                raise DeadlineExceeded(f"the step took longer than {limit:g} seconds") from None
            return int(ended.exit_status)
        finally:
            await asyncio.shield(self._end(work.key))

    async def _end(self, key: str) -> None:
        service, call = self._core.containerd.tasks, self._core.call
        try:
            await service.Delete(tasks.DeleteTaskRequest(container_id=key), call)
        except BoxshipError:
            try:
                await service.Kill(tasks.KillRequest(container_id=key, signal=9, all=True), call)
                await asyncio.wait_for(service.Wait(tasks.WaitRequest(container_id=key), call), 10)
                await service.Delete(tasks.DeleteTaskRequest(container_id=key), call)
            except (BoxshipError, TimeoutError):
                return  # there is none, or the next start of the engine ends it

    async def _delete(self, key: str) -> None:
        try:
            await self._core.containerd.containers.Delete(containers.DeleteContainerRequest(id=key), self._core.call)
        except NotFound:
            pass


async def _passed_on(attached: Subscriber, output: Output) -> None:
    """All that the step writes, to its end, which comes with that of its last process."""
    while (piece := await attached.get()) is not None:
        await output(*piece)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def _look(root: Root, destinations: list[str]) -> _Before:
    """Which of the places to mount on are missing."""
    tree = RootTree(root)
    stubs: list[str] = []
    folders: dict[str, tuple[int, int, int, int]] = {}
    below: list[str] = []
    for destination in sorted(map(normal, destinations)):
        if any(destination.startswith(f"{each}/") for each in below):
            continue  # in what is mounted there, not in the root
        below.append(destination)
        path = resolve(tree, destination)
        missing = tree.node(path) is None
        while path:
            above = path.rpartition("/")[0]
            node = tree.node(path)
            if node is None:
                if path not in stubs:
                    stubs.append(path)
            elif missing and path not in folders and node.is_dir:
                folders[path] = (node.mode | stat.S_IFDIR, node.uid, node.gid, node.mtime)
            path = above
    return _Before(stubs, folders)


def _clean(upper: str, before: _Before) -> None:
    """Undo what was made to mount on."""
    remove_stubs(upper, before.stubs)
    for path in sorted(before.folders, key=lambda each: -each.count("/")):
        drop_untouched(upper, path, before.folders[path])
