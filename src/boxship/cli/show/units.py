"""Sizes, times and durations as docker writes them and reads them.

Runs in: the boxship command.
Spec: docker/go-units (HumanSize, BytesSize, HumanDuration), Go's time.ParseDuration, RFC 3339.
"""

from __future__ import annotations

import time

from boxship.kit.errors import InvalidArgument

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def size(count: float, digits: int = 4) -> str:
    """ "1.234MB": powers of 1000."""
    return _scaled(count, 1000.0, _DECIMAL, digits)


def binary_size(count: float) -> str:
    """ "1.177MiB": powers of 1024."""
    return _scaled(count, 1024.0, _BINARY, 4)


def _scaled(count: float, base: float, names: tuple[str, ...], digits: int) -> str:
    index = 0
    while count >= base and index < len(names) - 1:
        count /= base
        index += 1
    return f"{count:.{digits}g}{names[index]}"


def duration(seconds: float) -> str:
    """ "5 minutes", "About an hour", as in `ps`."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = whole // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    for limit, length, name in ((24 * 14, 24, "days"), (24 * 60, 24 * 7, "weeks"), (24 * 365 * 2, 24 * 30, "months")):
        if hours < limit:
            return f"{hours // length} {name}"
    return f"{int(seconds / 3600) // 24 // 365} years"


def ago(stamp: float, now: float | None = None) -> str:
    """How long ago the Unix time `stamp` was."""
    return f"{duration((time.time() if now is None else now) - stamp)} ago"


def local(stamp: float) -> str:
    """ "2006-01-02 15:04:05 -0700 MST", in the caller's zone, as Go's Time.String()."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(stamp))


def stamp(text: str) -> float:
    """Unix time of an RFC 3339 text; 0.0 for Go's zero time. Raises InvalidArgument."""
    try:
        date, _, clock = text.partition("T")
        year, month, day = (int(part) for part in date.split("-"))
        offset = 0
        if clock.endswith("Z"):
            clock = clock[:-1]
        else:
            sign = max(clock.rfind("+"), clock.rfind("-"))
            if sign > 0:
                hours, _, minutes = clock[sign + 1 :].partition(":")
                offset = (int(hours) * 3600 + int(minutes or 0) * 60) * (1 if clock[sign] == "+" else -1)
                clock = clock[:sign]
        hour, minute, second = clock.split(":")
        if year < 1970:
            return 0.0
        return days(year, month, day) * 86400 + int(hour) * 3600 + int(minute) * 60 + float(second) - offset
    except ValueError:
        raise InvalidArgument(f"invalid time: {text}") from None


def days(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01 (the proleptic Gregorian calendar, years beginning in March)."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468


def seconds(text: str, what: str = "duration") -> float:
    """Seconds of "1m30s", "300ms". Raises InvalidArgument in Go's words."""
    rest, total = text.lstrip("+-"), 0.0
    if rest == "0":
        return 0.0
    refused = InvalidArgument(f'time: invalid {what} "{text}"')
    if not rest:
        raise refused
    while rest:
        number = rest[: len(rest) - len(rest.lstrip("0123456789."))]
        rest = rest[len(number) :]
        unit = rest[: len(rest) - len(rest.lstrip("nuµmsh"))]
        if number and not unit:
            raise InvalidArgument(f'time: missing unit in {what} "{text}"')
        # "5m30s" splits at digits; "1ms" is one unit.
        if not number or number.count(".") > 1 or number == "." or unit not in _SECONDS:
            raise refused
        total += float(number) * _SECONDS[unit]
        rest = rest[len(unit) :]
    return -total if text.startswith("-") else total


def moment(text: str) -> str:
    """`--since` and `--until`: a time, a Unix time or a duration before now, as the engine takes it. Raises InvalidArgument."""
    try:
        return f"{time.time() - seconds(text):.9f}"
    except InvalidArgument:
        pass
    if text.replace(".", "", 1).isdigit():
        return text
    # What lacks its clock or zone is in the caller's.
    date, _, clock = text.partition("T")
    if not clock:
        clock = "00:00:00"
    elif clock.count(":") == 0:
        clock += ":00:00"
    elif clock.count(":") == 1 and "+" not in clock and "-" not in clock:
        clock += ":00"
    zone = "" if clock.endswith("Z") or "+" in clock or "-" in clock else "Z"
    value = stamp(f"{date}T{clock}{zone}")
    if zone:
        value -= time.localtime(value).tm_gmtoff
    return f"{value:.9f}"


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the last of which says that there were more."""
    return text if len(text) <= width else text[: width - 1] + "…"
