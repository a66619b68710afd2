"""Events: durations, and the lines."""

from __future__ import annotations

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.runtime.events import parse_duration


@pytest.mark.parametrize(
    ("duration", "seconds"), [("5s", 5.0), ("100ms", 0.1), ("1h2m3.5s", 3723.5), (".5s", 0.5), ("1us", 1e-6), ("+1m", 60.0)]
)
def test_durations_are_read_as_go_writes_them(duration: str, seconds: float) -> None:
    assert parse_duration(duration) == pytest.approx(seconds)


@pytest.mark.parametrize("duration", ["", "5", "s", "1x", "1s2", "1..5s", ".s", "1 s"])
def test_what_is_no_duration_is_refused(duration: str) -> None:
    with pytest.raises(InvalidArgument, match="time: invalid duration"):
        parse_duration(duration)


@pytest.mark.parametrize("duration", ["0", "0s", "-5s"])
def test_an_interval_is_above_zero(duration: str) -> None:
    with pytest.raises(InvalidArgument, match="duration interval must be greater than 0"):
        parse_duration(duration)
