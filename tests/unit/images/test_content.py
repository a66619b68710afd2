"""The content store of files: what is below `blobs` is whole, and an ingest is one writer's."""

import hashlib
import os
from pathlib import Path

import pytest

from boxship.images.content import ContentStore
from boxship.kit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable

DATA = b"some content"
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(str(tmp_path / "content"))


def put(store: ContentStore, data: bytes, ref: str = "r", expected: str = "") -> None:
    writer = store.writer(ref, len(data), expected)
    writer.write(data)
    writer.commit(len(data), expected)


def content(store: ContentStore, digest: str) -> bytes:
    with open(store.open(digest), "rb") as file:
        return file.read()


def test_what_is_committed_is_there_and_read_only(store: ContentStore) -> None:
    put(store, DATA)
    assert content(store, DIGEST) == DATA
    assert store.info(DIGEST).size == len(DATA)
    assert [info.digest for info in store.walk()] == [DIGEST]
    assert os.stat(store.path(DIGEST)).st_mode & 0o777 == 0o444
    assert store.statuses() == []


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_a_digest_may_be_of_another_algorithm_told_at_the_end(store: ContentStore, algorithm: str) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, DATA).hexdigest()}"
    writer = store.writer("r")
    writer.write(DATA)
    writer.commit(expected=digest)
    assert content(store, digest) == DATA


def test_an_ingest_is_continued_where_it_stopped(store: ContentStore) -> None:
    writer = store.writer("r", len(DATA), DIGEST)
    writer.write(DATA[:5])
    writer.close()
    assert (store.status("r").offset, store.status("r").total, store.status("r").expected) == (5, len(DATA), DIGEST)
    again = ContentStore(store.root).writer("r")
    assert again.offset == 5
    again.write(memoryview(DATA)[5:])
    again.commit()
    assert content(store, DIGEST) == DATA


def test_a_writer_can_go_back(store: ContentStore) -> None:
    writer = store.writer("r")
    writer.write(b"some other thing")
    writer.truncate(5)
    writer.write(DATA[5:])
    assert writer.digest() == DIGEST
    with pytest.raises(InvalidArgument):
        writer.truncate(99)
    writer.commit(len(DATA), DIGEST)


def test_a_ref_has_one_writer(store: ContentStore) -> None:
    writer = store.writer("r")
    with pytest.raises(Unavailable, match="ref r locked"):
        ContentStore(store.root).writer("r")
    writer.close()
    store.writer("r").close()


@pytest.mark.parametrize(("size", "expected"), [(3, ""), (0, "sha256:" + "0" * 64)])
def test_other_content_than_expected_does_not_become_a_blob(store: ContentStore, size: int, expected: str) -> None:
    writer = store.writer("r")
    writer.write(DATA)
    with pytest.raises(FailedPrecondition, match="unexpected commit"):
        writer.commit(size, expected)
    assert list(store.walk()) == []
    writer.commit(len(DATA), DIGEST)


def test_content_that_is_there_is_not_written_again(store: ContentStore) -> None:
    put(store, DATA)
    with pytest.raises(AlreadyExists):
        store.writer("other", expected=DIGEST)
    with pytest.raises(AlreadyExists):
        put(store, DATA, "other")
    assert store.statuses() == []


def test_an_aborted_ingest_cannot_be_committed(store: ContentStore) -> None:
    writer = store.writer("r")
    writer.write(DATA)
    store.abort("r")
    with pytest.raises(NotFound):
        writer.commit()
    assert list(store.walk()) == []
    with pytest.raises(NotFound):
        store.abort("r")
    put(store, DATA)


def test_another_size_or_content_is_another_ingest(store: ContentStore) -> None:
    store.writer("r", 5, DIGEST).close()
    with pytest.raises(FailedPrecondition, match="total differs"):
        store.writer("r", 6)
    with pytest.raises(FailedPrecondition, match="begun for"):
        store.writer("r", 5, "sha256:" + "1" * 64)


@pytest.mark.parametrize("digest", ["", "sha256:../../etc/passwd", "sha256:zz", "../x:y", "sha256:" + "a" * 63])
def test_a_digest_that_is_none_names_no_file(store: ContentStore, digest: str) -> None:
    for ask in (store.info, store.open, store.delete):
        with pytest.raises(InvalidArgument):
            ask(digest)


def test_deleted_content_is_gone_and_who_reads_it_reads_on(store: ContentStore) -> None:
    put(store, DATA)
    with open(store.open(DIGEST), "rb") as file:
        store.delete(DIGEST)
        assert file.read() == DATA
    with pytest.raises(NotFound):
        store.info(DIGEST)
    with pytest.raises(NotFound):
        store.delete(DIGEST)


def test_an_ingest_that_was_hardly_begun_begins_anew(store: ContentStore) -> None:
    store.writer("r").close()
    folder = next(Path(store.root, "ingest").iterdir())
    (folder / "ref").unlink()
    (folder / "data").write_bytes(b"left")
    assert store.statuses() == []
    assert store.writer("r").offset == 0


def test_a_full_disk_leaves_what_was_there(store: ContentStore) -> None:
    """RLIMIT_FSIZE stands in for the disk: the write stops half-way in the same manner."""
    import resource
    import signal

    writer = store.writer("r")
    writer.write(b"x" * 100)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(Exception, match="ingest r: writing"):
            writer.write(b"y" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert (writer.offset, store.status("r").offset) == (100, 100)
    assert writer.digest() == f"sha256:{hashlib.sha256(b'x' * 100).hexdigest()}"
