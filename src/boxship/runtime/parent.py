"""Who becomes the parent of a container's first process, and waits for it.

Runs in: the runtime. Two ways with one face: `Direct`, in the process that the caller started; and the warm worker's
(`boxship.runtime.warm`), where the caller's own process does the spawning on request, because containerd-shim, conmon and
dockerd expect init to be a descendant of theirs.
"""

from __future__ import annotations

import _thread
import os

from boxship.linux import remote
from boxship.linux.process import Signals, exit_code

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

        def spawn(self, exe: int, name: str, stdio: Sequence[int], clone_flags: int, cgroup: int = -1) -> remote.Remote:
            """As `remote.spawn`."""

        def wait(self, pid: int) -> int:
            """The wait status of a child."""

        def attend(self, pid: int, terminal: int) -> int:
            """Wait for a child in the foreground: signals that the caller gets are passed on to it, and `terminal` (the
            master side, taken; -1 for none) is connected to the caller's. Returns its exit status, 128 + n for signal n."""

        def inherited(self, count: int) -> list[int]:
            """Descriptors 3 … 3+count-1 as the caller holds them. Raises OSError EBADF when one is not open."""


_main_thread = _thread.get_ident()


class Direct:
    """The runtime's own process is the parent."""

    def __init__(self, stdio: Sequence[int] = (0, 1, 2)) -> None:
        self.stdio = stdio
        self.pid = os.getpid()

    def spawn(self, exe: int, name: str, stdio: Sequence[int], clone_flags: int, cgroup: int = -1) -> remote.Remote:
        """See `Parent`."""
        return remote.spawn(exe, name, stdio, clone_flags, cgroup)

    def wait(self, pid: int) -> int:
        """See `Parent`."""
        return os.waitpid(pid, 0)[1]

    def attend(self, pid: int, terminal: int) -> int:
        """See `Parent`. From another thread than the main one signals are not passed on: Python has no handlers there."""
        import _signal as signal  # type: ignore[import-not-found]
        import select

        from boxship.linux.terminal import Session

        signals = Signals() if _thread.get_ident() == _main_thread else None
        session = Session(terminal, self.stdio[0], self.stdio[1]) if terminal >= 0 else None
        handle = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if signals is not None:
            poll.register(signals.fd, select.POLLIN)
        try:
            while True:
                if session is not None:
                    session.register(poll)
                ready = dict(poll.poll())
                if signals is not None and signals.fd in ready:
                    for number in os.read(signals.fd, 512):
                        if number == signal.SIGWINCH and session is not None:
                            session.resize()
                        else:
                            signal.pidfd_send_signal(handle, number)
                if session is not None:
                    session.copy(ready)
                if handle in ready:
                    return exit_code(os.waitpid(pid, 0)[1])
        finally:
            os.close(handle)
            if session is not None:
                session.close()
            if signals is not None:
                signals.close()

    def inherited(self, count: int) -> list[int]:
        """See `Parent`."""
        fds = range(3, 3 + count)
        for fd in fds:
            os.fstat(fd)
        return list(fds)

