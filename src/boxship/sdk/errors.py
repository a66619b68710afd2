"""What calls of the engine raise: the project's one tree of errors, by the status of the answer.

Runs in: the caller's program.
Spec: Docker Engine API: 400 bad parameter, 401, 403, 404 no such object, 409 conflict, 501 not implemented, 503.
"""

from __future__ import annotations

from boxship.kit import errors

_BY_STATUS: dict[int, type[errors.BoxshipError]] = {
    400: errors.InvalidArgument,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    409: errors.FailedPrecondition,
    501: errors.Unsupported,
    503: errors.Unavailable,
}


class StartFailed(errors.BoxshipError):
    """The container was made and cannot start: `exit_code` is 127 (no such command), 126 (it cannot be executed) or 125."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CommandFailed(errors.BoxshipError):
    """A command whose success was asked for ended with `exit_code`; what it printed is in `stdout` and `stderr`."""

    def __init__(self, command: list[str], exit_code: int, stdout: str, stderr: str) -> None:
        last = (stderr.strip() or stdout.strip()).rpartition("\n")[2]
        super().__init__(f"{' '.join(command)} ended with {exit_code}{f': {last}' if last else ''}")
        self.command = command
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


def refusal(status: int, message: str) -> errors.BoxshipError:
    """The error for an answer that is one."""
    if status == 409 and ("already in use" in message or "already exists" in message):
        return errors.AlreadyExists(message)
    return _BY_STATUS.get(status, errors.BoxshipError)(message)
