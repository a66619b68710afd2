"""What every command of the runtime is given: where state lies, how cgroups are driven, whom to tell.

Runs in: the runtime, in one process per command (or the worker that serves it).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.runtime.parent import Parent

DEBUG, INFO, WARNING, ERROR = "debug", "info", "warning", "error"


def _silent(level: str, message: str) -> None:
    """The default log of library callers."""


class Context:
    """The surroundings of a command. Immutable by agreement once the command runs.

    Attributes:
        root: folder that holds one folder of state per container.
        no_cgroups: whether containers made now stay in the caller's cgroups (podman's --cgroups=disabled).
        systemd_cgroup: whether containers made now are put into systemd scopes.
        rootless: whether cgroup errors for want of permission are forgiven; None: for who is not root of the machine.
        log: called with a level and a message.
        parent: who becomes the parent of processes that the runtime starts.
        environ, cwd: of the caller, which need not be those of this process.
    """

    __slots__ = ("cwd", "environ", "log", "no_cgroups", "parent", "root", "rootless", "systemd_cgroup")

    def __init__(
        self, root: str = "", *, parent: Parent | None = None, systemd_cgroup: bool = False, rootless: bool | None = None,
        log: Callable[[str, str], None] = _silent, environ: dict[str, str] | None = None, cwd: str | None = None,
    ) -> None:
        self.environ = dict(os.environ) if environ is None else environ
        self.root = root or default_root(self.environ)
        self.cwd = cwd or os.getcwd()
        if not self.root.startswith("/"):
            self.root = os.path.join(self.cwd, self.root)
        self.systemd_cgroup = systemd_cgroup
        self.no_cgroups = False
        self.rootless = _is_rootless() if rootless is None else rootless
        self.log = log
        if parent is None:
            from boxship.runtime.parent import Direct

            parent = Direct()
        self.parent = parent

    def debug(self, message: str) -> None:
        """Tell those who asked for --debug."""
        self.log(DEBUG, message)

    def warn(self, message: str) -> None:
        """Tell the user of something that was done differently from what was asked."""
        self.log(WARNING, message)


def _is_rootless() -> bool:
    """As runc decides: root of a user namespace may have no more rights than its owner."""
    if os.geteuid() != 0:
        return True
    from boxship.linux.cgroups.arrangement import in_user_namespace

    return in_user_namespace()


def default_root(environ: dict[str, str]) -> str:
    """/run/boxship/boxrun, or below $XDG_RUNTIME_DIR for an ordinary user."""
    if os.geteuid() != 0:
        runtime_dir = environ.get("XDG_RUNTIME_DIR")
        if runtime_dir:
            return runtime_dir + "/boxship/boxrun"
    return "/run/boxship/boxrun"
