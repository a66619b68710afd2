"""Reading a command line as runc does, and the help texts.

Runs in: the runtime.
Spec: runc's own command line: long options with one dash or two, values after "=" or as the next argument, flags of a
command before or after the container's id, none behind what `stop_after` says.
Not here: argparse, which costs as much as creating a container.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BOOL, STRING, INT, LIST = "bool", "string", "int", "list"


class UsageError(InvalidArgument):
    """The command line itself is wrong: the usage is shown with it."""


class HelpWanted(Exception):
    """-h or --help was given."""


class Flag:
    """One option: `names` without dashes, the first one its key; `value` the default."""

    __slots__ = ("hidden", "kind", "names", "usage", "value")

    def __init__(self, names: str, usage: str, kind: str = BOOL, value: object = None, *, hidden: bool = False) -> None:
        self.names = names.split(", ")
        self.usage = usage
        self.kind = kind
        defaults: dict[str, object] = {BOOL: False, STRING: "", INT: 0, LIST: []}
        self.value = defaults[kind] if value is None else value
        self.hidden = hidden


class Parsed:
    """The values by key, and the other arguments."""

    __slots__ = ("args", "given", "values")

    def __init__(self, flags: list[Flag]) -> None:
        self.values: dict[str, object] = {f.names[0]: list(f.value) if isinstance(f.value, list) else f.value for f in flags}
        self.given: set[str] = set()
        self.args: list[str] = []

    def text(self, key: str) -> str:
        """A string option."""
        return str(self.values[key])

    def yes(self, key: str) -> bool:
        """A switch."""
        return bool(self.values[key])

    def number(self, key: str) -> int:
        """An integer option."""
        value = self.values[key]
        assert isinstance(value, int)
        return value

    def many(self, key: str) -> list[str]:
        """An option that may be repeated."""
        value = self.values[key]
        assert isinstance(value, list)
        return value


def parse(flags: list[Flag], argv: list[str], stop_after: int | None = None) -> Parsed:
    """Sort `argv` into options and arguments; after `stop_after` arguments all the rest are arguments.

    Raises HelpWanted, UsageError in the words of runc's own parser.
    """
    table = {name: flag for flag in flags for name in flag.names}
    parsed = Parsed(flags)
    i = 0
    while i < len(argv):
        arg = argv[i]
        i += 1
        if stop_after is not None and len(parsed.args) >= stop_after:
            parsed.args += [arg, *argv[i:]]
            break
        if arg == "--":
            parsed.args += argv[i:]
            break
        if not arg.startswith("-") or arg == "-" or _is_number(arg):
            parsed.args.append(arg)
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if name in ("h", "help") and name not in table:
            raise HelpWanted
        flag = table.get(name)
        if flag is None and not arg.startswith("--") and len(name) > 1 and all(c in table for c in name):
            # -it: single letters together; all but the last are switches.
            argv = argv[:i] + [f"-{c}" for c in name] + argv[i:]
            continue
        if flag is None:
            raise UsageError(f"flag provided but not defined: -{name}")
        if flag.kind == BOOL:
            _store(parsed, flag, _boolean(name, value) if equals else True)
            continue
        if not equals:
            if i >= len(argv):
                raise UsageError(f"flag needs an argument: {arg}")
            value = argv[i]
            i += 1
        _store(parsed, flag, value)
    return parsed


def _is_number(arg: str) -> bool:
    return arg[1:].isdigit()


def _boolean(name: str, value: str) -> bool:
    if value.lower() in ("true", "t", "1"):
        return True
    if value.lower() in ("false", "f", "0"):
        return False
    raise UsageError(f'invalid value "{value}" for flag -{name}: parse error')


def _store(parsed: Parsed, flag: Flag, value: object) -> None:
    key = flag.names[0]
    parsed.given.add(key)
    if flag.kind == LIST:
        parsed.many(key).append(str(value))
    elif flag.kind == INT:
        try:
            parsed.values[key] = int(str(value), 0)
        except ValueError:
            why = f'strconv.ParseInt: parsing "{value}": invalid syntax'
            raise UsageError(f'invalid value "{value}" for flag -{key}: {why}') from None
    else:
        parsed.values[key] = value


def help_text(
    name: str, summary: str, synopsis: str, description: str, flags: list[Flag], commands: Sequence[tuple[str, str]] = ()
) -> str:
    """A help page in the layout that runc's has."""
    parts = [f"NAME:\n   {name} - {summary}\n\nUSAGE:\n   {name} {synopsis}\n"]
    if description:
        parts.append("DESCRIPTION:\n   " + description.replace("\n", "\n   ") + "\n")
    if commands:
        width = max(len(n) for n, _ in commands) + 2
        parts.append("COMMANDS:\n" + "".join(f"   {n.ljust(width)}{usage}\n" for n, usage in commands))
    rows = []
    for flag in [*flags, Flag("help, h", "show help")]:
        if not flag.hidden:
            dashed = ", ".join(("--" if len(n) > 1 else "-") + n for n in flag.names)
            rows.append((dashed + (f" {flag.kind}" if flag.kind != BOOL else ""), flag.usage))
    width = max(len(left) for left, _ in rows) + 2
    parts.append("OPTIONS:\n" + "".join(f"   {left.ljust(width)}{usage}\n" for left, usage in rows))
    return "\n".join(parts)
