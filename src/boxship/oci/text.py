"""JSON text in and out: the C scanner and encoder of the interpreter, without the packages around them.

Runs in: every process of the thin set, where `import json` would cost more than all parsing (it pulls in re).
Spec: RFC 8259. What is read is stricter than Python's json: no NaN or Infinity, no number that overflows,
nothing after the value, at most `MAX_DEPTH` levels. What is written is what Go's encoding/json writes.
Not here: the shape of documents (`boxship.oci.struct`), limits on their size (whoever reads the file).
"""

from __future__ import annotations

import _json

from boxship.kit.errors import InvalidArgument

MAX_DEPTH = 100
"""Levels of lists and objects in a document; the deepest of the OCI documents has nine."""

_WHITESPACE = " \t\n\r"


class _Refused(Exception):
    """A value that the scanner would take; the argument is the literal as written."""


def _parse_float(literal: str) -> float:
    value = float(literal)
    if value - value != 0.0:  # an overflow became infinity, whose difference to itself is NaN
        raise _Refused(literal)
    return value


def _parse_constant(literal: str) -> object:
    raise _Refused(literal)


class _Context:
    """What the C scanner asks its decoder object for."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = staticmethod(_parse_float)
    parse_int = int
    parse_constant = staticmethod(_parse_constant)


_scan = _json.make_scanner(_Context)  # type: ignore[arg-type]  # any object with these attributes will do


def loads(data: bytes | str, name: str) -> object:
    """The value that the JSON text `data` stands for; `name` is the file or message it came from, for errors.

    Of two members with one name the last counts. Half a surrogate pair (`\\ud800`) becomes U+FFFD, as in Go:
    such a string could not be handed to the kernel. Raises InvalidArgument with line and column.
    """
    if isinstance(data, str):
        text = data
        if not text.isascii():
            text = _without_surrogates(text)
    else:
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            column = error.start - data.rfind(b"\n", 0, error.start)
            raise InvalidArgument(f"{name}: line {line}, column {column}: not UTF-8") from None
    start = 0 if text[:1] not in _WHITESPACE else len(text) - len(text.lstrip(_WHITESPACE))
    try:
        try:
            value, end = _scan(text, start)
        except SystemError:
            # The scanner raises json.decoder's exception, which before Python 3.12 it does not import itself.
            __import__("json.decoder")
            value, end = _scan(text, start)
    except StopIteration as stop:
        where = int(stop.value)
        words = "a value is expected" if where < len(text) else "unexpected end of JSON input"
        raise _error(name, text, where, words) from None
    except RecursionError:
        raise InvalidArgument(f"{name}: nested more than {MAX_DEPTH} levels deep") from None
    except _Refused as refused:
        literal = str(refused)
        where = _find_bare(text, start, literal)
        raise _error(name, text, where, f"{literal[:40]} is not a number in JSON") from None
    except ValueError as error:
        # json.decoder.JSONDecodeError, or int() on a number that is longer than sys.get_int_max_str_digits()
        where = getattr(error, "pos", -1)
        if where < 0:
            raise _error(name, text, _find_digits(text, start), "a number with too many digits") from None
        words = str(getattr(error, "msg", "invalid JSON"))
        if where >= len(text):
            words = "unexpected end of JSON input"
        raise _error(name, text, where, words[:1].lower() + words[1:]) from None
    if end != len(text):
        rest = text[end:].lstrip(_WHITESPACE)
        if rest:
            raise _error(name, text, len(text) - len(rest), "data after the end of the value")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, name)
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        value = _replace_surrogates(value)
    return value


def _error(name: str, text: str, where: int, words: str) -> InvalidArgument:
    line = text.count("\n", 0, where) + 1
    column = where - text.rfind("\n", 0, where)
    return InvalidArgument(f"{name}: line {line}, column {column}: {words}")


def _check_depth(value: object, name: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for node in level:
            if type(node) is dict:
                below += [child for child in node.values() if type(child) is dict or type(child) is list]
            elif type(node) is list:
                below += [child for child in node if type(child) is dict or type(child) is list]
        if not below:
            return
        level = below
    raise InvalidArgument(f"{name}: nested more than {MAX_DEPTH} levels deep")


def _bare_parts(text: str, start: int) -> list[tuple[int, str]]:
    """What lies outside of strings in a text whose strings are well-formed up to the place that is sought."""
    parts = []
    while True:
        quote = text.find('"', start)
        if quote < 0:
            parts.append((start, text[start:]))
            return parts
        parts.append((start, text[start:quote]))
        end = quote
        while True:
            end = text.find('"', end + 1)
            if end < 0:
                return parts
            before = text[quote + 1 : end]
            if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
                break
        start = end + 1


def _find_bare(text: str, start: int, literal: str) -> int:
    for where, part in _bare_parts(text, start):
        found = part.find(literal)
        if found >= 0:
            return where + found
    return start


def _find_digits(text: str, start: int) -> int:
    """The first number that int() refuses for its length."""
    for where, part in _bare_parts(text, start):
        position = 0
        for sign in ",:[]}":
            part = part.replace(sign, " ")
        for word in part.split():
            position = part.find(word, position)
            if len(word) > 640:  # the least limit that the interpreter can be given
                try:
                    int(word)
                except ValueError:
                    return where + position
            position += len(word)
    return start


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    return text


def _replace_surrogates(value: object) -> object:
    if isinstance(value, str):
        return value if value.isascii() else _without_surrogates(value)
    if isinstance(value, list):
        return [_replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_replace_surrogates(key): _replace_surrogates(item) for key, item in value.items()}
    return value


def _not_json(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not a JSON value")


_quote = _json.encode_basestring
_encode = _json.make_encoder(None, _not_json, _quote, None, ":", ",", False, False, False)


def dumps(obj: object, indent: int | str | None = None, *, html: bool = True) -> str:
    """The JSON text of `obj`, byte for byte as Go's encoding/json writes it; no newline at the end.

    `indent` as in Go's MarshalIndent: a string, or a number of spaces; None is compact. `<`, `>` and `&` are
    escaped, as Go does for the sake of HTML, unless `html` is False; what is not Unicode in a string (a file name) becomes
    U+FFFD.
    Raises TypeError for what JSON has no value for, ValueError for NaN and infinity.
    """
    if indent is None:
        text = "".join(_encode(obj, 0))
    else:
        parts: list[str] = []
        _indented(obj, "\n", indent if isinstance(indent, str) else " " * indent, parts)
        text = "".join(parts)
    # These letters can only be inside strings, so the finished text can be searched instead of every string.
    for letter, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")) if html else ():
        if letter in text:
            text = text.replace(letter, escaped)
    if not text.isascii():
        text = _without_surrogates(text).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text


def _indented(value: object, newline: str, indent: str, parts: list[str]) -> None:
    if isinstance(value, dict) and value:
        inner = newline + indent
        before = "{" + inner
        for key, item in value.items():
            parts.append(f"{before}{_quote(key)}: ")
            _indented(item, inner, indent, parts)
            before = "," + inner
        parts.append(newline + "}")
    elif isinstance(value, list | tuple) and value:
        inner = newline + indent
        before = "[" + inner
        for item in value:
            parts.append(before)
            _indented(item, inner, indent, parts)
            before = "," + inner
        parts.append(newline + "]")
    else:
        parts.extend(_encode(value, 0))
