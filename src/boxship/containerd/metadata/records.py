"""Containers, images, sandboxes: records that are one protobuf message each, with labels and two times.

Runs in: the daemon, on its event loop; a request takes well below a millisecond.
Spec: containerd API, services containers.v1, images.v1, sandbox.v1 (Store); core/metadata (what is checked and what may change).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call, check_identifier
from boxship.containerd.events import Exchange
from boxship.containerd.filters import parse_all
from boxship.containerd.metadata.database import Database, Labels, now
from boxship.containerd.namespaces import check_labels
from boxship.kit.errors import AlreadyExists, InvalidArgument, NotFound
from boxship.oci import digest as digests

Collect = Callable[[], Awaitable[None]]
"""Collects garbage and returns when all that is garbage now is gone."""
EXPIRE = "containerd.io/gc.expire"


def label_field(labels: Any, path: list[str]) -> str | None:
    """What a filter sees at `labels.KEY`, where the key may have dots of its own."""
    found: str | None = labels.get(".".join(path[1:]))
    return found


def changed_labels(known: Labels, given: Mapping[str, str], paths: Iterable[str], what: str) -> Labels:
    """Labels after an update by the field mask `paths` (empty: all of them). Raises InvalidArgument."""
    made = dict(known)
    for path in list(paths) or ["labels"]:
        if path == "labels":
            made = dict(given)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            made[key] = given.get(key, "")
        else:
            raise InvalidArgument(f'cannot update "{path}" field on {what}: invalid argument')
    made = {key: value for key, value in made.items() if value}
    check_labels(made)
    return made


class _Records:
    """The rows of one kind."""

    def __init__(self, database: Database, kind: str, message: Any, missing: Callable[[str, str], str]) -> None:
        self._database = database
        self._kind = kind
        self._message = message
        self._missing = missing

    def get(self, namespace: str, name: str) -> Any:
        """Raises NotFound."""
        with self._database.reading() as rows:
            row = rows.execute(
                "SELECT record FROM records WHERE kind=? AND namespace=? AND id=?", (self._kind, namespace, name)).fetchone()
        if row is None:
            raise NotFound(f"{self._missing(name, namespace)}: not found")
        return self._message.FromString(row[0])

    def all(self, namespace: str) -> Iterator[Any]:
        """Sorted by name."""
        return map(self._message.FromString, self.encoded(namespace))

    def encoded(self, namespace: str) -> list[bytes]:
        """As `all`, in the bytes that are kept."""
        with self._database.reading() as rows:
            found = rows.execute(
                "SELECT record FROM records WHERE kind=? AND namespace=? ORDER BY id", (self._kind, namespace)).fetchall()
        return [row[0] for row in found]

    def create(self, namespace: str, name: str, record: Any, created_at: Any = None) -> None:
        """Sets both times, unless `created_at` is given. Raises AlreadyExists."""
        drop_empty(record.labels)
        if created_at is not None:
            record.created_at.CopyFrom(created_at)
        else:
            record.created_at.FromNanoseconds(now())
        record.updated_at.CopyFrom(record.created_at)
        with self._database.writing() as rows:
            self._database.ensure(namespace)
            done = rows.execute("INSERT OR IGNORE INTO records VALUES (?,?,?,?)",
                                (self._kind, namespace, name, record.SerializeToString()))
            if done.rowcount == 0:
                raise AlreadyExists(f'{self._kind} "{name}": already exists')

    def replace(self, namespace: str, name: str, record: Any, updated_at: Any = None) -> None:
        """Sets the time of the change, unless `updated_at` is given."""
        drop_empty(record.labels)
        if updated_at is not None:
            record.updated_at.CopyFrom(updated_at)
        else:
            record.updated_at.FromNanoseconds(now())
        with self._database.writing() as rows:
            rows.execute("UPDATE records SET record=? WHERE kind=? AND namespace=? AND id=?",
                         (record.SerializeToString(), self._kind, namespace, name))

    def delete(self, namespace: str, name: str) -> None:
        """Raises NotFound."""
        with self._database.writing() as rows:
            done = rows.execute("DELETE FROM records WHERE kind=? AND namespace=? AND id=?", (self._kind, namespace, name))
            if done.rowcount == 0:
                raise NotFound(f"{self._missing(name, namespace)}: not found")
            self._database.deletions += 1

    def changing(self) -> Any:
        """A transaction, for what is read and then replaced."""
        return self._database.writing()


def copy(message: Any) -> Any:
    """A message of one's own: what a caller in this process has handed in stays as it is."""
    made = type(message)()
    made.CopyFrom(message)
    return made


