"""Whom this process works for, and where that user's state lies.

Runs in: any process. An ordinary user's daemon is root of that user's namespaces (`boxship.daemon.rootless`), and so is all that
it starts: there the effective id says nothing, and a variable says who it is.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

UID_VARIABLE = "BOXSHIP_ROOTLESS_UID"
"""The user's id outside of the namespaces."""


def user_of(environ: Mapping[str, str]) -> int:
    """The id of the user, 0 for root of the machine."""
    return int(environ.get(UID_VARIABLE) or os.geteuid())


def run_folder(environ: Mapping[str, str]) -> str:
    """Where what goes with a reboot lies: "/run", or the user's $XDG_RUNTIME_DIR or what stands in for it."""
    uid = user_of(environ)
    return "/run" if uid == 0 else environ.get("XDG_RUNTIME_DIR") or f"/tmp/boxship-{uid}"
