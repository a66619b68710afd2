"""Go's text/template, as far as people write it behind --format.

Runs in: the boxship command; imported only when a template is given.
Spec: https://pkg.go.dev/text/template; docker's functions: json, join, lower, upper, title, split, pad, truncate, println.
Not here: associated templates (define, template, block) and methods with arguments.

A value is what JSON has, or a `Row`, whose fields are made when they are asked for.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument
from boxship.oci import text as json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_SPACE = " \t\r\n"
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "\\": "\\",
    '"': '"',
    "'": "'",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "0": "\0",
}

MAPS = frozenset(
    (
        "Labels",
        "Volumes",
        "ExposedPorts",
        "PortBindings",
        "Ports",
        "Sysctls",
        "Tmpfs",
        "StorageOpt",
        "Config",
        "Annotations",
        "Options",
        "DriverOpts",
        "Data",
        "Networks",
    )
)
POINTERS = frozenset(
    (
        "Init",
        "PidsLimit",
        "OomKillDisable",
        "MemorySwappiness",
        "Healthcheck",
        "Health",
        "StopTimeout",
        "IPAMConfig",
        "Descriptor",
        "RootFS",
        "Default",
        "Platform",
        "Manifest",
        "Resources",
    )
)


class Row(dict):  # type: ignore[type-arg]
    """Fields by name; a value that is callable is called when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        return value() if callable(value) else value

    def made(self) -> dict[str, Any]:
        """All fields, made, in order of their names."""
        return {name: self[name] for name in sorted(self)}


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Nothing:
    """A field of a type that Go shows when it is not set: null in JSON."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __bool__(self) -> bool:
        return False


# --- reading ---------------------------------------------------------------------------------------------------------


def _split(source: str) -> list[tuple[bool, str]]:
    """(whether it is an action, text) in order, white space trimmed as {{- and -}} say."""
    parts: list[tuple[bool, str]] = []
    at, trim = 0, False
    while True:
        start = source.find("{{", at)
        plain = source[at:] if start < 0 else source[at:start]
        if trim:
            plain = plain.lstrip(_SPACE)
        if start < 0:
            parts.append((False, plain))
            return parts
        inside = start + 2
        if source[inside : inside + 1] == "-" and source[inside + 1 : inside + 2] in (" ", "\t", "\r", "\n"):
            plain = plain.rstrip(_SPACE)
            inside += 2
        parts.append((False, plain))
        end = _end_of_action(source, inside)
        body = source[inside:end]
        trim = len(body) > 1 and body[-1] == "-" and body[-2] in _SPACE
        parts.append((True, body[:-1] if trim else body))
        at = end + 2


def _end_of_action(source: str, at: int) -> int:
    quote = ""
    if source[at:].lstrip().startswith("/*"):
        end = source.find("*/", at)
        at = end + 2 if end >= 0 else len(source)
    while at < len(source):
        char = source[at]
        if quote:
            if char == "\\" and quote != "`":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "\"'`":
            quote = char
        elif source.startswith("}}", at):
            return at
        at += 1
    raise InvalidArgument("template parsing error: template: :1: unclosed action")


def _tokens(body: str) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(body):
        char = body[at]
        if char in _SPACE:
            if found and found[-1] != " ":
                found.append(" ")
            at += 1
        elif char in "\"`'":
            end = at + 1
            while end < len(body) and body[end] != char:
                end += 2 if body[end] == "\\" and char != "`" else 1
            if end >= len(body):
                raise InvalidArgument("template parsing error: template: :1: unterminated quoted string")
            found.append(body[at : end + 1])
            at = end + 1
        elif body.startswith(":=", at):
            found.append(":=")
            at += 2
        elif char in "()|,=":
            found.append(char)
            at += 1
        elif char in _NAME or char in ".$-+":
            end = at + 1
            number = char.isdigit() or (char in "-+" and body[end : end + 1].isdigit())
            while end < len(body) and (body[end] in _NAME or (number and body[end] == ".")):
                end += 1
            found.append(body[at:end])
            at = end
        else:
            raise InvalidArgument(f"template parsing error: template: :1: unexpected {char!r} in command")
    while found and found[-1] == " ":
        found.pop()
    return found


class _Node:
    """An action: what kind, its pipeline, and what it encloses."""

    __slots__ = ("body", "kind", "names", "other", "pipe", "text")

    def __init__(self, kind: str, text: str = "") -> None:
        self.kind = kind
        self.text = text
        self.names: list[str] = []
        self.pipe: list[list[Any]] = []
        self.body: list[_Node] = []
        self.other: list[_Node] = []


def _pipeline(node: _Node, tokens: list[str]) -> None:
    plain = [token for token in tokens if token != " "]
    for mark in (":=", "="):
        if mark in plain:
            where = plain.index(mark)
            names = [token for token in plain[:where] if token != ","]
            if names and all(name.startswith("$") for name in names):
                node.names = [f"{name}{mark}" for name in names]
                tokens = tokens[tokens.index(mark) + 1 :]
                break
    node.pipe, rest = _commands(tokens)
    if rest:
        raise InvalidArgument('template parsing error: template: :1: unexpected ")"')


def _commands(tokens: list[str]) -> tuple[list[list[Any]], list[str]]:
    """Commands between bars, up to the end or a closing parenthesis; an operand is (kind, value, fields)."""
    commands: list[list[Any]] = [[]]
    glued = False
    while tokens:
        token, tokens = tokens[0], tokens[1:]
        if token == ")":
            return commands, [token, *tokens]
        if token == " ":
            glued = False
            continue
        if token == "|":
            if not commands[-1]:
                raise InvalidArgument("template parsing error: template: :1: missing value for command")
            commands.append([])
            glued = False
            continue
        if token == "(":
            inner, tokens = _commands(tokens)
            if not tokens:
                raise InvalidArgument("template parsing error: template: :1: unclosed left paren")
            tokens = tokens[1:]
            commands[-1].append(["pipe", inner, []])
        elif token.startswith(".") and len(token) > 1 and glued and commands[-1]:
            commands[-1][-1][2].append(token[1:])
        else:
            commands[-1].append(_operand(token))
        glued = True
    if not commands[-1]:
        raise InvalidArgument("template parsing error: template: :1: missing value for command")
    return commands, []


def _operand(token: str) -> list[Any]:
    if token == ".":
        return ["dot", "", []]
    if token.startswith("."):
        return ["dot", "", [token[1:]]]
    if token.startswith("$"):
        return ["variable", token, []]
    if token[0] == "`":
        return ["literal", token[1:-1], []]
    if token[0] in "\"'":
        value = _unescape(token[1:-1])
        return ["literal", value if token[0] == '"' else ord(value), []]
    if token[0].isdigit() or token[0] in "+-":
        try:
            return ["literal", int(token, 0), []]
        except ValueError:
            return ["literal", float(token), []]
    if token in ("true", "false", "nil"):
        return ["literal", {"true": True, "false": False, "nil": None}[token], []]
    if token not in FUNCTIONS and token not in ("and", "or"):
        raise InvalidArgument(f'template parsing error: template: :1: function "{token}" not defined')
    return ["function", token, []]


def _unescape(body: str) -> str:
    out, at = [], 0
    while at < len(body):
        if body[at] == "\\" and at + 1 < len(body):
            letter = body[at + 1]
            if letter in "xuU":
                width = {"x": 2, "u": 4, "U": 8}[letter]
                out.append(chr(int(body[at + 2 : at + 2 + width], 16)))
                at += 2 + width
                continue
            out.append(_ESCAPES.get(letter, letter))
            at += 2
        else:
            out.append(body[at])
            at += 1
    return "".join(out)


def _parse(parts: list[tuple[bool, str]], nested: str) -> tuple[list[_Node], str, list[str]]:
    """Nodes up to the matching end or else; (nodes, the word that ended them, the tokens behind it)."""
    nodes: list[_Node] = []
    while parts:
        action, body = parts.pop(0)
        if not action:
            if body:
                nodes.append(_Node("text", body))
            continue
        if body.strip().startswith("/*"):
            continue
        tokens = _tokens(body)
        if not tokens:
            raise InvalidArgument("template parsing error: template: :1: missing value for command")
        word, rest = tokens[0], tokens[1:]
        if word in ("end", "else"):
            if not nested:
                raise InvalidArgument(f"template parsing error: template: :1: unexpected {{{{{word}}}}}")
            return nodes, word, rest
        if word in ("break", "continue"):
            nodes.append(_Node(word))
            continue
        if word in ("if", "range", "with"):
            nodes.append(_block(word, rest, parts))
            continue
        node = _Node("print")
        _pipeline(node, tokens)
        nodes.append(node)
    if nested:
        raise InvalidArgument("template parsing error: template: :1: unexpected EOF")
    return nodes, "", []


def _block(word: str, rest: list[str], parts: list[tuple[bool, str]]) -> _Node:
    node = _Node(word)
    _pipeline(node, rest)
    node.body, ended, behind = _parse(parts, word)
    if ended == "else":
        behind = [token for token in behind if token != " "] and behind
        while behind and behind[0] == " ":
            behind = behind[1:]
        if behind and behind[0] in ("if", "with"):
            node.other = [_block(behind[0], behind[1:], parts)]
        else:
            node.other, _, _ = _parse(parts, word)
    return node


class Template:
    """A template that has been read. Raises InvalidArgument for what is not one."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes, _, _ = _parse(_split(source), "")

    def render(self, value: object) -> str:
        """The text for one value. Raises InvalidArgument as Go's execution errors are worded."""
        out: list[str] = []
        try:
            _Execution(out, value).run(self.nodes, value)
        except InvalidArgument as error:
            raise InvalidArgument(self._placed(str(error))) from None
        return "".join(out)

    def _placed(self, message: str) -> str:
        """The message with line and column of the field that it names, counted as Go does."""
        path = message.partition("<")[2].partition(">")[0]
        found = self.source.find(path) if path.startswith(".") else -1
        if found < 0 or ":1:2:" not in message:
            return message
        at = found + path.rindex(".")
        before = self.source[:at]
        return message.replace(":1:2:", f":{before.count(chr(10)) + 1}:{at - before.rfind(chr(10)) - 1}:", 1)

    def fields(self) -> set[str]:
        """The names of fields that the template mentions, for a caller that must fetch what they need."""
        found: set[str] = set()
        _collect(self.nodes, found)
        return found


