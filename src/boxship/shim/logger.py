"""Programs that take a container's output: `binary://` log URIs.

Runs in: the shim.
Spec: containerd's docs on logging: the program gets `KEY VALUE …` of the URI's query as arguments, CONTAINER_ID and
CONTAINER_NAMESPACE as its environment, and as descriptors 3, 4 and 5 stdout, stderr and a pipe that it closes when it is ready.
At the end it is sent SIGTERM, and SIGKILL 12 s later. `binary-v2` writes a byte first, so that one that dies at once is noticed.
"""

from __future__ import annotations

import os

from boxship.kit.errors import BoxshipError, DeadlineExceeded, Unavailable
from boxship.kit.loop import IN, Later
from boxship.shim.stdio import split_uri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from boxship.kit.loop import Loop
    from boxship.shim.children import Children

SCHEMES = ("binary", "binary-v2")
_READY_S = 10.0
_END_S = 12.0
_SIGTERM, _SIGKILL = 15, 9


class Logger:
    """One program for one process. `start` is a step.

    Attributes:
        pid: the program, 0 before it was started and after `close`.
        stdout, stderr: what the process is to be given, until `handed_over`.
    """

    def __init__(self, loop: Loop, children: Children) -> None:
        self._loop = loop
        self._children = children
        self.pid = 0
        self.stdout = -1
        self.stderr = -1

    def start(self, uri: str, id: str, namespace: str) -> Generator[Later, object, None]:  # noqa: A002
        """Start it, and wait until it is ready. Raises Unavailable, DeadlineExceeded."""
        scheme, path, query = split_uri(uri)
        out, self.stdout = os.pipe2(os.O_CLOEXEC)
        err, self.stderr = os.pipe2(os.O_CLOEXEC)
        ready, theirs = os.pipe2(os.O_CLOEXEC)
        environ = {"CONTAINER_ID": id, "CONTAINER_NAMESPACE": namespace}
        try:
            self.pid = _spawn([path, *_arguments(query)], environ, (out, err, theirs))
        except OSError as error:
            os.close(ready)
            self.close()
            raise Unavailable(f"failed to start binary process: {path}: {(error.strerror or '').lower()}") from None
        finally:
            for fd in (out, err, theirs):
                os.close(fd)
        came = Later()
        timer = self._loop.after(_READY_S, lambda: came.fail(DeadlineExceeded("failed to wait for binary to be ready")))
        self._loop.add(ready, IN, lambda events: came.set())
        try:
            yield came
            if os.read(ready, 1) == b"" and scheme == "binary-v2":
                raise BoxshipError(f"logging binary {path} ended before it was ready")
        except BoxshipError:
            self.close()
            raise
        finally:
            timer.cancel()
            self._loop.remove(ready)
            os.close(ready)

    def handed_over(self) -> None:
        """Others hold the writing ends now."""
        for fd in (self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdout = self.stderr = -1

    def close(self) -> None:
        """Let it end: it reads an end of file, and is sent SIGTERM."""
        self.handed_over()
        pid, self.pid = self.pid, 0
        if pid <= 0:
            return
        end = self._children.end(pid)
        if end.done:
            return
        os.kill(pid, _SIGTERM)
        timer = self._loop.after(_END_S, lambda: None if end.done else os.kill(pid, _SIGKILL))
        end.then(lambda later: timer.cancel())


def _arguments(query: str) -> list[str]:
    from urllib.parse import unquote_plus

    arguments = []
    seen = set()
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if key and key not in seen:
            seen.add(key)
            arguments += [unquote_plus(key), unquote_plus(value)]
    return arguments


def _spawn(argv: list[str], environ: dict[str, str], fds: tuple[int, int, int]) -> int:
    import fcntl

    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, 3 + number) for number, fd in enumerate(high)]
        return os.posix_spawn(argv[0], argv, environ, file_actions=actions, setsigmask=(), setsigdef=(13, 17), setpgroup=0)
    finally:
        for fd in high:
            os.close(fd)
