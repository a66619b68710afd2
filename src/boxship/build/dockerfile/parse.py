"""From a Dockerfile's text to typed instructions.

Runs in: whatever builds or checks.
Spec: the Dockerfile reference; where it is silent, what BuildKit's frontend 1.26 does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from boxship.build.dockerfile import instructions as typed
from boxship.build.dockerfile import lines, mounts
from boxship.build.dockerfile.lines import Command, Flag, Heredoc, Line, heredoc_start, json_words
from boxship.build.dockerfile.source import Source, suggestion
from boxship.kit.errors import InvalidArgument

_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*\Z")
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@dataclass(frozen=True)
class Block:
    """A stage as it is written: FROM and what follows."""

    start: typed.From
    instructions: tuple[typed.Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A parsed Dockerfile."""

    text: lines.Text
    arguments: tuple[typed.Arg, ...]
    """Those before the first FROM."""
    blocks: tuple[Block, ...]

    @property
    def escape(self) -> str:
        """The escape character."""
        return self.text.escape

    @property
    def syntax(self) -> str:
        """The frontend that the file asks for; "" for none."""
        return self.text.directives.get("syntax", ("", 0))[0]


def parse(data: bytes, name: str = "Dockerfile") -> Dockerfile:
    """Parse a Dockerfile. `name`: what errors call it. Raises DockerfileError."""
    text = lines.read(data, name)
    arguments: list[typed.Arg] = []
    blocks: list[tuple[typed.From, list[typed.Instruction]]] = []
    for line in text.lines:
        made = _instruction(line, text.escape)
        if isinstance(made, typed.From):
            blocks.append((made, []))
        elif blocks:
            blocks[-1][1].append(made)
        elif isinstance(made, typed.Arg):
            arguments.append(made)
        else:
            raise made.error("no build stage in current context", hint=f"{made.keyword} must come after FROM")
    if not blocks:
        last = len(text.source.lines)
        empty = Line(text.source, text.source.lines[-1], ((0, last, 1),), last)
        what = "dockerfile contains no stages to build" if text.lines else "file with no instructions"
        raise empty.error(what, 0, hint="begin with FROM IMAGE")
    return Dockerfile(text, tuple(arguments), tuple(Block(start, tuple(rest)) for start, rest in blocks))


def trigger(text: str, name: str = "ONBUILD") -> tuple[typed.Instruction, ...]:
    """What an ONBUILD trigger of a base image is to do. `name`: what errors call it. Raises DockerfileError."""
    found = lines.read(text.encode("utf-8", "surrogateescape"), name)
    made = tuple(_instruction(line, found.escape) for line in found.lines)
    for each in made:
        _check_trigger(each.keyword, each.source, 0)
    if len(made) != 1:
        whole = Line(Source(name, (text,)), text, ((0, 1, 1),), 1)
        raise whole.error("onbuild trigger should be a single expression", 0)
    return made


def _check_trigger(keyword: str, line: Line, offset: int) -> None:
    if keyword.upper() == "ONBUILD":
        raise line.error("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed", offset, len(keyword))
    if keyword.upper() in ("MAINTAINER", "FROM"):
        raise line.error(f"{keyword.upper()} isn't allowed as an ONBUILD trigger", offset, len(keyword))


def _instruction(line: Line, escape: str, start: int = 0) -> typed.Instruction:
    command = lines.split(line, escape, start)
    reader = _READERS.get(command.keyword)
    if reader is None:
        begin = line.text.find(command.written, start)
        names = [name.upper() for name in _READERS]
        raise line.error(
            f"unknown instruction: {command.written[:80]}", begin, len(command.written),
            suggestion(command.written.upper(), names) or "an instruction may go on with a backslash at the end of its line")
    return reader(_Request(line, command, escape))


