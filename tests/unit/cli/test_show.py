"""Sizes, times, tables and progress look as docker's."""

from __future__ import annotations

import os
import time

import pytest

from boxship.cli.show import progress, units
from boxship.cli.show.table import Listing, columns
from boxship.kit.errors import BoxshipError, InvalidArgument


@pytest.mark.parametrize(("count", "digits", "text"), [
    (0, 3, "0B"), (999, 4, "999B"), (1000, 4, "1kB"), (1982000, 3, "1.98MB"), (1981952, 4, "1.982MB"), (123456789, 3, "123MB"), (2e18, 4, "2EB")])
def test_size(count: float, digits: int, text: str) -> None:
    assert units.size(count, digits) == text


def test_binary_size() -> None:
    assert [units.binary_size(count) for count in (0, 1024, 1536 * 1024, 25280000000)] == ["0B", "1KiB", "1.5MiB", "23.54GiB"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "Less than a second"), (1.9, "1 second"), (59, "59 seconds"), (60, "About a minute"), (150, "2 minutes"), (3500, "58 minutes"),
    (3600, "About an hour"), (5 * 3600, "5 hours"), (3 * 86400, "3 days"), (20 * 86400, "2 weeks"), (100 * 86400, "3 months"), (800 * 86400, "2 years")])
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_stamp() -> None:
    assert units.stamp("2026-11-25T00:18:30.5Z") == 1795565910.5
    assert units.stamp("2026-11-25T01:18:30+01:00") == 1795565910
    assert units.stamp("0001-01-01T00:00:00Z") == 0
    with pytest.raises(InvalidArgument):
        units.stamp("yesterday")


@pytest.mark.parametrize(("text", "seconds"), [("1m30s", 90), ("300ms", 0.3), ("1h", 3600), ("-5s", -5), ("0", 0), ("1.5h", 5400)])
def test_seconds(text: str, seconds: float) -> None:
    assert units.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "x", "5x", "1..5s", "s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidArgument):
        units.seconds(text)


def test_a_moment_is_a_time_or_a_time_ago() -> None:
    assert units.moment("1795565910.25") == "1795565910.25"
    assert float(units.moment("2026-11-25T00:18:30Z")) == 1795565910
    assert float(units.moment("10m")) == pytest.approx(time.time() - 600, abs=2)
    assert float(units.moment("2026-11-25")) == time.mktime((2026, 11, 25, 0, 0, 0, 0, 0, -1))


def test_columns_are_ten_wide_at_least_and_three_apart() -> None:
    assert columns([["A", "LONG HEADING", "Z"], ["1", "x", "y"]]) == "A         LONG HEADING   Z\n1         x              y\n"


ROWS = [{"ID": "1", "Names": lambda: "one"}, {"ID": "2", "Names": "two"}]
HEADINGS = {"ID": "CONTAINER ID", "Names": "NAMES"}


@pytest.mark.parametrize(("form", "quiet", "text"), [
    ("", "", "CONTAINER ID   NAMES\n1              one\n2              two\n"), ("", "ID", "1\n2\n"), ("table", "", "CONTAINER ID   NAMES\n1              one\n2              two\n"),
    ("json", "", '{"ID":"1","Names":"one"}\n{"ID":"2","Names":"two"}\n'), ("{{.Names}}", "", "one\ntwo\n"),
    ("table {{.Names}}\\t{{.ID}}", "", "NAMES     CONTAINER ID\none       1\ntwo       2\n")])
def test_listing(form: str, quiet: str, text: str) -> None:
    assert Listing(form, ("ID", "Names"), HEADINGS, quiet=quiet).text(ROWS) == text


def test_mistakes_in_a_listings_template_are_dockers() -> None:
    with pytest.raises(InvalidArgument, match=r"^failed to parse template: template: :1: unclosed action$"):
        Listing("{{", ("ID",), HEADINGS)
    with pytest.raises(InvalidArgument, match=r"^failed to execute template: template: :1:2: executing .* at <.Foo>: can't evaluate field Foo"):
        Listing("{{.Foo}}", ("ID",), HEADINGS).text(ROWS)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    lines = [{"status": "Pulling", "id": "latest"}, {"status": "Downloading", "id": "a", "progressDetail": {"current": 1, "total": 2}},
             {"status": "Download complete", "id": "a", "progressDetail": {}}, {"stream": "Loaded image: x\n"}, {"status": "Done"}]
    assert "".join(progress.plain(line) for line in lines) == "latest: Pulling\na: Download complete\nLoaded image: x\nDone\n"


def test_an_error_in_the_stream_is_raised() -> None:
    with pytest.raises(BoxshipError, match=r"^no such manifest$"):
        progress.show([b'{"status":"x"}', b'{"errorDetail":{"message":"no such manifest"},"error":"old"}'], fd=-1, environ={})


def test_bars() -> None:
    assert progress.bar(1, 2, 10) == "[=====>    ]        1B/2B"
    assert progress.bar(2, 2, 10) == "[==========]        2B/2B"
    assert progress.bar(1500, 0) == "1.5kB"


def test_a_screen_has_a_line_for_each_and_the_total_while_it_is_not_there() -> None:
    read, write = os.pipe()
    clock = iter(range(1, 1000))
    screen = progress.Screen(write, lambda: float(next(clock)))
    for name in ("a", "b"):
        screen.take({"id": name, "status": "Downloading", "progressDetail": {"current": 10, "total": 100}})
    drawn = os.read(read, 65536).decode()
    assert "a: Downloading [==>" in drawn and "Total: [==>" in drawn and "20B/200B" in drawn and " left" in drawn
    for name in ("a", "b"):
        screen.take({"id": name, "status": "Pull complete"})
    last = os.read(read, 65536).decode()
    assert "b: Pull complete" in last and "Total" not in last.rpartition("b: Pull complete")[2]
    os.close(read)
    os.close(write)
