"""Points in time as the Docker API writes them: RFC 3339 with nanoseconds, seconds with a fraction, and durations like `10m`.

Runs in: the daemon.
Spec: Go's time.RFC3339Nano; Docker Engine API, parameters since and until.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from boxship.kit.errors import InvalidArgument

ZERO = "0001-01-01T00:00:00Z"
"""Go's zero time: never."""

_SECOND = 1_000_000_000
_UNITS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 1_000_000, "s": _SECOND, "m": 60 * _SECOND, "h": 3600 * _SECOND}
_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d(?::\d\d(?::\d\d)?)?)(\.\d+)?)?(Z|[+-]\d\d:\d\d)?\Z")

_second = (-1, "")


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as RFC 3339 in UTC, trailing zeros of the fraction dropped as Go does."""
    global _second
    seconds, fraction = divmod(ns, _SECOND)
    if _second[0] != seconds:
        _second = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    tail = f".{fraction:09}".rstrip("0") if fraction else ""
    return f"{_second[1]}{tail}Z"


def rfc3339_fixed(ns: int) -> str:
    """The same with all nine digits, as logs with timestamps have it."""
    seconds, fraction = divmod(ns, _SECOND)
    return f"{rfc3339(seconds * _SECOND)[:-1]}.{fraction:09}Z"


def now() -> str:
    """The present as RFC 3339."""
    return rfc3339(time.time_ns())


def nanoseconds(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time; 0 for Go's zero time. Raises InvalidArgument."""
    found = _STAMP.match(text)
    if not found:
        raise InvalidArgument(f'parsing time "{text}": not RFC 3339')
    date, clock, fraction, zone = found.groups()
    clock = (clock or "00:00:00") + ":00:00"[: max(0, 8 - len(clock or "00:00:00"))]
    try:
        moment = datetime.fromisoformat(f"{date}T{clock[:8]}{'+00:00' if zone in ('Z', None) else zone}")
    except ValueError:
        raise InvalidArgument(f'parsing time "{text}": out of range') from None
    if moment.year == 1:
        return 0
    whole = int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    return whole * _SECOND + int(((fraction or ".0")[1:] + "000000000")[:9])


def duration(text: str) -> int:
    """Nanoseconds of a Go duration such as `1m30s`. Raises InvalidArgument."""
    rest, total = text.lstrip("+-"), 0.0
    if rest == "0":
        return 0
    if not rest or _PART.sub("", rest):
        raise InvalidArgument(f'time: invalid duration "{text}"')
    for number, unit in _PART.findall(rest):
        total += float(number) * _UNITS[unit]
    return int(-total if text.startswith("-") else total)


def moment(text: str) -> int:
    """A since or until: seconds (with fraction) since the epoch, RFC 3339, or a duration before now.

    0 for "". Raises InvalidArgument.
    """
    if not text:
        return 0
    whole, _, fraction = text.partition(".")
    if whole.lstrip("-").isdigit() and (not fraction or fraction.isdigit()):
        return int(whole) * _SECOND + int((fraction + "000000000")[:9])
    try:
        return time.time_ns() - duration(text)
    except InvalidArgument:
        pass
    try:
        return nanoseconds(text)
    except InvalidArgument:
        raise InvalidArgument(f'failed to parse value as time or duration: "{text}"') from None


def ago(ns: int) -> str:
    """A span as `docker ps` says it: "Less than a second", "5 minutes", "About an hour"."""
    seconds = ns // _SECOND
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    minutes = seconds // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    for limit, size, word in ((48, 1, "hours"), (24 * 7 * 2, 24, "days"), (24 * 30 * 2, 24 * 7, "weeks"),
                              (24 * 365 * 2, 24 * 30, "months")):
        if hours < limit:
            return f"{hours // size} {word}"
    return f"{int(seconds / 3600 / 24 / 365)} years"
