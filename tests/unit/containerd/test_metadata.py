"""Content, records, leases and their collection, over a database and files in a temporary folder."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.events import Exchange
from boxship.containerd.metadata.content import Content
from boxship.containerd.metadata.database import Database
from boxship.containerd.metadata.gc import Collector
from boxship.containerd.metadata.leases import Leases
from boxship.containerd.metadata.records import Containers, Images
from boxship.images.content import ContentStore
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from boxship.oci import digest as digests

CALL, OTHER = Call("one"), Call("two")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Any]:
    database, files, exchange = Database(str(tmp_path / "meta.db")), ContentStore(str(tmp_path / "content")), Exchange()

    async def nothing() -> None:
        """A collection that is asked for and not waited for."""

    def collect(sync: bool = False) -> Any:
        return nothing() if sync else None

    collector = Collector(database, files, {})
    yield SimpleNamespace(
        database=database, files=files, collector=collector, containers=Containers(database, exchange),
        images=Images(database, exchange, collect), content=Content(database, files, exchange, collect),
        leases=Leases(database, collect, list),
    )
    database.close()


def put(daemon: Any, data: bytes, call: Call = CALL, labels: dict[str, str] | None = None) -> str:
    digest = digests.of(data)
    writer = daemon.content.store(call).writer(f"ref-{digest}", len(data), digest)
    if writer.offset == 0:
        writer.write(data)
    writer.commit(len(data), digest, labels)
    writer.close()
    return digest


def image(name: str, digest: str, **labels: str) -> Any:
    return pb.images.CreateImageRequest(image=pb.images.Image(
        name=name, labels=labels, target=pb.types.Descriptor(digest=digest, size=1, media_type="m")))


def test_what_an_image_refers_to_stays_and_the_rest_goes(daemon: Any) -> None:
    layer = put(daemon, b"layer")
    manifest = put(daemon, b"manifest", labels={"containerd.io/gc.ref.content.l.0": layer})
    stray = put(daemon, b"stray")
    asyncio.run(daemon.images.Create(image("i", manifest), CALL))
    daemon.collector.collect()
    assert {info.digest for info in daemon.files.walk()} == {layer, manifest}
    with pytest.raises(NotFound):
        daemon.content.store(CALL).info(stray)
    asyncio.run(daemon.images.Delete(pb.images.DeleteImageRequest(name="i"), CALL))
    daemon.collector.collect()
    assert list(daemon.files.walk()) == []


def test_a_lease_keeps_what_was_made_under_it(daemon: Any) -> None:
    asyncio.run(daemon.leases.Create(pb.leases.CreateRequest(id="l"), CALL))
    digest = put(daemon, b"data", Call("one", "l"))
    daemon.collector.collect()
    assert daemon.content.store(CALL).info(digest).size == 4
    asyncio.run(daemon.leases.Delete(pb.leases.DeleteRequest(id="l"), CALL))
    daemon.collector.collect()
    assert list(daemon.files.walk()) == []


def test_an_expired_lease_is_none(daemon: Any) -> None:
    labels = {"containerd.io/gc.expire": "2001-02-03T04:05:06Z"}
    asyncio.run(daemon.leases.Create(pb.leases.CreateRequest(id="l", labels=labels), CALL))
    put(daemon, b"data", Call("one", "l"))
    daemon.collector.collect()
    assert list(daemon.files.walk()) == []
    assert list(asyncio.run(daemon.leases.List(pb.leases.ListRequest(), CALL)).leases) == []


def test_content_is_one_file_and_each_namespace_its_own(daemon: Any) -> None:
    root = {"containerd.io/gc.root": "1"}
    digest = put(daemon, b"data", CALL, root)
    with pytest.raises(NotFound):
        daemon.content.store(OTHER).info(digest)
    writer = daemon.content.store(OTHER).writer("r", 4, digest)
    assert writer.offset == 4
    writer.commit(4, digest, root)
    assert [info.digest for info in daemon.files.walk()] == [digest]
    daemon.content.store(CALL).delete(digest)
    daemon.collector.collect()
    assert daemon.content.store(OTHER).info(digest).size == 4


def test_what_is_there_is_not_brought_again(daemon: Any) -> None:
    put(daemon, b"data")
    with pytest.raises(AlreadyExists):
        put(daemon, b"data")


def test_labels_are_set_one_by_one_and_bounded(daemon: Any) -> None:
    digest = put(daemon, b"data", labels={"a": "1", "b": "2"})
    store = daemon.content.store(CALL)
    store.set_labels(digest, {"a": "", "c": "3"})
    assert store.labels(digest) == {"b": "2", "c": "3"}
    request = pb.content.UpdateRequest(info=pb.content.Info(digest=digest, labels={"b": "4"}))
    request.update_mask.paths.append("labels.b")
    asyncio.run(daemon.content.Update(request, CALL))
    assert store.labels(digest) == {"b": "4", "c": "3"}
    with pytest.raises(InvalidArgument):
        store.set_labels(digest, {"long": "x" * 5000})


async def _write(daemon: Any, *messages: Any) -> list[Any]:
    async def requests() -> AsyncIterator[Any]:
        for message in messages:
            yield message

    return [answer async for answer in daemon.content.Write(requests(), CALL)]


def test_a_write_is_answered_message_by_message(daemon: Any) -> None:
    digest = digests.of(b"hello world")
    write = pb.content.WriteContentRequest
    answers = asyncio.run(_write(
        daemon, write(action=pb.content.STAT, ref="r", total=11), write(action=pb.content.WRITE, data=b"hello "),
        write(action=pb.content.WRITE, offset=6, data=b"world"), write(action=pb.content.COMMIT, offset=11, expected=digest)))
    assert [answer.offset for answer in answers] == [0, 6, 11, 11]
    assert answers[-1].digest == digest
    assert daemon.content.store(CALL).info(digest).size == 11


def test_a_record_is_there_once(daemon: Any) -> None:
    request = pb.containers.CreateContainerRequest()
    request.container.id, request.container.runtime.name = "c", "io.containerd.runc.v2"
    with pytest.raises(InvalidArgument, match="Spec must be set"):
        asyncio.run(daemon.containers.Create(request, CALL))
    request.container.spec.type_url = "x"
    asyncio.run(daemon.containers.Create(request, CALL))
    with pytest.raises(AlreadyExists):
        asyncio.run(daemon.containers.Create(request, CALL))
    with pytest.raises(FailedPrecondition, match="it still has containers"):
        daemon.database.delete("one")
    asyncio.run(daemon.containers.Delete(pb.containers.DeleteContainerRequest(id="c"), CALL))
    daemon.database.delete("one")
    with pytest.raises(NotFound):
        daemon.database.delete("one")


def test_check_finds_what_was_spoilt(daemon: Any) -> None:
    digest = put(daemon, b"data", labels={"containerd.io/gc.root": "1"})
    assert daemon.collector.check() == []
    path = Path(daemon.files.path(digest))
    path.chmod(0o600)
    path.write_bytes(b"tada")
    assert "not that content any more" in daemon.collector.check()[0]
    path.unlink()
    assert "is lost" in daemon.collector.check()[0]
    daemon.collector.reconcile()
    assert daemon.collector.check() == []
