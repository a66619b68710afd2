"""The spawner's composition: the shim's code, and boxrun's own code as its runtime.

Runs in: the spawner: `python -I -m boxship.daemon.spawner SOCKET`, started by `containerd-shim-boxship-v1` or by the daemon.
Not here: what it does (`boxship.shim.spawner`).
"""

from __future__ import annotations

import os
import select
import sys

from boxship.linux.cgroups import arrangement
from boxship.runtime import warm
from boxship.runtime.command.main import Invocation
from boxship.runtime.parent import Direct
from boxship.shim import spawner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def run(argv: Sequence[str], stdio: Sequence[int], environ: dict[str, str]) -> int:
    """A command line of boxrun within this process, which is a fork made for it. Returns the exit code."""
    return Invocation(list(argv), Direct(stdio), environ, "/").run()


def main() -> int:
    """Returns the exit code."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m boxship.daemon.spawner SOCKET\n")
        return 2
    path = sys.argv[1]
    listener = spawner.listen(path)
    if listener is None:
        return 0
    warm.warm_up()
    # Woken when a mount comes or goes: the hierarchies may be others then.
    mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
    changed = select.poll()
    changed.register(mounts, select.POLLPRI)

    def is_stale() -> bool:
        if changed.poll(0):
            arrangement.forget()
        return warm.is_stale()

    spawner.Spawner(listener, path, run).serve(is_stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
