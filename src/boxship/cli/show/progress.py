"""Streams of progress messages: bars with a total on a terminal, plain lines elsewhere.

Runs in: the boxship command.
Spec: the JSON messages of the Docker Engine API: {"id", "status", "progressDetail": {"current", "total"}, "stream", "error",
"errorDetail", "aux"}; NO_COLOR and TERM=dumb.
"""

from __future__ import annotations

import os
import time

from boxship.cli.show import units
from boxship.cli.show.table import write
from boxship.kit.errors import BoxshipError
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

_BAR = 50
_EVERY_S = 0.1


def show(lines: Iterable[bytes], *, fd: int = 1, environ: Mapping[str, str], aux: Callable[[Any], None] | None = None) -> None:
    """Print the messages as they come; none when `fd` is -1. Raises BoxshipError for the one that tells of a failure."""
    fancy = fd >= 0 and os.isatty(fd) and environ.get("TERM") not in ("", "dumb", None)
    screen = Screen(fd) if fancy else None
    try:
        for line in lines:
            message = text.loads(line, "the engine's answer")
            if not isinstance(message, dict):
                continue
            error = (message.get("errorDetail") or {}).get("message") or message.get("error")
            if error:
                raise BoxshipError(str(error))
            if message.get("aux") is not None:
                if aux is not None:
                    aux(message["aux"])
                continue
            if fd < 0:
                continue
            if screen is not None:
                screen.take(message)
            else:
                write(plain(message), fd)
    finally:
        if screen is not None:
            screen.close()


def plain(message: Mapping[str, Any]) -> str:
    """The line of a message where nothing can be written over: "" for those that only tell how far it is."""
    if message.get("stream"):
        return str(message["stream"])
    if (message.get("progressDetail") or {}).get("current") or message.get("progress"):
        return ""
    status = str(message.get("status") or "")
    return f"{message['id']}: {status}\n" if message.get("id") else f"{status}\n"


def bar(current: float, total: float, width: int = _BAR) -> str:
    """`[=====>    ]  1.2MB/3.4MB`."""
    if total <= 0:
        return units.size(current)
    share = min(current / total, 1.0)
    done = int(share * width)
    drawn = "=" * done if done >= width else "=" * done + ">" + " " * (width - done - 1)
    return f"[{drawn}]  {units.size(current):>8}/{units.size(total)}"


class Screen:
    """Lines that are written over: one for each id, and the total below."""

    def __init__(self, fd: int, now: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._now = now
        self._order: list[str] = []
        self._lines: dict[str, str] = {}
        self._bytes: dict[str, tuple[float, float]] = {}
        self._drawn = 0
        self._last = 0.0
        self._began = now()

    def take(self, message: Mapping[str, Any]) -> None:
        """Show a message; what follows quickly is drawn with the next."""
        identity = str(message.get("id") or "")
        if not identity or message.get("stream"):
            self._draw()
            self._drawn = 0
            self._order, self._lines, self._bytes = [], {}, {}
            write(plain(message), self._fd)
            return
        detail = message.get("progressDetail") or {}
        status = str(message.get("status") or "")
        if identity not in self._lines:
            self._order.append(identity)
        total = detail.get("total") or 0
        if detail.get("current"):
            self._lines[identity] = f"{identity}: {status} {bar(detail['current'], total, self._bar())}"
            if total and status in ("Downloading", "Pushing", "Loading layer", "Importing"):
                self._bytes[identity] = (detail["current"], total)
        else:
            self._lines[identity] = f"{identity}: {status}"
            if identity in self._bytes:
                whole = self._bytes[identity][1]
                self._bytes[identity] = (whole, whole)
        if self._now() - self._last >= _EVERY_S:
            self._draw()

    def close(self) -> None:
        """Draw what is left."""
        self._draw()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._fd).columns or 80
        except OSError:
            return 80

    def _bar(self) -> int:
        """As wide as leaves room for the words beside it."""
        return max(8, min(_BAR, self._width() - 60))

    def _total(self) -> str:
        if len(self._bytes) < 2:
            return ""
        current, total = (sum(pair[index] for pair in self._bytes.values()) for index in (0, 1))
        if current >= total:
            return ""
        took = self._now() - self._began
        left = f"  {units.duration(took / current * (total - current)).lower()} left" if current and took > 1 else ""
        return f"Total: {bar(current, total, self._bar())}{left}"

    def _draw(self) -> None:
        if not self._order:
            return
        self._last = self._now()
        total = self._total()
        lines = [self._lines[identity] for identity in self._order] + ([total] if total else [])
        width = self._width()
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        # The line of the total is gone when all is there.
        blank = max(0, self._drawn - len(lines))
        out = (
            up
            + "".join(f"\x1b[2K{line[:width]}\r\n" for line in lines)
            + "\x1b[2K\r\n" * blank
            + (f"\x1b[{blank}A" if blank else "")
        )
        write(out, self._fd)
        self._drawn = len(lines)
