"""A repository of a registry: manifests, blobs, uploads, tags, referrers.

Runs in: the daemon's event loop.
Spec: distribution-spec, newest text (1.1.1 and what follows it); Docker's schema 2 beside OCI's media types.

What is asked for reading goes to the mirrors first and to the registry last; what changes anything goes to the registry.
Not here: HTTP itself (`boxship.images.transport`), images as a whole (`boxship.images.pull`, `boxship.images.push`).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

import aiohttp

from boxship.images.hosts import PULL, PUSH, REFERRERS, RESOLVE, Host
from boxship.images.transport import Body, Request, Transport, bytes_body, joined, read_body, read_json
from boxship.kit.errors import (
    BoxshipError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from boxship.oci import digest as digests
from boxship.oci import text
from boxship.oci.image import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST,
    MEDIA_TYPE_DOCKER_LIST,
    MEDIA_TYPE_DOCKER_MANIFEST,
    MEDIA_TYPE_INDEX,
    MEDIA_TYPE_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    decode_manifest,
)
from boxship.oci.reference import Reference

ACCEPT = f"{MEDIA_TYPE_DOCKER_MANIFEST}, {MEDIA_TYPE_DOCKER_LIST}, {MEDIA_TYPE_MANIFEST}, {MEDIA_TYPE_INDEX}, */*"
SCHEMA_1 = frozenset((
    "application/vnd.docker.distribution.manifest.v1+json", "application/vnd.docker.distribution.manifest.v1+prettyjws",
))

CHUNK_MIN = 5 << 20
"""Bytes of a chunk of a chunked upload, where the registry asks for no more."""

_LIST_LIMIT = 8 << 20
_PAGES = 1000
_CANCEL_S = 5.0
_LINK = re.compile(r'<([^>]*)>\s*;[^,]*rel="?next"?')
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_PASSED_OVER = (NotFound, Unauthenticated, PermissionDenied, ResourceExhausted, Unavailable, DataLoss, InvalidArgument)
"""Failures of one server after which the next one is asked."""

T = TypeVar("T")

Progress = Callable[[int], None]
"""Is told how many bytes of an upload are sent."""


@dataclass(frozen=True)
class Pushed:
    """How a blob got to the registry."""

    existed: bool = False
    mounted_from: str = ""
    """The repository from which it was mounted; "" when it was not."""


class Repository:
    """One repository, as seen by one user (that of the transport's credentials)."""

    def __init__(self, transport: Transport, reference: Reference) -> None:
        self.transport = transport
        self.reference = reference
        self.registry = reference.domain
        self.name = reference.path

    # Reading.

    async def resolve(self, tag_or_digest: str) -> tuple[Descriptor, bytes | None]:
        """What a tag or a digest names now, and its bytes when it had to be fetched to know. Raises NotFound and others."""
        what = self._shown(tag_or_digest)

        async def head(host: Host) -> Descriptor | None:
            async with self._send(host, "HEAD", f"manifests/{tag_or_digest}", what, headers={"Accept": ACCEPT}) as response:
                return self._head(response, tag_or_digest, what)

        descriptor = None
        try:
            descriptor = await self._first(RESOLVE, head)
        except InvalidArgument as error:
            # Some registries do not know HEAD here.
            if ": 405 " not in str(error):
                raise
        if descriptor is not None:
            return descriptor, None

        async def get(host: Host) -> tuple[Descriptor, bytes]:
            return await self._get_manifest(host, tag_or_digest, what)

        return await self._first(RESOLVE, get)

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The bytes of a manifest or index, verified. Raises NotFound, DataLoss, ResourceExhausted and others."""
        what = self._shown(descriptor.digest)
        if descriptor.size > MAX_MANIFEST:
            raise ResourceExhausted(f"{what}: a manifest of {descriptor.size} bytes, and at most {MAX_MANIFEST} are taken")

        async def get(host: Host) -> bytes:
            found, data = await self._get_manifest(host, descriptor.digest, what, descriptor.media_type)
            if found.size != descriptor.size:
                raise DataLoss(f"{what}: the registry has {found.size} bytes, expected {descriptor.size}")
            return data

        return await self._first(PULL, get)

    async def _get_manifest(
        self, host: Host, tag_or_digest: str, what: str, media_type: str = ""
    ) -> tuple[Descriptor, bytes]:
        accept = f"{media_type}, */*" if media_type else ACCEPT
        async with self._send(host, "GET", f"manifests/{tag_or_digest}", what, headers={"Accept": accept}) as response:
            kind = _media_type(response)
            data = await read_body(response, MAX_MANIFEST, what)
            promised = response.headers.get("Docker-Content-Digest", "")
        expected = tag_or_digest if ":" in tag_or_digest else promised
        if expected:
            _check(data, expected, what)
        own = _own_media_type(data, kind, what)
        self._refuse_old(own, what)
        decode_known(data, own, what)
        return Descriptor(media_type=own, digest=expected or digests.of(data), size=len(data)), data

    def _head(self, response: aiohttp.ClientResponse, tag_or_digest: str, what: str) -> Descriptor | None:
        """The descriptor that the headers make, None when they do not say enough."""
        kind = _media_type(response)
        self._refuse_old(kind, what)
        promised = response.headers.get("Docker-Content-Digest", "") or (tag_or_digest if ":" in tag_or_digest else "")
        length = response.headers.get("Content-Length", "")
        if kind not in INDEX_TYPES | MANIFEST_TYPES or not promised or not length.isdecimal() or int(length) == 0:
            return None
        try:
            digests.check(promised)
        except InvalidArgument as error:
            raise DataLoss(f"{what}: Docker-Content-Digest {promised!r}: {error}") from None
        if ":" in tag_or_digest and tag_or_digest.partition(":")[0] == promised.partition(":")[0] and tag_or_digest != promised:
            raise DataLoss(f"{what}: the registry answers with another digest, {promised}")
        if int(length) > MAX_MANIFEST:
            raise ResourceExhausted(f"{what}: a manifest of {length} bytes, and at most {MAX_MANIFEST} are taken")
        return Descriptor(media_type=kind, digest=tag_or_digest if ":" in tag_or_digest else promised, size=int(length))

    def _refuse_old(self, media_type: str, what: str) -> None:
        if media_type in SCHEMA_1:
            hint = "push the image again with a current tool"
            raise InvalidArgument(f"{what}: schema 1 image manifests are no longer supported", hint)

    async def has_blob(self, digest: str) -> bool:
        """Whether the registry itself has it in this repository."""
        host = self._own()
        try:
            async with self._send(host, "HEAD", f"blobs/{digest}", self._shown(digest), push=True):
                return True
        except NotFound:
            return False

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, offset: int = 0, avoid: Container[str] = ()
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes], str]]:
        """The content of a blob: where the server begins (`offset`, or 0 when it does not know ranges), the bytes, the server.

        Bytes are not verified here. A mirror that fails is passed over; servers in `avoid` are asked last. Raises NotFound,
        DataLoss (a size that is not the descriptor's), Unavailable (mid-way too: what arrived is good to be continued), others.
        """
        what = self._shown(descriptor.digest)
        failure: BoxshipError | None = None
        for host in sorted(self._hosts(PULL), key=lambda host: host.address in avoid):
            try:
                context = self._open_blob(host, descriptor, offset, what)
                begin, chunks = await context.__aenter__()
            except _PASSED_OVER as error:
                failure = error
                continue
            try:
                yield begin, chunks, host.address
            finally:
                await context.__aexit__(None, None, None)
            return
        raise failure or NotFound(f"{what}: no server is configured for it")

    @asynccontextmanager
    async def _open_blob(
        self, host: Host, descriptor: Descriptor, offset: int, what: str
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        # No If-Range: content under a digest never changes, while entity tags of caches do; the digest is checked over the whole.
        headers = {"Accept": f"{descriptor.media_type}, */*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        path = f"blobs/{descriptor.digest}"
        if descriptor.media_type in MANIFEST_TYPES or descriptor.media_type in INDEX_TYPES:
            path = f"manifests/{descriptor.digest}"
        async with self._send(host, "GET", path, what, headers=headers, accepted=(200, 206)) as response:
            begin = 0
            if response.status == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
                if not match or int(match[1]) != offset or (match[3] != "*" and int(match[3]) != descriptor.size):
                    given = response.headers.get("Content-Range", "")
                    raise DataLoss(f"{what}: asked for the bytes from {offset} on, the registry answers with {given!r}")
                begin = offset
            length = response.headers.get("Content-Length", "")
            if length.isdecimal() and int(length) + begin != descriptor.size:
                raise DataLoss(f"{what}: the registry has {int(length) + begin} bytes, the manifest says {descriptor.size}")
            yield begin, _chunks(response, begin, descriptor.size, what)

    async def tags(self) -> list[str]:
        """All tags, sorted as the registry does."""
        found: list[str] = []
        async for page in self._pages(f"tags/list?n={_PAGES}", self._shown("tags"), PULL):
            tags = page.get("tags") or []
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                raise DataLoss(f"{self._shown('tags')}: tags: expected a list of strings")
            # Some registries repeat the tag that a page was asked to begin after.
            found += tags[1:] if found and tags[:1] == found[-1:] else tags
        return found

    async def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        """The manifests whose `subject` is `digest`; from the tag that stands in where the registry has no such API."""
        what = self._shown(f"referrers of {digest}")
        path = f"referrers/{digest}"
        if artifact_type:
            path += f"?artifactType={quote(artifact_type, safe='')}"
        found: list[Descriptor] = []
        try:
            async for page in self._pages(path, what, REFERRERS, media_type=MEDIA_TYPE_INDEX):
                found += Index.decode(page, what).manifests
        except (NotFound, InvalidArgument) as error:
            if isinstance(error, InvalidArgument) and ": 405 " not in str(error) and ": 400 " not in str(error):
                raise
            found = (await self._fallback(digest))[0]
        # The filter is the registry's to apply or not.
        return [each for each in found if not artifact_type or each.artifact_type == artifact_type]

    async def _fallback(self, digest: str) -> tuple[list[Descriptor], Index | None]:
        """The index under the referrers tag, and its manifests."""
        tag = referrers_tag(digest)
        try:
            _, data = await self._get_manifest(self._own(), tag, self._shown(tag))
        except NotFound:
            return [], None
        index = decode_manifest(data, MEDIA_TYPE_INDEX, self._shown(tag))
        if not isinstance(index, Index):  # pragma: no cover - the media type makes it one
            raise DataLoss(f"{self._shown(tag)}: expected an index")
        return index.manifests, index

    async def _pages(
        self, path: str, what: str, capability: str, media_type: str = ""
    ) -> AsyncIterator[dict[str, object]]:
        """The pages of a listing, each a JSON object."""
        host: Host | None = None
        for _ in range(_PAGES):

            async def page(host: Host, path: str = path) -> tuple[dict[str, object], str, Host]:
                headers = {"Accept": media_type or "application/json"}
                async with self._send(host, "GET", path, what, headers=headers) as response:
                    if media_type and _media_type(response) not in (media_type, ""):
                        raise NotFound(f"{what}: {response.url} is of type {_media_type(response)}")
                    answer = await read_json(response, _LIST_LIMIT, what)
                    if not isinstance(answer, dict):
                        raise DataLoss(f"{what}: expected an object")
                    following = _LINK.search(response.headers.get("Link", ""))
                    return answer, joined(str(response.url), following[1]) if following else "", host

            answer, path, host = await (page(host) if host is not None else self._first(capability, page))
            yield answer
            if not path:
                return
        raise DataLoss(f"{what}: more than {_PAGES} pages")

    # Writing.

    async def push_manifest(self, data: bytes, media_type: str, tags: Sequence[str], digest: str = "") -> str:
        """Store a manifest by its digest and under tags; returns the digest. Keeps the list of referrers where it must."""
        digest = digest or digests.of(data)
        what = self._shown(tags[0] if tags else digest)
        host = self._own()
        remaining = list(tags)
        subject = ""
        if not remaining or len(remaining) > 1:
            # Several tags at once where the registry can; those that it does not name are pushed one by one.
            query = [("tag", tag) for tag in remaining]
            subject, done = await self._put_manifest(host, digest, data, media_type, what, query)
            remaining = [tag for tag in remaining if tag not in done]
        for tag in remaining:
            subject, _ = await self._put_manifest(host, tag, data, media_type, self._shown(tag), [])
        made = decode_known(data, media_type, what)
        if made is not None and made.subject is not None and subject != made.subject.digest:
            await self._add_referrer(made, Descriptor(media_type=media_type, digest=digest, size=len(data)))
        return digest

    async def _put_manifest(
        self, host: Host, name: str, data: bytes, media_type: str, what: str, query: Sequence[tuple[str, str]]
    ) -> tuple[str, set[str]]:
        """OCI-Subject, and the tags that were accepted."""
        async with self._send(
            host, "PUT", f"manifests/{name}", what, push=True, headers={"Content-Type": media_type}, query=query,
            body=bytes_body(data), length=len(data), accepted=(200, 201, 202),
        ) as response:
            stored = response.headers.get("Docker-Content-Digest", "")
            if stored and stored.partition(":")[0] in digests.LENGTHS:
                _check(data, stored, what)
            accepted = {tag.strip() for header in response.headers.getall("OCI-Tag", []) for tag in header.split(",")}
            return response.headers.get("OCI-Subject", ""), accepted

    async def _add_referrer(self, manifest: Manifest | Index, descriptor: Descriptor) -> None:
        """Put a manifest with a subject on the list that stands in for the referrers API."""
        if manifest.subject is None:
            return
        tag = referrers_tag(manifest.subject.digest)
        known, _ = await self._fallback(manifest.subject.digest)
        if any(each.digest == descriptor.digest for each in known):
            return
        config = manifest.config.media_type if isinstance(manifest, Manifest) else ""
        entry = Descriptor(
            media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size,
            artifact_type=manifest.artifact_type or config, annotations=dict(manifest.annotations),
        )
        index = Index(schema_version=2, media_type=MEDIA_TYPE_INDEX, manifests=[*known, entry])
        data = text.dumps(index.encode()).encode()
        await self._put_manifest(self._own(), tag, data, MEDIA_TYPE_INDEX, self._shown(tag), [])

    async def push_blob(
        self, descriptor: Descriptor, body: Callable[[int], AsyncIterator[bytes]], *, sources: Iterable[str] = (),
        chunk: int = 0, progress: Progress | None = None,
    ) -> Pushed:
        """Store a blob: found there, mounted from one of `sources` (repositories of this registry), or uploaded.

        `body(offset)` yields its bytes from there on. `chunk`: 0 uploads in one request, more in chunks of so many bytes.
        """
        if await self.has_blob(descriptor.digest):
            return Pushed(existed=True)
        host = self._own()
        location = ""
        minimum = 0
        for source in sources:
            answer, minimum = await self._mount(host, descriptor.digest, source)
            if answer == "":
                return Pushed(mounted_from=source)
            location = answer or location
            if location:
                break
        if not location:
            location, minimum = await self._start(host, descriptor.digest)
        try:
            if chunk:
                await self._upload_chunks(host, location, descriptor, body, max(chunk, minimum), progress)
            else:
                await self._upload(host, location, descriptor, body, progress)
        except BaseException:
            await self._cancel(host, location)
            raise
        return Pushed()

    async def _mount(self, host: Host, digest: str, source: str) -> tuple[str | None, int]:
        """"" when it is mounted, the location of an upload that was begun in its place, None when it may not be."""
        scopes = [self._scope(push=True), f"repository:{source}:pull"]
        try:
            async with self._send(
                host, "POST", "blobs/uploads/", self._shown(digest), push=True, scopes=scopes,
                query=[("mount", digest), ("from", source)], accepted=(201, 202), retry=False,
            ) as response:
                if response.status == 201:
                    return "", 0
                return _location(response), _minimum(response)
        except (NotFound, Unauthenticated, PermissionDenied, InvalidArgument, Unavailable):
            # The source may be another's: the blob is uploaded then.
            return None, 0

    async def _start(self, host: Host, digest: str) -> tuple[str, int]:
        """The location of a new upload, and the registry's smallest chunk."""
        algorithm = digest.partition(":")[0]
        query = [("digest-algorithm", algorithm)] if algorithm != "sha256" else []
        async with self._send(
            host, "POST", "blobs/uploads/", self._shown(digest), push=True, query=query, accepted=(202,)
        ) as response:
            return _location(response), _minimum(response)

    async def _upload(
        self, host: Host, location: str, descriptor: Descriptor, body: Callable[[int], AsyncIterator[bytes]],
        progress: Progress | None,
    ) -> None:
        """In one PUT. When that breaks on the way, what arrived is asked for and continued in chunks."""
        what = self._shown(descriptor.digest)
        try:
            async with self._send(
                host, "PUT", location, what, push=True, query=[("digest", descriptor.digest)], length=descriptor.size,
                headers={"Content-Type": "application/octet-stream"}, retry=False, accepted=(201, 204),
                body=_counted(body, 0, descriptor.size, what, progress),
            ):
                return
        except (Unavailable, ResourceExhausted) as error:
            await self.transport.pause_before(1, str(error))
            try:
                await self._upload_chunks(host, location, descriptor, body, CHUNK_MIN, progress, resume=True)
            except (NotFound, FailedPrecondition):
                # The upload is gone with the connection: from the beginning, once.
                location, _ = await self._start(host, descriptor.digest)
                await self._upload_chunks(host, location, descriptor, body, CHUNK_MIN, progress)

    async def _upload_chunks(
        self, host: Host, location: str, descriptor: Descriptor, body: Callable[[int], AsyncIterator[bytes]], size: int,
        progress: Progress | None, *, resume: bool = False,
    ) -> None:
        """PATCH by PATCH; a chunk that fails is followed by a question how far the registry got."""
        what = self._shown(descriptor.digest)
        offset, failures = 0, 0
        while offset < descriptor.size or resume:
            if resume:
                location, offset = await self._status(host, location, what)
                resume = False
                continue
            length = min(size, descriptor.size - offset)
            try:
                async with self._send(
                    host, "PATCH", location, what, push=True, length=length, retry=False, accepted=(202, 201, 204),
                    headers={"Content-Type": "application/octet-stream", "Content-Range": f"{offset}-{offset + length - 1}"},
                    body=_counted(body, offset, length, what, progress),
                ) as response:
                    location = _location(response, location)
                    offset += length
                    failures = 0
            except (Unavailable, ResourceExhausted, InvalidArgument) as error:
                failures += 1
                if failures >= self.transport.limits.attempts or (
                    isinstance(error, InvalidArgument) and ": 416 " not in str(error)
                ):
                    raise
                await self.transport.pause_before(failures, str(error))
                resume = True
        async with self._send(
            host, "PUT", location, what, push=True, query=[("digest", descriptor.digest)], accepted=(201, 204)
        ):
            return

    async def _status(self, host: Host, location: str, what: str) -> tuple[str, int]:
        """Where an upload goes on, and how many bytes the registry has."""
        async with self._send(host, "GET", location, what, push=True, accepted=(204, 202, 200)) as response:
            match = _RANGE.fullmatch(response.headers.get("Range", "").strip())
            if match is None:
                raise FailedPrecondition(f"{what}: the registry does not say how much of the upload it has")
            last = int(match[1])
            # 0-0 is both an empty upload and one byte; the first byte again is refused by 416 at worst, and asked for again.
            return _location(response, location), last + 1 if last else 0

    async def _cancel(self, host: Host, location: str) -> None:
        """Tell the registry that the rest will not come. Whatever becomes of that is no matter, but it is waited for."""

        async def delete() -> None:
            try:
                async with self._send(host, "DELETE", location, "", push=True, accepted=(200, 202, 204), retry=False):
                    return
            except BoxshipError:
                return

        task = asyncio.ensure_future(delete())
        try:
            await asyncio.wait([task], timeout=_CANCEL_S)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=_CANCEL_S)
            raise
        finally:
            task.cancel()

    async def delete_manifest(self, tag_or_digest: str) -> None:
        """Remove a manifest, or a tag where the registry can. Raises NotFound, InvalidArgument (it cannot) and others."""
        async with self._send(
            self._own(), "DELETE", f"manifests/{tag_or_digest}", self._shown(tag_or_digest), accepted=(200, 202),
            scopes=[f"repository:{self.name}:delete"],
        ):
            return

    # Servers.

    def servers(self) -> int:
        """How many servers there are to ask for blobs."""
        return len(self._hosts(PULL))

    def _hosts(self, capability: str) -> list[Host]:
        hosts = self.transport.configuration.hosts(self.registry, capability)
        if not hosts:
            raise NotFound(f"{self.registry}: no server is configured that can {capability}")
        return hosts

    def _own(self) -> Host:
        """The server that takes what is pushed."""
        return self._hosts(PUSH)[0]

    async def _first(self, capability: str, ask: Callable[[Host], Awaitable[T]]) -> T:
        """What the first server answers that can; the error is that of the registry itself, which is asked last."""
        failure: BoxshipError | None = None
        for host in self._hosts(capability):
            try:
                return await ask(host)
            except _PASSED_OVER as error:
                failure = error
        if failure is None:  # pragma: no cover - there is a server
            raise NotFound(f"{self.registry}: no server")
        raise failure

    def _scope(self, *, push: bool) -> str:
        return f"repository:{self.name}:{'pull,push' if push else 'pull'}"

    def _shown(self, object_: str) -> str:
        """How errors name a tag or a digest of the repository."""
        return f"{self.reference.name}{'@' if ':' in object_ else ':'}{object_}"

    def _send(
        self, host: Host, method: str, path: str, what: str, *, push: bool = False, headers: dict[str, str] | None = None,
        query: Sequence[tuple[str, str]] = (), body: Body | None = None, length: int | None = None,
        accepted: Sequence[int] = (200,), retry: bool = True, scopes: Sequence[str] = (),
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        path = path if "://" in path else path if path.startswith("/") else f"{self.name}/{path}"
        return self.transport.send(host, self.registry, Request(
            method, path, self.name, scopes or [self._scope(push=push)], headers or {}, query, body, length,
            frozenset(accepted), retry, what,
        ))


def referrers_tag(digest: str) -> str:
    """The tag under which referrers are listed where the registry has no API for them."""
    algorithm, encoded = digests.split(digest)
    return f"{algorithm[:32]}-{encoded[:64]}"


def decode_known(data: bytes, media_type: str, what: str) -> Manifest | Index | None:
    """The manifest or index, None when it is of a type that is only carried. Raises DataLoss when it is not what it says."""
    if media_type not in INDEX_TYPES and media_type not in MANIFEST_TYPES:
        return None
    try:
        return decode_manifest(data, media_type, what)
    except InvalidArgument as error:
        raise DataLoss(str(error), "the image is damaged in the registry, or this is none") from None


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _own_media_type(data: bytes, kind: str, what: str) -> str:
    """The type of a manifest: what the server says, or what the document says where the server is vague about it."""
    if kind in INDEX_TYPES or kind in MANIFEST_TYPES or kind in SCHEMA_1:
        return kind
    try:
        document = json.loads(data)
    except ValueError:
        begin = " ".join(data[:80].decode("utf-8", "replace").split())
        hint = "is this a registry? a proxy or a login page may stand before it"
        raise DataLoss(f"{what}: {kind or 'something'} in place of a manifest: {begin!r}", hint) from None
    own = document.get("mediaType") if isinstance(document, dict) else None
    if isinstance(own, str) and own:
        return own
    if isinstance(document, dict) and document.get("schemaVersion") == 1:
        return "application/vnd.docker.distribution.manifest.v1+json"
    raise DataLoss(f"{what}: the registry answers with {kind or 'no type'} in place of a manifest")


def _check(data: bytes, digest: str, what: str) -> None:
    """Raises DataLoss when it is not the digest of `data`."""
    try:
        hasher = digests.hasher(digest)
    except InvalidArgument as error:
        raise DataLoss(f"{what}: digest {digest!r}: {error}") from None
    hasher.update(data)
    if hasher.hexdigest() != digest.partition(":")[2]:
        found = f"{digest.partition(':')[0]}:{hasher.hexdigest()}"
        raise DataLoss(f"{what}: content does not match its digest: expected {digest}, got {found}")


async def _chunks(response: aiohttp.ClientResponse, begin: int, size: int, what: str) -> AsyncIterator[bytes]:
    """A blob's bytes, exactly as many as there must be."""
    done = begin
    url = str(response.url).partition("?")[0]
    try:
        async for chunk in response.content.iter_any():
            done += len(chunk)
            if done > size:
                raise DataLoss(f"{what}: {url} sends more than the {size} bytes that the manifest says")
            yield chunk
    except TimeoutError:
        raise Unavailable(f"{what}: {url}: the transfer stalled after {done} of {size} bytes", "try again later") from None
    except (aiohttp.ClientError, OSError) as error:
        text = str(error) or type(error).__name__
        raise Unavailable(f"{what}: {url}: the connection broke after {done} of {size} bytes: {text}") from None
    if done < size:
        raise Unavailable(f"{what}: {url}: the transfer ended after {done} of {size} bytes")


def _counted(
    body: Callable[[int], AsyncIterator[bytes]], offset: int, length: int, what: str, progress: Progress | None
) -> Body:
    """The part of a blob that one request sends; `progress` is told the bytes of the blob so far."""

    async def part() -> AsyncIterator[bytes]:
        left = length
        async for chunk in body(offset):
            taken = chunk[:left] if len(chunk) > left else chunk
            left -= len(taken)
            yield taken
            if progress is not None:
                progress(offset + length - left)
            if not left:
                return
        if left:
            raise DataLoss(f"{what}: the store's content ends {left} bytes early")

    return part


def _location(response: aiohttp.ClientResponse, default: str = "") -> str:
    """Where an upload goes on, as a whole URL."""
    location = response.headers.get("Location", "")
    if not location and not default:
        raise DataLoss(f"{response.method} {response.url}: the registry gives no Location for the upload")
    if not location:
        return default
    target = joined(str(response.url), location)
    if not target:
        raise DataLoss(f"{response.method} {response.url}: the registry gives the Location {location[:200]!r}, which is no URL")
    return target


def _minimum(response: aiohttp.ClientResponse) -> int:
    value = response.headers.get("OCI-Chunk-Min-Length", "")
    return int(value[:12]) if value.isdecimal() else 0

