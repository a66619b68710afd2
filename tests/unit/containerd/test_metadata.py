"""Content, records, leases, snapshots and their collection, over a database and files in a temporary folder."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.metadata import check
from boxship.containerd.metadata.database import Database
from boxship.images.store import Store
from boxship.kit.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from boxship.oci import digest as digests
from support.metadata import CALL, OTHER, ROOT, container, gathered, given, image, run

LEASED = Call("one", "l")
WRITE = pb.content.WriteContentRequest


async def lease(daemon, name="l", **labels):
    labels = {f"containerd.io/gc.{key}": value for key, value in labels.items()}
    await daemon.leases.Create(pb.leases.CreateRequest(id=name, labels=labels), CALL)


# Collection.


def test_what_an_image_refers_to_stays_and_the_rest_goes(tmp_path):
    async def work(daemon):
        layer = daemon.put(b"layer")
        manifest = daemon.put(b"manifest", labels={"containerd.io/gc.ref.content.l.0": layer})
        stray = daemon.put(b"stray")
        await daemon.images.Create(image("i", manifest), CALL)
        daemon.collector.collect()
        assert daemon.blobs() == {layer, manifest}
        with pytest.raises(NotFound):
            daemon.content.store(CALL).info(stray)
        await daemon.images.Delete(pb.images.DeleteImageRequest(name="i"), CALL)
        daemon.collector.collect()
        assert daemon.blobs() == set()

    run(tmp_path, work)


def test_a_lease_keeps_what_was_made_under_it(tmp_path):
    async def work(daemon):
        await lease(daemon)
        digest = daemon.put(b"data", LEASED)
        daemon.collector.collect()
        assert daemon.content.store(CALL).info(digest).size == 4
        await daemon.leases.Delete(pb.leases.DeleteRequest(id="l"), CALL)
        daemon.collector.collect()
        assert daemon.blobs() == set()

    run(tmp_path, work)


def test_a_lease_keeps_what_was_there_already_when_it_was_asked_for(tmp_path):
    async def work(daemon):
        await lease(daemon)
        digest = daemon.put(b"data")
        with pytest.raises(AlreadyExists):
            daemon.content.store(LEASED).writer("r", 4, digest)
        prepare = pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="a")
        await daemon.snapshots.Prepare(prepare, CALL)
        with pytest.raises(AlreadyExists):
            await daemon.snapshots.Prepare(prepare, LEASED)
        listed = await daemon.leases.ListResources(pb.leases.ListResourcesRequest(id="l"), CALL)
        assert [(each.type, each.id) for each in listed.resources] == [("content", digest), ("snapshots/native", "a")]
        daemon.collector.collect()
        assert daemon.blobs() == {digest}

    run(tmp_path, work)


def test_an_expired_lease_is_none(tmp_path):
    async def work(daemon):
        await lease(daemon, expire="2001-02-03T04:05:06Z")
        daemon.put(b"data", LEASED)
        daemon.collector.collect()
        assert daemon.blobs() == set()
        assert list((await daemon.leases.List(pb.leases.ListRequest(), CALL)).leases) == []

    run(tmp_path, work)


def test_a_flat_lease_keeps_no_more_than_it_holds(tmp_path):
    async def work(daemon):
        await lease(daemon, flat="1")
        layer = daemon.put(b"layer")
        held = daemon.put(b"manifest", LEASED, {"containerd.io/gc.ref.content.0": layer})
        daemon.collector.collect()
        assert daemon.blobs() == {held}

    run(tmp_path, work)


def test_a_container_keeps_its_snapshot_and_that_its_parents(tmp_path):
    async def work(daemon):
        prepare, commit = pb.snapshots.PrepareSnapshotRequest, pb.snapshots.CommitSnapshotRequest
        await daemon.snapshots.Prepare(prepare(snapshotter="native", key="k"), CALL)
        await daemon.snapshots.Commit(commit(snapshotter="native", key="k", name="base"), CALL)
        await daemon.snapshots.Prepare(prepare(snapshotter="native", key="root", parent="base"), CALL)
        await daemon.snapshots.Prepare(prepare(snapshotter="native", key="stray", parent="base"), CALL)
        await daemon.containers.Create(container("c", "root"), CALL)
        daemon.collector.collect()
        listed = await gathered(daemon.snapshots.List(pb.snapshots.ListSnapshotsRequest(snapshotter="native"), CALL))
        assert [(each.name, each.parent, each.kind) for message in listed for each in message.info] == [
            ("base", "", pb.snapshots.COMMITTED), ("root", "base", pb.snapshots.ACTIVE)]
        assert len(list(daemon.metadata.drivers["native"].walk())) == 2
        assert daemon.events[-1] == ("one", "/snapshot/remove")
        await daemon.containers.Delete(pb.containers.DeleteContainerRequest(id="c"), CALL)
        daemon.collector.collect()
        assert list(daemon.metadata.drivers["native"].walk()) == []
        assert daemon.metadata.check() == []

    run(tmp_path, work)


def test_a_back_reference_ties_a_child_to_its_parent(tmp_path):
    async def work(daemon):
        await daemon.containers.Create(container("c"), CALL)
        tied = daemon.put(b"tied", labels={"containerd.io/gc.bref.container": "c"})
        daemon.put(b"free", labels={"containerd.io/gc.bref.container": "d"})
        daemon.collector.collect()
        assert daemon.blobs() == {tied}

    run(tmp_path, work)


def test_what_is_written_while_it_is_marked_is_not_collected(tmp_path, monkeypatch):
    from boxship.containerd.metadata import gc

    async def work(daemon):
        late = []
        real = gc.Graph

        def graph(rows, at):
            made = real(rows, at)
            if not late:
                late.append(digests.of(b"late"))
                daemon.put(b"late", labels={"containerd.io/gc.ref.content": digest} | ROOT)
            return made

        monkeypatch.setattr(gc, "Graph", graph)
        digest = daemon.put(b"data")
        daemon.collector.collect()
        assert daemon.blobs() == {digest, late[0]}

    run(tmp_path, work)


def test_content_that_is_being_committed_is_not_garbage(tmp_path):
    async def work(daemon):
        digest = digests.of(b"data")
        writer = daemon.content.store(CALL).writer("r", 4, digest)
        writer.write(b"data")
        adopt = writer._content._adopt

        def collecting(*args):
            with daemon.database.lock:
                daemon.database.dirty.add("content")
            daemon.collector.collect()
            return adopt(*args)

        writer._content._adopt = collecting
        writer.commit(4, digest, ROOT)
        assert daemon.blobs() == {digest}

    run(tmp_path, work)


def test_collections_come_by_themselves_and_on_demand(tmp_path):
    async def work(daemon):
        daemon.metadata.scheduler.start()
        daemon.put(b"stray")
        digest = daemon.put(b"data")
        await daemon.images.Create(image("i", digest), CALL)
        async with asyncio.timeout(5):
            while daemon.blobs() != {digest}:
                await asyncio.sleep(0.01)
            await daemon.images.Delete(pb.images.DeleteImageRequest(name="i", sync=True), CALL)
        assert daemon.blobs() == set()

    run(tmp_path, work, {"gc": {"startup_delay": "10ms"}})


def test_the_settings_of_the_collector_are_checked(tmp_path):
    for table in ({"gc": {"speed": 1}}, {"gc": {"startup_delay": 5}}, {"content": {"sharing_policy": "free"}}):
        with pytest.raises(InvalidArgument):
            run(tmp_path, lambda _: asyncio.sleep(0), table)


# Content.


def test_the_content_of_a_namespace_is_what_images_ask_for(tmp_path):
    async def work(daemon):
        store: Store = daemon.content.store(CALL)
        assert callable(store.set_labels)

    run(tmp_path, work)


def test_content_is_one_file_and_each_namespace_its_own(tmp_path):
    async def work(daemon):
        digest = daemon.put(b"data", CALL, ROOT)
        with pytest.raises(NotFound):
            daemon.content.store(OTHER).open(digest)
        writer = daemon.content.store(OTHER).writer("r", 4, digest)
        assert writer.offset == 4
        daemon.content.store(CALL).delete(digest)
        daemon.collector.collect()
        writer.commit(4, digest, ROOT)
        assert daemon.blobs() == {digest}
        daemon.collector.collect()
        assert daemon.content.store(OTHER).info(digest).size == 4
        assert ("two", "/content/create") in daemon.events

    run(tmp_path, work)


def test_what_is_claimed_can_still_be_written_anew(tmp_path):
    async def work(daemon):
        digest = daemon.put(b"data", CALL, ROOT)
        writer = daemon.content.store(OTHER).writer("r", 4, digest)
        writer.truncate(2)
        assert writer.offset == 2
        writer.write(b"rum")
        writer.commit(5, digests.of(b"darum"), ROOT)
        assert daemon.blobs() == {digest, digests.of(b"darum")}

    run(tmp_path, work)


def test_isolated_namespaces_bring_their_content_themselves(tmp_path):
    async def work(daemon):
        digest = daemon.put(b"data", CALL, ROOT)
        writer = daemon.content.store(OTHER).writer("r", 4, digest)
        assert writer.offset == 0
        writer.close()
        daemon.put(b"data", OTHER)
        assert daemon.content.store(OTHER).info(digest).size == 4
        await daemon.namespaces.Update(pb.namespaces.UpdateNamespaceRequest(namespace=pb.namespaces.Namespace(
            name="one", labels={"containerd.io/namespace.shareable": "true"})), Call())
        assert daemon.content.store(Call("three")).writer("r", 4, digest).offset == 4

    run(tmp_path, work, {"content": {"sharing_policy": "isolated"}})


def test_labels_are_set_one_by_one_and_bounded(tmp_path):
    async def work(daemon):
        digest = daemon.put(b"data", labels={"a": "1", "b": "2"})
        store = daemon.content.store(CALL)
        store.set_labels(digest, {"a": "", "c": "3"})
        assert store.labels(digest) == {"b": "2", "c": "3"}
        request = pb.content.UpdateRequest(info=pb.content.Info(digest=digest, labels={"b": "4"}))
        request.update_mask.paths.append("labels.b")
        await daemon.content.Update(request, CALL)
        assert store.labels(digest) == {"b": "4", "c": "3"}
        request.update_mask.paths[:] = ["size"]
        with pytest.raises(InvalidArgument, match='cannot update "size" field'):
            await daemon.content.Update(request, CALL)
        with pytest.raises(InvalidArgument):
            store.set_labels(digest, {"long": "x" * 5000})

    run(tmp_path, work)


def test_a_write_is_answered_message_by_message(tmp_path):
    async def work(daemon):
        digest = digests.of(b"hello world")
        answers = await gathered(daemon.content.Write(given(
            WRITE(action=pb.content.STAT, ref="r", total=11), WRITE(action=pb.content.WRITE, data=b"hello "),
            WRITE(action=pb.content.WRITE, offset=6, data=b"world"),
            WRITE(action=pb.content.COMMIT, offset=11, expected=digest, labels={"a": "b"})), CALL))
        assert [answer.offset for answer in answers] == [0, 6, 11, 11]
        assert answers[-1].digest == digest
        info = (await daemon.content.Info(pb.content.InfoRequest(digest=digest), CALL)).info
        assert (info.size, dict(info.labels)) == (11, {"a": "b"})
        read = await gathered(daemon.content.Read(pb.content.ReadContentRequest(digest=digest, offset=6, size=100), CALL))
        assert b"".join(each.data for each in read) == b"world"
        with pytest.raises(OutOfRange):
            await gathered(daemon.content.Read(pb.content.ReadContentRequest(digest=digest, offset=12), CALL))

    run(tmp_path, work)


def test_a_write_that_breaks_off_is_resumed(tmp_path):
    async def work(daemon):
        await gathered(daemon.content.Write(given(WRITE(ref="r", action=pb.content.WRITE, data=b"x" * 100_000)), CALL))
        [status] = (await daemon.content.ListStatuses(pb.content.ListStatusesRequest(filters=["ref~=^r"]), CALL)).statuses
        assert (status.ref, status.offset) == ("r", 100_000)
        answers = await gathered(daemon.content.Write(given(
            WRITE(ref="r", action=pb.content.STAT), WRITE(action=pb.content.COMMIT, offset=100_001 - 1, data=b"y")), CALL))
        assert answers[0].digest == digests.of(b"x" * 100_000)
        assert answers[1].digest == digests.of(b"x" * 100_000 + b"y")

    run(tmp_path, work)


@pytest.mark.parametrize(("message", "error"), [
    (WRITE(action=pb.content.WRITE, offset=3, data=b"x"), OutOfRange),
    (WRITE(action=pb.content.COMMIT, offset=5, total=4), FailedPrecondition),
    (WRITE(action=pb.content.COMMIT, offset=5, expected="sha256:" + "0" * 64), FailedPrecondition),
    (WRITE(action=pb.content.COMMIT, offset=5, labels={"k": "x" * 5000}), InvalidArgument),
])
def test_a_write_that_does_not_fit_is_refused_and_the_ingest_stays(tmp_path, message, error):
    async def work(daemon):
        with pytest.raises(error):
            await gathered(daemon.content.Write(given(WRITE(ref="r", action=pb.content.WRITE, data=b"hello"), message), CALL))
        status = (await daemon.content.Status(pb.content.StatusRequest(ref="r"), CALL)).status
        assert status.offset == 5
        await daemon.content.Abort(pb.content.AbortRequest(ref="r"), CALL)
        with pytest.raises(NotFound):
            await daemon.content.Status(pb.content.StatusRequest(ref="r"), CALL)

    run(tmp_path, work)


def test_a_ref_has_one_writer_and_is_another_in_another_namespace(tmp_path):
    async def work(daemon):
        first = daemon.content.store(CALL).writer("r")
        with pytest.raises(Unavailable):
            daemon.content.store(CALL).writer("r")
        daemon.content.store(OTHER).writer("r").close()
        first.close()

    run(tmp_path, work)


def test_content_of_sha512_is_hashed_as_such(tmp_path):
    async def work(daemon):
        digest = digests.of(b"data", "sha512")
        writer = daemon.content.store(CALL).writer("r", 4, digest)
        writer.write(b"data")
        writer.commit(4, digest)
        assert daemon.content.store(CALL).info(digest).size == 4

    run(tmp_path, work)


# Records.


def test_a_container_is_there_once(tmp_path):
    async def work(daemon):
        request = container("c")
        request.container.ClearField("spec")
        with pytest.raises(InvalidArgument, match="Spec must be set"):
            await daemon.containers.Create(request, CALL)
        await daemon.containers.Create(container("c"), CALL)
        with pytest.raises(AlreadyExists):
            await daemon.containers.Create(container("c"), CALL)
        with pytest.raises(InvalidArgument):
            await daemon.containers.Create(container("x" * 77), CALL)
        with pytest.raises(FailedPrecondition, match="it still has containers"):
            daemon.database.delete("one")
        await daemon.containers.Delete(pb.containers.DeleteContainerRequest(id="c"), CALL)
        daemon.database.delete("one")
        with pytest.raises(NotFound):
            daemon.database.delete("one")

    run(tmp_path, work)


def test_an_update_changes_what_its_mask_names(tmp_path):
    async def work(daemon):
        await daemon.containers.Create(container("c", labels={"a.b": "1", "c": "2"}), CALL)
        request = pb.containers.UpdateContainerRequest(container=pb.containers.Container(id="c", image="i", labels={"a.b": "3"}))
        request.update_mask.paths.extend(["labels.a.b", "labels.c"])
        changed = (await daemon.containers.Update(request, CALL)).container
        assert (dict(changed.labels), changed.image) == ({"a.b": "3"}, "")
        request.update_mask.paths[:] = ["image"]
        assert (await daemon.containers.Update(request, CALL)).container.image == "i"
        request.update_mask.paths[:] = ["runtime"]
        with pytest.raises(InvalidArgument, match='cannot update "runtime" field'):
            await daemon.containers.Update(request, CALL)
        del request.update_mask.paths[:]
        with pytest.raises(InvalidArgument, match="Name field is immutable"):
            await daemon.containers.Update(request, CALL)
        for filters, names in ((['labels."a.b"==3'], ["c"]), (["labels.a.b==3,id==d"], []), (["image==i", "id==x"], ["c"])):
            listed = await daemon.containers.List(pb.containers.ListContainersRequest(filters=filters), CALL)
            assert [each.id for each in listed.containers] == names

    run(tmp_path, work)


def test_many_containers_are_listed_alike_by_both_ways(tmp_path):
    async def work(daemon):
        for number in range(30):
            await daemon.containers.Create(container(f"c{number:02}", labels={"long": "x" * (number * 10)}), CALL)
        listed = (await daemon.containers.List(pb.containers.ListContainersRequest(), CALL)).containers
        assert [each.id for each in listed] == [f"c{number:02}" for number in range(30)]
        filtered = (await daemon.containers.List(pb.containers.ListContainersRequest(filters=["id~=^c"]), CALL)).containers
        streamed = await gathered(daemon.containers.ListStream(pb.containers.ListContainersRequest(), CALL))
        assert list(listed) == list(filtered) == [message.container for message in streamed]

    run(tmp_path, work)


def test_an_image_is_deleted_only_with_the_target_that_was_meant(tmp_path):
    async def work(daemon):
        digest, other = daemon.put(b"a"), daemon.put(b"b")
        created = (await daemon.images.Create(image("i", digest, {"x": ""}), CALL)).image
        assert dict(created.labels) == {}
        request = pb.images.DeleteImageRequest(name="i", target=pb.types.Descriptor(digest=other))
        with pytest.raises(NotFound, match="has target"):
            await daemon.images.Delete(request, CALL)
        for wrong in (image("", digest), image("j", "sha256:x"), image("j", "")):
            with pytest.raises(InvalidArgument):
                await daemon.images.Create(wrong, CALL)

    run(tmp_path, work)


@pytest.mark.parametrize(("kind", "error"), [
    ("tasks", Unsupported), ("snapshots", InvalidArgument), ("snapshots/a/b", InvalidArgument), ("content/x", InvalidArgument),
    ("content", InvalidArgument),
])
def test_a_lease_holds_only_what_there_is(tmp_path, kind, error):
    async def work(daemon):
        await lease(daemon)
        request = pb.leases.AddResourceRequest(id="l", resource=pb.leases.Resource(id="x", type=kind))
        with pytest.raises(error):
            await daemon.leases.AddResource(request, CALL)
        with pytest.raises(NotFound):
            await daemon.leases.AddResource(
                pb.leases.AddResourceRequest(id="none", resource=pb.leases.Resource(id="x", type="images")), CALL)

    run(tmp_path, work)


# Snapshots.


def test_a_snapshot_of_one_namespace_is_none_of_another(tmp_path):
    async def work(daemon):
        prepare = pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="k", labels={"a": "b"})
        for call in (CALL, OTHER):
            [mount] = (await daemon.snapshots.Prepare(prepare, call)).mounts
            assert mount.type == "bind"
        with pytest.raises(NotFound):
            await daemon.snapshots.Stat(pb.snapshots.StatSnapshotRequest(snapshotter="native", key="k"), Call("three"))
        info = (await daemon.snapshots.Stat(pb.snapshots.StatSnapshotRequest(snapshotter="native", key="k"), OTHER)).info
        assert (info.kind, dict(info.labels)) == (pb.snapshots.ACTIVE, {"a": "b"})
        with pytest.raises(InvalidArgument, match="snapshotter not loaded: zfs"):
            await daemon.snapshots.Stat(pb.snapshots.StatSnapshotRequest(snapshotter="zfs", key="k"), CALL)
        with pytest.raises(NotFound, match="parent snapshot p does not exist"):
            await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="m", parent="p"), CALL)
        with pytest.raises(NotFound, match="lease"):
            await daemon.snapshots.Prepare(
                pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="m"), Call("one", "none"))
        assert len(list(daemon.metadata.drivers["native"].walk())) == 2

    run(tmp_path, work)


def test_a_commit_takes_a_name_once_and_a_parent_stays(tmp_path):
    async def work(daemon):
        for key in ("a", "b"):
            await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key=key), CALL)
        commit = pb.snapshots.CommitSnapshotRequest(snapshotter="native", key="a", name="n", labels={"x": "y"})
        await daemon.snapshots.Commit(commit, CALL)
        with pytest.raises(NotFound):
            await daemon.snapshots.Commit(commit, CALL)
        with pytest.raises(AlreadyExists):
            await daemon.snapshots.Commit(pb.snapshots.CommitSnapshotRequest(snapshotter="native", key="b", name="n"), CALL)
        target = {"containerd.io/snapshot.ref": "n"}
        with pytest.raises(AlreadyExists, match="target snapshot"):
            await daemon.snapshots.Prepare(
                pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="c", labels=target), CALL)
        await daemon.snapshots.View(pb.snapshots.ViewSnapshotRequest(snapshotter="native", key="v", parent="n"), CALL)
        with pytest.raises(FailedPrecondition, match="with child"):
            await daemon.snapshots.Remove(pb.snapshots.RemoveSnapshotRequest(snapshotter="native", key="n"), CALL)
        with pytest.raises(FailedPrecondition):
            await daemon.snapshots.Commit(pb.snapshots.CommitSnapshotRequest(snapshotter="native", key="v", name="w"), CALL)
        for filters, names in ((["kind==committed"], ["n"]), (["parent==n"], ["v"]), (["labels.x==y"], ["n"]), (["name==b"], ["b"])):
            request = pb.snapshots.ListSnapshotsRequest(snapshotter="native", filters=filters)
            listed = await gathered(daemon.snapshots.List(request, CALL))
            assert [each.name for message in listed for each in message.info] == names

    run(tmp_path, work)


# After a crash.


def test_check_finds_what_was_spoilt_and_the_start_puts_it_right(tmp_path):
    async def work(daemon):
        digest = daemon.put(b"data", labels=ROOT)
        assert daemon.metadata.check() == []
        path = Path(daemon.files.path(digest))
        path.chmod(0o600)
        path.write_bytes(b"tada")
        assert "not that content any more" in daemon.metadata.check()[0]
        path.write_bytes(b"da")
        assert "has 2 bytes, 4 were recorded" in daemon.metadata.check()[0]
        path.unlink()
        assert "is lost" in daemon.metadata.check()[0]
        await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="k"), CALL)
        driver = daemon.metadata.drivers["native"]
        [info] = driver.walk()
        driver.remove(info.name)
        assert any("snapshot k is lost" in line for line in daemon.metadata.check())
        daemon.collector.reconcile()
        assert daemon.metadata.check() == []

    run(tmp_path, work)


def test_a_store_is_checked_from_outside(tmp_path):
    lines = []

    async def work(daemon):
        digest = daemon.put(b"data", labels=ROOT)
        await daemon.snapshots.Prepare(pb.snapshots.PrepareSnapshotRequest(snapshotter="native", key="k"), CALL)
        assert check.root(str(tmp_path)) == []
        Path(daemon.files.path(digest)).unlink()
        [info] = daemon.metadata.drivers["native"].walk()
        daemon.metadata.drivers["native"].remove(info.name)
        lines.extend([f"namespace one: content {digest} is lost", "namespace one: snapshot k is lost by native"])

    run(tmp_path, work)
    assert check.root(str(tmp_path)) == lines
    (tmp_path / "metadata.db").write_bytes(b"nothing of the kind" * 1000)
    for name in ("metadata.db-wal", "metadata.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    assert check.root(str(tmp_path)) == ["database: file is not a database"]
    with pytest.raises(NotFound):
        check.root(str(tmp_path / "elsewhere"))


def test_a_file_that_is_no_database_or_of_another_time_is_refused(tmp_path):
    path = tmp_path / "metadata.db"
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(DataLoss, match="damaged"):
        Database(str(path))
    path.unlink()
    Database(str(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(FailedPrecondition, match="schema 99"):
        Database(str(path))


def test_a_full_disk_is_said_and_nothing_of_the_transaction_stays(tmp_path):
    """A limit of pages stands in for the disk: SQLite answers the same."""
    database = Database(str(tmp_path / "metadata.db"))
    with database.reading() as rows:
        rows.execute(f"PRAGMA max_page_count={rows.execute('PRAGMA page_count').fetchone()[0]}").fetchall()
    with pytest.raises(ResourceExhausted, match="no space left on device"):
        database.create("one", {"x": "y" * 100_000})
    assert database.names() == []
    database.create("two", {})
    assert database.names() == ["two"]
    database.close()
    assert check.root(str(tmp_path)) == []
