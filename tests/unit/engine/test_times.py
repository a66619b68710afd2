"""Times as Go writes and reads them."""

from __future__ import annotations

import time

import pytest

from boxship.engine import times
from boxship.kit.errors import InvalidArgument


@pytest.mark.parametrize(("ns", "text"), [
    (0, "1970-01-01T00:00:00Z"), (1, "1970-01-01T00:00:00.000000001Z"), (1_500_000_000, "1970-01-01T00:00:01.5Z"),
    (1_795_561_698_224_131_482, "2026-11-24T23:08:18.224131482Z"),
])
def test_nanoseconds_go_both_ways(ns: int, text: str) -> None:
    assert times.rfc3339(ns) == text
    assert times.nanoseconds(text) == ns


def test_gos_zero_time_is_never() -> None:
    assert times.nanoseconds(times.ZERO) == 0


@pytest.mark.parametrize(("text", "ns"), [
    ("", 0), ("1136073600.000000001", 1136073600_000000001), ("1136073600", 1136073600_000000000), ("2006-01-01T00:00:00Z", 1136073600_000000000),
    ("2006-01-01T01:00:00+01:00", 1136073600_000000000), ("2006-01-01", 1136073600_000000000), ("2006-01-01T00:00:00.25Z", 1136073600_250000000),
])
def test_moments(text: str, ns: int) -> None:
    assert times.moment(text) == ns


def test_a_duration_is_before_now() -> None:
    assert abs(time.time_ns() - 90_000_000_000 - times.moment("1m30s")) < 1_000_000_000


@pytest.mark.parametrize("text", ["yesterday", "2006-13-01", "1x", "--"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        times.moment(text)


@pytest.mark.parametrize(("seconds", "words"), [
    (0.5, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (61, "About a minute"), (150, "2 minutes"), (3700, "About an hour"),
    (7200, "2 hours"), (3 * 86400, "3 days"), (20 * 86400, "2 weeks"), (70 * 86400, "2 months"), (800 * 86400, "2 years"),
])
def test_spans_are_said_as_docker_says_them(seconds: float, words: str) -> None:
    assert times.ago(int(seconds * 1e9)) == words
