"""The parent of a container that a person waits for: signals are the container's from the first moment on.

Runs in: the boxship command, main thread.
Not here: passing signals on while the container runs (`boxship.runtime.parent`).
"""

from __future__ import annotations

import os
import signal

from boxship.linux import terminal as _terminal  # noqa: F401  # `attend` imports it when no time is to be lost
from boxship.linux.process import Signals
from boxship.runtime.parent import Direct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Foreground(Direct):
    """As `Direct`, but a signal that comes while the container is still being made is kept for it."""

    def __init__(self, stdio: Sequence[int]) -> None:
        super().__init__(stdio)
        self._early: Signals | None = Signals()

    def attend(self, pid: int, terminal: int) -> int:
        """See `boxship.runtime.parent.Parent`."""
        early, self._early = self._early, None
        try:
            if early is not None:
                try:
                    for number in os.read(early.fd, 512):
                        if number != signal.SIGWINCH:
                            os.kill(pid, number)
                except (BlockingIOError, ProcessLookupError):
                    pass
            # Takes the handlers over, and gives them back: at no moment does a signal end this process.
            return super().attend(pid, terminal)
        finally:
            if early is not None:
                early.close()
