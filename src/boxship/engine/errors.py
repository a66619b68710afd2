"""Errors as Docker's clients read them: status codes, and the words about a start that failed.

Runs in: the daemon.
Spec: Docker Engine API, ErrorResponse; dockerd's exit codes 126, 127 and 128 for commands that could not be run.
"""

from __future__ import annotations

from boxship.kit import errors as kit

_STATUS: dict[type[kit.BoxshipError], int] = {
    kit.InvalidArgument: 400, kit.OutOfRange: 400, kit.NotFound: 404, kit.AlreadyExists: 409, kit.FailedPrecondition: 409,
    kit.Aborted: 409,
    kit.PermissionDenied: 403, kit.Unauthenticated: 401, kit.Unavailable: 503, kit.Unsupported: 501, kit.DeadlineExceeded: 504,
}


class NotModified(kit.BoxshipError):
    """What was asked for is so already."""


class Failed(kit.BoxshipError):
    """A container or process that could not be started; `exit_code` is what Docker says it ended with."""

    def __init__(self, message: str, exit_code: int, status: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.status = status

    @classmethod
    def of(cls, error: kit.BoxshipError, *, doing: str = "failed to create task for container: ") -> Failed:
        """`error` in Docker's words; what the engine itself refused keeps its text and status."""
        text = str(error)
        lower = text.lower()
        if "runtime" not in lower and "shim" not in lower and "task" not in lower:
            return cls(text, 128, 400 if text.startswith("unable to find") else status_of(error))
        if not text.startswith("failed to "):
            text = doing + text
        if any(words in lower for words in ("executable file not found", "no such file or directory",
            "system cannot find the file")):
            return cls(text, 127, 400)
        if "permission denied" in lower or "is a directory" in lower:
            return cls(text, 126, 400)
        if "not a directory" in lower:
            text += (": Are you trying to mount a directory onto a file (or vice-versa)? Check if the specified host path exists"
                     " and is the expected type")
            return cls(text, 127, 400)
        return cls(text, 128, 500)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Failed):
        return error.status
    if isinstance(error, NotModified):
        return 304
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
