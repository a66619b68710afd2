"""The sealed copy of init's program.

Runs in: the runtime. Every container's first process is started from it, and its /proc/self/exe is all that a container
ever gets to see of the runtime: anonymous memory that nobody can write to (CVE-2019-5736).
"""

from __future__ import annotations

import os

from boxship.kit.errors import Unavailable
from boxship.kit.files import read_all
from boxship.linux.remote import sealed

_NAME = "boxrun-init"
EXECUTOR_LINK = f"/memfd:{_NAME} (deleted)"
"""What /proc/PID/exe leads to, as long as init has not become the user's program."""

_copy = -1


def executor() -> int:
    """An open descriptor of the copy, made at the first call; it stays the module's."""
    global _copy
    if _copy < 0:
        path = os.path.join(os.path.dirname(__file__), "_init")
        try:
            _copy = sealed(read_all(path), _NAME)
        except FileNotFoundError:
            raise Unavailable(f"{path} is missing", "build the package again: make build") from None
    return _copy
