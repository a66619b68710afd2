"""A Dockerfile's text as logical lines: one for each instruction, with its comments and here-documents.

Runs in: whatever parses a Dockerfile.
Spec: the Dockerfile reference, "Format", "Parser directives", "Here-documents".

    bytes ─► physical lines ─► logical lines ─► instructions (parse.py)
             (\\n or \\r\\n)     (continuations joined, comments out, here-documents attached)

A logical line remembers from which physical ones its characters come, so that errors show the right place.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from boxship.build.dockerfile.source import DockerfileError, Location, Source
from boxship.build.dockerfile.words import ExpansionError, Lexer

MAX_BYTES = 16 << 20
MAX_INSTRUCTIONS = 100_000
_BOM = b"\xef\xbb\xbf"

SPACES = re.compile(r"[\t\v\f\r ]+")
"""What separates an instruction's name and words."""
_DIRECTIVE = re.compile(r"([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*$")
_DIRECTIVES = frozenset(("syntax", "escape", "check"))
_HEREDOC = re.compile(r"(\d*)<<(-?)([^<]*)$")
_TABS = re.compile(r"^\t+", re.MULTILINE)


@dataclass(frozen=True)
class Heredoc:
    """A here-document."""

    name: str
    """The word that ends it."""
    content: str
    """As it is written, with the ends of its lines."""
    expand: bool
    """Whether its variables are expanded: no part of its name is quoted."""
    chomp: bool
    """Whether tabs at the beginning of its lines do not count (`<<-`)."""
    fd: int = 0

    @property
    def text(self) -> str:
        """The content without the tabs that do not count."""
        return _TABS.sub("", self.content) if self.chomp else self.content


@dataclass(frozen=True)
class Line:
    """A logical line."""

    source: Source
    text: str
    """Continuations joined, without what continues them."""
    pieces: tuple[tuple[int, int, int], ...] = field(repr=False)
    """Where its parts come from: (offset in `text`, line, column)."""
    end_line: int
    """The last physical line, that of its last here-document's end included."""
    comments: tuple[str, ...] = ()
    """The comments right above."""
    blanks: tuple[int, ...] = ()
    """Numbers of the empty physical lines within."""
    heredocs: tuple[Heredoc, ...] = ()

    @property
    def location(self) -> Location:
        """From its first character to its last."""
        _, line, column = self.pieces[0]
        return Location(line, column, self.end_line, max(1, len(self.source.lines[self.end_line - 1])))

    def at(self, offset: int, length: int = 1) -> Location:
        """Where a part of `text` stands."""
        line, column = self._place(offset)
        end_line, end_column = self._place(offset + max(length, 1) - 1)
        return Location(line, column, end_line, end_column)

    def _place(self, offset: int) -> tuple[int, int]:
        offset = max(0, min(offset, len(self.text) - 1))
        start, line, column = self.pieces[max(0, bisect_right(self.pieces, offset, key=lambda piece: piece[0]) - 1)]
        return line, column + offset - start

    def error(self, message: str, offset: int, length: int = 1, hint: str = "") -> DockerfileError:
        """An error that shows a part of `text`."""
        return DockerfileError(message, self.source, self.at(offset, length), hint)


@dataclass(frozen=True)
class Text:
    """A whole Dockerfile in logical lines."""

    source: Source
    directives: dict[str, tuple[str, int]]
    """syntax, escape, check: (value, line)."""
    lines: tuple[Line, ...]

    @property
    def escape(self) -> str:
        """The escape character."""
        return self.directives["escape"][0] if "escape" in self.directives else "\\"


def read(data: bytes, name: str) -> Text:
    """The logical lines. Raises DockerfileError."""
    raw = _decoded(data, name)
    source = Source(name, tuple(line.rstrip("\r") for line in raw))
    reader = _Reader(source, raw)
    lines = tuple(reader.lines())
    return Text(source, reader.directives, lines)


def _decoded(data: bytes, name: str) -> list[str]:
    start = Location(1, 1, 1, 1)
    if len(data) > MAX_BYTES:
        raise DockerfileError(f"{name} has {len(data)} bytes, more than {MAX_BYTES}", Source(name, ("",)), start)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DockerfileError("the file is in UTF-16", Source(name, ("",)), start, "save it as UTF-8")
    text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    physical = text.split("\n")
    if len(physical) > 1 and physical[-1] == "":
        physical.pop()
    return physical


