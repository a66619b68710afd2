"""The logs of containers: dockerd's driver json-file, written and read.

Runs in: the daemon, on its event loop.
Spec: dockerd's json-file: a JSON object for each line, {"log": "text\\n", "stream": "stdout", "time": RFC 3339}; a line longer
than 16 KiB is cut into several objects, of which only the last one ends with a newline; rotated files are PATH.1 (youngest),
PATH.2 …
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Iterator
from json.encoder import encode_basestring as _quote
from typing import Any, NamedTuple

from boxship.engine import times
from boxship.engine.stdio import STDERR, STDOUT
from boxship.kit.errors import InvalidArgument
from boxship.kit.files import write_all

DRIVERS = ("json-file", "local", "none")
_LINE_MAX = 16384
_BLOCK = 1 << 20
_OPTIONS = {
    "json-file": frozenset(("max-file", "max-size", "compress", "labels", "labels-regex", "env", "env-regex", "tag", "mode",
                            "max-buffer-size")),
    "local": frozenset(("max-file", "max-size", "compress", "mode", "max-buffer-size")),
    "none": frozenset(("mode", "max-buffer-size")),
}
_OBJECT = re.compile(rb'^\{"log":"([^"\\]*(?:\\.[^"\\]*)*)","stream":"std(out|err)","time":"([^"]*)"\}$', re.MULTILINE)
_SIMPLE = re.compile(rb'^\{"log":"([^"\\]*)(\\n)?","stream":"std(out|err)","time":"([^"]*)"\}$', re.MULTILINE)
"""The same for text without escapes but for the newline at its end, which nearly all is."""
_NO_ATTRS: dict[str, str] = {}
_HEADER = struct.Struct(">BxxxI")
_SUFFIXES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


Entry = tuple[int, bytes, bytes, dict[str, str]]
"""One piece of output, as it was read: stream, time (RFC 3339), text, attributes. A plain tuple: logs have millions of them."""


def size(text: str) -> int:
    """Bytes of a size such as `10m`; raises InvalidArgument."""
    lower = text.strip().lower().removesuffix("b") or "x"
    number, unit = (lower[:-1], lower[-1]) if lower[-1:].isalpha() else (lower, "")
    try:
        return int(float(number) * _SUFFIXES[unit])
    except (ValueError, KeyError):
        raise InvalidArgument(f"invalid size: '{text}'") from None


def check_options(driver: str, options: dict[str, str]) -> None:
    """Raise InvalidArgument for a driver that is not there or an option that it does not have."""
    if driver not in DRIVERS:
        raise InvalidArgument(f'error looking up logging plugin {driver}: plugin "{driver}" not found')
    for name in options:
        if name not in _OPTIONS[driver]:
            raise InvalidArgument(f"unknown log opt '{name}' for {driver} log driver")
    if options.get("max-size"):
        size(options["max-size"])
    count = options.get("max-file", "1")
    if not count.isdigit() or int(count) < 1:
        raise InvalidArgument("max-file cannot be less than 1")


class LogFile:
    """Writes the log of one container. Followers wait for `changed`."""

    def __init__(self, path: str, *, max_size: int = 0, max_files: int = 1, attrs: dict[str, str] | None = None) -> None:
        self.path = path
        self._max_size = max_size
        self._max_files = max_files
        self._attrs = f',"attrs":{json.dumps(attrs, sort_keys=True)}' if attrs else ""
        self._partial = {STDOUT: b"", STDERR: b""}
        self._waiting: list[asyncio.Future[None]] = []
        self.closed = False
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size
        self._repair()

    def _repair(self) -> None:
        """A daemon killed in the middle of a write leaves half an object without a newline: end that line."""
        if self._size:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.pread(fd, 1, self._size - 1) != b"\n":
                    write_all(self._fd, b"\n")
                    self._size += 1
            finally:
                os.close(fd)

    def write(self, stream: int, data: bytes) -> None:
        """Write what came on a stream; the last line is kept back until it ends or is too long. Raises OSError."""
        stamp = times.rfc3339(time.time_ns())
        tail = f',"stream":"{"stdout" if stream == STDOUT else "stderr"}"{self._attrs},"time":"{stamp}"}}\n'
        lines = (self._partial[stream] + data).split(b"\n")
        last = lines.pop()
        parts: list[str] = []
        for line in lines:
            while len(line) >= _LINE_MAX:
                parts += ('{"log":', _quote(line[:_LINE_MAX].decode("utf-8", "replace")), tail)
                line = line[_LINE_MAX:]
            parts += ('{"log":', _quote(line.decode("utf-8", "replace") + "\n"), tail)
        while len(last) >= _LINE_MAX:
            parts += ('{"log":', _quote(last[:_LINE_MAX].decode("utf-8", "replace")), tail)
            last = last[_LINE_MAX:]
        self._partial[stream] = last
        if parts:
            self._put("".join(parts).encode())

    def _put(self, data: bytes) -> None:
        if self._max_size and self._size + len(data) > self._max_size:
            for line in data.splitlines(keepends=True):
                if self._size and self._size + len(line) > self._max_size:
                    self._rotate()
                write_all(self._fd, line)
                self._size += len(line)
        else:
            write_all(self._fd, data)
            self._size += len(data)
        self._wake()

    def _rotate(self) -> None:
        for number in range(self._max_files - 1, 1, -1):
            try:
                os.rename(f"{self.path}.{number - 1}", f"{self.path}.{number}")
            except FileNotFoundError:
                pass
        if self._max_files > 1:
            os.rename(self.path, f"{self.path}.1")
        else:
            os.unlink(self.path)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = 0

    def flush(self) -> None:
        """Write the last lines although they have no newline: the process is over."""
        for stream, rest in self._partial.items():
            if rest:
                self._partial[stream] = b""
                tail = f',"stream":"{"stdout" if stream == STDOUT else "stderr"}"{self._attrs},"time":"{times.now()}"}}\n'
                self._put(f'{{"log":{_quote(rest.decode("utf-8", "replace"))}{tail}'.encode())

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Wait until something was written, or the log closed."""
        if not self.closed:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def close(self) -> None:
        """Flush, close and wake the followers for the last time."""
        if not self.closed:
            self.flush()
            self.closed = True
            os.close(self._fd)
            self._wake()


