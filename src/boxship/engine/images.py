"""Images as Docker shows them, over containerd's names and content.

Runs in: the daemon, on its event loop.
Spec: containerd's Images and Content services; image-spec 1.1. An image's id is the digest of its configuration, as dockerd's own
store has it; what containerd's names point to (a manifest or an index) is shown as a repository digest.

A name that is given to another image leaves the former one without a name: it is kept as `moby-dangling@DIGEST`, dockerd's own
convention.
"""

from __future__ import annotations

import fnmatch
import json
from typing import Any

from boxship.api.containerd.call import Call
from boxship.api.containerd.pb import content, images, types
from boxship.api.containerd.services import Containerd
from boxship.engine import times
from boxship.engine.events import truth
from boxship.engine.rootfs import Snapshots
from boxship.images import platforms
from boxship.images.builtin.provide import Builtins
from boxship.images.unpack import chain_ids
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from boxship.oci import reference
from boxship.oci.image import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Index, Manifest, decode_manifest

DANGLING = "moby-dangling@"
PARENT = "org.mobyproject.image.parent"
"""On the content of a manifest, as dockerd has it: the image that this one was committed or built on."""
_BLOB_MAX = 8 << 20
_LEGACY = {
    "Hostname": "", "Domainname": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False, "Tty": False,
    "OpenStdin": False, "StdinOnce": False, "Image": "",
}


class Image:
    """An image that is whole here for this machine. Immutable but for its names."""

    __slots__ = ("chain", "config", "diff_ids", "id", "layers", "manifest", "raw", "target")

    def __init__(self, target: Any, manifest: Any, config_digest: str, raw: bytes, layers: list[Any]) -> None:
        self.target = target
        """What the names point to (types.Descriptor)."""
        self.manifest = manifest
        self.id = config_digest
        self.raw = raw
        self.config: dict[str, Any] = json.loads(raw)
        self.layers = layers
        rootfs = self.config.get("rootfs") or {}
        self.diff_ids: list[str] = list(rootfs.get("diff_ids") or [])
        self.chain = (chain_ids(self.diff_ids) or [""])[-1]

    @property
    def created(self) -> int:
        """Nanoseconds since the epoch, 0 for never."""
        return times.nanoseconds(self.config.get("created") or times.ZERO)

    @property
    def container_config(self) -> dict[str, Any]:
        """The defaults of its containers."""
        return self.config.get("config") or {}


def no_such_image(name: str) -> NotFound:
    """Docker's words."""
    return NotFound(f"No such image: {name}")


