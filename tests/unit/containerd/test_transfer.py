"""The transfer and streaming services: pull, push, import, export and tag as a client of containerd 2.x asks for them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from boxship.api.any import pack, unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.streaming import DATA_MAX, WINDOW, Streaming, Streams
from boxship.containerd.transfer import Transfer
from boxship.images.auth import Credentials
from boxship.images.hosts import Configuration
from boxship.images.transfer import OWNER_LABEL, Config, Images
from boxship.images.transport import Limits
from boxship.kit.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from support import services
from support.archives import OCI_LAYER, Layout, digest_of, layer, old_docker
from support.registry import INDEX, Registry, error

ONE, TWO = layer(etc__one=b"1" * 2000, big=os.urandom(300_000)), layer(etc__two=b"2")
CALL = Call("default")
AMD64 = pb.types.Platform(os="linux", architecture="amd64")
Message = AnyMessage


class Peer:
    """A client's end of a stream."""

    def __init__(self, streaming: Streaming, name: str) -> None:
        self.name = name
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._answers = streaming.Stream(self._requests(), CALL)

    async def _requests(self) -> AsyncIterator[Message]:
        yield pack(pb.streaming.StreamInit(id=self.name))
        while (message := await self._queue.get()) is not None:
            yield message

    async def open(self) -> Peer:
        assert isinstance(unpack(await anext(self._answers)), Empty)
        return self

    async def receive(self) -> object:
        """The next message, None at the end."""
        try:
            return unpack(await anext(self._answers))
        except StopAsyncIteration:
            return None

    async def everything(self) -> list[object]:
        found = []
        while (message := await self.receive()) is not None:
            found.append(message)
        return found

    def send(self, message: object) -> None:
        self._queue.put_nowait(pack(message))

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def send_bytes(self, data: bytes) -> None:
        """As containerd's client: no more than the window lets it."""
        allowed = 0
        while data:
            while allowed <= 0:
                message = await self.receive()
                if message is None:
                    return
                allowed += message.update
            part = data[:min(DATA_MAX, allowed)]
            self.send(pb.transfer_streaming.Data(data=part))
            allowed -= len(part)
            data = data[len(part):]
        self.end()

    async def receive_bytes(self) -> bytes:
        window, found = 0, b""
        while True:
            if window < 65536:
                self.send(pb.transfer_streaming.WindowUpdate(update=65536))
                window += 65536
            message = await self.receive()
            if message is None:
                return found
            assert 0 < len(message.data) <= DATA_MAX
            window -= len(message.data)
            assert window >= 0, "more than the window lets it"
            found += message.data


class Client:
    def __init__(self) -> None:
        self.services = services.containerd()
        streams = Streams()
        self.streaming = Streaming(streams)
        configuration = Configuration(directories=(), plain_http=True)
        limits = Limits(connect_s=2, stall_s=2, attempts=2, backoff_s=0.01)
        self.transfer = Transfer(Images(self.services, Config(configuration, limits)), streams)
        self.store = self.services.content.store(CALL)

    async def stream(self, name: str) -> Peer:
        return await Peer(self.streaming, name).open()

    async def __call__(self, source: object, destination: object, progress: str = "", call: Call = CALL) -> None:
        options = pb.transfer.TransferOptions(progress_stream=progress)
        await self.transfer.Transfer(pb.transfer.TransferRequest(source=pack(source), destination=pack(destination), options=options), call)

    async def load(self, data: bytes, store: object, **fields: object) -> None:
        peer = await self.stream("archive")
        sending = asyncio.ensure_future(peer.send_bytes(data))
        try:
            await self(pb.transfer_importexport.ImageImportStream(stream="archive", **fields), store)
        finally:
            await sending
            await peer.everything()

    def names(self) -> list[str]:
        return self.services.images.names()


