"""Where processes begin: the entry points that pyproject.toml and the native programs name.

Runs in: the process that the user started.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def boxship() -> int:
    """The boxship command; ends the process, or returns the exit code of the daemon."""
    import sys

    if sys.argv[1:2] != ["daemon"]:
        _command()
    return _daemon(sys.argv[2:])


def _command() -> NoReturn:
    import os
    import sys

    from boxship.cli.main import main

    code = main(sys.argv[1:], os.environ)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or nobody reads any more
    # Taking the interpreter apart would take as long as a small command.
    os._exit(code)


def boxshipd() -> int:
    """The daemon under its own name; returns its exit code."""
    import sys

    return _daemon(sys.argv[1:])


def _daemon(arguments: list[str]) -> int:
    import os
    import sys

    if os.geteuid() != 0 and not {"publish", "--version", "-v", "--help", "-h"} & {*arguments}:
        # Now: what the daemon imports may start threads, and one that has some cannot enter a user namespace.
        from boxship.daemon import rootless
        from boxship.kit.errors import BoxshipError

        try:
            rootless.enter(os.environ)
        except (BoxshipError, OSError) as error:
            sys.stderr.write(f"boxshipd: {error}\n")
            return 1
    from boxship.daemon.server import main

    return main(arguments, os.environ)
