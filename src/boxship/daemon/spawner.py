"""The spawner's composition: the shim's code, and boxrun's own code as its runtime.

Runs in: the spawner: `python -I -m boxship.daemon.spawner SOCKET`, started by `containerd-shim-boxship-v1` or by the daemon.
Not here: what it does (`boxship.shim.spawner`).
"""

from __future__ import annotations

import os
import select
import sys

from boxship.kit import failpoint
from boxship.shim import spawner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SIGCHLD, _SIGTERM, _SIGINT, _SIG_DFL = 17, 15, 2, 0


def carry_out(argv: Sequence[str], stdio: Sequence[int]) -> int:
    """A command line of boxrun, in a fork of the shim that ends with it: nothing is imported, and nothing that it does stays in
    the shim's memory. Returns the fork's pid; its children become the shim's. Raises OSError."""
    pid = os.fork()
    if pid:
        return pid
    # The fork: whatever happens, it ends here.
    code = 1
    try:
        code = _run(argv, stdio)
    finally:
        os._exit(code)


def _run(argv: Sequence[str], stdio: Sequence[int]) -> int:
    import _signal  # type: ignore[import-not-found]

    from boxship.runtime.command.main import Invocation
    from boxship.runtime.parent import Direct

    _signal.set_wakeup_fd(-1)
    for number in (_SIGCHLD, _SIGTERM, _SIGINT):
        _signal.signal(number, _SIG_DFL)
    return Invocation(list(argv), Direct(stdio), dict(os.environ), "/").run()


def main() -> int:
    """Returns the exit code."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m boxship.daemon.spawner SOCKET\n")
        return 2
    path = sys.argv[1]
    listener = spawner.listen(path)
    if listener is None:
        return 0
    from boxship.linux.cgroups import arrangement
    from boxship.runtime import warm

    warm.warm_up()
    failpoint.load({})
    # Woken when a mount comes or goes: the hierarchies may be others then.
    mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
    changed = select.poll()
    changed.register(mounts, select.POLLPRI)

    def is_stale() -> bool:
        if changed.poll(0):
            arrangement.forget()
        return warm.is_stale()

    spawner.serve(listener, path, carry_out, is_stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
