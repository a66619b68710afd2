"""The registry client against a registry on loopback: one that keeps the specification, and one that lies, stalls and breaks."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from boxship.images import platforms
from boxship.images.auth import Credentials, Given
from boxship.images.hosts import Configuration
from boxship.images.progress import Progress
from boxship.images.pull import Fetcher, Flights
from boxship.images.push import Pusher
from boxship.images.registry import Repository, referrers_tag
from boxship.images.store import LocalBlobs
from boxship.images.transport import Limits, Transport
from boxship.kit.errors import (
    BoxshipError,
    DataLoss,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from boxship.oci import reference
from boxship.oci.image import Descriptor
from support.blobs import MemoryStore
from support.registry import INDEX, MANIFEST, Registry, descriptor, digest_of, error

QUICK = Limits(connect_s=5, stall_s=5, answer_s=5, attempts=3, backoff_s=0.01, backoff_max_s=0.02, retry_after_max_s=2)
IMPATIENT = Limits(connect_s=0.3, stall_s=0.5, answer_s=1, attempts=3, backoff_s=0.01, backoff_max_s=0.02)
BIG = os.urandom(3_000_000)


class Client:
    """Pulls from and pushes to a registry, with a store that tests look into."""

    def __init__(self, registry: Registry, **options: object) -> None:
        self.registry = registry
        self.store = MemoryStore()
        self.blobs = LocalBlobs(self.store)
        self.events: list[Progress] = []
        configuration = options.pop("configuration", None) or Configuration(directories=(), plain_http=True)
        self.transport = Transport(configuration, options.pop("credentials", None), options.pop("limits", QUICK), **options)

    def repository(self, name: str) -> Repository:
        return Repository(self.transport, reference.parse(name if "." in name.split("/")[0] else f"{self.registry.address}/{name}"))

    async def pull(self, name: str, platform: str = "linux/amd64", **options: object) -> Descriptor:
        repository = self.repository(name)
        wanted = [platforms.parse(platform)] if platform else []
        fetcher = Fetcher(repository, self.blobs, wanted=wanted, callback=self.events.append, **options)
        target = await fetcher.resolve(repository.reference.tagged())
        await fetcher.fetch(target)
        return target

    async def push(self, name: str, target: Descriptor, *tags: str, **options: object) -> Descriptor:
        return await Pusher(self.repository(name), self.blobs, callback=self.events.append, **options).push(target, tags)

    def told(self, event: str) -> list[Progress]:
        return [each for each in self.events if each.event == event]


def story(work: Callable[[Registry, Client], Awaitable[None]], registry: Registry | None = None, **options: object) -> None:
    """Run a test with a registry and a client; nothing may be left of them."""

    async def run() -> None:
        async with asyncio.timeout(40), registry or Registry() as server:
            client = Client(server, **options)
            async with client.transport:
                await work(server, client)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not [task for task in others if "boxship" in repr(task.get_coro())]

    asyncio.run(run())


# Pulling.


def test_an_image_arrives_whole_with_the_labels_that_keep_it() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG, b"small"))
        target = await client.pull("lib/app")
        manifest = json.loads(client.store.blobs[target.digest])
        everything = [target.digest, manifest["config"]["digest"], digest_of(BIG), digest_of(b"small")]
        assert sorted(client.store.blobs) == sorted(everything)
        labels = client.store.tags[target.digest]
        assert labels["containerd.io/gc.ref.content.config"] == everything[1]
        assert labels["containerd.io/gc.ref.content.l.0"] == digest_of(BIG)
        assert labels["containerd.io/gc.ref.content.l.1"] == digest_of(b"small")
        assert {client.store.tags[each]["containerd.io/distribution.source.127.0.0.1"] for each in everything} == {"lib/app"}

    story(work)


def test_progress_says_how_much_there_is_and_ends() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        await client.pull("lib/app")
        layer = [each for each in client.events if each.name == f"layer-{digest_of(BIG)}"]
        assert {each.total for each in layer} == {len(BIG)}
        assert [layer[0].event, layer[-1].event, layer[-1].progress] == ["waiting", "complete", len(BIG)]
        moved = [each.progress for each in layer if each.event == "downloading"]
        assert moved and moved == sorted(moved)
        assert layer[0].parents and layer[0].parents[0].startswith("manifest-")

    story(work)


def test_what_is_there_is_not_fetched_again() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        await client.pull("lib/app")
        registry.log.clear()
        await client.pull("lib/app")
        assert registry.log == [("HEAD", "/v2/lib/app/manifests/latest")]
        assert len(client.told("already exists")) == 3

    story(work)


def test_the_machines_platform_is_chosen_from_an_index() -> None:
    async def work(registry: Registry, client: Client) -> None:
        images = [
            registry.add_image("lib/app", "", layers=(name.encode(),), architecture=name, variant=variant)
            for name, variant in (("arm64", "v8"), ("amd64", ""), ("arm", "v7"), ("arm", "v6"))
        ]
        registry.add_manifest("lib/app", {"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, "latest")
        await client.pull("lib/app", "linux/amd64")
        assert digest_of(b"amd64") in client.store.blobs
        assert digest_of(b"arm64") not in client.store.blobs
        await client.pull("lib/app", "linux/arm/v6")
        assert images[3]["digest"] in client.store.blobs
        assert images[2]["digest"] not in client.store.blobs
        with pytest.raises(NotFound, match=r"no matching manifest for linux/s390x .*linux/amd64, linux/arm/v6"):
            await client.pull("lib/app", "linux/s390x")
        await client.pull("lib/app", "")
        assert all(image["digest"] in client.store.blobs for image in images)

    story(work)


def test_a_manifest_without_a_platform_is_chosen_by_its_configuration() -> None:
    async def work(registry: Registry, client: Client) -> None:
        images = [registry.add_image("lib/app", "", layers=(name.encode(),), architecture=name) for name in ("arm64", "amd64")]
        for image in images:
            del image["platform"]
        registry.add_manifest("lib/app", {"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, "latest")
        await client.pull("lib/app", "linux/amd64")
        assert digest_of(b"amd64") in client.store.blobs
        assert digest_of(b"arm64") not in client.store.blobs

    story(work)


def test_artifacts_and_unknown_media_types_are_carried() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_blob("lib/app", b"{}")
        registry.add_blob("lib/app", b"thing")
        document = {
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x.thing",
            "config": descriptor("application/vnd.oci.empty.v1+json", b"{}", data="e30="), "layers": [descriptor("application/x.odd", b"thing")],
        }
        registry.add_manifest("lib/app", document, "thing")
        await client.pull("lib/app:thing")
        assert {digest_of(b"{}"), digest_of(b"thing")} < set(client.store.blobs)
        assert not any("blobs/" + digest_of(b"{}") in path for path in registry.asked("GET"))

    story(work)


def test_a_pull_by_digest_is_that_digest() -> None:
    async def work(registry: Registry, client: Client) -> None:
        image = registry.add_image("lib/app", "latest")
        registry.manifests["lib/app"]["latest"] = (MANIFEST, b"{}")
        target = await client.pull(f"lib/app@{image['digest']}")
        assert target.digest == image["digest"]

    story(work)


def test_an_empty_blob_is_a_blob() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(b"",))
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(b"")] == b""

    story(work)


def test_layers_are_unpacked_while_others_still_arrive() -> None:
    async def work(registry: Registry, client: Client) -> None:
        second = asyncio.Event()
        unpacked: list[str] = []

        async def hook(request: web.Request) -> None:
            if digest_of(b"two") in request.path:
                await second.wait()

        class Unpacker:
            def wants(self, platform: object) -> bool:
                return True

            async def unpack(self, layers, config, platform, ready, progress):  # type: ignore[no-untyped-def]
                for layer in layers:
                    await ready(layer.descriptor)
                    assert layer.descriptor.digest in client.store.blobs
                    unpacked.append(layer.diff_id)
                    second.set()

        registry.hooks.append(hook)
        registry.add_image("lib/app", "latest", layers=(b"one", b"two"))
        await client.pull("lib/app", unpacker=Unpacker())
        assert unpacked == [digest_of(b"one"), digest_of(b"two")]

    story(work)


def test_two_pulls_of_the_same_blob_fetch_it_once() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG, b"a"))
        registry.add_image("lib/other", "latest", layers=(BIG, b"b"))
        flights = Flights()
        await asyncio.gather(client.pull("lib/app", flights=flights), client.pull("lib/other", flights=flights))
        assert len([path for path in registry.asked("GET") if digest_of(BIG) in path]) == 1

    story(work)


def test_who_still_waits_gets_the_blob_when_the_other_gives_up() -> None:
    async def work(registry: Registry, client: Client) -> None:
        asked = asyncio.Event()
        gone = asyncio.Event()

        async def hook(request: web.Request) -> web.StreamResponse | None:
            if digest_of(BIG) not in request.path or asked.is_set():
                return None
            response = web.StreamResponse(headers={"Content-Length": str(len(BIG))})
            await response.prepare(request)
            await response.write(BIG[:2_500_000])
            asked.set()
            await gone.wait()
            return response

        registry.hooks.append(hook)
        registry.add_image("lib/app", "latest", layers=(BIG,))
        flights = Flights()
        async with Transport(client.transport.configuration, limits=QUICK) as transport:
            # Over connections of its own, which are closed with it.
            other = Fetcher(Repository(transport, client.repository("lib/app").reference), client.blobs, wanted=[], flights=flights)
            target = await other.resolve(client.repository("lib/app").reference.tagged())
            first = asyncio.ensure_future(other.fetch(target))
            await asked.wait()
            second = asyncio.ensure_future(client.pull("lib/app", flights=flights))
            while not any(each.name.startswith("layer-") for each in client.events):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        await second
        gone.set()
        assert client.store.blobs[digest_of(BIG)] == BIG

    story(work)


def test_who_waits_does_not_fail_with_the_others_rights() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        right = Credentials("u", "p").basic()
        waiting = asyncio.Event()

        async def hook(request: web.Request) -> web.Response | None:
            if digest_of(BIG) not in request.path or request.headers.get("Authorization") == right:
                return None
            await waiting.wait()
            return error(401, "UNAUTHORIZED", **{"WWW-Authenticate": 'Basic realm="here"'})

        registry.hooks.append(hook)
        flights = Flights()
        client.transport._credentials = Given(registry.address, Credentials("u", "p"))
        async with Transport(client.transport.configuration, limits=QUICK) as transport:
            nobody = Fetcher(Repository(transport, client.repository("lib/app").reference), client.blobs, wanted=[], flights=flights)
            target = await nobody.resolve(client.repository("lib/app").reference.tagged())
            first = asyncio.ensure_future(nobody.fetch(target))
            await asyncio.sleep(0.1)
            second = asyncio.ensure_future(client.pull("lib/app", flights=flights))
            await asyncio.sleep(0.1)
            waiting.set()
            with pytest.raises(Unauthenticated):
                await first
            await second
        assert client.store.blobs[digest_of(BIG)] == BIG

    story(work)


def test_a_cancelled_pull_leaves_no_ingest() -> None:
    async def work(registry: Registry, client: Client) -> None:
        asked = asyncio.Event()

        async def hook(request: web.Request) -> web.StreamResponse | None:
            if digest_of(BIG) not in request.path:
                return None
            response = web.StreamResponse(headers={"Content-Length": str(len(BIG))})
            await response.prepare(request)
            await response.write(BIG[:2_000_000])
            asked.set()
            await asyncio.sleep(10)
            return response

        registry.hooks.append(hook)
        registry.add_image("lib/app", "latest", layers=(BIG,))
        task = asyncio.ensure_future(client.pull("lib/app"))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client.store.ingests and not client.store.busy

    story(work)


# Interrupted downloads.


def cut_off(data: bytes, *lengths: int, ranges: bool = True) -> tuple[Callable[[web.Request], Awaitable[web.StreamResponse | None]], list[str]]:
    """A hook that breaks the connection after so many bytes, once for each; and the ranges that were asked for."""
    left = list(lengths)
    asked: list[str] = []

    async def hook(request: web.Request) -> web.StreamResponse | None:
        if digest_of(data) not in request.path or request.method != "GET":
            return None
        asked.append(request.headers.get("Range", ""))
        begin = int(request.headers["Range"][6:-1]) if "Range" in request.headers and ranges else 0
        if not left:
            return None if ranges else web.Response(body=data)
        part = data[begin:begin + left.pop(0)]
        response = web.StreamResponse(status=206 if begin else 200, headers={"Content-Length": str(len(data) - begin)})
        if begin:
            response.headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        await response.prepare(request)
        await response.write(part)
        await asyncio.sleep(0.02)
        request.transport.abort()
        return response

    return hook, asked


def test_a_download_that_breaks_goes_on_where_it_stopped() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        hook, asked = cut_off(BIG, 1_000_000, 500_000)
        registry.hooks.append(hook)
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(BIG)] == BIG
        assert len(asked) == 3
        offsets = [int(each[6:-1]) for each in asked[1:]]
        assert asked[0] == "" and 0 < offsets[0] <= 1_000_000 and offsets[0] < offsets[1] <= 1_500_000
        assert any("trying again" in each.detail for each in client.events)

    story(work)


def test_a_registry_that_knows_no_ranges_is_read_from_the_beginning_again() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        hook, asked = cut_off(BIG, 1_000_000, ranges=False)
        registry.hooks.append(hook)
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(BIG)] == BIG
        assert len(asked) == 2

    story(work)


def test_progress_between_breaks_renews_the_patience() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        hook, asked = cut_off(BIG, *[400_000] * 6)
        registry.hooks.append(hook)
        await client.pull("lib/app")
        assert len(asked) == 7 > QUICK.attempts

    story(work)


def test_an_ingest_of_an_earlier_attempt_is_resumed_and_a_wrong_one_replaced() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        client.store.ingests[f"layer-{digest_of(BIG)}"] = bytearray(BIG[:1_000_000])
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(BIG)] == BIG
        registry.add_image("lib/app", "two", layers=(BIG + b"x",))
        client.store.ingests[f"layer-{digest_of(BIG + b'x')}"] = bytearray(b"wrong" * 1000)
        await client.pull("lib/app:two")
        assert client.store.blobs[digest_of(BIG + b"x")] == BIG + b"x"

    story(work)


@pytest.mark.parametrize("status", [206, 416])
def test_a_server_that_cannot_go_on_is_asked_from_the_beginning(status: int) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        client.store.ingests[f"layer-{digest_of(BIG)}"] = bytearray(BIG[:1_000_000])

        async def hook(request: web.Request) -> web.Response | None:
            if "Range" not in request.headers:
                return None
            return web.Response(status=status, body=BIG[5:], headers={"Content-Range": f"bytes 5-{len(BIG) - 1}/{len(BIG)}"})

        registry.hooks.append(hook)
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(BIG)] == BIG
        assert any("trying again" in each.detail for each in client.events)

    story(work)


def test_a_partial_download_is_kept_for_the_next_pull_when_that_is_asked_for() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        hook, _ = cut_off(BIG, 1_500_000, 0, 0, 0)
        registry.hooks.append(hook)
        with pytest.raises(Unavailable):
            await client.pull("lib/app", keep_partial=True)
        assert client.store.ingests[f"layer-{digest_of(BIG)}"]
        registry.hooks.clear()
        registry.log.clear()
        await client.pull("lib/app")
        assert client.store.blobs[digest_of(BIG)] == BIG

    story(work)


# What a registry can do wrong.


async def fails(client: Client, kind: type[BoxshipError], *said: str, name: str = "lib/app") -> str:
    """Pulling fails in this way, says all this, and leaves nothing half done."""
    with pytest.raises(kind) as caught:
        await client.pull(name)
    text = str(caught.value)
    for word in (*said, client.registry.address):
        assert word in text, text
    assert not client.store.ingests and not client.store.busy
    for digest, data in client.store.blobs.items():
        assert digest_of(data) == digest
    return text


def answer_blob(data: bytes, make: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        return await make(request) if request.method == "GET" and digest_of(data) in request.path else None

    return hook


def test_content_that_is_not_its_digest_is_dropped() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        registry.blobs["lib/app"][digest_of(BIG)] = BIG[:-1] + bytes([BIG[-1] ^ 1])
        await fails(client, DataLoss, "does not match its digest", digest_of(BIG), "lib/app")
        assert len([path for path in registry.asked("GET") if digest_of(BIG) in path]) == 1

    story(work)


def test_a_truncated_blob_is_an_error() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))

        async def make(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(BIG[:100_000] if "Range" not in request.headers else b"")
            return response

        registry.hooks.append(answer_blob(BIG, make))
        await fails(client, Unavailable, f"of {len(BIG)} bytes")

    story(work)


@pytest.mark.parametrize("length", [100, len(BIG) + 1])
def test_a_manifest_that_lies_about_a_size_is_found_out(length: int) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        _, data = registry.manifests["lib/app"]["latest"]
        registry.add_manifest("lib/app", data.replace(f'"size": {len(BIG)}'.encode(), f'"size": {length}'.encode()), "latest")
        await fails(client, DataLoss, f"the registry has {len(BIG)} bytes, the manifest says {length}")

    story(work)


def test_a_blob_without_end_is_stopped_at_its_size() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(b"tiny",))
        sent = 0

        async def make(request: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            for _ in range(1000):
                await response.write(bytes(100_000))
                sent += 100_000
            return response

        registry.hooks.append(answer_blob(b"tiny", make))
        await fails(client, DataLoss, "sends more than the 4 bytes")
        assert sent < 50_000_000

    story(work)


@pytest.mark.parametrize(("status", "kind", "said"), [
    (401, Unauthenticated, "pull access denied"), (403, PermissionDenied, "may not"), (404, NotFound, "404"), (418, InvalidArgument, "418"),
    (429, ResourceExhausted, "limits how often"), (500, Unavailable, "try again later"), (503, Unavailable, "503"),
])
@pytest.mark.parametrize("where", ["manifests", "blobs"])
def test_refusals_say_what_and_where(status: int, kind: type[BoxshipError], said: str, where: str) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")

        async def hook(request: web.Request) -> web.Response | None:
            return error(status, "SOMETHING", "the\nreason") if f"/{where}/" in request.path else None

        registry.hooks.append(hook)
        text = await fails(client, kind, said, "/lib/app")
        if where == "blobs":
            assert "SOMETHING: the reason" in text

    story(work)


def test_an_overloaded_registry_is_asked_again_when_it_says() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")
        answers = [error(429, "TOOMANYREQUESTS", **{"Retry-After": "1"}), error(503, "UNAVAILABLE")]

        async def hook(request: web.Request) -> web.Response | None:
            return answers.pop(0) if "/blobs/" in request.path and answers else None

        registry.hooks.append(hook)
        begin = asyncio.get_running_loop().time()
        await client.pull("lib/app")
        assert not answers
        assert asyncio.get_running_loop().time() - begin >= 1

    story(work)


def test_a_pause_that_is_too_long_is_not_waited_for() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")

        async def hook(request: web.Request) -> web.Response | None:
            return error(429, "TOOMANYREQUESTS", **{"Retry-After": "86400"})

        registry.hooks.append(hook)
        await fails(client, ResourceExhausted, "wait, or log in")
        assert len(registry.log) == 1

    story(work)


@pytest.mark.parametrize("kind", ["text/html", "application/json", ""])
def test_a_login_page_in_place_of_a_manifest_is_named(kind: str) -> None:
    async def work(registry: Registry, client: Client) -> None:
        async def hook(request: web.Request) -> web.Response:
            headers = {"Content-Type": kind} if kind else {}
            return web.Response(body=b"<html><title>Please log in</title>", headers=headers)

        registry.hooks.append(hook)
        with pytest.raises(DataLoss, match=r"Please log in.*is this a registry"):
            await client.pull("lib/app")
        assert not client.store.blobs

    story(work)


def test_html_in_place_of_a_blob_is_no_blob() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))

        async def make(request: web.Request) -> web.StreamResponse:
            return web.Response(text="<html>blocked", content_type="text/html")

        registry.hooks.append(answer_blob(BIG, make))
        await fails(client, DataLoss, "the manifest says")

    story(work)


@pytest.mark.parametrize("after", [-1, 0, 1_000_000])
def test_a_stalled_transfer_ends(after: int) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))

        async def make(request: web.Request) -> web.StreamResponse:
            if after < 0:
                await asyncio.sleep(15)
            response = web.StreamResponse(headers={"Content-Length": str(len(BIG))})
            await response.prepare(request)
            await response.write(BIG[:after])
            await asyncio.sleep(15)
            return response

        registry.hooks.append(answer_blob(BIG, make))
        begin = asyncio.get_running_loop().time()
        await fails(client, Unavailable, "no answer within" if after < 0 else "stalled after")
        assert asyncio.get_running_loop().time() - begin < 12

    story(work, limits=IMPATIENT)


def test_nobody_listening_is_said_plainly() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.address = "127.0.0.1:1"
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1/.*connect"):
            await client.pull("lib/app")

    story(work)


def test_a_reset_connection_is_tried_again_and_then_reported() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async def hook(request: web.Request) -> None:
            request.transport.abort()

        registry.hooks.append(hook)
        await fails(client, Unavailable, "the connection broke")
        assert QUICK.attempts <= len(registry.log) <= 2 * QUICK.attempts

    story(work)


def test_redirects_in_a_circle_end() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async def hook(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": request.path_qs + ("" if "?" in request.path_qs else "?a=b")})

        registry.hooks.append(hook)
        await fails(client, InvalidArgument, "in a circle")

        async def further(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": request.path + "x"})

        registry.hooks[:] = [further]
        await fails(client, InvalidArgument, "more than 10 redirects")

        async def elsewhere(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": "file:///etc/passwd"})

        registry.hooks[:] = [elsewhere]
        await fails(client, InvalidArgument, "no URL of HTTP")

    story(work)


def test_a_redirect_to_another_host_takes_no_credentials_along() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        seen: list[tuple[str, bool]] = []
        async with Registry() as storage:

            async def store(request: web.Request) -> web.Response:
                seen.append(("storage", "Authorization" in request.headers))
                return web.Response(body=BIG)

            async def hook(request: web.Request) -> web.Response | None:
                if "Authorization" not in request.headers:
                    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})
                if digest_of(BIG) in request.path and "moved" not in request.query:
                    return web.Response(status=307, headers={"Location": f"{request.path}?moved=1"})
                if digest_of(BIG) in request.path:
                    seen.append(("registry", True))
                    return web.Response(status=307, headers={"Location": f"http://{storage.address}/signed?key=secret"})
                return None

            storage.hooks.append(store)
            registry.hooks.append(hook)
            client.transport._credentials = Given(registry.address, Credentials("u", "p"))
            await client.pull("lib/app")
        assert seen == [("registry", True), ("storage", False)]

    story(work)


def test_a_manifest_without_end_is_refused() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async def hook(request: web.Request) -> web.StreamResponse:
            if request.method == "HEAD":
                return web.Response(status=405)
            response = web.StreamResponse(headers={"Content-Type": MANIFEST})
            response.enable_chunked_encoding()
            await response.prepare(request)
            for _ in range(200):
                await response.write(bytes(100_000))
            return response

        registry.hooks.append(hook)
        await fails(client, ResourceExhausted, "more than 4194304 bytes")

        async def promised(request: web.Request) -> web.Response:
            return web.Response(headers={"Content-Type": MANIFEST, "Content-Length": "99999999", "Docker-Content-Digest": digest_of(b"")})

        registry.hooks[:] = [promised]
        with pytest.raises(ResourceExhausted, match="a manifest of 99999999 bytes"):
            await client.pull("lib/app")

    story(work)


@pytest.mark.parametrize(("change", "said"), [
    (lambda data: data.replace(b'"schemaVersion": 2', b'"schemaVersion": 1'), "schemaVersion"),
    (lambda data: data.replace(b'"layers"', b'"manifests"'), "manifests"),
    (lambda data: data[:-5], "lib/app"),
    (lambda data: data.replace(b"sha256:", b"sha256:../", 1), "digest"),
    (lambda data: data.replace(MANIFEST.encode(), INDEX.encode(), 1), "mediaType"),
])
def test_a_manifest_that_is_none_is_refused(change: Callable[[bytes], bytes], said: str) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")
        _, data = registry.manifests["lib/app"]["latest"]
        registry.add_manifest("lib/app", change(data), "latest", media_type=MANIFEST)
        with pytest.raises(DataLoss, match=said):
            await client.pull("lib/app")
        assert not client.store.ingests

    story(work)


def test_a_tag_that_answers_with_other_bytes_than_it_promised_is_refused() -> None:
    async def work(registry: Registry, client: Client) -> None:
        image = registry.add_image("lib/app", "latest")
        other = registry.add_image("lib/app", "other", layers=(b"evil",))
        registry.manifests["lib/app"][image["digest"]] = registry.manifests["lib/app"][other["digest"]]
        with pytest.raises(DataLoss, match="does not match its digest"):
            await client.pull("lib/app")
        assert not client.store.blobs

    story(work)


def test_schema_1_is_refused_with_advice() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_manifest("lib/app", {"schemaVersion": 1}, "latest", media_type="application/vnd.docker.distribution.manifest.v1+prettyjws")
        with pytest.raises(InvalidArgument, match=r"no longer supported.*push the image again"):
            await client.pull("lib/app")

    story(work)


def test_warnings_are_told_once() -> None:
    told: list[tuple[str, str]] = []

    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")

        async def hook(request: web.Request) -> web.Response | None:
            if request.method != "HEAD":
                return None
            answer = await registry._manifest(request, "lib/app", "latest")
            answer.headers.add("Warning", '299 - "this repository \\"moves\\""')
            answer.headers.add("Warning", '199 - "not for us"')
            return answer

        registry.hooks.append(hook)
        await client.pull("lib/app")
        await client.pull("lib/app")
        assert told == [(registry.address, 'this repository "moves"')]

    story(work, warn=lambda host, text: told.append((host, text)))


# Credentials.


class TokenServer:
    """Gives tokens, and checks them for a registry."""

    def __init__(self, registry: Registry, *, lifetime: int = 300) -> None:
        self.registry = registry
        self.tokens: dict[str, str] = {}
        self.asked: list[str] = []
        self.lifetime = lifetime
        registry.hooks.append(self)

    async def __call__(self, request: web.Request) -> web.Response | None:
        if request.path == "/token":
            scope = " ".join(request.query.getall("scope", []))
            self.asked.append(scope)
            user = request.headers.get("Authorization", "")
            if not user and ("push" in scope or "private" in scope):
                return error(401, "UNAUTHORIZED", "who are you")
            token = f"token{len(self.asked)}"
            self.tokens[token] = scope
            return web.json_response({"token": token, "expires_in": self.lifetime})
        scope = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "), "")
        name = request.path.removeprefix("/v2/").rpartition("/manifests/" if "/manifests/" in request.path else "/blobs/")[0]
        needed = "pull" if request.method in ("GET", "HEAD") and "/uploads/" not in request.path else "push"
        if not any(part.startswith(f"repository:{name}:") and needed in part for part in scope.split()):
            challenge = f'Bearer realm="http://{self.registry.address}/token",service="here",scope="repository:{name}:{needed}"'
            return error(401, "UNAUTHORIZED", **{"WWW-Authenticate": challenge})
        return None


def test_tokens_are_fetched_for_what_is_done_and_used_again() -> None:
    async def work(registry: Registry, client: Client) -> None:
        server = TokenServer(registry)
        registry.add_image("lib/app", "latest", layers=(BIG, b"1", b"2"))
        target = await client.pull("lib/app")
        assert server.asked == ["repository:lib/app:pull"]
        with pytest.raises(PermissionDenied, match="who are you"):
            await client.push("lib/new", target, "latest")
        client.transport._credentials = Given(registry.address, Credentials("u", "p"))
        client.transport._authorizers.clear()
        await client.push("lib/new", target, "latest")
        assert registry.manifests["lib/new"]["latest"][1] == client.store.blobs[target.digest]
        assert any("repository:lib/app:pull" in scope and "repository:lib/new:pull,push" in scope for scope in server.asked), "cross-mount"

    story(work)


def test_tokens_that_expire_early_are_replaced() -> None:
    async def work(registry: Registry, client: Client) -> None:
        server = TokenServer(registry)
        registry.add_image("lib/app", "latest", layers=(b"1", b"2", b"3", b"4", b"5", b"6"))
        count = 0

        async def expire(request: web.Request) -> None:
            nonlocal count
            count += 1
            if count == 5:
                server.tokens.clear()

        registry.hooks.insert(0, expire)
        await client.pull("lib/app")
        assert len(server.asked) > 1

    story(work)


@pytest.mark.parametrize("password", ["right", "wrong"])
def test_basic_credentials(password: str) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")
        right = Credentials("u", "right").basic()

        async def hook(request: web.Request) -> web.Response | None:
            if request.headers.get("Authorization") != right:
                return error(401, "UNAUTHORIZED", **{"WWW-Authenticate": 'Basic realm="here"'})
            return None

        registry.hooks.append(hook)
        client.transport._credentials = Given(registry.address, Credentials("u", password))
        if password == "right":
            await client.pull("lib/app")
        else:
            await fails(client, Unauthenticated, "log in")
            assert len(registry.log) == 2

    story(work)


# Proxies.


def test_the_environments_proxy_is_used_but_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest")
        netrc = tmp_path / "netrc"
        netrc.write_text("machine registry.example login u password p\n")
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("http_proxy", f"http://me:secret@{registry.address}")
        seen: list[tuple[str, str, bool]] = []

        async def hook(request: web.Request) -> None:
            seen.append((request.headers["Host"], request.headers.get("Proxy-Authorization", ""), "Authorization" in request.headers))

        registry.hooks.append(hook)
        await client.pull("registry.example/lib/app")
        assert set(seen) == {("registry.example", Credentials("me", "secret").basic(), False)}
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        await client.pull("lib/app")
        monkeypatch.setenv("no_proxy", "example")
        with pytest.raises(Unavailable, match=r"no such host|connect"):
            await client.pull("registry.example/lib/app")

    story(work)


# Mirrors.


def test_a_mirror_is_asked_first_and_the_registry_when_it_fails() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async with Registry() as mirror:
            client.transport.configuration = Configuration(
                directories=(), plain_http=True, mirrors={registry.address: [f"http://{mirror.address}"]}
            )
            registry.add_image("lib/app", "latest", layers=(BIG, b"x"))
            mirror.add_image("lib/app", "latest", layers=(BIG, b"x"))
            await client.pull("lib/app")
            assert not registry.log
            assert all(path.endswith(f"?ns={registry.address.replace(':', '%3A')}") or "ns=" in path for _, path in mirror.log)
            mirror.blobs.clear()
            client.store.blobs.clear()
            await client.pull("lib/app")
            assert client.store.blobs[digest_of(BIG)] == BIG

            async def broken(request: web.Request) -> web.Response:
                return web.Response(status=500)

            mirror.hooks.append(broken)
            client.store.blobs.clear()
            await client.pull("lib/app")

    story(work)


def test_a_mirror_with_damaged_content_is_left_for_the_registry() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async with Registry() as mirror:
            client.transport.configuration = Configuration(
                directories=(), plain_http=True, mirrors={registry.address: [f"http://{mirror.address}"]}
            )
            for each in (registry, mirror):
                each.add_image("lib/app", "latest", layers=(BIG,))
            mirror.blobs["lib/app"][digest_of(BIG)] = bytes(len(BIG))
            await client.pull("lib/app")
            assert client.store.blobs[digest_of(BIG)] == BIG

    story(work)


def test_credentials_of_the_registry_do_not_go_to_its_mirror() -> None:
    async def work(registry: Registry, client: Client) -> None:
        async with Registry() as mirror:
            seen: list[str] = []

            async def greedy(request: web.Request) -> web.Response:
                seen.append(request.headers.get("Authorization", ""))
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="give"'})

            mirror.hooks.append(greedy)
            client.transport.configuration = Configuration(
                directories=(), plain_http=True, mirrors={registry.address: [f"http://{mirror.address}"]}
            )
            client.transport._credentials = Given(registry.address, Credentials("u", "p"))
            registry.add_image("lib/app", "latest")
            await client.pull("lib/app")
            assert seen and not any(seen)

    story(work)


# Pushing.


async def stored(client: Client, registry: Registry, layers: tuple[bytes, ...]) -> Descriptor:
    """An image in the store, of which this registry has nothing."""
    registry.add_image("made/up", "latest", layers=layers)
    target = await client.pull("made/up")
    registry.blobs.clear()
    registry.manifests.clear()
    registry.log.clear()
    client.store.tags.clear()
    return target


def test_content_is_pushed_before_what_refers_to_it() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG, b"small"))
        await client.push("lib/new", target, "v1")
        assert registry.blobs["lib/new"][digest_of(BIG)] == BIG
        assert registry.manifests["lib/new"]["v1"][1] == client.store.blobs[target.digest]
        assert not registry.uploads
        assert registry.log[-1][0] == "PUT" and "/manifests/v1" in registry.log[-1][1]
        done = [each for each in client.told("uploading") if each.name == f"layer-{digest_of(BIG)}"]
        assert done and done[-1].total == len(BIG)

    story(work)


def test_what_the_registry_has_is_not_sent_again() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))
        await client.push("lib/new", target, "v1")
        registry.log.clear()
        await client.push("lib/new", target, "v2")
        assert [verb for verb, _ in registry.log] == ["HEAD", "HEAD", "PUT"]

    story(work)


def test_blobs_are_mounted_from_where_they_came() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        target = await client.pull("lib/app")
        await client.push("lib/new", target, "v1")
        assert {each.detail for each in client.told("mounted")} == {"lib/app"}
        assert not registry.asked("PATCH") and len(registry.asked("PUT")) == 1

    story(work)


def test_a_mount_that_is_refused_becomes_an_upload() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.add_image("lib/app", "latest", layers=(BIG,))
        target = await client.pull("lib/app")
        registry.blobs.clear()
        await client.push("lib/new", target, "v1")
        assert registry.blobs["lib/new"][digest_of(BIG)] == BIG
        registry.blobs.clear()

        async def hook(request: web.Request) -> web.Response | None:
            return error(403, "DENIED") if "mount" in request.query else None

        registry.hooks.append(hook)
        await client.push("lib/third", target, "v1")
        assert registry.blobs["lib/third"][digest_of(BIG)] == BIG

    story(work)


def test_chunks_are_as_long_as_the_registry_wants() -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.minimum = 1_000_000
        target = await stored(client, registry, (BIG,))
        await client.push("lib/new", target, "v1", chunk=10)
        assert registry.blobs["lib/new"][digest_of(BIG)] == BIG
        assert len(registry.asked("PATCH")) == 3 + 1

    story(work)


def test_a_chunk_out_of_order_is_put_right() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))
        lost = True

        async def hook(request: web.Request) -> web.Response | None:
            nonlocal lost
            if request.method == "PATCH" and lost and request.headers["Content-Range"].startswith("1000000-"):
                lost = False
                name = request.path.rpartition("/")[2]
                del registry.uploads[name][600_000:]
            return None

        registry.hooks.append(hook)
        await client.push("lib/new", target, "v1", chunk=1_000_000)
        assert not lost
        assert registry.blobs["lib/new"][digest_of(BIG)] == BIG

    story(work)


def test_an_upload_that_breaks_goes_on_where_it_stopped() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))
        broken = False

        async def hook(request: web.Request) -> None:
            nonlocal broken
            if request.method == "PUT" and "/uploads/" in request.path and int(request.headers["Content-Length"]) > 1000 and not broken:
                broken = True
                registry.uploads[request.path.rpartition("/")[2]] += await request.content.readexactly(1_000_000)
                request.transport.abort()

        registry.hooks.append(hook)
        await client.push("lib/new", target, "v1")
        assert broken
        assert registry.blobs["lib/new"][digest_of(BIG)] == BIG
        assert registry.asked("PATCH")

    story(work)


def test_an_upload_to_a_registry_that_takes_nothing_ends() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (os.urandom(30_000_000),))

        async def hook(request: web.Request) -> None:
            if request.method in ("PUT", "PATCH"):
                await asyncio.sleep(15)

        registry.hooks.append(hook)
        with pytest.raises(Unavailable):
            await client.push("lib/new", target, "v1")

    story(work, limits=IMPATIENT)


def test_a_failed_upload_is_cancelled() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))

        async def hook(request: web.Request) -> web.Response | None:
            return error(400, "DIGEST_INVALID") if request.method == "PUT" else None

        registry.hooks.append(hook)
        with pytest.raises(InvalidArgument, match="DIGEST_INVALID"):
            await client.push("lib/new", target, "v1")
        assert not registry.uploads

    story(work)


@pytest.mark.parametrize("location", ["", "http://[::1", "file:///etc/passwd", "http://a:99999/"])
def test_an_upload_to_no_place_is_refused(location: str) -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))

        async def hook(request: web.Request) -> web.Response | None:
            return web.Response(status=202, headers={"Location": location}) if request.method == "POST" else None

        registry.hooks.append(hook)
        with pytest.raises(DataLoss, match="Location"):
            await client.push("lib/new", target, "v1")

    story(work)


def test_an_index_is_pushed_whole_when_it_is_here_and_as_one_image_otherwise() -> None:
    async def work(registry: Registry, client: Client) -> None:
        images = [registry.add_image("lib/app", "", layers=(name.encode(),), architecture=name) for name in ("arm64", "amd64")]
        registry.add_manifest("lib/app", {"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, "latest")
        target = await client.pull("lib/app", "linux/amd64")
        pushed = await client.push("lib/one", target, "v1")
        assert pushed.digest == images[1]["digest"]
        assert registry.manifests["lib/one"]["v1"][0] == MANIFEST
        await client.pull("lib/app", "")
        pushed = await client.push("lib/both", target, "v1")
        assert pushed.digest == target.digest
        assert {image["digest"] for image in images} < set(registry.manifests["lib/both"])
        pushed = await client.push("lib/arm", target, "v1", wanted=[platforms.parse("linux/arm64")])
        assert pushed.digest == images[0]["digest"]

    story(work)


def test_missing_content_is_not_pushed() -> None:
    async def work(registry: Registry, client: Client) -> None:
        target = await stored(client, registry, (BIG,))
        del client.store.blobs[digest_of(BIG)]
        with pytest.raises(NotFound, match=digest_of(BIG)):
            await client.push("lib/new", target, "v1")
        assert "v1" not in registry.manifests.get("lib/new", {})

    story(work)


# Lists.


def test_tags_come_page_by_page() -> None:
    async def work(registry: Registry, client: Client) -> None:
        for tag in "abcde":
            registry.add_image("lib/app", tag)
        assert await client.repository("lib/app").tags() == ["a", "b", "c", "d", "e"]

    story(work)


@pytest.mark.parametrize("known", [True, False])
def test_referrers_are_found_with_and_without_the_api(known: bool) -> None:
    async def work(registry: Registry, client: Client) -> None:
        image = registry.add_image("lib/app", "latest")
        repository = client.repository("lib/app")
        registry.add_blob("lib/app", b"{}")
        for number, kind in enumerate(("application/x.sbom", "application/x.signature", "application/x.signature")):
            document = {
                "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "annotations": {"number": str(number)},
                "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"), "layers": [],
                "subject": {key: image[key] for key in ("mediaType", "digest", "size")},
            }
            await repository.push_manifest(json.dumps(document).encode(), MANIFEST, [])
        found = await repository.referrers(image["digest"])
        assert sorted(each.annotations["number"] for each in found) == ["0", "1", "2"]
        found = await repository.referrers(image["digest"], "application/x.signature")
        assert sorted(each.annotations["number"] for each in found) == ["1", "2"]
        assert (referrers_tag(image["digest"]) in registry.manifests["lib/app"]) is not known
        assert await repository.referrers(digest_of(b"nobody")) == []

    story(work, Registry(referrers=known))


@pytest.mark.parametrize("many", [True, False])
def test_several_tags_are_pushed_at_once_where_the_registry_can(many: bool) -> None:
    async def work(registry: Registry, client: Client) -> None:
        registry.many_tags = many
        target = await stored(client, registry, (b"x",))
        await client.push("lib/new", target, "1.2.3", "1.2", "1")
        assert {"1.2.3", "1.2", "1"} < set(registry.manifests["lib/new"])
        assert len([path for path in registry.asked("PUT") if "/manifests/" in path]) == (1 if many else 4)

    story(work)