class _Reader:
    """Reads physical lines one after the other."""

    def __init__(self, source: Source, raw: list[str]) -> None:
        self._source = source
        self._raw = raw
        self._physical = source.lines
        self._next = 0
        self.directives: dict[str, tuple[str, int]] = {}
        self._in_directives = True
        self._escape = "\\"
        self._comments: list[str] = []

    def lines(self) -> Iterator[Line]:
        count = 0
        while self._next < len(self._physical):
            line = self._logical()
            if line is None:
                continue
            count += 1
            if count > MAX_INSTRUCTIONS:
                raise line.error(f"more than {MAX_INSTRUCTIONS} instructions", 0)
            self._comments.clear()
            yield self._with_heredocs(line)

    def _error(self, message: str, line: int, hint: str = "") -> DockerfileError:
        text = self._physical[line - 1]
        return DockerfileError(message, self._source, Location(line, 1, line, max(1, len(text))), hint)

    def _checked(self, line: str, number: int) -> str:
        """A line that is not a comment: it must be text."""
        if not line.isascii() and any("\udc80" <= char <= "\udcff" for char in line):
            raise self._error("the line is not valid UTF-8", number, "save the file as UTF-8")
        return line

    def _logical(self) -> Line | None:
        """The next instruction's line; None for a comment, a directive or an empty line."""
        raw = self._physical[self._next]
        self._next += 1
        first = self._next
        stripped = raw.lstrip()
        if stripped.startswith("#"):
            self._comment(stripped[1:], first)
            return None
        self._in_directives = False
        text, more = self._continues(self._checked(stripped, first))
        if not text and not more:
            return None
        column = len(raw) - len(stripped) + 1
        parts, pieces, blanks = [text], [(0, first, column)], []
        size = len(text)
        while more and self._next < len(self._physical):
            raw = self._physical[self._next]
            self._next += 1
            if raw.lstrip().startswith("#"):
                continue
            if not raw.strip():
                blanks.append(self._next)
                continue
            text, more = self._continues(self._checked(raw, self._next))
            pieces.append((size, self._next, 1))
            parts.append(text)
            size += len(text)
        whole = "".join(parts)
        if not whole.strip():
            raise self._error("a continuation without an instruction", first, "remove the line")
        return Line(self._source, whole, tuple(pieces), self._next, tuple(self._comments), tuple(blanks))

    def _continues(self, line: str) -> tuple[str, bool]:
        """The line without the character that continues it, and whether it had one."""
        text = line.rstrip(" \t")
        if text.endswith(self._escape) and not text.endswith(self._escape * 2):
            return text[:-1], True
        return line, False

    def _comment(self, text: str, number: int) -> None:
        found = _DIRECTIVE.match(text.lstrip()) if self._in_directives else None
        name = found[1].lower() if found else ""
        if found is None or name not in _DIRECTIVES:
            self._in_directives = False
            if text.strip():
                self._comments.append(text.strip())
            else:
                self._comments.clear()
            return
        if name in self.directives:
            raise self._error(f"only one {name} parser directive can be used", number, "remove this line")
        value = found[2]
        if name == "escape":
            if value not in ("\\", "`"):
                raise self._error(f"invalid escape token '{value}' does not match ` or \\", number, "use \\ or `")
            self._escape = value
        self.directives[name] = (value, number)

    # here-documents

    def _with_heredocs(self, line: Line) -> Line:
        if "<<" not in line.text or not _may_have_heredocs(line, self._escape):
            return line
        found = []
        for start in heredoc_starts(line.text):
            begin = self._next
            name = start.name
            while self._next < len(self._physical):
                raw = self._physical[self._next]
                self._next += 1
                if (raw.lstrip("\t") if start.chomp else raw) == name:
                    break
                self._checked(raw, self._next)
            else:
                raise line.error(
                    f"unterminated heredoc {name}", line.text.find("<<"), len(name) + 2, f"end it with a line with only {name}")
            content = "".join(f"{each}\n" for each in self._raw[begin:self._next - 1])
            found.append(replace(start, content=content))
        return replace(line, heredocs=tuple(found), end_line=self._next)


