"""The transfer service: images between registries, the image store and archives, by one method.

Runs in: the daemon's event loop.
Spec: containerd API, services/transfer/v1 and types/transfer; containerd docs/transfer.md. Which pairs of source and destination
there are:

    OCIRegistry        → ImageStore         pull
    ImageStore         → OCIRegistry        push
    ImageImportStream  → ImageStore         import
    ImageStore         → ImageExportStream  export
    ImageStore         → ImageStore         tag

Progress, credentials, archives and the log of HTTP go over streams that the client has opened before
(`boxship.containerd.streaming`).
Not here: how images move (`boxship.images.transfer`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from boxship.api.any import unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.streaming import ByteSender, Stream, Streams, received
from boxship.images import platforms, progress
from boxship.images.archive import ANNOTATION_IMAGE_NAME
from boxship.images.auth import Credentials, CredentialSource
from boxship.images.export import Saved
from boxship.images.hosts import DOCKER_HUB, DOCKER_HUB_SERVER, Configuration
from boxship.images.progress import Callback, Progress
from boxship.images.service import platform_from_message, to_message
from boxship.images.transfer import CLIENTS_ORDER, Images, tell
from boxship.kit.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from boxship.oci.image import ANNOTATION_REF_NAME, Descriptor, Platform

_QUEUED = 1024
_UNTOLD = frozenset((progress.LOADING, progress.EXPORTING))
"""Events that containerd has no word for."""


class Transfer:
    """containerd.services.transfer.v1.Transfer."""

    def __init__(self, images: Images, streams: Streams) -> None:
        self._images = images
        self._streams = streams

    async def Transfer(self, request: Any, call: Call) -> Any:
        """Move from source to destination. Raises Unsupported for a pair that there is not, and what moving raises."""
        call.required_namespace()
        source, destination = _decode(request.source), _decode(request.destination)
        pair = (type(source).__name__, type(destination).__name__)
        methods: dict[tuple[str, str], Callable[..., Any]] = {
            ("OCIRegistry", "ImageStore"): self._pull, ("ImageStore", "OCIRegistry"): self._push,
            ("ImageImportStream", "ImageStore"): self._import, ("ImageStore", "ImageExportStream"): self._export,
            ("ImageStore", "ImageStore"): self._tag,
        }
        method = methods.get(pair)
        if method is None:
            raise Unsupported(
                f"method Transfer not implemented for {request.source.type_url} to {request.destination.type_url}"
            )
        async with self._reporting(request.options.progress_stream, call) as callback:
            await method(source, destination, call, callback)
        return Empty()

    async def _pull(self, source: Any, store: Any, call: Call, callback: Callback | None) -> None:
        what = f"OCI Registry ({source.reference})"
        _line(callback, f"Resolving from {what}")

        async def record(target: Descriptor, leased: Call) -> None:
            await self._record(target, store, leased, callback)

        async with self._logging(source.resolver, call) as trace:
            await self._images.pull(
                source.reference, call, wanted=_platforms(store.platforms), unpack=bool(store.unpacks),
                unpacks=await self._unpacks(store, call),
                credentials=self._credentials(source, call), registries=self._registries(source.resolver), callback=callback,
                record=record, all_metadata=store.all_metadata, trace=trace,
            )
        _line(callback, f"Completed pull from {what}")

    async def _push(self, store: Any, destination: Any, call: Call, callback: Callback | None) -> None:
        what = f"OCI Registry ({destination.reference})"
        target = await self._images.target(store.name, call)
        _line(callback, f"Pushing to {what}")
        tell(callback, "pushing content", store.name, target)
        async with self._logging(destination.resolver, call) as trace:
            await self._images.push(
                store.name, call, to=destination.reference, target=target, wanted=_platforms(store.platforms),
                credentials=self._credentials(destination, call), registries=self._registries(destination.resolver),
                callback=callback, trace=trace,
            )
        tell(callback, "pushed content", store.name, target)
        _line(callback, f"Completed push to {what}")

    async def _import(self, source: Any, store: Any, call: Call, callback: Callback | None) -> None:
        stream = self._streams.get(source.stream, call)
        _line(callback, "Importing")

        async def record(target: Descriptor, leased: Call, top: bool) -> list[str]:
            if top:
                return await self._save(_own_names(target, store), target, leased, callback)
            return await self._save(_annotated_names(target, store), target, leased, callback)

        try:
            await self._images.load(
                received(stream), call, wanted=_platforms(store.platforms), unpack=bool(store.unpacks),
                unpacks=await self._unpacks(store, call),
                compress=source.force_compress, callback=callback, record=record,
            )
        finally:
            stream.close()
        _line(callback, "Completed import")

    async def _export(self, store: Any, destination: Any, call: Call, callback: Callback | None) -> None:
        stream = self._streams.get(destination.stream, call)
        _line(callback, "Exporting")
        sender = ByteSender(stream)
        try:
            images = [Saved(await self._images.target(name, call), [name]) for name in await self._names(store)]
            wanted: list[Platform] | None = _platforms(destination.platforms) or [platforms.host()]
            if destination.all_platforms:
                wanted = []
            async for piece in self._images.save(
                images, call, wanted=wanted, docker=not destination.skip_compatibility_manifest,
                distributable_only=destination.skip_non_distributable, keep_index=True, callback=callback,
            ):
                await sender.write(piece)
        finally:
            sender.close()
        _line(callback, "Completed export")

    async def _tag(self, source: Any, store: Any, call: Call, callback: Callback | None) -> None:
        async with self._images.leased(call) as leased:
            target = await self._images.target(source.name, leased)
            await self._record(target, store, leased, callback)

    async def _unpacks(self, store: Any, call: Call) -> list[tuple[Platform, str]]:
        return [
            (platform_from_message(each.platform), await self._images.snapshotter(call, each.snapshotter, CLIENTS_ORDER))
            for each in store.unpacks
        ]

    async def _names(self, store: Any) -> list[str]:
        names = [store.name] if store.name else []
        for each in store.extra_references:
            if each.is_prefix:
                raise Unsupported("prefix lookup on export not implemented: not implemented")
            names.append(each.name)
        if not names:
            raise InvalidArgument("no image to export: invalid argument")
        return names

    # What an image is called.

    async def _record(self, target: Descriptor, store: Any, call: Call, callback: Callback | None) -> list[str]:
        """Record an image under the destination's own names."""
        names = _own_names(target, store)
        if not names:
            raise NotFound("no image name found: not found")
        return await self._save(names, target, call, callback)

    async def _save(
        self, names: dict[str, dict[str, str]], target: Descriptor, call: Call, callback: Callback | None
    ) -> list[str]:
        for name, labels in names.items():
            await self._images.record(name, target, call, labels)
            tell(callback, progress.SAVED, name, target)
        return list(names)

    # Streams.

    @asynccontextmanager
    async def _reporting(self, name: str, call: Call) -> AsyncIterator[Callback | None]:
        """Where progress is told: a callback that never waits, and a task that sends what it was given."""
        if not name:
            yield None
            return
        stream = self._streams.get(name, call)
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()

        def callback(event: Progress) -> None:
            # A client that does not read loses what can be lost: how far something is, but not that it has ended.
            if event.event not in _UNTOLD and (queue.qsize() < _QUEUED or event.event != progress.DOWNLOADING):
                queue.put_nowait(event)

        async def send() -> None:
            try:
                while (event := await queue.get()) is not None:
                    await stream.send(_message(event))
            except Unavailable:
                return

        sending = asyncio.ensure_future(send())
        try:
            yield callback
        finally:
            queue.put_nowait(None)
            try:
                async with asyncio.timeout(10):
                    await sending
            except TimeoutError:
                pass
            finally:
                sending.cancel()
                stream.close()

    @asynccontextmanager
    async def _logging(self, resolver: Any, call: Call) -> AsyncIterator[Callable[[str], None] | None]:
        """Where the log of HTTP requests goes, when the client wants it."""
        if not resolver.http_debug or not resolver.logs_stream:
            yield None
            return
        sender = ByteSender(self._streams.get(resolver.logs_stream, call))
        queue: asyncio.Queue[str | None] = asyncio.Queue()

        async def send() -> None:
            try:
                while (line := await queue.get()) is not None:
                    await sender.write(f"{line}\n".encode())
            except Unavailable:
                return

        sending = asyncio.ensure_future(send())
        try:
            yield queue.put_nowait
        finally:
            queue.put_nowait(None)
            await asyncio.wait([sending], timeout=5)
            sending.cancel()
            sender.close()

    def _credentials(self, registry: Any, call: Call) -> CredentialSource | None:
        name = registry.resolver.auth_stream
        return StreamCredentials(self._streams.get(name, call), registry.reference) if name else None

    def _registries(self, resolver: Any) -> Configuration:
        """The daemon's configuration with what the client wants to be otherwise."""
        configuration = self._images.config.registries
        if resolver.host_dir:
            configuration = replace(configuration, directories=(resolver.host_dir,))
        if resolver.default_scheme == "http":
            configuration = replace(configuration, plain_http=True)
        if resolver.headers:
            configuration = replace(configuration, headers={**configuration.headers, **resolver.headers})
        return configuration


