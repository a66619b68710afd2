"""An OCI runtime, reached by its command line: runc's words, which crun, runsc, kata-runtime and boxrun understand too.

Runs in: the shim.
Spec: runc's command line; go-runc for what shims use of it.

The seam is argv, and how a command is carried out is handed in: `execute` starts the program of that name; a shim does it in
a fork of its own, where boxrun's commands need no program (`boxship.shim.forks`). Either way a command is a child process, so
that a shim never waits for one, and what goes wrong in it is in the file that `--log` names.

Not here: waiting for the child, which the shim's loop does for all its children.
"""

from __future__ import annotations

import os

from boxship.kit.errors import BoxshipError, FailedPrecondition, NotFound, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    Around = Callable[[Callable[[], int]], int]
    """Given the command as a function that returns its exit code, does it and what belongs to it; returns the exit code."""

    class Carrier(Protocol):
        """Begins commands."""

        def __call__(self, argv: Sequence[str], stdio: Sequence[int], around: Around | None = None) -> int:
            """`stdio`: three descriptors, borrowed; `around` is carried out in the child. Returns its pid. Raises OSError."""


def execute(
    argv: Sequence[str], stdio: Sequence[int], around: Around | None = None, environ: Mapping[str, str] | None = None,
) -> int:
    """Start the program `argv[0]` of PATH; `around` is not for a program. Raises OSError."""
    assert around is None
    # Out of the way first: a descriptor must not be replaced before it was given its place.
    import fcntl

    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in stdio]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high)]
        return os.posix_spawnp(argv[0], list(argv), environ or os.environ, file_actions=actions, setsigmask=(),
                               setsigdef=(13, 17))  # SIGPIPE, SIGCHLD: Python's own settings are not the program's
    finally:
        for fd in high:
            os.close(fd)


class Command:
    """A command under way: `finish` it with the child's wait status."""

    __slots__ = ("_log", "_log_start", "_output", "name", "pid")

    def __init__(self, name: str, pid: int, output: int, log: str, log_start: int) -> None:
        self.name = name
        self.pid = pid
        self._output = output
        self._log = log
        self._log_start = log_start

    def finish(self, status: int) -> bytes:
        """What the command printed. Raises BoxshipError with the runtime's own words."""
        output = b""
        if self._output >= 0:
            output = os.pread(self._output, 1 << 20, 0)
            os.close(self._output)
            self._output = -1
        if status == 0:
            return output
        raise BoxshipError(self._complaint() or output.decode(errors="replace").strip() or _fate(self.name, status))

    def _complaint(self) -> str:
        """The last error in the log since the command began."""
        import json

        try:
            fd = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            text = os.pread(fd, 1 << 20, self._log_start).decode(errors="replace")
        finally:
            os.close(fd)
        message = ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                message = str(entry.get("msg", ""))
        return message