class _Request:
    """One instruction being read."""

    def __init__(self, line: Line, command: Command, escape: str) -> None:
        self.line = line
        self.command = command
        self.escape = escape
        self.rest = command.rest
        self.offset = command.offset
        self.common: dict[str, Any] = {
            "keyword": command.keyword.upper(), "written": command.written, "source": line}

    @property
    def keyword(self) -> str:
        return self.command.keyword.upper()

    def fail(self, message: str, near: str = "", hint: str = "") -> NoReturn:
        """Raise an error at `near` in the arguments; at the arguments without it."""
        found = self.rest.find(near) if near else -1
        if found >= 0:
            raise self.line.error(message, self.offset + found, len(near), hint)
        if self.rest:
            raise self.line.error(message, self.offset, len(self.rest), hint)
        raise self.line.error(message, 0, len(self.line.text), hint)

    def fail_flag(self, message: str, flag: Flag, hint: str = "") -> NoReturn:
        raise self.line.error(message, flag.offset, flag.length, hint)

    def flags(self, **known: Callable[[str], Any] | None) -> dict[str, Any]:
        """The flags' values: None stands for a boolean, `list` for one that may be repeated. Underscores stand for dashes."""
        values: dict[str, Any] = {}
        kinds = {name.replace("_", "-"): (name, kind) for name, kind in known.items()}
        for flag in self.command.flags:
            name, equals, value = flag.text[2:].partition("=")
            if name not in kinds:
                hint = suggestion(name, list(kinds))
                self.fail_flag(f"unknown flag: --{name}", flag, hint.replace("did you mean ", "did you mean --"))
            key, kind = kinds[name]
            if key in values and kind is not list:
                self.fail_flag(f"duplicate flag specified: --{name}", flag)
            if kind is None:
                if (equals and not value) or value.lower() not in ("", "true", "false"):
                    self.fail_flag(
                        f"expecting boolean value for flag --{name}, not: {value}" if value else
                        f"missing a value on flag: --{name}", flag, "true or false")
                values[key] = value.lower() != "false"
                continue
            if not equals:
                self.fail_flag(f"missing a value on flag: --{name}", flag, f"--{name}=VALUE")
            if kind is list:
                values.setdefault(key, []).append(value)
            else:
                values[key] = self._value(kind, value, flag)
        return values

    def _value(self, kind: Callable[[str], Any], value: str, flag: Flag) -> Any:
        try:
            return kind(value)
        except InvalidArgument as error:
            self.fail_flag(str(error.args[0]), flag, error.hint)

    def json(self) -> tuple[str, ...] | None:
        """The arguments as a JSON array; None for what is none."""
        try:
            found = json_words(self.rest)
        except ValueError as error:
            self.fail(str(error), hint="quote each of them with double quotes")
        return None if found is None else tuple(found)

    def split(self) -> tuple[str, ...]:
        """The arguments at white space."""
        return tuple(lines.SPACES.split(self.rest)) if self.rest else ()

    def one(self) -> str:
        """The arguments as one text."""
        if not self.rest:
            self.fail(f"{self.keyword} requires exactly one argument")
        return self.rest

    def words(self) -> list[str]:
        """The arguments at white space outside of quotes; quotes and escapes stay in."""
        return _quoted_words(self.rest, self.escape)


def _quoted_words(text: str, escape: str) -> list[str]:
    words: list[str] = []
    word: list[str] = []
    quote = ""
    pos = 0
    while pos < len(text):
        char = text[pos]
        pos += 1
        if not quote and char.isspace():
            if word:
                words.append("".join(word))
                word.clear()
            continue
        if char == escape and quote != "'":
            if pos == len(text):
                break  # at the very end it means nothing
            word.append(char)
            char = text[pos]
            pos += 1
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        word.append(char)
    if word:
        words.append("".join(word))
    return words


# readers, one for each instruction


def _from(request: _Request) -> typed.From:
    words = request.split()
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not _STAGE_NAME.match(name):
            request.fail(
                f'invalid name for build stage: "{words[2]}", name can\'t start with a number or contain symbols', words[2])
    elif len(words) != 1:
        request.fail("FROM requires either one or three arguments", hint="FROM IMAGE, or FROM IMAGE AS NAME")
    flags = request.flags(platform=str)
    _, as_written, name_written = words if name else (*words, "", "")
    return typed.From(
        **request.common, **flags, image=words[0], name=name, as_written=as_written, name_written=name_written)


def _arg(request: _Request) -> typed.Arg:
    request.flags()
    words = request.words()
    if not words:
        request.fail("ARG requires at least one argument")
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            request.fail("ARG names can not be blank", word)
        pairs.append((name, value if equals else None))
    return typed.Arg(**request.common, pairs=tuple(pairs))


def _pairs(request: _Request) -> dict[str, Any]:
    request.flags()
    words = request.words()
    if not words:
        request.fail(f"{request.keyword} requires at least one argument")
    if "=" not in words[0]:
        parts = lines.SPACES.split(request.rest, 1)
        if len(parts) < 2:
            request.fail(f"{request.keyword} must have two arguments", hint=f"{request.keyword} NAME=VALUE")
        return {"pairs": ((parts[0], parts[1]),), "legacy": True}
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            request.fail(
                f'Syntax error - can\'t find = in "{word}". Must be of the form: name=value', word,
                "quote a value that has spaces")
        if not name:
            request.fail(f"{request.keyword} names can not be blank", word)
        pairs.append((name, value))
    return {"pairs": tuple(pairs)}


