"""`.dockerignore`: which files of a context are left out.

Runs in: whatever reads a build context.
Spec: the Dockerfile reference, ".dockerignore files"; patterns as in Go's filepath.Match, and `**` for any number of folders.

A pattern that matches a folder matches all that is in it. The last pattern that matches decides; `!` takes a file in again.
Every pattern becomes a part of one regular expression, in which no part is tried again once it has matched: a context may come
from anyone, and the time stays in proportion to a path's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from posixpath import normpath

from boxship.kit.errors import InvalidArgument

MAX_PATTERNS = 20_000
_INNER = 3
"""How many `**` within a folder's name one pattern may have."""


def names(dockerfile: str) -> tuple[str, str]:
    """The files that may hold the patterns for a Dockerfile, by its path in the context: the first one that exists counts."""
    return f"{dockerfile}.dockerignore", ".dockerignore"


def read(data: bytes) -> list[str]:
    """The patterns in a .dockerignore."""
    found = []
    for line in data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n"):
        if line.startswith("#"):
            continue
        line = line.strip()
        exception = line.startswith("!")
        pattern = line.removeprefix("!").strip()
        if pattern:
            pattern = _clean(pattern)
            pattern = pattern[1:] if len(pattern) > 1 and pattern.startswith("/") else pattern
        if pattern or exception:
            found.append(("!" if exception else "") + pattern)
    return found


def _clean(path: str) -> str:
    """filepath.Clean."""
    cleaned = normpath(path)
    return cleaned[1:] if cleaned.startswith("//") else cleaned


def compile(patterns: Iterable[str]) -> Matcher:  # noqa: A001 - as re.compile
    """A matcher for patterns as `read` gives them. Raises InvalidArgument for one that is none."""
    found = []
    for text in patterns:
        text = text.strip()
        if not text:
            continue
        exception = text.startswith("!")
        pattern = text.removeprefix("!").strip()
        if not pattern:
            raise InvalidArgument('illegal exclusion pattern: "!"', "name a file behind the exclamation mark")
        found.append(_pattern(_clean(pattern), exception))
        if len(found) > MAX_PATTERNS:
            raise InvalidArgument(f"more than {MAX_PATTERNS} patterns in .dockerignore")
    return Matcher(found)


def excluder(patterns: Sequence[str]) -> Callable[[str], bool] | None:
    """Whether a path is left out by `COPY --exclude`; None without patterns. Raises InvalidArgument."""
    return compile(patterns).excludes if patterns else None


@dataclass(frozen=True)
class _Pattern:
    exception: bool
    regex: str
    """Matches the path or one of the folders that it is in."""
    above: tuple[str, ...]
    """A regular expression for each of the folders that it begins with, up to the first `**`."""
    deep: bool
    """Whether there is a `**`."""


class Matcher:
    """Compiled patterns."""

    def __init__(self, patterns: Sequence[_Pattern]) -> None:
        groups = [(exception, list(group)) for exception, group in groupby(patterns, lambda each: each.exception)]
        # From the last to the first: the first one that matches decides.
        self._groups = [
            (exception, re.compile("|".join(each.regex for each in group), re.DOTALL), group)
            for exception, group in reversed(groups)]
        self.has_exceptions = any(exception for exception, _ in groups)

    def excludes(self, path: str) -> bool:
        """Whether a path is left out: relative to the context, with slashes, without one at its ends."""
        for exception, regex, _ in self._groups:
            if regex.match(path):
                return not exception
        return False

    def prunes(self, path: str) -> bool:
        """Whether a folder is left out with everything in it, so that nobody needs to look."""
        exceptions: list[_Pattern] = []
        for exception, regex, group in self._groups:
            if regex.match(path):
                return not exception and not any(_below(each, path) for each in exceptions)
            if exception:
                exceptions += group
        return False


def _below(pattern: _Pattern, path: str) -> bool:
    """Whether a pattern can match something in a folder."""
    folders = path.split("/")
    if len(pattern.above) <= len(folders) and not pattern.deep:
        return False
    return all(re.fullmatch(regex, folder, re.DOTALL) for regex, folder in zip(pattern.above, folders, strict=False))


