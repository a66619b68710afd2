"""Where something stands in a Dockerfile, and errors that show it.

Runs in: whatever parses or evaluates a Dockerfile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from boxship.kit.errors import InvalidArgument


@dataclass(frozen=True)
class Source:
    """A Dockerfile's text."""

    name: str
    """What messages call it."""
    lines: tuple[str, ...] = field(repr=False)
    """Without their ends."""


class Location(NamedTuple):
    """A range of text. Lines and columns count from 1; the end is the last character."""

    line: int
    column: int
    end_line: int
    end_column: int


class DockerfileError(InvalidArgument):
    """A Dockerfile is wrong: what, where, and what to change.

    `str()` is one line, in BuildKit's words where it has some; `shown()` is the place with the lines around it.
    """

    def __init__(self, message: str, source: Source, location: Location, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.source = source
        self.location = location

    def __str__(self) -> str:
        return f"dockerfile parse error on line {self.location.line}: {super().__str__()}"

    def shown(self) -> str:
        """Several lines: file, line and column, the message, the line itself with a caret, the hint."""
        at = self.location
        hint = f"\nhint: {self.hint}" if self.hint else ""
        return f"{self.source.name}:{at.line}:{at.column}: {self.message}\n{excerpt(self.source, at)}{hint}"


_WIDTH = 110
_AROUND = 1


def excerpt(source: Source, location: Location) -> str:
    """The lines of a location with the one before and after, numbers in front, a caret below the column.

    What a terminal would act upon is taken out, and long lines are cut around the column.
    """
    first = max(1, location.line - _AROUND)
    last = min(len(source.lines), location.line + _AROUND)
    digits = len(str(last))
    shown = []
    for number in range(first, last + 1):
        text, caret = _cut(source.lines[number - 1], location.column - 1 if number == location.line else 0)
        mark = ">" if number == location.line else " "
        shown.append(f"{mark} {number:{digits}} | {text}".rstrip())
        if number == location.line:
            shown.append(f"  {' ' * digits} | {' ' * caret}^")
    return "\n".join(shown)


def _cut(line: str, column: int) -> tuple[str, int]:
    """A part of the line that fits, and where the column is in it."""
    start = max(0, column - _WIDTH // 2) if len(line) > _WIDTH else 0
    part = line[start:start + _WIDTH]
    clean = "".join(char if char.isprintable() else " " for char in part)
    return clean, min(column - start, len(clean))


def suggestion(word: str, known: list[str]) -> str:
    """The known word that is meant, as a question; "" if none is near."""
    import difflib

    found = difflib.get_close_matches(word[:80], known, 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""