def story(work: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(10):
            client = Client()
            await work(client)
            assert client.services.leases.held == {}, "a lease is left"
            assert not client.store.ingests and not client.store.busy
            assert not client.services.snapshots.active, "an active snapshot is left"

    asyncio.run(run())


def registry_of(name: str, **resolver: object) -> object:
    return pb.transfer_registry.OCIRegistry(reference=name, resolver=pb.transfer_registry.RegistryResolver(**resolver))


def image_store(name: str = "", **fields: object) -> object:
    return pb.transfer_imagestore.ImageStore(name=name, **fields)


def prefix(name: str, **fields: bool) -> object:
    return pb.transfer_imagestore.ImageReference(name=name, is_prefix=True, **fields)


UNPACK = pb.transfer_imagestore.UnpackConfiguration(platform=AMD64, snapshotter="overlayfs")


# Pull and push.


def test_a_pull_stores_names_and_unpacks() -> None:
    async def work(client: Client) -> None:
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (ONE, TWO))
            name = f"{registry.address}/lib/app:1"
            await client(registry_of(name), image_store(name, platforms=[AMD64], unpacks=[UNPACK], labels={"a": "b"}))
        assert client.names() == [name]
        record = client.services.images.records["default", name]
        assert dict(record.labels) == {"a": "b"}
        snapshots = client.services.snapshots.committed
        bottom = digest_of(ONE)
        [top] = [each for each in snapshots if each != bottom]
        assert snapshots[bottom][0] == "" and snapshots[top][0] == bottom
        assert snapshots[bottom][1]["containerd.io/snapshot.ref"] == bottom
        config = json.loads(client.store.blobs[record.target.digest])["config"]["digest"]
        assert client.store.tags[config]["containerd.io/gc.ref.snapshot.overlayfs"] == top
        assert client.store.tags[digest_of(TWO)]["containerd.io/uncompressed"] == digest_of(TWO)
        assert "" not in client.services.content.leases - {""} and len(client.services.content.leases) > 1, "everything under a lease"

    story(work)


def test_progress_tells_what_ctr_shows() -> None:
    async def work(client: Client) -> None:
        peer = await client.stream("progress")
        async with Registry() as registry:
            image = registry.add_image("lib/app", "1", (ONE,))
            name = f"{registry.address}/lib/app:1"
            await client(registry_of(name), image_store(name, platforms=[AMD64], unpacks=[UNPACK]), "progress")
        events = await peer.everything()
        lines = [each.event for each in events if not each.name]
        assert lines == [f"Resolving from OCI Registry ({name})", f"Completed pull from OCI Registry ({name})"]
        manifest = [each for each in events if each.name == f"manifest-{image['digest']}"]
        assert list(manifest[0].parents) == [name]
        of_layer = [each for each in events if each.name == f"layer-{digest_of(ONE)}"]
        words = [each.event for each in of_layer]
        assert words[0] == "waiting" and words[-1] == "extracted" and "complete" in words
        assert {each.total for each in of_layer} == {len(ONE)} and of_layer[0].desc.digest == digest_of(ONE)
        assert events[-2].event == "saved" and events[-2].name == name

    story(work)


def test_a_pull_of_several_platforms_and_of_all_metadata() -> None:
    async def work(client: Client) -> None:
        async with Registry() as registry:
            images = [registry.add_image("lib/app", "", (each.encode(),), architecture=each) for each in ("amd64", "arm64", "s390x")]
            registry.add_manifest("lib/app", {"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, "1")
            name = f"{registry.address}/lib/app:1"
            await client(registry_of(name), image_store(name, platforms=[AMD64], all_metadata=True))
            assert all(image["digest"] in client.store.blobs for image in images)
            assert digest_of(b"amd64") in client.store.blobs and digest_of(b"arm64") not in client.store.blobs
            await client(registry_of(name), image_store(name, platforms=[AMD64, pb.types.Platform(os="linux", architecture="arm64")]))
            assert digest_of(b"arm64") in client.store.blobs and digest_of(b"s390x") not in client.store.blobs
            await client(registry_of(name), image_store(name))
            assert digest_of(b"s390x") in client.store.blobs

    story(work)


def test_a_pull_that_fails_names_nothing() -> None:
    async def work(client: Client) -> None:
        peer = await client.stream("progress")
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (ONE,))
            registry.blobs["lib/app"][digest_of(ONE)] = ONE[:-1] + b"x"
            name = f"{registry.address}/lib/app:1"
            with pytest.raises(DataLoss):
                await client(registry_of(name), image_store(name, unpacks=[UNPACK]), "progress")
        assert client.names() == []
        assert not client.services.snapshots.committed
        assert (await peer.everything())[0].event.startswith("Resolving")

    story(work)


@pytest.mark.parametrize(("answer", "right"), [
    ({"authType": pb.transfer_registry.CREDENTIALS, "username": "u", "secret": "p"}, True),
    ({"authType": pb.transfer_registry.HEADER, "secret": Credentials("u", "p").basic()}, True),
    ({"authType": pb.transfer_registry.CREDENTIALS, "username": "u", "secret": "wrong"}, False), ({"authType": pb.transfer_registry.REFRESH}, False), (None, False),
])
def test_the_client_is_asked_for_credentials(answer: dict[str, object] | None, right: bool) -> None:
    async def work(client: Client) -> None:
        peer = await client.stream("creds")
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (ONE,))
            name = f"{registry.address}/lib/app:1"

            async def hook(request):  # type: ignore[no-untyped-def]
                if request.headers.get("Authorization") != Credentials("u", "p").basic():
                    return error(401, "UNAUTHORIZED", **{"WWW-Authenticate": 'Basic realm="here"'})
                return None

            registry.hooks.append(hook)

            async def reply() -> None:
                request = await peer.receive()
                assert (request.host, request.reference) == (registry.address, name)
                assert list(request.wwwauthenticate) == ['Basic realm="here"']
                if answer is None:
                    peer.end()
                else:
                    peer.send(pb.transfer_registry.AuthResponse(**answer))

            replying = asyncio.ensure_future(reply())
            pulling = client(registry_of(name, auth_stream="creds"), image_store(name))
            if right:
                await pulling
            else:
                with pytest.raises(Unauthenticated):
                    await pulling
            await replying
            assert (client.names() == [name]) is right

    story(work)


