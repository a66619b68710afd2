"""Expansion of variables and splitting into words, as BuildKit's frontend does it.

Runs in: whatever evaluates a Dockerfile.
Spec: the Dockerfile reference, "Environment replacement"; POSIX.1-2017 XCU 2.2, 2.6.2 and 2.13 where it follows the shell.

    $NAME ${NAME}                     the value, or nothing
    ${NAME:-w} ${NAME-w}              w if NAME is unset (with colon: or empty)
    ${NAME:+w} ${NAME+w}              w if NAME is set (with colon: and not empty), else nothing
    ${NAME:?w} ${NAME?w}              an error with the text w if NAME is unset (with colon: or empty)
    ${NAME#p} ${NAME##p}              without the shortest, longest prefix that matches p
    ${NAME%p} ${NAME%%p}              the same at the end
    ${NAME/p/w} ${NAME//p/w}          the first, every match of p replaced by w

Patterns know `*` and `?`, no brackets. Every match takes time linear in the value: a Dockerfile may come from anyone.
Not here: which instructions expand what (instructions.py, stages.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from boxship.kit.errors import InvalidArgument

MAX_WORD = 1 << 20
"""Characters that one expansion may make: a kernel takes 128 KiB for one string of an environment."""
MAX_DEPTH = 100
"""How deep `${a:-${b:-…}}` may be nested."""

_SPECIAL = frozenset("@*#?-$!0")
_LITERAL = re.compile(r"""[^$<'"\\`}/]+""")
"""Characters that mean nothing by whatever rules."""


class ExpansionError(InvalidArgument):
    """A word cannot be expanded."""


class Lexer:
    """The rules by which one kind of text is expanded. The defaults are those for instructions' words."""

    def __init__(
        self, escape: str = "\\", *, keep_quotes: bool = False, keep_escapes: bool = False, keep_unset: bool = False,
        quotes: bool = True, limit: int = MAX_WORD,
    ) -> None:
        """`keep_*`: what stays in the text as it is written. `quotes`: whether quotes mean anything."""
        self.escape = escape
        self.keep_quotes = keep_quotes
        self.keep_escapes = keep_escapes
        self.keep_unset = keep_unset
        self.quotes = quotes
        self.limit = limit

    def expand(self, text: str, variables: Mapping[str, str], unset: set[str] | None = None) -> str:
        """The text with its variables and without its quotes. `unset` gets the names that have no value.

        Raises ExpansionError.
        """
        if "$" not in text and self.escape not in text and '"' not in text and "'" not in text:
            return text
        return _Run(self, text, variables, unset).whole()[0]

    def words(self, text: str, variables: Mapping[str, str]) -> list[str]:
        """The text as words: spaces separate them, also those that come out of variables. Raises ExpansionError."""
        return _Run(self, text, variables, None).whole()[1]


class _Words:
    """Collects words while text is read."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._parts: list[str] = []

    def add(self, text: str) -> None:
        """Text in which spaces separate words."""
        pieces = text.split()
        if not pieces:
            if text:
                self.end()
            return
        if text[0].isspace():
            self.end()
        for piece in pieces[:-1]:
            self._parts.append(piece)
            self.end()
        self._parts.append(pieces[-1])
        if text[-1].isspace():
            self.end()

    def add_raw(self, text: str) -> None:
        """Text that belongs to the word whatever it is."""
        self._parts.append(text)

    def end(self) -> None:
        """End the word, if there is one."""
        word = "".join(self._parts)
        if word:
            self.done.append(word)
            self._parts.clear()


class _Run:
    """One text being read."""

    def __init__(self, lexer: Lexer, text: str, variables: Mapping[str, str], unset: set[str] | None) -> None:
        self._lexer = lexer
        self._text = text
        self._variables = variables
        self._unset = unset
        self._pos = 0
        self._keep_escapes = lexer.keep_escapes
        self._depth = 0
        self._size = 0

    def whole(self) -> tuple[str, list[str]]:
        try:
            return self._until("", self._keep_escapes, in_pattern=False)
        except ExpansionError as error:
            shown = self._text if len(self._text) <= 200 else self._text[:200] + "…"
            raise ExpansionError(f"failed to process {shown!r}: {error.args[0]}") from None

    # characters: "" is the end

    def _peek(self) -> str:
        return self._text[self._pos:self._pos + 1]

    def _next(self) -> str:
        char = self._text[self._pos:self._pos + 1]
        self._pos += 1
        return char

    @property
    def _at_end(self) -> bool:
        return self._pos >= len(self._text)

    def _counted(self, text: str) -> str:
        """`text`, if there is still room for it."""
        self._size += len(text)
        if self._size > self._lexer.limit:
            raise ExpansionError(f"the result is longer than {self._lexer.limit} characters")
        return text

    # the grammar

    def _until(self, stop: str, keep_escapes: bool, *, in_pattern: bool) -> tuple[str, list[str]]:
        """Text up to `stop`, "" for the end. `in_pattern`: a quoted escape character is doubled, for a pattern is read again."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpansionError(f"nested deeper than {MAX_DEPTH}")
        before, self._keep_escapes = self._keep_escapes, keep_escapes
        try:
            return self._collect(stop, in_pattern)
        finally:
            self._keep_escapes = before
            self._depth -= 1

    def _collect(self, stop: str, in_pattern: bool) -> tuple[str, list[str]]:
        result: list[str] = []
        words = _Words()
        while not self._at_end:
            char = self._peek()
            if stop and char == stop:
                self._pos += 1
                words.end()
                return "".join(result), words.done
            if char == "$":
                found = self._dollar()
                result.append(found)
                words.add(found)
            elif char == "<":
                found = self._less()
                result.append(found)
                words.add_raw(found)
            elif char in "'\"" and self._lexer.quotes:
                found = self._single(in_pattern) if char == "'" else self._double(in_pattern)
                result.append(found)
                words.add_raw(found)
            else:
                self._plain(result, words)
        if stop:
            raise ExpansionError(f"unexpected end of statement while looking for matching {stop}")
        words.end()
        return "".join(result), words.done

    def _plain(self, result: list[str], words: _Words) -> None:
        if (run := _LITERAL.match(self._text, self._pos)) is not None:
            self._pos = run.end()
            result.append(self._counted(run[0]))
            words.add(run[0])
            return
        char = self._next()
        if char != self._lexer.escape:
            result.append(self._counted(char))
            words.add(char)
            return
        if self._keep_escapes:
            result.append(self._counted(char))
            words.add_raw(char)
        escaped = self._next()
        if escaped:  # at the very end the escape character means nothing
            result.append(self._counted(escaped))
            words.add_raw(escaped)

    def _less(self) -> str:
        """`<`, or `<<` with the blanks behind it, which do not end the word: it may be a here-document."""
        self._pos += 1
        if self._peek() != "<":
            return self._counted("<")
        start = self._pos - 1
        self._pos += 1
        while self._peek() in ("\t", "\r", " "):
            self._pos += 1
        return self._counted(self._text[start:self._pos])

    def _single(self, in_pattern: bool) -> str:
        end = self._text.find("'", self._pos + 1)
        if end < 0:
            raise ExpansionError("unexpected end of statement while looking for matching single-quote")
        inner = self._text[self._pos + 1:end]
        self._pos = end + 1
        if in_pattern:
            inner = inner.replace(self._lexer.escape, self._lexer.escape * 2)
        return self._counted(f"'{inner}'" if self._lexer.keep_quotes else inner)

    def _double(self, in_pattern: bool) -> str:
        lexer = self._lexer
        quote = self._next() if lexer.keep_quotes else self._next() and ""
        result = [quote]
        while not self._at_end:
            char = self._peek()
            if char == '"':
                self._pos += 1
                return "".join([*result, quote])
            if char == "$":
                result.append(self._dollar())
                continue
            self._pos += 1
            if char == lexer.escape:
                following = self._peek()
                if not following:
                    break
                if following in ('"', "$", lexer.escape):
                    if self._keep_escapes:
                        result.append(char)
                    char = self._next()
                elif self._keep_escapes and (not lexer.keep_quotes or in_pattern):
                    result.append(char)
            result.append(self._counted(char))
        raise ExpansionError("unexpected end of statement while looking for matching double-quote")

    def _name(self) -> str:
        """Digits, one special parameter, or letters, digits and underscores; "" if there is none."""
        start = self._pos
        first = self._peek()
        if first.isdecimal():
            while self._peek().isdecimal():
                self._pos += 1
        elif first and first in _SPECIAL:
            self._pos += 1
        else:
            while (char := self._peek()) and (char.isalpha() or char.isdecimal() or char == "_"):
                self._pos += 1
        return self._text[start:self._pos]

    def _value(self, name: str) -> str | None:
        value = self._variables.get(name)
        if value is None and self._unset is not None:
            self._unset.add(name)
        return value

    def _dollar(self) -> str:
        self._pos += 1
        if self._peek() != "{":
            name = self._name()
            if not name:
                return self._counted("$")
            value = self._value(name)
            if value is None:
                return self._counted("$" + name) if self._lexer.keep_unset else ""
            return self._counted(value)
        self._pos += 1
        if self._at_end:
            raise ExpansionError("syntax error: missing '}'")
        if self._peek() in "{}:":
            raise ExpansionError("syntax error: bad substitution")
        return self._substitution(self._name())

    def _substitution(self, name: str) -> str:
        start = self._pos - len(name) - 2
        operator = self._next()
        if operator == "}":
            value = self._value(name)
            if value is None:
                return self._counted(f"${{{name}}}") if self._lexer.keep_unset else ""
            return self._counted(value)
        if operator == "/":
            return self._replace(name, start)
        colon = operator == ":"
        if colon:
            operator = self._next()
        if not operator:
            raise ExpansionError("syntax error: missing '}'")
        is_pattern = operator in "#%"
        if operator not in "+-?#%" or (colon and is_pattern):
            raise ExpansionError(f"unsupported modifier ({':' if colon else ''}{operator}) in substitution")
        size = self._size
        word = self._operand("}", is_pattern, "syntax error: missing '}'")
        value = self._value(name)
        if value is None and self._lexer.keep_unset:
            return self._text[start:self._pos]
        self._size = size  # the operand is no part of the result unless it is taken
        if is_pattern:
            return self._counted(_trimmed(value or "", operator, word))
        missing = value is None or (colon and not value)
        if operator == "-":
            return self._counted(word if missing or value is None else value)
        if operator == "+":
            return "" if missing else self._counted(word)
        if missing or value is None:
            raise ExpansionError(f"{name}: {word or 'is not allowed to be ' + ('unset' if value is None else 'empty')}")
        return self._counted(value)

    def _operand(self, stop: str, is_pattern: bool, missing: str) -> str:
        try:
            return self._until(stop, is_pattern, in_pattern=is_pattern)[0]
        except ExpansionError:
            if self._at_end:
                raise ExpansionError(missing) from None
            raise

    def _replace(self, name: str, start: int) -> str:
        every = self._peek() == "/"
        if every:
            self._pos += 1
        size = self._size
        pattern = self._operand("/", True, "syntax error: missing '/' in ${}")
        try:
            replacement = self._until("}", True, in_pattern=False)[0]
        except ExpansionError:
            if self._at_end:
                raise ExpansionError("syntax error: missing '}'") from None
            raise
        value = self._value(name)
        if value is None and self._lexer.keep_unset:
            return self._text[start:self._pos]
        self._size = size
        return self._replaced(value or "", Glob(pattern), replacement, every)

    def _replaced(self, value: str, glob: Glob, replacement: str, every: bool) -> str:
        parts: list[str] = []
        pos = kept = 0
        last = -1
        while (found := glob.search(value, pos)) is not None:
            start, end = found
            if start == end == last:  # nothing, right behind what was found before: one character further
                if start >= len(value):
                    break
                pos, last = start + 1, -1
                continue
            parts.append(self._counted(value[kept:start]))
            parts.append(self._counted(replacement))
            pos = kept = last = end
            if not every:
                break
        parts.append(self._counted(value[kept:]))
        return "".join(parts)


def _trimmed(value: str, operator: str, word: str) -> str:
    longest = word.startswith(operator)
    glob = Glob(word[1:] if longest else word)
    if operator == "#":
        return value[glob.prefix(value, longest=longest) or 0:]
    end = glob.reverse().prefix(value[::-1], longest=longest) or 0
    return value[:len(value) - end]


class Glob:
    """A pattern of literal characters, `?` (any one) and `*` (any number), in which a backslash takes those their meaning.

    What lies between stars is found one after the other, without trying again: that is enough for such patterns, and linear.
    """

    def __init__(self, pattern: str) -> None:
        """Raises ExpansionError for a backslash in front of a character that has no meaning."""
        segments: list[list[str | None]] = [[]]  # None is `?`
        pos = 0
        while pos < len(pattern):
            char = pattern[pos]
            pos += 1
            if char == "*":
                segments.append([])
            elif char == "?":
                segments[-1].append(None)
            elif char == "\\":
                escaped = pattern[pos:pos + 1]
                pos += 1
                if not escaped or escaped not in "}/*?\\":
                    raise ExpansionError(f"invalid pattern ({pattern}) in substitution: invalid escape '\\{escaped}'")
                segments[-1].append(escaped)
            else:
                segments[-1].append(char)
        self._segments = [tuple(each) for each in segments]

    def reverse(self) -> Glob:
        """The pattern for the value read from its end."""
        made = Glob("")
        made._segments = [each[::-1] for each in self._segments[::-1]]
        return made

    def prefix(self, value: str, *, longest: bool, start: int = 0) -> int | None:
        """Where the shortest or longest match that begins at `start` ends; None if there is none."""
        first, *rest = self._segments
        if not _compiled(first).match(value, start):
            return None
        end = start + len(first)
        for index, segment in enumerate(rest):
            if longest and index == len(rest) - 1:
                return _last(segment, value, end)
            found = _compiled(segment).search(value, end)
            if found is None:
                return None
            end = found.end()
        return end

    def search(self, value: str, start: int) -> tuple[int, int] | None:
        """The first match from `start` on, as long as it can be."""
        found = _compiled(self._segments[0]).search(value, start)
        if found is None:
            return None
        # If what follows is not behind the first place, it is not behind a later one either.
        end = self.prefix(value, longest=True, start=found.start())
        return None if end is None else (found.start(), end)


def _compiled(segment: tuple[str | None, ...]) -> re.Pattern[str]:
    return re.compile("".join("." if char is None else re.escape(char) for char in segment), re.DOTALL)


def _last(segment: tuple[str | None, ...], value: str, start: int) -> int | None:
    """Where the last match of a segment behind `start` ends."""
    found = _compiled(segment[::-1]).search(value[start:][::-1])
    return None if found is None else len(value) - found.start()
