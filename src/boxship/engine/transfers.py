"""Images that come and go: pull, push, load, save, import, commit, login, as Docker tells of them.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, ImageCreate, ImagePush, ImageLoad, ImageGet, ImageCommit; the JSON objects of progress.
Not here: how images move (`boxship.images.transfer`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from boxship.api.containerd.pb import content, diff, snapshots, types
from boxship.engine import times
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.engine.images import DANGLING, PARENT, Image, familiar
from boxship.images import auth, hosts, media, platforms, progress
from boxship.images.archive import Source
from boxship.images.export import Saved
from boxship.images.progress import Progress
from boxship.images.registry import Repository, decode_known
from boxship.images.service import from_message, to_message
from boxship.images.transport import Request
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from boxship.oci import reference
from boxship.oci.image import MEDIA_TYPE_CONFIG, MEDIA_TYPE_LAYER_GZIP, MEDIA_TYPE_MANIFEST, Index, Platform

Step = dict[str, Any]

_CONFIG_MAX = 8 << 20


def credentials(header: str, registry: str) -> auth.CredentialSource | None:
    """X-Registry-Auth: base64 (either alphabet) of a JSON object. None when it has nothing. Raises InvalidArgument."""
    if not header:
        return None
    try:
        text = base64.urlsafe_b64decode(header.replace("+", "-").replace("/", "_") + "=" * (-len(header) % 4))
        found = json.loads(text) if text.strip() else {}
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InvalidArgument(f"invalid X-Registry-Auth header: {error}") from None
    given = auth.Credentials(
        str(found.get("username") or ""), str(found.get("password") or ""), str(found.get("identitytoken") or ""),
        str(found.get("registrytoken") or ""))
    return auth.Given(registry, given) if given else None


def platform(text: str) -> list[Platform] | None:
    """The parameter `platform`, as text or as JSON. None for this machine's. Raises InvalidArgument."""
    if not text:
        return None
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            raise InvalidArgument(f"invalid platform: {text}") from None
        return [Platform(os=found.get("os", ""), architecture=found.get("architecture", ""), variant=found.get("variant", ""))]
    return [platforms.parse(text)]