def open_log(path: str, driver: str, options: dict[str, str], attrs: dict[str, str]) -> LogFile | None:
    """The log of a container with that driver; None for `none`. Raises OSError."""
    if driver == "none":
        return None
    default_size, default_files = ("20m", "5") if driver == "local" else ("", "1")
    limit = options.get("max-size", default_size)
    return LogFile(
        path, max_size=size(limit) if limit and limit != "-1" else 0, max_files=int(options.get("max-file", default_files)),
        attrs=attrs)


def _text(quoted: bytes) -> bytes:
    """What stands between the quotes of a JSON string."""
    if b"\\" not in quoted:
        return quoted
    if quoted.endswith(b"\\n") and b"\\" not in quoted[:-2]:
        return quoted[:-2] + b"\n"
    found: str = json.loads(b'"' + quoted + b'"')
    return found.encode("utf-8", "surrogatepass")


def _parse(line: bytes) -> Entry | None:
    """One object, of whichever form."""
    try:
        found = json.loads(line)
        return (STDERR if found["stream"] == "stderr" else STDOUT, str(found["time"]).encode(), str(found["log"]).encode(),
                found.get("attrs") or {})
    except (ValueError, KeyError, TypeError):
        return None  # half an object, of a daemon that was killed while it wrote


def _parse_block(data: bytes) -> list[Entry]:
    """The objects of whole lines. Those that json-file itself wrote are taken apart without a JSON parser."""
    lines = data.count(b"\n")
    simple = _SIMPLE.findall(data)
    if len(simple) == lines:
        return [
            (STDOUT if which == b"out" else STDERR, stamp, text + b"\n" if newline else text, _NO_ATTRS)
            for text, newline, which, stamp in simple
        ]
    found = _OBJECT.findall(data)
    if len(found) == lines:
        return [(STDOUT if which == b"out" else STDERR, stamp, _text(quoted), _NO_ATTRS) for quoted, which, stamp in found]
    return [entry for line in data.split(b"\n") if line and (entry := _parse(line)) is not None]


def _blocks(fd: int) -> Iterator[list[Entry]]:
    rest = b""
    while data := os.read(fd, _BLOCK):
        whole, newline, tail = data.rpartition(b"\n")
        if not newline:
            rest += data
            continue
        yield _parse_block(rest + whole + newline)
        rest = tail
    if rest:
        # Not whole yet: a follower reads it again.
        os.lseek(fd, -len(rest), os.SEEK_CUR)


