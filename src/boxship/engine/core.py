"""What the parts of the engine share: the way to containerd, the engine's own records, and its settings.

Runs in: the daemon, on its event loop.

    ROOT/engine/            engine.db, containers/ID/{hosts,hostname,resolv.conf,ID-json.log}, volumes/NAME/_data
    STATE/engine/           stdio/ID/…: the FIFOs
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from boxship.api.containerd.call import Call
from boxship.api.containerd.services import Containerd
from boxship.engine.container import Container
from boxship.engine.events import Events
from boxship.engine.images import Image, Images
from boxship.engine.rootfs import Snapshots
from boxship.engine.store import Store
from boxship.engine.volumes import Volumes
from boxship.images.builtin.provide import Builtins
from boxship.images.transfer import Images as Mover
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from boxship.network import Network, Networks
from boxship.network import Settings as NetworkSettings
from boxship.oci.cdi import CDI_DIRECTORIES

LABEL = "boxship.engine"
"""On containerd's containers: the id of the engine that made them."""

RUNC_V2 = "io.containerd.runc.v2"


class Settings(NamedTuple):
    """What a configuration may change."""

    namespace: str = "moby"
    """containerd's namespace; dockerd's own, so that `ctr -n moby` shows what it shows there."""
    snapshotter: str = ""
    """"" for containerd's default."""
    runtimes: dict[str, tuple[str, str]] = {  # a NamedTuple's default is never changed
        "boxrun": (RUNC_V2, ""), "runc": (RUNC_V2, "runc"), "crun": (RUNC_V2, "crun"),
    }
    """By the name that `--runtime` takes: containerd's runtime and its binary_name."""
    default_runtime: str = "boxrun"
    cgroup_parent: str = "/boxship"
    init: str = ""
    """Name or path of the program that --init puts first; "" for our own."""
    cdi_directories: tuple[str, ...] = CDI_DIRECTORIES
    """Where vendors' descriptions of devices lie."""
    address: str = ""
    """Where containerd is, for `docker info`."""
    mirrors: tuple[str, ...] = ()
    insecure_registries: tuple[str, ...] = ()
    network: NetworkSettings = NetworkSettings(bridge="none")
    rootless: bool = False
    """Whether the daemon is root of a user's namespaces only: groups and limits are then what that user was given."""


