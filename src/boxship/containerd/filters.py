"""containerd's filter language: what List and Subscribe requests narrow their answers with.

Runs in: the daemon.
Spec: containerd's pkg/filters:

    selectors := selector ("," selector)*        all of them must hold
    selector  := fieldpath (operator value)?     a path alone: the field is there
    fieldpath := field ("." field)*
    field     := quoted | [A-Za-z0-9_]+
    operator  := "==" | "!=" | "~="              the last one searches with a regular expression
    value     := quoted | [^\\s,]+
    quoted    := a string in double quotes with Go's escapes; after "~=" slashes or bars may stand in their place

Several filters are alternatives; none at all, or an empty one, lets everything pass. Regular expressions are Python's, which
read what RE2 reads in all common cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from boxship.kit.errors import InvalidArgument

Adaptor = Callable[[list[str]], str | None]
"""Gives the value of a field path of an object, None when there is none."""
Filter = Callable[[Adaptor], bool]

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_ESCAPE = re.compile(r"\\(?:([abfnrtv\\\"/|'])|([0-7]{3})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def error(self, message: str, position: int | None = None) -> InvalidArgument:
        at = self.position if position is None else position
        where = f"[{self.text}]"
        if at < len(self.text):
            where = f"[{self.text[:at]} >|{self.text[at]}|< {self.text[at + 1:]}]"
        return InvalidArgument(f"filters: parse error: {where}: {message}: invalid argument")

    def blanks(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def peek(self) -> str:
        self.blanks()
        return self.text[self.position] if self.position < len(self.text) else ""

    def take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.position)
        if found is None:
            return None
        self.position = found.end()
        return found.group()

    def quoted(self, regular_expression: bool) -> str:
        start = self.position
        quote = self.text[start]
        if quote != '"' and not regular_expression:
            raise self.error("invalid quote encountered")
        self.position += 1
        parts: list[str] = []
        while True:
            if self.position >= len(self.text) or self.text[self.position] == "\n":
                raise self.error("quoted literal not terminated", start)
            char = self.text[self.position]
            if char == quote:
                self.position += 1
                return "".join(parts)
            if char != "\\":
                parts.append(char)
                self.position += 1
                continue
            escape = _ESCAPE.match(self.text, self.position)
            if escape is None or (escape[1] and escape[1] in "\"/|'" and escape[1] != quote):
                raise self.error("illegal escape sequence")
            self.position = escape.end()
            if escape[1]:
                parts.append(_SIMPLE.get(escape[1], escape[1]))
            else:
                number = int(escape[2], 8) if escape[2] else int(escape[3] or escape[4] or escape[5], 16)
                if number > 0x10FFFF:
                    raise self.error("illegal escape sequence")
                parts.append(chr(number))

    def field(self) -> str:
        if self.peek() in ('"', "/", "|") and self.peek():
            return self.quoted(False)
        name = self.take(_FIELD)
        if name is None:
            raise self.error("expected field or quoted")
        return name

    def selector(self) -> Filter:
        path = [self.field()]
        while self.peek() == ".":
            self.position += 1
            path.append(self.field())
        if self.peek() in ("", ","):
            return lambda object_: object_(path) is not None
        at = self.position
        operator = self.take(_OPERATOR)
        if operator is None:
            raise self.error('expected an operator ("=="|"!="|"~=")')
        if operator not in ("==", "!=", "~="):
            raise self.error(f'unsupported operator "{operator}"', at)
        if self.peek() in ('"', "/", "|") and self.peek():
            value: str | None = self.quoted(operator == "~=")
        else:
            value = self.take(_VALUE)
        if value is None:
            raise self.error("expected value or quoted")
        return _comparison(path, operator, value)

    def selectors(self) -> Filter:
        every = [self.selector()]
        while self.peek() == ",":
            self.position += 1
            every.append(self.selector())
        if self.peek():
            raise self.error(f"unexpected input: {self.peek()}")
        if len(every) == 1:
            return every[0]
        return lambda object_: all(each(object_) for each in every)


def _comparison(path: list[str], operator: str, value: str) -> Filter:
    if operator == "==":
        return lambda object_: object_(path) == value
    if operator == "!=":
        return lambda object_: (object_(path) or "") != value
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise InvalidArgument(f"filters: regular expression {value!r}: {error}: invalid argument") from None
    return lambda object_: pattern.search(object_(path) or "") is not None


def parse(text: str) -> Filter:
    """One filter. Raises InvalidArgument."""
    if text == "":
        return lambda object_: True
    return _Parser(text).selectors()


def parse_all(texts: Iterable[str]) -> Filter:
    """Filters of which one must hold; none lets everything pass. Raises InvalidArgument."""
    filters = [parse(text) for text in texts]
    if not filters:
        return lambda object_: True
    if len(filters) == 1:
        return filters[0]
    return lambda object_: any(each(object_) for each in filters)


def labels_field(labels: Mapping[str, str], path: list[str]) -> str | None:
    """The value of `labels.<key>`, where the rest of the path is the key (`labels."a.b"` and `labels.a.b` are one)."""
    return labels.get(".".join(path))
