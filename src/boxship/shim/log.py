"""The shim's log: lines for the daemon, by way of the FIFO `log` in the bundle.

Runs in: the shim. Spec: logrus' text format, which containerd copies to its own log as it is.
"""

from __future__ import annotations

import os
import time

from boxship.oci import text


class Log:
    """Lines are dropped while nobody reads: a shim waits for no log."""

    def __init__(self, path: str, *, debug: bool, kept: int = -1) -> None:
        """At `path`, unless there is a descriptor of it that was `kept`."""
        self.is_debug = debug
        self._fd = kept
        if kept >= 0:
            return
        try:
            # For reading too: the daemon's end may come and go, and there shall be no error when it is gone.
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            pass  # no log is no reason not to run

    def write(self, level: str, message: str, **fields: object) -> None:
        """One line; a debug line only with -debug."""
        if self._fd < 0 or (level == "debug" and not self.is_debug):
            return
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        more = "".join(f" {name}={text.dumps(str(value))}" for name, value in fields.items())
        line = f'time="{moment}Z" level={level} msg={text.dumps(message)}{more}\n'
        try:
            os.write(self._fd, line.encode(errors="replace"))
        except OSError:
            pass  # full, since nobody reads

    def fileno(self) -> int:
        """The descriptor, -1 without one. While it is open the daemon reads no end of file."""
        return self._fd

    def close(self) -> None:
        """No more lines."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