class Core:
    """The shared state. Containers are found by `get`."""

    def __init__(self, containerd: Containerd, root: str, state: str, settings: Settings, mover: Mover, snapshotter: str) -> None:
        self.containerd = containerd
        self.settings = settings
        self.root = root
        self.directory = f"{root}/engine"
        self.stdio = f"{state}/engine/stdio"
        os.makedirs(self.stdio, mode=0o700, exist_ok=True)
        self.call = Call(settings.namespace)
        self.store = Store(self.directory)
        self.events = Events()
        self.snapshots = Snapshots(containerd, self.call, snapshotter, mover)
        self.images = Images(containerd, self.call, self.snapshots, Builtins(containerd, f"{root}/builtin"))
        self.volumes = Volumes(self.store, f"{self.directory}/volumes", self.events)
        self.networks = Networks(root, state, settings.network, self.store.id, self._network_event)
        self.by_id: dict[str, Container] = {}
        self._names: dict[str, str] = {}

    def _network_event(self, action: str, network: Network) -> None:
        self.events.publish("network", action, network.id, {"name": network.name, "type": network.driver})

    # containers by name

    def add(self, container: Container) -> None:
        """Take a container in. Raises FailedPrecondition when its name is taken."""
        self.check_name(container.name)
        try:
            self.store.put_container(container.id, container.name, container.record())
        except AlreadyExists:
            raise self._taken(container.name, "") from None
        self.by_id[container.id] = container
        self._names[container.name] = container.id

    def restore(self, container: Container) -> None:
        """Take in one that the store has."""
        self.by_id[container.id] = container
        self._names[container.name] = container.id

    def check_name(self, name: str) -> None:
        """Raise FailedPrecondition when the name is taken."""
        if name in self._names:
            raise self._taken(name, self._names[name])

    @staticmethod
    def _taken(name: str, owner: str) -> FailedPrecondition:
        return FailedPrecondition(
            f'Conflict. The container name "/{name}" is already in use by container "{owner}". You have to remove (or rename)'
            " that container to be able to reuse that name.")

    def rename(self, container: Container, name: str) -> None:
        """Give it another name. Raises FailedPrecondition."""
        self.check_name(name)
        former, container.name = container.name, name
        self.store.put_container(container.id, name, container.record())
        del self._names[former]
        self._names[name] = container.id
        self.networks.rename(container.id, former, name)

    def save(self, container: Container) -> None:
        """Write a container's record."""
        if container.id in self.by_id:
            self.store.put_container(container.id, container.name, container.record())

    def forget(self, container: Container) -> None:
        """A container that is gone."""
        self.store.delete_container(container.id)
        self.by_id.pop(container.id, None)
        if self._names.get(container.name) == container.id:
            del self._names[container.name]

    def get(self, name: str) -> Container:
        """By full id, name, or beginning of an id. Raises NotFound, InvalidArgument."""
        name = name.removeprefix("/")
        if (found := self.by_id.get(name)) is not None:
            return found
        if name in self._names:
            return self.by_id[self._names[name]]
        matches = [each for key, each in self.by_id.items() if key.startswith(name)] if name else []
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InvalidArgument(f"Multiple IDs found with provided prefix: {name}")
        raise NotFound(f"No such container: {name}")

    def containers(self) -> Iterable[Container]:
        """All of them."""
        return list(self.by_id.values())

    def announce(self, container: Container, action: str, **more: str) -> None:
        """An event of a container."""
        self.events.publish("container", action, container.id, container.attributes(**more))

    def runtime(self, name: str) -> tuple[str, str]:
        """(containerd's runtime, its binary_name) for a name that --runtime takes. Raises InvalidArgument."""
        name = name or self.settings.default_runtime
        if (found := self.settings.runtimes.get(name)) is not None:
            return found
        if "." in name and not name.startswith(".") and "/" not in name:
            return name, ""
        raise InvalidArgument(f"unknown or invalid runtime name: {name}")

    def announce_image(self, action: str, image: Image, name: str = "") -> None:
        """An event of an image, with its labels."""
        labels = image.container_config.get("Labels") or {}
        self.events.publish("image", action, image.id, {**labels, "name": name or image.id})

    def announce_volumes(self, container: Container, action: str) -> None:
        """The events of a container's volumes, `mount` and `unmount`."""
        for point in container.mounts:
            if point["Type"] == "volume":
                more = {} if action == "unmount" else {
                    "destination": point["Destination"], "propagation": point["Propagation"],
                    "read/write": "true" if point["RW"] else "false"}
                self.events.publish("volume", action, point["Name"], {"driver": "local", "container": container.id, **more})

    def used_by(self, volume: str) -> list[Container]:
        """The containers that have the volume."""
        return [each for each in self.containers() if any(point.get("Name") == volume for point in each.mounts)]

    def release_volumes(self, container: Container) -> None:
        """Unmount the volumes of a container that does not run, but for those of others that do."""
        for point in container.mounts:
            name = point.get("Name", "")
            if name and not any(each.state.running or each.lock.locked() for each in self.used_by(name) if each is not container):
                self.volumes.release(name)

    def image_users(self) -> dict[str, int]:
        """Number of containers by image id."""
        count: dict[str, int] = {}
        for each in self.containers():
            count[each.image_id] = count.get(each.image_id, 0) + 1
        return count


def packed(type_url: str, value: bytes) -> Any:
    """A protobuf Any."""
    from google.protobuf.any_pb2 import Any as AnyMessage

    return AnyMessage(type_url=type_url, value=value)