class Images:
    """All images of the engine's namespace."""

    def __init__(self, containerd: Containerd, call: Call, snapshots: Snapshots, builtin: Builtins) -> None:
        self.builtin = builtin
        self._containerd = containerd
        self._call = call
        self._snapshots = snapshots
        self._resolved: dict[str, Image] = {}
        self._sizes: dict[str, int] = {}

    # content

    async def blob(self, digest: str, limit: int = _BLOB_MAX) -> bytes:
        """A small blob. Raises NotFound, InvalidArgument when it is larger than `limit`."""
        parts = []
        size = 0
        async for piece in self._containerd.content.Read(content.ReadContentRequest(digest=digest), self._call):
            parts.append(piece.data)
            size += len(piece.data)
            if size > limit:
                raise InvalidArgument(f"{digest}: larger than {limit} bytes")
        return b"".join(parts)

    async def resolve(self, target: Any) -> Image:
        """The image for this machine behind a descriptor. Raises NotFound when a part of it is missing."""
        if (found := self._resolved.get(target.digest)) is not None:
            return found
        descriptor, manifest = await self._manifest(target)
        raw = await self.blob(manifest.config.digest)
        layers = [
            types.Descriptor(media_type=layer.media_type, digest=layer.digest, size=layer.size) for layer in manifest.layers
        ]
        image = Image(target, descriptor, manifest.config.digest, raw, layers)
        self._resolved[target.digest] = image
        return image

    async def _manifest(self, target: Any) -> tuple[Any, Manifest]:
        current = target
        for _ in range(4):
            document = decode_manifest(await self.blob(current.digest), current.media_type, current.digest)
            if isinstance(document, Manifest):
                return current, document
            current = await self._best(document)
        raise InvalidArgument(f"{target.digest}: indexes within indexes")

    async def _best(self, index: Index) -> Any:
        for each in platforms.choose(index.manifests, platforms.only(platforms.host())):
            if each.media_type in INDEX_TYPES | MANIFEST_TYPES and await self._has(each):
                return types.Descriptor(media_type=each.media_type, digest=each.digest, size=each.size)
        raise NotFound("the image has no part for this platform here")

    async def _has(self, descriptor: Descriptor) -> bool:
        try:
            await self._containerd.content.Info(content.InfoRequest(digest=descriptor.digest), self._call)
        except NotFound:
            return False
        return True

    # names

    async def names(self) -> list[Any]:
        """All of containerd's image records."""
        return list((await self._containerd.images.List(images.ListImagesRequest(), self._call)).images)

    async def all(self) -> dict[str, tuple[Image, list[Any]]]:
        """By id: the image and the records that name it. Images that are not whole here are left out."""
        found: dict[str, tuple[Image, list[Any]]] = {}
        for record in await self.names():
            try:
                image = await self.resolve(record.target)
            except (NotFound, InvalidArgument):
                continue
            found.setdefault(image.id, (image, []))[1].append(record)
        return found

    async def get(self, name: str) -> Image:
        """The image that a user means: a reference, an id, or the beginning of one. Raises NotFound."""
        image, _ = await self.find(name)
        return image

    async def find(self, name: str) -> tuple[Image, Any | None]:
        """(image, the record whose name was given, None when it was an id). Raises NotFound, InvalidArgument."""
        try:
            parsed = reference.parse_any(name)
        except InvalidArgument:
            parsed = ""
            if not _hexadecimal(name):
                raise
        if isinstance(parsed, reference.Reference):
            shown = parsed.tagged().familiar()
            if parsed.digest:
                for record in await self.names():
                    if record.target.digest == parsed.digest and _repository(record.name) == parsed.name:
                        return await self.resolve(record.target), record
            else:
                await self.builtin.provide(str(parsed.tagged()), self._call)
                try:
                    record = (await self._containerd.images.Get(
                        images.GetImageRequest(name=str(parsed.tagged())), self._call)).image
                    return await self.resolve(record.target), record
                except NotFound:
                    pass
        else:
            shown = name
        if found := await self._by_id(name):
            return found, None
        raise no_such_image(shown)

    async def _by_id(self, text: str) -> Image | None:
        prefix = text.removeprefix("sha256:")
        if not _hexadecimal(prefix):
            return None
        matches = {
            image.id: image for image, _ in (await self.all()).values()
            if image.id[7:].startswith(prefix) or image.target.digest[7:].startswith(prefix)
        }
        if len(matches) > 1:
            raise InvalidArgument(f"multiple IDs found with provided prefix: {text}")
        return next(iter(matches.values()), None)

    async def tag(self, image: Image, name: str) -> None:
        """Give the image another name, taking it from whichever had it."""
        await self.put_name(name, image.target)

    async def put_name(self, name: str, target: Any) -> None:
        """Let `name` point to `target`; what it pointed to is kept when it has no other name."""
        record = images.Image(name=name, target=target)
        try:
            await self._containerd.images.Create(images.CreateImageRequest(image=record), self._call)
            return
        except AlreadyExists:
            former = (await self._containerd.images.Get(images.GetImageRequest(name=name), self._call)).image
        if former.target.digest == target.digest:
            return
        await self.keep(former.target)
        request = images.UpdateImageRequest(image=record)
        request.update_mask.paths.append("target")
        await self._containerd.images.Update(request, self._call)

    async def keep(self, target: Any) -> None:
        """Keep what is about to lose its last name."""
        if sum(each.target.digest == target.digest for each in await self.names()) > 1:
            return
        record = images.Image(name=f"{DANGLING}{target.digest}", target=target)
        try:
            await self._containerd.images.Create(images.CreateImageRequest(image=record), self._call)
        except AlreadyExists:
            pass

    async def drop_dangling(self, target: Any) -> None:
        """It has a name again."""
        try:
            await self._containerd.images.Delete(images.DeleteImageRequest(name=f"{DANGLING}{target.digest}"), self._call)
        except NotFound:
            pass

    async def untag(self, record: Any, *, sync: bool = False) -> None:
        """Remove a name. With `sync` what it leaves is collected before this returns."""
        await self._containerd.images.Delete(images.DeleteImageRequest(name=record.name, sync=sync), self._call)

    # shapes

    async def size(self, image: Image) -> int:
        """Bytes of the unpacked layers; of the blobs while they are not unpacked."""
        total = 0
        for name, layer in zip(chain_ids(image.diff_ids), image.layers, strict=False):
            if name not in self._sizes:
                try:
                    self._sizes[name] = await self._snapshots.usage(name)
                except NotFound:
                    total += layer.size
                    continue
            total += self._sizes[name]
        return total

    async def summary(self, image: Image, records: list[Any], containers: int, *, shared: int = -1) -> dict[str, Any]:
        """As in the list of images."""
        tags, digests = shown_names(records)
        return {
            "Containers": containers, "Created": image.created // 1_000_000_000, "Id": image.id,
            "Labels": image.container_config.get("Labels"), "ParentId": "", "RepoDigests": digests, "RepoTags": tags,
            "SharedSize": shared, "Size": await self.size(image),
        }

    async def _parent(self, image: Image) -> str:
        """The id of the image that this one was made of here, "" for none."""
        try:
            info = (await self._containerd.content.Info(
                content.InfoRequest(digest=image.manifest.digest), self._call)).info
        except NotFound:
            return ""
        return str(info.labels.get(PARENT, ""))

    async def inspect(self, name: str, *, legacy: bool = False) -> dict[str, Any]:
        """As `docker image inspect` shows it; `legacy` has the fields that the API lost with 1.50."""
        image = await self.get(name)
        _, records = (await self.all()).get(image.id, (image, []))
        tags, digests = shown_names(records)
        config = image.config
        defaults = image.container_config
        return {
            "Id": image.id, "RepoTags": tags, "RepoDigests": digests, "Parent": await self._parent(image),
            "Comment": ((config.get("history") or [{}])[-1] or {}).get("comment", ""),
            "Created": times.rfc3339(image.created) if image.created else config.get("created") or times.ZERO,
            "DockerVersion": config.get("docker_version", ""), "Author": config.get("author", ""),
            "Config": {
                **(_LEGACY if legacy else {}), "User": defaults.get("User", ""),
                **({"ExposedPorts": defaults["ExposedPorts"]} if defaults.get("ExposedPorts") else {}),
                "Env": defaults.get("Env"), "Cmd": defaults.get("Cmd"),
                **({"Healthcheck": defaults["Healthcheck"]} if defaults.get("Healthcheck") else {}),
                "Volumes": defaults.get("Volumes"), "WorkingDir": defaults.get("WorkingDir", ""),
                "Entrypoint": defaults.get("Entrypoint"), "OnBuild": defaults.get("OnBuild"), "Labels": defaults.get("Labels"),
                **{key: defaults[key] for key in ("StopSignal", "Shell", "ArgsEscaped") if defaults.get(key)},
            },
            "Architecture": config.get("architecture", ""), **({"Variant": config["variant"]} if config.get("variant") else {}),
            "Os": config.get("os", ""), "Size": await self.size(image),
            "GraphDriver": {"Data": None, "Name": self._snapshots.snapshotter},
            "RootFS": {"Type": "layers", **({"Layers": image.diff_ids} if image.diff_ids else {})},
            "Metadata": {"LastTagTime": self._tag_time(records)},
        }

    @staticmethod
    def _tag_time(records: list[Any]) -> str:
        found = max((each.updated_at.ToNanoseconds() for each in records if each.HasField("updated_at")), default=0)
        return times.rfc3339(found) if found else times.ZERO

    async def history(self, name: str) -> list[dict[str, Any]]:
        """As `docker history` shows it, youngest first."""
        image = await self.get(name)
        _, records = (await self.all()).get(image.id, (image, []))
        chain = chain_ids(image.diff_ids)
        steps: list[dict[str, Any]] = []
        layer = 0
        for entry in image.config.get("history") or []:
            size = 0
            if not entry.get("empty_layer") and layer < len(chain):
                try:
                    size = await self._snapshots.usage(chain[layer])
                except NotFound:
                    size = image.layers[layer].size
                layer += 1
            created = times.nanoseconds(entry.get("created") or times.ZERO)
            steps.append({
                "Comment": entry.get("comment", ""), "Created": created // 1_000_000_000,
                "CreatedBy": entry.get("created_by", ""),
                "Id": "<missing>", "Size": size, "Tags": None,
            })
        steps.reverse()
        if steps:
            steps[0] |= {"Id": image.id, "Tags": shown_names(records)[0] or None}
        return steps

    async def listed(self, filters: dict[str, list[str]], used: dict[str, int], *,
        with_shared: bool = False) -> list[dict[str, Any]]:
        """As `docker images` shows them, youngest first. `used` has the number of containers by image id."""
        found = await self.all()
        before = [(await self.get(name)).created for name in filters.get("before", [])]
        since = [(await self.get(name)).created for name in filters.get("since", [])]
        until = [times.moment(text) for text in filters.get("until", [])]
        dangling = truth(filters, "dangling", default=False) if "dangling" in filters else None
        shown = []
        for image, records in found.values():
            if any(image.created >= limit for limit in [*before, *until]) or any(image.created <= limit for limit in since):
                continue
            if "label" in filters and not _labelled(image.container_config.get("Labels") or {}, filters["label"]):
                continue
            if dangling is not None and dangling == bool(shown_names(records)[0]):
                continue
            if "reference" in filters:
                records = [each for each in records if any(_matches(each.name, pattern) for pattern in filters["reference"])]
                if not records:
                    continue
            shown.append(await self.summary(image, records, used.get(image.id, 0) if with_shared else -1))
        return sorted(shown, key=lambda each: -each["Created"])

    async def delete(self, name: str, *, force: bool, users: list[Any]) -> list[dict[str, str]]:
        """As `docker rmi`. `users` are the containers of the image. Raises FailedPrecondition for what is in use."""
        image, record = await self.find(name)
        everything = await self.all()
        _, records = everything.get(image.id, (image, []))
        tags = [each for each in records if not each.name.startswith(DANGLING)]
        short = image.id[7:19]
        users = [each for each in users if each.image_id == image.id]
        removed: list[dict[str, str]] = []
        if record is not None and len(tags) > 1:
            await self.untag(record)
            return [{"Untagged": familiar(record.name)}]
        if record is None and len(tags) > 1 and not force and len({_repository(each.name) for each in tags}) > 1:
            raise FailedPrecondition(
                f"conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories")
        if users and record is not None and not force:
            raise FailedPrecondition(
                f'conflict: unable to remove repository reference "{name}" (must force) - '
                f"container {users[0].id[:12]} is using its referenced image {short}")
        for each in users:
            if each.state.running:
                raise FailedPrecondition(
                    f"conflict: unable to delete {short}"
                    f" (cannot be forced) - image is being used by running container {each.id[:12]}")
        if users and not force:
            raise FailedPrecondition(
                f"conflict: unable to delete {short} (must be forced) - image is being used by stopped container"
                f" {users[0].id[:12]}")
        for each in records:
            if not each.name.startswith(DANGLING):
                removed.append({"Untagged": familiar(each.name)})
        for index, each in enumerate(records):
            await self.untag(each, sync=index == len(records) - 1)
        removed.append({"Deleted": image.id})
        shared = {chain for other, _ in everything.values() if other.id != image.id for chain in chain_ids(other.diff_ids)}
        removed += [{"Deleted": layer} for layer in reversed(chain_ids(image.diff_ids)) if layer not in shared]
        for digest in [key for key, value in self._resolved.items() if value.id == image.id]:
            del self._resolved[digest]
        return removed