def drop_empty(labels: Any) -> None:
    """An empty value means that there is no such label."""
    for key in [key for key, value in labels.items() if not value]:
        del labels[key]


def change_map(target: Any, source: Any, path: str, field: str) -> None:
    """Replace a map of a message by another's, or, for `field.KEY`, one value of it; one that is missing is removed."""
    key = path.removeprefix(field)[1:]
    if not key:
        target.clear()
        for each in source:
            _put(target, each, source)
    elif key in source:
        _put(target, key, source)
    else:
        target.pop(key, None)


def _put(target: Any, key: str, source: Any) -> None:
    value = source[key]
    if isinstance(value, str):
        target[key] = value
    else:
        target[key].CopyFrom(value)


# --- containers


def _container_field(container: Any, path: list[str]) -> str | None:
    match path[0]:
        case "id":
            return str(container.id) or None
        case "image":
            return str(container.image) or None
        case "runtime" if path[1:] == ["name"]:
            return str(container.runtime.name) or None
        case "snapshotter":
            return str(container.snapshotter) or None
        case "snapshotkey" | "snapshot_key":
            return str(container.snapshot_key) or None
        case "labels" if len(path) > 1:
            return label_field(container.labels, path)
    return None


class Containers:
    """containerd.services.containers.v1.Containers."""

    def __init__(self, database: Database, exchange: Exchange) -> None:
        self._records = _Records(database, "container", pb.containers.Container,
                                 lambda name, namespace: f'container "{name}" in namespace "{namespace}"')
        self._exchange = exchange

    async def Get(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        namespace = call.required_namespace()
        check_identifier(request.id)
        return pb.containers.GetContainerResponse(container=self._records.get(namespace, request.id))

    def _list(self, filters: Iterable[str], call: Call) -> Iterator[Any]:
        accept = parse_all(filters)
        for container in self._records.all(call.required_namespace()):
            if accept(lambda path, found=container: _container_field(found, path)):  # type: ignore[misc]
                yield container

    async def List(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters, sorted by id. Raises InvalidArgument."""
        if not any(request.filters):
            # The answer is put together of what is kept, a third of the time that a message for each takes.
            encoded = self._records.encoded(call.required_namespace())
            return pb.containers.ListContainersResponse.FromString(b"".join(map(_field_1, encoded)))
        return pb.containers.ListContainersResponse(containers=self._list(request.filters, call))

    async def ListStream(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """As List, one by one."""
        if not any(request.filters):
            for encoded in self._records.encoded(call.required_namespace()):
                yield pb.containers.ListContainerMessage.FromString(_field_1(encoded))
            return
        for container in self._list(request.filters, call):
            yield pb.containers.ListContainerMessage(container=container)

    async def Create(self, request: Any, call: Call) -> Any:
        """Raises InvalidArgument, AlreadyExists."""
        namespace, container = call.required_namespace(), copy(request.container)
        _check_container(container)
        self._records.create(namespace, container.id, container)
        event = pb.container_events.ContainerCreate(id=container.id, image=container.image)
        event.runtime.name = container.runtime.name
        if container.runtime.HasField("options"):
            event.runtime.options.CopyFrom(container.runtime.options)
        self._exchange.publish(namespace, "/containers/create", event)
        return pb.containers.CreateContainerResponse(container=container)

    async def Update(self, request: Any, call: Call) -> Any:
        """What the mask names, or everything that may change. Raises InvalidArgument, NotFound."""
        namespace, given = call.required_namespace(), request.container
        if not given.id:
            raise InvalidArgument("must specify a container id: invalid argument")
        with self._records.changing():
            known = self._records.get(namespace, given.id)
            paths = list(request.update_mask.paths)
            if not paths:
                if given.snapshotter != known.snapshotter:
                    raise InvalidArgument("container.Snapshotter field is immutable: invalid argument")
                if given.runtime.name != known.runtime.name:
                    raise InvalidArgument("container.Runtime.Name field is immutable: invalid argument")
                paths = ["labels", "spec", "extensions", "image", "snapshotkey"]
            for path in paths:
                field = path.partition(".")[0]
                if field in ("labels", "extensions"):
                    change_map(getattr(known, field), getattr(given, field), path, field)
                elif path == "spec":
                    known.spec.CopyFrom(given.spec)
                elif path == "image":
                    known.image = given.image
                elif path == "snapshotkey":
                    known.snapshot_key = given.snapshot_key
                else:
                    raise InvalidArgument(f'cannot update "{path}" field on "{given.id}": invalid argument')
            _check_container(known)
            self._records.replace(namespace, given.id, known)
        self._exchange.publish(namespace, "/containers/update", pb.container_events.ContainerUpdate(
            id=known.id, image=known.image, labels=known.labels, snapshot_key=known.snapshot_key))
        return pb.containers.UpdateContainerResponse(container=known)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """Raises NotFound."""
        namespace = call.required_namespace()
        self._records.delete(namespace, request.id)
        self._exchange.publish(namespace, "/containers/delete", pb.container_events.ContainerDelete(id=request.id))
        return Empty()


def _field_1(record: bytes) -> bytes:
    """A message as the first field of another one, on the wire."""
    length, size = bytearray(), len(record)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"\n" + length + record


def _check_container(container: Any) -> None:
    check_identifier(container.id)
    check_labels(container.labels)
    for key in container.extensions:
        if not key:
            raise InvalidArgument("container.Extensions keys must not be empty: invalid argument")
    if container.image and len(container.image) > 4096:
        raise InvalidArgument("container.Image is longer than 4096 bytes: invalid argument")
    if not container.runtime.name:
        raise InvalidArgument("container.Runtime.Name must be set: invalid argument")
    if not container.HasField("spec"):
        raise InvalidArgument("container.Spec must be set: invalid argument")
    if container.snapshot_key and not container.snapshotter:
        raise InvalidArgument("container.Snapshotter must be set if container.SnapshotKey is set: invalid argument")


# --- images


def _image_field(image: Any, path: list[str]) -> str | None:
    match path[0]:
        case "name":
            return str(image.name) or None
        case "target" if len(path) > 1:
            if path[1] == "digest":
                return str(image.target.digest) or None
            if path[1] == "mediatype":
                return str(image.target.media_type) or None
        case "labels" if len(path) > 1:
            return label_field(image.labels, path)
        case "annotations" if len(path) > 1:
            return label_field(image.target.annotations, path)
    return None


class Images:
    """containerd.services.images.v1.Images."""

    def __init__(self, database: Database, exchange: Exchange, collect: Collect) -> None:
        self._records = _Records(database, "image", pb.images.Image, lambda name, _: f'image "{name}"')
        self._database = database
        self._exchange = exchange
        self._collect = collect

    async def Get(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        return pb.images.GetImageResponse(image=self._records.get(call.required_namespace(), request.name))

    async def List(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters, sorted by name. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        return pb.images.ListImagesResponse(images=[
            image for image in self._records.all(call.required_namespace())
            if accept(lambda path, found=image: _image_field(found, path))  # type: ignore[misc]
        ])

    async def Create(self, request: Any, call: Call) -> Any:
        """Raises InvalidArgument, AlreadyExists, NotFound (the lease)."""
        namespace, image = call.required_namespace(), copy(request.image)
        _check_image(image)
        drop_empty(image.target.annotations)
        with self._records.changing():
            self._records.create(
                namespace, image.name, image, request.source_date_epoch if request.HasField("source_date_epoch") else None)
            self._hold(namespace, call, image)
        self._exchange.publish(namespace, "/images/create",
                               pb.image_events.ImageCreate(name=image.name, labels=image.labels))
        return pb.images.CreateImageResponse(image=image)

    async def Update(self, request: Any, call: Call) -> Any:
        """What the mask names (`labels`, `labels.KEY`, `target`, `annotations`), or all. Raises InvalidArgument, NotFound."""
        namespace, given = call.required_namespace(), request.image
        if not given.name:
            raise InvalidArgument("image name is required for update: invalid argument")
        with self._records.changing():
            known = self._records.get(namespace, given.name)
            for path in list(request.update_mask.paths) or ["labels", "target"]:
                field = path.partition(".")[0]
                if field == "labels":
                    change_map(known.labels, given.labels, path, field)
                elif field == "annotations":
                    change_map(known.target.annotations, given.target.annotations, path, field)
                elif path == "target":
                    known.target.CopyFrom(given.target)
                else:
                    raise InvalidArgument(f'cannot update "{path}" field on image "{given.name}": invalid argument')
            _check_image(known)
            drop_empty(known.target.annotations)
            self._records.replace(
                namespace, given.name, known, request.source_date_epoch if request.HasField("source_date_epoch") else None)
            self._hold(namespace, call, known)
        self._exchange.publish(namespace, "/images/update",
                               pb.image_events.ImageUpdate(name=known.name, labels=known.labels))
        return pb.images.UpdateImageResponse(image=known)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """With `sync` it returns after what the image alone held is gone. Raises NotFound; with `target`, when it is another."""
        namespace = call.required_namespace()
        with self._records.changing():
            if request.HasField("target") and request.target.digest:
                known = self._records.get(namespace, request.name)
                if known.target.digest != request.target.digest:
                    wanted = request.target.digest
                    raise NotFound(f'image "{request.name}" has target {known.target.digest}, not {wanted}: not found')
            self._records.delete(namespace, request.name)
            self._database.release(namespace, call.lease, "images", request.name)
        self._exchange.publish(namespace, "/images/delete", pb.image_events.ImageDelete(name=request.name))
        if request.sync:
            await self._collect()
        return Empty()

    def _hold(self, namespace: str, call: Call, image: Any) -> None:
        """An image that may be collected is held by the lease; others are roots themselves."""
        if EXPIRE in image.labels:
            self._database.hold(namespace, call.lease, "images", image.name)


def _check_image(image: Any) -> None:
    if not image.name:
        raise InvalidArgument("image name must not be empty: invalid argument")
    check_labels(image.labels)
    try:
        digests.check(image.target.digest)
    except InvalidArgument as error:
        raise InvalidArgument(f'target.Digest "{image.target.digest}" invalid: {error}: invalid argument') from None
    if image.target.size <= 0:
        raise InvalidArgument("target.Size must be greater than zero: invalid argument")
    if not image.target.media_type:
        raise InvalidArgument("target.MediaType must be set: invalid argument")


# --- sandboxes


def _sandbox_field(sandbox: Any, path: list[str]) -> str | None:
    match path[0]:
        case "id":
            return str(sandbox.sandbox_id) or None
        case "runtime" if path[1:] == ["name"]:
            return str(sandbox.runtime.name) or None
        case "labels" if len(path) > 1:
            return label_field(sandbox.labels, path)
    return None


class SandboxStore:
    """containerd.services.sandbox.v1.Store."""

    def __init__(self, database: Database) -> None:
        self._records = _Records(database, "sandbox", pb.types.Sandbox, lambda name, _: f'sandbox "{name}"')

    async def Get(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        return pb.sandbox.StoreGetResponse(sandbox=self._records.get(call.required_namespace(), request.sandbox_id))

    async def List(self, request: Any, call: Call) -> Any:
        """Those that pass one of the filters. Raises InvalidArgument."""
        accept = parse_all(request.filters)
        return pb.sandbox.StoreListResponse(list=[
            sandbox for sandbox in self._records.all(call.required_namespace())
            if accept(lambda path, found=sandbox: _sandbox_field(found, path))  # type: ignore[misc]
        ])

    async def Create(self, request: Any, call: Call) -> Any:
        """Raises InvalidArgument, AlreadyExists."""
        namespace, sandbox = call.required_namespace(), copy(request.sandbox)
        check_identifier(sandbox.sandbox_id)
        check_labels(sandbox.labels)
        self._records.create(namespace, sandbox.sandbox_id, sandbox)
        return pb.sandbox.StoreCreateResponse(sandbox=sandbox)

    async def Update(self, request: Any, call: Call) -> Any:
        """What the given paths name, or all that may change. Raises InvalidArgument, NotFound."""
        namespace, given = call.required_namespace(), request.sandbox
        with self._records.changing():
            known = self._records.get(namespace, given.sandbox_id)
            paths = list(request.fields)
            if not paths:
                if given.runtime.name != known.runtime.name:
                    raise InvalidArgument("sandbox.Runtime.Name field is immutable: invalid argument")
                paths = ["labels", "extensions", "spec", "runtime"]
            for path in paths:
                field = path.partition(".")[0]
                if field in ("labels", "extensions"):
                    change_map(getattr(known, field), getattr(given, field), path, field)
                elif path in ("spec", "runtime"):
                    getattr(known, path).CopyFrom(getattr(given, path))
                else:
                    raise InvalidArgument(f'cannot update "{path}" field on sandbox "{given.sandbox_id}": invalid argument')
            check_labels(known.labels)
            self._records.replace(namespace, given.sandbox_id, known)
        return pb.sandbox.StoreUpdateResponse(sandbox=known)

    async def Delete(self, request: Any, call: Call) -> Any:
        """Raises NotFound."""
        self._records.delete(call.required_namespace(), request.sandbox_id)
        return pb.sandbox.StoreDeleteResponse()