def _seek_tail(fd: int, wanted: int) -> int:
    """Move to where the last `wanted` lines begin. Returns how many there were."""
    position = os.fstat(fd).st_size
    found = 0
    block = b""
    while position > 0:
        step = min(_BLOCK >> 4, position)
        position -= step
        block = os.pread(fd, step, position)
        end = len(block)
        while (index := block.rfind(b"\n", 0, end)) >= 0:
            found += 1
            if found > wanted:
                os.lseek(fd, position + index + 1, os.SEEK_SET)
                return wanted
            end = index
    os.lseek(fd, 0, os.SEEK_SET)
    return found


class Wanted(NamedTuple):
    """Which entries a client asked for. `since` and `until` are nanoseconds since the epoch, 0 for no limit; tail -1 is all."""

    streams: frozenset[int]
    tail: int = -1
    since: int = 0
    until: int = 0
    follow: bool = False


def _select(entries: list[Entry], wanted: Wanted) -> list[Entry]:
    if len(wanted.streams) < 2:
        entries = [entry for entry in entries if entry[0] in wanted.streams]
    if wanted.since or wanted.until:
        entries = [
            entry for entry in entries
            if wanted.since <= (at := times.nanoseconds(entry[1].decode())) and (not wanted.until or at <= wanted.until)
        ]
    return entries


def _files(path: str) -> list[int]:
    """Descriptors of all files of the log, oldest first."""
    names = [path]
    while os.path.exists(f"{path}.{len(names)}"):
        names.append(f"{path}.{len(names)}")
    made = []
    for name in reversed(names):
        try:
            made.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            continue
    return made


async def read(path: str, wanted: Wanted, log: LogFile | None) -> AsyncIterator[list[Entry]]:
    """The entries that were wanted, in batches; with `follow` until `log`, which is being written, is closed."""
    fds = _files(path)
    try:
        start = 0
        if wanted.tail >= 0:
            left = wanted.tail
            for start in range(len(fds) - 1, -1, -1):
                left -= _seek_tail(fds[start], left)
                if left <= 0:
                    break
        for fd in fds[start:] if wanted.tail != 0 else ():
            for entries in _blocks(fd):
                if chosen := _select(entries, wanted):
                    yield chosen
                await asyncio.sleep(0)
        if not wanted.follow or not fds:
            return
        if wanted.tail == 0:
            os.lseek(fds[-1], 0, os.SEEK_END)
        while True:
            closed = log is None or log.closed
            fresh = False
            for entries in _blocks(fds[-1]):
                fresh = True
                if chosen := _select(entries, wanted):
                    yield chosen
            if fresh:
                continue
            following = os.stat(path).st_ino if os.path.exists(path) else 0
            if following != os.fstat(fds[-1]).st_ino:
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                continue
            if closed or log is None or (wanted.until and time.time_ns() > wanted.until):
                return
            if wanted.until:
                try:
                    await asyncio.wait_for(log.changed(), max(0.0, (wanted.until - time.time_ns()) / 1e9))
                except TimeoutError:
                    continue
            else:
                await log.changed()
    finally:
        for fd in fds:
            os.close(fd)


def render(entries: list[Entry], *, multiplexed: bool, timestamps: bool, details: bool) -> bytes:
    """The bytes that a client gets for some entries."""
    parts: list[bytes] = []
    for stream, stamp, text, attrs in entries:
        if details:
            text = ",".join(f"{key}={value}" for key, value in sorted(attrs.items())).encode() + b" " + text
        if timestamps:
            text = fixed(stamp) + b" " + text
        if multiplexed:
            parts.append(_HEADER.pack(stream, len(text)))
        parts.append(text)
    return b"".join(parts)


def fixed(stamp: bytes) -> bytes:
    """A time with all nine digits of its fraction."""
    head, _, fraction = stamp.removesuffix(b"Z").partition(b".")
    return head + b"." + fraction.ljust(9, b"0") + b"Z"


def wanted(query: Any, streams: frozenset[int], *, follow: bool) -> Wanted:
    """The parameters of /logs; raises InvalidArgument."""
    tail = query.get("tail", "") or "all"
    return Wanted(
        streams, tail=int(tail) if tail.isdigit() else -1, since=times.moment(query.get("since", "")),
        until=times.moment(query.get("until", "")) if query.get("until", "") not in ("", "0") else 0, follow=follow)