def test_headers_and_the_log_of_requests() -> None:
    async def work(client: Client) -> None:
        peer = await client.stream("logs")
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (ONE,))
            seen: list[str] = []

            async def hook(request) -> None:  # type: ignore[no-untyped-def]
                seen.append(request.headers.get("X-Mine", ""))

            registry.hooks.append(hook)
            name = f"{registry.address}/lib/app:1"
            reading = asyncio.ensure_future(peer.receive_bytes())
            await client(registry_of(name, headers={"X-Mine": "yes"}, logs_stream="logs", http_debug=pb.transfer_registry.DEBUG), image_store(name))
            assert set(seen) == {"yes"}
            assert f"HEAD http://{registry.address}/v2/lib/app/manifests/1: 200 OK" in (await reading).decode()

    story(work)


def test_a_push() -> None:
    async def work(client: Client) -> None:
        await client.load(old_docker([(["app:1"], [ONE, TWO])]), image_store(extra_references=[prefix("x", allow_overwrite=True)]))
        peer = await client.stream("progress")
        async with Registry() as registry:
            name = f"{registry.address}/new/app:2"
            await client(image_store("docker.io/library/app:1"), registry_of(name), "progress")
            assert registry.blobs["new/app"][digest_of(ONE)] == ONE
            assert "2" in registry.manifests["new/app"]
        events = [each.event for each in await peer.everything()]
        assert events[:2] == [f"Pushing to OCI Registry ({name})", "pushing content"]
        assert events[-2:] == ["pushed content", f"Completed push to OCI Registry ({name})"]
        with pytest.raises(NotFound):
            await client(image_store("nothing/here:1"), registry_of("registry.example/x:1"))

    story(work)


def test_what_a_process_held_that_is_gone_is_let_go() -> None:
    async def run() -> None:
        bundle = services.containerd()
        images = Images(bundle)
        bundle.leases.held["foreign"] = {}
        bundle.leases.held["dead"] = {OWNER_LABEL: f"{os.getpid()}.1.another-boot"}
        bundle.leases.held["gone"] = {OWNER_LABEL: "999999999.1.another-boot"}
        async with images.leased(CALL) as leased:
            assert await images.settle() == 2
            assert set(bundle.leases.held) == {"foreign", leased.lease}
        assert set(bundle.leases.held) == {"foreign"}

    asyncio.run(run())


# Archives.


@pytest.mark.parametrize(("references", "names"), [
    ([], []),
    ([prefix("import-x", allow_overwrite=True)], ["docker.io/library/app:1", "docker.io/library/app:2", "import-x:only-a-tag"]),
    ([prefix("docker.io/library/app")], ["docker.io/library/app:1", "docker.io/library/app:2", "docker.io/library/app:only-a-tag"]),
    ([prefix("docker.io/library/ap")], ["docker.io/library/ap:only-a-tag"]),
])
def test_the_names_of_what_is_imported(references: list[object], names: list[str]) -> None:
    async def work(client: Client) -> None:
        layout = Layout()
        image = layout.image([ONE])
        layout.name(image, "1", "docker.io/library/app:1")
        layout.name(image, "2", "docker.io/library/app:2")
        layout.name(layout.image([TWO]), "only-a-tag")
        await client.load(layout.tar(), image_store(extra_references=references))
        assert client.names() == names

    story(work)


def test_digests_as_names_and_the_index() -> None:
    async def work(client: Client) -> None:
        layout = Layout()
        image, other = layout.image([ONE]), layout.image([TWO])
        layout.name(image, "1", "docker.io/library/app:1")
        layout.name(other)
        await client.load(layout.tar(), image_store("my/index:1", extra_references=[prefix("p", allow_overwrite=True, add_digest=True, skip_named_digest=True)]))
        index = client.services.images.records["default", "my/index:1"].target.digest
        assert client.names() == sorted(["docker.io/library/app:1", "my/index:1", f"p@{other['digest']}", f"p@{index}"])
        labels = client.services.images.records["default", "docker.io/library/app:1"].labels
        assert labels["containerd.io/gc.bref.image"] == "my/index:1"

    story(work)


