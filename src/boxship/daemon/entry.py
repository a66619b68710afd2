"""Where processes begin: the entry points that pyproject.toml and the native programs name.

Runs in: the process that the user started.
"""

from __future__ import annotations


def boxship() -> int:
    """The boxship command; returns its exit code."""
    import os
    import sys

    if sys.argv[1:2] == ["daemon"]:
        from boxship.daemon.server import main as daemon

        return daemon(sys.argv[2:], os.environ)
    from boxship.cli.main import main

    return main(sys.argv[1:], os.environ)


def boxshipd() -> int:
    """The daemon under its own name; returns its exit code."""
    import os
    import sys

    from boxship.daemon.server import main

    return main(sys.argv[1:], os.environ)
