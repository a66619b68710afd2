"""`boxship logs`.

Runs in: the boxship command.
Spec: docker logs; Docker Engine API, GET /containers/{id}/logs.

Of several containers the lines come in the order of their time, and with --follow as they are printed, each behind the name of
its container, in a colour of its own on a terminal.
"""

from __future__ import annotations

import os

from boxship.cli.command import MANY, Command
from boxship.cli.http.client import path
from boxship.cli.verbs.lifecycle import target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from boxship.cli.command import Call


def _moment(text: str, what: str) -> str | None:
    from boxship.cli.show.units import moment
    from boxship.kit.errors import BoxshipError, InvalidArgument

    if not text:
        return None
    try:
        return moment(text)
    except InvalidArgument:
        raise BoxshipError(f'invalid value for "{what}": failed to parse value as time or duration: "{text}"') from None


_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


def _logs(call: Call) -> int:
    from boxship.cli.http.stream import Frames, to_standard

    if not call.words:
        from boxship.cli.command import UsageFailure

        raise UsageFailure(
            "boxship: 'boxship logs' requires 1 argument\n\nUsage:  boxship logs [OPTIONS] CONTAINER\n\n"
            "Run 'boxship logs --help' for more information",
            1,
        )
    query: dict[str, object] = {
        "stdout": True,
        "stderr": True,
        "follow": call.on("follow"),
        "since": _moment(call.text("since"), "since"),
        "until": _moment(call.text("until"), "until"),
        "timestamps": call.on("timestamps"),
        "details": call.on("details"),
        "tail": call.text("tail") or "all",
    }
    if len(call.words) > 1:
        return _several(call, query)
    found = call.engine.send("GET", target(call.words[0], "json")).json()
    response = call.engine.send("GET", path(target(found["Id"], "logs"), query))
    if found["Config"]["Tty"]:
        for piece in response.pieces():
            to_standard(1, piece)
        return 0
    frames = Frames(to_standard)
    for piece in response.pieces():
        frames.feed(piece)
    return 0


def _several(call: Call, query: dict[str, object]) -> int:
    found = [call.engine.send("GET", target(name, "json")).json() for name in call.words]
    width = max(len(name) for name in call.words)
    coloured = os.isatty(1) and "NO_COLOR" not in call.environ
    prefixes = []
    for index, name in enumerate(call.words):
        front = f"{name.ljust(width)} | "
        prefixes.append(f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{front}\x1b[0m" if coloured else front)
    if call.on("follow"):
        _follow(call, query, found, prefixes)
    else:
        _merge(call, query, found, prefixes)
    return 0


def _lines(call: Call, query: dict[str, object], container: Any) -> Iterator[tuple[int, bytes]]:
    """(stream, line) of a container, each with its end."""
    from boxship.cli.http.stream import Frames
    from boxship.cli.http.where import another

    ready: list[tuple[int, bytes]] = []
    rest = {1: b"", 2: b""}

    def take(stream: int, data: bytes) -> None:
        *whole, rest[stream] = (rest[stream] + data).split(b"\n")
        ready.extend((stream, line + b"\n") for line in whole)

    frames = Frames(take)
    feed: Callable[[bytes], None] = (lambda data: take(1, data)) if container["Config"]["Tty"] else frames.feed
    connection = another(call.engine)
    for piece in connection.send("GET", path(target(container["Id"], "logs"), query)).pieces():
        feed(piece)
        yield from ready
        ready.clear()
    yield from ((stream, line + b"\n") for stream, line in rest.items() if line)


def _merge(call: Call, query: dict[str, object], found: list[Any], prefixes: list[str]) -> None:
    """By time: the engine is asked for the time of each line, which is taken off again unless it was asked for."""
    from boxship.cli.show.table import write

    waiting: list[tuple[bytes, int, int, bytes]] = []
    streams = [_lines(call, {**query, "timestamps": True}, container) for container in found]

    def more(index: int) -> None:
        line = next(streams[index], None)
        if line is not None:
            second, _, fraction = line[1].partition(b" ")[0].rstrip(b"Z").partition(b".")
            waiting.append((second + b"." + fraction, index, *line))

    for index in range(len(streams)):
        more(index)
    while waiting:
        first = min(waiting)
        waiting.remove(first)
        _, index, stream, line = first
        text = line if query["timestamps"] else line.partition(b" ")[2]
        write(prefixes[index].encode("utf-8", "surrogateescape") + text, stream)
        more(index)


def _follow(call: Call, query: dict[str, object], found: list[Any], prefixes: list[str]) -> None:
    """As they come, one thread for each container. Raises the first failure of one when all have ended."""
    import _thread

    from boxship.cli.show.table import write

    turn = _thread.allocate_lock()
    ends, failures = [], []

    def copy(index: int, end: Any) -> None:
        front = prefixes[index].encode("utf-8", "surrogateescape")
        try:
            for stream, line in _lines(call, query, found[index]):
                with turn:
                    write(front + line, stream)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            failures.append(error)
        finally:
            end.release()

    for index in range(len(found)):
        end = _thread.allocate_lock()
        end.acquire()
        ends.append(end)
        _thread.start_new_thread(copy, (index, end))
    for end in ends:
        end.acquire()
    if failures:
        raise failures[0]


COMMANDS = {
    "logs": Command(
        " [OPTIONS] CONTAINER [CONTAINER...]",
        "Fetch the logs of one or more containers",
        _logs,
        """
details | Show extra details provided to logs
f,follow | Follow log output
since string | Show logs since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
n,tail string | Number of lines to show from the end of the logs
t,timestamps | Show timestamps
until string | Show logs before a timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
""",
        most=MANY,
    )
}
