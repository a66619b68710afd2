"""Who becomes the parent of a container's first process, and waits for it.

Runs in: the runtime. Two ways with one face: `Direct`, in the process that the caller started; and the warm worker's
(`boxship.runtime.spawner`), where the caller's own process does the spawning on request, because containerd-shim,
conmon and dockerd expect init to be a descendant of theirs.
"""

from __future__ import annotations

import os

from boxship.linux import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Parent(Protocol):
        """Spawns executors and waits for them."""

        stdio: Sequence[int]
        """Descriptors of the caller's standard input, output and error."""
        pid: int
        """The process whose child init is: the caller's view of "self" for cgroups and limits."""

        def spawn(self, exe: int, name: str, stdio: Sequence[int], clone_flags: int) -> remote.Remote:
            """As `remote.spawn`."""

        def wait(self, pid: int) -> int:
            """The wait status of a child."""

        def inherited(self, count: int) -> list[int]:
            """Descriptors 3 … 3+count-1 as the caller holds them. Raises OSError EBADF when one is not open."""


class Direct:
    """The runtime's own process is the parent."""

    def __init__(self, stdio: Sequence[int] = (0, 1, 2)) -> None:
        self.stdio = stdio
        self.pid = os.getpid()

    def spawn(self, exe: int, name: str, stdio: Sequence[int], clone_flags: int) -> remote.Remote:
        """See `Parent`."""
        return remote.spawn(exe, name, stdio, clone_flags)

    def wait(self, pid: int) -> int:
        """See `Parent`."""
        return os.waitpid(pid, 0)[1]

    def inherited(self, count: int) -> list[int]:
        """See `Parent`."""
        fds = list(range(3, 3 + count))
        for fd in fds:
            os.fstat(fd)
        return fds