def _fate(name: str, status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"runtime {name}: signal {os.WTERMSIG(status)}"
    return f"runtime {name}: exit status {os.WEXITSTATUS(status)}"


class Runtime:
    """One runtime for one container. Each method begins a command. Raises Unavailable when it cannot be started."""

    def __init__(
        self, binary: str, root: str, log: str, *, systemd_cgroup: bool = False, carrier: Carrier = execute, debug: bool = False,
    ) -> None:
        """`root`: where the runtime keeps its state; `log`: the file that it reports to."""
        self.binary = binary
        self.log = log
        self._carrier = carrier
        self._global = [binary, "--root", root, "--log", log, "--log-format", "json"]
        if debug:
            self._global.append("--debug")
        if systemd_cgroup:
            self._global.append("--systemd-cgroup")

    def _begin(self, arguments: Sequence[str], stdio: Sequence[int] | None = None, around: Around | None = None) -> Command:
        output = null = -1
        try:
            log_start = os.stat(self.log).st_size
        except OSError:
            log_start = 0
        try:
            if stdio is None:
                null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
                output = os.memfd_create("runtime", os.MFD_CLOEXEC)
                stdio = (null, output, output)
            pid = self._carrier([*self._global, *arguments], stdio, around)
        except OSError as error:
            if output >= 0:
                os.close(output)
            raise Unavailable(f"{self.binary}: {(error.strerror or str(error)).lower()}") from None
        finally:
            if null >= 0:
                os.close(null)
        return Command(arguments[0], pid, output, self.log, log_start)

    def create(
        self, id: str, bundle: str, stdio: Sequence[int] | None, *, pid_file: str, console_socket: str = "",  # noqa: A002
        no_pivot: bool = False, no_new_keyring: bool = False, around: Around | None = None,
    ) -> Command:
        """Make the container; with `console_socket` its terminal is sent there, and `stdio` is None."""
        arguments = ["create", "--bundle", bundle, "--pid-file", pid_file]
        if console_socket:
            arguments += ["--console-socket", console_socket]
        if no_pivot:
            arguments.append("--no-pivot")
        if no_new_keyring:
            arguments.append("--no-new-keyring")
        return self._begin([*arguments, id], stdio, around)

    def restore(
        self, id: str, bundle: str, stdio: Sequence[int] | None, *, image: str, work: str, pid_file: str,  # noqa: A002
        console_socket: str = "", no_pivot: bool = False, around: Around | None = None,
    ) -> Command:
        """Make and start the container from a checkpoint."""
        arguments = ["restore", "--detach", "--bundle", bundle, "--pid-file", pid_file, "--image-path", image,
                     "--work-path", work, "--manage-cgroups-mode", "soft", "--ext-unix-sk", "--tcp-established", "--file-locks"]
        if console_socket:
            arguments += ["--console-socket", console_socket]
        if no_pivot:
            arguments.append("--no-pivot")
        return self._begin([*arguments, id], stdio, around)

    def start(self, id: str) -> Command:  # noqa: A002
        """Let the container's process go on."""
        return self._begin(["start", id])

    def exec(
        self, id: str, process_file: str, stdio: Sequence[int] | None, *, pid_file: str, console_socket: str = "",  # noqa: A002
    ) -> Command:
        """Start one more process, described by a file (runtime-spec's Process as JSON)."""
        arguments = ["exec", "--detach", "--process", process_file, "--pid-file", pid_file]
        if console_socket:
            arguments += ["--console-socket", console_socket]
        return self._begin([*arguments, id], stdio)

    def kill(self, id: str, signal: int, *, all: bool = False) -> Command:  # noqa: A002
        """Send a signal to init, or to all."""
        return self._begin(["kill", *(["--all"] if all else []), id, str(signal)])

    def delete(self, id: str, *, force: bool = False) -> Command:  # noqa: A002
        """Remove a stopped container; with `force` one that runs too, and it is no error if there is none."""
        return self._begin(["delete", *(["--force"] if force else []), id])

    def pause(self, id: str) -> Command:  # noqa: A002
        """Freeze all processes."""
        return self._begin(["pause", id])

    def resume(self, id: str) -> Command:  # noqa: A002
        """Let them go on."""
        return self._begin(["resume", id])

    def ps(self, id: str) -> Command:  # noqa: A002
        """Prints the pids of all processes as a JSON list."""
        return self._begin(["ps", "--format", "json", id])

    def update(self, id: str, resources: bytes) -> Command:  # noqa: A002
        """Change the limits: runtime-spec's LinuxResources as JSON."""
        given = os.memfd_create("resources", os.MFD_CLOEXEC)
        output = os.memfd_create("runtime", os.MFD_CLOEXEC)
        try:
            os.write(given, resources)
            os.lseek(given, 0, os.SEEK_SET)
            command = self._begin(["update", "--resources", "-", id], (given, output, output))
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(given)
        command._output = output
        return command

    def features(self) -> Command:
        """Prints what the runtime can do, as JSON."""
        return self._begin(["features"])

    def checkpoint(self, id: str, *, image: str, work: str, flags: Sequence[str] = ()) -> Command:  # noqa: A002
        """Write the processes' state to a folder; `flags` as runc's checkpoint has them."""
        return self._begin(["checkpoint", "--image-path", image, "--work-path", work, *flags, id])


def of_kill(error: BoxshipError) -> BoxshipError:
    """What a failed `kill` means to the shim's clients."""
    text = str(error).lower()
    for part in ("process already finished", "container not running", "no such process", "container is not running"):
        if part in text:
            return NotFound("process already finished")
    if "does not exist" in text or "no such container" in text:
        return NotFound("no such container")
    if "cannot kill" in text:
        return FailedPrecondition(str(error))
    return BoxshipError(f"unknown error after kill: {error}")
