"""Command-line flags as docker reads them: the role of Go's pflag, for the few kinds of flags there are.

Runs in: the boxship command.
Spec: docker's conventions: flags end at the first word that is none; `-it` joins switches; `-eA=B`, `-e A=B`, `--env=A=B`,
`--env A=B` mean the same; `--rm=false` turns a switch off; `--` ends the flags.
Not here: what the flags mean (`boxship.cli.run`). argparse is not used because it costs more than a whole `boxship run`
of a small program saves elsewhere, and because it does not stop at the first word.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SWITCH, VALUE, LIST, NUMBER = "switch", "value", "list", "number"

_TRUE, _FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")


class UsageError(InvalidArgument):
    """The command line itself is wrong; the text is followed by where to find help."""


class Flag:
    """One flag. `metavar` names its value in the help; a switch has none."""

    __slots__ = ("help", "kind", "long", "metavar", "short")

    def __init__(self, long: str, kind: str, text: str, *, short: str = "", metavar: str = "") -> None:
        self.long = long
        self.kind = kind
        self.help = text
        self.short = short
        self.metavar = metavar

    @property
    def empty(self) -> object:
        """What the flag is when it is not given: False, None or an empty list."""
        return {SWITCH: False, VALUE: None, LIST: [], NUMBER: None}[self.kind]

    @property
    def shown(self) -> str:
        """As pflag names it in errors."""
        return f"-{self.short}, --{self.long}" if self.short else f"--{self.long}"


class Parsed:
    """Values by long name, whether given or not, and the words after the flags."""

    __slots__ = ("given", "values", "words")

    def __init__(self, flags: Sequence[Flag]) -> None:
        self.values: dict[str, object] = {flag.long: flag.empty for flag in flags}
        self.given: set[str] = set()
        self.words: list[str] = []

    def switch(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.values[name] is True

    def text(self, name: str) -> str | None:
        """A value; None when it was not given."""
        value = self.values[name]
        return value if isinstance(value, str) else None

    def number(self, name: str) -> int | None:
        """A whole number; None when it was not given."""
        value = self.values[name]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def list(self, name: str) -> list[str]:
        """The values of a flag that may be repeated, in order."""
        value = self.values[name]
        return [str(item) for item in value] if isinstance(value, list) else []

    def set(self, flag: Flag, value: object) -> None:
        """Note one occurrence: the last counts, lists grow."""
        self.given.add(flag.long)
        if flag.kind == LIST:
            self.values[flag.long] = [*self.list(flag.long), value]
        else:
            self.values[flag.long] = value


_LISTS = ("list", "filter", "map", "ulimit", "mount", "gpu-request", "network", "list-of-bytes", "stringArray")


def table(lines: str) -> tuple[Flag, ...]:
    """Flags from lines of `[s,]long [metavar] | text`. What has no metavar is a switch; `int` is a number; some are lists."""
    flags = []
    for line in lines.strip().splitlines():
        left, _, text = line.partition("|")
        names, _, metavar = left.strip().partition(" ")
        short, comma, long = names.partition(",")
        if not comma:
            short, long = "", names
        metavar = metavar.strip()
        kind = SWITCH if not metavar else NUMBER if metavar == "int" else LIST if metavar in _LISTS else VALUE
        flags.append(Flag(long, kind, text.strip(), short=short, metavar=metavar))
    return tuple(flags)


def parse(flags: Sequence[Flag], arguments: Sequence[str], *, interspersed: bool = False) -> Parsed:
    """Read flags up to the first word, or wherever they stand if `interspersed`. Raises UsageError in docker's words."""
    long = {flag.long: flag for flag in flags}
    short = {flag.short: flag for flag in flags if flag.short}
    parsed = Parsed(flags)
    rest = list(arguments)
    words: list[str] = []
    while rest and (interspersed or (rest[0].startswith("-") and rest[0] != "-")):
        argument = rest.pop(0)
        if argument == "--":
            break
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if name not in long:
                raise UsageError(f"unknown flag: --{name}")
            _take(parsed, long[name], f"--{name}", value if equals else None, rest)
        else:
            _cluster(parsed, short, argument[1:], rest)
    parsed.words = words + rest
    return parsed


def _cluster(parsed: Parsed, short: dict[str, Flag], letters: str, rest: list[str]) -> None:
    for i, letter in enumerate(letters):
        flag = short.get(letter)
        if flag is None:
            raise UsageError(f"unknown shorthand flag: '{letter}' in -{letters}")
        following = letters[i + 1 :]
        if following.startswith("="):
            _take(parsed, flag, f"-{letter}", following[1:], rest)
            return
        if flag.kind != SWITCH:
            _take(parsed, flag, f"'{letter}' in -{letters}", following or None, rest)
            return
        parsed.set(flag, True)


def _take(parsed: Parsed, flag: Flag, written: str, value: str | None, rest: list[str]) -> None:
    if flag.kind == SWITCH:
        if value is not None and value not in _TRUE + _FALSE:
            raise UsageError(
                f'invalid argument "{value}" for "{flag.shown}" flag: strconv.ParseBool: parsing "{value}": invalid syntax')
        parsed.set(flag, value is None or value in _TRUE)
        return
    if value is None:
        if not rest:
            raise UsageError(f"flag needs an argument: {written}")
        value = rest.pop(0)
    if flag.kind == NUMBER:
        try:
            parsed.set(flag, int(value))
        except ValueError:
            raise UsageError(
                f'invalid argument "{value}" for "{flag.shown}" flag: strconv.ParseInt: parsing "{value}": invalid syntax'
            ) from None
        return
    parsed.set(flag, value)


def describe(flags: Sequence[Flag]) -> str:
    """The flags as lines of a help text."""
    rows = []
    for flag in flags:
        if not flag.help:
            continue
        name = f"-{flag.short}, --{flag.long}" if flag.short else f"    --{flag.long}"
        rows.append((f"  {name} {flag.metavar}".rstrip(), flag.help))
    width = max(len(left) for left, _ in rows) + 3
    return "\n".join(left.ljust(width) + right for left, right in rows)