def _may_have_heredocs(line: Line, escape: str) -> bool:
    command = split(line, escape)
    if command.keyword == "onbuild" and command.rest:
        command = split(line, escape, command.offset)
    return command.keyword in ("add", "copy", "run") and not (command.rest.startswith("[") and _is_json(command.rest))


def _is_json(rest: str) -> bool:
    try:
        return json_words(rest) is not None
    except ValueError:
        return True


# an instruction's parts


class Flag(NamedTuple):
    """`--name=value`, quotes and escapes taken away."""

    text: str
    offset: int
    length: int
    """As it is written."""


class Command(NamedTuple):
    """A logical line in its three parts."""

    keyword: str
    """In lower case."""
    written: str
    """The keyword as it is written."""
    flags: tuple[Flag, ...]
    rest: str
    """Without spaces around."""
    offset: int
    """Where `rest` begins in the line's text."""


def split(line: Line, escape: str, start: int = 0) -> Command:
    """The parts of a line's text from `start` on."""
    text = line.text
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    end = len(text.rstrip())
    space = SPACES.search(text, begin, end)
    written = text[begin:space.start() if space else end]
    if space is None:
        return Command(written.lower(), written, (), "", end)
    flags, offset = _flags(text, space.end(), end, escape)
    while offset < end and text[offset].isspace():
        offset += 1
    return Command(written.lower(), written, flags, text[offset:end], offset)


def _flags(text: str, pos: int, end: int, escape: str) -> tuple[tuple[Flag, ...], int]:
    """The words with two dashes at the beginning, and where what follows them begins. `--` alone ends them."""
    found: list[Flag] = []
    while True:
        while pos < end and text[pos].isspace():
            pos += 1
        if not text.startswith("--", pos, end):
            return tuple(found), pos
        begin = pos
        word, pos = _flag(text, pos, end, escape)
        if word == "--":
            return tuple(found), pos
        found.append(Flag(word, begin, pos - begin))


def _flag(text: str, pos: int, end: int, escape: str) -> tuple[str, int]:
    chars: list[str] = []
    quote = ""
    while pos < end:
        char = text[pos]
        if quote:
            if char == quote:
                quote = ""
                pos += 1
                continue
        elif char.isspace():
            break
        elif char in "'\"":
            quote = char
            pos += 1
            continue
        if char == escape:
            pos += 1
            char = text[pos:min(pos + 1, end)]
        chars.append(char)
        pos += 1
    return "".join(chars), min(pos, end)


def json_words(rest: str) -> list[str] | None:
    """A JSON array of strings; None for what is no JSON array. Raises ValueError for an array of something else."""
    if not rest.startswith("["):
        return None
    try:
        found = _DECODER.decode(rest)
    except RecursionError:
        found = [None]
    except ValueError:
        return None
    if not all(isinstance(each, str) for each in found):
        raise ValueError("when using JSON array syntax, arrays must be comprised of strings only")
    # A lone surrogate (\ud800) is no text.
    return [each.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for each in found]


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse)


# here-documents


_RAW = Lexer(keep_quotes=True, keep_escapes=True, keep_unset=True)
_PLAIN = Lexer(keep_unset=True)
_QUOTED = Lexer(keep_quotes=True, keep_unset=True)


def heredoc_starts(text: str) -> list[Heredoc]:
    """The here-documents that a line announces, without content."""
    try:
        words = _RAW.words(text, {})
    except ExpansionError:
        return []  # the shell will say what is wrong
    return [found for word in words if (found := heredoc_start(word)) is not None]


def heredoc_start(word: str) -> Heredoc | None:
    """The here-document that a word announces, if it does."""
    match = _HEREDOC.match(word)
    if match is None or not match[3]:
        return None
    try:
        words, raw = _PLAIN.words(match[3], {}), _QUOTED.words(match[3], {})
    except ExpansionError:
        return None
    if len(words) != 1:
        return None
    quotes = sum(words[0].count(quote) for quote in "'\"")
    raw_quotes = sum(raw[0].count(quote) for quote in "'\"")
    return Heredoc(words[0], "", quotes == raw_quotes, match[2] == "-", int(match[1][-9:] or "0"))