def _pattern(text: str, exception: bool) -> _Pattern:
    parts = text.split("/")
    if parts[0].startswith("**") and parts[0] != "**":
        # Docker's own shortcut: without any other wildcard, what follows is the end of the path, in the middle of a name too.
        rest = text[2:]
        parts = ["**", *(f"{'' if _is_wild(rest) else '*'}{rest}").split("/")]
    if parts[-1].endswith("**") and len(parts[-1]) > 2 and "**" not in parts[-1][:-2]:
        parts[-1] = parts[-1][:-1]  # what is below is matched anyway
    if sum(part.count("**") for part in parts if part != "**") > _INNER:
        raise InvalidArgument(f'bad pattern "{text}" in .dockerignore: more than {_INNER} times ** within names')
    above: list[str] = []
    deep = False
    for part in parts:
        deep = deep or "**" in part
        if not deep:
            above.append(_component(part, text))
    return _Pattern(exception, _regex(parts, text), tuple(above), deep)


def _is_wild(text: str) -> bool:
    return any(char in "*?[\\" for char in text)


def _regex(parts: list[str], text: str) -> str:
    """An expression that matches the path up to the end of one of its names."""
    runs: list[list[str]] = [[]]  # what lies between `**`
    for part in parts:
        if part == "**":
            runs.append([])
        else:
            runs[-1].append(_component(part, text))
    first, *rest = runs
    made = "/".join(first)
    if not rest:
        return f"{made}(?=/|\\Z)"
    if first:
        made += "/"
    # Each run has so many names, and its first place is as good as any other.
    for run in rest[:-1]:
        if run:
            made += f"(?>(?:[^/]*/)*?{'/'.join(run)}/)"
    if rest[-1]:
        return f"{made}(?:[^/]*/)*?{'/'.join(rest[-1])}(?=/|\\Z)"
    return made + "[^/]"  # `**` at the end: anything


def _component(part: str, text: str) -> str:
    """An expression for one name. What lies between stars is taken where it is found first."""
    pieces: list[list[str]] = [[]]
    inner = False
    pos = 0
    while pos < len(part):
        char = part[pos]
        pos += 1
        if char == "*" and part[pos:pos + 1] == "*":
            pos += 1
            pieces[-1].append("(?:.*/)?")
            inner = True
        elif char == "*":
            pieces.append([])
        elif char == "?":
            pieces[-1].append("[^/]")
        elif char == "[":
            found, pos = _class(part, pos, text)
            pieces[-1].append(found)
        elif char == "\\":
            if pos == len(part):
                raise InvalidArgument(f'bad pattern "{text}" in .dockerignore: syntax error in pattern')
            pieces[-1].append(re.escape(part[pos]))
            pos += 1
        else:
            pieces[-1].append(re.escape(char))
    first, *rest = ["".join(piece) for piece in pieces]
    if not rest:
        return first
    if inner:
        return "[^/]*".join([first, *rest])
    middle = "".join(f"(?>[^/]*?{piece})" for piece in rest[:-1] if piece)
    return f"{first}{middle}[^/]*{rest[-1]}(?=/|\\Z)"  # the last one must stand at the end of the name


def _class(part: str, pos: int, text: str) -> tuple[str, int]:
    """`[…]` behind its bracket: an expression, and where it goes on."""
    bad = InvalidArgument(f'bad pattern "{text}" in .dockerignore: syntax error in pattern', "a bracket must be closed")
    negated = part[pos:pos + 1] == "^"
    pos += negated
    made = ""
    while part[pos:pos + 1] != "]" or not made:
        low, pos = _member(part, pos, bad)
        high = low
        if part[pos:pos + 1] == "-":
            high, pos = _member(part, pos + 1, bad)
        # A range from high to low has nothing in it, and a slash is in no name.
        made += f"{re.escape(low)}-{re.escape(high)}" if low <= high else "/"
    return (f"[^/{made}]" if negated else f"(?!/)[{made}]"), pos + 1


def _member(part: str, pos: int, bad: InvalidArgument) -> tuple[str, int]:
    char = part[pos:pos + 1]
    if char == "\\":
        pos += 1
        char = part[pos:pos + 1]
    elif char in ("-", "]", ""):
        raise bad
    if not char:
        raise bad
    return char, pos + 1
