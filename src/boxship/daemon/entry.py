"""Where processes begin: the entry points that pyproject.toml and the native programs name.

Runs in: the process that the user started.
"""

from __future__ import annotations


def boxship() -> int:
    """The boxship command; returns its exit code."""
    import os
    import sys

    from boxship.cli.main import main

    return main(sys.argv[1:], os.environ)