def _env(request: _Request) -> typed.Env:
    return typed.Env(**request.common, **_pairs(request))


def _label(request: _Request) -> typed.Label:
    return typed.Label(**request.common, **_pairs(request))


def _command(request: _Request) -> dict[str, Any]:
    words = request.json()
    return {"words": words} if words is not None else {"text": request.rest}


def _choice(what: str, *known: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in known:
            raise InvalidArgument(f'{what} "{value}"', f"it may be {' or '.join(known)}")
        return value

    return check


def _run(request: _Request) -> typed.Run:
    flags = request.flags(
        mount=list, network=_choice("invalid network mode", "default", "none", "host"),
        security=_choice("security is not valid:", "sandbox", "insecure"), device=list)
    found = []
    for value in flags.pop("mount", ()):
        try:
            found.append(mounts.parse(value))
        except InvalidArgument as error:
            request.fail_flag(str(error.args[0]), _flag_of(request, value), error.hint)
    common = {**request.common, **flags, "mounts": tuple(found), "devices": tuple(flags.pop("device", ()))}
    common.pop("device", None)
    command = _command(request)
    heredocs = request.line.heredocs
    if command.get("words") is not None or not heredocs:
        return typed.Run(**common, **command)
    only = heredoc_start(request.rest)
    if only is not None:
        return typed.Run(**common, text=heredocs[0].text, script=heredocs[0].text, script_name=only.name)
    text = request.rest + "".join(f"\n{each.content}{each.name}" for each in heredocs)
    return typed.Run(**common, text=text)


def _flag_of(request: _Request, value: str) -> Flag:
    return next(flag for flag in request.command.flags if flag.text.endswith(value))


def _cmd(request: _Request) -> typed.Cmd:
    request.flags()
    return typed.Cmd(**request.common, **_command(request))


def _entrypoint(request: _Request) -> typed.Entrypoint:
    request.flags()
    return typed.Entrypoint(**request.common, **_command(request))


def _copying(request: _Request) -> dict[str, Any]:
    words = request.json()
    if words is None:
        words = request.split()
    if len(words) < 2:
        request.fail(
            f"{request.keyword} requires at least two arguments, but only one was provided. Destination could not be determined",
            hint=f"{request.keyword} SOURCE DESTINATION")
    *sources, destination = words
    if heredoc_start(destination) is not None:
        request.fail(f"{request.keyword} cannot accept a heredoc as a destination", destination)
    contents: dict[str, Heredoc] = {each.name: each for each in request.line.heredocs}
    paths, inline = [], []
    for each in sources:
        start = heredoc_start(each)
        if start is None:
            paths.append(each)
            continue
        content = contents.get(start.name)
        inline.append(typed.Inline(start.name, content.text if content else "", start.expand))
    return {"sources": tuple(paths), "heredocs": tuple(inline), "destination": destination}


def _copy(request: _Request) -> typed.Copy:
    found = _copying(request)
    # "from" is a word of Python's, not only of Docker's.
    flags = request.flags(**{"from": str}, chown=str, chmod=str, link=None, exclude=list, parents=None)
    flags["exclude"] = tuple(flags.get("exclude", ()))
    flags["from_"] = flags.pop("from", "")
    return typed.Copy(**request.common, **found, **flags)


def _add(request: _Request) -> typed.Add:
    found = _copying(request)
    flags = request.flags(chown=str, chmod=str, link=None, keep_git_dir=None, checksum=str, unpack=None, exclude=list)
    flags["exclude"] = tuple(flags.get("exclude", ()))
    return typed.Add(**request.common, **found, **flags)


def _expose(request: _Request) -> typed.Expose:
    request.flags()
    words = request.split()
    if not words:
        request.fail("EXPOSE requires at least one argument", hint="EXPOSE PORT")
    return typed.Expose(**request.common, ports=words)


def _volume(request: _Request) -> typed.Volume:
    request.flags()
    words = request.json()
    if words is None:
        words = request.split()
    if not words:
        request.fail("VOLUME requires at least one argument", hint="VOLUME /PATH")
    paths = tuple(word.strip() for word in words)
    if "" in paths:
        request.fail("VOLUME specified can not be an empty string")
    return typed.Volume(**request.common, paths=paths)


def _user(request: _Request) -> typed.User:
    request.flags()
    return typed.User(**request.common, user=request.one())


def _workdir(request: _Request) -> typed.Workdir:
    request.flags()
    return typed.Workdir(**request.common, path=request.one())


def _stopsignal(request: _Request) -> typed.Stopsignal:
    request.flags()
    return typed.Stopsignal(**request.common, signal=request.one())


def _maintainer(request: _Request) -> typed.Maintainer:
    request.flags()
    return typed.Maintainer(**request.common, name=request.one())


def _shell(request: _Request) -> typed.Shell:
    request.flags()
    words = request.json()
    if words is None and request.rest:
        request.fail("SHELL requires the arguments to be in JSON form", hint='such as SHELL ["/bin/bash", "-c"]')
    if not words:
        request.fail("SHELL requires at least one argument", hint='such as SHELL ["/bin/bash", "-c"]')
    return typed.Shell(**request.common, words=words)


def _healthcheck(request: _Request) -> typed.Healthcheck:
    if not request.rest:
        request.fail("HEALTHCHECK requires at least one argument", hint="HEALTHCHECK CMD COMMAND, or HEALTHCHECK NONE")
    kind, *more = request.rest.split(None, 1)
    rest = more[0] if more else ""
    if kind.upper() == "NONE":
        if rest:
            request.fail("HEALTHCHECK NONE takes no arguments", rest)
        return typed.Healthcheck(**request.common, disabled=True)
    flags = request.flags(
        interval=_interval, timeout=_interval, start_period=_interval, start_interval=_interval, retries=_retries)
    if kind.upper() != "CMD":
        request.fail(f'Unknown type "{kind.upper()}" in HEALTHCHECK (try CMD)', kind)
    flags = {name if name == "retries" else f"{name}_ns": value for name, value in flags.items()}
    if not rest or rest.replace(" ", "") == "[]":
        request.fail("Missing command after HEALTHCHECK CMD", hint="HEALTHCHECK CMD COMMAND")
    request.offset += len(request.rest) - len(rest)
    request.rest = rest
    command = _command(request)
    return typed.Healthcheck(**request.common, **command, **flags)


def _interval(text: str) -> int:
    """Nanoseconds. Raises InvalidArgument."""
    if not text:
        return 0
    rest = text.removeprefix("+")
    if rest == "0":
        return 0
    if len(rest) > 100 or _DURATION.sub("", rest) or not rest:
        raise InvalidArgument(f'time: invalid duration "{text[:100]}"', "such as 30s or 1m30s")
    found = int(sum(float(number) * _NS[unit] for number, unit in _DURATION.findall(rest)))
    if found >= 1 << 63:
        raise InvalidArgument(f'time: invalid duration "{text}"', "such as 30s or 1m30s")
    if 0 < found < _NS["ms"]:
        raise InvalidArgument(f"interval {text} cannot be less than 1ms")
    return found


def _retries(text: str) -> int:
    digits = text.lstrip("+-")
    if text and (not digits.isascii() or not digits.isdecimal() or len(digits) > 10 or int(digits) >= 1 << 31):
        raise InvalidArgument(f'--retries is not a number: "{text}"')
    if text.startswith("-"):
        raise InvalidArgument(f"--retries cannot be negative ({text})")
    return int(text or 0)


def _onbuild(request: _Request) -> typed.Onbuild:
    request.flags()
    if not request.rest:
        request.fail("ONBUILD requires at least one argument", hint="ONBUILD INSTRUCTION …")
    line, start = request.line, request.command.offset
    inner = lines.split(line, request.escape, start)
    _check_trigger(inner.keyword, line, start)
    _instruction(line, request.escape, start)
    heredocs = "".join(f"\n{each.content}{each.name}" for each in line.heredocs)
    return typed.Onbuild(**request.common, trigger=request.rest + heredocs)


_READERS: dict[str, Callable[[_Request], typed.Instruction]] = {
    "add": _add, "arg": _arg, "cmd": _cmd, "copy": _copy, "entrypoint": _entrypoint, "env": _env, "expose": _expose,
    "from": _from, "healthcheck": _healthcheck, "label": _label, "maintainer": _maintainer, "onbuild": _onbuild, "run": _run,
    "shell": _shell, "stopsignal": _stopsignal, "user": _user, "volume": _volume, "workdir": _workdir,
}
