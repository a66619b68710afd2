"""Hooks of the runtime namespace: prestart, createRuntime, poststart, poststop.

Runs in: the runtime, in the namespaces and folder of its caller.
Spec: runtime-spec 1.3.0, config.md "POSIX-platform Hooks".
Not here: createContainer and startContainer, which init runs (`boxship.runtime.init`).
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # the C part of `signal`, without its enums
import os
import select
import time

from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.oci.config import Hook

_OUTPUT_LIMIT = 1 << 16


def run_hooks(kind: str, hooks: list[Hook], state: bytes) -> None:
    """Run each with `state` on standard input, and stop at the first that fails.

    Raises BoxshipError with the exit status and what the hook printed. Blocks until each ends, or its timeout (seconds).
    """
    for i, hook in enumerate(hooks):
        try:
            _run(hook, state)
        except BoxshipError as error:
            raise BoxshipError(f"error running {kind} hook #{i}: {error}") from None


def _run(hook: Hook, state: bytes) -> None:
    stdin = os.memfd_create("state", os.MFD_CLOEXEC)
    os.write(stdin, state)
    os.lseek(stdin, 0, 0)
    out, out_end = os.pipe2(os.O_CLOEXEC)
    err, err_end = os.pipe2(os.O_CLOEXEC)
    try:
        env = dict(entry.split("=", 1) for entry in hook.env if "=" in entry)
        actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, out_end, 1), (os.POSIX_SPAWN_DUP2, err_end, 2)]
        try:
            pid = os.posix_spawn(
                hook.path, hook.args or [hook.path], env, file_actions=actions, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
            )
        except OSError as error:
            raise BoxshipError(f"fork/exec {hook.path}: {(error.strerror or '').lower()}") from None
        except ValueError as error:  # an empty name, a NUL byte
            raise BoxshipError(f"fork/exec {hook.path}: {error}") from None
    finally:
        os.close(stdin)
        os.close(out_end)
        os.close(err_end)
    deadline = time.monotonic() + hook.timeout if hook.timeout else None
    printed = {out: b"", err: b""}
    try:
        status = _collect(pid, printed, deadline)
    finally:
        os.close(out)
        os.close(err)
    if status is None:
        raise BoxshipError(f"hook ran past specified timeout of {float(hook.timeout or 0):.1f}s")
    if status:
        texts = [data.decode(errors="replace") for data in printed.values()]
        raise BoxshipError(f"{describe_status(status)}, stdout: {texts[0]}, stderr: {texts[1]}")


def describe_status(status: int) -> str:
    """A wait status in Go's words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"signal: {(signal.strsignal(number) or str(number)).lower()}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _collect(pid: int, printed: dict[int, bytes], deadline: float | None) -> int | None:
    """Read both pipes until the process ended; its wait status, or None when it was killed at the deadline."""
    handle = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    for fd in printed:
        poll.register(fd, select.POLLIN)
    try:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = poll.poll(left)
            if not ready:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
            for fd, _ in ready:
                if fd == handle:
                    continue
                data = os.read(fd, 65536)
                if not data:
                    poll.unregister(fd)
                elif len(printed[fd]) < _OUTPUT_LIMIT:
                    printed[fd] += data
            if [fd for fd, _ in ready] == [handle]:
                # Ended, and nothing left in the pipes: a daemon that the hook left behind may hold them open.
                return os.waitpid(pid, 0)[1]
    finally:
        os.close(handle)
