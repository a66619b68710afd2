"""One subcommand: its usage, flags and number of words, and how a wrong command line is answered.

Runs in: the boxship command.
Spec: docker's own words (cobra and pflag, as docker/cli sets them up).
"""

from __future__ import annotations

from boxship.cli import flags as f

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from boxship.cli.http.client import Connection


class UsageFailure(Exception):
    """The command line is wrong: `text` is all that is printed, `code` the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class Exit(Exception):
    """The command ends with `code`, and with `text` on standard error."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Call:
    """One call of a subcommand: what was written, the environment, and the engine."""

    def __init__(self, name: str, parsed: f.Parsed, environ: Mapping[str, str]) -> None:
        self.name = name
        self.parsed = parsed
        self.words = parsed.words
        self.environ = environ
        self.failed = False
        self._engine: Connection | None = None

    @property
    def engine(self) -> Connection:
        """A connection to the engine, which is started if need be. Raises ConnectFailed."""
        if self._engine is None:
            from boxship.cli.http.where import connect

            self._engine = connect(self.environ)
        return self._engine

    def on(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.parsed.switch(name)

    def text(self, name: str) -> str:
        """A value; "" when it was not given."""
        return self.parsed.text(name) or ""

    def all(self, name: str) -> list[str]:
        """The values of a repeated flag."""
        return self.parsed.list(name)

    def number(self, name: str) -> int | None:
        """A number; None when it was not given."""
        return self.parsed.number(name)

    def filters(self) -> dict[str, dict[str, bool]]:
        """`--filter` as the engine takes it."""
        found: dict[str, dict[str, bool]] = {}
        for word in self.all("filter"):
            name, _, value = word.partition("=")
            found.setdefault(name.strip().lower(), {})[value.strip()] = True
        return found

    def format(self) -> str:
        """`--format`, for which --json is a short form."""
        return "json" if self.on("json") else self.text("format")


class Command:
    """What one subcommand takes, and the function that does it (which returns the exit code)."""

    __slots__ = ("about", "flags", "function", "interspersed", "least", "most", "usage")

    def __init__(
        self,
        usage: str,
        about: str,
        function: Callable[[Call], int],
        flags: str = "",
        *,
        least: int = 0,
        most: int = 0,
        interspersed: bool = True,
    ) -> None:
        self.usage = usage
        self.about = about
        self.function = function
        self.flags = flags
        self.least = least
        self.most = most
        self.interspersed = interspersed


MANY = 1 << 30
LISTING = """
format string | Format output using a custom template: 'table', 'table TEMPLATE', 'json' or a Go template
json | Print the output as JSON, one object a line
"""
HELP = "help | "


def carry_out(name: str, command: Command, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Parse and do it. Raises UsageFailure, Exit, BoxshipError."""
    flags = f.table(command.flags + "\n" + HELP)
    try:
        parsed = f.parse(flags, arguments, interspersed=command.interspersed)
        if parsed.switch("help"):
            show_help(name, command, flags)
            return 0
        _check_filters(parsed, flags)
        _count(name, command, len(parsed.words))
        return command.function(Call(name, parsed, environ))
    except f.UsageError as error:
        raise UsageFailure(
            f"{error}\n\nUsage:  boxship {name}{command.usage}\n\nRun 'boxship {name} --help' for more information", 125
        ) from None


def _check_filters(parsed: f.Parsed, flags: Sequence[f.Flag]) -> None:
    for flag in flags:
        wrong = next((word for word in parsed.list(flag.long) if "=" not in word), None) if flag.metavar == "filter" else None
        if wrong is not None:
            raise f.UsageError(f'invalid argument "{wrong}" for "{flag.shown}" flag: bad format of filter (expected name=value)')


def show_help(name: str, command: Command, flags: Sequence[f.Flag]) -> None:
    """The help text, on standard output."""
    from boxship.cli.show.table import write

    options = f.describe([flag for flag in flags if flag.help])
    write(f"Usage:  boxship {name}{command.usage}\n\n{command.about}\n" + (f"\nOptions:\n{options}\n" if options else ""))


def _count(name: str, command: Command, count: int) -> None:
    if command.least <= count <= command.most:
        return
    see = "Run"
    if command.most == 0:
        wants = "accepts no arguments"
    elif command.least == command.most:
        wants = f"requires {command.least} argument{'s' if command.least > 1 else ''}"
    elif command.most < MANY and count > command.most:
        wants = f"requires at most {command.most} argument{'s' if command.most > 1 else ''}"
        if command.least:
            wants = f"requires at least {command.least} and at most {command.most} arguments"
    else:
        wants = f"requires at least {command.least} argument{'s' if command.least > 1 else ''}"
        if command.most < MANY:
            wants = f"requires at least {command.least} and at most {command.most} arguments"
        else:
            see = "See"
    raise UsageFailure(
        f"boxship: 'boxship {name}' {wants}\n\nUsage:  boxship {name}{command.usage}\n\n"
        f"{see} 'boxship {name} --help' for more information",
        1,
    )


def each(call: Call, words: Sequence[str], act: Callable[[str], object], *, echo: bool = True) -> int:
    """Do it for every word, print those that went well, and the errors of the others; the exit code."""
    from boxship.cli.http.client import ApiError
    from boxship.cli.show.table import write

    errors = []
    for word in words:
        try:
            act(word)
        except ApiError as error:
            errors.append(str(error))
            continue
        if echo:
            write(f"{word}\n")
    for text in errors:
        write(f"{text}\n", 2)
    return 1 if errors else 0
