"""All children of the shim: containers' processes, which come to it when the runtime that made them ends, commands, loggers.

Runs in: a worker of the shim. Containers' processes come to its parent, the holder, which is a subreaper and tells of their
ends (`src/native/hold.c`); the worker's own children are commands. Spec: wait(2), prctl(2) PR_SET_CHILD_SUBREAPER.

A process can be over before the shim learns that it is a container's: its number is in a file of the command that made it. So
while a command is under way every end is kept, also those of strangers.
"""

from __future__ import annotations

import os
import time
from _struct import Struct

from boxship.kit.loop import IN, Later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from boxship.api.oci_runtime.runtime import Command
    from boxship.kit.loop import Inbox, Loop

_SIGCHLD = 17
_ENDED = Struct("=qii")


class Children:
    """Ends of children, each with its time."""

    def __init__(self, loop: Loop, inbox: Inbox, control: int) -> None:
        """`control`: where the holder tells of its children, and of signals to it."""
        self._inbox = inbox
        self._control = control
        self._waiting: dict[int, Later] = {}
        self._strangers: dict[int, tuple[int, int]] = {}
        self._commands = 0
        self._inline = 0
        inbox.on(_SIGCHLD, self._reap)
        loop.add(control, IN, self._told)

    @property
    def are_quiet(self) -> bool:
        """Whether no command is under way."""
        return not self._commands

    def end(self, pid: int) -> Later:
        """(wait status, time in ns) of a child, when it has ended."""
        later = self._waiting.get(pid)
        if later is None:
            later = Later()
            if pid in self._strangers:
                later.set(self._strangers.pop(pid))
            else:
                self._waiting[pid] = later
        return later

    def ended(self, code: int) -> int:
        """A number like a pid's, for what was carried out without a child and ended with an exit code."""
        self._inline -= 1
        self._strangers[self._inline] = code << 8, time.time_ns()
        return self._inline

    def carry_out(self, command: Command) -> Generator[Later, object, bytes]:
        """A step: wait for the command. Returns what it printed; raises BoxshipError."""
        self._commands += 1
        try:
            ended = yield self.end(command.pid)
            assert isinstance(ended, tuple)
            return command.finish(ended[0])
        finally:
            self._commands -= 1

    def forget(self) -> None:
        """Throw away the ends of strangers when no command can explain them any more."""
        if not self._commands:
            self._strangers.clear()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self._end(pid, (status, time.time_ns()))
        self.forget()

    def _told(self, events: int) -> None:
        while True:
            try:
                at_ns, pid, status = _ENDED.unpack(os.read(self._control, _ENDED.size))
            except BlockingIOError:
                break
            if pid:
                self._end(pid, (status, at_ns))
            else:
                self._inbox.call(status)
        self.forget()

    def _end(self, pid: int, end: tuple[int, int]) -> None:
        later = self._waiting.pop(pid, None)
        if later is not None:
            later.set(end)
        else:
            self._strangers[pid] = end
