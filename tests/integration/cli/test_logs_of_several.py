"""`boxship logs A B C`, asked of an engine that answers what it is told."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_engine import FakeEngine, fake_engine

BOXSHIP = str(Path(sys.executable).with_name("boxship"))


def frame(stream: int, text: str) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(text).to_bytes(4, "big") + text.encode()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    def stamped(*rows: tuple[int, str, str]) -> bytes:
        return b"".join(frame(stream, f"2026-01-01T00:00:0{when}Z {text}\n") for stream, when, text in rows)

    answers = {
        **{f"GET /containers/{name}/json": (200, json.dumps({"Id": name * 8, "Config": {"Tty": False}}).encode()) for name in ("a", "bb")},
        "GET /containers/aaaaaaaa/logs": (200, stamped((1, "1", "zeroth"), (1, "1.5", "first"), (2, "3", "third"))),
        "GET /containers/bbbbbbbbbbbbbbbb/logs": (200, stamped((1, "2", "second"), (1, "4", "fourth"))),
    }
    with fake_engine(tmp_path / "s", answers) as engine:
        yield engine


def run(engine: FakeEngine, *words: str, out: int = subprocess.PIPE, err: int = subprocess.STDOUT) -> str:
    done = subprocess.run([BOXSHIP, "logs", *words], stdout=out, stderr=err, text=True, env={**os.environ, "BOXSHIP_HOST": engine.address}, timeout=30)
    assert done.returncode == 0, done.stdout
    return done.stdout or ""


def test_lines_come_by_their_time_behind_their_containers_name(engine: FakeEngine) -> None:
    assert run(engine, "a", "bb") == "a  | zeroth\na  | first\nbb | second\na  | third\nbb | fourth\n"
    assert run(engine, "-t", "a", "bb").splitlines()[0] == "a  | 2026-01-01T00:00:01Z zeroth"
    assert run(engine, "a", "bb", err=subprocess.DEVNULL) == "a  | zeroth\na  | first\nbb | second\nbb | fourth\n"


def test_followed_they_come_as_they_are_printed(engine: FakeEngine) -> None:
    lines = run(engine, "-f", "a", "bb").splitlines()
    assert sorted(line[:4] for line in lines) == ["a  |", "a  |", "a  |", "bb |", "bb |"]
    assert next(line for line in lines if line.startswith("a")).endswith("zeroth")


def test_on_a_terminal_each_has_its_colour(engine: FakeEngine) -> None:
    master, slave = pty.openpty()
    run(engine, "a", "bb", out=slave)
    os.close(slave)
    shown = os.read(master, 4096).decode()
    os.close(master)
    assert "\x1b[36ma  | \x1b[0mzeroth" in shown
    assert "\x1b[33mbb | \x1b[0msecond" in shown
