"""Work that is done in a fork of the shim, and what carries a runtime's commands out there.

Runs in: the shim; the functions handed in run in the forks.

A shim lives as long as its container, and what it touches in its memory is its own from then on: the reference counts in it make
every look a write. So what is done once, and is more than a few lines, is done by a fork that ends with it. Its children, the
container's first process among them, become the shim's.
"""

from __future__ import annotations

import os

from boxship.abi import syscalls
from boxship.linux import _sys
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from boxship.api.oci_runtime.runtime import Carrier

    OwnRuntime = Callable[[Sequence[str], Sequence[int], dict[str, str]], int]
    """(argv, standard streams, environment) → exit code: a runtime within this process."""

_SIGCHLD, _SIGKILL, _SIGTERM, _SIGINT, _SIGPIPE, _SIG_DFL = 17, 9, 15, 2, 13, 0
_PR_SET_PDEATHSIG = 1


def in_fork(work: Callable[[], int]) -> int:
    """Do `work` in a fork, which ends with the code that it returns, or with the shim; the fork's pid. Raises OSError.

    It has the shim's sockets open: a shim that is killed would seem to live for as long as a fork of it does.
    """
    shim = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # The fork: whatever happens, it ends here and never goes on as a second shim.
    code = 1
    try:
        import _signal  # type: ignore[import-not-found]

        _sys.syscall(syscalls.PRCTL, _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != shim:
            return 0  # it was killed meanwhile; `finally` ends this
        _signal.set_wakeup_fd(-1)
        for number in (_SIGCHLD, _SIGTERM, _SIGINT):
            _signal.signal(number, _SIG_DFL)
        code = work()
    finally:
        os._exit(code)


def programs(environ: bytes) -> Carrier:
    """Commands are programs of PATH. `environ`: see `pack_environ`."""

    def carry(argv: Sequence[str], stdio: Sequence[int], around: Callable[[Callable[[], int]], int] | None = None) -> int:
        if around is None:
            return in_fork(lambda: _become(argv, stdio, environ))

        def go() -> int:
            _, status = os.waitpid(in_fork(lambda: _become(argv, stdio, environ)), 0)
            return os.waitstatus_to_exitcode(status)

        return in_fork(lambda: around(go))

    return carry


def own(run: OwnRuntime, environ: bytes) -> Carrier:
    """Commands are calls of `run`."""

    def carry(argv: Sequence[str], stdio: Sequence[int], around: Callable[[Callable[[], int]], int] | None = None) -> int:
        def go() -> int:
            return run(argv, stdio, unpack_environ(environ))

        return in_fork(go if around is None else lambda: around(go))

    return carry


def inline(run: OwnRuntime, environ: bytes, ended: Callable[[int], int]) -> Carrier:
    """Commands are calls of `run` in the shim itself, which does nothing else meanwhile: for those that take a millisecond, less
    than a fork. `ended` takes the exit code and gives the number to wait for."""

    def carry(argv: Sequence[str], stdio: Sequence[int], around: Callable[[Callable[[], int]], int] | None = None) -> int:
        assert around is None
        return ended(run(argv, stdio, unpack_environ(environ)))

    return carry


def _become(argv: Sequence[str], stdio: Sequence[int], environ: bytes) -> int:
    import _signal

    _signal.signal(_SIGPIPE, _SIG_DFL)
    high = [os.dup(fd) for fd in stdio]  # above 2, which are open
    for number, fd in enumerate(high):
        os.dup2(fd, number)
    try:
        os.execvpe(argv[0], list(argv), unpack_environ(environ))
    except OSError as error:
        # Standard error is the container's. The runtime would report to its log, so that is where this is looked for.
        complaint = text.dumps({"level": "error", "msg": f"exec: {argv[0]}: {(error.strerror or '').lower()}"})
        with open(argv[argv.index("--log") + 1], "a") as log:
            log.write(complaint + "\n")
        return 127


def pack_environ(environ: dict[str, str]) -> bytes:
    """One piece of memory in place of two for each variable, which are looked at in forks only."""
    return "\0".join(f"{name}={value}" for name, value in environ.items()).encode(errors="surrogateescape")


def unpack_environ(environ: bytes) -> dict[str, str]:
    """Undo `pack_environ`."""
    found = {}
    for pair in environ.decode(errors="surrogateescape").split("\0"):
        name, equals, value = pair.partition("=")
        if equals:
            found[name] = value
    return found
