"""Images moved by us into and out of a real containerd by its address: what the engine does when it is given one."""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.api.containerd.client import connect
from boxship.api.containerd.services import Containerd
from boxship.images import media
from boxship.images.export import Saved
from boxship.images.hosts import Configuration
from boxship.images.service import blobs
from boxship.images.transfer import Config, Images
from boxship.kit.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound, Unavailable
from support.archives import OCI_LAYER, Layout, digest_of, layer, old_docker
from support.peers import needs
from support.registry import Registry
from support.stage import Stage

ONE, TWO = layer(etc__one=b"1" * 2000, usr__big=os.urandom(3_000_000)), layer(etc__two=b"2")


@pytest.fixture(scope="module")
def address(stage: Stage) -> Iterator[str]:
    needs("containerd", "ctr")
    (stage.directory / "config.toml").write_text(
        'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
    )
    socket = stage.directory / "containerd.sock"
    daemon = stage.start("containerd", "--config", stage.directory / "config.toml", "--address", socket, "--root", stage.directory / "root",
                         "--state", stage.directory / "state", log=stage.directory / "containerd.log")
    stage.eventually(lambda: stage.run("ctr", "--address", socket, "version", check=False).returncode == 0, why="containerd answering")
    yield str(socket)
    stage.stop(daemon)


def story(address: str, work: Callable[[Images, Containerd, Call], Awaitable[None]], request: pytest.FixtureRequest) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), connect(address) as containerd:
            namespace = "t" + str(abs(hash(request.node.name)))[:10]
            await containerd.namespaces.Create(pb.namespaces.CreateNamespaceRequest(namespace=pb.namespaces.Namespace(name=namespace)), Call(namespace))
            config = Config(Configuration(directories=(), plain_http=True), snapshotter="native")
            await work(Images(containerd, config), containerd, Call(namespace))
            leases = (await containerd.leases.List(pb.leases.ListRequest(), Call(namespace))).leases
            assert not leases

    asyncio.run(run())


async def names(containerd: Containerd, call: Call) -> list[str]:
    return sorted(each.name for each in (await containerd.images.List(pb.images.ListImagesRequest(), call)).images)


async def snapshots(containerd: Containerd, call: Call) -> list[str]:
    request = pb.snapshots.ListSnapshotsRequest(snapshotter="native")
    return [info.name async for page in containerd.snapshots.List(request, call) for info in page.info]


def test_an_archive_in_and_out(address: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    async def work(images: Images, containerd: Containerd, call: Call) -> None:
        path = tmp_path / "image.tar"
        path.write_bytes(old_docker([(["app:1"], [ONE, TWO])]))
        [loaded] = await images.load(str(path), call)
        assert loaded.name == "docker.io/library/app:1"
        assert await names(containerd, call) == [loaded.name]
        assert digest_of(ONE) in await snapshots(containerd, call)
        data = b"".join([piece async for piece in images.save([Saved(loaded.target, [loaded.name])], call)])
        (tmp_path / "again.tar").write_bytes(data)
        [again] = await images.load(str(tmp_path / "again.tar"), call)
        assert again.target.digest == loaded.target.digest
        assert await images.target("app:1", call) == await images.target(loaded.name, call)

    story(address, work, request)


def test_a_pull_and_a_push(address: str, request: pytest.FixtureRequest) -> None:
    async def work(images: Images, containerd: Containerd, call: Call) -> None:
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (ONE, TWO))
            name = f"{registry.address}/lib/app:1"
            target = await images.pull(name, call)
            assert await names(containerd, call) == [name]
            store = blobs(containerd.content, call)
            labels = await store.labels(target.digest)
            assert labels[f"{media.GC_CONTENT}.l.0"] == digest_of(ONE)
            assert (await store.labels(digest_of(ONE)))[media.UNCOMPRESSED] == digest_of(ONE)
            assert b"".join([chunk async for chunk in store.stream(digest_of(ONE), 1000)]) == ONE[1000:]
            await images.push(name, call, to=f"{registry.address}/other/app:2")
            assert "2" in registry.manifests["other/app"]

    story(address, work, request)


def test_failures_leave_nothing(address: str, request: pytest.FixtureRequest) -> None:
    async def work(images: Images, containerd: Containerd, call: Call) -> None:
        # Of its own: what another namespace has brought is not fetched.
        own = layer(own=os.urandom(100_000))
        async with Registry() as registry:
            registry.add_image("lib/app", "1", (own,))
            registry.blobs["lib/app"][digest_of(own)] = own[:-1] + b"x"
            with pytest.raises(DataLoss):
                await images.pull(f"{registry.address}/lib/app:1", call)
            layout = Layout()
            layout.name(layout.image([own], lambda data: gzip.compress(TWO, mtime=0), OCI_LAYER + "+gzip"), "1", "example.com/app:1")

            async def source():  # type: ignore[no-untyped-def]
                yield layout.tar()

            with pytest.raises(DataLoss, match="wrong diff id"):
                await images.load(source(), call)
        assert await names(containerd, call) == []
        assert await snapshots(containerd, call) == []
        statuses = (await containerd.content.ListStatuses(pb.content.ListStatusesRequest(), call)).statuses
        assert not statuses

    story(address, work, request)


def test_an_ingest_is_held_resumed_begun_again_and_dropped(address: str, request: pytest.FixtureRequest) -> None:
    async def work(images: Images, containerd: Containerd, call: Call) -> None:
        store = blobs(containerd.content, call)
        data = os.urandom(2_500_000)
        async with await store.writer("mine", len(data)) as writer:
            await writer.write(data[:1_500_000])
            with pytest.raises(Unavailable):
                await store.writer("mine", len(data))
        async with await store.writer("mine", len(data)) as writer:
            assert writer.offset == 1_500_000
            await writer.write(data[1_500_000:])
            assert await writer.commit(len(data), digest_of(data), {"a": "b"}) == digest_of(data)
        assert await store.size(digest_of(data)) == len(data)
        assert (await store.labels(digest_of(data)))["a"] == "b"
        with pytest.raises(AlreadyExists):
            await store.writer("again", len(data), digest_of(data))
        async with await store.writer("other") as writer:
            await writer.write(b"wrong")
            await writer.truncate(0)
            await writer.write(b"right")
            with pytest.raises(FailedPrecondition):
                await writer.commit(5, digest_of(b"wrong"))
        await store.abort("other")
        await store.abort("other")
        with pytest.raises(NotFound):
            await store.size(digest_of(b"right"))

    story(address, work, request)
