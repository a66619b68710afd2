"""json-file logs: what is written is what is read, cut, rotated and followed as dockerd does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from boxship.engine import logs
from boxship.engine.logs import Entry, LogFile, Wanted
from boxship.engine.stdio import STDERR, STDOUT
from boxship.kit.errors import InvalidArgument

BOTH = frozenset((STDOUT, STDERR))


def read(path: Path, log: LogFile | None = None, **wanted: object) -> list[Entry]:
    async def collect() -> list[Entry]:
        found: list[Entry] = []
        async for entries in logs.read(str(path), Wanted(BOTH, **wanted), log):  # type: ignore[arg-type]
            found += entries
        return found

    return asyncio.run(collect())


def texts(entries: list[Entry]) -> list[bytes]:
    return [entry[2] for entry in entries]


def test_lines_are_objects_that_docker_reads(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), attrs={"k": "v"})
    log.write(STDOUT, b"one\nt")
    log.write(STDERR, b"err\n")
    log.write(STDOUT, b"wo\nrest")
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(row["log"], row["stream"], row["attrs"]) for row in rows] == [
        ("one\n", "stdout", {"k": "v"}), ("err\n", "stderr", {"k": "v"}), ("two\n", "stdout", {"k": "v"}), ("rest", "stdout", {"k": "v"})]
    assert rows[0]["time"].endswith("Z")


@pytest.mark.parametrize("line", [
    b"plain\n", b"\n", b'quo"te \\ back\n', b"tab\tand \x01 control\n", "h\u00e9\u4e16\n".encode(), b'","stream":"stderr","time":"x"}\n',
    b"ends with backslash n \\n\n", b"no newline",
])
def test_what_is_written_is_read(tmp_path: Path, line: bytes) -> None:
    log = LogFile(str(tmp_path / "log"))
    log.write(STDOUT, line)
    log.close()
    assert texts(read(tmp_path / "log")) == [line]


def test_bytes_that_are_no_text_become_replacement_characters(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    log.write(STDOUT, b"\xff\n")
    log.close()
    assert texts(read(tmp_path / "log")) == ["\ufffd\n".encode()]


def test_long_lines_are_cut_and_join_to_the_same(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    line = b"x" * 40000 + b"\n"
    log.write(STDOUT, line[:20000])
    log.write(STDOUT, line[20000:])
    log.close()
    found = texts(read(tmp_path / "log"))
    assert [len(text) for text in found] == [16384, 16384, 7233]
    assert b"".join(found) == line


def test_half_an_object_of_a_killed_daemon_spoils_only_itself(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    log.write(STDOUT, b"before\n")
    log.close()
    with open(tmp_path / "log", "ab") as file:
        file.write(b'{"log":"ha')
    log = LogFile(str(tmp_path / "log"))
    log.write(STDOUT, b"after\n")
    log.close()
    assert texts(read(tmp_path / "log")) == [b"before\n", b"after\n"]


@pytest.mark.parametrize(("tail", "wanted"), [(-1, 100), (0, 0), (1, 1), (7, 7), (100, 100), (1000, 100)])
def test_tail(tmp_path: Path, tail: int, wanted: int) -> None:
    log = LogFile(str(tmp_path / "log"), max_size=2000, max_files=20)
    for number in range(100):
        log.write(STDOUT, b"%d\n" % number)
    log.close()
    assert (tmp_path / "log.2").exists()
    assert texts(read(tmp_path / "log", tail=tail)) == [b"%d\n" % number for number in range(100 - wanted, 100)]


def test_rotation_keeps_as_many_files_as_it_may(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), max_size=500, max_files=3)
    for number in range(100):
        log.write(STDOUT, b"%d\n" % number)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    found = [int(text) for text in texts(read(tmp_path / "log"))]
    assert found == list(range(found[0], 100))


def test_a_follower_gets_everything_through_rotations_and_ends_with_the_log(tmp_path: Path) -> None:
    async def scene() -> list[bytes]:
        log = LogFile(str(tmp_path / "log"), max_size=300, max_files=2)
        found: list[bytes] = []

        async def follow() -> None:
            async for entries in logs.read(str(tmp_path / "log"), Wanted(BOTH, follow=True), log):
                found.extend(entry[2] for entry in entries)

        task = asyncio.ensure_future(follow())
        for number in range(50):
            log.write(STDOUT, b"%d\n" % number)
            for _ in range(5):
                await asyncio.sleep(0)
        log.close()
        await asyncio.wait_for(task, 5)
        return found

    assert asyncio.run(scene()) == [b"%d\n" % number for number in range(50)]


def test_frames_have_stream_and_length(tmp_path: Path) -> None:
    entries: list[Entry] = [(STDOUT, b"2026-01-01T00:00:00.5Z", b"a\n", {}), (STDERR, b"2026-01-01T00:00:01Z", b"bc\n", {"x": "y"})]
    assert logs.render(entries, multiplexed=True, timestamps=False, details=False) == (
        b"\x01\0\0\0\0\0\0\x02a\n\x02\0\0\0\0\0\0\x03bc\n")
    assert logs.render(entries, multiplexed=False, timestamps=True, details=True) == (
        b"2026-01-01T00:00:00.500000000Z  a\n2026-01-01T00:00:01.000000000Z x=y bc\n")


@pytest.mark.parametrize(("driver", "options"), [
    ("syslog", {}), ("json-file", {"nonsense": "1"}), ("json-file", {"max-size": "ten"}), ("json-file", {"max-file": "0"}),
])
def test_what_is_no_driver_or_option_is_refused(driver: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        logs.check_options(driver, options)


@pytest.mark.parametrize(("text", "size"), [("10m", 10 << 20), ("10MB", 10 << 20), ("1k", 1024), ("512", 512), ("1.5g", 3 << 29), ("7b", 7)])
def test_sizes(text: str, size: int) -> None:
    assert logs.size(text) == size