class Transfers:
    """Moves images for the engine."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.mover = core.snapshots.mover

    async def _steps(self, work: Callable[[Callable[[Progress], None]], Awaitable[Any]],
        translate: Callable[[Progress], Step | None],
                     done: list[Any]) -> AsyncIterator[Step]:
        """What is told while `work` goes on; its result is appended to `done`. A client that goes away ends the work."""
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()

        async def run() -> Any:
            try:
                return await work(queue.put_nowait)
            finally:
                queue.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (event := await queue.get()) is not None:
                if (step := translate(event)) is not None:
                    yield step
            done.append(await task)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    # names

    async def _keep_former(self, name: str) -> Any | None:
        """What `name` points to, kept under a name of its own while it may be replaced."""
        from boxship.api.containerd.pb import images

        try:
            former = (await self._core.containerd.images.Get(images.GetImageRequest(name=name), self._core.call)).image.target
        except NotFound:
            return None
        await self._core.images.keep(former)
        return former

    async def _settle(self, former: Any | None) -> None:
        """Drop the name of its own of what has another after all."""
        if former is None:
            return
        names = [each.name for each in await self._core.images.names() if each.target.digest == former.digest]
        if any(not name.startswith(DANGLING) for name in names):
            await self._core.images.drop_dangling(former)

    # pull and push

    async def pull(self, name: str, tag: str, header: str, platform_text: str, *,
        everything: bool = False) -> AsyncIterator[Step]:
        """docker pull. Raises what cannot be asked for before the first step."""
        if tag:
            name = f"{name}@{tag}" if ":" in tag else f"{name}:{tag}"
        parsed = reference.parse(name)
        if everything and not parsed.tag and not parsed.digest:
            raise InvalidArgument("pulling all tags of a repository is not supported", "name a tag")
        parsed = parsed.tagged()
        wanted = platform(platform_text)
        given = credentials(header, parsed.domain)
        record = str(parsed)
        former = await self._keep_former(record)
        head = {"status": f"Pulling from {parsed.familiar_name() if parsed.domain != reference.DEFAULT_DOMAIN else parsed.path}",
                "id": parsed.tag or parsed.digest}
        done: list[Any] = []
        seen: dict[str, str] = {}
        try:
            async for step in self._steps(
                    lambda callback: self.mover.pull(record, self._core.call, wanted=wanted, credentials=given,
                    callback=callback),
                    lambda event: _pull_step(event, seen), done):
                # Not before the registry has answered: what it does not have is an error of the request.
                if head:
                    yield head
                    head = {}
                yield step
        except BoxshipError as error:
            raise _pull_error(error, parsed) from None
        finally:
            await asyncio.shield(self._settle(former))
        if head:
            yield head
        target = done[0]
        await self._core.images.drop_dangling(target)
        yield {"status": f"Digest: {target.digest}"}
        newer = former is None or former.digest != target.digest
        yield {"status": f"Status: {'Downloaded newer image' if newer else 'Image is up to date'} for {parsed.familiar()}"}
        self._core.events.publish("image", "pull", parsed.familiar(), {"name": parsed.familiar_name()})

    async def push(self, name: str, tag: str, header: str, platform_text: str) -> AsyncIterator[Step]:
        """docker push."""
        parsed = reference.parse(f"{name}:{tag}" if tag else name)
        if parsed.digest:
            raise InvalidArgument("cannot push a digest reference")
        given = credentials(header, parsed.domain)
        wanted = platform(platform_text) or ()
        records = [each for each in await self._core.images.names()
            if each.name == str(parsed.tagged())] if parsed.tag or tag else [
            each for each in await self._core.images.names() if each.name.startswith(f"{parsed.name}:")]
        if not records:
            raise NotFound(f"An image does not exist locally with the tag: {parsed.familiar_name()}")
        yield {"status": f"The push refers to repository [{parsed.name}]"}
        for record in records:
            done: list[Any] = []
            async for step in self._steps(
                    lambda callback, record=record: self.mover.push(  # type: ignore[misc]
                        record.name, self._core.call, wanted=wanted, credentials=given, callback=callback), _push_step, done):
                yield step
            target = done[0]
            shown = reference.parse(record.name).tag
            yield {"status": f"{shown}: digest: {target.digest} size: {target.size}"}
            yield {"progressDetail": {}, "aux": {"Tag": shown, "Digest": target.digest, "Size": target.size}}
        self._core.events.publish("image", "push", parsed.familiar(), {"name": parsed.familiar_name()})

    # archives

    async def load(self, source: Source, *, quiet: bool, platform_text: str = "") -> AsyncIterator[Step]:
        """docker load."""
        before = {each.name: each.target for each in await self._core.images.names()}
        done: list[Any] = []
        async for step in self._steps(
                lambda callback: self.mover.load(
                    source, self._core.call, wanted=platform(platform_text), callback=callback, nameless=DANGLING.rstrip("@")),
                lambda event: None if quiet else _load_step(event), done):
            yield step
        for each in done[0]:
            former = before.get(each.name)
            if former is not None and former.digest != each.target.digest:
                await self._core.images.keep(former)
                yield {"stream": f"The image {familiar(each.name)} already exists, renaming the old one with ID"
                       f" {former.digest} to empty string\n"}
            image = await self._core.images.resolve(to_message(each.target))
            if each.name.startswith(DANGLING):
                yield {"stream": f"Loaded image ID: {image.id}\n"}
            else:
                await self._core.images.drop_dangling(each.target)
                yield {"stream": f"Loaded image: {familiar(each.name)}\n"}
            self._core.announce_image("load", image)

    async def save(self, names: list[str], platform_text: str = "") -> AsyncIterator[bytes]:
        """docker save. Raises NotFound before the first piece."""
        wanted: dict[str, tuple[Image, list[str]]] = {}
        for name in names:
            image, record = await self._core.images.find(name)
            entry = wanted.setdefault(image.target.digest, (image, []))
            if record is not None:
                entry[1].append(record.name)
            elif name and not image.id.removeprefix("sha256:").startswith(name.removeprefix("sha256:")):
                _, records = (await self._core.images.all())[image.id]
                entry[1].extend(each.name for each in records if not each.name.startswith(DANGLING))
        for image, _ in wanted.values():
            self._core.announce_image("save", image)
        saved = [Saved(from_message(image.target), tuple(dict.fromkeys(listed))) for image, listed in wanted.values()]
        async for piece in self.mover.save(saved, self._core.call, wanted=platform(platform_text)):
            yield piece

    async def import_(self, source: Source, name: str, message: str, changes: list[str],
        platform_text: str) -> AsyncIterator[Step]:
        """docker import."""
        config = changed({}, changes)
        chosen = platform(platform_text)
        former = await self._keep_former(name) if name else None
        target = await self.mover.import_rootfs(
            source, self._core.call, name=name, config=config, message=message, platform=chosen[0] if chosen else None)
        if not name:
            await self._core.images.put_name(f"{DANGLING}{target.digest}", to_message(target))
        await self._settle(former)
        image = await self._core.images.resolve(to_message(target))
        if name:
            self._core.announce_image("tag", image, familiar(name))
        self._core.announce_image("import", image)
        yield {"status": image.id}

    # commit

    async def commit(self, container: Container, repository: str, tag: str, comment: str, author: str,
        config: dict[str, Any]) -> str:
        """An image of a container as it is: the id. Raises InvalidArgument, NotFound."""
        core = self._core
        name = ""
        if repository:
            name = str(reference.parse(f"{repository}:{tag}" if tag else repository).tagged())
        base = await core.images.get(container.image_id)
        created = times.now()
        async with self.mover.leased(core.call) as leased:
            service = core.containerd.snapshots
            sn = container.snapshotter
            view = f"commit-{container.id}"
            info = (await service.Stat(snapshots.StatSnapshotRequest(snapshotter=sn, key=container.id), leased)).info
            below = await service.View(snapshots.ViewSnapshotRequest(snapshotter=sn, key=view, parent=info.parent), leased)
            try:
                upper = await core.snapshots.mounts(container.id)
                made = (await core.containerd.diff.Diff(diff.DiffRequest(
                    left=below.mounts, right=upper, media_type=MEDIA_TYPE_LAYER_GZIP, ref=f"commit-{container.id}"), leased)).diff
            finally:
                await core.snapshots.remove(view)
            labels = (await core.containerd.content.Info(content.InfoRequest(digest=made.digest), leased)).info.labels
            diff_id = labels.get(media.UNCOMPRESSED, "")
            document = {
                **{key: value for key,
                value in base.config.items() if key in ("architecture", "os", "variant", "os.version", "os.features")},
                "created": created, **({"author": author} if author else {}), "config": config,
                "rootfs": {"type": "layers", "diff_ids": [*base.diff_ids, diff_id]},
                "history": [*(base.config.get("history") or []), {
                    "created": created, "created_by": " ".join([container.path, *container.args]),
                    **({"comment": comment} if comment else {}),
                    **({"author": author} if author else {})}],
            }
            raw = json.dumps(document).encode()
            config_digest = await self._write(raw, leased, {})
            layers = [*base.layers, types.Descriptor(media_type=MEDIA_TYPE_LAYER_GZIP, digest=made.digest, size=made.size)]
            manifest = json.dumps({
                "schemaVersion": 2, "mediaType": MEDIA_TYPE_MANIFEST,
                "config": {"mediaType": MEDIA_TYPE_CONFIG, "digest": config_digest, "size": len(raw)},
                "layers": [{"mediaType": each.media_type, "digest": each.digest, "size": each.size} for each in layers],
            }).encode()
            gc = {"containerd.io/gc.ref.content.config": config_digest} | {
                f"containerd.io/gc.ref.content.l.{index}": each.digest for index, each in enumerate(layers)}
            digest = await self._write(manifest, leased, gc | {PARENT: base.id})
            target = types.Descriptor(media_type=MEDIA_TYPE_MANIFEST, digest=digest, size=len(manifest))
            await core.images.put_name(name or f"{DANGLING}{digest}", target)
        if name:
            core.announce_image("tag", await core.images.resolve(target), familiar(name))
        core.announce(container, "commit", comment=comment, imageID=config_digest, imageRef=familiar(name) if name else "")
        return config_digest

    async def _write(self, data: bytes, call: Any, labels: dict[str, str]) -> str:
        from boxship.images.service import blobs
        from boxship.images.store import write
        name = f"sha256:{hashlib.sha256(data).hexdigest()}"
        await write(blobs(self._core.containerd.content, call), f"engine-{name}", data, name, labels)
        return name

    async def distribution(self, name: str, header: str) -> dict[str, Any]:
        """What a registry says of an image, without fetching it."""
        parsed = reference.parse(name).tagged()
        async with self.mover.transport(credentials(header, parsed.domain)) as transport:
            repository = Repository(transport, parsed)
            target, data = await repository.resolve(parsed.digest or parsed.tag)
            document = decode_known(data or await repository.manifest(target), target.media_type, name)
            if isinstance(document, Index):
                found = [each.platform for each in document.manifests if each.platform is not None]
            elif document is not None and document.config.size <= _CONFIG_MAX:
                async with repository.blob(document.config) as (_, chunks, _):
                    raw = b"".join([chunk async for chunk in chunks])
                document.config.verify(raw)
                config = json.loads(raw)
                found = [Platform(os=config.get("os", ""), architecture=config.get("architecture", ""),
                                  variant=config.get("variant", ""))]
            else:
                found = []
        shown = [{"architecture": each.architecture, "os": each.os, **({"variant": each.variant} if each.variant else {})}
                 for each in found]
        return {"Descriptor": {"mediaType": target.media_type, "digest": target.digest, "size": target.size}, "Platforms": shown}

    # login

    async def login(self, config: dict[str, Any]) -> dict[str, str]:
        """docker login: ask the registry whether it takes the credentials. Raises Unauthenticated."""
        server = re.sub(r"^https?://", "", config["serveraddress"] or "index.docker.io").split("/")[0]
        registry = reference.DEFAULT_DOMAIN if server in ("index.docker.io", "registry-1.docker.io") else server
        given = auth.Credentials(config["username"], config["password"], config["identitytoken"], config["registrytoken"])
        async with self.mover.transport(auth.Given(registry, given)) as transport:
            host = transport.configuration.hosts(registry, hosts.PUSH)[-1]
            try:
                async with transport.send(host, registry, Request("GET", "", what=registry)):
                    pass
            except Unauthenticated as error:
                raise Unauthenticated(f"login attempt to {config['serveraddress'] or registry} failed: {error}") from None
        return {"Status": "Login Succeeded", "IdentityToken": ""}


def _short(event: Progress) -> str:
    return event.descriptor.digest.partition(":")[2][:12] if event.descriptor is not None else ""


def _is_layer(event: Progress) -> bool:
    return event.descriptor is not None and media.is_layer(event.descriptor.media_type)


def _pull_step(event: Progress, seen: dict[str, str]) -> Step | None:
    if not _is_layer(event):
        return None
    name = _short(event)
    detail = {"current": event.progress, "total": event.total}
    words = {
        progress.WAITING: ("Pulling fs layer", {}), progress.DOWNLOADING: ("Downloading", detail),
        progress.COMPLETE: ("Download complete", {}),
        progress.EXISTS: ("Already exists", {}), progress.EXTRACTING: ("Extracting", detail),
        progress.EXTRACTED: ("Pull complete", {}),
    }.get(event.event)
    if words is None or seen.get(name) == "Pull complete" or (seen.get(name) == words[0] and not words[1]):
        return None
    seen[name] = words[0]
    return {"status": words[0], "progressDetail": words[1], "id": name}


def _push_step(event: Progress) -> Step | None:
    if not _is_layer(event):
        return None
    words = {
        progress.WAITING: ("Preparing", {}), progress.UPLOADING: ("Pushing", {"current": event.progress, "total": event.total}),
        progress.COMPLETE: ("Pushed", {}), progress.EXISTS: ("Layer already exists", {}),
        progress.MOUNTED: (f"Mounted from {event.detail}", {}),
    }.get(event.event)
    return None if words is None else {"status": words[0], "progressDetail": words[1], "id": _short(event)}


def _load_step(event: Progress) -> Step | None:
    if event.event == progress.EXTRACTING and _is_layer(event):
        return {"status": "Loading layer", "progressDetail": {"current": event.progress, "total": event.total},
            "id": _short(event)}
    return None


def _pull_error(error: BoxshipError, parsed: reference.Reference) -> BoxshipError:
    if isinstance(error, NotFound) and "no matching manifest" not in str(error):
        return NotFound(f"manifest for {parsed.familiar()} not found: manifest unknown: {error}")
    if isinstance(error, Unauthenticated | PermissionDenied):
        return NotFound(
            f"pull access denied for {parsed.familiar_name()}, repository does not exist or may require 'docker login': {error}")
    return error


# what `--change` may say

_INSTRUCTIONS = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
    "HEALTHCHECK", "SHELL")


def changed(config: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """An image's configuration after Dockerfile instructions. Raises InvalidArgument."""
    import shlex

    config = dict(config)
    for line in changes:
        for text in filter(None, (each.strip() for each in line.splitlines())):
            word, _, rest = text.partition(" ")
            rest = rest.strip()
            kind = word.upper()
            if kind not in _INSTRUCTIONS:
                raise InvalidArgument(f"{word} is not a valid change command")
            try:
                pairs = shlex.split(rest)
            except ValueError as error:
                raise InvalidArgument(f"{kind}: {error}") from None
            if kind in ("CMD", "ENTRYPOINT", "SHELL"):
                config[{"CMD": "Cmd", "ENTRYPOINT": "Entrypoint", "SHELL": "Shell"}[kind]] = _command_words(rest)
            elif kind == "ENV":
                given = dict(pair.partition("=")[::2] for pair in pairs) if "=" in (pairs
                    or [""])[0] else {pairs[0]: " ".join(pairs[1:])}
                kept = [each for each in config.get("Env") or [] if each.partition("=")[0] not in given]
                config["Env"] = [*kept, *(f"{key}={value}" for key, value in given.items())]
            elif kind == "LABEL":
                config["Labels"] = {**(config.get("Labels") or {}), **dict(pair.partition("=")[::2] for pair in pairs)}
            elif kind == "EXPOSE":
                ports: dict[str, Any] = {port if "/" in port else f"{port}/tcp": {} for port in pairs}
                config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **ports}
            elif kind == "VOLUME":
                paths = json.loads(rest) if rest.startswith("[") else pairs
                config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}
            elif kind == "ONBUILD":
                config["OnBuild"] = [*(config.get("OnBuild") or []), rest]
            elif kind == "HEALTHCHECK":
                config["Healthcheck"] = {"Test": ["NONE"]} if rest.upper() == "NONE" else {"Test": ["CMD-SHELL",
                    rest.removeprefix("CMD ")]}
            else:
                config[{"USER": "User", "WORKDIR": "WorkingDir", "STOPSIGNAL": "StopSignal"}[kind]] = rest
    return config


def _command_words(text: str) -> list[str]:
    if text.startswith("["):
        try:
            found = json.loads(text)
            if isinstance(found, list) and all(isinstance(word, str) for word in found):
                return found
        except ValueError:
            pass
    return ["/bin/sh", "-c", text]