class StreamCredentials:
    """Credentials that the client is asked for when a registry wants some."""

    def __init__(self, stream: Stream, reference: str) -> None:
        self._stream = stream
        self._reference = reference
        self._lock = asyncio.Lock()

    async def get(self, host: str, repository: str, challenges: Sequence[str]) -> Credentials | None:
        request = pb.transfer_registry.AuthRequest(
            host=DOCKER_HUB_SERVER if host == DOCKER_HUB else host, reference=self._reference, wwwauthenticate=challenges
        )
        async with self._lock:
            try:
                await self._stream.send(request)
            except Unavailable:
                return None
            answer = await self._stream.receive()
        if not isinstance(answer, pb.transfer_registry.AuthResponse):
            return None
        found: dict[int, Credentials] = {
            pb.transfer_registry.CREDENTIALS: Credentials(answer.username, answer.secret),
            pb.transfer_registry.REFRESH: Credentials(identity_token=answer.secret),
            pb.transfer_registry.HEADER: Credentials(header=answer.secret),
        }
        return found.get(answer.authType) or None


def _decode(value: AnyMessage) -> Any:
    try:
        return unpack(value)
    except DecodeError:
        raise InvalidArgument(f"{value.type_url} cannot be decoded: invalid argument") from None


def _platforms(messages: Any) -> list[Platform]:
    return [platform_from_message(each) for each in messages]