def familiar(name: str) -> str:
    """A record's name as people are shown it."""
    try:
        return reference.parse(name).familiar()
    except InvalidArgument:
        return name


def _repository(name: str) -> str:
    return name.partition("@")[0].rpartition(":")[0] if "@" not in name else name.partition("@")[0]


def shown_names(records: list[Any]) -> tuple[list[str], list[str]]:
    """(RepoTags, RepoDigests) of the records that name one image."""
    tags: list[str] = []
    digests: list[str] = []
    for record in records:
        if record.name.startswith(DANGLING):
            continue
        try:
            parsed = reference.parse(record.name)
        except InvalidArgument:
            tags.append(record.name)
            continue
        if parsed.tag:
            tags.append(parsed.familiar_name() + ":" + parsed.tag)
        digests.append(f"{parsed.familiar_name()}@{record.target.digest}")
    return sorted(tags), sorted(set(digests))


def _hexadecimal(text: str) -> bool:
    return 0 < len(text) <= 64 and not text.strip("0123456789abcdef")


def _labelled(labels: dict[str, str], wanted: list[str]) -> bool:
    for each in wanted:
        key, equals, value = each.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def _matches(name: str, pattern: str) -> bool:
    """Docker's reference filter: a pattern for the familiar name, with or without the tag; `*` stays within a component."""
    shown = familiar(name)
    candidates = [shown, shown.rpartition(":")[0] if ":" in shown.rpartition("/")[2] else shown]
    return any(
        candidate.count("/") == pattern.count("/") and fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates)
