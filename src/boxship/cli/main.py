"""The boxship command: which subcommand, and how errors and exit codes reach the caller.

Runs in: the process that the user started.
Not here: what the subcommands do; each is imported when it is called for, so that none pays for another.
"""

from __future__ import annotations

import os

from boxship import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HELP = """Usage:  boxship COMMAND

Containers in Python.

Commands:
  run         run a command in a new container
  doctor      say what this machine offers for containers, what it lacks, and what that costs

Options:
  -v, --version   print the version
      --help      show this

Run 'boxship COMMAND --help' for more information on a command.
"""


def say(text: str) -> None:
    """Tell the user, on standard error."""
    try:
        os.write(2, f"boxship: {text}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # a closed or full standard error must not change the exit code


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out a command line (without the program's name); returns the exit code."""
    first = arguments[0] if arguments else "--help"
    if first in ("--version", "-v", "version"):
        os.write(1, f"boxship version {__version__}\n".encode())
        return 0
    if first in ("--help", "-h", "help"):
        os.write(1, HELP.encode())
        return 0
    if first in ("run", "doctor"):
        return _command(first, arguments[1:], environ)
    kind = "unknown flag: " if first.startswith("-") else "unknown command: boxship "
    say(f"{kind}{first}\n\nRun 'boxship --help' for more information")
    return 125 if first.startswith("-") else 1


def _command(name: str, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    from boxship.cli.flags import UsageError
    from boxship.kit.errors import BoxshipError

    failure = 125 if name == "run" else 1
    try:
        if name == "run":
            from boxship.cli.run import run

            return run(arguments, environ, say)
        from boxship.cli.doctor import doctor

        return doctor(arguments, say)
    except UsageError as error:
        say(f"{error}\n\nRun 'boxship {name} --help' for more information")
    except BoxshipError as error:
        say(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        say(f"{(error.strerror or str(error)).lower()}{where}")
    return failure