def _extra_labels(store: Any) -> dict[str, str]:
    """Labels of a further name: it goes with the image's own name."""
    labels = dict(store.labels)
    if store.name:
        labels["containerd.io/gc.bref.image"] = store.name
        labels["containerd.io/gc.expire"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return labels


def _own_names(target: Descriptor, store: Any) -> dict[str, dict[str, str]]:
    """The names that the destination gives to what is stored, with their labels."""
    names = {store.name: dict(store.labels)} if store.name else {}
    for each in store.extra_references:
        if not each.is_prefix:
            names[each.name] = _extra_labels(store)
        elif each.add_digest:
            names[f"{each.name}@{target.digest}"] = _extra_labels(store)
    return names


def _annotated_names(target: Descriptor, store: Any) -> dict[str, dict[str, str]]:
    """The names of one image of an archive: from its annotations, as far as the destination's prefixes let them."""
    names: dict[str, dict[str, str]] = {}
    for each in store.extra_references:
        if not each.is_prefix:
            continue
        name = _annotated_name(target, each.name, overwrite=each.allow_overwrite)
        if name:
            names[name] = _extra_labels(store)
        if each.add_digest and not (name and each.skip_named_digest):
            names[f"{each.name}@{target.digest}"] = _extra_labels(store)
    return names


def _annotated_name(target: Descriptor, prefix: str, *, overwrite: bool) -> str:
    """The name that annotations and the prefix of the destination make; "" when they make none."""
    full = target.annotations.get(ANNOTATION_IMAGE_NAME, "")
    if full:
        return full if overwrite or _has_prefix(full, prefix) else ""
    short = target.annotations.get(ANNOTATION_REF_NAME, "")
    if not short or not prefix:
        return ""
    if any(mark in short for mark in "/:@"):
        return short if overwrite or _has_prefix(short, prefix) else ""
    return f"{prefix}:{short}"


def _has_prefix(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name[len(prefix):len(prefix) + 1] in ("", "/", ":", "@")


def _line(callback: Callback | None, text: str) -> None:
    if callback is not None:
        callback(Progress(text))


def _message(event: Progress) -> Any:
    word = progress.EXISTS if event.event == progress.MOUNTED else event.event
    message = pb.transfer_progress.Progress(
        event=word, name=event.name, parents=event.parents, progress=event.progress, total=event.total
    )
    if event.descriptor is not None:
        message.desc.CopyFrom(to_message(event.descriptor))
    return message