def test_an_import_unpacks() -> None:
    async def work(client: Client) -> None:
        await client.load(old_docker([(["app:1"], [ONE])]), image_store(extra_references=[prefix("x", allow_overwrite=True)], unpacks=[UNPACK]))
        assert set(client.services.snapshots.committed) == {digest_of(ONE)}

    story(work)


def test_a_layer_with_another_diff_id_is_not_committed() -> None:
    async def work(client: Client) -> None:
        layout = Layout()
        import gzip

        image = layout.image([ONE], lambda data: gzip.compress(TWO, mtime=0), OCI_LAYER + "+gzip")
        layout.name(image, "1", "docker.io/library/app:1")
        with pytest.raises(DataLoss, match="wrong diff id"):
            await client.load(layout.tar(), image_store(extra_references=[prefix("x", allow_overwrite=True)], unpacks=[UNPACK]))
        assert not client.services.snapshots.committed and client.names() == []

    story(work)


def test_a_broken_archive_is_refused_and_the_sender_is_told() -> None:
    async def work(client: Client) -> None:
        with pytest.raises(InvalidArgument):
            await client.load(os.urandom(3 * WINDOW), image_store(extra_references=[prefix("x")]))
        with pytest.raises(InvalidArgument):
            await client.load(old_docker([(["app:1"], [ONE])])[:200_000], image_store(extra_references=[prefix("x")]))

    story(work)


def test_an_export_is_imported_again() -> None:
    async def work(client: Client) -> None:
        store = image_store(extra_references=[prefix("x", allow_overwrite=True)])
        await client.load(old_docker([(["app:1"], [ONE, TWO]), (["other:1"], [TWO])]), store)
        peer = await client.stream("out")
        reading = asyncio.ensure_future(peer.receive_bytes())
        names = [pb.transfer_imagestore.ImageReference(name="docker.io/library/other:1")]
        await client(image_store("docker.io/library/app:1", extra_references=names), pb.transfer_importexport.ImageExportStream(stream="out"))
        data = await reading
        again = Client()
        await again.load(data, store)
        assert again.names() == client.names()
        for name in client.names():
            assert again.services.images.records["default", name].target.digest == client.services.images.records["default", name].target.digest

    story(work)


def test_an_export_to_a_client_that_leaves_ends() -> None:
    async def work(client: Client) -> None:
        await client.load(old_docker([(["app:1"], [ONE])]), image_store(extra_references=[prefix("x", allow_overwrite=True)]))
        peer = await client.stream("out")
        peer.end()
        reading = asyncio.ensure_future(peer.everything())
        with pytest.raises(Unavailable, match="closed the stream"):
            await client(image_store("docker.io/library/app:1"), pb.transfer_importexport.ImageExportStream(stream="out"))
        assert await reading == []

    story(work)


# Tags, and what there is not.


def test_a_tag() -> None:
    async def work(client: Client) -> None:
        await client.load(old_docker([(["app:1"], [ONE])]), image_store(extra_references=[prefix("x", allow_overwrite=True)]))
        await client(image_store("docker.io/library/app:1"), image_store("example.com/new:2", labels={"a": "b"}))
        assert client.names() == ["docker.io/library/app:1", "example.com/new:2"]
        with pytest.raises(NotFound):
            await client(image_store("nothing:1"), image_store("example.com/new:3"))

    story(work)


def test_other_pairs_are_not_implemented() -> None:
    async def work(client: Client) -> None:
        for source, destination in (
            (registry_of("a/b:1"), registry_of("c/d:1")), (image_store("a"), pb.transfer_container.ContainerPath(path="/")), (Empty(), image_store("a")),
        ):
            with pytest.raises(Unsupported, match="not implemented for"):
                await client(source, destination)
        with pytest.raises(FailedPrecondition, match="namespace"):
            await client(image_store("a"), image_store("b"), call=Call())
        with pytest.raises(NotFound, match="stream"):
            await client(pb.transfer_importexport.ImageImportStream(stream="gone"), image_store("b"))
        with pytest.raises(NotFound, match="stream"):
            await client(image_store("a"), image_store("b"), "gone")

    story(work)


def test_streams_have_names_of_their_own() -> None:
    async def work(client: Client) -> None:
        await client.stream("one")
        with pytest.raises(AlreadyExists):
            await client.stream("one")

        async def nothing() -> AsyncIterator[Message]:
            yield pack(Empty())

        with pytest.raises(InvalidArgument, match="StreamInit"):
            await anext(client.streaming.Stream(nothing(), CALL))

    story(work)