def _collect(nodes: list[_Node], found: set[str]) -> None:
    for node in nodes:
        _collect_pipe(node.pipe, found)
        _collect(node.body, found)
        _collect(node.other, found)


def _collect_pipe(pipe: list[list[Any]], found: set[str]) -> None:
    for command in pipe:
        for kind, value, fields in command:
            found.update(fields)
            if kind == "dot" and not fields:
                found.add(".")
            if kind == "pipe":
                _collect_pipe(value, found)


# --- carrying out ----------------------------------------------------------------------------------------------------


class _Execution:
    """One rendering: where it goes, and the variables."""

    def __init__(self, out: list[str], root: object) -> None:
        self.out = out
        self.variables: list[tuple[str, Any]] = [("$", root)]

    def run(self, nodes: list[_Node], dot: Any) -> None:
        for node in nodes:
            if node.kind == "text":
                self.out.append(node.text)
            elif node.kind == "print":
                value = self.pipe(node.pipe, dot)
                if node.names:
                    self.assign(node.names[0], value)
                else:
                    self.out.append(show(value))
            elif node.kind == "break":
                raise _Break
            elif node.kind == "continue":
                raise _Continue
            else:
                depth = len(self.variables)
                self.block(node, dot)
                del self.variables[depth:]

    def block(self, node: _Node, dot: Any) -> None:
        value = self.pipe(node.pipe, dot)
        if node.kind == "range":
            self.each(node, value, dot)
            return
        if node.names:
            self.assign(node.names[0], value)
        if truth(value):
            self.run(node.body, value if node.kind == "with" else dot)
        else:
            self.run(node.other, dot)

    def each(self, node: _Node, value: Any, dot: Any) -> None:
        if isinstance(value, dict):
            pairs = [(key, value[key]) for key in sorted(value)]
        elif isinstance(value, (list, tuple)):
            pairs = list(enumerate(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs = [(number, number) for number in range(value)]
        elif value is None or isinstance(value, Nothing):
            pairs = []
        else:
            raise InvalidArgument(f"template: :1: range can't iterate over {show(value)}")
        if not pairs:
            self.run(node.other, dot)
        for key, item in pairs:
            depth = len(self.variables)
            if len(node.names) == 2:
                self.assign(node.names[0], key)
                self.assign(node.names[1], item)
            elif node.names:
                self.assign(node.names[0], item)
            try:
                self.run(node.body, item)
            except _Continue:
                pass
            except _Break:
                del self.variables[depth:]
                return
            del self.variables[depth:]

    def assign(self, name: str, value: Any) -> None:
        if name.endswith(":="):
            self.variables.append((name[:-2], value))
            return
        for index in range(len(self.variables) - 1, -1, -1):
            if self.variables[index][0] == name[:-1]:
                self.variables[index] = (name[:-1], value)
                return
        raise InvalidArgument(f'template parsing error: template: :1: undefined variable "{name[:-1]}"')

    def pipe(self, commands: list[list[Any]], dot: Any) -> Any:
        value: Any = None
        for index, command in enumerate(commands):
            value = self.command(command, dot, [value] if index else [])
        return value

    def command(self, command: list[Any], dot: Any, last: list[Any]) -> Any:
        kind, name, fields = command[0]
        if kind != "function":
            if last or len(command) > 1:
                shown = "." + ".".join(fields) if kind == "dot" else str(name)
                raise InvalidArgument(f"template: :1: can't give argument to non-function {shown}")
            return self.operand(command[0], dot)
        if name in ("and", "or"):
            value: Any = None
            for operand in command[1:]:
                value = self.operand(operand, dot)
                if truth(value) == (name == "or"):
                    return value
            return last[0] if last else value
        arguments = [self.operand(operand, dot) for operand in command[1:]] + last
        try:
            return FUNCTIONS[name](*arguments)
        except (TypeError, IndexError, KeyError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"template: :1: error calling {name}: {error}") from None

    def operand(self, operand: list[Any], dot: Any) -> Any:
        kind, name, fields = operand
        if kind == "dot":
            value = dot
        elif kind == "variable":
            value = next((held for key, held in reversed(self.variables) if key == name), self)
            if value is self:
                raise InvalidArgument(f'template parsing error: template: :1: undefined variable "{name}"')
        elif kind == "literal":
            value = name
        elif kind == "pipe":
            value = self.pipe(name, dot)
        else:
            value = self.command([operand], dot, [])
        path = ""
        for field in fields:
            path += f".{field}"
            value = _field(value, field, path)
        return value


def _field(value: Any, name: str, path: str) -> Any:
    if isinstance(value, dict):
        try:
            found = value[name]
        except KeyError:
            if name in POINTERS and not isinstance(value, Row):
                return Nothing("<nil>")  # the engine leaves out what is not set
            if isinstance(value, Row):
                raise InvalidArgument(f'template: :1:2: executing "" at <{path}>: can\'t evaluate field {name}') from None
            raise InvalidArgument(
                f'template parsing error: template: :1:2: executing "" at <{path}>: map has no entry for key "{name}"'
            ) from None
        if found is None:
            return Nothing("map[]" if name in MAPS else "<nil>" if name in POINTERS else "[]")
        return found
    if value is None or isinstance(value, Nothing):
        raise InvalidArgument(f'template: :1: executing "" at <{path}>: nil pointer evaluating {path}')
    raise InvalidArgument(
        f'template: :1:2: executing "" at <{path}>: can\'t evaluate field {name} in type {type(value).__name__}'
    )


def truth(value: Any) -> bool:
    """Go's idea: the zero value of a type is false, an empty list or map too."""
    return bool(value)


def show(value: Any) -> str:
    """As fmt.Print writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Nothing):
        return value.text
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e21 else repr(value)
    if isinstance(value, Row):
        return f"{{{' '.join(show(item) for item in value.made().values())}}}"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{_inner(value[key])}' for key in sorted(value))}]"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(_inner(item) for item in value)}]"
    return str(value)


def _inner(value: Any) -> str:
    return "<nil>" if value is None else show(value)


def to_json(value: Any) -> str:
    """As Go's encoder writes it, & < > as they are."""
    return json_text.dumps(_plain(value), html=isinstance(value, Row))


def _plain(value: Any) -> Any:
    if isinstance(value, Nothing):
        return None
    if isinstance(value, Row):
        return value.made()
    return value


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else show(value)


def _printf(form: str, *values: Any) -> str:
    out, at, given = [], 0, list(values)
    while at < len(form):
        if form[at] != "%":
            out.append(form[at])
            at += 1
            continue
        end = at + 1
        while end < len(form) and form[end] in "+-# 0123456789.":
            end += 1
        flags, verb = form[at + 1 : end], form[end : end + 1]
        at = end + 1
        if verb == "%":
            out.append("%")
            continue
        if not given:
            out.append(f"%!{verb}(MISSING)")
            continue
        value = given.pop(0)
        if verb == "q":
            value, verb = json_text.dumps(show(value)), "s"
        elif verb in "vs":
            value, verb = show(value), "s"
        elif verb == "t":
            value, verb = show(bool(value)), "s"
        out.append(f"%{flags}{verb}" % value)
    return "".join(out)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if value is None or isinstance(value, Nothing):
            return ""
        if isinstance(value, dict):
            value = value[key] if key in value else ""  # noqa: SIM401  # a Row makes its values when they are asked for by index
        else:
            value = value[key]
    return value


def _compare(test: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    return lambda left, *rights: any(test(left, right) for right in rights)


def _slice(value: Any, *bounds: int) -> Any:
    return value[slice(*(bounds or (None,)))] if len(bounds) != 1 else value[bounds[0] :]


def _println(*values: Any) -> str:
    return " ".join(show(value) for value in values) + "\n"


def _join(values: Any, separator: str) -> str:
    return separator.join(show(value) for value in values or [])


def _pad(value: str, before: int, after: int) -> str:
    return value if not value else " " * before + value + " " * after


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "json": to_json,
    "join": _join,
    "upper": lambda value: show(value).upper(),
    "lower": lambda value: show(value).lower(),
    "title": lambda value: show(value).title(),
    "split": lambda value, separator: show(value).split(separator) if separator else list(show(value)),
    "pad": _pad,
    "truncate": lambda value, width: show(value)[:width],
    "println": _println,
    "print": lambda *values: (
        " ".join(show(value) for value in values) if not all(isinstance(v, str) for v in values) else "".join(values)
    ),
    "printf": _printf,
    "len": len,
    "index": _index,
    "slice": _slice,
    "not": lambda value: not truth(value),
    "eq": _compare(lambda a, b: _number(a) == _number(b)),
    "ne": _compare(lambda a, b: _number(a) != _number(b)),
    "lt": _compare(lambda a, b: a < b),
    "le": _compare(lambda a, b: a <= b),
    "gt": _compare(lambda a, b: a > b),
    "ge": _compare(lambda a, b: a >= b),
    "html": lambda value: show(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
}
