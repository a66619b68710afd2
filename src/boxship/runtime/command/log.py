"""The log of a command: where runc's callers look for what went wrong.

Runs in: the runtime.
Spec: logrus's two formats, text and JSON; containerd and conmon read the last line of level "error" from the JSON one.
"""

from __future__ import annotations

import os

from boxship.kit.errors import InvalidArgument
from boxship.kit.files import write_all
from boxship.oci import text


class Log:
    """Writes lines of the levels asked for to a file or to standard error (descriptor `stderr`)."""

    def __init__(self, stderr: int, path: str = "", form: str = "text", *, debug: bool = False) -> None:
        """Raises InvalidArgument for an unknown format, OSError when the file cannot be opened."""
        if form not in ("", "text", "json"):
            raise InvalidArgument(f"invalid log-format: {form}")
        self.stderr = stderr
        self.to_file = bool(path)
        self.json = form == "json"
        self.debug = debug
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o644) if path else stderr

    def __call__(self, level: str, message: str) -> None:
        """Write one line."""
        if level == "debug" and not self.debug:
            return
        from boxship.runtime.create import now

        time = now().partition(".")[0].rstrip("Z") + "Z"
        if self.json:
            line = text.dumps({"level": level, "msg": message, "time": time})
        else:
            line = f"time={_quote(time)} level={level} msg={_quote(message)}"
        try:
            write_all(self.fd, line.encode(errors="surrogateescape") + b"\n")
        except OSError:
            pass  # a full disk under the log is no reason to fail what is logged

    def close(self) -> None:
        """Close the file, if it is one."""
        if self.to_file and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def fatal(self, message: str) -> None:
        """The error that ends the command: to the log, and to the user where the log is a file."""
        self("error", message)
        if self.to_file:
            write_all(self.stderr, message.encode(errors="surrogateescape") + b"\n")


def _quote(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'
