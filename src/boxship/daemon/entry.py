"""Where processes begin: the entry points that pyproject.toml and the native programs name.

Runs in: the process that the user started.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def boxship() -> int:
    """The boxship command; ends the process, or returns the exit code of the daemon."""
    import os
    import sys

    if sys.argv[1:2] != ["daemon"]:
        _command()
    from boxship.daemon.server import main as daemon

    return daemon(sys.argv[2:], os.environ)


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
    import os
    import sys

    from boxship.daemon.server import main

    return main(sys.argv[1:], os.environ)
